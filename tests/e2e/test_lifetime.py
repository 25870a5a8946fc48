"""From start to end: what outlives what, what is repaired, and that nothing is left behind."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.node import Node, endpoints, port, service
from tests.netns import Namespace, eventually

pytestmark = pytest.mark.privileged

ENDPOINT = Path(__file__).with_name("endpoint.py")
WEB = service("web", "10.96.0.10", [port(80, node_port=30080)])
DNS = service("dns", "10.96.0.11", [port(53, protocol="UDP", node_port=30053)])
WEB_ENDPOINTS = endpoints("web", ["10.1.0.2:8080"])
DNS_ENDPOINTS = endpoints("dns", ["10.1.0.2:8080"], protocol="UDP")
ALL = (WEB, WEB_ENDPOINTS, DNS, DNS_ENDPOINTS)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    """A node with one endpoint on a pod."""
    with Node(tmp_path) as made:
        made.pod("10.1.0.2", "fd01::2").spawn(f"{sys.executable} {ENDPOINT} a 8080")
        made.apply(*ALL)
        yield made


@pytest.fixture
def pod(node: Node) -> Namespace:
    return node.pod("10.1.0.3", "fd01::3")


def connect(where: Namespace, ip: str, number: int, kind: int = socket.SOCK_STREAM) -> socket.socket:
    with where.entered():
        client = socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET, kind)
    client.settimeout(5)
    try:
        client.connect((ip, number))
    except OSError:
        client.close()
        raise
    return client


def ask(client: socket.socket) -> bytes:
    client.send(b"hi")
    return client.recv(100)


def is_answered(where: Namespace, ip: str, number: int, kind: int = socket.SOCK_STREAM) -> bool:
    try:
        with connect(where, ip, number, kind) as client:
            return ask(client) == b"a:hi"
    except OSError:
        return False


def test_deleting_the_last_service_leaves_its_connections(node: Node, pod: Namespace) -> None:
    node.start()
    with connect(pod, "10.96.0.10", 80) as client:
        assert ask(client) == b"a:hi"
        node.apply()
        eventually(lambda: "--dport" not in node.rules())
        for _ in range(3):
            assert ask(client) == b"a:hi"
        assert not is_answered(pod, "10.96.0.10", 80)


def test_a_drain_lets_connections_end_and_takes_no_new_one(node: Node, pod: Namespace) -> None:
    before = node.rules()
    node.start("--drain-timeout=30s")
    client = connect(pod, "10.96.0.10", 80)
    assert ask(client) == b"a:hi"
    assert node.process is not None
    node.process.send_signal(signal.SIGTERM)
    eventually(lambda: "draining" in node.get("/readyz", 10256))
    eventually(lambda: not is_answered(pod, "10.1.0.1", 30080))
    assert ask(client) == b"a:hi"
    assert node.process.poll() is None
    client.close()
    assert node.process.wait(10) == 0
    assert node.rules() == before


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_behind(node: Node, pod: Namespace, number: int) -> None:
    foreign = "-t nat -A OUTPUT -p tcp --dport 9 -j ACCEPT"
    node.net.run(f"iptables-legacy {foreign}")
    rules, routes = node.rules(), node.net.run("ip -4 route show table all")
    node.start()
    assert is_answered(pod, "10.96.0.10", 80)
    assert is_answered(node.net, "10.96.0.10", 80)
    assert is_answered(pod, "10.96.0.11", 53, socket.SOCK_DGRAM)
    assert node.process is not None
    workers = children(node.process.pid)
    assert workers
    assert node.stop(number) == 0
    assert node.rules() == rules
    assert node.net.run("ip -4 route show table all") == routes
    assert "proto 117" not in node.net.run("ip -6 route show table all")
    assert "10.96.0.1" not in node.conntrack()
    assert not any(os.path.exists(f"/proc/{worker}") for worker in workers)
    with node.net.entered(), socket.socket() as client:
        client.bind(("0.0.0.0", 30080))


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_what_others_do_to_our_rules_is_undone(node: Node) -> None:
    node.start("--iptables-sync-period=500ms", "--iptables-min-sync-period=100ms")
    rules = node.rules()
    for damage in (
        "-t nat -F",
        "-t nat -F KUBE-PORTALS-HOST",
        "-t nat -D PREROUTING 1",
        "-t nat -I KUBE-PORTALS-CONTAINER -p tcp --dport 80 -j RETURN",
        "-t filter -F",
    ):
        node.net.run(f"iptables-legacy {damage}")
        assert node.rules() != rules
        eventually(lambda: node.rules() == rules, 10)
    assert is_answered(node.net, "10.96.0.10", 80)


def test_killed_and_started_again_there_is_one_generation_of_rules(node: Node, pod: Namespace) -> None:
    node.start()
    client = connect(pod, "10.96.0.11", 53, socket.SOCK_DGRAM)
    assert ask(client) == b"a:hi"
    assert node.process is not None
    count = len(node.rules().splitlines())
    workers = children(node.process.pid)
    node.process.kill()
    node.process.wait()
    eventually(lambda: not any(os.path.exists(f"/proc/{worker}") for worker in workers))
    assert "--dport 80 " in node.rules()
    node.start()
    assert len(node.rules().splitlines()) == count
    for row in node.rows().values():
        assert f"--to-ports {row['proxyPort']}" in node.rules()
    assert is_answered(pod, "10.96.0.10", 80)
    # The client goes on with its source port, which conntrack knew as a flow to the dead proxy port.
    assert ask(client) == b"a:hi"
    client.close()


def test_cleanup_removes_a_killed_runs_rules_and_no_others(node: Node) -> None:
    node.net.run("iptables-legacy -t nat -N FOREIGN")
    node.net.run("iptables-legacy -t nat -A PREROUTING -p tcp --dport 80 -j FOREIGN")
    before = node.rules()
    node.start()
    assert node.process is not None
    node.process.kill()
    node.process.wait()
    assert node.rules() != before
    for _ in range(2):
        done = node.cleanup()
        assert done.returncode == 0, done.stderr
        assert node.rules() == before
        assert "proto 117" not in node.net.run("ip route show table all")


def test_a_worker_that_is_killed_is_replaced(node: Node) -> None:
    node.start("--iptables-sync-period=300ms", "--iptables-min-sync-period=100ms")
    assert node.process is not None
    rules = node.rules()
    for worker in children(node.process.pid):
        os.kill(worker, signal.SIGKILL)
    node.net.run("iptables-legacy -t nat -F")
    eventually(lambda: node.rules() == rules, 10)
    assert is_answered(node.net, "10.96.0.10", 80)
    assert node.stop() == 0


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
        eventually(lambda: "dns" in node.rows() and "10.96.0.11" in node.rules())
        client.settimeout(0.5)

        def is_answered_again() -> bool:
            try:
                return ask(client) == b"a:hi"
            except OSError:
                return False

        eventually(is_answered_again)


def test_sighup_reads_everything_anew(node: Node) -> None:
    node.start()
    assert node.process is not None
    node.process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    assert is_answered(node.net, "10.96.0.10", 80)
    assert node.stop() == 0


def test_an_endpoint_that_is_our_own_node_port_makes_no_loop(node: Node) -> None:
    loop = service("loop", "10.96.0.12", [port(80)])
    node.apply(*ALL, loop, endpoints("loop", ["10.1.0.1:30080"]))
    node.start()
    assert node.rows()["loop"]["state"] == "refusing"
    assert "own place" in node.log()
    with pytest.raises(ConnectionRefusedError):
        connect(node.net, "10.96.0.12", 80)


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
