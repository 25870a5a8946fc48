"""The control loop: the newest Snapshot, compared with what is, becomes open sockets and redirects.

Two things come in through `publish`. Endpoints act at once: they go to the load balancers, and a service
port that gained its first or lost its last one starts or stops taking clients; no rule moves. Services only
mark the state as due: one sync at a time takes the newest Snapshot, asks `plan` for the steps and carries them
out. Syncs are at least the minimum period apart, and at most the sync period, so that what others
changed in the kernel is repaired and what failed is tried again.

The loop is the data path's too, so a change costs what changed, not what there is: Snapshots are compared by
identity, a sync plans the service ports that changed and their neighbours, and the capture is told the difference.
What concerns all of them is done in slices.

Nothing here ends the loop: what goes wrong with one service port is noted there, and told by `report`.
Which step comes when is decided in `plan`; what a step does is in `serving` and `capture`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from userspace_proxy.capture.base import Capture
from userspace_proxy.captured import Captured
from userspace_proxy.config import PortRange
from userspace_proxy.exceptions import CaptureError
from userspace_proxy.metrics import Metrics
from userspace_proxy.model import (
    IPFamily,
    Node,
    Portal,
    Protocol,
    ServicePort,
    ServicePortName,
    Snapshot,
    SocketKey,
    changed,
    family_of,
    inside,
)
from userspace_proxy.plan import (
    Claim,
    Close,
    LocalPort,
    Neighbours,
    Open,
    Part,
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

CHANGES_AT_ONCE = 64
"""Service ports given their new endpoints between two turns of the data path; each may take two system calls."""
STEPS_AT_ONCE = 16
"""Steps carried out between two turns of the data path; opening a socket takes up to 0.1 ms."""


@dataclass(slots=True)
class Progress:
    """How the control loop is doing; times are of the proxier's clock."""

    last_sync: float | None = None
    waiting_since: float | None = None
    capture_error: str = ""
    troubled_since: float | None = None
    """Since when the capture has failed; None: it works."""
    first_sync: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do about a part of the service ports."""

    part: Part
    have: State
    want: State
    problems: Sequence[Problem]
    steps: Sequence[Step]


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
        room: Callable[[], bool] = lambda: True,
        after_sync: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self.progress = Progress()
        self._capture = capture
        self._captured = Captured(capture, metrics)
        self._protocols = tuple(sockets)
        self._metrics = metrics
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
            strangers=not (capture.rewrites_destination or capture.listens),
            room=room,
            max_ejection=max_ejection,
            clock=clock,
            rng=rng or random.Random(),
        )
        self._snapshot: Snapshot | None = None
        self._neighbours = Neighbours()
        self._changed: set[ServicePortName] = set()
        """Services that differ from what was planned last."""
        self._unmet: set[ServicePortName] = set()
        """For whom something could not be had, and is asked for again at every sync."""
        self._underway: set[ServicePortName] = set()
        """Whom the present sync plans for; after one that did not come to its end, whom it did."""
        self._repaired = -math.inf
        self._catching_up = False
        self._due = asyncio.Event()
        self._turn = asyncio.Lock()
        self._stopped = False

    # -- what comes in

    def publish(self, snapshot: Snapshot) -> None:
        """Take the newest state: its endpoints now, its services with the next sync."""
        if self._stopped:
            return  # an endpoint more or less must not make a socket listen again
        before, self._snapshot = self._snapshot, snapshot
        services = changed(before.services if before else {}, snapshot.services)
        # Nothing new is news as well: somebody wants all that is known gone through again.
        if before is None or services or not changed(before.endpoints, snapshot.endpoints):
            self._changed |= services
            self._mark_due()
        self._serving.follow(snapshot.endpoints, snapshot.node)
        if not self._catching_up:
            self._catch_up()

    def _catch_up(self) -> None:
        self._catching_up = not self._stopped and self._serving.catch_up(CHANGES_AT_ONCE)
        if self._catching_up:
            asyncio.get_running_loop().call_soon(self._catch_up)

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
        self.progress.capture_error = self._captured.error
        # What came meanwhile waits for the next sync.
        self.progress.waiting_since = started if self._due.is_set() else None
        if not self.progress.capture_error:
            self.progress.last_sync, self.progress.troubled_since = self._clock(), None
        elif self.progress.troubled_since is None:
            self.progress.troubled_since = started
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
        # At first, and after a failure, when what was planned and what is have parted.
        everything = bool(self._underway) or not self._captured.known
        self._underway |= self._changed | self._unmet | {key.name for key in self._serving.failed}
        self._changed = set()
        if everything:
            self._underway |= snapshot.services.keys() | {key.name for key in self._serving.served}
            self._repaired = self._clock()
        if self._underway or everything:
            await self._decide_and_act(self._underway, snapshot, everything=everything)
        # Half of the period, so that changes that come all the time cannot put it off beyond the whole of it.
        if not self._underway or self._clock() - self._repaired >= self._sync_period / 2:
            await self._repair()
        self._underway = set()

    async def _repair(self) -> None:
        """What others have changed, and what has changed about this host."""
        self._repaired = self._clock()
        if self._captured.known:
            await self._captured.repair()
        for key, served in self._serving.served.items():
            if served.service.protocol in self._capture.listens:  # addresses may have come and gone
                self._serving.admit(key, served.admitted)
        await self._recognise_ourselves(anew=True)
        self._serving.note_failed()
        self._serving.purge()

    async def _decide_and_act(self, names: set[ServicePortName], snapshot: Snapshot, *, everything: bool) -> None:
        serving = self._serving
        # A thread, because planning thousands at the start takes a tenth of a second.
        decision = await asyncio.to_thread(self._decide, names, snapshot.services, everything=everything)
        part, have, want = decision.part, decision.have, decision.want
        serving.problems.begin(part.names)
        for problem in decision.problems:
            serving.problems.note(problem.key, problem.message)
        serving.adopt(part.names, snapshot.services)
        # Portals are known before they open, proxy ports once they have.
        serving.own(portal.place for portal in want.redirects)
        await self._recognise_ourselves()
        if await self._carry_out(decision, snapshot):
            wanted = {portal.place for portal in want.redirects}
            serving.own((), no_more={portal.place for portal in have.redirects} - wanted)
        await self._recognise_ourselves()
        serving.retry()

    def _decide(
        self, names: set[ServicePortName], services: Mapping[ServicePortName, ServicePort], *, everything: bool
    ) -> Decision:
        """What to do about these service ports and their neighbours. Changes nothing that a sync has not for itself."""
        part = self._neighbours.update(names, services)
        claims = self._serving.claims
        if everything:
            held = {place.portal.place for place in claims}
            part = Part(part.names, part.places | held | self._captured.redirects.keys())
        found = [redirect for place in part.places if (redirect := self._captured.redirects.get(place))]
        have = State(
            {key: self._serving.served[key].service.protocol for key in self._serving.keys(part.names)},
            {local for place in part.places if (local := LocalPort.of(place)) and local in claims},
            {redirect.portal: self._serving.target(redirect) for redirect in found},
        )
        concerned = {name: services[name] for name in sorted(part.names) if name in services}
        want, problems = desired(concerned, self._bind, self._protocols, have)
        if not (self._capture.rewrites_destination or self._capture.listens):
            want = State(want.sockets)
        elif self._capture.listens:  # who listens at a node port need not claim it
            claimed = {place for place in want.claims if place.protocol not in self._capture.listens}
            want = State(want.sockets, claimed, want.redirects)
        return Decision(part, have, want, problems, plan(have, want))

    async def _recognise_ourselves(self, *, anew: bool = False) -> None:
        for _ in self._serving.recognise_ourselves(anew=anew):
            await asyncio.sleep(0)

    async def _carry_out(self, decision: Decision, snapshot: Snapshot) -> bool:
        """Whether every step was gone through; what depends on one that failed is left out, and asked for again."""
        serving, want = self._serving, decision.want
        node_ports = {place.port for place in (*serving.claims, *want.claims)}
        if any(isinstance(step, Open) for step in decision.steps):
            node_ports.update(service.health_check_node_port for service in snapshot.services.values())
        unopened: set[SocketKey] = set()
        unclaimed: dict[LocalPort, SocketKey] = {}
        claiming = any(isinstance(step, Claim) for step in decision.steps)
        addresses = serving.claims.addresses() if claiming else ()
        for number, step in enumerate(decision.steps, 1):
            match step:
                case Open(key, _):
                    if not serving.open(key, snapshot.services[key.name], node_ports):
                        unopened.add(key)
                case Claim(place):
                    owner = want.redirects[place.portal]
                    if not serving.claims.hold(place, addresses, owner):
                        unclaimed[place] = owner
                case Replace():
                    if not await self._replace(decision.part, without(step, unopened, unclaimed).redirects):
                        return False
                case Unclaim(place):
                    serving.claims.release(place)
                case Close(key):
                    serving.close(key)
            if number % STEPS_AT_ONCE == 0:
                await asyncio.sleep(0)
        self._unmet -= decision.part.names
        self._unmet |= {key.name for key in (*unopened, *unclaimed.values())}
        return self._captured.known or await self._captured.repair()

    async def _replace(self, part: Part, portals: Mapping[Portal, SocketKey]) -> bool:
        """Make these the redirects of a part. Sockets admit what is new before, and what is gone until after.

        Those that listen at portals can do so only after.
        """
        serving, served, listens = self._serving, self._serving.served, self._capture.listens
        wanted: defaultdict[SocketKey, set[Portal]] = defaultdict(set)
        for portal, key in portals.items():
            wanted[key].add(portal)
            if portal.protocol not in listens:  # else nobody could tell clients inside from others
                wanted[inside(portal, key)].add(portal)
        changing = [key for key in serving.keys(part.names) if served[key].admitted != wanted.get(key, frozenset())]
        for key in changing:
            if served[key].service.protocol not in listens:
                serving.admit(key, served[key].admitted | wanted.get(key, set()))
        redirects = [serving.redirect(portal, key) for portal, key in portals.items()]
        if not await self._captured.exchange(part.places, redirects):
            return False
        for key in changing:
            served[key].admitted = frozenset(wanted.get(key, ()))
            serving.admit(key, served[key].admitted)
        return True

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
    def ports(self) -> frozenset[int]:
        """The numbers of the ports where sockets of ours have clients, of every protocol."""
        served, listens = self._serving.served.values(), self._capture.listens
        ports = {each.socket.port for each in served}
        ports.update(portal.port for each in served for portal in each.admitted if portal.protocol in listens)
        return frozenset(ports)

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
    def node(self) -> Node | None:
        """This node, as last told of."""
        return self._snapshot.node if self._snapshot else None

    @property
    def descriptors(self) -> int:
        """Held by proxy sockets and claims."""
        return self._serving.descriptors

    @property
    def service_ports(self) -> int:
        """How many there are to serve."""
        return len(self._snapshot.services) if self._snapshot else 0

    def report(self) -> Iterator[dict[str, object]]:
        """Every service port and what became of it; for /services and the table at the start."""
        return self._serving.report((self._snapshot or Snapshot()).services)
