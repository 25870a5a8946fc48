"""TCP proxy sockets: taking clients, and keeping account of their connections.

A `TCPSocket` is one service port: its proxy port, listened on while there are endpoints.
`TCPSockets` is what they all share: the pipes, the descriptors, and every live connection, since those
outlive their sockets. Between accepting and relaying lies `dial`; the bytes are `relay`'s. What a listener is told
is in `listening`.
"""

from __future__ import annotations

import errno
import logging
import socket
import struct
from collections.abc import Callable, Collection, Sequence
from functools import partial
from socket import SocketType

from userspace_proxy.exceptions import PortError
from userspace_proxy.loadbalancer import LoadBalancer
from userspace_proxy.metrics import Metrics, Outcome, ServicePortMetrics
from userspace_proxy.model import Address, IPFamily, Portal, Protocol, ProxyProtocol, SocketKey, join_host_port
from userspace_proxy.poller import EDGE_IN, Poller
from userspace_proxy.proxyprotocol import Header
from userspace_proxy.sockets.base import ABORT_ON_CLOSE, AF, Descriptors, Session, bind
from userspace_proxy.sockets.dial import Dial, Dialer, set_keepalive
from userspace_proxy.sockets.introduction import Introductions, Trusted, introduce, original_destination
from userspace_proxy.sockets.listening import listen, prepare, stop_listening
from userspace_proxy.sockets.pipes import Pipes
from userspace_proxy.sockets.relay import Relay
from userspace_proxy.sockets.screen import screen

logger = logging.getLogger(__name__)

ACCEPTS = 64
"""Clients taken in one turn."""
TELL_AGAIN = 60.0
"""Seconds between two complaints about the same want."""
LASTING = 5.0
"""Seconds between looks for connections that have become worth probing."""
LOOK = 0.01
"""Seconds at least between looks for dials that have waited long enough."""
PAUSE = 0.1
"""Seconds until the next try when the kernel has no room for another connection."""

_EXHAUSTED = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))


