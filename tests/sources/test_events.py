"""What the cluster hears of, as an API server gets it over real HTTP, good manners and bad."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest

from tests.apiserver import GOOD, APIServer, Manner, Request
from tests.sources.cluster import eventually
from userspace_proxy.sources.base import Event
from userspace_proxy.sources.connection import Connection
from userspace_proxy.sources.credentials import Access
from userspace_proxy.sources.events import TRIES, WAITING, Events, written

Run = Callable[[Coroutine[Any, Any, Any]], Any]
NOW = datetime.datetime(2026, 11, 21, 12, 0, 1, 500, datetime.UTC)
STARTING = Event("Starting", "StartKubeProxy", "it starts")


def test_about_the_node() -> None:
    path, value = written(STARTING, "node-1", NOW)
    assert path == "/apis/events.k8s.io/v1/namespaces/default/events"
    assert value == {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": f"node-1.{int(NOW.timestamp() * 1_000_000) * 1000:x}", "namespace": "default"},
        "eventTime": "2026-11-21T12:00:01.000500Z",
        "reportingController": "userspace-proxy",
        "reportingInstance": "userspace-proxy-node-1",
        "type": "Normal",
        "reason": "Starting",
        "action": "StartKubeProxy",
        "note": "it starts",
        "regarding": {"kind": "Node", "name": "node-1", "uid": "node-1"},
    }


def test_about_a_service() -> None:
    event = Event("FailedToStartServiceHealthcheck", "Listen", "x" * 2000, True, "shop", "web")
    path, value = written(event, "node-1", NOW)
    assert path == "/apis/events.k8s.io/v1/namespaces/shop/events"
    assert value["regarding"] == {"kind": "Service", "namespace": "shop", "name": "web"}
    assert value["metadata"]["namespace"] == "shop"
    assert value["type"] == "Warning"
    assert len(value["note"]) == 1024


@contextlib.asynccontextmanager
async def telling(api: APIServer) -> AsyncIterator[Events]:
    connection = Connection(Access(master=api.url, qps=-1), time.monotonic, stall=5.0)
    events = Events(connection, "node-1", lambda: NOW, pause=0.01)
    task = asyncio.create_task(events.run())
    try:
        yield events
    finally:
        task.cancel()
        await asyncio.wait([task])
        await connection.close()


def test_they_arrive_in_order(run: Run) -> None:
    async def main() -> None:
        with APIServer() as api:
            async with telling(api) as events:
                for reason in "ABC":
                    events.tell(Event(reason, "Do", ""))
                await eventually(lambda: len(api.made) == 3)
            assert [value["reason"] for _, value in api.made] == ["A", "B", "C"]

    run(main())


def test_who_is_not_allowed_to_tell_is_told_so_and_goes_on(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def main() -> None:
        with APIServer() as api:
            manners = iter([Manner(status=403)])
            api.manner = lambda request: next(manners, GOOD)
            async with telling(api) as events:
                events.tell(STARTING)
                events.tell(Event("Later", "Do", ""))
                await eventually(lambda: bool(api.made))
            assert [value["reason"] for _, value in api.made] == ["Later"]

    run(main())
    assert "takes no event (403)" in caplog.text


def test_what_breaks_off_is_tried_again_and_forgotten_in_the_end(run: Run) -> None:
    async def main() -> None:
        with APIServer() as api:
            tries: list[Request] = []

            def manner(request: Request) -> Manner:
                tries.append(request)
                return Manner(cut=10) if len(tries) <= TRIES + 1 else GOOD

            api.manner = manner
            async with telling(api) as events:
                events.tell(STARTING)
                events.tell(Event("Later", "Do", ""))
                await eventually(lambda: any(value["reason"] == "Later" for _, value in api.made))
            assert len(tries) == TRIES + 2
            assert "Later" in {value["reason"] for _, value in api.made}

    run(main())


def test_of_too_many_the_later_ones_are_forgotten(run: Run) -> None:
    async def main() -> None:
        with APIServer() as api:
            async with telling(api) as events:
                for number in range(WAITING + 10):
                    events.tell(Event(str(number), "Do", ""))
                await eventually(lambda: len(api.made) == WAITING)
                events.tell(STARTING)
                await eventually(lambda: api.made[-1][1]["reason"] == "Starting")

    run(main())
