"""Capture without netfilter: the portals' addresses become the node's own, and sockets listen there.

A service address inside 127.0.0.0/8, or one that an interface has, needs nothing, not even root. For other cluster
IPs there are routes in the local table. External and load-balancer IPs are taken only where the node owns them: they
are else somebody's, who would lose his traffic to us, all of it and not the service port's alone; the sockets say so.
An address that has left Services goes when the last connection to it has ended.

What else follows from a local route: everything of the node that listens on all addresses answers at these as well, and
on networks that are attached to the node their ARP requests are answered. The sockets are in `sockets.portals`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Collection, Iterable

from userspace_proxy.capture.base import Changes, Difference
from userspace_proxy.capture.routes import LOCAL, WAY, Routes
from userspace_proxy.exceptions import CaptureError, CaptureUnavailable
from userspace_proxy.host import is_local_address, spoken_on
from userspace_proxy.model import IPFamily, PortalKind, Protocol, Redirect, family_of

logger = logging.getLogger(__name__)

_PROBES = {IPFamily.IPV4: "192.0.2.1", IPFamily.IPV6: "2001:db8::1"}
"""Of the networks for documentation: nobody's."""


class Local:
    """Addresses of the node's own, and nothing else in the kernel."""

    name = "local"
    rewrites_destination = False
    listens = frozenset(Protocol)

    def __init__(self, *, bind_address: str, alone: bool = True) -> None:
        """A wildcard bind address stands for both families', any other for its own family alone.

        `alone`: not beside another capture, where few will need addresses, and are told when they cannot have one.
        """
        self._alone = alone
        wildcard = bind_address in (family.wildcard for family in IPFamily)
        self._families = [family for family in IPFamily if wildcard or family is family_of(bind_address)]
        self._routes: dict[IPFamily, Routes] = {}
        self._wanted: dict[str, set[Redirect]] = {}
        """The redirects of each address."""
        self._unmet: set[str] = set()
        """Addresses that are not this host's. Tried again with every change."""
        self._spoken_on: set[str] = set()
        """Addresses that no Service has any more, while connections do. Looked at again with every change."""

    async def start(self) -> None:
        if not any(is_local_address(family.loopback) for family in self._families):
            raise CaptureUnavailable("nothing can be bound to a loopback address: ip link set lo up")
        try:
            await asyncio.to_thread(self._take_over)
        except OSError as error:
            raise CaptureUnavailable(f"routes cannot be read: {error}") from error

    def _take_over(self) -> None:
        for family in self._families:
            _remove(family)
            routes = self._routes[family] = Routes(family, LOCAL)
            problems = routes.serve([_PROBES[family]]) if self._alone else {}
            routes.serve(())
            for problem in problems.values():
                logger.warning(
                    "capture local: %s; only addresses that this host has are served in %s", problem, family.value
                )

    async def replace(self, redirects: Collection[Redirect], difference: Difference | None = None) -> Changes:
        try:
            return await asyncio.to_thread(self._replace, redirects, difference)
        except OSError as error:
            raise CaptureError(f"routes: {error}") from error

    def _replace(self, redirects: Collection[Redirect], difference: Difference | None) -> Changes:
        thoroughly = difference is None or not (difference.gone or difference.new)
        if difference is None:
            before, now = {r for found in self._wanted.values() for r in found}, set(redirects)
            difference = Difference(tuple(before - now), tuple(now - before))
        gone, new = self._exchange(difference)
        gone |= self._spoken_on - self._wanted.keys()
        self._spoken_on = spoken_on(self._routed(gone))
        gone -= self._spoken_on
        looked_at = set(self._wanted) if thoroughly else new | (self._unmet & self._wanted.keys())
        foreign = {ip for ip in looked_at if self._is_foreign(ip)}
        left = self._routed(looked_at | gone)
        if thoroughly:
            for routes in self._routes.values():
                routes.reread()
        repaired = len(left - self._routed(left))
        problems: dict[str, str] = {}
        for family, routes in self._routes.items():
            asked = _of(family, looked_at - foreign)
            problems |= (
                routes.serve([*asked, *_of(family, self._spoken_on)])
                if thoroughly
                else routes.change(_of(family, gone), asked)
            )
        for ip in problems.keys() - self._wanted.keys():
            logger.warning("capture local: %s", problems[ip])
        unrouted = {ip: f"{why}; it takes CAP_NET_ADMIN" for ip, why in problems.items() if ip in self._wanted}
        self._unmet = foreign | unrouted.keys()
        refused = (f"{r.owner}: {r.portal}: {why}" for ip, why in unrouted.items() for r in self._wanted[ip])
        routed = self._routed(looked_at | gone)
        return Changes(len(routed - left), len(left - routed), repaired, tuple(sorted(refused)))

    def _routed(self, ips: Iterable[str]) -> set[str]:
        """Those that have a route of ours."""
        return {ip for ip in ips if any(ip in routes for routes in self._routes.values())}

    def _exchange(self, difference: Difference) -> tuple[set[str], set[str]]:
        """The addresses that are wanted no more, and those that were not before."""
        touched = {r.portal.ip for r in (*difference.gone, *difference.new) if r.portal.ip}
        before = {ip for ip in touched if ip in self._wanted}
        for redirect in difference.gone:
            self._wanted.get(redirect.portal.ip, set()).discard(redirect)
        for redirect in difference.new:
            if redirect.portal.ip:  # a node port is on addresses that the node has
                self._wanted.setdefault(redirect.portal.ip, set()).add(redirect)
        for ip in touched:
            if not self._wanted.get(ip):
                self._wanted.pop(ip, None)
        gone = {ip for ip in before if ip not in self._wanted}
        return gone, {ip for ip in touched if ip in self._wanted} - before

    def _is_foreign(self, ip: str) -> bool:
        """Whether it would be taken from somebody else."""
        kinds = {redirect.portal.kind for redirect in self._wanted[ip]}
        return PortalKind.CLUSTER_IP not in kinds and not is_local_address(ip)

    async def withdraw(self) -> None:
        """Sockets have stopped listening. The addresses stay: established connections are still spoken on them."""

    async def close(self) -> None:
        routes, self._routes = self._routes, {}
        problems = [problem for each in routes.values() for problem in each.serve(()).values()]
        for each in routes.values():
            each.close()
        if problems:
            raise CaptureError("; ".join(problems))


async def cleanup() -> None:
    """Remove the routes that an earlier run has left, whichever way it captured. Raises CaptureError."""
    problems = [problem for family in IPFamily for problem in await asyncio.to_thread(_remove, family)]
    if problems:
        raise CaptureError("; ".join(problems))


def _remove(family: IPFamily) -> list[str]:
    problems: list[str] = []
    for kind in (LOCAL, WAY):
        with contextlib.closing(Routes(family, kind)) as routes:
            problems += routes.serve(()).values()
    return problems


def _of(family: IPFamily, ips: Iterable[str]) -> list[str]:
    return [ip for ip in ips if family_of(ip) is family]
