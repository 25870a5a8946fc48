"""Relaying a TCP connection: bytes both ways between a client and an endpoint, until both have finished.

A `Relay` is two `Direction`s, each with its own end of file. A direction reads its source into one buffer
that all share and sends to its sink at once; what the sink does not take waits as `pending`, and nothing
more is read until it is gone: that is the whole of the back-pressure, and the bound on memory. A direction
that keeps filling the buffer is bulk and is spliced instead, through one of the `pipes` borrowed while it lasts.

The rules on endings, which all of the code below serves:

* end of file from one side becomes shutdown toward the other once every byte is through; the pair ends when
  both have finished;
* anything else ends the pair with a reset to both. Sockets carry SO_LINGER (1, 0) from their first moment,
  so that a reset is also what the kernel sends should this process die; only an orderly end clears it.

How connections come to be is in `tcp` (accepting) and `dial`.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from socket import SocketType
from typing import ClassVar

from userspace_proxy.metrics import Outcome, ServicePortMetrics
from userspace_proxy.poller import ERR, HUP, IN, OUT, PRI, RDHUP, Poller
from userspace_proxy.sockets.base import CLOSE_IN_ORDER
from userspace_proxy.sockets.pipes import PIPE_SIZE, Pipe, Pipes

BUFFER_SIZE = 128 * 1024
BULK_READS = 4
"""Full buffers in a row that make a direction bulk."""
ROUNDS = 16
"""Reads a turn before the others get theirs."""
TURN = range(ROUNDS)

_buffer = bytearray(BUFFER_SIZE)
_view = memoryview(_buffer)
_DONTWAIT = int(socket.MSG_DONTWAIT)
_MORE = RDHUP | ERR | HUP | PRI
_LAST = _DONTWAIT | int(socket.MSG_MORE)
"""Bytes that the end of file follows: held back for a moment, they leave in one segment with the FIN."""
READABLE = IN | _MORE
_WRITABLE = OUT | ERR | HUP
_SPLICE_FLAGS = 0x01 | 0x02  # SPLICE_F_MOVE | SPLICE_F_NONBLOCK; never MORE, which holds back the last segment

_LOST = frozenset(
    (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTDOWN, errno.ENETRESET)
)


class Direction:
    """Bytes from one socket to the other. It watches its source; its reverse watches its sink."""

    __slots__ = (
        "blocked",
        "bulk",
        "bytes",
        "counted",
        "done",
        "eof",
        "pending",
        "pipe",
        "queued",
        "relay",
        "reverse",
        "sink",
        "source",
    )

    reverse: Direction

    def __init__(self, relay: Relay, source: SocketType, sink: SocketType) -> None:
        self.relay = relay
        self.source = source
        self.sink = sink
        self.pending: memoryview | None = None
        """Read from the source, not yet taken by the sink."""
        self.blocked = False
        """The sink takes no more for now; nothing is read until it does."""
        self.queued = False
        """There is more to read, after the others had their turn."""
        self.eof = False
        """The source has finished."""
        self.done = False
        """The sink has been told so: nothing will ever move again this way."""
        self.bytes = 0
        self.counted = 0
        """How many of the bytes are in the metrics already."""
        self.bulk = 0
        """Full buffers read in a row."""
        self.pipe: Pipe | None = None

    def on_events(self, events: int) -> None:
        """Events of the source, which is the reverse's sink."""
        if self.reverse.blocked and events & _WRITABLE:
            self.reverse.resume()
            if self.relay.ended:
                return
        if not events & READABLE:
            return
        if not (self.blocked or self.eof):
            if not self.queued:
                self.pump(events)
        elif events & ERR:
            # Nothing can be read here, so only the socket itself can say what happened to it.
            number = self.source.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if number:
                self.relay.broken(self.source, number)

    def pump(self, events: int) -> None:
        """Move bytes until the source has none or the sink takes no more.

        A short read empties a stream, so no fruitless second read follows one. With RDHUP what it leaves is the end
        of file; with PRI it may have stopped at an urgent mark, and with an error that is still to be heard.
        """
        if self.pipe is not None:
            self.splice()
            return
        for _ in TURN:
            try:
                size = self.source.recv_into(_buffer, 0, _DONTWAIT)
            except BlockingIOError:
                return
            except OSError as error:
                self.relay.broken(self.source, error.errno or errno.EIO)
                return
            if not size:
                self.eof = True
                self.finish()
                return
            self.bytes += size
            ends = events & _MORE == RDHUP and size < BUFFER_SIZE
            try:
                sent = self.sink.send(_view[:size], _LAST if ends else _DONTWAIT)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                self.relay.broken(self.sink, error.errno or errno.EIO)
                return
            if sent < size:
                self.pending = memoryview(bytes(_view[sent:size]))
                self.blocked = True
                return
            if ends:
                self.eof = True
                self.finish()
                return
            if size < BUFFER_SIZE:
                self.bulk = 0
                if not events & _MORE:
                    return
            else:
                self.bulk += 1
                if self.bulk >= BULK_READS and self.start_splicing():
                    self.splice()
                    return
        self.queue()

    def queue(self) -> None:
        self.queued = True
        self.relay.poller.again(self.next_turn)

    def next_turn(self) -> None:
        self.queued = False
        if not (self.relay.ended or self.eof or self.blocked):
            self.pump(READABLE)

    def resume(self) -> None:
        """Go on after the sink has been full."""
        if self.pending is not None:
            try:
                sent = self.sink.send(self.pending, _DONTWAIT)
            except BlockingIOError:
                return
            except OSError as error:
                self.relay.broken(self.sink, error.errno or errno.EIO)
                return
            if sent < len(self.pending):
                self.pending = self.pending[sent:]
                return
            self.pending = None
        self.blocked = False
        if not self.queued:
            self.pump(READABLE)

    def start_splicing(self) -> bool:
        pipes = self.relay.pipes
        self.pipe = pipes.borrow() if pipes is not None else None
        if self.pipe is None:
            self.bulk = 0
            return False
        # splice() knows no MSG_DONTWAIT toward the socket: the descriptors themselves must not block.
        self.source.setblocking(False)
        self.sink.setblocking(False)
        return True

    def splice(self) -> None:
        """As `pump`, through the pipe. It is only filled when empty, so EAGAIN is about the source.

        Whether that is dry or has ended is for recv() to say: at an urgent mark, splice() tells of neither rightly.
        """
        pipe = self.pipe
        assert pipe is not None
        source, sink = self.source.fileno(), self.sink.fileno()
        for _ in TURN:
            if not pipe.held:
                try:
                    pipe.held = os.splice(source, pipe.write_fd, PIPE_SIZE, flags=_SPLICE_FLAGS)
                except BlockingIOError:
                    pipe.held = 0
                except OSError as error:
                    self.relay.broken(self.source, error.errno or errno.EIO)
                    return
                if not pipe.held:
                    self.stop_splicing()
                    self.queue()
                    return
                self.bytes += pipe.held
            try:
                pipe.held -= os.splice(pipe.read_fd, sink, pipe.held, flags=_SPLICE_FLAGS)
            except BlockingIOError:
                self.blocked = True
                return
            except OSError as error:
                self.relay.broken(self.sink, error.errno or errno.EIO)
                return
        self.queue()

    def stop_splicing(self) -> None:
        """Give the pipe back: an idle connection holds two sockets and nothing else."""
        pipe, self.pipe = self.pipe, None
        self.bulk = 0
        if pipe is not None and self.relay.pipes is not None:
            self.relay.pipes.give_back(pipe)

    def finish(self) -> None:
        """The source's end of file is next for the sink."""
        self.done = True
        if self.reverse.done:
            self.relay.end_in_order()
            return
        try:
            self.sink.shutdown(socket.SHUT_WR)
        except OSError as error:
            self.relay.broken(self.sink, error.errno or errno.ENOTCONN)
        else:
            self.relay.half_close(self)

    def salvage(self) -> None:
        """Pass on what can be had at once and without waiting; the reset that follows says it was not all.

        A server that answers early and closes on a client still sending resets the connection behind its answer.
        """
        if self.done or self.blocked or self.pipe is not None:
            return
        for _ in TURN:
            try:
                size = self.source.recv_into(_buffer, 0, _DONTWAIT)
                if not size or self.sink.send(_view[:size], _DONTWAIT) < size:
                    return
            except OSError:
                return
            self.bytes += size


