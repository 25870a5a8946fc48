"""From snapshots to sockets and redirects: real sockets, a capture that keeps what it is told."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest

from tests.fakes import RecordingCapture
from tests.proxy import address, listener
from userspace_proxy import proxier as proxier_module
from userspace_proxy.capture.base import Difference
from userspace_proxy.config import PortRange
from userspace_proxy.metrics import Metrics, Outcome, open_descriptors
from userspace_proxy.model import (
    Endpoint,
    IPFamily,
    PortalKind,
    Protocol,
    Redirect,
    ServicePort,
    ServicePortName,
    SessionAffinity,
    Snapshot,
    SocketKey,
)
from userspace_proxy.poller import Poller
from userspace_proxy.proxier import Proxier
from userspace_proxy.sockets.base import Descriptors
from userspace_proxy.sockets.tcp import TCPSockets
from userspace_proxy.sockets.udp import UDPSockets

Run = Callable[[Coroutine[Any, Any, Any]], Any]

WEB = ServicePortName("default", "web", "http")
API = ServicePortName("default", "api")
ALIVE = (Endpoint("127.0.0.1", 9),)


def tcp(ip: str = "127.96.0.1", port: int = 80, **more: Any) -> ServicePort:
    return ServicePort(more.pop("protocol", Protocol.TCP), port, (ip,), **more)


class Bench:
    """A proxier on real sockets, whose loop runs in the background."""

    def __init__(self, capture: RecordingCapture, proxier: Proxier, metrics: Metrics) -> None:
        self.capture = capture
        self.proxier = proxier
        self.metrics = metrics

    async def publish(self, services: dict[Any, ServicePort], endpoints: dict[Any, Any] | None = None) -> None:
        """Publish and wait for the sync that answers it."""
        self.proxier.publish(Snapshot(services, endpoints or {}))
        await self.synced()

    async def synced(self) -> None:
        await self.until(lambda: self.proxier.progress.waiting_since is None)

    async def until(self, holds: Callable[[], object]) -> None:
        async with asyncio.timeout(10):
            while not holds():  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.005)

    def row(self, name: ServicePortName = WEB) -> dict[str, Any]:
        [row] = [r for r in self.proxier.report() if (r["name"], r["port"]) == (name.name, name.port)]
        return row

    def redirects(self) -> dict[tuple[str, int, PortalKind], int]:
        return {(r.portal.ip, r.portal.port, r.portal.kind): r.proxy_port for r in self.capture.redirects}


@contextlib.asynccontextmanager
async def bench(
    port_range: PortRange | None = None, *, min_sync_period: float = 0.0, sync_period: float = 60.0
) -> AsyncIterator[Bench]:
    before = open_descriptors()
    poller = Poller(asyncio.get_running_loop())
    metrics = Metrics()
    descriptors = Descriptors(1000)
    sockets = {
        Protocol.TCP: TCPSockets(poller, descriptors, metrics, splice=True, half_close_timeout=60.0),
        Protocol.UDP: UDPSockets(poller, descriptors, idle_timeout=1.0, max_flows=100),
    }
    capture = RecordingCapture()
    proxier = Proxier(
        capture,
        sockets,
        metrics,
        bind_address="0.0.0.0",
        port_range=port_range or PortRange(20000, 29999),
        sync_period=sync_period,
        min_sync_period=min_sync_period,
        rng=random.Random(1),
    )
    async with asyncio.TaskGroup() as tasks:
        loop = tasks.create_task(proxier.run())
        try:
            yield Bench(capture, proxier, metrics)
        finally:
            loop.cancel()
    for kind in sockets.values():
        kind.end_all(Outcome.DRAIN_TIMEOUT)
    proxier.close()
    poller.close()
    assert open_descriptors() <= before


def connects(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_nothing_happens_before_the_first_snapshot(run: Run) -> None:
    async def main() -> None:
        async with bench() as b:
            await asyncio.sleep(0.05)
            assert b.capture.calls == 0
            assert not b.proxier.progress.first_sync.is_set()
            await b.publish({})
            assert b.proxier.progress.first_sync.is_set()

    run(main())


def test_a_service_port_is_opened_with_all_its_portals(run: Run) -> None:
    async def main() -> None:
        async with bench() as b:
            service = tcp(node_port=30080, external_ips=("127.97.0.1",), load_balancer_ips=("127.98.0.1",))
            await b.publish({WEB: service}, {WEB: ALIVE})
            port = b.row()["proxyPort"]
            assert b.redirects() == {
                ("127.96.0.1", 80, PortalKind.CLUSTER_IP): port,
                ("127.97.0.1", 80, PortalKind.EXTERNAL_IP): port,
                ("127.98.0.1", 80, PortalKind.LOAD_BALANCER_IP): port,
                ("", 30080, PortalKind.NODE_PORT): port,
            }
            assert connects(port)
            assert b.row()["state"] == "serving"
            await b.publish({})
            assert not b.capture.redirects
            assert not connects(port)

    run(main())


def test_no_portal_is_captured_before_its_socket_is_there(run: Run) -> None:
    async def main() -> None:
        async with bench() as b:
            asked: list[bool] = []

            def check(redirects: frozenset[Redirect]) -> None:
                asked.extend(connects(r.proxy_port) for r in redirects | b.capture.redirects)

            b.capture.on_replace = check
            services = {ServicePortName("default", f"s{n}"): tcp(f"127.96.1.{n}") for n in range(5)}
            await b.publish(services, dict.fromkeys(services, ALIVE))
            await b.publish(dict(list(services.items())[2:]), dict.fromkeys(services, ALIVE))
            await b.publish({}, dict.fromkeys(services, ALIVE))
            assert len(asked) == 5 + 5 + 3
            assert all(asked)

    run(main())


def test_endpoints_act_at_once_and_move_no_rule(run: Run) -> None:
    async def main() -> None:
        async with bench(min_sync_period=30) as b:
            services = {WEB: tcp()}
            await b.publish(services)
            port, calls = b.row()["proxyPort"], b.capture.calls
            assert not connects(port)
            for _ in range(3):
                b.proxier.publish(Snapshot(services, {WEB: ALIVE}))
                assert connects(port)
                b.proxier.publish(Snapshot(services, {}))
                assert not connects(port)
            assert b.capture.calls == calls

    run(main())


def test_many_service_changes_make_few_syncs(run: Run) -> None:
    async def main() -> None:
        async with bench(min_sync_period=0.2) as b:
            await b.publish({WEB: tcp()})
            calls = b.capture.calls
            for port in range(1, 51):
                b.proxier.publish(Snapshot({WEB: tcp(port=port)}))
                await asyncio.sleep(0.002)
            await asyncio.sleep(0.5)
            assert b.capture.calls - calls <= 3
            assert list(b.redirects()) == [("127.96.0.1", 50, PortalKind.CLUSTER_IP)]

    run(main())


def test_a_change_of_portals_keeps_the_proxy_port(run: Run) -> None:
    async def main() -> None:
        async with bench() as b:
            await b.publish({WEB: tcp()}, {WEB: ALIVE})
            port = b.row()["proxyPort"]
            await b.publish({WEB: tcp("127.96.0.9", 81, node_port=30081)}, {WEB: ALIVE})
            assert b.row()["proxyPort"] == port
            assert ("127.96.0.9", 81, PortalKind.CLUSTER_IP) in b.redirects()

    run(main())


def test_a_change_of_protocol_and_back(run: Run) -> None:
    async def main() -> None:
        async with bench() as b:
            for protocol in (Protocol.TCP, Protocol.UDP, Protocol.TCP):
                await b.publish({WEB: tcp(protocol=protocol)}, {WEB: ALIVE})
                assert b.row()["protocol"] == protocol
                assert [r.portal.protocol for r in b.capture.redirects] == [protocol]
                assert connects(b.row()["proxyPort"]) is (protocol is Protocol.TCP)

    run(main())


def test_a_protocol_that_is_not_served_stops_nobody(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with bench() as b:
            await b.publish({WEB: tcp(), API: tcp("127.96.0.2", protocol=Protocol.SCTP)}, {WEB: ALIVE})
            assert b.row(WEB)["state"] == "serving"
            assert b.row(API)["state"] == "down"
            assert "SCTP" in b.row(API)["problems"][0]
            await b.publish({WEB: tcp(port=81), API: tcp("127.96.0.2", protocol=Protocol.SCTP)}, {WEB: ALIVE})

    run(main())
    assert sum("SCTP" in r.getMessage() for r in caplog.records) == 1, "the same trouble is logged once"


def test_a_range_of_one_port_serves_one_and_the_other_when_it_is_free(run: Run) -> None:
    async def main() -> None:
        async with bench(PortRange(29990, 29990)) as b:
            services = {WEB: tcp(), API: tcp("127.96.0.2")}
            await b.publish(services, dict.fromkeys(services, ALIVE))
            states = {name: b.row(name)["state"] for name in services}
            assert sorted(states.values()) == ["down", "serving"]
            [down] = [name for name in states if states[name] == "down"]
            assert "--proxy-port-range" in b.row(down)["problems"][0]
            await b.publish({down: services[down]}, dict.fromkeys(services, ALIVE))
            await b.publish({down: tcp("127.96.0.2", 81)}, dict.fromkeys(services, ALIVE))
            assert b.row(down)["state"] == "serving"

    run(main())


def test_a_port_that_is_busy_on_the_host_is_tried_again_at_every_sync(run: Run) -> None:
    async def main() -> None:
        busy = listener()
        number = address(busy)[1]
        async with bench(PortRange(number, number), sync_period=0.05) as b:
            await b.publish({WEB: tcp()}, {WEB: ALIVE})
            assert b.row()["state"] == "down"
            busy.close()
            await b.until(lambda: b.row()["state"] == "serving")
            await b.synced()
            assert b.redirects() == {("127.96.0.1", 80, PortalKind.CLUSTER_IP): number}

    run(main())


def test_a_node_port_is_held_against_others_and_refuses(run: Run) -> None:
    async def main() -> None:
        async with bench() as b:
            await b.publish({WEB: tcp(node_port=30123)}, {WEB: ALIVE})
            with socket.socket() as other, pytest.raises(OSError, match="in use"):
                other.bind(("0.0.0.0", 30123))
            assert not connects(30123)
            await b.publish({WEB: tcp()}, {WEB: ALIVE})
            with socket.socket() as other:
                other.bind(("0.0.0.0", 30123))

    run(main())


def test_a_node_port_in_use_leaves_the_rest_and_comes_when_it_is_free(run: Run) -> None:
    async def main() -> None:
        with socket.socket() as other:
            other.bind(("0.0.0.0", 30124))
            async with bench(sync_period=0.05) as b:
                await b.publish({WEB: tcp(node_port=30124)}, {WEB: ALIVE})
                assert list(b.redirects()) == [("127.96.0.1", 80, PortalKind.CLUSTER_IP)]
                assert "30124" in b.row()["problems"][0]
                other.close()
                await b.until(lambda: ("", 30124, PortalKind.NODE_PORT) in b.redirects())
                await b.until(lambda: b.row()["problems"] == [])

    run(main())


def test_two_services_that_want_one_node_port(run: Run) -> None:
    async def main() -> None:
        async with bench() as b:
            await b.publish({WEB: tcp(node_port=30125)}, {WEB: ALIVE})
            both = {WEB: tcp(node_port=30125), API: tcp("127.96.0.2", node_port=30125)}
            await b.publish(both, {WEB: ALIVE})
            assert b.redirects()[("", 30125, PortalKind.NODE_PORT)] == b.row(WEB)["proxyPort"]
            assert "default/web" in b.row(API)["problems"][0]
            await b.publish({API: both[API]}, {})
            assert b.redirects()[("", 30125, PortalKind.NODE_PORT)] == b.row(API)["proxyPort"]

    run(main())


def test_a_capture_that_fails_is_told_and_tried_again(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with bench(sync_period=0.05) as b:
            b.capture.error = "no more rules today"
            await b.publish({WEB: tcp()}, {WEB: ALIVE})
            assert b.proxier.progress.capture_error == "no more rules today"
            since = b.proxier.progress.troubled_since
            assert since is not None
            assert b.proxier.progress.last_sync is None
            calls = b.capture.calls
            await b.until(lambda: b.capture.calls > calls + 1)
            assert b.proxier.progress.troubled_since == since
            b.capture.error = ""
            await b.until(lambda: b.proxier.progress.capture_error == "")
            assert b.proxier.progress.troubled_since is None
            assert b.proxier.progress.last_sync is not None
            assert len(b.capture.redirects) == 1

    run(main())
    assert sum("no more rules" in r.getMessage() for r in caplog.records) == 1


def test_a_socket_is_not_closed_while_its_redirect_may_still_be_in_force(run: Run) -> None:
    async def main() -> None:
        async with bench(sync_period=0.05) as b:
            await b.publish({WEB: tcp()}, {WEB: ALIVE})
            port = b.row()["proxyPort"]
            b.capture.error = "locked"
            await b.publish({}, {})
            with socket.socket() as other, pytest.raises(OSError, match="in use"):
                other.bind(("0.0.0.0", port))
            b.capture.error = ""
            await b.until(lambda: not b.proxier.descriptors)
            with socket.socket() as other:
                other.bind(("0.0.0.0", port))

    run(main())


def test_an_endpoint_that_is_our_own_place_is_left_out(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with bench() as b:
            services = {WEB: tcp(node_port=30126), API: tcp("127.96.0.2")}
            own = (Endpoint("127.96.0.2", 80), Endpoint("127.0.0.1", 30126), Endpoint("127.0.0.1", 9))
            await b.publish(services, {WEB: own, API: ALIVE})
            assert b.row(WEB)["endpoints"] == ["127.0.0.1:9"]
            # No longer a place of ours, it is an endpoint like any other.
            await b.publish({WEB: services[WEB]}, {WEB: own})
            assert sorted(b.row(WEB)["endpoints"]) == ["127.0.0.1:9", "127.96.0.2:80"]

    run(main())
    assert any("127.96.0.2:80" in r.getMessage() and "own place" in r.getMessage() for r in caplog.records)


def test_affinity_is_switched_on_a_running_service(run: Run) -> None:
    async def main() -> None:
        async with bench() as b:
            endpoints = {WEB: tuple(Endpoint("127.0.0.1", n) for n in (7, 8, 9))}
            await b.publish({WEB: tcp()}, endpoints)
            balancer = next(iter(b.proxier._serving.served.values())).balancer
            assert len({balancer.pick("192.0.2.1") for _ in range(3)}) == 3
            await b.publish({WEB: tcp(affinity=SessionAffinity.CLIENT_IP)}, endpoints)
            assert len({balancer.pick("192.0.2.1") for _ in range(3)}) == 1
            await b.publish({WEB: tcp()}, endpoints)
            assert len({balancer.pick("192.0.2.1") for _ in range(3)}) == 3

    run(main())


def test_label_sets_of_vanished_services_are_dropped(run: Run) -> None:
    async def main() -> None:
        async with bench() as b:
            await b.publish({WEB: tcp()}, {WEB: ALIVE})
            assert b'service="web"' in (await b.metrics.exposition())[0]
            await b.publish({})
            assert b'service="web"' not in (await b.metrics.exposition())[0]

    run(main())


def test_a_fault_in_a_sync_does_not_end_the_loop(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with bench(sync_period=0.05) as b:

            def fault(_: object) -> None:
                raise ZeroDivisionError

            b.capture.on_replace = fault
            b.proxier.publish(Snapshot({WEB: tcp()}, {WEB: ALIVE}))
            await b.until(lambda: b.capture.calls > 1)
            assert b.proxier.progress.last_sync is None
            assert b.proxier.progress.waiting_since is not None
            b.capture.on_replace = lambda _: None
            await b.until(lambda: len(b.capture.redirects) == 1)

    run(main())
    assert any(r.levelno == logging.ERROR and r.exc_info for r in caplog.records)


def test_stopped_it_refuses_everybody_and_nothing_makes_it_listen_again(run: Run) -> None:
    async def main() -> None:
        async with bench(sync_period=0.02) as b:
            await b.publish({WEB: tcp()}, {WEB: ALIVE})
            port = b.row()["proxyPort"]
            b.proxier.stop()
            await b.proxier.settled()
            calls = b.capture.calls
            assert b.capture.redirects, "who is redirected to a port that does not listen is refused at once"
            b.proxier.publish(Snapshot({WEB: tcp(port=81)}, {WEB: (*ALIVE, Endpoint("127.0.0.1", 10))}))
            await asyncio.sleep(0.1)
            assert not connects(port)
            assert b.capture.calls == calls
            await b.proxier.withdraw()
            assert b.capture.withdrawn

    run(main())


def test_both_families_of_one_service_get_a_socket_each(run: Run) -> None:
    async def main() -> None:
        async with bench() as b:
            service = ServicePort(Protocol.TCP, 80, ("127.96.0.1", "fd00::1"), node_port=30127)
            endpoints = (Endpoint("127.0.0.1", 9), Endpoint("::1", 9))
            await b.publish({WEB: service}, {WEB: endpoints})
            rows = {row["family"]: row for row in b.proxier.report()}
            assert rows["IPv4"]["endpoints"] == ["127.0.0.1:9"]
            assert rows["IPv6"]["endpoints"] == ["[::1]:9"]
            assert rows["IPv4"]["proxyPort"] != rows["IPv6"]["proxyPort"]
            assert len(b.capture.redirects) == 4

    run(main())


def test_one_endpoint_change_touches_one_service_port(run: Run) -> None:
    async def main() -> None:
        async with bench(min_sync_period=30) as b:
            services = {
                ServicePortName("default", f"s{n}"): tcp(f"127.96.{n // 250}.{n % 250 + 1}") for n in range(200)
            }
            endpoints: dict[Any, Any] = dict.fromkeys(services, ALIVE)
            await b.publish(services, endpoints)
            touched: list[SocketKey] = []
            original = b.proxier._serving._update

            def spy(key: SocketKey, *rest: Any) -> None:
                touched.append(key)
                original(key, *rest)

            b.proxier._serving._update = spy  # type: ignore[method-assign]
            name = ServicePortName("default", "s7")
            b.proxier.publish(Snapshot(services, endpoints | {name: (Endpoint("127.0.0.1", 10),)}))
            assert [key.name for key in touched] == [name]

    run(main())


def test_health_follows_the_syncs(run: Run) -> None:
    async def main() -> None:
        async with bench() as b:
            progress = b.proxier.progress
            assert progress.waiting_since is None
            b.proxier.publish(Snapshot({WEB: tcp()}))
            assert progress.waiting_since is not None
            before = time.monotonic()
            await b.synced()
            assert progress.waiting_since is None
            assert progress.last_sync is not None
            assert before <= progress.last_sync <= time.monotonic()

    run(main())


MANY = {ServicePortName("default", f"s{n}"): tcp(f"127.96.{n // 250}.{n % 250 + 1}") for n in range(300)}


def test_one_service_change_is_planned_alone_and_told_as_its_difference(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[int] = []
    original = proxier_module.desired

    def spy(services: dict[Any, ServicePort], *rest: Any) -> Any:
        planned.append(len(services))
        return original(services, *rest)

    monkeypatch.setattr(proxier_module, "desired", spy)

    async def main() -> None:
        async with bench() as b:
            await b.publish(MANY)
            name = ServicePortName("default", "s7")
            await b.publish(MANY | {name: tcp("127.96.0.8", 81)})
            await b.publish({key: value for key, value in MANY.items() if key != name})
            assert planned == [300, 1, 0]
            assert b.capture.whole == 1
            assert len(b.capture.redirects) == 299

    run(main())


def test_only_what_could_not_be_had_is_tried_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[set[ServicePortName]] = []
    original = proxier_module.desired

    def spy(services: dict[ServicePortName, ServicePort], *rest: Any) -> Any:
        planned.append(set(services))
        return original(services, *rest)

    monkeypatch.setattr(proxier_module, "desired", spy)

    async def main() -> None:
        with socket.socket() as other:
            other.bind(("0.0.0.0", 30128))
            async with bench(sync_period=0.05) as b:
                await b.publish({WEB: tcp(node_port=30128), API: tcp("127.96.0.2")})
                planned.clear()
                await b.until(lambda: len(planned) > 1)
                assert all(names == {WEB} for names in planned)

    run(main())


def test_connections_get_their_turn_every_few_steps(run: Run) -> None:
    async def main() -> None:
        async with bench() as b:
            serving = b.proxier._serving
            turns: list[int] = []
            over = False

            def turn() -> None:
                turns.append(len(serving.served) + sum(bool(s.balancer.endpoints) for s in serving.served.values()))
                if not over:
                    asyncio.get_running_loop().call_soon(turn)

            turn()
            await b.publish(MANY)
            b.proxier.publish(Snapshot(MANY, dict.fromkeys(MANY, ALIVE)))
            while not all(s.balancer.endpoints for s in serving.served.values()):  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0)
            await asyncio.sleep(0)
            await b.publish({})
            over = True
            await asyncio.sleep(0)
            assert max(turns) == 600
            assert turns[-1] == 0
            most = max(proxier_module.STEPS_AT_ONCE, proxier_module.CHANGES_AT_ONCE)
            assert max(abs(now - before) for before, now in itertools.pairwise(turns)) <= 2 * most

    run(main())


def test_a_proxy_port_is_no_health_check_port(run: Run) -> None:
    """The Service that has it comes with the others, and a socket of any of them would do."""

    async def main() -> None:
        async with bench(PortRange(20100, 20102)) as b:
            checked = tcp("127.96.0.2", health_check_node_port=20101)
            await b.publish({WEB: tcp(), WEB._replace(name="checked"): checked})
            assert sorted(b.redirects().values()) == [20100, 20102]

    run(main())


def test_what_says_nothing_new_has_all_gone_through_again(run: Run) -> None:
    async def main() -> None:
        async with bench() as b:
            await b.publish({WEB: tcp()})
            calls = b.capture.calls
            b.proxier.publish(Snapshot({WEB: tcp()}))
            assert b.proxier.progress.waiting_since is not None
            await b.synced()
            assert b.capture.calls > calls

    run(main())


def test_changes_that_come_all_the_time_do_not_put_off_the_repair(run: Run) -> None:
    async def main() -> None:
        async with bench(sync_period=0.2) as b:
            repairs = []
            original = b.capture.replace

            async def spy(redirects: Any, difference: Any = None) -> Any:
                if difference == Difference():
                    repairs.append(1)
                return await original(redirects, difference)

            b.capture.replace = spy  # type: ignore[method-assign]
            for port in range(1, 61):
                await b.publish({WEB: tcp(port=port)})
                await asyncio.sleep(0.01)
            assert len(repairs) >= 2

    run(main())


def test_after_a_fault_everything_is_planned_anew(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    faults: list[None] = []

    async def main() -> None:
        async with bench(sync_period=0.05) as b:
            await b.publish({WEB: tcp(), API: tcp("127.96.0.2")}, {WEB: ALIVE})

            def fault(*_: Any) -> None:
                faults.append(None)
                raise ZeroDivisionError

            with monkeypatch.context() as patch:
                patch.setattr(b.proxier._serving, "close", fault)
                b.proxier.publish(Snapshot({API: tcp("127.96.0.2", 81)}, {}))
                await b.until(lambda: faults)
            await b.until(lambda: [key.name for key in b.proxier._serving.served] == [API])
            await b.synced()
            assert [r.portal.port for r in b.capture.redirects] == [81]

    run(main())


def test_a_family_that_is_not_bound_is_told(run: Run) -> None:
    async def main() -> None:
        async with bench() as b:
            b.proxier._bind.pop(IPFamily.IPV6)
            await b.publish({WEB: ServicePort(Protocol.TCP, 80, ("127.96.0.1", "fd00::1"))}, {WEB: ALIVE})
            rows = {row["family"]: row for row in b.proxier.report()}
            assert (rows["IPv4"]["state"], rows["IPv4"]["problems"]) == ("serving", [])
            assert rows["IPv6"]["state"] == "down"
            assert "family IPv6 is not served by this proxy" in rows["IPv6"]["problems"][0]

    run(main())
