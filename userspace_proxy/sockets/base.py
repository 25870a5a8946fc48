"""The contract of proxy sockets, and what all kinds of them share.

A proxy socket serves one service port in one family on one proxy port. It knows its balancer, its
endpoints through it, and the destinations it may be reached by; how traffic gets to it is `capture`'s
business, when it opens and closes `proxier`'s.

A socket is always in one of three states. *Serving*: clients are taken. *Refusing*: there is no
endpoint; the port stays claimed but new clients are refused by the kernel (TCP reset, ICMP port
unreachable), not accepted and dropped. *Closed*. Connections that are established live on in all three.
"""

from __future__ import annotations

import errno
import socket
import struct
import typing
from collections.abc import Callable, Collection, Sequence

from userspace_proxy import host
from userspace_proxy.exceptions import PortError
from userspace_proxy.loadbalancer import LoadBalancer
from userspace_proxy.metrics import Outcome, ServicePortMetrics
from userspace_proxy.model import IPFamily, Portal, Protocol, ProxyProtocol, SocketKey, join_host_port

RESERVE = 128
"""Descriptors kept for everything but proxy sockets and sessions: the loop, files, admin clients, the capture."""
LEAST_DESCRIPTORS = RESERVE + 8
"""With fewer, next to nothing is left for service ports and their clients; with fewer than 40, nor for the start."""

ABORT_ON_CLOSE = struct.pack("ii", 1, 0)
CLOSE_IN_ORDER = struct.pack("ii", 0, 0)
"""Values of SO_LINGER."""

_SO_BINDTOIFINDEX = 62
_NO_INTERFACE = 0x7FFFFFFF
_IPV6_FREEBIND = 78

AF = {IPFamily.IPV4: int(socket.AF_INET), IPFamily.IPV6: int(socket.AF_INET6)}


class ProxySocket(typing.Protocol):
    key: SocketKey
    port: int
    """The proxy port. It does not change while the socket is open."""

    def serve(self) -> None:
        """Take clients. Raises PortError; does nothing if it serves already."""

    def refuse(self) -> None:
        """Take no more clients, keep the port. UDP flows end, TCP connections go on."""

    def screen(self, networks: Sequence[str] | None) -> None:
        """Hear only clients from these networks, to all others keep silent; None: hear everybody.

        With no network at all nobody is heard, which is how a socket that serves refuses nobody and takes nobody.
        Raises PortError.
        """

    def speak(self, proxy_protocol: ProxyProtocol) -> None:
        """How clients are introduced from now on; of no concern to what is not TCP."""

    def admit(self, portals: Collection[Portal] | None) -> None:
        """Only clients that were sent here through these portals are served; None: whoever connects.

        Raises PortError where to serve a portal is to listen there, and it cannot be had.
        """

    def close(self) -> None:
        """Release the port. TCP connections go on; they are ended through their `ProxySockets`."""


class Session(typing.TypedDict):
    """One live connection or flow, as /connections shows it."""

    service_port: str
    protocol: str
    client: str
    endpoint: str
    state: str
    seconds: float
    to_endpoint: int
    to_client: int


class ProxySockets(typing.Protocol):
    """All proxy sockets of one protocol: what they share, and the sessions that outlive their sockets."""

    protocol: Protocol

    def open(
        self, key: SocketKey, ip: str, port: int, balancer: LoadBalancer, metrics: ServicePortMetrics
    ) -> ProxySocket:
        """Claim the proxy port, refusing clients at first. Raises PortError if it is taken."""

    @property
    def active(self) -> int:
        """Live sessions."""

    def drain(self, on_idle: Callable[[], None]) -> None:
        """Take no new session from now on; call back once the last one has ended, at once if there is none."""

    def end_all(self, outcome: Outcome) -> None:
        """End every session at once, telling both sides by a reset."""


