"""The proxy sockets that are open, their balancers and endpoints.

Each method is one step, carried out at once and without waiting; what goes wrong is noted with the service port
that it concerns (`problems`) and stops no other. When which step is due is decided in `plan` and by `proxier`, who
also asks the capture for traffic. Node ports are held by `claims`; what a socket does with its clients is in `sockets`.
"""

from __future__ import annotations

import logging
import random
from collections import defaultdict, deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from userspace_proxy import host
from userspace_proxy.claims import Claims
from userspace_proxy.config import PortRange
from userspace_proxy.exceptions import PortError, ProtocolUnavailable
from userspace_proxy.loadbalancer import LoadBalancer
from userspace_proxy.metrics import Metrics, ServicePortMetrics
from userspace_proxy.model import (
    Address,
    Endpoint,
    IPFamily,
    Node,
    Place,
    Portal,
    PortalKind,
    Protocol,
    Redirect,
    ServicePort,
    ServicePortName,
    SocketKey,
    changed,
    inside,
    join_host_port,
)
from userspace_proxy.plan import LocalPort, OwnPlaces
from userspace_proxy.policy import NOWHERE, eligible, is_silent, sources
from userspace_proxy.ports import ANOTHER_WILL_DO, ProxyPorts, advice
from userspace_proxy.problems import Problems
from userspace_proxy.sockets.base import ProxySocket, ProxySockets

logger = logging.getLogger(__name__)

SLICE = 256
"""Service ports looked at between two turns of the data path: less than a millisecond."""

TRIES = 256
"""Proxy ports tried for one service port in one sync; with more of them taken, something else is wrong."""

_EXTERNAL = (PortalKind.EXTERNAL_IP, PortalKind.LOAD_BALANCER_IP)


