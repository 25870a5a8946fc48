"""Messages and descriptors through a pair of sockets: all, in order, each with its own descriptor."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
from collections.abc import Callable, Coroutine
from typing import Any

from tests.proxy import no_descriptor_left
from userspace_proxy.workers import channel
from userspace_proxy.workers.channel import Channel

Run = Callable[[Coroutine[Any, Any, Any]], Any]


class Side:
    """One end, and what came out of it."""

    def __init__(self, sock: socket.socket) -> None:
        self.got: list[tuple[Any, int | None]] = []
        self.ended = 0
        self.channel: Channel[Any] = Channel(sock, Any, lambda m, fd: self.got.append((m, fd)), self._end)

    def _end(self) -> None:
        self.ended += 1

    async def until(self, count: int) -> None:
        await until(lambda: len(self.got) >= count)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110 - what is watched are plain lists
            await asyncio.sleep(0.001)


def sides() -> tuple[Side, Side]:
    one, other = socket.socketpair()
    return Side(one), Side(other)


def test_messages_of_any_size_arrive_in_order_both_ways(run: Run) -> None:
    async def main() -> None:
        left, right = sides()
        texts = ["x" * size for size in (0, 1, 1000, 300_000, 5_000_000, 3)]
        for text in texts:
            left.channel.send(text)
            right.channel.send([text])
        await right.until(len(texts))
        await left.until(len(texts))
        assert [message for message, _ in right.got] == texts
        assert [message for message, _ in left.got] == [[text] for text in texts]
        left.channel.close()
        right.channel.close()

    with no_descriptor_left():
        run(main())


def test_each_descriptor_comes_with_its_own_message(run: Run) -> None:
    """However many are on their way: far more messages than the socket takes at once, some with one, some big."""

    async def main() -> None:
        left, right = sides()
        made = [os.memfd_create(f"m{n}") for n in range(200)]
        for n, fd in enumerate(made):
            left.channel.send({"without": n})
            left.channel.send({"n": n, "padding": "x" * (n * 100)}, fd)
            os.close(fd)
        await right.until(400)
        for n, (message, fd) in enumerate(right.got[1::2]):
            assert message["n"] == n
            assert fd is not None
            assert os.readlink(f"/proc/self/fd/{fd}").startswith(f"/memfd:m{n} ")
            assert not os.get_inheritable(fd)
            os.close(fd)
        assert all(fd is None for _, fd in right.got[::2])
        left.channel.close()
        right.channel.close()

    with no_descriptor_left():
        run(main())


def test_a_descriptor_that_does_not_fit_is_told_and_the_next_is_not_mistaken_for_it(run: Run) -> None:
    async def main() -> None:
        left, right = sides()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        fds = [os.memfd_create(name) for name in "ab"]
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(fds) + 1, hard))
        try:
            left.channel.send("a", fds[0])
            await right.until(1)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        left.channel.send("b", fds[1])
        await right.until(2)
        assert right.got[0] == ("a", -1)
        fd = right.got[1][1]
        assert fd is not None
        assert "memfd:b" in os.readlink(f"/proc/self/fd/{fd}")
        for number in (*fds, fd):
            os.close(number)
        left.channel.close()
        right.channel.close()

    run(main())


def test_the_end_is_told_once_and_after_the_last_message(run: Run) -> None:
    async def main() -> None:
        left, right = sides()
        left.channel.send("last words")
        left.channel.close()
        left.channel.send("too late")
        await until(lambda: bool(right.ended))
        right.channel.send("nobody hears")
        assert [message for message, _ in right.got] == ["last words"]
        assert (left.ended, right.ended) == (0, 1)

    with no_descriptor_left():
        run(main())


def test_a_peer_that_takes_nothing_is_given_up(run: Run) -> None:
    async def main() -> None:
        one, other = socket.socketpair()
        left = Side(one)
        kept = os.memfd_create("kept")
        for _ in range(channel.BACKLOG // 1_000_000 + 2):
            left.channel.send("x" * 1_000_000, kept)
        assert left.ended == 1
        os.close(kept)
        other.close()

    with no_descriptor_left():
        run(main())


def test_a_message_that_cannot_be_followed_does_not_cost_the_next(run: Run) -> None:
    async def main() -> None:
        one, other = socket.socketpair()
        got = []

        def follow(message: Any, _descriptor: int | None) -> None:
            if message == "bad":
                raise ZeroDivisionError
            got.append(message)

        left = Side(one)
        right: Channel[Any] = Channel(other, Any, follow, lambda: None)
        for message in ("good", "bad", "better"):
            left.channel.send(message)
        await until(lambda: len(got) >= 2)
        assert got == ["good", "better"]
        left.channel.close()
        right.close()

    run(main())
