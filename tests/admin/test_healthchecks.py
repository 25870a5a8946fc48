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
import pytest

from tests.netns import Namespace
from userspace_proxy.admin import healthchecks
from userspace_proxy.admin.healthchecks import Checked, HealthChecks, body, count, wanted
from userspace_proxy.admin.servers import CONNECTIONS
from userspace_proxy.model import Endpoint, Node, Protocol, ServicePort, ServicePortName, Snapshot, TrafficPolicy

Run = Callable[[Coroutine[Any, Any, Any]], Any]

HTTP, HTTPS = (ServicePortName("shop", "web", port) for port in ("http", "https"))
WEB = Checked("shop", "web", (HTTP, HTTPS))
SERVICE = ServicePort(Protocol.TCP, 80, ("10.96.0.1", "fd00::1"), external_policy=TrafficPolicy.LOCAL)


@pytest.fixture(autouse=True)
def without_long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(healthchecks, "PAUSE", 0.05)


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


def health_checks(
    *networks: str,
    is_healthy: Callable[[], bool] = lambda: True,
    failed: Callable[[Checked, str], None] = lambda checked, problem: None,
    period: float = 3600.0,
    room: Callable[[], bool] = lambda: True,
    held: Callable[[], None] = lambda: None,
) -> HealthChecks:
    return HealthChecks(is_healthy, networks, failed, period=period, room=room, held=held)


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


async def eventually(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)


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
        checks = health_checks(is_healthy=lambda: healthy)
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
        checks = health_checks("127.0.0.0/8")
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
            checks = health_checks("127.0.0.1/32", failed=lambda *args: told.append(args))
            async with running(checks):
                checks.publish(snapshot(port, HERE))
                await eventually(lambda: told)
        [(checked, problem)] = told
        assert checked == WEB
        assert problem.startswith(f"shop/web: healthCheckNodePort: cannot listen on 127.0.0.1:{port}: Address already")

    run(main())


def both(first: int, second: int) -> Snapshot:
    """Two Services, each with its port."""
    api = ServicePortName("shop", "api", "http")
    other = dataclasses.replace(SERVICE, health_check_node_port=second)
    made = snapshot(first, HERE)
    return dataclasses.replace(made, services={**made.services, api: other}, endpoints={**made.endpoints, api: (HERE,)})


def test_a_connection_ends_with_its_port_and_no_other(run: Run) -> None:
    async def main() -> None:
        first, second = free_port(), free_port()
        checks = health_checks("127.0.0.1/32")
        async with running(checks) as session:
            checks.publish(both(first, second))
            for port in (first, second):
                await ask(session, port)
            gone, stays = [await asyncio.open_connection("127.0.0.1", port) for port in (first, second)]
            checks.publish(both(0, second))
            assert await asyncio.wait_for(gone[0].read(), 10) == b""
            stays[1].write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"200 OK" in await stays[0].readline()
            for _, writer in (gone, stays):
                writer.close()
                with contextlib.suppress(ConnectionError):
                    await writer.wait_closed()

    run(main())


def test_clients_of_all_ports_are_limited_together(run: Run) -> None:
    async def main() -> None:
        ports = free_port(), free_port()
        checks = health_checks("127.0.0.1/32")
        async with running(checks) as session:
            checks.publish(both(*ports))
            for port in ports:
                await ask(session, port)
            crowd = [
                await asyncio.open_connection("127.0.0.1", ports[number % 2]) for number in range(CONNECTIONS + 20)
            ]
            assert (await ask(session, ports[0]))[0] == 200
            assert await asyncio.gather(*(reader.read() for reader, _ in crowd[:20])) == [b""] * 20
        for _, writer in crowd:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    run(main())


def test_descriptors_are_counted_and_limited(run: Run) -> None:
    async def main() -> None:
        first, second = free_port(), free_port()
        most = CONNECTIONS + 1
        counts: list[int] = []
        told: list[tuple[Checked, str]] = []
        checks = health_checks(
            "127.0.0.1/32",
            failed=lambda *args: told.append(args),
            period=0.05,
            room=lambda: checks.descriptors < most,
            held=lambda: counts.append(checks.descriptors),
        )
        async with running(checks) as session:
            checks.publish(both(first, second))
            await eventually(lambda: told)
            [(checked, problem)] = told
            port, other = (first, second) if checked.name == "api" else (second, first)
            assert problem == (
                f"shop/{checked.name}: healthCheckNodePort: no descriptors are left to listen on port {other}; "
                "allow more (ulimit -n)"
            )
            assert (await ask(session, port))[0] == 200
            assert counts[-1] == CONNECTIONS + 1
            await eventually(lambda: len(counts) > 2)
            assert len(told) == 1, "once"
            most += 1
            assert (await ask(session, other))[0] == 200
            assert counts[-1] == CONNECTIONS + 2
            checks.publish(Snapshot())
            await eventually(lambda: counts[-1] == 0)

    run(main())


@pytest.mark.privileged
def test_listeners_follow_the_hosts_addresses(run: Run) -> None:
    async def main(node: Namespace) -> None:
        checks = health_checks("10.9.0.0/16", period=0.05)
        counts: list[int] = []
        async with running(checks) as session:
            node.add_address("lo", "10.9.0.1/32")
            checks.publish(snapshot(30100, HERE))
            assert (await ask(session, 30100, "10.9.0.1"))[0] == 200
            node.add_address("lo", "10.9.0.2/32")
            assert (await ask(session, 30100, "10.9.0.2"))[0] == 200
            counts.append(checks.descriptors)
            node.run("ip addr del 10.9.0.1/32 dev lo")
            await eventually(lambda: checks.descriptors < counts[0])
            assert (await ask(session, 30100, "10.9.0.2"))[0] == 200

    with Namespace() as node, node.entered():
        run(main(node))


def test_the_body_is_json_whatever_is_in_it() -> None:
    assert json.loads(body(Checked("a", 'b"', ()), 0, healthy=False))["service"]["name"] == 'b"'
