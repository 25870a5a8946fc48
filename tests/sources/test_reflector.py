"""One resource, followed: which calls a feed gets, and when. The source as a whole is in test_kubernetes."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from tests.apiserver import GOOD, APIServer, Manner
from tests.e2e.node import port, service
from tests.sources.cluster import PACE, eventually
from userspace_proxy.sources.answers import SERVICES
from userspace_proxy.sources.connection import Connection
from userspace_proxy.sources.credentials import Access
from userspace_proxy.sources.reflector import Reflector

Run = Callable[[Coroutine[Any, Any, Any]], Any]


class Recorder:
    """A feed of names that writes down what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, object]] = []

    def read(self, value: Any) -> str:
        return str(value["metadata"]["name"])

    async def replace(self, items: Sequence[str]) -> None:
        self.calls.append(("replace", list(items)))

    def put(self, item: str) -> None:
        self.calls.append(("put", item))

    def remove(self, item: str) -> None:
        self.calls.append(("remove", item))

    def flush(self) -> None:
        if self.calls and self.calls[-1][0] != "flush":
            self.calls.append(("flush", None))

    def failed(self) -> None:
        self.calls.append(("failed", None))


def web(number: int) -> dict[str, Any]:
    return service(f"s{number}", f"10.96.0.{number}", [port(80)])


async def follow(api: APIServer, body: Callable[[Recorder], Coroutine[Any, Any, None]]) -> Recorder:
    feed = Recorder()
    connection = Connection(Access(master=api.url, qps=-1), time.monotonic, stall=5)
    reflector = Reflector(connection, [SERVICES], feed, PACE, time.monotonic, random.Random(1))
    task = asyncio.ensure_future(reflector.run())
    await body(feed)
    task.cancel()
    await asyncio.wait([task])
    await connection.close()
    return feed


def test_a_list_then_each_event_then_a_flush(run: Run) -> None:
    async def body(feed: Recorder) -> None:
        await eventually(lambda: api.watches("Service"))
        api.put(web(2))
        await eventually(lambda: ("put", "s2") in feed.calls)
        api.delete(web(1))
        await eventually(lambda: feed.calls[-2:] == [("remove", "s1"), ("flush", None)])

    with APIServer() as api:
        api.put(web(1))
        feed = run(follow(api, body))
    flush = ("flush", None)
    assert feed.calls == [("replace", ["s1"]), flush, ("put", "s2"), flush, ("remove", "s1"), flush]


def test_events_before_a_break_count_and_those_after_it_come_by_the_next_watch(run: Run) -> None:
    """The second event of the answer is cut in its middle."""
    head = len(b'{"type": "ADDED", "object": }') + 400

    async def body(feed: Recorder) -> None:
        await eventually(lambda: api.watches("Service"))
        for number in range(2, 9):
            api.put(web(number))
        await eventually(lambda: ("put", "s8") in feed.calls)

    with APIServer() as api:
        api.manner = lambda request: Manner(cut=head + 37 * len(api.requests)) if len(api.requests) < 30 else GOOD
        api.put(web(1))
        feed = run(follow(api, body))
    puts = [name for call, name in feed.calls if call == "put"]
    assert puts == [f"s{number}" for number in range(2, 9)] or "replace" in [call for call, _ in feed.calls[2:]]
    assert len(puts) == len(set(puts)), "no event twice"


def test_trouble_is_told_once_whatever_numbers_are_in_it(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    """And what is served meanwhile is told as it is."""

    async def body(feed: Recorder) -> None:
        await eventually(lambda: len(api.requests) > 8)
        assert caplog.text.count("Not enough data") == 1
        assert "nothing is known of them yet" in caplog.text
        api.manner = lambda request: Manner(status=503)
        await eventually(lambda: caplog.text.count("the API server says 503") == 1)
        api.manner = lambda request: GOOD
        await eventually(lambda: api.watches("Service"))
        assert "what was known last is served" not in caplog.text
        api.manner = lambda request: Manner(status=403)
        api.away()
        api.back()
        await eventually(lambda: "the API server says 403" in caplog.text)
        assert "what was known last is served" in caplog.text

    with APIServer() as api:
        api.put(web(1))
        api.manner = lambda request: Manner(cut=300 + len(api.requests))
        run(follow(api, body))