class TCPSockets:
    """All TCP proxy sockets, and their connections."""

    protocol = Protocol.TCP
    relay: type[Relay] = Relay

    def __init__(
        self, poller: Poller, descriptors: Descriptors, metrics: Metrics, *, splice: bool, half_close_timeout: float
    ) -> None:
        self.poller = poller
        self.descriptors = descriptors
        self.pipes = Pipes(descriptors) if splice else None
        self.metrics = metrics
        self.draining = False
        self._tell_again_at = 0.0
        self._on_idle: Callable[[], None] | None = None
        self._half_close_timeout = half_close_timeout
        self._dials: dict[Dial, TCPSocket] = {}
        self._look_at = float("inf")
        """When dials are looked through for those that have waited long enough."""
        self._relays: dict[Relay, TCPSocket] = {}
        self._introductions = Introductions(poller, self._introduced)
        self._sweep()
        self._keep_alive()

    def open(
        self, key: SocketKey, ip: str, port: int, balancer: LoadBalancer, metrics: ServicePortMetrics
    ) -> TCPSocket:
        return TCPSocket(self, key, bind(key.family, socket.SOCK_STREAM, ip, port, prepare=prepare), balancer, metrics)

    def adopt(
        self, key: SocketKey, listener: SocketType, balancer: LoadBalancer, metrics: ServicePortMetrics
    ) -> TCPSocket:
        """Take the clients of a listener that another process made and sees to, until it is closed here."""
        return TCPSocket(self, key, listener, balancer, metrics, adopted=True)

    @property
    def active(self) -> int:
        return len(self._introductions) + len(self._dials) + len(self._relays)

    def count(self) -> None:
        """Bring the metrics up to this moment."""
        for relay in self._relays:
            relay.count()

    def sessions(self) -> list[Session]:
        now = self.poller.clock()
        return [_describe(relay, tcp_socket, now) for relay, tcp_socket in self._relays.items()]

    def drain(self, on_idle: Callable[[], None]) -> None:
        self.draining = True
        self._on_idle = on_idle
        if not self.active:
            on_idle()

    def end_all(self, outcome: Outcome) -> None:
        self._introductions.end_all()
        for dial in list(self._dials):
            dial.cancel()
            self._refuse(dial, outcome)
        for relay in list(self._relays):
            relay.abort(outcome)
        if self.pipes is not None:
            self.pipes.close()

    # -- the life of a connection

    def dialer(self, family: IPFamily, balancer: LoadBalancer, metrics: ServicePortMetrics) -> Dialer:
        return Dialer(
            partial(outgoing, AF[family]), balancer, self.poller, metrics, self._expect, self._connected, self._refuse
        )

    def take(self, tcp_socket: TCPSocket, client: SocketType, client_ip: str) -> None:
        tcp_socket.metrics.opened += 1
        tcp_socket.metrics.active += 1
        if tcp_socket.trusted and client_ip in tcp_socket.trusted:
            self._introductions.wait(tcp_socket, client)
        else:
            self._dial(tcp_socket, Dial(tcp_socket.dialer, client, client_ip))

    def _introduced(self, tcp_socket: TCPSocket, client: SocketType, header: Header | None) -> None:
        if header is None:
            self.poller.discard(client)
            self._account(tcp_socket, Outcome.NOT_INTRODUCED)
            return
        try:
            ip = (header.source or client.getpeername())[0]
        except OSError:
            ip = ""  # it is gone, which the relay will find out
        self._dial(tcp_socket, Dial(tcp_socket.dialer, client, ip, header))

    def _dial(self, tcp_socket: TCPSocket, dial: Dial) -> None:
        self._dials[dial] = tcp_socket
        dial.start()

    def _expect(self, dial: Dial) -> None:
        """See to it that the dial is timed out. One timer for all: nearly every dial is over long before."""
        self._look_by(dial.deadline)

    def _look_by(self, when: float) -> None:
        if when < self._look_at:
            self._look_at = when
            self.poller.call_at(when, self._time_out_dials)

    def _time_out_dials(self) -> None:
        now = self.poller.clock()
        if now < self._look_at:
            return  # a dial with an earlier deadline came later, and this look was made when that was due
        self._look_at = float("inf")
        try:
            for dial in [dial for dial in self._dials if dial.deadline <= now]:
                dial.time_out()
        finally:
            if self._dials:
                # Thousands may be under way toward a silent endpoint, each with a deadline of its own.
                self._look_by(max(now + LOOK, min(dial.deadline for dial in self._dials)))

    def _connected(self, dial: Dial, endpoint: SocketType, events: int) -> None:
        tcp_socket = self._dials[dial]
        if tcp_socket.version and not tcp_socket.introduce(dial, endpoint):
            self.poller.discard(endpoint)
            self._refuse(dial, Outcome.DIAL_FAILED)
            return
        del self._dials[dial]
        relay = self.relay(dial.client, endpoint, self.poller, self.pipes, tcp_socket.metrics, self._ended, dial.since)
        self._relays[relay] = tcp_socket
        relay.start(events)

    def _refuse(self, dial: Dial, outcome: Outcome) -> None:
        """The client gets a reset: its socket lingers for no time."""
        tcp_socket = self._dials.pop(dial)
        self.poller.discard(dial.client)
        self._account(tcp_socket, outcome)
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("%s: client refused: %s", tcp_socket.key.name, outcome.value)

    def _ended(self, relay: Relay) -> None:
        tcp_socket = self._relays.pop(relay)
        assert relay.ended is not None
        self._account(tcp_socket, relay.ended)
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug(
                "%s: %s after %.3f s, %d bytes to the endpoint, %d to the client",
                tcp_socket.key.name,
                relay.ended.value,
                self.poller.clock() - relay.since,
                relay.to_endpoint.bytes,
                relay.to_client.bytes,
            )

    def exhausted(self) -> None:
        """No descriptor for another client: counted each time, told once in a while."""
        self.metrics.accept_pauses += 1
        now = self.poller.clock()
        if now >= self._tell_again_at:
            self._tell_again_at = now + TELL_AGAIN
            logger.warning(
                "no descriptors left for connections beyond %d: clients wait until others leave; "
                "raise the limit on open files (ulimit -n, LimitNOFILE)",
                self.active,
            )

    def _account(self, tcp_socket: TCPSocket, outcome: Outcome) -> None:
        tcp_socket.metrics.active -= 1
        tcp_socket.metrics.ended[outcome] += 1
        self.descriptors.give(2)
        if self._on_idle is not None and not self.active:
            self._on_idle()

    def _sweep(self) -> None:
        """End what was half-closed for too long."""
        now = self.poller.clock()
        for relay in [r for r in self._relays if r.is_stale(now, self._half_close_timeout)]:
            relay.abort(Outcome.HALF_CLOSE_TIMEOUT)
        self.poller.call_at(now + self._half_close_timeout / 4, self._sweep)

    def _keep_alive(self) -> None:
        """Have the endpoints of connections that last be probed; clients' sockets inherit it from the listener."""
        for relay in reversed(self._relays):
            if relay.kept_alive:
                break  # and so are all that are older
            relay.kept_alive = True
            set_keepalive(relay.to_client.source)
        self.poller.call_at(self.poller.clock() + LASTING, self._keep_alive)


