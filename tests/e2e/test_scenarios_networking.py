"""Kubernetes' own end-to-end scenarios for `Networking`, `Conntrack`, `DNS` and `KubeProxy`, each named after it."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator

import pytest

from tests.e2e import programs
from tests.e2e.client import DATAGRAM, connect
from tests.e2e.cluster import (
    ADDRESSES,
    KINDS,
    NODE,
    OTHER_PORT,
    PORT,
    STREAM,
    Cluster,
    Service,
    endpoint,
    met,
    node_object,
    reaches,
)
from tests.e2e.node import port
from tests.e2e.test_scenarios_loadbalancers import one_port
from tests.netns import eventually

pytestmark = pytest.mark.privileged

ALL = ("one", "two", "far")


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> int:
    """http and udp, as each granular check is made."""
    return KINDS[request.param]


def served(cluster: Cluster, *names: str) -> Service:
    web = cluster.service()
    web.served_by(*names)
    return web


class TestGranularChecks:
    def test_function_for_intra_pod_and_node_pod_communication(self, cluster: Cluster, kind: int) -> None:
        """No Service takes part, and nobody is in the way."""
        for client in (cluster.one, cluster.far, cluster.host):
            for name in ALL:
                assert met(client, ADDRESSES[name], PORT, kind) == name

    @pytest.mark.parametrize("client", ["one", "host", "far"], ids=["pod-Service", "node-Service", "endpoint-Service"])
    def test_function_for(self, cluster: Cluster, client: str, kind: int) -> None:
        web, place = served(cluster, *ALL), cluster.place(client)
        reaches(place, web.ip, *ALL, kind=kind)
        reaches(place, ADDRESSES["host"], *ALL, number=web.node_port, kind=kind)

    def test_function_for_multiple_endpoint_services_with_same_selector(self, cluster: Cluster, kind: int) -> None:
        first, second = served(cluster, *ALL), served(cluster, *ALL)
        for web in (first, second):
            reaches(cluster.one, web.ip, *ALL, kind=kind)
        first.delete()
        eventually(lambda: met(cluster.one, first.ip, kind=kind) not in ADDRESSES)
        reaches(cluster.one, second.ip, *ALL, kind=kind)

    def test_function_for_service_endpoints_using_host_network(self, cluster: Cluster, kind: int) -> None:
        web = served(cluster, "host")
        for client in (cluster.one, cluster.host, cluster.far):
            reaches(client, web.ip, "host", kind=kind)

    def test_function_for_client_ip_based_session_affinity(self, cluster: Cluster, kind: int) -> None:
        web = served(cluster, *ALL)
        web.put(sessionAffinity="ClientIP")
        eventually(lambda: len({met(cluster.one, web.ip, kind=kind) for _ in range(6)} & set(ALL)) == 1)

    def test_be_able_to_handle_large_requests(self, cluster: Cluster, kind: int) -> None:
        web = served(cluster, *ALL)
        reaches(cluster.one, web.ip, *ALL, kind=kind)
        message = b"x" * 2000
        with connect(cluster.one, web.ip, 80, kind) as client:
            client.send(message)
            found = client.recv(4096)
            while len(found) < len(message):
                found += client.recv(4096)
        assert found.partition(b":")[2] == message

    def test_update_endpoints(self, cluster: Cluster, kind: int) -> None:
        web = served(cluster, *ALL)
        reaches(cluster.one, web.ip, *ALL, kind=kind)
        web.served_by("one", "far")
        reaches(cluster.one, web.ip, "one", "far", kind=kind)
        web.served_by("one", "far", target=OTHER_PORT)
        reaches(cluster.one, web.ip, "one", "far", kind=kind)

    def test_update_node_port(self, cluster: Cluster, kind: int) -> None:
        web = served(cluster, *ALL)
        host = ADDRESSES["host"]
        reaches(cluster.outside, host, *ALL, number=web.node_port, kind=kind)
        former, web.node_port = web.node_port, web.node_port + 2000
        web.put()
        reaches(cluster.outside, host, *ALL, number=web.node_port, kind=kind)
        eventually(lambda: met(cluster.outside, host, former, kind) not in ALL)

    def test_localhost_node_port_reaches_local_and_remote_endpoints(self, cluster: Cluster, kind: int) -> None:
        web = served(cluster, "one", "far")
        reaches(cluster.host, "127.0.0.1", "one", "far", number=web.node_port, kind=kind)
        web.put(sessionAffinity="ClientIP")
        eventually(lambda: len({met(cluster.host, "127.0.0.1", web.node_port, kind) for _ in range(6)}) == 1)


class TestConntrack:
    @pytest.mark.parametrize("way", ["NodePort", "ClusterIP"])
    def test_preserve_udp_traffic_when_server_pod_cycles_for_a_service(self, cluster: Cluster, way: str) -> None:
        web = served(cluster, "one")
        ip, number = (web.ip, 80) if way == "ClusterIP" else (ADDRESSES["host"], web.node_port)
        reaches(cluster.far, ip, "one", number=number, kind=DATAGRAM)
        with one_port(cluster.far, ip, number) as ask:
            assert ask() == "one"
            web.served_by("two")
            eventually(lambda: ask() == "two")
            web.served_by()
            eventually(lambda: ask() == "")
            web.served_by("one")
            eventually(lambda: ask() == "one")

    def test_preserve_udp_traffic_when_initial_unready_endpoints_get_ready(self, cluster: Cluster) -> None:
        web = cluster.service()
        web.served_by(endpoint("one", ready=False))
        with one_port(cluster.far, web.ip, 80) as ask:
            assert ask() == ""
            eventually(lambda: met(cluster.far, web.ip, kind=DATAGRAM) == "refused")
            web.served_by("one")
            eventually(lambda: ask() == "one")

    def test_proxy_implementation_should_not_be_vulnerable_to_the_invalid_conntrack_state_bug(
        self, cluster: Cluster
    ) -> None:
        """Segments that conntrack holds for invalid, and does not translate, end no connection on either leg."""
        web = served(cluster, "far")
        reaches(cluster.one, web.ip, "far")
        with connect(cluster.one, web.ip, 80) as client:
            for _ in range(3):
                with cluster.one.entered():
                    send_out_of_window(client)
                client.send(b"still there")
                assert client.recv(100) == b"far:still there"


def send_out_of_window(client: socket.socket) -> None:
    """An ACK far from what the connection is at, as a late duplicate would be."""
    (ip, number), (peer, peer_number) = client.getsockname(), client.getpeername()
    header = struct.pack("!HHIIBBHHH", number, peer_number, 1, 1, 5 << 4, 0x10, 1024, 0, 0)
    pseudo = socket.inet_aton(ip) + socket.inet_aton(peer) + struct.pack("!BBH", 0, socket.IPPROTO_TCP, len(header))
    total = sum(struct.unpack(f"!{(len(pseudo) + len(header)) // 2}H", pseudo + header))
    total = (total & 0xFFFF) + (total >> 16)
    checksum = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw:
        raw.sendto(header[:16] + struct.pack("!H", checksum) + header[18:], (peer, 0))


@pytest.fixture
def dns(cluster: Cluster) -> Iterator[Service]:
    """The cluster's DNS, by an address of its own, over UDP and TCP."""
    programs.start_dnsmasq(cluster.two)
    programs.await_listener(cluster.two, programs.PORTS["dns"])
    web = cluster.service(ports=[port(53, name="tcp"), port(53, name="udp", protocol="UDP")])
    web.served_by("two", ports={"tcp": programs.PORTS["dns"], "udp": programs.PORTS["dns"]})
    for protocol in ("tcp", "udp"):
        eventually(lambda found=protocol: cluster.node.captures(web.ip, 53, found))
    eventually(lambda: all(cluster.node.rows()[f"{web.name}:{name}"]["endpoints"] for name in ("tcp", "udp")))
    return web


