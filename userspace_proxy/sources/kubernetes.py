"""Services and their endpoints as an API server tells of them, and the node that this proxy runs on.

Three reflectors follow Services, EndpointSlices (where there are none, Endpoints) and this Node; here is what they feed
and when a Snapshot goes out: not before all have been listed once, and then with each batch of events that changes it.
While the API server is away nothing is published, so the proxier goes on with what it has. If it is away when we start,
the state that the last run saved is published, until all has been listed; what the same process was told before the
config file changed, at once.

Objects are checked as those of manifests are, except that loopback endpoints are refused, as by the API server itself:
they would lead everybody who may write an EndpointSlice to what listens on a node for the node alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

from userspace_proxy.exceptions import ObjectError
from userspace_proxy.model import Node, Snapshot
from userspace_proxy.sources import answers
from userspace_proxy.sources.answers import ENDPOINT_SLICES, ENDPOINTS, SERVICES, Pace, Randomness, Unreadable
from userspace_proxy.sources.base import Event, Publish, Told
from userspace_proxy.sources.connection import Connection
from userspace_proxy.sources.events import Events
from userspace_proxy.sources.identity import Identity, identify
from userspace_proxy.sources.objects import decode
from userspace_proxy.sources.reflector import Reflector
from userspace_proxy.sources.saved import SavedState
from userspace_proxy.sources.store import Object, Refused, Store

logger = logging.getLogger(__name__)

ZONE = "topology.kubernetes.io/zone"
TO_BE_DELETED = "ToBeDeletedByClusterAutoscaler"
"""The taint by which the autoscaler announces that a node goes."""
NAMELESS = ""
"""Stands for all objects whose name cannot be told."""
BATCH = 200
"""Objects taken over by a list between two turns of the data path."""


@dataclass(frozen=True, slots=True)
class Found:
    """One object of a list or an event. Without an identity it may be any."""

    identity: Identity | None
    content: Object | Refused | None
    """None: there is nothing to proxy in it."""


class _ObjectFeed:
    """Services, or what says where their endpoints are. In the store each object is a file of its own."""

    def __init__(self, store: Store, flush: Callable[[], None], failed: Callable[[], None]) -> None:
        self._store = store
        self._held: set[str] = set()
        self.problems: dict[str, str] = {}
        self.listed = False
        self.flush = flush
        self.failed = failed

    def read(self, value: object) -> Found:
        if isinstance(value, Unreadable):
            named = Identity(value.kind, value.namespace, value.name) if value.name else None
            return Found(named, Refused(named, value.problem))
        identity = identify(value)
        try:
            return Found(identity, decode(value, "API server"))
        except ObjectError as error:
            return Found(identity, Refused(identity, str(error)))

    async def replace(self, items: Sequence[Found]) -> None:
        gone = self._held - {str(item.identity) for item in items}
        self.problems.pop(NAMELESS, None)
        for number, item in enumerate(items, 1):
            self.put(item)
            if number % BATCH == 0:
                await asyncio.sleep(0)
        if all(item.identity for item in items):  # else one of those that are missing may be the one without a name
            for file in gone:
                self._forget(file)
        self.listed = True

    def put(self, item: Found) -> None:
        file = str(item.identity or NAMELESS)
        if isinstance(item.content, Refused):
            self._refuse(file, item.content.problem)
        else:
            self.problems.pop(file, None)
        if item.identity is not None:
            self._held.add(file)
            self._store.replace(file, [] if item.content is None else [item.content])

    def remove(self, item: Found) -> None:
        if item.identity is not None:
            self._forget(str(item.identity))

    def _refuse(self, file: str, problem: str) -> None:
        if self.problems.get(file) != problem:
            logger.warning("%s", problem)
        self.problems[file] = problem

    def _forget(self, file: str) -> None:
        self.problems.pop(file, None)
        if file in self._held:
            self._held.discard(file)
            self._store.forget(file)


class _NodeFeed:
    """This node. Nobody waits long for it: what it decides is a matter of preference.

    One that is gone is what it was last: the machine may still run, and go on leaving.
    """

    def __init__(self, name: str, flush: Callable[[], None]) -> None:
        self.node = Node(name)
        self.settled = False
        self.listed = False
        self.flush = flush

    def read(self, value: object) -> Node:
        metadata, spec = _mapping(value, "metadata"), _mapping(value, "spec")
        zone = _mapping(metadata, "labels").get(ZONE)
        taints = spec.get("taints")
        leaving = bool(metadata.get("deletionTimestamp")) or any(
            isinstance(taint, dict) and taint.get("key") == TO_BE_DELETED
            for taint in (taints if isinstance(taints, list) else ())
        )
        return Node(self.node.name, zone if isinstance(zone, str) else "", leaving)

    async def replace(self, items: Sequence[Node]) -> None:
        if items:
            self.node = items[0]
        elif self.node == Node(self.node.name):
            logger.warning(
                "the API server has no node %r, so the zone is not known; "
                "if the node has another name there, say so by --hostname-override",
                self.node.name,
            )
        self.settled = self.listed = True

    def put(self, item: Node) -> None:
        self.node = item

    def remove(self, item: Node) -> None:
        self.node = item

    def failed(self) -> None:
        self.settled = True
        self.flush()


def _mapping(value: object, field: str) -> dict[str, Any]:
    found = value.get(field) if isinstance(value, dict) else None
    return found if isinstance(found, dict) else {}


class KubernetesSource:
    """Follows `server`, the API server at the end of `connection`, as the node called `node_name`."""

    def __init__(
        self,
        connection: Connection,
        server: str,
        node_name: str,
        saved: SavedState | None,
        before: Told | None = None,
        *,
        pace: Pace,
        clock: Callable[[], float],
        rng: Randomness,
        slices: bool = True,
    ) -> None:
        """Without `slices` endpoints are had from Endpoints, even where there are EndpointSlices.

        What was told `before` is passed over if it was by another API server, or to another node.
        """
        self._connection = connection
        self._server = server
        self._before = before
        self._saved = saved
        self._pace = pace
        self._store = Store()
        self._away = asyncio.Event()
        self._changed = asyncio.Event()
        """The state has changed since saving it was last begun."""
        self._written: Snapshot | None = None
        self._unsaved: str | None = None
        """Why the state could not be saved when that was last tried."""
        self._snapshot: Snapshot | None = None
        """As the API server tells it now."""
        self.told: Told | None = None
        self._publish: Publish = lambda snapshot: None
        self._services = _ObjectFeed(self._store, self._flush, self._away.set)
        self._endpoints = _ObjectFeed(self._store, self._flush, self._away.set)
        self._node = _NodeFeed(node_name, self._flush)
        self._events = Events(connection, node_name, partial(datetime.now, UTC))
        self._reflectors: tuple[Reflector[Any], ...] = (
            Reflector(connection, [SERVICES], self._services, pace, clock, rng),
            Reflector(
                connection, [ENDPOINT_SLICES, ENDPOINTS] if slices else [ENDPOINTS], self._endpoints, pace, clock, rng
            ),
            Reflector(connection, [answers.node(node_name)], self._node, pace, clock, rng),
        )

    @property
    def problems(self) -> tuple[str, ...]:
        return (*self._services.problems.values(), *self._endpoints.problems.values())

    async def run(self, publish: Publish) -> None:
        self._publish = publish
        before = self._before
        known = before and before.server == self._server and before.snapshot.node
        if before and known and known.name == self._node.node.name:
            self._serve_meanwhile(before.snapshot)
        try:
            async with asyncio.TaskGroup() as tasks:
                for reflector in self._reflectors:
                    tasks.create_task(reflector.run(), name="reflector")
                tasks.create_task(self._settle(), name="settle")
                tasks.create_task(self._publish_again(), name="resync")
                tasks.create_task(self._events.run(), name="events")
                if self._saved is not None:
                    tasks.create_task(self._serve_saved(self._saved), name="saved state")
                    tasks.create_task(self._save_changes(self._saved), name="save state")
        finally:
            await self._connection.close()
            if self._saved and self._snapshot and self._snapshot is not self._written:
                self._save(self._saved, self._snapshot)

    def tell(self, event: Event) -> None:
        self._events.tell(event)

    def reload(self) -> None:
        for reflector in self._reflectors:
            reflector.start_over()

    def _flush(self) -> None:
        """Publish what the objects mean by now, if that has changed and all is known."""
        if not (self._services.listed and self._endpoints.listed and self._node.settled):
            return
        found = self._store.snapshot()
        last, node = self._snapshot, self._node.node
        if last and (found.services, found.endpoints, node) == (last.services, last.endpoints, last.node):
            return
        self._snapshot = replace(found, node=node)
        self._changed.set()
        self.told = Told(self._server, self._snapshot)
        self._publish(self._snapshot)

    async def _settle(self) -> None:
        """The server may answer for Services alone, and be silent about nodes."""
        await asyncio.sleep(self._pace.patience)
        self._node.failed()

    async def _publish_again(self) -> None:
        """What has been lost on the way to the kernel comes back, as after kube-proxy's resync."""
        while True:
            await asyncio.sleep(self._pace.resync)
            if self._snapshot is not None:
                self._publish(self._snapshot)

    def _serve_meanwhile(self, snapshot: Snapshot) -> None:
        """Until the API server has told its own."""
        if snapshot.node is not None and snapshot.node.name == self._node.node.name and not self._node.listed:
            self._node.node = snapshot.node
        self.told = Told(self._server, replace(snapshot, node=self._node.node))
        self._publish(self.told.snapshot)

    async def _serve_saved(self, saved: SavedState) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(self._pace.patience):
                await self._away.wait()
        snapshot = None if self.told else await asyncio.to_thread(saved.load)
        if snapshot is not None and self.told is None:
            logger.warning("the state saved in %s is served until the API server has told its own", saved.file)
            self._serve_meanwhile(snapshot)

    async def _save_changes(self, saved: SavedState) -> None:
        while True:
            await self._changed.wait()
            await asyncio.sleep(self._pace.save_after)
            self._changed.clear()
            snapshot = self._snapshot
            if snapshot is None:
                continue
            if await asyncio.to_thread(self._save, saved, snapshot):
                self._written = snapshot
            else:
                self._changed.set()
                await asyncio.sleep(self._pace.save_again)

    def _save(self, saved: SavedState, snapshot: Snapshot) -> bool:
        try:
            saved.save(snapshot)
        except OSError as error:
            problem = error.strerror or str(error)
            if problem != self._unsaved:
                logger.warning("--state-dir: %s: %s; the state is not saved", saved.file.parent, problem)
            self._unsaved = problem
            return False
        if self._unsaved is not None:
            logger.info("--state-dir: %s: the state is saved again", saved.file.parent)
            self._unsaved = None
        return True
