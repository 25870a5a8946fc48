"""What is served while the API server is away or silent, and what is kept for then on disk."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.apiserver import GOOD, APIServer, Manner
from tests.e2e.node import endpoints, port, service
from tests.sources.cluster import (
    NODE,
    PACE,
    WEB,
    WEB_SLICE,
    Follower,
    eventually,
    follow,
    meant,
    node_object,
    only,
)
from userspace_proxy.model import Node
from userspace_proxy.sources.base import Told
from userspace_proxy.sources.credentials import Access

Run = Callable[[Coroutine[Any, Any, Any]], Any]


def test_while_the_api_server_is_away_nothing_changes(
    api: APIServer, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "userspace_proxy")

    async def main() -> None:
        async with follow(api).running() as follower:
            await eventually(lambda: sum(r.verb == "watch" for r in api.requests) == 3)
            published = len(follower.published)
            api.away()
            api.put(service("dns", "10.96.0.11", [port(53)]))
            api.delete(WEB_SLICE)
            await asyncio.sleep(0.5)
            assert len(follower.published) == published
            assert follower.services == ["web"]
            api.back()
            await eventually(lambda: follower.last == meant(api))
            assert follower.services == ["dns", "web"]
            await eventually(lambda: "services are followed again" in caplog.text)

    run(main())
    assert sum(r.verb == "list" for r in api.requests) == 3, "what was missed came by the watches"


def test_a_saved_state_is_served_until_the_api_server_is_back(
    api: APIServer, run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def first() -> None:
        async with follow(api, state=tmp_path).running() as follower:
            await eventually(lambda: follower.published)
            api.put(endpoints("web", ["10.1.0.3:8080"]))
            await eventually(lambda: follower.addresses("web") == ["10.1.0.3:8080"])
        # The end saves what the debouncing has not written yet.

    async def second() -> None:
        async with follow(api, state=tmp_path).running() as follower:
            await eventually(lambda: follower.published)
            assert follower.last == before
            await asyncio.sleep(0.3)
            assert len(follower.published) == 1
            api.back()
            await eventually(lambda: follower.last == meant(api))
            assert len(follower.published) == 2

    run(first())
    before = meant(api)
    api.away()
    api.put(service("dns", "10.96.0.11", [port(53)]))
    api.delete(WEB)
    run(second())
    assert "is served until the API server has told its own" in caplog.text


def test_what_was_told_before_is_served_at_once_where_it_is_of_the_same(api: APIServer, run: Run) -> None:
    """Twice in a row, too: a successor that hears nothing passes on what it was given."""

    async def first() -> None:
        async with follow(api).running() as follower:
            await eventually(lambda: follower.published)
        told.append(follower.source.told)

    async def second() -> None:
        silent = dataclasses.replace(PACE, stall=60.0, patience=60.0)
        async with follow(api, before=told[-1], pace=silent).running() as follower:
            await eventually(lambda: follower.published)
            assert follower.published == [told[0].snapshot]
        told.append(follower.source.told)

    async def third() -> None:
        async with follow(api, before=told[-1]).running() as follower:
            await eventually(lambda: follower.services == ["dns", "web"])
        assert follower.services == ["dns", "web"]
        assert follower.published[0] == told[0].snapshot

    async def others() -> None:
        other = dataclasses.replace(told[0], server="http://192.0.2.1:1")
        for follower in (follow(api, before=other), follow(api, node="node-2", before=told[0])):
            async with follower.running():
                await asyncio.sleep(0.3)
            assert not follower.published
            assert follower.source.told is None

    told: list[Told] = []
    run(first())
    api.away()
    run(second())
    run(second())
    run(others())
    api.put(service("dns", "10.96.0.11", [port(53)]))
    api.back()
    run(third())


def test_a_state_that_was_about_to_be_saved_at_the_end_is_saved(api: APIServer, run: Run, tmp_path: Path) -> None:
    """The saving has begun, but not its thread: all of them are busy."""
    gate = threading.Event()

    async def main() -> None:
        threads = ThreadPoolExecutor(1)
        asyncio.get_running_loop().set_default_executor(threads)
        async with follow(api, state=tmp_path).running() as follower:
            await eventually(lambda: follower.published)
            await eventually(lambda: any(tmp_path.iterdir()))
            threads.submit(gate.wait)
            api.put(endpoints("web", ["10.1.0.3:8080"]))
            await eventually(lambda: follower.addresses("web") == ["10.1.0.3:8080"])
            await asyncio.sleep(4 * PACE.save_after)
        gate.set()

    run(main())
    assert "10.1.0.3" in next(tmp_path.iterdir()).read_text()


def test_a_saved_state_is_left_alone_where_the_api_server_answers(api: APIServer, run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        async with follow(api, state=tmp_path).running() as follower:
            await eventually(lambda: follower.published)
            assert follower.published[0] == meant(api)
            await eventually(lambda: follower.source._saved.load() == meant(api))  # type: ignore[union-attr]

    run(main())
    api.put(service("dns", "10.96.0.11", [port(53)]))
    run(main())


def test_an_api_server_that_is_silent_about_nodes_does_not_hold_up_services(run: Run) -> None:
    async def main() -> None:
        follower = follow(api, pace=dataclasses.replace(PACE, stall=60.0, patience=0.2))
        async with follower.running():
            await eventually(lambda: follower.services == ["web"])

    with APIServer() as api:
        api.put(service("web", "10.96.0.10", [port(80)]), endpoints("web", ["10.1.0.2:80"]), node_object())
        api.manner = lambda request: Manner(silent=0) if request.kind == "Node" else GOOD
        run(main())


def test_an_api_server_that_is_silent_does_not_hold_up_the_saved_state(
    api: APIServer, run: Run, tmp_path: Path
) -> None:
    async def main() -> None:
        pace = dataclasses.replace(PACE, stall=60.0, patience=0.2)
        async with follow(api, state=tmp_path, pace=pace).running() as follower:
            await eventually(lambda: follower.services == ["web"])

    run(main())
    api.requests.clear()
    api.manner = lambda request: Manner(silent=0)
    run(main())
    assert {request.verb for request in api.requests} == {"list"}


def test_a_state_that_cannot_be_saved_is_told(
    api: APIServer, run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")

    async def main() -> None:
        async with follow(api, state=tmp_path / "file").running() as follower:
            await eventually(lambda: "the state is not saved" in caplog.text)
            assert follower.services == ["web"]

    run(main())


def test_a_saved_state_hides_no_fresher_node(api: APIServer, run: Run, tmp_path: Path) -> None:
    async def first() -> None:
        async with follow(api, state=tmp_path).running() as follower:
            await eventually(lambda: follower.last.node == Node(NODE, "zone-a"))

    async def second() -> None:
        async with follow(api, state=tmp_path).running() as follower:
            await eventually(lambda: follower.published)
            assert follower.services == ["web"]
            assert follower.last.node == Node(NODE, "zone-b")

    run(first())
    api.put(node_object("zone-b"))
    api.manner = only("Service", "list", Manner(silent=0))
    run(second())


def test_what_could_not_be_saved_is_saved_at_the_end(
    api: APIServer, run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "state"
    directory.write_text("in the way")

    async def main() -> None:
        async with follow(api, state=directory, pace=dataclasses.replace(PACE, save_again=60.0)).running():
            await eventually(lambda: "the state is not saved" in caplog.text)
            directory.unlink()

    run(main())
    assert any(directory.iterdir())


def test_what_could_not_be_saved_is_saved_when_it_can_be_without_another_change(
    api: APIServer, run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "userspace_proxy")
    directory = tmp_path / "state"
    directory.write_text("in the way")

    async def main() -> None:
        async with follow(api, state=directory).running() as follower:
            saved = follower.source._saved
            assert saved is not None
            await eventually(lambda: "the state is not saved" in caplog.text)
            await asyncio.sleep(5 * (PACE.save_after + PACE.save_again))
            directory.unlink()
            await eventually(lambda: saved.load() == follower.last)
            await eventually(lambda: "the state is saved again" in caplog.text)

    run(main())
    assert caplog.text.count("the state is not saved") == 1, "told once, however often it is tried"


def test_without_a_way_it_waits(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        follower = Follower(Access(master="http://127.0.0.1:1"))
        async with follower.running():
            await eventually(lambda: "no way to the API server at http://127.0.0.1:1" in caplog.text)
        assert follower.published == []

    run(main())