@dataclass(slots=True)
class Served:
    """One open proxy socket and what goes with it."""

    service: ServicePort
    socket: ProxySocket
    balancer: LoadBalancer
    admitted: frozenset[Portal] = frozenset()
    own: tuple[Endpoint, ...] = ()
    """Endpoints left out because they are places of ours: dialled, they would dial us."""
    silent: bool = False
    """Clients hear nothing, since the endpoints that there are may not be had here."""


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
        room: Callable[[], bool] = lambda: True,
        max_ejection: float,
        clock: Callable[[], float],
        rng: random.Random,
    ) -> None:
        self.problems = Problems()
        self.served: dict[SocketKey, Served] = {}
        self.claims = Claims(nodeport_networks, self.problems, self._at)
        self._sockets = sockets
        self._metrics = metrics
        self._bind = bind
        self._strangers = strangers
        self._room = room
        self._max_ejection = max_ejection
        self._clock = clock
        self._rng = rng
        self._proxy_ports = ProxyPorts(port_range, rng)
        self._keys: defaultdict[ServicePortName, list[SocketKey]] = defaultdict(list)
        self._by_port: dict[int, SocketKey] = {}
        self._endpoints: Mapping[ServicePortName, tuple[Endpoint, ...]] = {}
        self._node = NOWHERE
        self._late: deque[ServicePortName] = deque()
        """Whose endpoints changed, and who has not been told of it yet."""
        self._own = OwnPlaces(host.is_local_address)
        self._own_changed = False
        self.failed: dict[SocketKey, str] = {}
        """Could not be made to serve or to refuse, and why; tried again at the end of a sync, and with the next one."""

    def keys(self, names: Iterable[ServicePortName]) -> Iterator[SocketKey]:
        """The open sockets of these service ports."""
        return (key for name in names for key in self._keys.get(name, ()))

    def redirect(self, portal: Portal, key: SocketKey) -> Redirect:
        """What brings the clients of a portal to the open socket `key`, and those inside to theirs."""
        port, inside_port = (self.served[each].socket.port for each in (key, inside(portal, key)))
        return Redirect(portal, port, key.name, 0 if inside_port == port else inside_port)

    def target(self, redirect: Redirect) -> SocketKey:
        """The socket that a redirect leads to."""
        return self._by_port.get(redirect.proxy_port) or SocketKey(redirect.owner, redirect.portal.family)

    # -- endpoints

    def follow(self, endpoints: Mapping[ServicePortName, tuple[Endpoint, ...]], node: Node | None = None) -> None:
        """Take over all endpoints, and which node this is. Whose changed is told by `catch_up`."""
        node = node or NOWHERE
        moved = (node.name, node.zone) != (self._node.name, self._node.zone)
        self._late.extend(self._keys if moved else changed(self._endpoints, endpoints))
        self._endpoints, self._node = endpoints, node

    def catch_up(self, most: int) -> bool:
        """Give up to so many service ports their new endpoints; say whether others are still waiting."""
        for _ in range(min(most, len(self._late))):
            for key in self._keys.get(self._late.popleft(), ()):
                self._update(key, self.served[key])
                if key in self.failed:
                    self.problems.note(key, self.failed[key])
        return bool(self._late)

    def retry(self) -> None:
        """Try again what could not be made to serve or to refuse; only what fails still is told.

        A portal on its way from one service port to another is often taken before it has been given up.
        """
        for key in list(self.failed):
            self._update(key, self.served[key])
        self.note_failed()

    def note_failed(self) -> None:
        for key, why in self.failed.items():
            self.problems.note(key, why)

    def own(self, places: Iterable[Place], *, no_more: Iterable[Place] = ()) -> None:
        """Learn which places are redirected to us."""
        before = len(self._own.places)
        self._own.places.difference_update(no_more)
        self._own_changed |= before != len(self._own.places)
        before = len(self._own.places)
        self._own.places.update(places)
        self._own_changed |= before != len(self._own.places)

    def recognise_ourselves(self, *, anew: bool = False) -> Iterator[None]:
        """Look at all endpoints again with our own places in mind, if these changed; a slice at each `next`.

        `anew`: even if they did not, as other addresses may be this host's by now.
        """
        if not self._own_changed and not anew:
            return
        self._own_changed = False
        for number, key in enumerate(list(self.served), 1):
            served = self.served.get(key)
            if served is not None and self._own_among(key, served, self._eligible(key, served)) != served.own:
                self._update(key, served)
            if number % SLICE == 0:
                yield

    def _eligible(self, key: SocketKey, served: Served) -> tuple[Endpoint, ...]:
        return eligible(self._endpoints.get(key.name, ()), key, served.service, self._node)

    def _own_among(self, key: SocketKey, served: Served, endpoints: Iterable[Endpoint]) -> tuple[Endpoint, ...]:
        return self._own.among(key, served.service.protocol, endpoints)

    def _update(self, key: SocketKey, served: Served) -> None:
        """Bring the balancer up to date, and serve, refuse or keep silent accordingly."""
        endpoints = self._eligible(key, served)
        own = self._own_among(key, served, endpoints)
        if own and own != served.own:
            logger.warning(
                "%s: endpoint %s is this proxy's own place and is not dialled, it would come back for ever; "
                "point the endpoint at the real server",
                key.name,
                ", ".join(map(str, own)),
            )
        served.own = own
        served.balancer.update([e for e in endpoints if e not in own] if own else endpoints)
        known = self._endpoints.get(key.name, ())
        served.silent = not served.balancer.endpoints and is_silent(known, key, served.service)
        try:
            served.socket.screen(() if served.silent else sources(key, served.service))
            if served.balancer.endpoints or served.silent:
                served.socket.serve()
            else:
                served.socket.refuse()
        except PortError as error:
            self._fail(key, str(error))
        else:
            self._fail(key, "")

    def _fail(self, key: SocketKey, why: str) -> None:
        """To be told when it is clear that it lasts; nothing: it has passed."""
        before = self.failed.pop(key, "")
        if before != why:
            self.problems.forget(key, before)
        if why:
            self.failed[key] = why

    # -- sockets

    def adopt(self, names: Iterable[ServicePortName], services: Mapping[ServicePortName, ServicePort]) -> None:
        """Changes of service ports that move no socket: affinity, and what is compared next time."""
        for key in self.keys(names):
            service, served = services.get(key.name), self.served[key]
            if service is None or service is served.service or service.protocol is not served.service.protocol:
                continue
            served.balancer.configure(service.affinity, service.affinity_timeout)
            served.service = service
            served.socket.speak(service.proxy_protocol)
            self._update(key, served)
            logger.info("%s: changed: %s", key.name, _portals(service, key.family))

    def open(self, key: SocketKey, service: ServicePort, avoid: Container[int]) -> bool:
        """Open a proxy socket on a port that is not to be avoided; the balancer has its endpoints before."""
        protocol = service.protocol
        metrics = self._metrics.service_port(key.base, protocol.value)
        affinity = service.affinity, service.affinity_timeout
        balancer = LoadBalancer(self._clock, self._rng, metrics, *affinity, max_ejection=self._max_ejection)
        try:
            proxy_socket = self._open_somewhere(key, protocol, avoid, balancer, metrics)
        except (PortError, ProtocolUnavailable) as error:
            if isinstance(error, ProtocolUnavailable):
                self._metrics.protocol_available.labels(protocol.value).set(0)
            self.problems.note(key, str(error))
            self._drop_metrics(key)
            return False
        self._metrics.protocol_available.labels(protocol.value).set(1)
        self._proxy_ports.take(proxy_socket.port)
        metrics.ejected = lambda: len(set[Address]().union(*(each.balancer.ejected for each in self._scopes(key))))
        served = self.served[key] = Served(service, proxy_socket, balancer)
        self._keys[key.name].append(key)
        self._by_port[proxy_socket.port] = key
        proxy_socket.admit(None if self._strangers else ())
        proxy_socket.speak(service.proxy_protocol)
        self.own([_proxy_place(key, served)])
        self._update(key, served)
        where = _portals(service, key.family)
        logger.info("%s: opened on proxy port %d/%s for %s", key.name, proxy_socket.port, protocol, where)
        return True

    def _at(self, place: LocalPort) -> SocketKey | None:
        """Whose proxy port this is."""
        key = self._by_port.get(place.port)
        if key is None or (key.family, self.served[key].service.protocol) != (place.family, place.protocol):
            return None
        return key

    def _scopes(self, key: SocketKey) -> Iterator[Served]:
        """All open sockets of a service port in a family; they count together."""
        return (self.served[each] for each in self._keys.get(key.name, ()) if each.base == key.base)

    def _drop_metrics(self, key: SocketKey) -> None:
        if not any(self._scopes(key)):
            self._metrics.drop(key.base)

    def _open_somewhere(
        self,
        key: SocketKey,
        protocol: Protocol,
        avoid: Container[int],
        balancer: LoadBalancer,
        metrics: ServicePortMetrics,
    ) -> ProxySocket:
        """Raises PortError."""
        if not self._room():
            raise PortError(
                f"no proxy port: proxy sockets and node ports hold {self.descriptors} descriptors, and the others are "
                "for connections; allow more (ulimit -n), or serve one family only (--bind-address)"
            )
        reason = ""
        for _, port in zip(range(TRIES), self._proxy_ports.candidates(avoid), strict=False):
            try:
                return self._sockets[protocol].open(key, self._bind[key.family], port, balancer, metrics)
            except (PortError, OSError) as error:
                cause = error.__cause__ or error
                code = (isinstance(cause, OSError) and cause.errno) or 0
                reason = "; ".join(filter(None, (str(error), advice(code, self._bind[key.family], key.family))))
                if code not in ANOTHER_WILL_DO:
                    break
        raise PortError(f"no proxy port: {reason or self._proxy_ports.exhausted(avoid)}")

    def admit(self, key: SocketKey, portals: frozenset[Portal]) -> None:
        """Let clients in who were sent through these portals, and nobody else."""
        if self._strangers:
            return
        try:
            self.served[key].socket.admit(portals)
        except PortError as error:
            self._fail(key, str(error))

    def close(self, key: SocketKey) -> None:
        served = self.served.pop(key)
        self._keys[key.name].remove(key)
        if not self._keys[key.name]:
            del self._keys[key.name]
        self.failed.pop(key, None)
        self._by_port.pop(served.socket.port, None)
        self.own((), no_more=[_proxy_place(key, served)])
        served.socket.close()
        self._proxy_ports.release(served.socket.port)
        self._drop_metrics(key)
        logger.info("%s: closed proxy port %d/%s", key.name, served.socket.port, served.service.protocol)

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
        self.claims.close()

    @property
    def descriptors(self) -> int:
        """Held by proxy sockets and claims."""
        return len(self.served) + self.claims.descriptors

    def report(self, services: Mapping[ServicePortName, ServicePort]) -> Iterator[dict[str, object]]:
        """Every service port and what has become of it when it is asked for: things may change between two of them."""
        for name in sorted(services):
            for family in services[name].families:
                keys = sorted(key for key in self._keys.get(name, ()) if key.family is family)
                for key in keys or [SocketKey(name, family)]:
                    yield _row(key, services[name], self.served.get(key), self.problems.of(key))


