"""Open sockets and held ports, step by step."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import random
import socket
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from userspace_proxy.config import PortRange
from userspace_proxy.metrics import Metrics, Outcome
from userspace_proxy.model import (
    Endpoint,
    IPFamily,
    Node,
    Portal,
    PortalKind,
    Preference,
    Protocol,
    Redirect,
    ServicePort,
    ServicePortName,
    SessionAffinity,
    SocketKey,
    TrafficPolicy,
)
from userspace_proxy.plan import LocalPort
from userspace_proxy.poller import Poller
from userspace_proxy.serving import Serving
from userspace_proxy.sockets.base import Descriptors
from userspace_proxy.sockets.tcp import TCPSockets
from userspace_proxy.sockets.udp import UDPSockets

Run = Callable[[Coroutine[Any, Any, Any]], Any]
V4 = IPFamily.IPV4
NAME = ServicePortName("default", "web", "http")
KEY = SocketKey(NAME, V4)
TCP = ServicePort(Protocol.TCP, 80, ("127.96.0.1",))
UDP = ServicePort(Protocol.UDP, 80, ("127.96.0.1",))


@contextmanager
def serving(
    *,
    networks: tuple[str, ...] = (),
    strangers: bool = False,
    room: Callable[[], bool] = lambda: True,
    bind: str = "0.0.0.0",
    ports: tuple[int, int] = (20000, 29999),
) -> Iterator[Serving]:
    poller = Poller(asyncio.get_running_loop())
    metrics, descriptors = Metrics(), Descriptors(100)
    sockets = {
        Protocol.TCP: TCPSockets(poller, descriptors, metrics, splice=False, half_close_timeout=60.0),
        Protocol.UDP: UDPSockets(poller, descriptors, idle_timeout=1.0, max_flows=10),
    }
    made = Serving(
        sockets,
        metrics,
        bind={V4: bind},
        port_range=PortRange(*ports),
        nodeport_networks=networks,
        strangers=strangers,
        room=room,
        max_ejection=10.0,
        clock=time.monotonic,
        rng=random.Random(3),
    )
    yield made
    made.close_all()
    assert made.descriptors == 0
    for kind in sockets.values():
        kind.end_all(Outcome.CLOSED)
    poller.close()


def test_a_node_port_that_we_have_as_proxy_port_is_told_as_ours(run: Run) -> None:
    async def main() -> None:
        with serving() as made:
            assert made.open(KEY, TCP, ())
            port = made.served[KEY].socket.port
            addresses = made.claims.addresses()
            assert not made.claims.hold(LocalPort(V4, Protocol.TCP, port), addresses, KEY)
            [problem] = made.problems.of(KEY)
            assert f"by this proxy, as the proxy port of {NAME}: keep" in problem
            assert made.claims.hold(LocalPort(V4, Protocol.UDP, port), addresses, KEY), "which has ports of its own"
            assert made.descriptors == 2
            assert made.problems.of(KEY) == [problem]

    run(main())


def test_an_endpoint_that_is_our_own_proxy_port_is_left_out(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        with serving(strangers=True) as made:
            assert made.open(KEY, TCP, ())
            port = made.served[KEY].socket.port
            made.follow({NAME: (Endpoint("127.0.0.1", port), Endpoint("127.0.0.1", 9))})
            assert not made.catch_up(1)
            assert made.served[KEY].balancer.endpoints == (("127.0.0.1", 9),)
            assert made.served[KEY].own == (Endpoint("127.0.0.1", port),)
            list(made.recognise_ourselves(anew=True))

    run(main())
    assert sum("own place" in r.getMessage() for r in caplog.records) == 1


def test_what_cannot_serve_is_tried_again(run: Run) -> None:
    """Another program shares the port of a refusing UDP socket for a moment: serving fails, and then works."""

    async def main() -> None:
        with serving() as made:
            assert made.open(KEY, UDP, ())
            served = made.served[KEY]
            claim = served.socket._claim  # type: ignore[attr-defined]
            claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)
            made.follow({NAME: (Endpoint("127.0.0.1", 9),)})
            assert not made.catch_up(1)
            assert list(made.failed) == [KEY]
            assert "cannot be had" in made.problems.of(KEY)[0]
            claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            made.retry()
            assert not made.failed
            assert not made.problems.of(KEY)

    run(main())


def test_what_the_same_sync_solves_is_not_told(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        with serving() as made:
            made.follow({NAME: (Endpoint("127.0.0.1", 9),)})
            assert made.open(KEY, UDP, ())
            for solved in (True, False):
                made.served[KEY].socket.refuse()
                claim = made.served[KEY].socket._claim  # type: ignore[attr-defined]
                claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)
                made.adopt([NAME], {NAME: dataclasses.replace(UDP, port=81 + solved)})
                assert made.failed
                claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(solved))
                made.retry()
                assert bool(made.failed) is bool(made.problems.of(KEY)) is not solved
                assert sum(r.levelname == "WARNING" for r in caplog.records) == (not solved)

    run(main())


@pytest.mark.parametrize(
    ("bind", "node_ports", "told"),
    [
        ("192.0.2.9", (), "give this host the address, or write --bind-address=0.0.0.0 for all that it has"),
        ("0.0.0.0", {25000}, "every port of 25000-25000 is a node port, or taken by a service port"),
    ],
)
def test_no_proxy_port_names_the_flag_that_is_the_reason(run: Run, bind: str, node_ports: set[int], told: str) -> None:
    async def main() -> None:
        with serving(bind=bind, ports=(25000, 25000)) as made:
            assert not made.open(KEY, TCP, node_ports)
            (problem,) = made.problems.of(KEY)
            assert told in problem
            assert ("--proxy-port-range" in problem) is bool(node_ports)

    run(main())


def test_the_report_names_every_service_port(run: Run) -> None:
    async def main() -> None:
        with serving() as made:
            other = ServicePortName("default", "api")
            services = {NAME: TCP, other: UDP}
            made.follow({NAME: (Endpoint("127.0.0.1", 9),)})
            made.open(KEY, TCP, ())
            api, web = made.report(services)
            assert (web["state"], web["endpoints"], web["clusterIPs"]) == (
                "serving",
                ["127.0.0.1:9"],
                ["127.96.0.1:80"],
            )
            assert (api["state"], api["proxyPort"]) == ("down", 0)

    run(main())


def test_endpoints_are_given_out_a_few_at_a_time(run: Run) -> None:
    async def main() -> None:
        with serving() as made:
            names = [ServicePortName("default", f"s{n}") for n in range(10)]
            for name in names:
                assert made.open(SocketKey(name, V4), TCP, ())
            made.follow(dict.fromkeys(names, (Endpoint("127.0.0.1", 9),)))
            assert not [s for s in made.served.values() if s.balancer.endpoints]
            assert made.catch_up(4)
            assert len([s for s in made.served.values() if s.balancer.endpoints]) == 4
            assert made.catch_up(5)
            made.follow(dict.fromkeys(names[1:], (Endpoint("127.0.0.1", 9),)))
            assert not made.catch_up(5)
            assert len([s for s in made.served.values() if s.balancer.endpoints]) == 9

    run(main())


def test_places_are_looked_for_among_endpoints_when_they_change_and_when_asked(run: Run) -> None:
    async def main() -> None:
        with serving() as made:
            place = (V4, Protocol.TCP, "10.96.0.9", 80)
            assert made.open(KEY, TCP, ())
            made.follow({NAME: (Endpoint("10.96.0.9", 80), Endpoint("127.0.0.1", 9))})
            assert not made.catch_up(1)
            list(made.recognise_ourselves())
            looks: list[SocketKey] = []
            original = made._own_among

            def spy(key: SocketKey, *rest: Any) -> Any:
                looks.append(key)
                return original(key, *rest)

            made._own_among = spy  # type: ignore[method-assign]
            made.own([place])
            list(made.recognise_ourselves())
            assert looks
            assert made.served[KEY].balancer.endpoints == (("127.0.0.1", 9),)
            looks.clear()
            made.own([place])
            list(made.recognise_ourselves())
            assert not looks, "nothing new"
            made.own((), no_more=[place])
            list(made.recognise_ourselves())
            assert len(made.served[KEY].balancer.endpoints) == 2
            looks.clear()
            list(made.recognise_ourselves(anew=True))
            assert looks

    run(main())


def test_descriptors_are_left_for_connections(run: Run) -> None:
    async def main() -> None:
        with serving(room=lambda: made.descriptors < 1) as made:
            assert made.open(KEY, TCP, ())
            other = SocketKey(ServicePortName("default", "api"), V4)
            assert not made.open(other, TCP, ())
            assert "ulimit -n" in made.problems.of(other)[0]
            made.close(KEY)
            assert made.open(other, TCP, ())

    run(main())


def test_what_is_wrong_with_every_port_is_tried_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        with serving() as made:
            tries = []

            def none_left(*_: object) -> None:
                tries.append(1)
                raise OSError(errno.EMFILE, "Too many open files")

            monkeypatch.setattr(made._sockets[Protocol.TCP], "open", none_left)
            assert not made.open(KEY, TCP, ())
            assert len(tries) == 1
            assert "Too many open files" in made.problems.of(KEY)[0]

    run(main())


LOCAL_KEY = KEY._replace(policy=TrafficPolicy.LOCAL)
HERE, THERE = Endpoint("127.0.0.1", 9, node="n1"), Endpoint("127.0.0.2", 9, node="n2")


def states(made: Serving, service: ServicePort = TCP) -> dict[str, object]:
    return {str(row["scope"]): row["state"] for row in made.report({NAME: service})}


@pytest.mark.parametrize("service", [TCP, UDP])
def test_a_local_scope_serves_keeps_silent_or_refuses(run: Run, service: ServicePort) -> None:
    async def main() -> None:
        with serving() as made:
            assert made.open(KEY, service, ())
            assert made.open(LOCAL_KEY, service, ())
            cluster, local = made.served[KEY].balancer, made.served[LOCAL_KEY].balancer
            for endpoints, state in (((HERE, THERE), "serving"), ((THERE,), "silent"), ((), "refusing")):
                made.follow({NAME: endpoints}, Node("n1"))
                made.catch_up(9)
                assert set(cluster.endpoints) == {e.address for e in endpoints}
                assert set(local.endpoints) == {e.address for e in endpoints if e.node == "n1"}
                assert states(made, service) == {"": "serving" if endpoints else "refusing", "local endpoints": state}

    run(main())


def test_another_node_or_zone_has_other_endpoints(run: Run) -> None:
    async def main() -> None:
        with serving() as made:
            service = dataclasses.replace(TCP, preference=Preference.ZONE)
            assert made.open(KEY, service, ())
            endpoints = {
                NAME: tuple(Endpoint(f"127.0.0.{number}", 9, zone=zone) for number, zone in enumerate("ab", 1))
            }
            for node, ips in (
                (None, {"127.0.0.1", "127.0.0.2"}),
                (Node("n", "a"), {"127.0.0.1"}),
                (Node("n", "b"), {"127.0.0.2"}),
            ):
                made.follow(endpoints, node)
                made.catch_up(9)
                assert {ip for ip, _ in made.served[KEY].balancer.endpoints} == ips
            made.follow(endpoints, Node("n", "b", leaving=True))
            assert not made.catch_up(0), "nothing to do"
            # And when the Service changes its mind.
            made.adopt([NAME], {NAME: TCP})
            assert len(made.served[KEY].balancer.endpoints) == 2

    run(main())


def test_scopes_count_together(run: Run) -> None:
    async def main() -> None:
        with serving() as made:
            also_here = Endpoint("127.0.0.1", 10, node="n1")
            made.follow({NAME: (HERE, also_here, THERE)}, Node("n1"))
            service = dataclasses.replace(TCP, affinity=SessionAffinity.CLIENT_IP)
            assert made.open(KEY, service, ())
            assert made.open(LOCAL_KEY, service, ())
            cluster, local = made.served[KEY], made.served[LOCAL_KEY]
            counts = cluster.socket.metrics  # type: ignore[attr-defined]
            assert local.socket.metrics is counts  # type: ignore[attr-defined]
            for times, served in ((2, cluster), (3, local)):
                for _ in range(times):
                    met = served.balancer.pick("192.0.2.1")
                assert served.balancer.failed(met)
            assert (counts.affinity_hits, counts.ejections) == (3, 2)
            made.close(LOCAL_KEY)
            assert (counts.affinity_hits, counts.ejections) == (3, 2), "they only grow"
            assert counts.ejected() == 1
            made.problems.note(LOCAL_KEY, "trouble")
            assert made.problems.of(KEY) == ["trouble"]

    run(main())


def test_each_scope_is_shown_with_the_places_that_lead_to_it(run: Run) -> None:
    async def main() -> None:
        with serving() as made:
            service = dataclasses.replace(
                TCP, node_port=30080, load_balancer_ips=("192.0.2.1",), external_policy=TrafficPolicy.LOCAL
            )
            down = made.report({NAME: service})
            assert [(row["state"], row["scope"], row["nodePort"]) for row in down] == [("down", "", 30080)]
            assert made.open(KEY, service, ())
            assert made.open(LOCAL_KEY, service, ())
            cluster, local = made.report({NAME: service})
            assert cluster["clusterIPs"] == ["127.96.0.1:80"]
            assert local["clusterIPs"] == []
            for row in (cluster, local):  # clients inside come to the one, others to the other
                assert (row["externalIPs"], row["nodePort"]) == (["192.0.2.1:80"], 30080)

    run(main())


def test_what_brings_clients_to_their_sockets(run: Run) -> None:
    async def main() -> None:
        with serving() as made:
            assert made.open(KEY, TCP, ())
            assert made.open(LOCAL_KEY, TCP, ())
            ports = {key: served.socket.port for key, served in made.served.items()}
            portal = Portal(V4, Protocol.TCP, "", 30080, PortalKind.NODE_PORT)
            outside = made.redirect(portal, LOCAL_KEY)
            assert outside == Redirect(portal, ports[LOCAL_KEY], NAME, ports[KEY])
            assert made.target(outside) == LOCAL_KEY
            assert made.redirect(portal, KEY) == Redirect(portal, ports[KEY], NAME)

    run(main())
