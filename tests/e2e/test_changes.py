"""Changes while it serves: endpoints come and go, Services change their type, ports and addresses."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import programs
from tests.e2e.client import DATAGRAM, answer
from tests.e2e.node import Node, Object, endpoints, port, service
from tests.netns import Namespace, eventually

pytestmark = pytest.mark.privileged

ENDPOINT = Path(__file__).with_name("endpoint.py")
IPS = ["10.96.0.10", "fd00:96::10"]
HTTP, DNS = port(80, name="http", node_port=30080), port(53, name="dns", protocol="UDP", node_port=30053)
CONNECTION_REFUSED = 7
"""curl's exit status."""


@pytest.fixture
def node(tmp_path: Path, capture: str) -> Iterator[Node]:
    with Node(tmp_path, capture) as made:
        for limit in ("ipv4/icmp_ratelimit", "ipv6/icmp/ratelimit"):  # else the seventh refusal of a second is silent
            made.net.run(f"sh -c 'echo 0 >/proc/sys/net/{limit}'")
        yield made


@pytest.fixture
def server(node: Node, tmp_path: Path) -> Namespace:
    found = node.pod("10.1.0.2", "fd01::2")
    programs.start_nginx(found, tmp_path / "nginx")
    programs.start_dnsmasq(found)
    for name in ("http", "dns"):
        programs.await_listener(found, programs.PORTS[name])
    return found


@pytest.fixture
def pod(node: Node, server: Namespace) -> Namespace:
    return node.pod("10.1.0.3", "fd01::3")


def web(*ports: Object, **spec: object) -> Object:
    return service("web", IPS, list(ports or (HTTP, DNS)), **spec)


def slices(*, ready: bool = True) -> list[Object]:
    found = []
    for ip in ("10.1.0.2", "[fd01::2]"):
        for name, protocol in (("http", "TCP"), ("dns", "UDP")):
            address = f"{ip}:{programs.PORTS[name]}"
            found.append(endpoints("web", [address], port_name=name, protocol=protocol, ready=ready))
    return found


def is_served(client: Namespace, ip: str, number: int = 80) -> bool:
    return programs.curl_status(client, ip, number) == 0


def test_without_ready_endpoints_programs_are_refused_at_once(node: Node, server: Namespace, pod: Namespace) -> None:
    node.own("198.51.100.7")
    node.apply(web(externalIPs=["198.51.100.7"]), *slices(ready=False))
    node.start()
    for client in (pod, node.net, server):
        for ip in (*IPS, "198.51.100.7"):
            assert programs.curl_status(client, ip, 80) == CONNECTION_REFUSED
            assert "connection refused" in programs.dig(client, ip, 53, "web.test", check=False)[0]
        for ip in ("10.1.0.1", "fd01::1"):
            assert programs.curl_status(client, ip, 30080) == CONNECTION_REFUSED
            assert "connection refused" in programs.dig(client, ip, 30053, "web.test", check=False)[0]
    assert programs.curl_status(node.net, "127.0.0.1", 30080) == CONNECTION_REFUSED


def test_endpoints_that_come_and_go_act_at_once_and_touch_no_rule(node: Node, pod: Namespace) -> None:
    """At once: the next sync is farther away than this test lasts."""
    node.apply(web(), *slices(ready=False))
    node.start("--iptables-min-sync-period=60s", "--iptables-sync-period=60s")
    captured, ports = node.captured(), {name: row["proxyPort"] for name, row in node.rows().items()}
    for _ in range(2):
        node.apply(web(), *slices())
        for ip in IPS:
            eventually(lambda: is_served(pod, ip) and is_served(node.net, ip))
            assert programs.dig(pod, ip, 53, "web.test") == ["192.0.2.80"]
        node.apply(web(), *slices(ready=False))
        for ip in IPS:
            eventually(lambda: programs.curl_status(pod, ip, 80) == CONNECTION_REFUSED)
    assert node.captured() == captured
    assert {name: row["proxyPort"] for name, row in node.rows().items()} == ports


def test_a_slice_moves_clients_to_another_server(node: Node, pod: Namespace) -> None:
    other = node.pod("10.1.0.4", "fd01::4")
    other.spawn(f"{sys.executable} {ENDPOINT} b 8080")
    programs.await_listener(other, 8080)
    alone = service("echo", "10.96.0.12", [port(7), port(7, name="udp", protocol="UDP")])
    alone["spec"]["ports"][0]["name"] = "tcp"
    server = node.pod("10.1.0.5", "fd01::5")
    server.spawn(f"{sys.executable} {ENDPOINT} a 8080")
    programs.await_listener(server, 8080)
    node.start()
    for name, ip in (("a", "10.1.0.5"), ("b", "10.1.0.4"), ("a", "10.1.0.5")):
        both = [endpoints("echo", [f"{ip}:8080"], port_name=kind, protocol=kind.upper()) for kind in ("tcp", "udp")]
        node.apply(alone, *both)
        expected = f"{name}:hi".encode()
        eventually(lambda: answer(pod, "10.96.0.12", 7, timeout=1) == expected)
        eventually(lambda: answer(pod, "10.96.0.12", 7, DATAGRAM, timeout=1) == expected)


