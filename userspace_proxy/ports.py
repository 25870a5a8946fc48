"""Which number a proxy port gets, and which service port a portal belongs to.

Both are book-keeping only. The binding itself is done in `sockets`; that a number is free here says
nothing about the host, so whoever opens a socket goes through `candidates` until one can be bound.

Proxy ports are chosen here, at random, instead of by the kernel (`bind` to port 0), because the kernel takes
such a port back when a listening socket is shut down, and a service port without endpoints must keep its own.
"""

from __future__ import annotations

import errno
import math
import typing
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

from userspace_proxy.config import PortRange
from userspace_proxy.exceptions import PortError
from userspace_proxy.model import IPFamily, Place, Portal, SocketKey

ANOTHER_WILL_DO = frozenset({errno.EADDRINUSE, errno.EACCES})
"""Where one proxy port cannot be had, and the next one may be."""


class Dice(typing.Protocol):
    """What is wanted of a `random.Random`."""

    def randrange(self, start: int, /) -> int: ...


class ProxyPorts:
    """The proxy ports of a range: which are taken, and in which order to try the others.

    A number is taken once, for all protocols and families together: a few numbers more, but `ss` and
    the rules then show one service port a number.
    """

    __slots__ = ("_range", "_rng", "_taken")

    def __init__(self, port_range: PortRange, rng: Dice) -> None:
        self._range = port_range
        self._rng = rng
        self._taken: set[int] = set()

    def candidates(self, avoid: Container[int] = ()) -> Iterator[int]:
        """Every free port of the range once, in random order.

        `avoid` is passed over: node ports, which would be captured before they reach a proxy socket. Give
        a set. Ports may be taken while the iterator is in use.
        """
        first = self._range.first
        count = self._range.last - first + 1
        # Steps of a length that has no divisor in common with the range's meet each port exactly once:
        # no list of up to 65,535 numbers to shuffle for each socket, of which one is used.
        port = self._rng.randrange(count)
        stride = 1 + self._rng.randrange(count)
        while math.gcd(stride, count) != 1:
            stride += 1  # count + 1 at the latest
        for _ in range(count):
            if first + port not in self._taken and first + port not in avoid:
                yield first + port
            port = (port + stride) % count

    def exhausted(self, avoid: Container[int]) -> str:
        """Why there is no candidate."""
        ports = range(self._range.first, self._range.last + 1)
        avoided = "is a node port, or " if any(port in avoid for port in ports if port not in self._taken) else "is "
        return f"every port of {self._range} {avoided}taken by a service port; see --proxy-port-range"

    def take(self, port: int) -> None:
        """Raises PortError if somebody has it."""
        if port in self._taken:
            raise PortError(f"proxy port {port} is taken already; go on with the next candidate")
        self._taken.add(port)

    def release(self, port: int) -> None:
        """Give a port back; one that was never taken is no fault."""
        self._taken.discard(port)


def advice(code: int, bind: str, family: IPFamily) -> str:
    """What to do where a proxy port cannot be had at `bind`, by `errno`; empty where that is not known."""
    if code in ANOTHER_WILL_DO:
        return "see --proxy-port-range"
    if code == errno.EADDRNOTAVAIL and bind != family.wildcard:
        return f"give this host the address, or write --bind-address={family.wildcard} for all that it has"
    if code == errno.EADDRNOTAVAIL:
        return f"this host has no loopback address {family.loopback}: ip link set lo up"
    return "allow more of them (ulimit -n)" if code == errno.EMFILE else ""


@dataclass(frozen=True, slots=True)
class Conflict:
    """A portal that somebody else owns."""

    portal: Portal
    wanted_by: SocketKey
    owned_by: SocketKey

    def __str__(self) -> str:
        return (
            f"{self.portal} belongs to {self.owned_by.name}, {self.wanted_by.name} cannot have it as well: "
            "an address, protocol and port go to one service port only; change it in one of the two Services"
        )


def assign(
    want: Mapping[SocketKey, Sequence[Portal]], owned: Mapping[Portal, SocketKey]
) -> tuple[dict[Portal, SocketKey], list[Conflict]]:
    """Give each place to one of those who want it: to its owner, else to the first by name.

    Args:
        want: The portals each socket asks for. Of several at one place, differing in kind, the first counts.
        owned: Who has which portal now, as an earlier call returned it. Owners who want theirs no more lose it.

    Returns:
        Who has which portal from now on, each place once; and every claim that came too late.
    """
    owners = {portal.place: key for portal, key in owned.items()}
    given: dict[Place, SocketKey] = {}
    portals: dict[Portal, SocketKey] = {}
    newcomers: list[tuple[SocketKey, Portal]] = []
    for key, asked in want.items():
        for portal in asked:
            place = portal.place
            if owners.get(place) != key:
                newcomers.append((key, portal))
            elif place not in given:
                given[place] = key
                portals[portal] = key
    newcomers.sort(key=lambda newcomer: newcomer[0].name)
    conflicts = []
    for key, portal in newcomers:
        owner = given.get(portal.place)
        if owner is None:
            given[portal.place] = key
            portals[portal] = key
        elif owner != key:
            conflicts.append(Conflict(portal, key, owner))
    return portals, conflicts
