"""The control loop: the newest Snapshot, compared with what is, becomes open sockets and redirects.

Two things come in through `publish`. Endpoints act at once: they go to the load balancers, and a service
port that gained its first or lost its last one starts or stops taking clients; no rule moves. Services only
mark the state as due: one sync at a time takes the newest Snapshot, asks `plan` for the steps and carries them
out. Syncs are at least the minimum period apart, and at most the sync period, so that what others
changed in the kernel is repaired and what failed is tried again.

Nothing here ends the loop: what goes wrong with one service port is noted there, and told by `report`.
Which step comes when is decided in `plan`; what a step does to the kernel is in `sockets` and `capture`.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from userspace_proxy import host
from userspace_proxy.capture.base import Capture
from userspace_proxy.config import PortRange
from userspace_proxy.exceptions import CaptureError, PortError
from userspace_proxy.loadbalancer import LoadBalancer
from userspace_proxy.metrics import Metrics
from userspace_proxy.model import (
    Endpoint,
    IPFamily,
    Portal,
    Protocol,
    Redirect,
    ServicePort,
    ServicePortName,
    Snapshot,
    SocketKey,
    family_of,
    join_host_port,
)
from userspace_proxy.plan import (
    Claim,
    Close,
    LocalPort,
    Open,
    OwnPortals,
    Replace,
    State,
    Unclaim,
    desired,
    plan,
    without,
)
from userspace_proxy.ports import ProxyPorts
from userspace_proxy.sockets.base import ProxySocket, ProxySockets, claim

logger = logging.getLogger(__name__)

TRIES = 256
"""Proxy ports tried for one service port in one sync; with more of them taken, something else is wrong."""

_KIND = {Protocol.TCP: socket.SOCK_STREAM, Protocol.UDP: socket.SOCK_DGRAM}


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


@dataclass(slots=True)
class Progress:
    """How the control loop is doing; times are of the proxier's clock."""

    last_sync: float | None = None
    waiting_since: float | None = None
    capture_error: str = ""
    first_sync: asyncio.Event = field(default_factory=asyncio.Event)


