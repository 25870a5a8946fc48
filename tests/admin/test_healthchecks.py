"""What load balancers are answered, and the servers that come and go with the Services."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import aiohttp

from userspace_proxy.admin.healthchecks import Checked, HealthChecks, body, count, wanted
from userspace_proxy.model import Endpoint, Node, Protocol, ServicePort, ServicePortName, Snapshot, TrafficPolicy

Run = Callable[[Coroutine[Any, Any, Any]], Any]

HTTP, HTTPS = (ServicePortName("shop", "web", port) for port in ("http", "https"))
WEB = Checked("shop", "web", (HTTP, HTTPS))
SERVICE = ServicePort(Protocol.TCP, 80, ("10.96.0.1", "fd00::1"), external_policy=TrafficPolicy.LOCAL)


def snapshot(port: int, *endpoints: Endpoint) -> Snapshot:
    service = dataclasses.replace(SERVICE, health_check_node_port=port)
    return Snapshot(
        {HTTP: service, HTTPS: dataclasses.replace(service, port=443)},
        {HTTP: endpoints, HTTPS: tuple(dataclasses.replace(e, port=8443) for e in endpoints)},
        Node("n1"),
    )


HERE, THERE = Endpoint("10.1.0.1", 8080, node="n1"), Endpoint("10.1.0.2", 8080, node="n2")


def test_pods_of_this_node_count_once_if_they_are_ready() -> None:
    unready = Endpoint("10.1.0.3", 8080, ready=False, serving=False, node="n1")
    ending = Endpoint("10.1.0.4", 8080, ready=False, serving=True, terminating=True, node="n1")
    other_family = Endpoint("fd00:1::1", 8080, node="n1")
    assert count(WEB, snapshot(1, HERE, THERE, unready, ending, other_family)) == 1
    assert count(WEB, snapshot(1, ending)) == 0
    assert count(WEB, dataclasses.replace(snapshot(1, HERE), node=None)) == 0
    assert count(WEB, Snapshot()) == 0


def test_one_check_a_service_while_its_policy_is_local() -> None:
    assert wanted(snapshot(30100)) == {30100: WEB}
    assert wanted(snapshot(0)) == {}
    cluster = dataclasses.replace(SERVICE, health_check_node_port=30100, external_policy=TrafficPolicy.CLUSTER)
    assert wanted(Snapshot({HTTP: cluster})) == {}


def test_of_two_services_at_one_port_the_first_by_name_is_asked_about() -> None:
    other = ServicePortName("shop", "api", "http")
    service = dataclasses.replace(SERVICE, health_check_node_port=30100)
    assert wanted(Snapshot({HTTP: service, other: service})) == {30100: Checked("shop", "api", (other,))}


def test_the_body_is_kube_proxys() -> None:
    text = body(WEB, 2, healthy=True)
    assert text == (
        '{\n\t"service": {\n\t\t"namespace": "shop",\n\t\t"name": "web"\n\t},\n'
        '\t"localEndpoints": 2,\n\t"serviceProxyHealthy": true\n}'
    )


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@contextlib.asynccontextmanager
async def running(checks: HealthChecks) -> AsyncIterator[aiohttp.ClientSession]:
    task = asyncio.create_task(checks.run())
    async with aiohttp.ClientSession() as session:
        yield session
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def ask(session: aiohttp.ClientSession, port: int, ip: str = "127.0.0.1") -> tuple[int, Any, dict[str, str]]:
    for _ in range(500):
        with contextlib.suppress(aiohttp.ClientConnectionError):
            async with session.get(f"http://{ip}:{port}/healthz/anything") as response:
                return response.status, await response.json(), dict(response.headers)
        await asyncio.sleep(0.01)
    raise AssertionError("nobody listens")


async def nobody_listens(session: aiohttp.ClientSession, port: int) -> None:
    for _ in range(500):
        try:
            async with session.get(f"http://127.0.0.1:{port}/"):
                await asyncio.sleep(0.01)
        except aiohttp.ClientConnectionError:
            return
    raise AssertionError("somebody listens still")


def test_answers_follow_the_endpoints_and_the_proxys_health(run: Run) -> None:
    async def main() -> None:
        healthy, port = True, free_port()
        checks = HealthChecks(lambda: healthy, (), lambda checked, problem: None)
        async with running(checks) as session:
            checks.publish(snapshot(port, HERE, THERE))
            status, told, headers = await ask(session, port)
            assert status == 200
            assert told == {
                "service": {"namespace": "shop", "name": "web"},
                "localEndpoints": 1,
                "serviceProxyHealthy": True,
            }
            assert headers["Content-Type"].startswith("application/json")
            assert headers["X-Content-Type-Options"] == "nosniff"
            assert headers["X-Load-Balancing-Endpoint-Weight"] == "1"
            checks.publish(snapshot(port, THERE))
            status, told, headers = await ask(session, port)
            assert (status, told["localEndpoints"], headers["X-Load-Balancing-Endpoint-Weight"]) == (503, 0, "0")
            checks.publish(snapshot(port, HERE))
            healthy = False
            status, told, _ = await ask(session, port)
            assert (status, told["localEndpoints"], told["serviceProxyHealthy"]) == (503, 1, False)

    run(main())


def test_servers_come_and_go_with_their_services(run: Run) -> None:
    async def main() -> None:
        first, second = free_port(), free_port()
        checks = HealthChecks(lambda: True, ("127.0.0.0/8",), lambda checked, problem: None)
        async with running(checks) as session:
            checks.publish(snapshot(first, HERE))
            assert (await ask(session, first))[0] == 200
            checks.publish(snapshot(second, HERE))
            assert (await ask(session, second))[0] == 200
            await nobody_listens(session, first)
            checks.publish(Snapshot())
            await nobody_listens(session, second)

    run(main())


def test_a_port_that_cannot_be_had_is_told(run: Run) -> None:
    async def main() -> None:
        told: list[tuple[Checked, str]] = []
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            checks = HealthChecks(lambda: True, ("127.0.0.1/32",), lambda *args: told.append(args))
            async with running(checks):
                checks.publish(snapshot(port, HERE))
                for _ in range(500):
                    if told:
                        break
                    await asyncio.sleep(0.01)
        [(checked, problem)] = told
        assert checked == WEB
        assert problem.startswith(f"shop/web: healthCheckNodePort: cannot listen on 127.0.0.1:{port}: Address already")

    run(main())


def test_the_body_is_json_whatever_is_in_it() -> None:
    assert json.loads(body(Checked("a", 'b"', ()), 0, healthy=False))["service"]["name"] == 'b"'