def test_dns_should_provide_dns_for_services(cluster: Cluster, dns: Service) -> None:
    for client in (cluster.one, cluster.host):
        assert programs.dig(client, dns.ip, 53, "web.test") == ["192.0.2.80"]
        assert programs.dig(client, dns.ip, 53, "+tcp web.test") == ["192.0.2.80"]
        assert len(programs.dig(client, dns.ip, 53, "long.test TXT")) == 1


def test_networking_should_check_kube_proxy_urls(cluster: Cluster) -> None:
    assert set(json.loads(cluster.node.get("/healthz", 10256))) >= {"lastUpdated", "currentTime"}
    assert cluster.node.get("/proxyMode") == "userspace"


def test_the_node_hears_that_its_proxy_starts(cluster: Cluster) -> None:
    eventually(lambda: cluster.api.made)
    path, event = cluster.api.made[0]
    assert path == "/apis/events.k8s.io/v1/namespaces/default/events"
    assert (event["reason"], event["regarding"]["name"]) == ("Starting", NODE)


def test_a_node_that_is_being_deleted_is_no_place_for_new_clients(cluster: Cluster) -> None:
    cluster.api.put(node_object(deletionTimestamp="2026-11-21T12:00:00Z"))
    eventually(lambda: not json.loads(cluster.node.get("/healthz", 10256))["nodeEligible"])
    assert cluster.node.get("/readyz", 10256) == "ok"
    cluster.api.put(node_object())
    eventually(lambda: json.loads(cluster.node.get("/healthz", 10256))["nodeEligible"])


