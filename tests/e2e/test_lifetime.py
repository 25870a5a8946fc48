"""From start to end: what outlives what, what is repaired, and that nothing is left behind."""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.e2e.client import ask, connect
from tests.e2e.node import Node, endpoints, port, service
from tests.e2e.test_lifecycle import traces
from tests.netns import Namespace, eventually

pytestmark = pytest.mark.privileged

ENDPOINT = Path(__file__).with_name("endpoint.py")
WEB_IPS, DNS_IPS = ["10.96.0.10", "fd00:96::10"], ["10.96.0.11", "fd00:96::11"]
WEB = service("web", WEB_IPS, [port(80, node_port=30080)])
DNS = service("dns", DNS_IPS, [port(53, protocol="UDP", node_port=30053)])
BOTH = ("10.1.0.2:8080", "[fd01::2]:8080")
WEB_ENDPOINTS = [endpoints("web", [address]) for address in BOTH]
DNS_ENDPOINTS = [endpoints("dns", [address], protocol="UDP") for address in BOTH]
ALL = (WEB, *WEB_ENDPOINTS, DNS, *DNS_ENDPOINTS)


@pytest.fixture
def node(tmp_path: Path, capture: str) -> Iterator[Node]:
    """A node with one endpoint on a pod."""
    with Node(tmp_path, capture) as made:
        made.pod("10.1.0.2", "fd01::2").spawn(f"{sys.executable} {ENDPOINT} a 8080")
        made.apply(*ALL)
        yield made


@pytest.fixture
def pod(node: Node) -> Namespace:
    return node.pod("10.1.0.3", "fd01::3")


def is_answered(where: Namespace, ip: str, number: int, kind: int = socket.SOCK_STREAM) -> bool:
    try:
        with connect(where, ip, number, kind) as client:
            return ask(client) == b"a:hi"
    except OSError:
        return False


def is_served(where: Namespace, ips: list[str], number: int, kind: int = socket.SOCK_STREAM) -> bool:
    return all(is_answered(where, ip, number, kind) for ip in ips)


@contextlib.contextmanager
def talking(where: Namespace, ips: list[str], number: int, kind: int = socket.SOCK_STREAM) -> Iterator[Talk]:
    """A client of each address, answered already; asks whether they still are."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(where, ip, number, kind)) for ip in ips]

        def are_answered() -> bool:
            return [ask(client) for client in clients] == [b"a:hi"] * len(clients)

        assert are_answered()
        yield Talk(clients, are_answered)


class Talk(NamedTuple):
    clients: list[socket.socket]
    goes_on: Callable[[], bool]


def test_connections_outlive_their_services_address_and_then_the_service(node: Node, pod: Namespace) -> None:
    """Those of the node's own clients need a way to the address still, which is there as long as they are."""
    later = ["10.96.0.20", "fd00:96::20"]
    node.start("--iptables-sync-period=500ms", "--iptables-min-sync-period=100ms")
    with talking(pod, WEB_IPS, 80) as pods, talking(node.net, WEB_IPS, 80) as own:
        for objects, ips in (((service("web", later, [port(80)]), *WEB_ENDPOINTS), later), ((), [])):
            node.apply(*objects)
            eventually(lambda ips=ips: all(node.captures(ip, 80) is (ip in ips) for ip in WEB_IPS + later))
            for _ in range(3):
                assert pods.goes_on()
                assert own.goes_on()
            assert not is_answered(pod, WEB_IPS[0], 80)
        eventually(lambda: ways(node) == set(WEB_IPS))
    eventually(lambda: not ways(node))


def ways(node: Node) -> set[str]:
    """The addresses that the proxy keeps routes to."""
    listed = [node.net.run(f"ip -{family} route show table all proto 117") for family in "46"]
    return {line.removeprefix("local ").split()[0] for text in listed for line in text.splitlines()}


@pytest.mark.parametrize("second", [True, False], ids=["second signal", "drain timeout"])
def test_what_does_not_end_in_time_is_reset(node: Node, pod: Namespace, second: bool) -> None:
    node.start(f"--drain-timeout={'60s' if second else '300ms'}")
    with talking(pod, WEB_IPS, 80) as talk:
        assert node.process is not None
        node.process.send_signal(signal.SIGINT)
        if second:
            eventually(lambda: "draining" in node.get("/readyz", 10256))
            node.process.send_signal(signal.SIGINT)
        assert node.process.wait(10) == 0
        for client in talk.clients:
            with pytest.raises(ConnectionResetError):
                client.recv(1)


