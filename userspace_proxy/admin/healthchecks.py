"""What load balancers ask: does this node have endpoints of a Service whose external traffic stays on its node?

A server for each `healthCheckNodePort`, with kube-proxy's answers: 200 while there are ready endpoints here and this
proxy is well, else 503. It says nothing about how the Service itself is. Answers are made from the newest Snapshot
when somebody asks; servers come and go behind it, a moment later and one by one.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from aiohttp import web

from userspace_proxy import host
from userspace_proxy.admin.servers import AdminServer
from userspace_proxy.model import ServicePortName, Snapshot, TrafficPolicy, family_of
from userspace_proxy.policy import NOWHERE, local_ready

PAUSE = 1.0
"""Seconds between two looks at which servers there should be."""


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


class HealthChecks:
    """`networks`: those whose addresses serve node ports; none: all. `failed` is told of ports that cannot be had."""

    def __init__(
        self, is_healthy: Callable[[], bool], networks: Sequence[str], failed: Callable[[Checked, str], None]
    ) -> None:
        self._is_healthy = is_healthy
        self._networks = networks
        self._failed = failed
        self._snapshot = Snapshot()
        self._changed = asyncio.Event()
        self._servers: dict[int, tuple[Checked, list[asyncio.Task[None]]]] = {}

    def publish(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._changed.set()

    async def run(self) -> None:
        """Keep the servers until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                await self._changed.wait()
                self._changed.clear()
                await self._sync(wanted(self._snapshot), tasks)
                await asyncio.sleep(PAUSE)

    async def _sync(self, checks: Mapping[int, Checked], tasks: asyncio.TaskGroup) -> None:
        gone = [port for port, (checked, _) in self._servers.items() if checks.get(port) != checked]
        ending = [task for port in gone for task in self._servers.pop(port)[1]]
        for task in ending:
            task.cancel()
        if ending:
            await asyncio.wait(ending)
        new = [port for port in checks if port not in self._servers]
        if not new:
            return
        addresses: Sequence[str] = ("::" if socket.has_dualstack_ipv6() else "0.0.0.0",)
        if self._networks:
            addresses = await asyncio.to_thread(host.local_addresses, self._networks)
        for port in new:
            checked = checks[port]
            servers = [self._server(checked, ip, port) for ip in addresses]
            self._servers[port] = checked, [tasks.create_task(each.run(), name="health check") for each in servers]

    def _server(self, checked: Checked, ip: str, port: int) -> AdminServer:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", partial(self._answer, checked))
        what = f"{checked.namespace}/{checked.name}: healthCheckNodePort"
        return AdminServer(
            what, (ip, port), app, hard_fail=False, advice="end what uses it", failed=partial(self._failed, checked)
        )

    async def _answer(self, checked: Checked, _request: web.Request) -> web.Response:
        pods, healthy = count(checked, self._snapshot), self._is_healthy()
        return web.Response(
            status=200 if pods and healthy else 503,
            text=body(checked, pods, healthy=healthy),
            content_type="application/json",
            headers={"X-Content-Type-Options": "nosniff", "X-Load-Balancing-Endpoint-Weight": str(pods)},
        )