class Descriptors:
    """How many descriptors sessions may hold, so that running out is met before the kernel says so.

    What is refused here waits: in the listen queue (TCP), or makes room itself (UDP).
    """

    __slots__ = ("_resuming", "_waiting", "limit", "used")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._waiting: dict[Callable[[], None], None] = {}
        self._resuming = False

    def take(self, count: int) -> bool:
        if self.used + count > self.limit:
            return False
        self.used += count
        return True

    def give(self, count: int) -> None:
        self.used -= count
        self._resume()

    def allow(self, limit: int) -> None:
        self.limit = limit
        self._resume()

    def _resume(self) -> None:
        if not self._waiting or self._resuming:
            return  # whoever is resumed gives back what it does not need: not one level deeper for each that waits
        self._resuming = True
        try:
            # Its clients may have left meanwhile, so the next one gets its turn as well.
            for _ in range(len(self._waiting)):
                if self.used + 2 > self.limit or not self._waiting:
                    break
                resume = next(iter(self._waiting))
                del self._waiting[resume]
                resume()
        finally:
            self._resuming = False

    def wait(self, resume: Callable[[], None]) -> None:
        """Call `resume` once there is room again; asking twice waits once."""
        self._waiting[resume] = None

    def forget(self, resume: Callable[[], None]) -> None:
        self._waiting.pop(resume, None)


def bind(
    family: IPFamily,
    kind: int,
    ip: str,
    port: int,
    *,
    protocol: int = 0,
    beside_ours: bool = False,
    prepare: Callable[[socket.socket], None] = lambda _: None,
) -> socket.socket:
    """A non-blocking socket bound to a port that is nobody else's. One family a socket: IPv6 ones are V6ONLY.

    `protocol`: IPPROTO_SCTP, or 0 for the usual one of its kind. `beside_ours`: share the port with a socket of ours
    that allows it (SO_REUSEPORT), to take its place without letting go of the port in between. What `prepare` does to
    it is in force from the first packet on.
    Raises PortError.
    """
    sock = socket.socket(AF[family], kind | socket.SOCK_NONBLOCK, protocol)
    try:
        if family is IPFamily.IPV6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        prepare(sock)
        if beside_ours:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if kind == socket.SOCK_STREAM and not protocol:
            # Past connections in TIME_WAIT are no hindrance. Until it listens, the socket must be one to others
            # with the same option, though, so it is kept no longer than for this.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _bind_here(sock, family, ip, port)
        if kind == socket.SOCK_STREAM and not protocol:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    except OSError as error:
        sock.close()
        raise PortError(f"{join_host_port(ip, port)} cannot be had: {error.strerror}") from error
    except PortError:
        sock.close()
        raise
    return sock


def _bind_here(sock: socket.socket, family: IPFamily, ip: str, port: int) -> None:
    try:
        sock.bind((ip, port))
    except OSError as error:
        # To IPv4 an address with a local route is this host's, to IPv6 only one that an interface has.
        if family is IPFamily.IPV4 or error.errno != errno.EADDRNOTAVAIL or not host.is_delivered_here(ip):
            raise
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
        sock.bind((ip, port))


def claim(
    family: IPFamily, kind: int, ip: str, port: int, *, protocol: int = 0, beside_ours: bool = False
) -> socket.socket:
    """Hold a port without serving on it: whoever comes is refused by the kernel. Raises PortError.

    A TCP or SCTP socket that is bound and does not listen is answered for by a reset.
    """
    sock = bind(family, kind, ip, port, protocol=protocol, beside_ours=beside_ours)
    if kind == socket.SOCK_DGRAM:
        hear_nobody(sock)
    return sock


def hear_nobody(sock: socket.socket) -> None:
    """Let a UDP socket have its port and no datagrams: their senders get ICMP.

    Bound to an interface that cannot exist it still keeps others from the port, on every address, and the kernel finds
    nobody who would take what is sent there. (Connected to itself, it would hold one address alone.)
    """
    sock.setsockopt(socket.SOL_SOCKET, _SO_BINDTOIFINDEX, _NO_INTERFACE)
