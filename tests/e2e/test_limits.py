"""At the limits: what still works when descriptors have run out, and how much of it is said."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.client import DATAGRAM, answer, ask, connect, crowd
from tests.e2e.node import Node, endpoints, port, service
from tests.netns import Namespace, eventually
from userspace_proxy.sockets.base import LEAST_DESCRIPTORS

pytestmark = [
    pytest.mark.privileged,
    pytest.mark.captures("iptables", "local", why="nftables redirects to the same listeners as iptables does"),
]

ENDPOINT = Path(__file__).with_name("endpoint.py")
WEB = service("web", "10.96.0.10", [port(80)])
DNS = service("dns", "10.96.0.11", [port(53, protocol="UDP")])


@pytest.fixture
def node(tmp_path: Path, capture: str) -> Iterator[Node]:
    with Node(tmp_path, capture) as made:
        made.pod("10.1.0.2").spawn(f"{sys.executable} {ENDPOINT} a 8080")
        made.apply(
            *(WEB, endpoints("web", ["10.1.0.2:8080"])), *(DNS, endpoints("dns", ["10.1.0.2:8080"], protocol="UDP"))
        )
        yield made


@pytest.fixture
def pod(node: Node) -> Namespace:
    return node.pod("10.1.0.3")


def seconds_of_work(node: Node) -> float:
    assert node.process is not None
    fields = Path(f"/proc/{node.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def sample(node: Node, name: str) -> float:
    return sum(float(line.split()[-1]) for line in node.get("/metrics").splitlines() if line.startswith(name))


def test_without_descriptors_all_else_goes_on(node: Node, pod: Namespace) -> None:
    node.start(limit=200)
    with connect(pod, "10.96.0.10", 80) as first:
        assert ask(first) == b"a:hi"
        with crowd(100, pod, "10.96.0.10", 80):
            eventually(lambda: sample(node, "userspace_proxy_accept_pauses_total") > 0)
            started = seconds_of_work(node)
            end = time.monotonic() + 0.5
            while time.monotonic() < end:
                assert ask(first) == b"a:hi"
                time.sleep(0.05)
            assert seconds_of_work(node) - started < 0.25, "it spins"
            assert node.get("/readyz", 10256) == "ok"
            node.apply(service("more", "10.96.0.12", [port(80)]), file="more")
            eventually(lambda: "more" in node.rows() and node.captures("10.96.0.12"))
        assert ask(first) == b"a:hi"
    eventually(lambda: sample(node, "userspace_proxy_sessions_active") == 0)
    assert node.stop() == 0


@pytest.mark.parametrize("way", ["iptables", "nftables", "local"])
def test_the_least_that_it_starts_with_is_enough(node: Node, pod: Namespace, way: str) -> None:
    node.capture = way
    node.start(limit=LEAST_DESCRIPTORS)
    assert answer(pod, "10.96.0.10", 80) == b"a:hi"
    assert answer(pod, "10.96.0.11", 53, DATAGRAM) == b"a:hi"
    assert "Too many open files" not in node.log()
    assert node.stop() == 0


def test_every_waiting_client_gets_its_turn(node: Node, pod: Namespace) -> None:
    """Room for a few at a time: hundreds that wait in the queue are served one after the other, none is forgotten."""
    node.start(limit=140)
    with crowd(300, pod, "10.96.0.10", 80, timeout=20) as clients:
        for client in clients:
            client.send(b"hi")
        for client in clients:
            assert client.recv(100) == b"a:hi"
            client.close()
    assert answer(pod, "10.96.0.10", 80) == b"a:hi"


def test_running_out_is_said_once_not_for_every_client(node: Node, pod: Namespace) -> None:
    node.start(limit=140)
    with crowd(100, pod, "10.96.0.10", 80):
        pass
    eventually(lambda: answer(pod, "10.96.0.10", 80) == b"a:hi")
    assert 1 <= node.log().count("no descriptors left") <= 5


def test_udp_clients_find_room_beside_idle_connections(node: Node, pod: Namespace) -> None:
    """Connections hold every descriptor; once they leave, flows are served, and more of them than there is room."""
    node.start("--udp-timeout=10s", limit=160)
    with crowd(40, pod, "10.96.0.10", 80):
        eventually(lambda: sample(node, "userspace_proxy_accept_pauses_total") > 0)
    eventually(lambda: sample(node, "userspace_proxy_sessions_active") == 0)
    for _ in range(80):  # each stays for 10 s: the oldest makes room
        assert answer(pod, "10.96.0.11", 53, DATAGRAM) == b"a:hi"


def test_flows_are_counted_over_all_service_ports(node: Node, pod: Namespace) -> None:
    more = service("more", "10.96.0.12", [port(53, protocol="UDP")])
    node.apply(more, endpoints("more", ["10.1.0.2:8080"], protocol="UDP"), file="more")
    node.start("--max-udp-flows=20", "--udp-timeout=30s")
    with crowd(15, pod, "10.96.0.11", 53, DATAGRAM) as some, crowd(15, pod, "10.96.0.12", 53, DATAGRAM) as others:
        for client in some + others:
            assert ask(client) == b"a:hi"
        assert sample(node, "userspace_proxy_sessions_active") == 20
        # A client whose flow was ended for another's sake gets a new one with its next datagram.
        for client in some + others:
            assert ask(client) == b"a:hi"
        assert sample(node, "userspace_proxy_sessions_active") == 20
