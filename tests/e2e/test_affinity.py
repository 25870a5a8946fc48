"""Whose turn it is, as clients at several addresses see it: round robin, and ClientIP affinity switched live."""

from __future__ import annotations

import itertools
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.e2e import programs
from tests.e2e.client import DATAGRAM, ask, crowd
from tests.e2e.node import Node, Object, endpoints, port, service
from tests.netns import Namespace, eventually

pytestmark = pytest.mark.privileged

ENDPOINT = Path(__file__).with_name("endpoint.py")
SERVERS = {"10.1.0.2": "fd01::2", "10.1.0.3": "fd01::3", "10.1.0.4": "fd01::4"}
STICKY = {"sessionAffinity": "ClientIP"}
LOOSE = {"sessionAffinity": "None"}


class Site(NamedTuple):
    node: Node
    first: Namespace
    second: Namespace


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, capture: str) -> Iterator[Site]:
    """Three pods that tell who they are, and two that ask. Each test serves a Service of its own."""
    directory = tmp_path_factory.mktemp("site")
    with Node(directory, capture) as node:
        for name, (ip, ip6) in zip("abc", SERVERS.items(), strict=True):
            server = node.pod(ip, ip6)
            programs.start_nginx(server, directory / name)
            server.spawn(f"{sys.executable} {ENDPOINT} {name} 9053")
            programs.await_listener(server, programs.PORTS["http"])
            programs.await_listener(server, 9053)
        node.start("--iptables-min-sync-period=50ms", "--udp-timeout=10s")
        yield Site(node, node.pod("10.1.0.11", "fd01::11"), node.pod("10.1.0.12", "fd01::12"))


@pytest.fixture
def node(site: Site) -> Node:
    return site.node


class Web(NamedTuple):
    """A Service of one test: HTTP on port 80, and datagrams on port 53."""

    node: Node
    name: str
    number: int

    def apply(self, servers: int = 3, **spec: object) -> None:
        """Serve it by so many servers."""
        ips, ips6 = list(SERVERS)[:servers], list(SERVERS.values())[:servers]
        ports = [port(80, name="http", node_port=30000 + self.number), port(53, name="udp", protocol="UDP")]
        self.node.apply(
            service(self.name, [self.ip, self.ip6], ports, **spec),
            endpoints(self.name, [f"{ip}:8080" for ip in ips], port_name="http"),
            endpoints(self.name, [f"[{ip}]:8080" for ip in ips6], port_name="http"),
            endpoints(self.name, [f"{ip}:9053" for ip in ips], port_name="udp", protocol="UDP"),
            file=self.name,
        )
        # Each family has a worker of its own, and either may be the first.
        for ip in (self.ip, self.ip6):
            eventually(lambda found=ip: self.node.captures(found, 80) and self.node.captures(found, 53, "udp"))
        eventually(lambda: len(self.row()["endpoints"]) == servers)

    @property
    def ip(self) -> str:
        return f"10.96.0.{self.number}"

    @property
    def ip6(self) -> str:
        return f"fd00:96::{self.number}"

    def row(self) -> Object:
        return self.node.rows()[f"{self.name}:http"]

    def changes(self) -> int:
        """How often the proxy has taken over another version of the Service."""
        return self.node.log().count(f"default/{self.name}:http: changed")


@pytest.fixture
def web(node: Node, numbers: Iterator[int]) -> Web:
    number = next(numbers)
    return Web(node, f"web{number}", number)


@pytest.fixture(scope="module")
def numbers() -> Iterator[int]:
    return itertools.count(100)


def where(client: Namespace, ip: str, number: int = 80) -> str:
    """The endpoint that takes a new connection of curl's."""
    return programs.curl(client, ip, number, "where")


def wheres(client: Namespace, ip: str, count: int = 6) -> list[str]:
    return [where(client, ip) for _ in range(count)]