@pytest.mark.captures("iptables", "local", why="under nftables they are back before anybody could miss them")
def test_networking_should_recreate_its_iptables_rules_if_they_are_deleted(cluster: Cluster) -> None:
    web = served(cluster, "one")
    reaches(cluster.far, web.ip, "one")
    is_local = cluster.node.capture == "local"
    cluster.host.run(
        "ip route flush table local proto 117" if is_local else "iptables-legacy -t nat -F KUBE-PORTALS-CONTAINER"
    )
    assert met(cluster.far, web.ip) != "one"
    reaches(cluster.far, web.ip, "one")


def test_networking_should_run_iperf2(cluster: Cluster) -> None:
    """By iperf3, through a Service; what was sent has arrived, but for what was under way when time was up."""
    cluster.two.spawn(f"iperf3 --server --port {programs.PORTS['iperf3']} --logfile /dev/null")
    web = cluster.service(ports=[port(5201, name="iperf")])
    web.served_by("two", ports={"iperf": programs.PORTS["iperf3"]})
    eventually(lambda: cluster.node.captures(web.ip, 5201))
    report = programs.iperf3(cluster.two, cluster.one, web.ip, 5201, "--bytes 20M")
    assert report["sum_sent"]["bytes"] >= 20 * 1024 * 1024
    assert 0 < report["sum_received"]["bytes"] <= report["sum_sent"]["bytes"]


def test_host_port_validates_that_there_is_no_conflict_between_different_host_ip_and_protocol(
    cluster: Cluster,
) -> None:
    """Three servers on one port of the node, by address and protocol, are none of ours and stay so."""
    with cluster.host.entered():
        first = socket.create_server((ADDRESSES["host"], 30999))
        second = socket.create_server(("10.1.9.1", 30999))
        third = socket.socket(socket.AF_INET, DATAGRAM)
        third.bind(("10.1.9.1", 30999))
    with first, second, third:
        for ip, server in ((ADDRESSES["host"], first), ("10.1.9.1", second)):
            with connect(cluster.one, ip, 30999, STREAM) as client:
                taken, _ = server.accept()
                taken.sendall(ip.encode())
                taken.close()
                assert client.recv(100) == ip.encode()
        with connect(cluster.one, "10.1.9.1", 30999, DATAGRAM) as sender:
            sender.send(b"hi")
            third.settimeout(5)
            assert third.recv(100) == b"hi"


@pytest.mark.captures("iptables", "nftables", why="without netfilter there is no conntrack to tune")
def test_kube_proxy_should_set_tcp_close_wait_timeout(cluster: Cluster) -> None:
    assert int(cluster.host.run("cat /proc/sys/net/netfilter/nf_conntrack_tcp_timeout_close_wait")) == 3600


def test_service_endpoints_latency_should_not_be_very_high(cluster: Cluster) -> None:
    """No figure is promised here, but that endpoints wait for no sync: rules move for none of them."""
    webs = [served(cluster, "one") for _ in range(10)]
    for web in webs:
        reaches(cluster.far, web.ip, "one")
    captured = cluster.node.captured()
    for web in webs:
        web.served_by("two")
    for web in webs:
        reaches(cluster.far, web.ip, "two")
    assert cluster.node.captured() == captured
