"""Node ports that are held on this host: bound, and not listened on, so that nobody else takes them.

Their clients are redirected before anybody could listen. What would is told the owner of the node port instead, or
that it is this proxy itself. Which ports to hold is decided in `plan`; how a port is held without serving is in
`sockets.base`. Where sockets listen at the node ports themselves, there is nothing to hold.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence

from userspace_proxy import host
from userspace_proxy.exceptions import PortError
from userspace_proxy.model import IPFamily, Protocol, SocketKey, family_of
from userspace_proxy.plan import LocalPort
from userspace_proxy.problems import Problems
from userspace_proxy.sockets.base import claim

_KIND = {
    Protocol.TCP: (socket.SOCK_STREAM, 0),
    Protocol.UDP: (socket.SOCK_DGRAM, 0),
    Protocol.SCTP: (socket.SOCK_STREAM, socket.IPPROTO_SCTP),
}


class Claims:
    """`networks`: those whose addresses serve node ports; none: all. `at` tells whose proxy port a place is."""

    def __init__(
        self, networks: Sequence[str], problems: Problems, at: Callable[[LocalPort], SocketKey | None]
    ) -> None:
        self._networks = networks
        self._problems = problems
        self._at = at
        self._held: dict[LocalPort, list[socket.socket]] = {}
        self.descriptors = 0

    def __contains__(self, place: object) -> bool:
        return place in self._held

    def __iter__(self) -> Iterator[LocalPort]:
        return iter(self._held)

    def addresses(self) -> tuple[str, ...]:
        """Where node ports are to be held now."""
        if not self._networks:
            return tuple(family.wildcard for family in IPFamily)
        return host.local_addresses(self._networks)

    def hold(self, place: LocalPort, addresses: Sequence[str], owner: SocketKey) -> bool:
        """Hold a node port on those of the addresses that are of its family; what fails is told its owner."""
        kind, number = _KIND[place.protocol]
        held: list[socket.socket] = []
        try:
            for ip in [ip for ip in addresses if family_of(ip) is place.family]:
                held += [claim(place.family, kind, ip, place.port, protocol=number)]
        except (PortError, OSError) as error:
            for sock in held:
                sock.close()
            self._problems.note(
                owner, f"node port {place} is in use on this host: {self._ours(place) or error}; end what uses it"
            )
            return False
        self._held[place] = held
        self.descriptors += len(held)
        return True

    def _ours(self, place: LocalPort) -> str:
        """What to say where it is this proxy that uses the port."""
        if (key := self._at(place)) is None:
            return ""
        return f"by this proxy, as the proxy port of {key.name}: keep --proxy-port-range and node ports apart"

    def release(self, place: LocalPort) -> None:
        held = self._held.pop(place)
        self.descriptors -= len(held)
        for sock in held:
            sock.close()

    def close(self) -> None:
        for place in list(self._held):
            self.release(place)
