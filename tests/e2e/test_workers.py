"""The command with several workers: through rules and cluster IPs it is the one proxy, from its start to its end."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.client import DATAGRAM, answer, ask, connect, crowd
from tests.e2e.node import Node, endpoints, port, service
from tests.e2e.test_lifecycle import status, traces
from tests.netns import eventually

pytestmark = pytest.mark.privileged

ENDPOINT = Path(__file__).with_name("endpoint.py")
DUAL = ["10.96.0.10", "fd00:96::10"]
WEB = service("web", DUAL, [port(80, node_port=30080)])
WEB_AND_DNS = [port(80, name="web"), port(53, name="dns", protocol="UDP")]
EXTERNAL = "192.0.2.1"
STUCK = service("stuck", ["10.96.0.12", "fd00:96::12"], WEB_AND_DNS, sessionAffinity="ClientIP", externalIPs=[EXTERNAL])
BALANCED = "192.0.2.2"
DNS = service("dns", "10.96.0.11", [port(53, protocol="UDP", node_port=30053)])


@pytest.fixture
def node(tmp_path: Path, capture: str) -> Iterator[Node]:
    with Node(tmp_path, capture) as made:
        made.own(EXTERNAL, BALANCED)
        server = made.pod("10.1.0.2", "fd01::2")
        for name, number in zip("abc", (8080, 8081, 8082), strict=True):
            server.spawn(f"{sys.executable} {ENDPOINT} {name} {number}")
        eventually(lambda: all(f":{number}" in server.run("ss -Hlnt") for number in (8080, 8081, 8082)))
        made.apply(
            *(WEB, *three_ports("web", "TCP"), DNS, *three_ports("dns", "UDP")),
            *(STUCK, *three_ports("stuck", "TCP", "web"), *three_ports("stuck", "UDP", "dns")),
        )
        yield made


def three_ports(name: str, protocol: str, port_name: str = "") -> list[dict[str, object]]:
    """One slice for each endpoint: all addresses of a slice have one port."""
    slices = []
    for ip in ("10.1.0.2", "[fd01::2]"):
        for number in (8080, 8081, 8082):
            made = endpoints(name, [f"{ip}:{number}"], port_name=port_name, protocol=protocol)
            made["metadata"]["name"] += f"-{number}"
            slices.append(made)
    return slices


def workers(node: Node) -> list[int]:
    """The worker processes of the proxy, by their start."""
    assert node.process is not None
    children = Path(f"/proc/{node.process.pid}/task/{node.process.pid}/children").read_text().split()
    return [pid for pid in map(int, children) if "workers.worker" in command_line(pid)]


def command_line(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    return ""


def is_gone(pid: int) -> bool:
    return not command_line(pid)


def spread(node: Node, count: int = 24) -> list[dict[str, object]]:
    sessions: list[dict[str, object]] = json.loads(node.get("/connections"))
    assert len(sessions) == count
    return sessions


def test_it_serves_as_one_and_leaves_nothing_behind(node: Node) -> None:
    pod = node.pod("10.1.0.3", "fd01::3")
    before = traces(node)
    node.start("--workers=2", "--udp-timeout=30s", "--drain-timeout=0s")
    eventually(lambda: len(workers(node)) == 2)
    assert {row["state"] for row in node.rows().values()} == {"serving"}
    for where in (pod, node.net):
        for ip in DUAL:
            assert {answer(where, ip, 80) for _ in range(12)} == {b"a:hi", b"b:hi", b"c:hi"}
        assert {answer(where, "10.96.0.11", 53, DATAGRAM) for _ in range(12)} == {b"a:hi", b"b:hi", b"c:hi"}
    assert answer(pod, "10.1.0.1", 30080)[1:] == b":hi"
    assert answer(pod, "10.1.0.1", 30053, DATAGRAM)[1:] == b":hi"
    with crowd(24, pod, DUAL[0], 80) as clients:
        for client in clients:
            ask(client)
        sessions = [s for s in json.loads(node.get("/connections")) if s["protocol"] == "TCP"]
        assert {s["client"] for s in sessions} == {"{}:{}".format(*client.getsockname()) for client in clients}
        metrics = node.get("/metrics")
        assert re.search(r'sessions_active\{family="IPv4".*protocol="TCP".*service="web"\} 24\.0', metrics)
        assert "userspace_proxy_workers 2.0" in metrics
        assert all(held_tcp(pid) for pid in workers(node)), "both take clients"
    assert node.stop() == 0
    assert traces(node) == before


def held_tcp(pid: int) -> int:
    links = [f"/proc/{pid}/fd/{fd}" for fd in os.listdir(f"/proc/{pid}/fd")]
    return sum(os.readlink(link).startswith("socket:") for link in links) > 8


def test_affinity_however_clients_come(node: Node) -> None:
    pods = [node.pod(f"10.1.0.{n}", f"fd01::{n}") for n in (3, 4, 5, 6)]
    node.start("--workers=3", "--udp-timeout=10s")
    # At whichever portal of a service port: several sockets, with the capture `local`.
    service_ports = [
        [(ip, *which) for ip in ips]
        for ips in (("10.96.0.12", EXTERNAL), ("fd00:96::12",))
        for which in ((80, socket.SOCK_STREAM), (53, DATAGRAM))
    ]

    def placed() -> list[bytes]:
        met = []
        for places in service_ports:
            # Pods begin at different ones, and take turns.
            rounds = [
                [answer(pod, *places[(turn + number) % len(places)]) for number, pod in enumerate(pods)]
                for turn in range(6)
            ]
            met += map(set, zip(*rounds, strict=True))
            # On the node itself a client has another address for each of them.
            met += [{answer(node.net, *place) for _ in range(6)} for place in places]
        assert all(len(names) == 1 for names in met), met
        return [names.pop() for names in met]

    first = placed()
    assert b"" not in first
    assert placed() == first
    node.apply(service("other", "10.96.0.99", [port(80)]), file="other")
    eventually(lambda: "other" in node.rows())
    assert placed() == first


def test_what_is_counted_stays_as_a_scope_of_a_service_port_goes(node: Node) -> None:
    """With the source ranges goes a socket, and not its sessions."""

    def ranged(*ranges: str) -> list[dict[str, object]]:
        spec = {"sessionAffinity": "ClientIP", "loadBalancerSourceRanges": list(ranges)}
        return [service("ranged", "10.96.0.13", [port(80)], ingress=[BALANCED], **spec), *three_ports("ranged", "TCP")]

    def count(name: str) -> float:
        found = re.findall(rf'{name}{{[^}}]*family="IPv4"[^}}]*service="ranged"}} (\S+)', node.get("/metrics"))
        return sum(map(float, found))

    pod = node.pod("10.1.0.3", "fd01::3")
    node.apply(*ranged("10.0.0.0/8"), file="ranged")
    node.start("--workers=2")
    assert "source ranges" in scopes(node)
    with crowd(12, pod, BALANCED, 80) as clients:
        for client in clients:
            ask(client)
        assert count("affinity_hits_total") == 11
        node.apply(*ranged(), file="ranged")
        eventually(lambda: scopes(node) == {""})
        assert all(ask(client)[1:] == b":hi" for client in clients)
        assert [count(f"{name}_total") for name in ("affinity_hits", "sessions_opened")] == [11, 12]
        assert count("sessions_active") == 12
    eventually(lambda: count("sessions_active") == 0)
    assert [count(f"{name}_total") for name in ("affinity_hits", "sessions_ended", "bytes")] == [
        11,
        12,
        12 * 2 * (2 + 4),
    ]


def scopes(node: Node) -> set[object]:
    return {row["scope"] for row in node.services() if row["name"] == "ranged" and row["family"] == "IPv4"}


@pytest.mark.captures("iptables", "local", why="nftables redirects to the same sockets as iptables does")
def test_sessions_of_all_workers_are_drained(node: Node) -> None:
    pod = node.pod("10.1.0.3", "fd01::3")
    before = traces(node)
    node.start("--workers=2", "--drain-timeout=30s")
    with crowd(24, pod, DUAL[0], 80) as clients:
        for client in clients:
            ask(client)
        assert node.process is not None
        node.process.send_signal(signal.SIGTERM)
        eventually(lambda: status(node, "/readyz") == 503)
        eventually(lambda: not answer(pod, DUAL[0], 80, timeout=1))
        with pytest.raises(ConnectionRefusedError):
            connect(pod, DUAL[0], 80)
        assert all(ask(client)[1:] == b":hi" for client in clients)
        spread(node)
        for client in clients[1:]:
            client.close()
        assert ask(clients[0])[1:] == b":hi"
        assert node.process.poll() is None
    assert node.process.wait(10) == 0
    assert "were still open" not in node.log()
    assert {kind: found for kind, found in traces(node).items() if kind != "conntrack"} == {
        kind: found for kind, found in before.items() if kind != "conntrack"
    }


@pytest.mark.captures("iptables", "local", why="nftables redirects to the same sockets as iptables does")
def test_what_is_not_drained_in_time_is_reset(node: Node) -> None:
    pod = node.pod("10.1.0.3", "fd01::3")
    node.start("--workers=2", "--drain-timeout=100ms")
    with crowd(24, pod, DUAL[0], 80) as clients:
        for client in clients:
            ask(client)
        running = workers(node)
        assert node.stop() == 0
        for client in clients:
            with pytest.raises(ConnectionResetError):
                client.recv(1)
    assert "24 sessions were still open" in node.log()
    assert all(map(is_gone, running))


@pytest.mark.captures("iptables", "local", why="nftables redirects to the same sockets as iptables does")
def test_killed_it_takes_its_workers_along_and_clients_are_told(node: Node) -> None:
    """Never a clean end of file, which would hide that something is missing. The next run starts afresh."""
    pod = node.pod("10.1.0.3", "fd01::3")
    node.start("--workers=2")
    with crowd(24, pod, "10.1.0.1", 30080) as clients:
        for client in clients:
            ask(client)
        running = workers(node)
        assert node.process is not None
        node.process.kill()
        node.process.wait()
        eventually(lambda: all(map(is_gone, running)))
        for client in clients:
            with pytest.raises(ConnectionResetError):
                client.recv(1)
    node.start("--workers=2")
    assert answer(pod, DUAL[0], 80)[1:] == b":hi"
    assert node.stop() == 0


@pytest.mark.captures("iptables", "local", why="nftables redirects to the same sockets as iptables does")
def test_a_dead_worker_is_replaced_under_traffic(node: Node) -> None:
    pod = node.pod("10.1.0.3", "fd01::3")
    node.start("--workers=2")
    with crowd(24, pod, DUAL[0], 80) as clients:
        for client in clients:
            ask(client)
        victim = workers(node)[0]
        os.kill(victim, signal.SIGKILL)
        eventually(lambda: is_gone(victim))
        assert all(answer(pod, DUAL[0], 80)[1:] == b":hi" for _ in range(20))
        assert all(answer(pod, DUAL[1], 80)[1:] == b":hi" for _ in range(20))
        left = [client for client in clients if survives(client)]
        assert 0 < len(left) < len(clients)
        assert len(json.loads(node.get("/connections"))) == len(left)
        metrics = node.get("/metrics")
        assert "userspace_proxy_worker_deaths_total 1.0" in metrics
        assert node.get("/readyz", 10256) == "ok"
    assert re.search(r"worker 0 was killed by SIGKILL", node.log())
    assert node.stop() == 0


def survives(client: socket.socket) -> bool:
    try:
        return ask(client)[1:] == b":hi"
    except ConnectionResetError:
        return False


@pytest.mark.captures("iptables", "local", why="nftables redirects to the same sockets as iptables does")
def test_all_signalled_at_once_it_drains_all_the_same(node: Node) -> None:
    """As a service manager does that signals every process of the group."""
    pod = node.pod("10.1.0.3", "fd01::3")
    node.start("--workers=2", "--drain-timeout=30s")
    with connect(pod, DUAL[0], 80) as client:
        assert ask(client)[1:] == b":hi"
        assert node.process is not None
        for pid in (*workers(node), node.process.pid):
            os.kill(pid, signal.SIGTERM)
        eventually(lambda: status(node, "/readyz") == 503)
        assert ask(client)[1:] == b":hi"
    assert node.process.wait(10) == 0


@pytest.mark.captures("iptables", "local", why="nftables redirects to the same sockets as iptables does")
def test_descriptors_that_run_out_hold_clients_up_and_cost_none(node: Node) -> None:
    pod = node.pod("10.1.0.3", "fd01::3")
    node.start("--workers=2", limit=200)
    with crowd(120, pod, DUAL[0], 80, timeout=20) as clients:
        for client in clients:
            client.sendall(b"hi")
        eventually(lambda: re.search(r"accept_pauses_total [1-9]", node.get("/metrics")))
        waiting = list(clients)
        for client in waiting:
            client.setblocking(False)
        while waiting:
            waiting = [client for client in waiting if not answered_and_closed(client)]
    assert node.stop() == 0


def answered_and_closed(client: socket.socket) -> bool:
    try:
        assert client.recv(100)[1:] == b":hi"
    except BlockingIOError:
        return False
    client.close()
    return True
