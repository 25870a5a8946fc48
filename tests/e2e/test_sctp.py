"""SCTP Services end to end: the command itself, from pods, from outside and from the node, and where there is none."""

from __future__ import annotations

import contextlib
import itertools
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import sctp as pysctp

from tests.e2e.node import Node, endpoints, port, service
from tests.netns import Namespace, eventually
from userspace_proxy import host

pytestmark = [pytest.mark.privileged, pytest.mark.timeout(110)]
needs_sctp = pytest.mark.sctp

PROTOCOLS = {
    "TCP": (socket.SOCK_STREAM, 0),
    "UDP": (socket.SOCK_DGRAM, 0),
    "SCTP": (socket.SOCK_STREAM, socket.IPPROTO_SCTP),
}
CLUSTER = ("10.96.0.10", "fd00:96::10")
STICKY = ("10.96.0.11", "fd00:96::11")
EXTERNAL = ("198.51.100.7", "2001:db8::7")
NOBODYS = "198.51.100.8"
NODE = ("10.1.0.1", "fd01::1")
NODE_PORT = 30080
PODS = {b"a": ("10.1.0.2", "fd01::2"), b"b": ("10.1.0.3", "fd01::3")}


def plain(where: Namespace, ip: str, protocol: str = "SCTP") -> socket.socket:
    with where.entered():
        sock = socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET, *PROTOCOLS[protocol])
    sock.settimeout(5)
    return sock


def answer(where: Namespace, ip: str, number: int, protocol: str = "SCTP") -> bytes:
    with plain(where, ip, protocol) as client:
        client.connect((ip, number))
        client.send(b"hi")
        return client.recv(100)


