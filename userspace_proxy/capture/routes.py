"""Routes to portal addresses that the node has none for.

A connection from the node itself is routed before OUTPUT can redirect it, so a cluster IP without a
route is unreachable whatever the rules say (a machine with no default route, a namespace with nothing
but lo). Such an address gets a host route over lo. Ours are known by their protocol number, which is
how those of a crashed run are found.

Clients elsewhere need none of this: PREROUTING comes before routing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Collection, Sequence

from userspace_proxy.capture.netlink import ACK, CREATE, EXCLUSIVE, Netlink, attribute, attributes, message
from userspace_proxy.model import IPFamily

ROUTE_PROTOCOL = 117
"""Unassigned in rtnetlink.h and in iproute2's rt_protos."""

_NETLINK_ROUTE = 0
_NEW_ROUTE, _DELETE_ROUTE, _GET_ROUTE = 24, 25, 26
_TABLE_MAIN, _TYPE_UNICAST = 254, 1
_SCOPE = {IPFamily.IPV4: 253, IPFamily.IPV6: 0}
"""Link, as a route without a gateway has; IPv6 knows no scopes."""
_DESTINATION, _OUTPUT_INTERFACE, _PREFERRED_SOURCE = 1, 4, 7
_ROUTE = struct.Struct("=BBBBBBBBI")
"""Family, destination's and source's lengths, TOS, table, protocol, scope, type, flags."""

_UNROUTED = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH})


class Routes:
    """The routes of one family; holds a netlink socket until closed."""

    def __init__(self, family: IPFamily) -> None:
        self._family = family
        self._address_family = socket.AF_INET if family is IPFamily.IPV4 else socket.AF_INET6
        self._mask = 32 if family is IPFamily.IPV4 else 128
        self._netlink = Netlink("routes", _NETLINK_ROUTE)
        with contextlib.suppress(OSError):  # older kernels tell of all routes
            self._netlink.filter_strictly()
        self._seen: set[str] = set()
        """Addresses that have a route of ours, or another way, since they were last looked at."""
        self._ours: set[str] = set()
        self.reread()

    def close(self) -> None:
        self._netlink.close()

    def reread(self) -> None:
        """Trust nothing that was found before: others may have changed routes since."""
        wanted = _ROUTE.pack(self._address_family, 0, 0, 0, _TABLE_MAIN, ROUTE_PROTOCOL, 0, 0, 0)
        self._ours = set()
        for _, body in self._netlink.dump(_GET_ROUTE, wanted):
            _, length, _, _, _, protocol, *_ = _ROUTE.unpack_from(body)
            if protocol == ROUTE_PROTOCOL and length == self._mask:
                destination = dict(attributes(body[_ROUTE.size :]))[_DESTINATION]
                self._ours.add(socket.inet_ntop(self._address_family, destination))
        self._seen = set(self._ours)

    def serve(self, ips: Collection[str]) -> list[str]:
        """Give each unrouted one of these addresses a route, take all other routes of ours back.

        Says what went wrong, one line an address. Without `reread`, only new addresses are looked at.
        """
        wanted = set(ips)
        return self.change((self._seen | self._ours) - wanted, wanted)

    def change(self, gone: Collection[str], new: Collection[str]) -> list[str]:
        """The same, told as the difference to the addresses before; its cost is the difference's alone."""
        problems = self._change(_DELETE_ROUTE, sorted(ip for ip in gone if ip in self._ours))
        self._ours.difference_update(gone)
        self._seen.difference_update(gone)
        unrouted = sorted(ip for ip in new if ip not in self._seen and not self._is_routed(ip))
        problems += self._change(_NEW_ROUTE, unrouted)
        self._ours.update(unrouted)
        self._seen.update(new)
        return problems

    def _is_routed(self, ip: str) -> bool:
        """Whether the node could send to it. Connecting a UDP socket sends nothing."""
        with socket.socket(self._address_family, socket.SOCK_DGRAM) as asker:
            try:
                asker.connect((ip, 9))
            except OSError as error:
                return error.errno not in _UNROUTED
        return True

    def _change(self, kind: int, ips: Sequence[str]) -> list[str]:
        verb, flags, done_already = (
            ("add", ACK | CREATE | EXCLUSIVE, errno.EEXIST) if kind == _NEW_ROUTE else ("del", ACK, errno.ESRCH)
        )
        loopback = attribute(_OUTPUT_INTERFACE, struct.pack("=I", socket.if_nametoindex("lo"))) if ips else b""
        loopback += attribute(_PREFERRED_SOURCE, self._packed(self._family.loopback))
        start = _ROUTE.pack(
            *(self._address_family, self._mask, 0, 0, _TABLE_MAIN),
            *(ROUTE_PROTOCOL, _SCOPE[self._family], _TYPE_UNICAST, 0),
        )
        codes = self._netlink.change(
            [message(kind, flags, start + attribute(_DESTINATION, self._packed(ip)) + loopback) for ip in ips]
        )
        return [
            f"route to {ip}: cannot {verb} it: {os.strerror(code)}"
            for ip, code in zip(ips, codes, strict=True)
            if code not in (0, done_already)
        ]

    def _packed(self, ip: str) -> bytes:
        return socket.inet_pton(self._address_family, ip)
