"""What a netfilter capture sees to beside its rules: that portals are routed, and that no UDP flow goes astray.

It follows the redirects that are in force, told as differences, so that a change costs what changed. An address that
no portal has any more keeps its way until the last connection of the node to it has ended: without, packets of the
node's own clients would go nowhere, and nobody would reset them. How rules get into the kernel, and that they are there
before this is told of them, is each capture's own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from userspace_proxy.capture import conntrack
from userspace_proxy.capture.conntrack import Place
from userspace_proxy.capture.routes import Routes
from userspace_proxy.host import spoken_on
from userspace_proxy.model import IPFamily, Protocol, Redirect


class Upkeep:
    """Of one family. Every method says what a human should know, one line each."""

    def __init__(self, family: IPFamily) -> None:
        self._family = family
        self._routes = Routes(family)
        self._ips: Counter[str] = Counter()
        """How many portals each address has."""
        self._ports: dict[Place, int] = {}
        """Where redirects take hold, and the proxy port they lead to."""
        self._stale: set[Place] = set()
        """Where conntrack may still send UDP flows to a wrong place."""
        self._spoken_on: set[str] = set()
        """Addresses that no portal has any more, while connections do. Looked at again with every change."""
        self._begun = False
        """Whether there are no routes but for what has been followed."""

    def doubt(self, places: Iterable[Place]) -> None:
        """Flows of these, which an earlier run or a predecessor in this one has left, may go anywhere."""
        self._stale.update(place for place in places if place.protocol is Protocol.UDP)

    def take_over(self) -> list[str]:
        """Nothing is redirected yet, and nothing of an earlier run is to be left."""
        self._begun = True
        return [*self._routes.serve(()).values(), *self._flush_stale()]

    def follow(self, gone: Iterable[Redirect], new: Iterable[Redirect], *, thoroughly: bool) -> list[str]:
        """These redirects are in force no more, and these are. `thoroughly`: look at every address again."""
        gone_ips: set[str] = set()
        new_ips: set[str] = set()
        for redirect in gone:
            place = place_of(redirect)
            self._ports.pop(place, None)
            self.doubt([place])
            self._ips[place.ip] -= 1
            gone_ips.add(place.ip)
        for redirect in new:
            place = place_of(redirect)
            self._ports[place] = redirect.proxy_port
            self.doubt([place])
            self._ips[place.ip] += 1
            new_ips.add(place.ip)
        for ip in gone_ips:
            if not self._ips[ip]:
                del self._ips[ip]
        thoroughly = thoroughly or not self._begun
        left = {ip for ip in (self._routes if thoroughly else gone_ips | self._spoken_on) if ip not in self._ips}
        self._spoken_on = spoken_on({ip for ip in left if ip in self._routes})
        if thoroughly:
            self._begun = True
            self._routes.reread()
            problems = self._routes.serve([*(ip for ip in self._ips if ip), *self._spoken_on])
        else:
            problems = self._routes.change(left - self._spoken_on, new_ips - {""})
        return [*problems.values(), *self._flush_stale()]

    def end(self) -> tuple[list[str], list[str]]:
        """Leave nothing behind: what could not be removed, and what else there is to say."""
        problems = list(self._routes.serve(()).values())
        self._routes.close()
        return problems, flush(self._family, dict.fromkeys(self._stale | self._ports.keys(), 0))

    def _flush_stale(self) -> list[str]:
        notes = flush(self._family, {place: self._ports.get(place, 0) for place in self._stale})
        if not notes:
            self._stale.clear()
        return notes


def place_of(redirect: Redirect) -> Place:
    portal = redirect.portal
    return Place(portal.protocol, portal.ip, portal.port)


def flush(family: IPFamily, places: Mapping[Place, int]) -> list[str]:
    """Have the flows of these places decided anew, but for those that go to the proxy port given."""
    try:
        conntrack.flush(family, places)
    except OSError as error:
        return [f"{error}: UDP clients may be sent to a former place until they pause: modprobe nf_conntrack_netlink"]
    return []