class Proxier:
    def __init__(
        self,
        capture: Capture,
        sockets: Mapping[Protocol, ProxySockets],
        metrics: Metrics,
        *,
        bind_address: str,
        port_range: PortRange,
        nodeport_networks: Sequence[str] = (),
        sync_period: float = 30.0,
        min_sync_period: float = 1.0,
        after_sync: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self.progress = Progress()
        self._capture = capture
        self._sockets = sockets
        self._metrics = metrics
        self._nodeport_networks = nodeport_networks
        self._sync_period = sync_period
        self._min_sync_period = min_sync_period
        self._after_sync = after_sync
        self._clock = clock
        self._rng = rng or random.Random()
        wildcard = bind_address in {family.wildcard for family in IPFamily}
        self._bind = (
            {family: family.wildcard for family in IPFamily} if wildcard else {family_of(bind_address): bind_address}
        )
        self._proxy_ports = ProxyPorts(port_range, self._rng)
        self._snapshot: Snapshot | None = None
        self._due = asyncio.Event()
        self._served: dict[SocketKey, Served] = {}
        self._keys: defaultdict[ServicePortName, list[SocketKey]] = defaultdict(list)
        self._claims: dict[LocalPort, list[socket.socket]] = {}
        self._redirects: Mapping[Portal, SocketKey] = {}
        self._own = OwnPortals((), (), host.is_local_address)
        self._problems: dict[SocketKey, list[str]] = {}
        self._refused: tuple[str, ...] = ()
        self._settled: Mapping[ServicePortName, ServicePort] | None = None
        """Services for which there was nothing left to do."""

    # -- what comes in

    def publish(self, snapshot: Snapshot) -> None:
        """Take the newest state: its endpoints now, its services with the next sync."""
        before, self._snapshot = self._snapshot, snapshot
        if before is None or before.services != snapshot.services:
            self._mark_due()
        old = before.endpoints if before is not None else {}
        if old is snapshot.endpoints:
            return
        changed = {name for name, endpoints in snapshot.endpoints.items() if old.get(name) is not endpoints}
        changed.update(name for name in old if name not in snapshot.endpoints)
        for name in changed:
            for key in self._keys.get(name, ()):
                self._update_endpoints(key, self._served[key])

    def _mark_due(self) -> None:
        if self.progress.waiting_since is None:
            self.progress.waiting_since = self._clock()
        self._metrics.last_queued.set_to_current_time()
        self._due.set()

    def _update_endpoints(
        self, key: SocketKey, served: Served, noted: Mapping[SocketKey, list[str]] | None = None
    ) -> None:
        """Bring the balancer up to date, and serve or refuse accordingly."""
        assert self._snapshot is not None
        endpoints = tuple(e for e in self._snapshot.endpoints.get(key.name, ()) if family_of(e.ip) is key.family)
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
            self._note(key, str(error), noted)
            served.failed = True

    # -- the loop

    async def run(self) -> None:
        """Sync until cancelled; the first time as soon as there is a Snapshot."""
        await self._due.wait()
        while True:
            started = self._clock()
            await self._sync_and_measure()
            await self._wait(self._min_sync_period - (self._clock() - started))
            try:
                async with asyncio.timeout(max(0.0, self._sync_period - (self._clock() - started))):
                    await self._due.wait()
            except TimeoutError:
                if self.progress.waiting_since is None:
                    self.progress.waiting_since = self._clock()

    @staticmethod
    async def _wait(seconds: float) -> None:
        if seconds > 0:
            await asyncio.sleep(seconds)

    async def _sync_and_measure(self) -> None:
        self._due.clear()
        started = self._clock()
        try:
            with self._metrics.sync_duration.time():
                await self._sync()
        except Exception:
            logger.exception("a sync failed; it is tried again within %g s", self._sync_period)
            self._metrics.sync_failures.inc()
            return
        # What came meanwhile waits for the next sync.
        self.progress.waiting_since = started if self._due.is_set() else None
        self.progress.last_sync = self._clock()
        self._metrics.last_sync.set_to_current_time()
        self._metrics.service_port_errors.set(len(self._problems))
        if self._problems or self.progress.capture_error:
            self._metrics.sync_failures.inc()
        self._after_sync()
        logger.debug("synced %d proxy sockets in %.3f s", len(self._served), self._clock() - started)
        self.progress.first_sync.set()

    async def _sync(self) -> None:
        snapshot = self._snapshot
        assert snapshot is not None
        if self._settled is snapshot.services and not self._problems:
            # Nothing to decide: tens of milliseconds at thousands of services, and the data path waits for them.
            await self._replace(self._redirects)
            self._purge()
            return
        noted, self._problems = self._problems, {}
        have = State(
            {key: served.service.protocol for key, served in self._served.items()},
            self._claims.keys(),
            self._redirects,
        )
        want, problems = desired(snapshot.services, self._bind, self._sockets, have)
        if not self._capture.rewrites_destination:
            want = State(want.sockets)
        for problem in problems:
            self._note(problem.key, problem.message, noted)
        self._adopt(snapshot.services)
        self._recognise_ourselves(want)
        if await self._carry_out(plan(have, want), want, noted):
            self._settled = snapshot.services
        for key, served in self._served.items():
            if served.failed:
                self._update_endpoints(key, served, noted)
        self._purge()

    def _purge(self) -> None:
        for served in self._served.values():
            served.balancer.purge()

    def _adopt(self, services: Mapping[ServicePortName, ServicePort]) -> None:
        """Changes of a service port that move no socket: affinity, and what is compared next time."""
        for key, served in self._served.items():
            service = services.get(key.name)
            if service is None or service is served.service or service.protocol is not served.service.protocol:
                continue
            served.balancer.configure(service.affinity, service.affinity_timeout)
            served.service = service
            logger.info("%s: changed: %s", key.name, _portals(service, key.family))

    def _recognise_ourselves(self, want: State) -> None:
        """Learn which places are ours from now on, and look at all endpoints again if that changed."""
        if want.redirects == self._redirects and want.sockets.keys() == self._served.keys():
            return
        self._own = self._own_portals(want.redirects)
        for key, served in self._served.items():
            self._update_endpoints(key, served)

    def _own_portals(self, redirects: Iterable[Portal]) -> OwnPortals:
        proxy_ports = [
            LocalPort(key.family, served.service.protocol, served.socket.port) for key, served in self._served.items()
        ]
        return OwnPortals(redirects, proxy_ports, host.is_local_address)

    async def _carry_out(
        self,
        steps: Sequence[Open | Claim | Replace | Unclaim | Close],
        want: State,
        noted: Mapping[SocketKey, list[str]],
    ) -> bool:
        """Whether every step was gone through; what depends on one that failed is left out, and noted."""
        node_ports = {place.port for place in want.claims}
        unopened: set[SocketKey] = set()
        unclaimed: set[LocalPort] = set()
        addresses = await self._nodeport_addresses(steps)
        replaced = False
        for step in steps:
            match step:
                case Open(key, protocol):
                    if not self._open(key, protocol, node_ports, noted):
                        unopened.add(key)
                case Claim(place):
                    if not self._claim(place, addresses, want, noted):
                        unclaimed.add(place)
                case Replace():
                    replaced = True
                    if not await self._replace(without(step, unopened, unclaimed).redirects):
                        return False
                case Unclaim(place):
                    for sock in self._claims.pop(place):
                        sock.close()
                case Close(key):
                    self._close(key)
        return replaced or await self._replace(self._redirects)

    # -- steps

    def _open(
        self, key: SocketKey, protocol: Protocol, avoid: Collection[int], noted: Mapping[SocketKey, list[str]]
    ) -> bool:
        assert self._snapshot is not None
        service = self._snapshot.services.get(key.name)
        if service is None:
            return False  # gone since this sync began; the next one knows
        balancer = LoadBalancer(self._clock, self._rng, service.affinity, service.affinity_timeout)
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
            self._note(key, f"no proxy port: {reason}; see --proxy-port-range", noted)
            self._metrics.drop(key)
            return False
        self._proxy_ports.take(proxy_socket.port)
        metrics.affinity_hits = lambda: balancer.affinity_hits
        served = self._served[key] = Served(service, proxy_socket, balancer)
        self._keys[key.name].append(key)
        if self._capture.rewrites_destination:
            proxy_socket.admit(())
        self._update_endpoints(key, served)
        logger.info(
            "%s: opened on proxy port %d/%s for %s",
            key.name,
            proxy_socket.port,
            protocol,
            _portals(service, key.family),
        )
        return True

    def _close(self, key: SocketKey) -> None:
        served = self._served.pop(key)
        self._keys[key.name].remove(key)
        if not self._keys[key.name]:
            del self._keys[key.name]
        served.socket.close()
        self._proxy_ports.release(served.socket.port)
        self._metrics.drop(key)
        logger.info("%s: closed proxy port %d/%s", key.name, served.socket.port, served.service.protocol)

    async def _nodeport_addresses(self, steps: Iterable[object]) -> tuple[str, ...]:
        """The addresses node ports are claimed on where --nodeport-addresses says so; else none, for all."""
        if not self._nodeport_networks or not any(isinstance(step, Claim) for step in steps):
            return ()
        return await asyncio.to_thread(host.local_addresses, self._nodeport_networks)

    def _claim(
        self, place: LocalPort, addresses: Sequence[str], want: State, noted: Mapping[SocketKey, list[str]]
    ) -> bool:
        held: list[socket.socket] = []
        ips = [ip for ip in addresses if family_of(ip) is place.family]
        try:
            for ip in ips if self._nodeport_networks else [place.family.wildcard]:
                held.append(claim(place.family, _KIND[place.protocol], ip, place.port))  # noqa: PERF401 - kept if one fails
        except (PortError, OSError) as error:
            for sock in held:
                sock.close()
            for portal, key in want.redirects.items():
                if not portal.ip and LocalPort(portal.family, portal.protocol, portal.port) == place:
                    self._note(key, f"node port {place} is in use on this host: {error}; end what uses it", noted)
            return False
        self._claims[place] = held
        return True

    async def _replace(self, redirects: Mapping[Portal, SocketKey]) -> bool:
        """Make the capture's redirects these. Sockets admit what is new before, and what is gone until after."""
        wanted: defaultdict[SocketKey, set[Portal]] = defaultdict(set)
        for portal, key in redirects.items():
            wanted[key].add(portal)
        changing = {key: s for key, s in self._served.items() if s.admitted != wanted.get(key, frozenset())}
        for key, served in changing.items():
            served.socket.admit(
                served.admitted | wanted.get(key, set()) if self._capture.rewrites_destination else None
            )
        try:
            changes = await self._capture.replace(
                [Redirect(portal, self._served[key].socket.port, key.name) for portal, key in redirects.items()]
            )
        except CaptureError as error:
            self._metrics.capture_failures.inc()
            if str(error) != self.progress.capture_error:
                logger.error("capture %s: %s; tried again at every sync", self._capture.name, error)
            self.progress.capture_error = str(error)
            return False
        self.progress.capture_error = ""
        self._redirects = redirects
        for key, served in changing.items():
            served.admitted = frozenset(wanted.get(key, ()))
            served.socket.admit(served.admitted if self._capture.rewrites_destination else None)
        for change, count in (("added", changes.added), ("removed", changes.removed), ("repaired", changes.repaired)):
            self._metrics.capture_changes.labels(change).inc(count)
        for problem in changes.refused:
            if problem not in self._refused:
                logger.warning("capture %s: refused: %s; the other redirects are in force", self._capture.name, problem)
        self._metrics.capture_failures.inc(len(changes.refused))
        self._refused = changes.refused
        if changes.repaired:
            logger.warning(
                "capture %s: %d rules had been changed by others and are repaired", self._capture.name, changes.repaired
            )
        elif changes.added or changes.removed:
            logger.info("capture %s: %d rules added, %d removed", self._capture.name, changes.added, changes.removed)
        return True

    def _note(self, key: SocketKey, message: str, noted: Mapping[SocketKey, list[str]] | None = None) -> None:
        """Keep a service port's trouble for /services; log it unless the last sync met the same."""
        self._problems.setdefault(key, []).append(message)
        if noted is None or message not in noted.get(key, ()):
            logger.warning("%s: %s", key.name, message)

    # -- the end

    async def withdraw(self) -> None:
        """Take in nothing new: no redirects, no listening; what is established goes on."""
        try:
            await self._capture.withdraw()
        except CaptureError as error:
            logger.error("capture %s: cannot be withdrawn: %s", self._capture.name, error)
        for key, served in self._served.items():
            if served.service.protocol is not Protocol.UDP:  # its flows need their socket to the end
                try:
                    served.socket.refuse()
                except PortError as error:
                    logger.debug("%s: %s", key.name, error)

    def close(self) -> None:
        """Close every socket and release every port. Sessions are their `ProxySockets`' to end, before."""
        for key in list(self._served):
            self._close(key)
        for held in self._claims.values():
            for sock in held:
                sock.close()
        self._claims.clear()

    # -- what is told

    @property
    def proxy_descriptors(self) -> int:
        """Descriptors held by proxy sockets and claims."""
        return len(self._served) + sum(map(len, self._claims.values()))

    def report(self) -> list[dict[str, object]]:
        """Every service port of the Snapshot and what became of it; for /services and the table at the start."""
        snapshot = self._snapshot or Snapshot()
        rows: list[dict[str, object]] = []
        for name, service in sorted(snapshot.services.items()):
            for family in service.families:
                key = SocketKey(name, family)
                rows.append(_row(key, service, self._served.get(key), self._problems.get(key, [])))
        return rows


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
        "state": ("serving" if endpoints else "refusing") if served else "down",
        "problems": list(problems),
    }


def _portals(service: ServicePort, family: IPFamily) -> str:
    return ", ".join(map(str, service.portals(family)))
