"""Routes to portal addresses: so that the node has a way to them, or so that they are its own.

A connection from the node itself is routed before OUTPUT can redirect it, so a cluster IP without a
route is unreachable whatever the rules say (a machine with no default route, a namespace with nothing
but lo). Such an address gets a host route over lo. Ours are known by their protocol number, which is
how those of a crashed run are found.

Clients elsewhere need none of this: PREROUTING comes before routing. Where nothing is redirected, an address is made
the node's own instead, by a route in the local table: what is sent to it, from wherever, is delivered here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from userspace_proxy.capture.netlink import ACK, CREATE, EXCLUSIVE, Netlink, attribute, attributes, message
from userspace_proxy.host import is_local_address
from userspace_proxy.model import IPFamily

ROUTE_PROTOCOL = 117
"""Unassigned in rtnetlink.h and in iproute2's rt_protos."""

_NETLINK_ROUTE = 0
_NEW_ROUTE, _DELETE_ROUTE, _GET_ROUTE = 24, 25, 26
_DESTINATION, _OUTPUT_INTERFACE, _PREFERRED_SOURCE = 1, 4, 7
_ROUTE = struct.Struct("=BBBBBBBBI")
"""Family, destination's and source's lengths, TOS, table, protocol, scope, type, flags."""


class Kind(NamedTuple):
    """Of route."""

    table: int
    type: int
    scope: int
    """IPv4 only; IPv6 knows none."""


WAY = Kind(table=254, type=1, scope=253)
"""In the main table, over lo, as a route without a gateway."""
LOCAL = Kind(table=255, type=2, scope=254)

_UNROUTED = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH})


class Routes:
    """The routes of one family; holds a netlink socket until closed. What goes wrong is told by address."""

    def __init__(self, family: IPFamily, kind: Kind = WAY) -> None:
        self._family = family
        self._kind = kind
        self._address_family = socket.AF_INET if family is IPFamily.IPV4 else socket.AF_INET6
        self._mask = 32 if family is IPFamily.IPV4 else 128
        self._netlink = Netlink("routes", _NETLINK_ROUTE)
        with contextlib.suppress(OSError):  # older kernels tell of all routes
            self._netlink.filter_strictly()
        self._seen: set[str] = set()
        """Addresses that have a route of ours, or another way, since they were last looked at."""
        self._ours: set[str] = set()
        self.reread()

    def __contains__(self, ip: str) -> bool:
        """Whether it has a route of ours."""
        return ip in self._ours

    def __iter__(self) -> Iterator[str]:
        """The addresses that have one."""
        return iter(self._ours)

    def close(self) -> None:
        self._netlink.close()

    def reread(self) -> None:
        """Trust nothing that was found before: others may have changed routes since."""
        wanted = _ROUTE.pack(self._address_family, 0, 0, 0, self._kind.table, ROUTE_PROTOCOL, 0, 0, 0)
        self._ours = set()
        for _, body in self._netlink.dump(_GET_ROUTE, wanted):
            _, length, _, _, table, protocol, *_ = _ROUTE.unpack_from(body)
            if (table, protocol, length) == (self._kind.table, ROUTE_PROTOCOL, self._mask):
                destination = dict(attributes(body[_ROUTE.size :]))[_DESTINATION]
                self._ours.add(socket.inet_ntop(self._address_family, destination))
        self._seen = set(self._ours)

    def serve(self, ips: Collection[str]) -> dict[str, str]:
        """Give each of these addresses that needs one a route, take all other routes of ours back.

        Without `reread`, only new addresses are looked at.
        """
        wanted = set(ips)
        return self.change((self._seen | self._ours) - wanted, wanted)

    def change(self, gone: Collection[str], new: Collection[str]) -> dict[str, str]:
        """The same, told as the difference to the addresses before; its cost is the difference's alone."""
        problems = self._change(_DELETE_ROUTE, sorted(ip for ip in gone if ip in self._ours))
        self._ours.difference_update(gone)
        self._seen.difference_update(gone)
        unrouted = sorted(ip for ip in new if ip not in self._seen and not self._has_what_it_needs(ip))
        refused = self._change(_NEW_ROUTE, unrouted)
        self._ours.update(ip for ip in unrouted if ip not in refused)
        self._seen.update(ip for ip in new if ip not in refused)
        return problems | refused

    def _has_what_it_needs(self, ip: str) -> bool:
        """Whether it is the node's already, or the node could send to it. Connecting a UDP socket sends nothing."""
        if self._kind is LOCAL:
            return is_local_address(ip)
        with socket.socket(self._address_family, socket.SOCK_DGRAM) as asker:
            try:
                asker.connect((ip, 9))
            except OSError as error:
                return error.errno not in _UNROUTED
        return True

    def _change(self, kind: int, ips: Sequence[str]) -> dict[str, str]:
        verb, flags, done_already = (
            ("add", ACK | CREATE | EXCLUSIVE, errno.EEXIST) if kind == _NEW_ROUTE else ("del", ACK, errno.ESRCH)
        )
        loopback = attribute(_OUTPUT_INTERFACE, struct.pack("=I", socket.if_nametoindex("lo"))) if ips else b""
        # IPv4 takes a local address itself as the source toward it. IPv6 would take any, and so that the address can be
        # told for one that is delivered here (see host), it is given one.
        if self._kind is WAY or self._family is IPFamily.IPV6:
            loopback += attribute(_PREFERRED_SOURCE, self._packed(self._family.loopback))
        scope = self._kind.scope if self._family is IPFamily.IPV4 else 0
        start = _ROUTE.pack(
            *(self._address_family, self._mask, 0, 0, self._kind.table),
            *(ROUTE_PROTOCOL, scope, self._kind.type, 0),
        )
        codes = self._netlink.change(
            [message(kind, flags, start + attribute(_DESTINATION, self._packed(ip)) + loopback) for ip in ips]
        )
        return {
            ip: f"route to {ip}: cannot {verb} it: {os.strerror(code)}"
            for ip, code in zip(ips, codes, strict=True)
            if code not in (0, done_already)
        }

    def _packed(self, ip: str) -> bytes:
        return socket.inet_pton(self._address_family, ip)
