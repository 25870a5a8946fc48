"""Kubernetes' own end-to-end scenarios for `LoadBalancers`, each a test named after it.

There is no load balancer: it would send to the node what clients send to its address, and so the client outside does.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.client import DATAGRAM, connect
from tests.e2e.cluster import (
    ADDRESSES,
    OTHER_PORT,
    REFUSED,
    SILENT,
    STREAM,
    Cluster,
    Service,
    endpoint,
    lives,
    met,
    reaches,
    terminating,
)
from tests.e2e.node import Object, port
from tests.netns import Namespace, eventually

pytestmark = pytest.mark.privileged

LOCAL: dict[str, Any] = {"externalTrafficPolicy": "Local"}
STICKY: dict[str, Any] = {"sessionAffinity": "ClientIP"}


def served(cluster: Cluster, *endpoints: str | Object, **spec: Any) -> Service:
    web = cluster.service(**spec)
    web.served_by(*endpoints)
    return web


@pytest.mark.parametrize("kind", [STREAM, DATAGRAM], ids=["TCP", "UDP"])
def test_change_the_type_and_ports_of_a_service(cluster: Cluster, kind: int) -> None:
    web = served(cluster, "one", type="ClusterIP", ports=[port(80, name="http"), port(80, name="udp", protocol="UDP")])
    reaches(cluster.two, web.ip, "one", kind=kind)
    web.put(type="NodePort")
    reaches(cluster.outside, ADDRESSES["host"], "one", number=web.node_port, kind=kind)
    web.put()
    reaches(cluster.outside, web.ingress, "one", kind=kind)
    former, web.node_port = web.node_port, web.node_port + 1000
    web.put()
    reaches(cluster.outside, ADDRESSES["host"], "one", number=web.node_port, kind=kind)
    eventually(lambda: not lives(cluster.outside, ADDRESSES["host"], former, kind))
    web.put(ports=[p | {"port": 81} for p in web.ports])
    reaches(cluster.outside, web.ingress, "one", number=81, kind=kind)
    assert not lives(cluster.outside, web.ingress, 80, kind)


@pytest.mark.parametrize("kind", [STREAM, DATAGRAM], ids=["TCP", "UDP"])
@pytest.mark.parametrize("policy", ["Local", "Cluster"])
def test_only_allow_access_from_service_loadbalancer_source_ranges(cluster: Cluster, policy: str, kind: int) -> None:
    web = served(cluster, "one", loadBalancerSourceRanges=["10.1.0.3/32"], externalTrafficPolicy=policy)
    reaches(cluster.two, web.ingress, "one", kind=kind)
    reaches(cluster.outside, web.ingress, SILENT, kind=kind)
    reaches(cluster.far, web.ingress, SILENT, kind=kind)
    # They are about the load balancer's address, and no other.
    reaches(cluster.outside, ADDRESSES["host"], "one", number=web.node_port, kind=kind)
    reaches(cluster.far, web.ip, "one", kind=kind)
    web.put(loadBalancerSourceRanges=["10.2.0.0/16"], externalTrafficPolicy=policy)
    reaches(cluster.outside, web.ingress, "one", kind=kind)
    reaches(cluster.two, web.ingress, SILENT, kind=kind)
    web.put(externalTrafficPolicy=policy)
    reaches(cluster.two, web.ingress, "one", kind=kind)


@pytest.mark.parametrize("policy", ["Local", "Cluster"])
def test_have_and_switch_session_affinity_with_traffic_policy(cluster: Cluster, policy: str) -> None:
    web = served(cluster, "one", "two", **STICKY, externalTrafficPolicy=policy)
    eventually(lambda: lives(cluster.outside, web.ingress))
    assert len({met(cluster.outside, web.ingress) for _ in range(6)}) == 1
    web.put(externalTrafficPolicy=policy)
    reaches(cluster.outside, web.ingress, "one", "two")
    web.put(**STICKY, externalTrafficPolicy=policy)
    eventually(lambda: len({met(cluster.outside, web.ingress) for _ in range(6)}) == 1)


def test_create_load_balancer_service_without_node_port_and_change_it(cluster: Cluster) -> None:
    web = served(cluster, "one", ports=[port(80, name="http")], allocateLoadBalancerNodePorts=False)
    reaches(cluster.outside, web.ingress, "one")
    assert not lives(cluster.outside, ADDRESSES["host"], web.node_port)
    web.put()
    reaches(cluster.outside, ADDRESSES["host"], "one", number=web.node_port)


@pytest.mark.parametrize("successor", ["two", "far"], ids=["on the same node", "on different nodes"])
def test_preserve_udp_traffic_when_server_pod_cycles(cluster: Cluster, successor: str) -> None:
    web = served(cluster, "one")
    reaches(cluster.outside, web.ingress, "one", kind=DATAGRAM)
    with one_port(cluster.outside, web.ingress, 80) as ask:
        assert ask() == "one"
        web.served_by()
        eventually(lambda: ask() != "one")
        web.served_by(successor)
        eventually(lambda: ask() == successor)


@contextlib.contextmanager
def one_port(client: Namespace, ip: str, number: int) -> Iterator[Any]:
    """Asks again and again from one source port, as a client does that knows of nothing."""
    with connect(client, ip, number, DATAGRAM, timeout=0.3) as sock:

        def ask() -> str:
            try:
                sock.send(b"hi")
                return sock.recv(100).decode().partition(":")[0]
            except OSError:
                return ""

        yield ask


@pytest.mark.parametrize("policy", ["Cluster", "Local"])
def test_not_have_connectivity_disruption_during_rolling_update(cluster: Cluster, policy: str) -> None:
    web = served(cluster, "one", externalTrafficPolicy=policy)
    reaches(cluster.outside, web.ingress, "one")
    over = threading.Event()
    failed: list[str] = []
    asked = 0

    def ask_on() -> None:
        nonlocal asked
        while not over.is_set():
            asked += 1
            if (name := met(cluster.outside, web.ingress)) not in ("one", "two"):
                failed.append(name)

    client = threading.Thread(target=ask_on)
    client.start()
    for _ in range(5):
        for old, new in (("one", "two"), ("two", "one")):
            web.served_by(old, endpoint(new, ready=False))
            web.served_by(old, new)
            web.served_by(terminating(old), new)
            web.served_by(new)
            reaches(cluster.outside, web.ingress, new)
    over.set()
    client.join()
    assert asked > 10
    assert failed == []


class TestExternalTrafficPolicyLocal:
    @pytest.mark.parametrize("kind", [STREAM, DATAGRAM], ids=["TCP", "UDP"])
    def test_work_for_type_load_balancer(self, cluster: Cluster, kind: int) -> None:
        """But for the client's address, which an endpoint does not see."""
        web = served(cluster, "one", "far", **LOCAL)
        reaches(cluster.outside, web.ingress, "one", kind=kind)

    @pytest.mark.parametrize("kind", [STREAM, DATAGRAM], ids=["TCP", "UDP"])
    def test_work_for_type_node_port(self, cluster: Cluster, kind: int) -> None:
        web = served(cluster, "two", "far", type="NodePort", **LOCAL)
        reaches(cluster.outside, ADDRESSES["host"], "two", number=web.node_port, kind=kind)

    @pytest.mark.parametrize("kind", [STREAM, DATAGRAM], ids=["TCP", "UDP"])
    def test_only_target_nodes_with_endpoints(self, cluster: Cluster, kind: int) -> None:
        """Without an endpoint here clients hear nothing and may try another node; without any at all, a refusal."""
        web = served(cluster, "far", healthCheckNodePort=0, **LOCAL)
        for ip, number in ((web.ingress, 80), (ADDRESSES["host"], web.node_port)):
            reaches(cluster.outside, ip, SILENT, number=number, kind=kind)
        web.served_by("far", "one")
        reaches(cluster.outside, web.ingress, "one", kind=kind)
        web.served_by()
        reaches(cluster.outside, web.ingress, REFUSED, kind=kind)

    @pytest.mark.captures("iptables", "nftables", why="who listens at the address itself takes everybody for outside")
    def test_work_from_pods(self, cluster: Cluster) -> None:
        """With no endpoint on the node as well: who is inside needs no load balancer to choose the node."""
        web = served(cluster, "far", **LOCAL)
        for client in (cluster.one, cluster.host):
            reaches(client, web.ingress, "far")
            reaches(client, ADDRESSES["host"], "far", number=web.node_port)
        reaches(cluster.one, web.ingress, "far", kind=DATAGRAM)

    def test_handle_updates_to_external_traffic_policy_field(self, cluster: Cluster) -> None:
        web = served(cluster, "one", "far", **LOCAL, healthCheckNodePort=31998)
        reaches(cluster.outside, web.ingress, "one")
        eventually(lambda: listens(cluster, 31998))
        web.put(externalTrafficPolicy="Cluster")
        reaches(cluster.outside, web.ingress, "one", "far")
        eventually(lambda: not listens(cluster, 31998))
        with connect(cluster.outside, web.ingress, 80) as kept:
            web.put(**LOCAL, healthCheckNodePort=31998)
            reaches(cluster.outside, web.ingress, "one")
            kept.send(b"still there")
            assert kept.recv(100).endswith(b":still there")
        web.served_by("one", target=OTHER_PORT)
        reaches(cluster.outside, web.ingress, "one")


def listens(cluster: Cluster, number: int) -> bool:
    return f":{number} " in cluster.host.run("ss -Hlnt")


def test_not_the_client_but_the_node_is_what_an_endpoint_sees(cluster: Cluster) -> None:
    web = served(cluster, "one", **LOCAL)
    reaches(cluster.outside, web.ingress, "one")
    with connect(cluster.outside, web.ingress, 80) as client:
        client.send(b"who?")
        assert client.recv(100) == f"one:{ADDRESSES['host']}".encode()