def test_every_type_of_service_can_become_every_other(node: Node, pod: Namespace) -> None:
    """ClusterIP, ExternalName, NodePort, headless, LoadBalancer; nothing of a former type is left."""
    cluster_ip = web(port(80, name="http"))
    name = {**cluster_ip, "spec": {"type": "ExternalName", "externalName": "example.com"}}
    headless = {**cluster_ip, "spec": {**cluster_ip["spec"], "clusterIP": "None", "clusterIPs": ["None"]}}
    balancer = web(HTTP, ingress=["203.0.113.9"])
    states = [(cluster_ip, 1), (name, 0), (web(HTTP), 2), (headless, 0), (balancer, 3), (cluster_ip, 1), (web(HTTP), 2)]
    node.own("203.0.113.9")
    node.start("--iptables-min-sync-period=50ms")
    for state, level in states:
        node.apply(state, *slices())
        places = [(pod, IPS[0], 80, level > 0), (node.net, IPS[1], 80, level > 0)]
        places += [(pod, "10.1.0.1", 30080, level > 1), (node.net, "::1", 30080, level > 1)]
        places.append((pod, "203.0.113.9", 80, level > 2))
        for client, ip, number, expected in places:
            eventually(lambda: bool(answer_of_http(client, ip, number)) == expected)
    assert {row["nodePort"] for row in node.rows().values()} == {30080}


def answer_of_http(client: Namespace, ip: str, number: int) -> bytes:
    """What the web server says to a word it does not understand; quicker than curl to tell that nobody is there."""
    return answer(client, ip, number, timeout=0.3)


def test_ports_change_their_numbers(node: Node, pod: Namespace) -> None:
    node.apply(web(), *slices())
    node.start("--iptables-min-sync-period=50ms")
    before = node.rows()["web:http"]["proxyPort"]
    assert is_served(pod, IPS[0], 80)
    assert is_served(pod, "10.1.0.1", 30080)
    node.apply(web(port(81, name="http", node_port=30081), DNS), *slices())
    for ip in IPS:
        eventually(lambda: is_served(pod, ip, 81))
        eventually(lambda: is_served(node.net, ip, 81))
        assert not answer_of_http(pod, ip, 80)
    assert is_served(pod, "10.1.0.1", 30081)
    assert programs.curl_status(pod, "10.1.0.1", 30080) == CONNECTION_REFUSED
    assert programs.dig(pod, IPS[0], 53, "web.test") == ["192.0.2.80"]
    assert node.rows()["web:http"]["proxyPort"] == before


def test_ports_of_one_service_are_served_apart(node: Node, pod: Namespace) -> None:
    """TCP and UDP on one number: one of them without endpoints, then gone, and the other never notices."""
    both = [port(53, name="dns", protocol="UDP"), port(53, name="http")]
    http = [found for found in slices() if found["ports"][0]["name"] == "http"]
    node.apply(web(*both), *http)
    node.start("--iptables-min-sync-period=50ms")
    for ip in IPS:
        assert is_served(pod, ip, 53)
        assert "connection refused" in programs.dig(pod, ip, 53, "web.test +notcp", check=False)[0]
    node.apply(web(*both), *slices())
    for ip in IPS:
        eventually(lambda: programs.dig(pod, ip, 53, "web.test +notcp", check=False) == ["192.0.2.80"])
        assert is_served(pod, ip, 53)
    node.apply(web(both[0]), *slices())
    eventually(lambda: set(node.rows()) == {"web:dns"})
    for ip in IPS:
        eventually(lambda: not answer_of_http(pod, ip, 53))
        assert programs.dig(pod, ip, 53, "web.test +notcp") == ["192.0.2.80"]


def test_addresses_come_and_go(node: Node, pod: Namespace) -> None:
    node.apply(web(), *slices())
    node.start("--iptables-min-sync-period=50ms")
    port_before = node.rows()["web:http"]["proxyPort"]
    node.own("198.51.100.7", "2001:db8:7::7", "198.51.100.8")
    for external_ips in (["198.51.100.7", "2001:db8:7::7"], ["198.51.100.8"], []):
        node.apply(web(externalIPs=external_ips), *slices())
        for ip in ("198.51.100.7", "2001:db8:7::7", "198.51.100.8"):
            for client in (pod, node.net):
                eventually(lambda: bool(answer_of_http(client, ip, 80)) == (ip in external_ips))
        assert is_served(pod, IPS[0])
    assert node.rows()["web:http"]["proxyPort"] == port_before


def test_a_node_port_passes_to_another_service(node: Node, pod: Namespace) -> None:
    """First come, first served; the other gets it, with nobody doing anything, once the first lets go."""
    second = service("second", "10.96.0.20", [port(80, name="http", node_port=30080)])
    node.apply(web(HTTP), *slices())
    node.start("--iptables-min-sync-period=50ms")
    node.apply(web(HTTP), *slices(), second)
    eventually(lambda: "second:http" in node.rows())
    assert is_served(pod, "10.1.0.1", 30080)
    eventually(lambda: programs.curl_status(pod, "10.96.0.20", 80) == CONNECTION_REFUSED)
    eventually(lambda: node.rows()["second:http"]["problems"])
    node.apply(web(port(80, name="http")), *slices(), second)
    eventually(lambda: programs.curl_status(pod, "10.1.0.1", 30080) == CONNECTION_REFUSED)
    assert not node.rows()["second:http"]["problems"]
    assert is_served(pod, IPS[0])