@pytest.mark.parametrize("family", ["IPv4", "IPv6"])
def test_round_robin_takes_strict_turns_whoever_asks(site: Site, web: Web, family: str) -> None:
    web.apply()
    ip, node_ip = (web.ip6, "fd01::1") if family == "IPv6" else (web.ip, "10.1.0.1")
    asked = [
        (site.first, ip, 80),
        (site.second, ip, 80),
        (site.node.net, ip, 80),
        (site.first, node_ip, 30000 + web.number),
    ]
    turns = [where(*place) for place in asked * 3]
    assert set(turns) == set(SERVERS.values() if family == "IPv6" else SERVERS)
    assert turns[3:] == turns[:-3]


def test_each_flow_takes_a_turn_and_stays(site: Site, web: Web) -> None:
    web.apply()
    with crowd(6, site.first, web.ip, 53, DATAGRAM) as clients:
        answers = [[ask(client) for client in clients] for _ in range(3)]
    assert answers[0] == answers[1] == answers[2]
    assert set(answers[0]) == {b"a:hi", b"b:hi", b"c:hi"}
    assert answers[0][:3] == answers[0][3:]


@pytest.mark.parametrize("family", ["IPv4", "IPv6"])
def test_each_client_stays_with_its_endpoint(site: Site, web: Web, family: str) -> None:
    web.apply(**STICKY)
    ip = web.ip6 if family == "IPv6" else web.ip
    clients = (site.first, site.second, site.node.net)
    turns = [[where(client, ip) for client in clients] for _ in range(4)]
    assert turns == [turns[0]] * 4
    assert len(set(turns[0])) == 3
    # A node port is another way to the same service port, and the client is the same.
    node_ip = "fd01::1" if family == "IPv6" else "10.1.0.1"
    assert where(site.second, node_ip, 30000 + web.number) == turns[0][1]
    labels = f'family="{family}",namespace="default",port="http",protocol="TCP",service="{web.name}"'
    found = re.search(f"userspace_proxy_affinity_hits_total{{{labels}}} (.*)", site.node.get("/metrics"))
    assert found
    assert float(found[1]) == 10


def test_flows_of_a_client_stay_with_its_endpoint(site: Site, web: Web) -> None:
    web.apply(**STICKY)
    found = []
    for client in (site.first, site.second):
        with crowd(5, client, web.ip, 53, DATAGRAM) as sockets:
            found.append({ask(sock) for sock in sockets})
    assert [len(names) for names in found] == [1, 1]
    assert found[0] != found[1]


def test_affinity_is_switched_while_it_serves(site: Site, web: Web) -> None:
    web.apply()
    assert len(set(wheres(site.first, web.ip))) == 3
    for spec, count in ((STICKY, 1), (LOOSE, 3), (STICKY, 1)):
        before, port_before = web.changes(), web.row()["proxyPort"]
        web.apply(**spec)
        eventually(lambda: web.changes() >= before + 2)  # of both families
        assert len(set(wheres(site.first, web.ip))) == count
        assert len(set(wheres(site.second, web.ip6))) == count
        assert web.row()["proxyPort"] == port_before


def test_a_new_affinity_timeout_holds_for_clients_that_are_known(site: Site, web: Web) -> None:
    web.apply(**STICKY)
    [pinned] = set(wheres(site.first, web.ip))
    web.apply(**STICKY, sessionAffinityConfig={"clientIP": {"timeoutSeconds": 1}})
    eventually(lambda: web.changes() >= 2)
    time.sleep(1.2)
    assert where(site.first, web.ip) != pinned


def test_only_clients_of_an_endpoint_that_left_move(site: Site, web: Web) -> None:
    web.apply(**STICKY)
    clients = (site.first, site.second, site.node.net)
    before = [where(client, web.ip) for client in clients]
    gone = list(SERVERS)[2]
    web.apply(servers=2, **STICKY)
    after = [where(client, web.ip) for client in clients]
    assert gone not in after
    assert [new for new, old in zip(after, before, strict=True) if old != gone] == [ip for ip in before if ip != gone]
    web.apply(**STICKY)
    assert [where(client, web.ip) for client in clients] == after