def _row(key: SocketKey, service: ServicePort, served: Served | None, problems: Sequence[str]) -> dict[str, object]:
    endpoints = served.balancer.endpoints if served else ()
    portals = [p for p in service.portals(key.family) if served is None or key in _targets(key.name, service, p)]
    return {
        "namespace": key.name.namespace,
        "name": key.name.name,
        "port": key.name.port,
        "family": key.family.value,
        "scope": key.scope,
        "protocol": service.protocol.value,
        "clusterIPs": [join_host_port(p.ip, p.port) for p in portals if p.kind is PortalKind.CLUSTER_IP],
        "externalIPs": [join_host_port(p.ip, p.port) for p in portals if p.kind in _EXTERNAL],
        "nodePort": sum(p.port for p in portals if p.kind is PortalKind.NODE_PORT),
        "proxyPort": served.socket.port if served else 0,
        "affinity": service.affinity.value,
        "endpoints": [join_host_port(*address) for address in endpoints],
        "ejected": [join_host_port(*address) for address in served.balancer.ejected] if served else [],
        "state": ("serving" if endpoints else "silent" if served.silent else "refusing") if served else "down",
        "problems": list(problems),
    }


def _targets(name: ServicePortName, service: ServicePort, portal: Portal) -> tuple[SocketKey, SocketKey]:
    """Where clients of a portal are sent to, and those inside."""
    key = service.key(name, portal)
    return key, inside(portal, key)


def _proxy_place(key: SocketKey, served: Served) -> Place:
    return key.family, served.service.protocol, "", served.socket.port


def _portals(service: ServicePort, family: IPFamily) -> str:
    return ", ".join(map(str, service.portals(family)))
