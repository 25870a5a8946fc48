"""Proxy sockets that listen at the portals themselves, where nothing redirects clients from there to a proxy port.

A `PortalSocket` is one service port: a proxy socket of the ordinary kind at each of its portals, all with the same
balancer, endpoints and account, and one more at the proxy port, on loopback alone. Which portals there are comes with
`admit`, as for the others; their addresses have to be this host's by then. What cannot be had is tried again with
every `serve` and `refuse`.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Collection, Sequence

from userspace_proxy import host
from userspace_proxy.exceptions import PortError
from userspace_proxy.loadbalancer import LoadBalancer
from userspace_proxy.metrics import Outcome, ServicePortMetrics
from userspace_proxy.model import (
    IPFamily,
    Portal,
    PortalKind,
    Protocol,
    ProxyProtocol,
    SocketKey,
    family_of,
    join_host_port,
)
from userspace_proxy.sockets.base import ProxySocket, ProxySockets

LOOK_AGAIN = 1.0
"""Seconds for which the host's addresses are taken to be the same: thousands of node ports may ask at once."""

Place = tuple[str, int]


class PortalSockets:
    """Those of one protocol, made of ordinary ones."""

    def __init__(
        self, inner: ProxySockets, bind: str, nodeport_networks: Sequence[str], room: Callable[[], bool]
    ) -> None:
        """`bind`: where node ports are, if no networks say so. A wildcard stands for the addresses that the host has in
        both families: a socket at the wildcard itself would be at every cluster IP as well, whose ports are others'.
        SCTP's is there all the same, as it tells peers of all addresses that it is at. `room`: whether there are
        descriptors for one more.
        """
        self.room = room
        self.protocol = inner.protocol
        self.inner = inner
        self.listeners = 0
        """At portals; proxy ports are not among them."""
        self._bind = bind
        self._everywhere = bind in (family.wildcard for family in IPFamily)
        self._networks = nodeport_networks
        if self._everywhere and not nodeport_networks and inner.protocol is not Protocol.SCTP:
            self._networks = ("0.0.0.0/0", "::/0")
        self._addresses: tuple[str, ...] = ()
        self._looked_at = -LOOK_AGAIN

    def open(
        self, key: SocketKey, ip: str, port: int, balancer: LoadBalancer, metrics: ServicePortMetrics
    ) -> PortalSocket:
        def at(place: Place) -> ProxySocket:
            return self.inner.open(key, *place, balancer, metrics)

        return PortalSocket(self, key, at((key.family.loopback, port)), at)

    @property
    def active(self) -> int:
        return self.inner.active

    def drain(self, on_idle: Callable[[], None]) -> None:
        self.inner.drain(on_idle)

    def end_all(self, outcome: Outcome) -> None:
        self.inner.end_all(outcome)

    def places(self, portal: Portal) -> list[Place]:
        """Where a portal's clients come to."""
        if portal.ip:
            return [(portal.ip, portal.port)]
        if not self._networks:
            return [(portal.family.wildcard if self._everywhere else self._bind, portal.port)]
        now = time.monotonic()
        if now - self._looked_at >= LOOK_AGAIN:
            self._addresses = host.local_addresses(self._networks)
            self._looked_at = now
        return [(ip, portal.port) for ip in self._addresses if family_of(ip) is portal.family]


class PortalSocket:
    """`at` opens a proxy socket of this service port somewhere."""

    def __init__(
        self, shared: PortalSockets, key: SocketKey, proxy_socket: ProxySocket, at: Callable[[Place], ProxySocket]
    ) -> None:
        self.key = key
        self.port = proxy_socket.port
        self._shared = shared
        self._at = at
        self._proxy_socket = proxy_socket
        self._listeners: dict[Place, ProxySocket] = {}
        self._portals: frozenset[Portal] = frozenset()
        self._serving = False
        self._networks: Sequence[str] | None = None
        self._proxy_protocol = ProxyProtocol()
        proxy_socket.admit(None)

    def serve(self) -> None:
        self._serving = True
        self._settle()

    def refuse(self) -> None:
        self._serving = False
        self._settle()

    def screen(self, networks: Sequence[str] | None) -> None:
        self._networks = networks
        for listener in (self._proxy_socket, *self._listeners.values()):
            listener.screen(networks)

    def speak(self, proxy_protocol: ProxyProtocol) -> None:
        self._proxy_protocol = proxy_protocol
        for listener in (self._proxy_socket, *self._listeners.values()):
            listener.speak(proxy_protocol)

    def admit(self, portals: Collection[Portal] | None) -> None:
        """Listen at these, and nowhere else. Raises PortError for those that cannot be had; the others are open."""
        self._portals = frozenset(portals or ())
        self._settle()

    def close(self) -> None:
        self._portals = frozenset()
        self._close_others(set())
        self._proxy_socket.close()

    def _settle(self) -> None:
        wanted = {place: portal for portal in sorted(self._portals) for place in self._shared.places(portal)}
        self._close_others(wanted)
        problems = []
        for place, portal in wanted.items():
            try:
                self._open(place, portal)
            except (PortError, OSError) as error:
                problems.append(self._explain(error, place))
        for listener in (self._proxy_socket, *self._listeners.values()):
            try:
                listener.serve() if self._serving else listener.refuse()
            except PortError as error:
                problems.append(str(error))
        if problems:
            raise PortError("; ".join(problems))

    def _open(self, place: Place, portal: Portal) -> None:
        if place in self._listeners:
            return
        if portal.kind in (PortalKind.EXTERNAL_IP, PortalKind.LOAD_BALANCER_IP) and not host.is_local_address(place[0]):
            # A local route would take all of it from whose it is, and not this port alone.
            raise PortError(f"{portal}: not an address of this host; give it to the host, or use a node port")
        if not self._shared.room():
            raise PortError(
                f"{join_host_port(*place)} cannot be had: what descriptors are left is for connections; allow more "
                "(ulimit -n), or serve node ports on fewer addresses (--nodeport-addresses)"
            )
        listener = self._listeners[place] = self._at(place)
        self._shared.listeners += 1
        listener.admit(None)
        listener.speak(self._proxy_protocol)
        listener.screen(self._networks)

    def _explain(self, error: PortError | OSError, place: Place) -> str:
        """What is in the way, and what to do about it where that is known."""
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
        code = cause.errno if isinstance(cause, OSError) else 0
        meanwhile = f"meanwhile its clients on this host can use {join_host_port(self.key.family.loopback, self.port)}"
        if code == errno.EADDRINUSE:
            owner = host.who_has(self._shared.protocol.value.lower(), *place)
            return f"{error}{f', by {owner}' if owner else ''}; end it, or have it listen on other addresses only"
        if code == errno.EACCES and not host.is_delivered_here(place[0]):
            code = errno.EADDRNOTAVAIL  # the port was asked for first, and to have that would not help
        if code == errno.EACCES:
            return (
                f"{error}: ports below {host.first_unprivileged_port()} need CAP_NET_BIND_SERVICE, or "
                f"sysctl net.ipv4.ip_unprivileged_port_start={place[1]}; {meanwhile}"
            )
        if code == errno.EADDRNOTAVAIL:
            return f"{error}: not an address of this host, and to make it one takes CAP_NET_ADMIN; {meanwhile}"
        return str(error)

    def _close_others(self, wanted: Collection[Place]) -> None:
        for place in [place for place in self._listeners if place not in wanted]:
            self._listeners.pop(place).close()
            self._shared.listeners -= 1
