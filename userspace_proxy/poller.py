"""One edge-triggered epoll set of our own, nested in the asyncio loop: the engine of the data path.

An epoll descriptor is itself pollable, so the loop watches this one descriptor and `_drain` walks a batch
of events in a plain `for`: no handle, no context switch, no call into the loop for an event. asyncio runs
everything that is not per packet: control, admin, files.

The discipline of edge triggering is the watchers': read until the kernel has no more (EAGAIN, or a short
read on a stream), and remember what is blocked on what. What the poller adds is that a descriptor closed
during a batch keeps its number until the batch is over, so that no event meets a stranger.

Timers are here too, on the same clock: few, for sweeps and the heads of queues, and never cancelled. What is read
and written is in `sockets`.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import select
import time
import typing
from collections import deque
from collections.abc import Callable
from socket import SocketType

logger = logging.getLogger(__name__)

IN = select.EPOLLIN
OUT = select.EPOLLOUT
ERR = select.EPOLLERR
HUP = select.EPOLLHUP
RDHUP = select.EPOLLRDHUP
PRI = select.EPOLLPRI

EDGE = IN | OUT | RDHUP | PRI | select.EPOLLET
"""For streams: registered once, never changed."""
EDGE_IN = IN | select.EPOLLET
"""For listeners."""
LEVEL_IN = IN
"""For datagrams and where one read an event is the cheapest: what is left fires again."""

BATCH = 256
"""Events a wake-up: enough to pay for the way through the loop, few enough not to starve it."""


class Watcher(typing.Protocol):
    def on_events(self, events: int) -> None:
        """Called with epoll's event mask. Events may be spurious, so nothing may be concluded from them alone."""


class Poller:
    """All methods are for the loop's own thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._loop = loop
        self._epoll = select.epoll()
        self._watchers: dict[int, Watcher] = {}
        self._doomed: list[SocketType] = []
        self._again: deque[Callable[[], None]] = deque()
        self._ends: list[Callable[[], None]] = []
        self._draining = False
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = itertools.count()
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_at = float("inf")
        loop.add_reader(self._epoll.fileno(), self._drain)

    def close(self) -> None:
        """Stop watching. Sockets still registered are their owners' to close."""
        self._loop.remove_reader(self._epoll.fileno())
        if self._alarm is not None:
            self._alarm.cancel()
        self._timers.clear()
        self._again.clear()
        self._ends.clear()
        self._watchers.clear()
        self._bury()
        self._epoll.close()

    def __len__(self) -> int:
        return len(self._watchers)

    # -- descriptors

    def register(self, sock: SocketType, watcher: Watcher, events: int = EDGE) -> None:
        """Watch a socket. What is ready already is reported at the next wake-up."""
        fd = sock.fileno()
        self._epoll.register(fd, events)
        self._watchers[fd] = watcher

    def hand_over(self, sock: SocketType, watcher: Watcher) -> None:
        """Let another watcher have a registered socket's events, at no system call."""
        self._watchers[sock.fileno()] = watcher

    def discard(self, sock: SocketType) -> None:
        """Forget a socket, registered or not, and close it.

        No epoll_ctl: the kernel forgets a closed descriptor. Within a batch the closing waits for its end.
        """
        self._watchers.pop(sock.fileno(), None)
        if self._draining:
            self._doomed.append(sock)
        else:
            _close(sock)

    def unregister(self, sock: SocketType) -> None:
        """Forget a socket that other processes hold as well: closed here alone, it would go on to fire."""
        self._watchers.pop(sock.fileno(), None)
        self._epoll.unregister(sock.fileno())

    def at_end_of_batch(self, callback: Callable[[], None]) -> None:
        """Call back at the end of every batch: for what watchers have put off to do together."""
        self._ends.append(callback)

    def again(self, callback: Callable[[], None]) -> None:
        """Call back after everybody else had their turn: for a watcher that stops short of EAGAIN."""
        if not self._again:
            self._loop.call_soon(self._run_again)
        self._again.append(callback)

    def _drain(self) -> None:
        watchers = self._watchers
        self._draining = True
        try:
            for fd, events in self._epoll.poll(0, BATCH):
                watcher = watchers.get(fd)
                if watcher is not None:
                    try:
                        watcher.on_events(events)
                    except Exception:
                        logger.exception("events %#x of descriptor %d: not seen through", events, fd)
            for callback in self._ends:
                callback()
        finally:
            self._draining = False
            self._bury()

    def _run_again(self) -> None:
        self._draining = True
        try:
            for _ in range(len(self._again)):
                callback = self._again.popleft()
                try:
                    callback()
                except Exception:
                    logger.exception("a continued relay failed")
        finally:
            self._draining = False
            self._bury()
        if self._again:
            self._loop.call_soon(self._run_again)

    def _bury(self) -> None:
        if self._doomed:
            doomed, self._doomed = self._doomed, []
            for sock in doomed:
                _close(sock)

    # -- timers

    def call_at(self, when: float, callback: Callable[[], None]) -> None:
        """Call back at `when` (of `clock`), up to a few milliseconds late."""
        heapq.heappush(self._timers, (when, next(self._sequence), callback))
        if when < self._alarm_at:
            self._set_alarm(when)

    def _set_alarm(self, when: float) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm_at = when
        self._alarm = self._loop.call_later(max(0.0, when - self.clock()), self._ring)

    def _ring(self) -> None:
        self._alarm = None
        self._alarm_at = float("inf")
        now = self.clock()
        timers = self._timers
        while timers and timers[0][0] <= now:
            _, _, callback = heapq.heappop(timers)
            try:
                callback()
            except Exception:
                logger.exception("a timer failed")
        if timers and timers[0][0] < self._alarm_at:
            self._set_alarm(timers[0][0])


def _close(sock: SocketType) -> None:
    try:
        sock.close()
    except OSError:
        # close() reports an old error (ECONNRESET) but has closed all the same.
        logger.debug("closing reported an error", exc_info=True)