class TCPSocket:
    """The proxy socket of one TCP service port."""

    def __init__(
        self,
        shared: TCPSockets,
        key: SocketKey,
        listener: SocketType,
        balancer: LoadBalancer,
        metrics: ServicePortMetrics,
        *,
        adopted: bool = False,
    ) -> None:
        self.key = key
        self.protocol = shared.protocol
        self.port: int = listener.getsockname()[1]
        self.balancer = balancer
        self.metrics = metrics
        self.dialer = shared.dialer(key.family, balancer, metrics)
        self._shared = shared
        self._adopted = adopted
        self._serving = adopted
        self._paused = False
        self._resume = self._go_on
        self.version = 0
        """Of the PROXY protocol's headers that endpoints get; 0: none."""
        self.trusted = Trusted(())
        self._places: frozenset[bytes] | None = None
        self._node_ports: frozenset[bytes] = frozenset()
        # One socket in all states. Bound to an explicit number it keeps the port when it stops listening; a port
        # from bind(0) would be lost then.
        self._listener = listener
        shared.poller.register(listener, self, EDGE_IN)

    def serve(self) -> None:
        if self._serving:
            return
        try:
            self.listen(self._listener)
        except OSError as error:
            raise PortError(f"cannot listen on proxy port {self.port}: {error.strerror}") from error
        self._serving = True

    def refuse(self) -> None:
        if not self._serving:
            return
        self._shared.descriptors.forget(self._resume)
        # Clients that got as far as the queue get their answer from us; what is left there is reset.
        self._paused = False
        if not self._adopted:
            self._accept()
            self.stop_listening(self._listener)
        self._serving = False

    def screen(self, networks: Sequence[str] | None) -> None:
        screen(self._listener, self.key.family, networks)

    def speak(self, proxy_protocol: ProxyProtocol) -> None:
        self.version, self.trusted = proxy_protocol.version, Trusted(proxy_protocol.trusted)

    def introduce(self, dial: Dial, endpoint: SocketType) -> bool:
        name, family = str(self.key.name), self.key.family
        return introduce(endpoint, dial.client, family, dial.header, version=self.version, name=name)

    def admit(self, portals: Collection[Portal] | None) -> None:
        if portals is None:
            self._places = None
            return
        family = AF[self.key.family]
        self._places = frozenset(struct.pack("!H", p.port) + socket.inet_pton(family, p.ip) for p in portals if p.ip)
        self._node_ports = frozenset(struct.pack("!H", p.port) for p in portals if not p.ip)

    def close(self) -> None:
        self.refuse()
        if self._adopted:
            self._shared.poller.unregister(self._listener)
        self._shared.poller.discard(self._listener)

    def listen(self, listener: SocketType) -> None:
        listen(listener)

    def stop_listening(self, listener: SocketType) -> None:
        stop_listening(listener)

    # -- accepting

    def on_events(self, _events: int) -> None:
        if not self._paused:
            self._accept()

    def _accept(self) -> None:
        if not self._serving or self._shared.draining:
            return
        for _ in range(ACCEPTS):
            if not self._shared.descriptors.take(2):
                self._pause()
                self._shared.descriptors.wait(self._resume)
                return
            if not self._accept_one():
                self._shared.descriptors.give(2)
                return
        self._shared.poller.again(self._accept)

    def _accept_one(self) -> bool:
        """Take one client; False when none is left, or none can be had for now."""
        try:
            # What socket.accept() does, less its conversion of three enums; the client stays blocking at no
            # cost, since every call on it says MSG_DONTWAIT.
            fd, peer = self._listener._accept()  # type: ignore[attr-defined]
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in _EXHAUSTED:
                self._pause()
                self._shared.poller.call_at(self._shared.poller.clock() + PAUSE, self._go_on)
                return False
            if error.errno == errno.EINVAL:
                return False  # whoever we have the listener from has made it stop
            # A client that left while it waited (ECONNABORTED, EPROTO...): its place in the queue is gone, go on.
            self._shared.descriptors.give(2)
            return True
        self.receive(SocketType(AF[self.key.family], socket.SOCK_STREAM, 0, fd), peer[0])
        return True

    def receive(self, client: SocketType, client_ip: str) -> None:
        """Serve a client, for whom two descriptors have been taken, if it was sent here."""
        if self._places is not None and not self._came_through_a_portal(client):
            client.close()
            self.metrics.ended[Outcome.NOT_CAPTURED] += 1
            self._shared.descriptors.give(2)
        else:
            self._shared.take(self, client, client_ip)

    def _came_through_a_portal(self, client: SocketType) -> bool:
        found = original_destination(client, self.key.family)
        if found is None or self._places is None:
            return False  # conntrack knows nothing of it: nobody translated it
        port, ip = found
        return port + ip in self._places or port in self._node_ports

    def _pause(self) -> None:
        if not self._paused:
            self._paused = True
            self._shared.exhausted()

    def _go_on(self) -> None:
        self._paused = False
        self._accept()


def outgoing(family: int, _client: SocketType) -> SocketType:
    """A socket to dial with."""
    sock = SocketType(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT_ON_CLOSE)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError:
        sock.close()
        raise
    return sock


def _describe(relay: Relay, tcp_socket: TCPSocket, now: float) -> Session:
    def peer(sock: SocketType) -> str:
        try:
            address: Address = sock.getpeername()[:2]
        except OSError:
            return ""  # gone since, and its event is on the way
        return join_host_port(*address)

    return Session(
        service_port=str(tcp_socket.key.name),
        protocol=tcp_socket.protocol.value,
        client=peer(relay.to_endpoint.source),
        endpoint=peer(relay.to_client.source),
        state="half-closed" if relay.waiting else "open",
        seconds=round(now - relay.since, 3),
        to_endpoint=relay.to_endpoint.bytes,
        to_client=relay.to_client.bytes,
    )
