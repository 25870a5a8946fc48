"""Changes in any order under an API server of the worst manners: in the end it is what a fresh list gives."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from tests.apiserver import GOOD, APIServer, Manner
from tests.e2e.node import endpoints, port, service
from tests.sources.cluster import (
    PACE,
    eventually,
    follow,
    meant,
    node_object,
)

Run = Callable[[Coroutine[Any, Any, Any]], Any]


def random_change(rng: random.Random, api: APIServer) -> None:
    """Any event: of few objects, so that they meet."""
    number = rng.randrange(6)
    name = f"s{number}"
    value = rng.choice(
        [
            service(name, f"10.96.0.{number + 1}", [port(80, name="a"), port(81, name="b")][: rng.randint(1, 2)]),
            service(name, "None", [port(80)]),
            service(name, "not an address", [port(80)]),
            endpoints(name, [f"10.1.0.{rng.randint(1, 9)}:80" for _ in range(rng.randint(0, 3))], port_name="a"),
            endpoints(name, [f"10.1.0.{rng.randint(1, 9)}:80"], port_name="b", ready=rng.random() < 0.5),
        ]
    )
    if rng.random() < 0.1:
        value["metadata"].setdefault("labels", {})["service.kubernetes.io/headless"] = ""
    if rng.random() < 0.3:
        api.delete(value)
    elif "not an address" not in str(value):
        api.put(value)
    if rng.random() < 0.05:
        api.put(node_object(rng.choice(["zone-a", "zone-b"])))
    if rng.random() < 0.1:
        api.bookmark()
    if rng.random() < 0.03:
        api.forget()


def random_manner(rng: random.Random) -> Manner:
    limit = rng.choice([rng.randrange(400), rng.randrange(4000)])
    return rng.choice(
        [
            GOOD,
            Manner(cut=limit),
            Manner(cut=limit, pieces=rng.randint(1, 50)),
            Manner(pieces=rng.randint(1, 7)),
            Manner(silent=limit),
            Manner(events=rng.randint(0, 3)),
            Manner(status=rng.choice([401, 403, 404, 410, 429, 500, 503])),
            Manner(error={"kind": "Status", "code": rng.choice([410, 429, 500, 504])}),
        ]
    )


@pytest.mark.parametrize("seed", range(12))
def test_whatever_happens_in_the_end_it_is_what_a_fresh_list_gives(run: Run, seed: int) -> None:
    rng = random.Random(seed)
    api = APIServer()
    api.gone_by_status = rng.random() < 0.5
    manners = random.Random(seed + 1000)
    bad = [True]
    api.manner = lambda request: random_manner(manners) if bad[0] and manners.random() < 0.7 else GOOD

    async def main() -> None:
        pace = dataclasses.replace(PACE, stall=0.1)
        async with follow(api, pace=pace, seed=seed).running() as follower:
            for _ in range(120):
                random_change(rng, api)
                await asyncio.sleep(rng.choice([0, 0, 0.002, 0.01]))
                if rng.random() < 0.02:
                    api.away()
                    api.back()
            bad[0] = False
            await eventually(lambda: follower.last == meant(api) and follower.published)
            await asyncio.sleep(0.2)
            assert follower.last == meant(api), "and stays so"

    with api:
        run(main())
