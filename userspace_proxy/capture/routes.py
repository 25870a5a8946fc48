"""Routes to portal addresses that the node has none for.

A connection from the node itself is routed before OUTPUT can redirect it, so a cluster IP without a
route is unreachable whatever the rules say (a machine with no default route, a namespace with nothing
but lo). Such an address gets a host route over lo. Ours are known by their protocol number, which is
how those of a crashed run are found.

Clients elsewhere need none of this: PREROUTING comes before routing.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Collection

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from userspace_proxy.model import IPFamily

ROUTE_PROTOCOL = 117
"""Unassigned in rtnetlink.h and in iproute2's rt_protos."""

_UNROUTED = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH})


class Routes:
    """The routes of one family; holds a netlink socket until closed."""

    def __init__(self, family: IPFamily) -> None:
        self._address_family = socket.AF_INET if family is IPFamily.IPV4 else socket.AF_INET6
        self._mask = 32 if family is IPFamily.IPV4 else 128
        self._loopback = family.loopback
        self._netlink = IPRoute()
        self._seen: set[str] = set()
        """Addresses that have a route of ours, or another way, since they were last looked at."""
        self._ours: set[str] = set()
        self.reread()

    def close(self) -> None:
        self._netlink.close()

    def reread(self) -> None:
        """Trust nothing that was found before: others may have changed routes since."""
        routes = self._netlink.get_routes(family=self._address_family, proto=ROUTE_PROTOCOL)
        # Older kernels ignore the filter, so it is applied here once more.
        found = (route for route in routes if route["proto"] == ROUTE_PROTOCOL and route["dst_len"] == self._mask)
        self._ours = {str(route.get("dst")) for route in found}
        self._seen = set(self._ours)

    def serve(self, ips: Collection[str]) -> list[str]:
        """Give each unrouted one of these addresses a route, take all other routes of ours back.

        Says what went wrong, one line an address. Without `reread`, only new addresses are looked at.
        """
        wanted = set(ips)
        problems = []
        for ip in self._ours - wanted:
            problems += self._change("del", ip)
        self._ours &= wanted
        for ip in wanted - self._seen:
            if not self._is_routed(ip):
                problems += self._change("add", ip)
                self._ours.add(ip)
        self._seen = wanted
        return problems

    def _is_routed(self, ip: str) -> bool:
        """Whether the node could send to it. Connecting a UDP socket sends nothing."""
        with socket.socket(self._address_family, socket.SOCK_DGRAM) as asker:
            try:
                asker.connect((ip, 9))
            except OSError as error:
                return error.errno not in _UNROUTED
        return True

    def _change(self, verb: str, ip: str) -> list[str]:
        try:
            self._netlink.route(
                verb,
                family=self._address_family,
                dst=f"{ip}/{self._mask}",
                oif=socket.if_nametoindex("lo"),
                prefsrc=self._loopback,
                proto=ROUTE_PROTOCOL,
            )
        except NetlinkError as error:
            done_already = {"add": errno.EEXIST, "del": errno.ESRCH}[verb]
            return [] if error.code == done_already else [f"route to {ip}: cannot {verb} it: {error}"]
        except OSError as error:
            return [f"route to {ip}: cannot {verb} it: {error}"]
        return []
