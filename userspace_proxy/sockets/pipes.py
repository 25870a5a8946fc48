"""Pipes that bulk is spliced through, lent to a direction of a relay for as long as it is bulk.

They cost two descriptors each, out of the budget that connections have, so there are few of them and none is a must.
When a direction is bulk, and what is done with a pipe then, is in `relay`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os

from userspace_proxy.sockets.base import Descriptors

PIPE_SIZE = 1024 * 1024
POOLED_PIPES = 16


class Pipe:
    """A pipe, and how many bytes lie in it."""

    __slots__ = ("held", "read_fd", "write_fd")

    def __init__(self) -> None:
        self.read_fd, self.write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.held = 0
        with contextlib.suppress(OSError):  # the user's share of pipe memory is used up: the default size works too
            fcntl.fcntl(self.write_fd, fcntl.F_SETPIPE_SZ, PIPE_SIZE)

    def close(self) -> None:
        os.close(self.read_fd)
        os.close(self.write_fd)


class Pipes:
    """The pool of pipes. One that was left with bytes in it is closed, never lent again."""

    def __init__(self, descriptors: Descriptors) -> None:
        self._descriptors = descriptors
        self._idle: list[Pipe] = []

    def borrow(self) -> Pipe | None:
        """None where no descriptor is left for it: splicing is an optimisation, not a need."""
        if self._idle:
            return self._idle.pop()
        if not self._descriptors.take(2):
            return None
        try:
            return Pipe()
        except OSError:
            self._descriptors.give(2)
            return None

    def give_back(self, pipe: Pipe) -> None:
        if pipe.held or len(self._idle) >= POOLED_PIPES:
            pipe.close()
            self._descriptors.give(2)
        else:
            self._idle.append(pipe)

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()
            self._descriptors.give(2)
