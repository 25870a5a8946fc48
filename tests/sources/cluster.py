"""A source that follows a test's API server: what it published, and what a list of everything would mean."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

from tests.apiserver import GOOD, APIServer, Manner, Object, Request
from tests.e2e.node import endpoints, port, service
from userspace_proxy.model import Node, Snapshot
from userspace_proxy.sources.answers import Pace
from userspace_proxy.sources.base import Told
from userspace_proxy.sources.connection import Connection
from userspace_proxy.sources.credentials import Access
from userspace_proxy.sources.kubernetes import ZONE, KubernetesSource
from userspace_proxy.sources.objects import decode
from userspace_proxy.sources.saved import SavedState
from userspace_proxy.sources.store import Store

NODE = "node-1"
PACE = Pace(
    first_delay=0.01, longest_delay=0.05, shortest_watch=0.0, stall=5.0, patience=1.0, save_after=0.05, save_again=0.05
)
"""As patient as tests are."""


def node_object(zone: str = "zone-a", name: str = NODE, *, taint: str = "", **metadata: str) -> Object:
    value: Object = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": {ZONE: zone}, **metadata}}
    return value | {"spec": {"taints": [{"key": taint, "effect": "NoSchedule"}]}} if taint else value


WEB = service("web", "10.96.0.10", [port(80)])
WEB_SLICE = endpoints("web", ["10.1.0.2:8080"])
NODE_OBJECT = node_object()


class Follower:
    def __init__(
        self,
        access: Access,
        *,
        node: str = NODE,
        state: Path | None = None,
        before: Told | None = None,
        pace: Pace = PACE,
        seed: int = 1,
        slices: bool = True,
    ) -> None:
        self.connection = Connection(access, time.monotonic, stall=pace.stall)
        server = self.connection.check()
        self.source = KubernetesSource(
            self.connection,
            server,
            node,
            SavedState(state, server) if state else None,
            before,
            pace=pace,
            clock=time.monotonic,
            rng=random.Random(seed),
            slices=slices,
        )
        self.published: list[Snapshot] = []

    @property
    def last(self) -> Snapshot:
        return self.published[-1] if self.published else Snapshot()

    @property
    def services(self) -> list[str]:
        return sorted(name.name for name in self.last.services)

    def addresses(self, name: str) -> list[str]:
        return sorted(str(e) for key, found in self.last.endpoints.items() if key.name == name for e in found)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Follower]:
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(self.source.run(self.published.append))
            try:
                yield self
            finally:
                task.cancel()


def follow(api: APIServer, **settings: object) -> Follower:
    return Follower(Access(master=api.url, qps=-1), **settings)  # type: ignore[arg-type]


def meant(api: APIServer) -> Snapshot:
    """What the server holds now, read from scratch."""
    store = Store()
    node = Node(NODE)
    for value in api.objects():
        if value["kind"] == "Node":
            node = Node(NODE, value["metadata"]["labels"].get(ZONE, ""))
        elif (found := decode(value, "test")) is not None:
            store.replace(str(found.identity), [found])
    return replace(store.snapshot(), node=node)


async def eventually(holds: Callable[[], object], patience: float = 15.0) -> None:
    deadline = time.monotonic() + patience
    while not holds():
        assert time.monotonic() < deadline, f"not so within {patience:g} s"
        await asyncio.sleep(0.005)


def only(kind: str, verb: str, manner: Manner, times: int = 1_000_000) -> Callable[[Request], Manner]:
    """This manner for some requests of a kind, then and for all others the good one."""
    left = [times]

    def choose(request: Request) -> Manner:
        if (request.kind, request.verb) == (kind, verb) and left[0]:
            left[0] -= 1
            return manner
        return GOOD

    return choose
