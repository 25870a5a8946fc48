"""What load balancers ask: does this node have endpoints of a Service whose external traffic stays on its node?

A listener for each `healthCheckNodePort`, and kube-proxy's answers: 200 while there are ready endpoints here and this
proxy is well, else 503. It says nothing about how the Service itself is. Answers are made from the newest Snapshot
when somebody asks; listeners come and go behind it, a moment later, as Services and the host's addresses do. One server
answers at all of them, so that there are no more clients at once than of another server.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import product

from aiohttp import web

from userspace_proxy import host
from userspace_proxy.admin.servers import CONNECTIONS, Listener, answering
from userspace_proxy.model import ServicePortName, Snapshot, TrafficPolicy, family_of
from userspace_proxy.policy import NOWHERE, local_ready

logger = logging.getLogger(__name__)

PAUSE = 1.0
"""Seconds between two looks at which listeners there should be."""

_Place = tuple[str, int]
"""Address and port."""


@dataclass(frozen=True, slots=True)
class Checked:
    """A Service that is asked about, and its ports."""

    namespace: str
    name: str
    ports: tuple[ServicePortName, ...]


def wanted(snapshot: Snapshot) -> dict[int, Checked]:
    """Which Service is asked about at which node port; of several at one, the first by name."""
    found: dict[tuple[str, str, int], list[ServicePortName]] = {}
    for name, service in snapshot.services.items():
        if service.health_check_node_port and service.external_policy is TrafficPolicy.LOCAL:
            found.setdefault((name.namespace, name.name, service.health_check_node_port), []).append(name)
    checks: dict[int, Checked] = {}
    for (namespace, service_name, port), ports in sorted(found.items()):
        checks.setdefault(port, Checked(namespace, service_name, tuple(ports)))
    return checks


def count(checked: Checked, snapshot: Snapshot) -> int:
    """The pods of this node that the Service's clients may be sent to; in its first family each has one address."""
    found = []
    for name in checked.ports:
        if (service := snapshot.services.get(name)) is not None:
            first = service.families[0]
            found += [e for e in snapshot.endpoints.get(name, ()) if family_of(e.ip) is first]
    return local_ready(found, snapshot.node or NOWHERE)


def body(checked: Checked, pods: int, *, healthy: bool) -> str:
    """As kube-proxy writes it, tabs and all."""
    service = {"namespace": checked.namespace, "name": checked.name}
    return json.dumps({"service": service, "localEndpoints": pods, "serviceProxyHealthy": healthy}, indent="\t")


def _name(checked: Checked) -> str:
    return f"{checked.namespace}/{checked.name}: healthCheckNodePort"


def _port_of(transport: asyncio.BaseTransport) -> int:
    """Which port a client has connected to."""
    port: int = transport.get_extra_info("sockname")[1]
    return port


class HealthChecks:
    """`networks`: those whose addresses serve node ports; none: all. `failed` is told of ports that cannot be had.

    What the host's addresses are is looked at again every `period` seconds. `room` says whether there are descriptors
    for one more listener, and `held` is told when others are held than before.
    """

    def __init__(
        self,
        is_healthy: Callable[[], bool],
        networks: Sequence[str],
        failed: Callable[[Checked, str], None],
        *,
        period: float,
        room: Callable[[], bool],
        held: Callable[[], None],
    ) -> None:
        self._is_healthy = is_healthy
        self._networks = networks
        self._failed = failed
        self._period = period
        self._room = room
        self._held = held
        self._snapshot = Snapshot()
        self._changed = asyncio.Event()
        self._addresses: Sequence[str] = ()
        self._checks: Mapping[int, Checked] = {}
        self._listeners: dict[_Place, asyncio.Task[None]] = {}
        self._without: frozenset[int] = frozenset()
        """Ports that were told to have no descriptors."""

    @property
    def descriptors(self) -> int:
        """Held by listeners, and kept for who asks."""
        return len(self._listeners) + CONNECTIONS if self._listeners else 0

    def publish(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._changed.set()

    async def run(self) -> None:
        """Keep the listeners until cancelled."""
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        clock = asyncio.get_running_loop().time
        looked = -math.inf
        async with answering(app) as server, asyncio.TaskGroup() as tasks:
            while True:
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._period):
                        await self._changed.wait()
                self._changed.clear()
                checks = wanted(self._snapshot)
                if checks.keys() - self._checks.keys() or (checks and clock() - looked >= self._period):
                    looked = clock()
                    self._addresses = self._look()
                await self._end(checks, server)
                self._open(checks, server, tasks)
                self._held()
                await asyncio.sleep(PAUSE)

    def _look(self) -> Sequence[str]:
        if self._networks:
            return host.local_addresses(self._networks)
        return ("::" if socket.has_dualstack_ipv6() else "0.0.0.0",)

    async def _end(self, checks: Mapping[int, Checked], server: web.Server) -> None:
        """Listen no more where nobody is to ask, or is to ask about another Service."""
        changed = {port for port, checked in self._checks.items() if checks.get(port) != checked}
        gone = [place for place in self._listeners if place[1] in changed or place[0] not in self._addresses]
        ending = [self._listeners.pop(place) for place in gone]
        for task in ending:
            task.cancel()
        if ending:
            await asyncio.wait(ending)
        self._checks = checks
        for connection in server.connections if changed else ():
            if connection.transport and _port_of(connection.transport) in changed:
                connection.force_close()

    def _open(self, checks: Mapping[int, Checked], server: web.Server, tasks: asyncio.TaskGroup) -> None:
        without = set()
        for place in product(self._addresses, checks):
            if place in self._listeners:
                continue
            if not self._room():
                without.add(place[1])
                continue
            listener = self._listener(checks[place[1]], place)
            self._listeners[place] = tasks.create_task(listener.accept(server), name="health check")
        for port in without - self._without:
            checked = checks[port]
            problem = f"{_name(checked)}: no descriptors are left to listen on port {port}; allow more (ulimit -n)"
            logger.warning("%s; trying again every %g s", problem, self._period)
            self._failed(checked, problem)
        self._without = frozenset(without)

    def _listener(self, checked: Checked, place: _Place) -> Listener:
        failed = partial(self._failed, checked)
        return Listener(_name(checked), place, hard_fail=False, advice="end what uses it", failed=failed)

    async def _answer(self, request: web.Request) -> web.Response:
        checked = self._checks.get(_port_of(request.transport)) if request.transport else None
        if checked is None:  # it has just gone
            raise web.HTTPServiceUnavailable
        pods, healthy = count(checked, self._snapshot), self._is_healthy()
        return web.Response(
            status=200 if pods and healthy else 503,
            text=body(checked, pods, healthy=healthy),
            content_type="application/json",
            headers={"X-Content-Type-Options": "nosniff", "X-Load-Balancing-Endpoint-Weight": str(pods)},
        )
