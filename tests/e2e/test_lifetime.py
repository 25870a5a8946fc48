"""From start to end: what outlives what, what is repaired, and that nothing is left behind."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.client import ask, connect
from tests.e2e.node import Node, endpoints, port, service
from tests.e2e.test_lifecycle import traces
from tests.netns import Namespace, eventually

pytestmark = pytest.mark.privileged

ENDPOINT = Path(__file__).with_name("endpoint.py")
WEB = service("web", "10.96.0.10", [port(80, node_port=30080)])
DNS = service("dns", "10.96.0.11", [port(53, protocol="UDP", node_port=30053)])
WEB_ENDPOINTS = endpoints("web", ["10.1.0.2:8080"])
DNS_ENDPOINTS = endpoints("dns", ["10.1.0.2:8080"], protocol="UDP")
ALL = (WEB, WEB_ENDPOINTS, DNS, DNS_ENDPOINTS)


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


def test_deleting_the_last_service_leaves_its_connections(node: Node, pod: Namespace, capture: str) -> None:
    node.start()
    with connect(pod, "10.96.0.10", 80) as client:
        assert ask(client) == b"a:hi"
        node.apply()
        eventually(lambda: not node.rows() and (capture == "local" or not node.captures("10.96.0.10")))
        for _ in range(3):
            assert ask(client) == b"a:hi"
        assert not is_answered(pod, "10.96.0.10", 80)


@pytest.mark.parametrize("second", [True, False], ids=["second signal", "drain timeout"])
def test_what_does_not_end_in_time_is_reset(node: Node, pod: Namespace, second: bool) -> None:
    node.start(f"--drain-timeout={'60s' if second else '300ms'}")
    with connect(pod, "10.96.0.10", 80) as client:
        assert ask(client) == b"a:hi"
        assert node.process is not None
        node.process.send_signal(signal.SIGINT)
        if second:
            eventually(lambda: "draining" in node.get("/readyz", 10256))
            node.process.send_signal(signal.SIGINT)
        assert node.process.wait(10) == 0
        with pytest.raises(ConnectionResetError):
            client.recv(1)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


DAMAGE = {
    "iptables": (
        "iptables-legacy -t nat -F",
        "iptables-legacy -t nat -F KUBE-PORTALS-HOST",
        "iptables-legacy -t nat -D PREROUTING 1",
        "iptables-legacy -t nat -I KUBE-PORTALS-CONTAINER -p tcp --dport 80 -j RETURN",
        "iptables-legacy -t filter -F",
    ),
    "local": ("ip route flush table local proto 117", "ip route del local 10.96.0.11 table local"),
}


@pytest.mark.captures("iptables", "local", why="under nftables no sync is waited for, which test_captures shows")
def test_what_others_do_to_it_is_undone(node: Node, capture: str) -> None:
    node.start("--iptables-sync-period=300ms", "--iptables-min-sync-period=100ms")
    captured = node.captured()
    for damage in DAMAGE[capture]:
        node.net.run(damage)
        eventually(lambda: node.captured() == captured, 10)
        assert 'repaired"} 0.0' not in node.get("/metrics")
    assert is_answered(node.net, "10.96.0.10", 80)


def test_killed_and_started_again_there_is_one_generation(node: Node, pod: Namespace) -> None:
    node.start()
    client = connect(pod, "10.96.0.11", 53, socket.SOCK_DGRAM)
    assert ask(client) == b"a:hi"
    assert node.process is not None
    count = len(node.captured().splitlines())
    workers = children(node.process.pid)
    node.process.kill()
    node.process.wait()
    eventually(lambda: not any(os.path.exists(f"/proc/{worker}") for worker in workers))
    assert node.captures("10.96.0.10")
    node.start()
    assert len(node.captured().splitlines()) == count
    for row in node.rows().values():
        assert node.capture == "local" or re.search(rf"(--to-ports|:) {row['proxyPort']}\b", node.captured())
    assert is_answered(pod, "10.96.0.10", 80)
    # The client goes on with its source port, which conntrack knew as a flow to the dead proxy port.
    assert ask(client) == b"a:hi"
    client.close()


FOREIGN = {
    "iptables": (
        "iptables-legacy -t nat -N FOREIGN",
        "iptables-legacy -t nat -A PREROUTING -p tcp --dport 80 -j FOREIGN",
    ),
    "nftables": (
        "nft add table ip foreign",
        "nft add chain ip foreign prerouting '{ type nat hook prerouting priority dstnat; }'",
        "nft add rule ip foreign prerouting tcp dport 9 accept",
    ),
    "local": ("ip route add local 10.97.0.1 dev lo", "ip -6 route add local fd00:97::1 dev lo"),
}


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
    with connect(pod, "10.96.0.10", 80) as client:
        assert ask(client) == b"a:hi"
        node.apply(service("web", "10.96.0.10", [port(81)]), WEB_ENDPOINTS)
        eventually(lambda: is_answered(pod, "10.96.0.10", 81))
        assert ask(client) == b"a:hi"
        node.apply(service("web", "10.96.0.10", [port(81)]))
        eventually(lambda: not is_answered(pod, "10.96.0.10", 81))
        assert ask(client) == b"a:hi"


def test_a_udp_client_keeps_working_when_its_service_comes_back(node: Node, pod: Namespace) -> None:
    node.start("--iptables-min-sync-period=50ms")
    with connect(pod, "10.96.0.11", 53, socket.SOCK_DGRAM) as client:
        assert ask(client) == b"a:hi"
        node.apply(WEB, WEB_ENDPOINTS)
        eventually(lambda: "dns" not in node.rows())
        node.apply(*ALL)
        eventually(lambda: "dns" in node.rows() and node.captures("10.96.0.11"))
        client.settimeout(0.5)

        def is_answered_again() -> bool:
            try:
                return ask(client) == b"a:hi"
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