class Relay:
    """One client and one endpoint, connected. `on_end` is called once, when it is over."""

    direction: ClassVar[type[Direction]] = Direction

    __slots__ = (
        "_on_end",
        "ended",
        "first_to_finish",
        "kept_alive",
        "metrics",
        "pipes",
        "poller",
        "since",
        "to_client",
        "to_endpoint",
        "waiting",
    )

    def __init__(
        self,
        client: SocketType,
        endpoint: SocketType,
        poller: Poller,
        pipes: Pipes | None,
        metrics: ServicePortMetrics,
        on_end: Callable[[Relay], None],
        since: float,
    ) -> None:
        self.poller = poller
        self.pipes = pipes
        self.metrics = metrics
        self.since = since
        self.kept_alive = False
        """Probing for a dead peer costs three system calls, so only connections that last get it."""
        self.ended: Outcome | None = None
        self.first_to_finish: Direction | None = None
        self.waiting: tuple[int, float] | None = None
        """While half-closed: bytes relayed when last looked at, and since when they have not grown."""
        self._on_end = on_end
        self.to_endpoint = self.direction(self, client, endpoint)
        self.to_client = self.direction(self, endpoint, client)
        self.to_endpoint.reverse = self.to_client
        self.to_client.reverse = self.to_endpoint

    def start(self, endpoint_events: int) -> None:
        """Take over the registered endpoint with the events just seen on it, and register the client."""
        self.poller.hand_over(self.to_client.source, self.to_client)
        self.poller.register(self.to_endpoint.source, self.to_endpoint)
        if endpoint_events & READABLE:
            self.to_client.on_events(endpoint_events)

    def half_close(self, direction: Direction) -> None:
        self.first_to_finish = direction
        self.waiting = (self.to_endpoint.bytes + self.to_client.bytes, self.poller.clock())

    def is_stale(self, now: float, timeout: float) -> bool:
        """Whether it has been half-closed with no byte moving for `timeout` seconds. To be asked now and then."""
        if self.waiting is None:
            return False
        moved = self.to_endpoint.bytes + self.to_client.bytes
        if moved != self.waiting[0]:
            self.waiting = (moved, now)
        return now - self.waiting[1] >= timeout

    def end_in_order(self) -> None:
        first = self.first_to_finish or self.to_endpoint
        for sock in (first.source, first.sink):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, CLOSE_IN_ORDER)
        self._end(Outcome.CLIENT_CLOSED if first is self.to_endpoint else Outcome.ENDPOINT_CLOSED)

    def broken(self, sock: SocketType, number: int) -> None:
        """One of the sockets failed with this errno."""
        if self.ended:
            return
        away = self.to_client if sock is self.to_client.source else self.to_endpoint
        away.salvage()
        lost = number in _LOST
        if away is self.to_client:
            self._end(Outcome.ENDPOINT_LOST if lost else Outcome.ENDPOINT_RESET)
        else:
            self._end(Outcome.CLIENT_LOST if lost else Outcome.CLIENT_RESET)

    def abort(self, outcome: Outcome) -> None:
        """End it now; both sides get a reset."""
        if not self.ended:
            self._end(outcome)

    def _end(self, outcome: Outcome) -> None:
        self.ended = outcome
        for direction in (self.to_endpoint, self.to_client):
            direction.stop_splicing()
            self.poller.discard(direction.source)
        self.count()
        self._on_end(self)
        # The pair is a knot of references; undone, it is freed here and now and not by the cycle collector.
        del self.to_endpoint.reverse, self.to_client.reverse, self.to_endpoint, self.to_client

    def count(self) -> None:
        """Add what was relayed since the last call to the metrics: at the end, and whenever somebody asks."""
        to_endpoint, to_client = self.to_endpoint, self.to_client
        self.metrics.to_endpoint += to_endpoint.bytes - to_endpoint.counted
        self.metrics.to_client += to_client.bytes - to_client.counted
        to_endpoint.counted, to_client.counted = to_endpoint.bytes, to_client.bytes
