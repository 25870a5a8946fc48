"""Connecting a client to an endpoint: the ladder of attempts, off the accept path.

Each attempt asks the balancer anew and passes over what this client has been sent to already. A refusal moves
on at once; silence is given 250 ms, 500 ms, 1 s and 2 s. Nothing is read from the client meanwhile, so
a retry loses nothing. What becomes of the pair is `relay`'s, who may dial at all is `tcp`'s.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from socket import SocketType

from userspace_proxy.exceptions import NoEndpoints
from userspace_proxy.host import ephemeral_ports
from userspace_proxy.loadbalancer import LoadBalancer
from userspace_proxy.metrics import Outcome, ServicePortMetrics
from userspace_proxy.model import Address
from userspace_proxy.poller import ERR, HUP, OUT, Poller
from userspace_proxy.proxyprotocol import Header

LADDER = (0.25, 0.5, 1.0, 2.0)
"""Seconds each attempt is given."""

KEEPALIVE = 15
"""Seconds of silence before the first probe, and between probes."""

_CONNECTING = (0, errno.EINPROGRESS, errno.EISCONN)
"""SCTP may find, by the time it looks, that it is connected."""
_WANTS_OF_OURS = frozenset(
    (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL, errno.EADDRINUSE)
)
"""Failures that say nothing about the endpoint: no descriptor, memory or source port is left."""
_FIRST_SOURCE_PORT, _LAST_SOURCE_PORT = ephemeral_ports()


class Dialer:
    """What all dials of a service port have in common, and who is told how each ended."""

    __slots__ = ("balancer", "expect", "make", "metrics", "on_connected", "on_failed", "poller")

    def __init__(
        self,
        make: Callable[[SocketType], SocketType],
        balancer: LoadBalancer,
        poller: Poller,
        metrics: ServicePortMetrics,
        expect: Callable[[Dial], None],
        on_connected: Callable[[Dial, SocketType, int], None],
        on_failed: Callable[[Dial, Outcome], None],
    ) -> None:
        self.make = make
        """The non-blocking socket to connect for this client, a new one for each attempt."""
        self.balancer = balancer
        self.poller = poller
        self.metrics = metrics
        self.expect = expect
        """Told of each attempt that waits for an answer: `time_out` is to be called at its `deadline`."""
        self.on_connected = on_connected
        self.on_failed = on_failed


class Dial:
    """One client on its way to an endpoint. Exactly one of `on_connected` and `on_failed` is called, once."""

    __slots__ = (
        *("_attempts", "_client_ip", "_dialer", "_sock", "_tried"),
        *("client", "deadline", "endpoint", "header", "since"),
    )

    def __init__(self, dialer: Dialer, client: SocketType, client_ip: str, header: Header | None = None) -> None:
        self.client = client
        self.header = header
        """What the client was introduced by."""
        self.since = dialer.poller.clock()
        self.deadline = 0.0
        """Of the attempt under way, on the poller's clock."""
        self.endpoint: Address = ("", 0)
        self._dialer = dialer
        self._client_ip = client_ip
        self._attempts = 0
        self._tried: tuple[Address, ...] = ()
        self._sock: SocketType | None = None
        """Of the attempt under way."""

    def start(self) -> None:
        """Go up the ladder until an attempt is under way."""
        dialer = self._dialer
        while self._attempts < len(LADDER):
            try:
                self.endpoint = dialer.balancer.pick(self._client_ip, self._tried)
            except NoEndpoints:
                dialer.on_failed(self, Outcome.DIAL_FAILED if self._tried else Outcome.NO_ENDPOINTS)
                return
            self._tried += (self.endpoint,)
            patience = LADDER[self._attempts]
            self._attempts += 1
            dialer.metrics.dials += 1
            try:
                sock = self._connect()
            except OSError as error:
                self._note_failure(error.errno or errno.EIO)
                continue
            self._sock = sock
            dialer.poller.register(sock, self)
            self.deadline = dialer.poller.clock() + patience
            dialer.expect(self)
            return
        dialer.on_failed(self, Outcome.DIAL_FAILED)

    def cancel(self) -> None:
        """Give up without calling back."""
        self._drop_attempt()
        self._attempts = len(LADDER)

    def on_events(self, events: int) -> None:
        sock = self._sock
        if sock is None:
            return
        if events & (ERR | HUP):
            number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if number:
                self._fail(number)
                return
        if not events & OUT:
            return
        if self._met_itself(sock):
            self._fail(errno.ECONNREFUSED)
            return
        self._sock = None
        if self._dialer.balancer.ejected:
            self._dialer.balancer.succeeded(self.endpoint)
        self._dialer.on_connected(self, sock, events)

    def time_out(self) -> None:
        """Go on to the next attempt, unless it is we who are late: word of a connection may be waiting for its turn."""
        if not self._is_connected():
            self._fail(errno.ETIMEDOUT)

    def _is_connected(self) -> bool:
        if self._sock is None:
            return False
        try:
            self._sock.getpeername()
        except OSError:
            return False
        return True

    def _connect(self) -> SocketType:
        sock = self._dialer.make(self.client)
        try:
            number = sock.connect_ex(self.endpoint)
            if number not in _CONNECTING:
                raise OSError(number, os.strerror(number))
        except OSError:
            sock.close()
            raise
        return sock

    def _met_itself(self, sock: SocketType) -> bool:
        """Whether the kernel connected the socket to itself.

        A local endpoint that is down, on a port the kernel also hands out as a source port, can be "reached"
        by a simultaneous open with oneself.
        """
        if not _FIRST_SOURCE_PORT <= self.endpoint[1] <= _LAST_SOURCE_PORT:
            return False
        local: Address = sock.getsockname()[:2]
        return local == self.endpoint

    def _fail(self, number: int) -> None:
        self._note_failure(number)
        self._drop_attempt()
        self.start()

    def _note_failure(self, number: int) -> None:
        self._dialer.metrics.dial_failures[number] += 1
        if number not in _WANTS_OF_OURS:
            self._dialer.balancer.failed(self.endpoint)

    def _drop_attempt(self) -> None:
        if self._sock is not None:
            self._dialer.poller.discard(self._sock)
            self._sock = None


def set_keepalive(sock: SocketType) -> None:
    """Probes, which find out about a peer that is gone."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE)
