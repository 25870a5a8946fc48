"""The control loop: the newest Snapshot, compared with what is, becomes open sockets and redirects.

Two things come in through `publish`. Endpoints act at once: they go to the load balancers, and a service
port that gained its first or lost its last one starts or stops taking clients; no rule moves. Services only
mark the state as due: one sync at a time takes the newest Snapshot, asks `plan` for the steps and carries them
out. Syncs are at least the minimum period apart, and at most the sync period, so that what others
changed in the kernel is repaired and what failed is tried again.

Nothing here ends the loop: what goes wrong with one service port is noted there, and told by `report`.
Which step comes when is decided in `plan`; what a step does is in `serving` and `capture`.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from userspace_proxy import host
from userspace_proxy.capture.base import Capture, Changes
from userspace_proxy.config import PortRange
from userspace_proxy.exceptions import CaptureError
from userspace_proxy.metrics import Metrics
from userspace_proxy.model import (
    IPFamily,
    Portal,
    Protocol,
    Redirect,
    ServicePort,
    ServicePortName,
    Snapshot,
    SocketKey,
    family_of,
)
from userspace_proxy.plan import (
    Claim,
    Close,
    LocalPort,
    Open,
    Problem,
    Replace,
    State,
    Step,
    Unclaim,
    desired,
    plan,
    without,
)
from userspace_proxy.serving import Serving
from userspace_proxy.sockets.base import ProxySockets

logger = logging.getLogger(__name__)

STEPS = 100
"""Steps of a plan that are carried out before connections get their turn."""


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
        max_ejection: float = 0.0,
        after_sync: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self.progress = Progress()
        self._capture = capture
        self._protocols = tuple(sockets)
        self._metrics = metrics
        self._nodeport_networks = nodeport_networks
        self._sync_period = sync_period
        self._min_sync_period = min_sync_period
        self._after_sync = after_sync
        self._clock = clock
        wildcard = bind_address in {family.wildcard for family in IPFamily}
        self._bind = (
            {family: family.wildcard for family in IPFamily} if wildcard else {family_of(bind_address): bind_address}
        )
        self._serving = Serving(
            sockets,
            metrics,
            bind=self._bind,
            port_range=port_range,
            nodeport_networks=nodeport_networks,
            strangers=not capture.rewrites_destination,
            max_ejection=max_ejection,
            clock=clock,
            rng=rng or random.Random(),
        )
        self._snapshot: Snapshot | None = None
        self._due = asyncio.Event()
        self._turn = asyncio.Lock()
        self._stopped = False
        self._redirects: Mapping[Portal, SocketKey] = {}
        self._refused: tuple[str, ...] = ()
        self._settled: Mapping[ServicePortName, ServicePort] | None = None
        """Services for which there was nothing left to do."""

    # -- what comes in

    def publish(self, snapshot: Snapshot) -> None:
        """Take the newest state: its endpoints now, its services with the next sync."""
        if self._stopped:
            return  # an endpoint more or less must not make a socket listen again
        before, self._snapshot = self._snapshot, snapshot
        if before is None or before.services != snapshot.services:
            self._mark_due()
        self._serving.follow(before or Snapshot(), snapshot)

    def _mark_due(self) -> None:
        if self.progress.waiting_since is None:
            self.progress.waiting_since = self._clock()
        self._metrics.last_queued.set_to_current_time()
        self._due.set()

    # -- the loop

    async def run(self) -> None:
        """Sync until cancelled; the first time as soon as there is a Snapshot."""
        await self._due.wait()
        while True:
            started = self._clock()
            async with self._turn:
                if self._stopped:
                    return
                await self._sync_and_measure()
            await asyncio.sleep(max(0.0, self._min_sync_period - (self._clock() - started)))
            try:
                async with asyncio.timeout(max(0.0, self._sync_period - (self._clock() - started))):
                    await self._due.wait()
            except TimeoutError:
                if self.progress.waiting_since is None:
                    self.progress.waiting_since = self._clock()

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
        self._metrics.service_port_errors.set(len(self._serving.problems))
        if self._serving.problems or self.progress.capture_error:
            self._metrics.sync_failures.inc()
        self._after_sync()
        logger.debug("synced %d proxy sockets in %.3f s", len(self._serving.served), self._clock() - started)
        self.progress.first_sync.set()

    async def _sync(self) -> None:
        snapshot = self._snapshot
        assert snapshot is not None
        if self._settled is snapshot.services and not self._serving.problems:
            # Nothing to decide: tens of milliseconds at thousands of services, and the data path waits for them.
            await self._replace(self._redirects)
        else:
            await self._decide_and_act(snapshot)
        self._serving.purge()

    async def _decide_and_act(self, snapshot: Snapshot) -> None:
        serving = self._serving
        serving.problems.begin()
        have = State(
            {key: served.service.protocol for key, served in serving.served.items()},
            frozenset(serving.claims),
            self._redirects,
        )
        # In a thread: at thousands of services this takes tens of milliseconds, which no connection should wait.
        want, problems, steps = await asyncio.to_thread(self._decide, snapshot.services, have)
        for problem in problems:
            serving.problems.note(problem.key, problem.message)
        serving.adopt(snapshot.services)
        if steps:  # portals are known before they open, proxy ports once they have
            await serving.recognise_ourselves(want.redirects, self._newest)
        if await self._carry_out(steps, want, snapshot):
            self._settled = snapshot.services
        if any(isinstance(step, Open) for step in steps):
            await serving.recognise_ourselves(want.redirects, self._newest)
        serving.retry(self._newest())

    def _newest(self) -> Snapshot:
        assert self._snapshot is not None
        return self._snapshot

    def _decide(
        self, services: Mapping[ServicePortName, ServicePort], have: State
    ) -> tuple[State, list[Problem], tuple[Step, ...]]:
        """What should be, why not all of it can be, and how to get there."""
        want, problems = desired(services, self._bind, self._protocols, have)
        if not self._capture.rewrites_destination:
            want = State(want.sockets)
        return want, problems, plan(have, want)

    async def _carry_out(self, steps: Sequence[Step], want: State, snapshot: Snapshot) -> bool:
        """Whether every step was gone through; what depends on one that failed is left out, and noted."""
        serving = self._serving
        node_ports = {place.port for place in want.claims}
        unopened: set[SocketKey] = set()
        unclaimed: set[LocalPort] = set()
        addresses = await self._nodeport_addresses(steps)
        replaced = False
        for number, step in enumerate(steps, 1):
            if number % STEPS == 0:
                await asyncio.sleep(0)
            match step:
                case Open(key, _):
                    if not serving.open(key, snapshot.services[key.name], self._newest(), node_ports):
                        unopened.add(key)
                case Claim(place):
                    if not serving.claim(place, addresses, _owners(place, want)):
                        unclaimed.add(place)
                case Replace():
                    replaced = True
                    if not await self._replace(without(step, unopened, unclaimed).redirects):
                        return False
                case Unclaim(place):
                    serving.unclaim(place)
                case Close(key):
                    serving.close(key)
        return replaced or await self._replace(self._redirects)

    async def _nodeport_addresses(self, steps: Iterable[Step]) -> tuple[str, ...]:
        """The addresses node ports are claimed on where --nodeport-addresses says so; else none, for all."""
        if not self._nodeport_networks or not any(isinstance(step, Claim) for step in steps):
            return ()
        return await asyncio.to_thread(host.local_addresses, self._nodeport_networks)

    async def _replace(self, redirects: Mapping[Portal, SocketKey]) -> bool:
        """Make the capture's redirects these. Sockets admit what is new before, and what is gone until after."""
        served = self._serving.served
        changing = self._changing(redirects)
        for key, wanted in changing.items():
            self._serving.admit(key, served[key].admitted | wanted)
        try:
            changes = await self._capture.replace(
                [Redirect(portal, served[key].socket.port, key.name) for portal, key in redirects.items()]
            )
        except CaptureError as error:
            self._metrics.capture_failures.inc()
            if str(error) != self.progress.capture_error:
                logger.error("capture %s: %s; tried again at every sync", self._capture.name, error)
            self.progress.capture_error = str(error)
            return False
        self.progress.capture_error = ""
        self._redirects = redirects
        for key, wanted in changing.items():
            served[key].admitted = wanted
            self._serving.admit(key, wanted)
        self._tell(changes)
        return True

    def _changing(self, redirects: Mapping[Portal, SocketKey]) -> dict[SocketKey, frozenset[Portal]]:
        """The open sockets that these redirects give other portals than they admit now, and which."""
        if redirects is self._redirects:
            return {}
        wanted: defaultdict[SocketKey, set[Portal]] = defaultdict(set)
        for portal, key in redirects.items():
            wanted[key].add(portal)
        nothing: set[Portal] = set()
        return {
            key: frozenset(wanted.get(key, nothing))
            for key, served in self._serving.served.items()
            if served.admitted != wanted.get(key, nothing)
        }

    def _tell(self, changes: Changes) -> None:
        name = self._capture.name
        for change, count in (("added", changes.added), ("removed", changes.removed), ("repaired", changes.repaired)):
            self._metrics.capture_changes.labels(change).inc(count)
        for problem in changes.refused:
            if problem not in self._refused:
                logger.warning("capture %s: refused: %s; the other redirects are in force", name, problem)
        self._metrics.capture_failures.inc(len(changes.refused))
        self._refused = changes.refused
        if changes.repaired:
            logger.warning("capture %s: %d rules had been changed by others and are repaired", name, changes.repaired)
        elif changes.added or changes.removed:
            logger.info("capture %s: %d rules added, %d removed", name, changes.added, changes.removed)

    # -- the end

    def stop(self) -> None:
        """Take no new connection, and sync no more; what is established goes on.

        The redirects stay: with nobody listening behind them, clients are refused at once, where without them
        they would knock at addresses that nobody has.
        """
        self._stopped = True
        self._serving.stop_taking_clients()

    async def settled(self) -> None:
        """Wait for the sync that was under way when it was stopped, and close what that has opened."""
        async with self._turn:
            self._serving.stop_taking_clients()

    @property
    def proxy_ports(self) -> frozenset[int]:
        """The numbers of the proxy ports that are open, of every protocol."""
        return frozenset(served.socket.port for served in self._serving.served.values())

    async def withdraw(self) -> None:
        """Take the redirects back, before the ports they lead to are given up."""
        try:
            await self._capture.withdraw()
        except CaptureError as error:
            logger.error("capture %s: cannot be withdrawn: %s", self._capture.name, error)

    def close(self) -> None:
        """Close every socket and release every port. Sessions are their `ProxySockets`' to end, before."""
        self._serving.close_all()

    # -- what is told

    @property
    def descriptors(self) -> int:
        """Held by proxy sockets and claims."""
        return self._serving.descriptors

    def report(self) -> list[dict[str, object]]:
        """Every service port and what became of it; for /services and the table at the start."""
        return self._serving.report(self._snapshot or Snapshot())


def _owners(place: LocalPort, want: State) -> list[SocketKey]:
    return [
        key
        for portal, key in want.redirects.items()
        if not portal.ip and LocalPort(portal.family, portal.protocol, portal.port) == place
    ]
