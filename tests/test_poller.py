"""The nested epoll set: every edge is delivered, none to a stranger, and timers keep their time."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from userspace_proxy.metrics import open_descriptors
from userspace_proxy.poller import BATCH, EDGE, IN, LEVEL_IN, RDHUP, Poller

Run = Callable[[Coroutine[Any, Any, Any]], Any]


class Recorder:
    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_events(self, events: int) -> None:
        self.seen.append(events)


async def turns(number: int = 3) -> None:
    for _ in range(number):
        await asyncio.sleep(0.01)


def test_edges_are_told_once_and_levels_until_read(run: Run) -> None:
    async def main() -> None:
        poller = Poller(asyncio.get_running_loop())
        one, other = socket.socketpair()
        edge, level = Recorder(), Recorder()
        poller.register(one, edge, EDGE)
        poller.register(other, level, LEVEL_IN)
        await turns()
        before = len(edge.seen)
        other.send(b"x")
        one.send(b"y")
        await turns(5)
        assert sum(bool(events & IN) for events in edge.seen[before:]) == 1
        assert len(level.seen) > 2
        other.recv(1)
        await turns(1)
        count = len(level.seen)
        await turns()
        assert len(level.seen) == count
        other.close()
        await turns()
        assert edge.seen[-1] & RDHUP
        poller.discard(one)
        poller.close()

    run(main())


def test_a_number_closed_in_a_batch_meets_no_stranger(run: Run) -> None:
    """Two sockets are ready; the first to be told closes the second and opens a third in its place."""

    async def main() -> None:
        poller = Poller(asyncio.get_running_loop())
        pairs = [socket.socketpair() for _ in range(2)]
        stranger = Recorder()
        opened: list[socket.socket] = []

        class Closer:
            def __init__(self, mine: int) -> None:
                self.mine = mine

            def on_events(self, _events: int) -> None:
                if not opened:
                    victim = pairs[1 - self.mine][0]
                    number = victim.fileno()
                    poller.discard(victim)
                    assert victim.fileno() == number, "closed within the batch: its number can be another's now"
                    opened.extend(socket.socketpair())
                    assert number not in {s.fileno() for s in opened}
                    poller.register(opened[0], stranger, LEVEL_IN)

        for number, (mine, theirs) in enumerate(pairs):
            theirs.send(b"x")
            poller.register(mine, Closer(number), LEVEL_IN)
        await turns()
        assert opened
        assert not stranger.seen
        poller.close()
        for sock in (*opened, *(s for pair in pairs for s in pair)):
            sock.close()

    run(main())


def test_more_events_than_a_batch_are_all_told(run: Run) -> None:
    async def main() -> None:
        poller = Poller(asyncio.get_running_loop())
        pairs = [socket.socketpair() for _ in range(BATCH + 50)]
        recorders = [Recorder() for _ in pairs]
        for (mine, theirs), recorder in zip(pairs, recorders, strict=True):
            poller.register(mine, recorder, IN | 1 << 31)
            theirs.send(b"x")
        await turns()
        assert all(len(recorder.seen) == 1 for recorder in recorders)
        assert len(poller) == len(pairs)
        poller.close()
        for pair in pairs:
            for sock in pair:
                sock.close()

    run(main())


def test_a_fault_in_one_watcher_is_logged_and_the_others_go_on(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    class Faulty:
        def on_events(self, _events: int) -> None:
            raise ZeroDivisionError

    async def main() -> None:
        poller = Poller(asyncio.get_running_loop())
        pairs = [socket.socketpair() for _ in range(2)]
        sound = Recorder()
        poller.register(pairs[0][0], Faulty(), IN | 1 << 31)
        poller.register(pairs[1][0], sound, IN | 1 << 31)
        for _, theirs in pairs:
            theirs.send(b"x")

        def fault() -> None:
            raise ZeroDivisionError

        poller.again(fault)
        poller.call_at(time.monotonic(), fault)
        later: list[bool] = []
        poller.again(lambda: later.append(True))
        poller.call_at(time.monotonic() + 0.001, lambda: later.append(True))
        await turns(5)
        assert sound.seen
        assert later == [True, True]
        poller.close()
        for pair in pairs:
            for sock in pair:
                sock.close()

    run(main())
    assert sum(record.levelname == "ERROR" for record in caplog.records) == 3


def test_again_lets_the_others_go_first(run: Run) -> None:
    async def main() -> None:
        poller = Poller(asyncio.get_running_loop())
        order: list[str] = []

        def first() -> None:
            order.append("a")
            if order.count("a") < 3:
                poller.again(first)

        poller.again(first)
        poller.again(lambda: order.append("b"))
        await turns()
        assert "".join(order) == "abaa"
        poller.close()

    run(main())


def test_what_was_put_off_is_done_at_the_end_of_each_batch(run: Run) -> None:
    async def main() -> None:
        poller = Poller(asyncio.get_running_loop())
        told: list[str] = []

        class Reader:
            def __init__(self, sock: socket.socket) -> None:
                self.sock = sock

            def on_events(self, _events: int) -> None:
                told.append(self.sock.recv(100).decode())

        poller.at_end_of_batch(lambda: told.append("end"))
        pairs = [socket.socketpair() for _ in range(3)]
        for one, other in pairs:
            poller.register(one, Reader(one), LEVEL_IN)
            other.send(b"read")
        await turns()
        assert told == ["read"] * 3 + ["end"]
        pairs[0][1].send(b"more")
        await turns()
        assert told[4:] == ["more", "end"]
        for one, other in pairs:
            poller.discard(one)
            other.close()
        poller.close()

    run(main())


def test_timers_ring_in_order(run: Run) -> None:
    async def main() -> None:
        poller = Poller(asyncio.get_running_loop())
        now = time.monotonic()
        rung: list[tuple[str, bool]] = []

        def ring(name: str, when: float) -> Callable[[], None]:
            return lambda: rung.append((name, time.monotonic() >= when))

        poller.call_at(now + 0.06, ring("late", now + 0.06))
        poller.call_at(now + 0.02, ring("early", now + 0.02))
        poller.call_at(now + 0.03, lambda: poller.call_at(now, ring("past", now)))
        await asyncio.sleep(0.15)
        assert rung == [("early", True), ("past", True), ("late", True)]
        poller.close()

    run(main())


def test_a_socket_that_others_hold_as_well_is_told_of_no_more(run: Run) -> None:
    """Its number, used again, gets the events of its new owner alone."""

    async def main() -> None:
        poller = Poller(asyncio.get_running_loop())
        one, other = socket.socketpair()
        with one.dup(), other:
            number, before, after = one.fileno(), Recorder(), Recorder()
            poller.register(one, before, LEVEL_IN)
            poller.unregister(one)
            poller.discard(one)
            stranger, peer = socket.socketpair()
            assert stranger.fileno() == number
            poller.register(stranger, after, LEVEL_IN)
            other.send(b"x")
            await turns()
            assert not before.seen
            assert not after.seen
            poller.discard(stranger)
            peer.close()
        poller.close()

    run(main())


def test_closing_leaves_nothing(run: Run) -> None:
    async def main() -> None:
        before = open_descriptors()
        poller = Poller(asyncio.get_running_loop())
        poller.call_at(time.monotonic() + 60, lambda: None)
        poller.again(lambda: None)
        poller.close()
        await turns(1)
        assert open_descriptors() == before

    run(main())