class Endpoints:
    """Sockets on port 8080 that answer every message with their name and the message, all in one thread."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    def add(self, where: Namespace, ip: str, protocol: str, name: bytes) -> None:
        server = plain(where, ip, protocol)
        server.bind((ip, 8080))
        if protocol != "UDP":
            server.listen(10)
        server.settimeout(0.2)
        run = self._datagrams if protocol == "UDP" else self._connections
        self._threads.append(threading.Thread(target=run, args=(server, name)))
        self._threads[-1].start()

    def _datagrams(self, server: socket.socket, name: bytes) -> None:
        with server:
            while not self._over.is_set():
                with contextlib.suppress(TimeoutError):
                    message, client = server.recvfrom(100)
                    server.sendto(name + b":" + message, client)

    def _connections(self, server: socket.socket, name: bytes) -> None:
        with server:
            while not self._over.is_set():
                with contextlib.suppress(TimeoutError):
                    client, _ = server.accept()
                    self._threads.append(threading.Thread(target=self._answer, args=(client, name)))
                    self._threads[-1].start()

    def _answer(self, client: socket.socket, name: bytes) -> None:
        with client, contextlib.suppress(OSError):
            client.settimeout(30)
            while message := client.recv(1000):
                client.send(name + b":" + message)

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(10)


class Site(NamedTuple):
    node: Node
    clients: dict[str, Namespace]


@pytest.fixture(scope="module", params=["iptables", "local"])
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """TCP, UDP and SCTP on one number, at one pod; a Service of SCTP with affinity, at two."""
    servers = Endpoints()
    with Node(tmp_path_factory.mktemp(request.param)) as node:
        pods = {name: node.pod(*ips) for name, ips in PODS.items()}
        clients = {"pod": node.pod("10.1.0.11", "fd01::11"), "outside": node.outside(), "node": node.net}
        for ip, mask in zip(EXTERNAL, (32, 128), strict=True):
            node.net.add_address("lo", f"{ip}/{mask}")
        for name, protocol in itertools.product(pods, PROTOCOLS):
            if name == b"a" or protocol == "SCTP":
                for ip in PODS[name]:
                    servers.add(pods[name], ip, protocol, name)
        node.apply(*mixed(), *sticky())
        try:
            node.start(f"--capture={request.param}", "--iptables-min-sync-period=50ms")
            yield Site(node, clients)
            assert node.stop() == 0
        finally:
            servers.stop()


def mixed() -> list[dict[str, object]]:
    ports = [port(80, name=name.lower(), protocol=name, node_port=NODE_PORT) for name in PROTOCOLS]
    places = [f"{PODS[b'a'][0]}:8080"], [f"[{PODS[b'a'][1]}]:8080"]
    return [
        service("mixed", list(CLUSTER), ports, externalIPs=[*EXTERNAL, NOBODYS]),
        *(endpoints("mixed", at, port_name=name.lower(), protocol=name) for name in PROTOCOLS for at in places),
    ]


def sticky(affinity: str = "ClientIP") -> list[dict[str, object]]:
    places = [f"{ips[0]}:8080" for ips in PODS.values()], [f"[{ips[1]}]:8080" for ips in PODS.values()]
    return [
        service("sticky", list(STICKY), [port(80, name="calls", protocol="SCTP")], sessionAffinity=affinity),
        *(endpoints("sticky", at, port_name="calls", protocol="SCTP") for at in places),
    ]


@needs_sctp
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_address_from_everywhere(site: Site, protocol: str) -> None:
    """On one number, whichever of the three is spoken."""
    for (name, client), family in itertools.product(site.clients.items(), (0, 1)):
        for ip, number in ((CLUSTER[family], 80), (EXTERNAL[family], 80), (NODE[family], NODE_PORT)):
            assert answer(client, ip, number, protocol) == b"a:hi", f"from {name} to {ip} {number}"


@needs_sctp
def test_affinity_and_turns(site: Site) -> None:
    def answers(ip: str) -> list[bytes]:
        return [b"".join(answer(client, ip, 80) for _ in range(2)) for client in site.clients.values()]

    for ip in STICKY:
        assert sorted(set(answers(ip))) == [b"a:hia:hi", b"b:hib:hi"], "each its own, and they take turns"
    site.node.apply(*mixed(), *sticky("None"))
    eventually(lambda: site.node.rows()["sticky:calls"]["affinity"] == "None")
    for ip in STICKY:
        assert all(found in (b"a:hib:hi", b"b:hia:hi") for found in answers(ip))


@needs_sctp
def test_what_the_node_has_not_is_told_with_the_service_port(site: Site) -> None:
    [row] = [row for row in site.node.services() if row["port"] == "sctp" and row["family"] == "IPv4"]
    assert row["state"] == "serving"
    [problem] = row["problems"]
    assert problem.startswith(f"ExternalIP {NOBODYS}:80/SCTP: not an address of this host")
    assert 'protocol_available{protocol="SCTP"} 1.0' in site.node.get("/metrics")
    assert f"local {NOBODYS}" not in site.node.net.run("ip route show table local")


@needs_sctp
@pytest.mark.parametrize("site", ["iptables"], indirect=True)  # it is seconds until a path is given up
@pytest.mark.parametrize("place", ["cluster IP", "node port"])
def test_a_client_of_two_paths_may_lose_one_in_the_middle(site: Site, place: str) -> None:
    """By a node port it knows both addresses of the node's, by a cluster IP that alone."""
    node = site.node.net
    with Namespace() as pod:
        for number, metric in ((8, 10), (9, 20)):
            here, there = node.connect(pod, f"10.{number}.0.1/24", f"10.{number}.0.2/24")
            pod.run(f"ip route add {CLUSTER[0]} via 10.{number}.0.1 metric {metric}")
            if number == 8:
                first = there
        with plain(pod, "") as client:
            both = pysctp.sctpsocket_tcp(client.family, client)
            with pod.entered():
                both.bindx([("10.8.0.2", 0)])
                both.bindx([("10.9.0.2", client.getsockname()[1])])
            client.settimeout(20)
            client.connect((CLUSTER[0], 80) if place == "cluster IP" else ("10.8.0.1", NODE_PORT))
            known = {ip for ip, _ in both.getpaddrs()}
            assert known == {CLUSTER[0]} if place == "cluster IP" else known >= {"10.8.0.1", "10.9.0.1"}
            for number in range(60):
                if number == 20:
                    pod.run(f"ip link set {first} down")
                client.send(b"%d" % number)
                assert client.recv(100) == b"a:%d" % number


def test_a_kernel_without_it_is_told_of_and_all_else_is_served(tmp_path: Path) -> None:
    if not host.sctp():
        pytest.skip("this kernel has SCTP")
    servers = Endpoints()
    with Node(tmp_path) as node:
        servers.add(node.pod(*PODS[b"a"]), PODS[b"a"][0], "TCP", b"a")
        try:
            node.apply(*mixed())
            node.start("--iptables-sync-period=100ms", "--iptables-min-sync-period=0s")
            before = syncs(node)
            eventually(lambda: syncs(node) > before + 2)  # each of which tries again
            rows = [row for row in node.services() if row["protocol"] == "SCTP"]
            assert [(row["family"], row["state"]) for row in rows] == [("IPv4", "down"), ("IPv6", "down")]
            assert all("modprobe sctp" in problem for row in rows for problem in row["problems"])
            available = re.findall(r'protocol_available\{protocol="(\w+)"\} (\S+)', node.get("/metrics"))
            assert dict(available) == {"TCP": "1.0", "UDP": "1.0", "SCTP": "0.0"}
            assert len(re.findall("WARNING .*modprobe sctp", node.log())) == 1
            for ip, number in ((CLUSTER[0], 80), (NOBODYS, 80), (NODE[0], NODE_PORT)):
                assert answer(node.net, ip, number, "TCP") == b"a:hi"
            assert node.stop() == 0
        finally:
            servers.stop()


def syncs(node: Node) -> float:
    found = re.search(r"sync_proxy_rules_duration_seconds_count (\S+)", node.get("/metrics"))
    return float(found[1]) if found else 0.0