DAMAGE = {
    "iptables": (
        "iptables-legacy -t nat -F",
        "iptables-legacy -t nat -F KUBE-PORTALS-HOST",
        "iptables-legacy -t nat -D PREROUTING 1",
        "iptables-legacy -t nat -I KUBE-PORTALS-CONTAINER -p tcp --dport 80 -j RETURN",
        "iptables-legacy -t filter -F",
    ),
    "local": ("ip route flush table local proto 117", "ip -6 route flush table local proto 117"),
}


@pytest.mark.captures("iptables", "local", why="under nftables no sync is waited for, which test_captures shows")
def test_what_others_do_to_it_is_undone(node: Node, capture: str) -> None:
    node.start("--iptables-sync-period=300ms", "--iptables-min-sync-period=100ms")
    captured = node.captured()
    for damage in DAMAGE[capture]:
        node.net.run(damage)
        eventually(lambda: node.captured() == captured, 10)
        eventually(lambda: 'repaired"} 0.0' not in node.get("/metrics"))  # told a moment after it is done
    assert is_served(node.net, WEB_IPS, 80)


FOREIGN = {
    "nftables": (
        "nft add table ip foreign",
        "nft add chain ip foreign prerouting '{ type nat hook prerouting priority dstnat; }'",
        "nft add rule ip foreign prerouting tcp dport 9 accept",
    ),
    "local": ("ip route add local 10.97.0.1 dev lo", "ip -6 route add local fd00:97::1 dev lo"),
}


@pytest.mark.captures("nftables", "local", why="test_recovery has it for iptables, among more foreign rules")
def test_cleanup_removes_a_killed_runs_rules_and_no_others(node: Node) -> None:
    for foreign in FOREIGN[node.capture]:
        node.net.run(foreign)
    before = traces(node)
    node.start()
    assert node.process is not None
    node.process.kill()
    node.process.wait()
    eventually(lambda: traces(node)["processes"] == before["processes"])
    assert traces(node) != before
    for _ in range(2):
        done = node.cleanup()
        assert done.returncode == 0, done.stderr
        assert traces(node) == before


def test_connections_survive_changes_of_their_service(node: Node, pod: Namespace) -> None:
    node.start("--iptables-min-sync-period=50ms")
    with talking(pod, WEB_IPS, 80) as talk:
        node.apply(service("web", WEB_IPS, [port(81)]), *WEB_ENDPOINTS)
        eventually(lambda: is_served(pod, WEB_IPS, 81))
        assert talk.goes_on()
        node.apply(service("web", WEB_IPS, [port(81)]))
        eventually(lambda: not any(is_answered(pod, ip, 81) for ip in WEB_IPS))
        assert talk.goes_on()


def test_a_udp_client_keeps_working_when_its_service_comes_back(node: Node, pod: Namespace) -> None:
    node.start("--iptables-min-sync-period=50ms")
    with talking(pod, DNS_IPS, 53, socket.SOCK_DGRAM) as talk:
        node.apply(WEB, *WEB_ENDPOINTS)
        eventually(lambda: "dns" not in node.rows())
        node.apply(*ALL)
        eventually(lambda: "dns" in node.rows() and all(map(node.captures, DNS_IPS)))
        for client in talk.clients:
            client.settimeout(0.5)

        def is_answered_again() -> bool:
            try:
                return talk.goes_on()
            except OSError:
                return False

        eventually(is_answered_again)


def test_idle_clients_use_up_the_descriptors_and_leave(node: Node, pod: Namespace) -> None:
    node.start(limit=300)
    idle = [connect(pod, "10.96.0.10", 80) for _ in range(500)]
    late = connect(pod, "10.96.0.10", 80)
    late.settimeout(0.3)
    with pytest.raises(TimeoutError):
        ask(late)
    assert node.process is not None
    assert node.process.poll() is None
    for client in idle:
        client.close()
    late.settimeout(10)
    assert late.recv(100) == b"a:hi"
    late.close()
    assert is_answered(pod, "10.96.0.10", 80)
    assert node.get("/readyz", 10256) == "ok"


@pytest.mark.captures("iptables", why="whatever the capture, it is the same flows that are capped")
def test_a_burst_of_udp_clients_is_capped(node: Node, pod: Namespace) -> None:
    node.start("--max-udp-flows=200", "--udp-timeout=500ms")
    idle = node.descriptors()
    most = 0
    with pod.entered():
        for number in range(10_000):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                client.sendto(b"x", ("10.96.0.11", 53))
            if number % 1000 == 999:
                most = max(most, node.descriptors())
    assert most - idle < 250
    # A datagram or two may still be lost in the endpoint's own queue.
    eventually(lambda: is_answered(pod, "10.96.0.11", 53, socket.SOCK_DGRAM), 30)
    eventually(lambda: node.descriptors() <= idle + 5)
