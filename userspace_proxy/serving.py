"""The proxy sockets that are open, their balancers and endpoints, and the node ports that are held.

Each method is one step, carried out at once and without waiting; what goes wrong is noted with the service port
that it concerns and stops no other. When which step is due is decided in `plan` and by `proxier`, who also asks
the capture for traffic. What a socket does with its clients is in `sockets`.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from userspace_proxy import host
from userspace_proxy.config import PortRange
from userspace_proxy.exceptions import PortError
from userspace_proxy.loadbalancer import LoadBalancer
from userspace_proxy.metrics import Metrics
from userspace_proxy.model import (
    Endpoint,
    IPFamily,
    Portal,
    Protocol,
    ServicePort,
    ServicePortName,
    Snapshot,
    SocketKey,
    family_of,
    join_host_port,
)
from userspace_proxy.plan import LocalPort, OwnPortals
from userspace_proxy.ports import ProxyPorts
from userspace_proxy.sockets.base import ProxySocket, ProxySockets, claim

logger = logging.getLogger(__name__)

TRIES = 256
"""Proxy ports tried for one service port in one sync; with more of them taken, something else is wrong."""

AT_ONCE = 200
"""Service ports looked at before connections get their turn."""

_KIND = {Protocol.TCP: socket.SOCK_STREAM, Protocol.UDP: socket.SOCK_DGRAM}


class Problems:
    """What is wrong with which service port; logged when it is new, kept for /services while it lasts."""

    def __init__(self) -> None:
        self._now: dict[SocketKey, list[str]] = {}
        self._before: dict[SocketKey, list[str]] = {}

    def __len__(self) -> int:
        return len(self._now)

    def begin(self) -> None:
        """A new round: what is not noted again has passed."""
        self._before, self._now = self._now, {}

    def note(self, key: SocketKey, message: str) -> None:
        found = self._now.setdefault(key, [])
        if message in found:
            return
        found.append(message)
        if message not in self._before.get(key, ()):
            logger.warning("%s: %s", key.name, message)

    def of(self, key: SocketKey) -> list[str]:
        return list(self._now.get(key, ()))


@dataclass(slots=True)
class Served:
    """One open proxy socket and what goes with it."""

    service: ServicePort
    socket: ProxySocket
    balancer: LoadBalancer
    admitted: frozenset[Portal] = frozenset()
    own: tuple[Endpoint, ...] = ()
    """Endpoints left out because they are places of ours: dialled, they would dial us."""
    failed: bool = False
    """It could not be made to serve or to refuse; tried again at the next sync."""


class Serving:
    """`strangers`: whether clients may come to proxy ports without going through a portal."""

    def __init__(
        self,
        sockets: Mapping[Protocol, ProxySockets],
        metrics: Metrics,
        *,
        bind: Mapping[IPFamily, str],
        port_range: PortRange,
        nodeport_networks: Sequence[str],
        strangers: bool,
        max_ejection: float,
        clock: Callable[[], float],
        rng: random.Random,
    ) -> None:
        self.problems = Problems()
        self.served: dict[SocketKey, Served] = {}
        self.claims: dict[LocalPort, list[socket.socket]] = {}
        self._sockets = sockets
        self._metrics = metrics
        self._bind = bind
        self._nodeport_networks = nodeport_networks
        self._strangers = strangers
        self._max_ejection = max_ejection
        self._clock = clock
        self._rng = rng
        self._proxy_ports = ProxyPorts(port_range, rng)
        self._keys: defaultdict[ServicePortName, list[SocketKey]] = defaultdict(list)
        self._own = OwnPortals((), (), host.is_local_address)

    # -- endpoints

    def follow(self, before: Snapshot, now: Snapshot) -> None:
        """Give every socket whose endpoints changed its new ones, at once."""
        if before.endpoints is now.endpoints:
            return
        changed = {name for name, found in now.endpoints.items() if before.endpoints.get(name) is not found}
        changed.update(name for name in before.endpoints if name not in now.endpoints)
        for name in changed:
            for key in self._keys.get(name, ()):
                self._update(key, self.served[key], now)

    def retry(self, snapshot: Snapshot) -> None:
        """Try again what could not be made to serve or to refuse."""
        for key, served in self.served.items():
            if served.failed:
                self._update(key, served, snapshot)

    async def recognise_ourselves(self, redirects: Iterable[Portal], newest: Callable[[], Snapshot]) -> None:
        """Learn which places are ours, and look at all endpoints again with that in mind, a few at a time."""
        proxy_ports = [LocalPort(key.family, s.service.protocol, s.socket.port) for key, s in self.served.items()]
        self._own = OwnPortals(redirects, proxy_ports, host.is_local_address)
        for number, (key, served) in enumerate(list(self.served.items()), 1):
            if number % AT_ONCE == 0:
                await asyncio.sleep(0)
            if self._own.among(served.service.protocol, _endpoints(key, newest())) != served.own:
                self._update(key, served, newest())

    def _update(self, key: SocketKey, served: Served, snapshot: Snapshot) -> None:
        """Bring the balancer up to date, and serve or refuse accordingly."""
        endpoints = _endpoints(key, snapshot)
        own = self._own.among(served.service.protocol, endpoints)
        if own and own != served.own:
            logger.warning(
                "%s: endpoint %s is this proxy's own place and is not dialled, it would come back for ever; "
                "point the endpoint at the real server",
                key.name,
                ", ".join(map(str, own)),
            )
        served.own = own
        served.balancer.update([e for e in endpoints if e not in own] if own else endpoints)
        try:
            if served.balancer.endpoints:
                served.socket.serve()
            else:
                served.socket.refuse()
            served.failed = False
        except PortError as error:
            self.problems.note(key, str(error))
            served.failed = True

    # -- sockets

    def adopt(self, services: Mapping[ServicePortName, ServicePort]) -> None:
        """Changes of a service port that move no socket: affinity, and what is compared next time."""
        for key, served in self.served.items():
            service = services.get(key.name)
            if service is None or service is served.service or service.protocol is not served.service.protocol:
                continue
            served.balancer.configure(service.affinity, service.affinity_timeout)
            served.service = service
            logger.info("%s: changed: %s", key.name, _portals(service, key.family))

    def open(self, key: SocketKey, service: ServicePort, snapshot: Snapshot, avoid: Collection[int]) -> bool:
        """Open a proxy socket on a port that is not to be avoided; the balancer has its endpoints before."""
        protocol = service.protocol
        balancer = LoadBalancer(
            self._clock, self._rng, service.affinity, service.affinity_timeout, max_ejection=self._max_ejection
        )
        metrics = self._metrics.service_port(key, protocol.value)
        reason = "every port of the range is taken by a service port"
        for _, port in zip(range(TRIES), self._proxy_ports.candidates(avoid), strict=False):
            try:
                proxy_socket = self._sockets[protocol].open(key, self._bind[key.family], port, balancer, metrics)
            except (PortError, OSError) as error:
                reason = str(error)
                continue
            break
        else:
            self.problems.note(key, f"no proxy port: {reason}; see --proxy-port-range")
            self._metrics.drop(key)
            return False
        self._proxy_ports.take(proxy_socket.port)
        metrics.affinity_hits = lambda: balancer.affinity_hits
        metrics.ejected = lambda: len(balancer.ejected)
        metrics.ejections = lambda: balancer.ejections
        served = self.served[key] = Served(service, proxy_socket, balancer)
        self._keys[key.name].append(key)
        proxy_socket.admit(None if self._strangers else ())
        self._update(key, served, snapshot)
        where = _portals(service, key.family)
        logger.info("%s: opened on proxy port %d/%s for %s", key.name, proxy_socket.port, protocol, where)
        return True

    def admit(self, key: SocketKey, portals: frozenset[Portal]) -> None:
        """Let clients in who were sent through these portals, and nobody else."""
        if not self._strangers:
            self.served[key].socket.admit(portals)

    def close(self, key: SocketKey) -> None:
        served = self.served.pop(key)
        self._keys[key.name].remove(key)
        if not self._keys[key.name]:
            del self._keys[key.name]
        served.socket.close()
        self._proxy_ports.release(served.socket.port)
        self._metrics.drop(key)
        logger.info("%s: closed proxy port %d/%s", key.name, served.socket.port, served.service.protocol)

    # -- node ports

    def claim(self, place: LocalPort, addresses: Sequence[str], owners: Collection[SocketKey]) -> bool:
        """Hold a node port, on `addresses` where only some networks serve node ports; what fails is told the owners."""
        held: list[socket.socket] = []
        ips = [ip for ip in addresses if family_of(ip) is place.family]
        try:
            for ip in ips if self._nodeport_networks else [place.family.wildcard]:
                held += [claim(place.family, _KIND[place.protocol], ip, place.port)]
        except (PortError, OSError) as error:
            for sock in held:
                sock.close()
            for key in owners:
                self.problems.note(key, f"node port {place} is in use on this host: {error}; end what uses it")
            return False
        self.claims[place] = held
        return True

    def unclaim(self, place: LocalPort) -> None:
        for sock in self.claims.pop(place):
            sock.close()

    # -- all of them

    def purge(self) -> None:
        for served in self.served.values():
            served.balancer.purge()

    def stop_taking_clients(self) -> None:
        """No new connections; what is established goes on. UDP flows need their socket to the end."""
        for key, served in self.served.items():
            if served.service.protocol is not Protocol.UDP:
                try:
                    served.socket.refuse()
                except PortError as error:
                    logger.debug("%s: %s", key.name, error)

    def close_all(self) -> None:
        for key in list(self.served):
            self.close(key)
        for place in list(self.claims):
            self.unclaim(place)

    @property
    def descriptors(self) -> int:
        """Held by proxy sockets and claims."""
        return len(self.served) + sum(map(len, self.claims.values()))

    def report(self, snapshot: Snapshot) -> list[dict[str, object]]:
        """Every service port of the Snapshot and what became of it."""
        return [
            _row(key, service, self.served.get(key), self.problems.of(key))
            for name, service in sorted(snapshot.services.items())
            for key in (SocketKey(name, family) for family in service.families)
        ]


def _endpoints(key: SocketKey, snapshot: Snapshot) -> tuple[Endpoint, ...]:
    return tuple(e for e in snapshot.endpoints.get(key.name, ()) if family_of(e.ip) is key.family)


def _row(key: SocketKey, service: ServicePort, served: Served | None, problems: Sequence[str]) -> dict[str, object]:
    endpoints = served.balancer.endpoints if served else ()
    return {
        "namespace": key.name.namespace,
        "name": key.name.name,
        "port": key.name.port,
        "family": key.family.value,
        "protocol": service.protocol.value,
        "clusterIPs": [join_host_port(ip, service.port) for ip in service.cluster_ips if family_of(ip) is key.family],
        "externalIPs": [
            join_host_port(ip, service.port)
            for ip in (*service.external_ips, *service.load_balancer_ips)
            if family_of(ip) is key.family
        ],
        "nodePort": service.node_port,
        "proxyPort": served.socket.port if served else 0,
        "affinity": service.affinity.value,
        "endpoints": [join_host_port(*address) for address in endpoints],
        "ejected": [join_host_port(*address) for address in served.balancer.ejected] if served else [],
        "state": ("serving" if endpoints else "refusing") if served else "down",
        "problems": list(problems),
    }


def _portals(service: ServicePort, family: IPFamily) -> str:
    return ", ".join(map(str, service.portals(family)))
