"""Real programs through every kind of address, from everywhere: what works for one client works for the others."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.e2e import programs
from tests.e2e.node import Node, Object, endpoints, port, service
from tests.e2e.programs import LONG_TEXT, PAGE, PORTS
from tests.netns import Namespace

pytestmark = pytest.mark.privileged

CLUSTER = ("10.96.0.10", "fd00:96::10")
LOCAL = ("10.1.0.1", "fd01::1")
FOREIGN = ("198.51.100.7", "2001:db8:7::7")
INGRESS = ("203.0.113.9", "2001:db8:9::9")
LOOPBACK = ("127.0.0.1", "::1")
IPV4, IPV6 = 0, 1
FAMILIES = {"IPv4": IPV4, "IPv6": IPV6}

SERVICE_PORTS = {
    "http": port(80, name="http", node_port=30080),
    "dns": port(53, name="dns", protocol="UDP", node_port=30053),
    "dns-tcp": port(53, name="dns-tcp", node_port=30053),
    "redis": port(6379, name="redis", node_port=30379),
    "iperf3": port(5201, name="iperf3", node_port=30201),
    "iperf3-udp": port(5201, name="iperf3-udp", protocol="UDP", node_port=30201),
}


class Place(NamedTuple):
    """One kind of address a Service has."""

    ips: tuple[str, str]
    is_node_port: bool = False

    def of(self, program: str, family: int) -> tuple[str, int]:
        spec = SERVICE_PORTS[program]
        return self.ips[family], spec["nodePort" if self.is_node_port else "port"]


PLACES = {
    "cluster IP": Place(CLUSTER),
    "external IP of the node": Place(LOCAL),
    "external IP of nobody": Place(FOREIGN),
    "load-balancer IP": Place(INGRESS),
    "node port": Place(LOCAL, is_node_port=True),
    "node port on loopback": Place(LOOPBACK, is_node_port=True),
}
CLIENTS = ["node", "pod", "pod past iptables", "host outside", "the endpoint itself"]
"""A bridge shows packets to iptables or not, by a setting that both kinds of node have."""


def everything(*endpoint_ips: str) -> list[Object]:
    """One Service with all its ports and addresses; TCP and UDP share numbers."""
    slices = [
        endpoints(
            "all",
            [f"{f'[{ip}]' if ':' in ip else ip}:{PORTS[name.partition('-')[0]]}"],
            port_name=name,
            protocol=spec["protocol"],
        )
        for name, spec in SERVICE_PORTS.items()
        for ip in endpoint_ips
    ]
    external_ips = [*LOCAL, *FOREIGN]
    whole = service("all", list(CLUSTER), [*SERVICE_PORTS.values()], ingress=INGRESS, externalIPs=external_ips)
    return [whole, *slices]


class Site(NamedTuple):
    node: Node
    server: Namespace
    clients: dict[str, Namespace]


@contextlib.contextmanager
def built(directory: Path, capture: str) -> Iterator[Site]:
    """A node, a pod with all the servers, and whoever may be their client."""
    with Node(directory, capture) as node:
        server, pod, outside = node.pod("10.1.0.2", "fd01::2"), node.pod("10.1.0.3", "fd01::3"), node.outside()
        programs.start_all(server, directory / "programs")
        node.apply(*everything("10.1.0.2", "fd01::2"))
        node.start("--udp-timeout=5s")
        clients = {"node": node.net, "host outside": outside, "the endpoint itself": server}
        yield Site(node, server, clients | dict.fromkeys(("pod", "pod past iptables"), pod))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, capture: str) -> Iterator[Site]:
    with built(tmp_path_factory.mktemp("site"), capture) as site:
        yield site


@pytest.fixture
def node(site: Site) -> Node:
    return site.node


@pytest.fixture
def client(site: Site, request: pytest.FixtureRequest) -> Namespace:
    name: str = request.param
    found = site.clients[name]
    if name in ("pod", "pod past iptables", "the endpoint itself"):
        show_bridged_packets_to_iptables(site.node, name != "pod past iptables")
    return found


def show_bridged_packets_to_iptables(node: Node, shown: bool) -> None:
    settings = Path("/proc/sys/net/bridge")
    if not settings.exists():  # without br_netfilter none are shown
        return
    for tool in ("iptables", "ip6tables"):
        node.net.run(f"sh -c 'echo {shown:d} >{settings}/bridge-nf-call-{tool}'")


REDIRECTED = [pytest.mark.captures("iptables", "nftables", why="where nothing is redirected it stays somebody else's")]
EVERYWHERE = [
    pytest.param(client, place, id=f"{what} from {client}", marks=REDIRECTED if place.ips in (FOREIGN, INGRESS) else ())
    for client, (what, place) in itertools.product(CLIENTS, PLACES.items())
    if client == "node" or place.ips != LOOPBACK
]
everywhere = pytest.mark.parametrize(("client", "place"), EVERYWHERE, indirect=["client"])
either_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())


@either_family
@everywhere
def test_http(client: Namespace, place: Place, family: int) -> None:
    assert programs.curl(client, *place.of("http", family)) == PAGE


@either_family
@everywhere
def test_dns(client: Namespace, place: Place, family: int) -> None:
    """UDP and TCP on one number; an answer that is cut short is asked for again, at the same address."""
    where = place.of("dns", family)
    assert programs.dig(client, *where, "web.test A +notcp") == ["192.0.2.80"]
    assert programs.dig(client, *where, "web.test AAAA +tcp") == ["2001:db8::80"]
    [text] = programs.dig(client, *where, "long.test TXT +notcp")
    assert text == " ".join(f'"{part}"' for part in LONG_TEXT)


@either_family
@everywhere
def test_redis(client: Namespace, place: Place, family: int) -> None:
    where = place.of("redis", family)
    value = f"{where[0]} {where[1]}"
    assert programs.redis(client, *where, f"SET key '{value}'") == "OK"
    assert programs.redis(client, *where, "GET key") == value


BULK = [
    "--bytes 64M",
    "--bytes 64M --reverse",
    "--bytes 256M --parallel 4",
    "--udp --bitrate 20M --bytes 1M --length 1200",
    "--udp --bitrate 20M --bytes 1M --length 1200 --bidir",
]
"""Options of iperf3."""
RELAYED = [pytest.mark.captures("iptables", why="which way most bytes go is the relay's affair, however clients came")]


def assert_bulk_arrives(server: Namespace, client: Namespace, where: tuple[str, int], options: str) -> None:
    report = programs.iperf3(server, client, *where, options)
    for direction in ("", "_bidir_reverse") if "--bidir" in options else ("",):
        sent, received = report[f"sum_sent{direction}"]["bytes"], report[f"sum_received{direction}"]["bytes"]
        assert sent >= 1_000_000
        # What is under way at the end is not counted, which may be most of what buffers hold on both sides of the proxy
        # (TCP's grow to 32 MB each), and a busy machine loses datagrams.
        assert received > sent / (2 if "--udp" in options else 16)


@either_family
@pytest.mark.parametrize("options", [pytest.param(each, marks=RELAYED * (n % 2)) for n, each in enumerate(BULK)])
@pytest.mark.parametrize("client", ["node", "pod", "host outside"], indirect=True)
def test_bulk(site: Site, client: Namespace, options: str, family: int) -> None:
    place = PLACES["cluster IP"].of("iperf3", family)
    assert_bulk_arrives(site.server, client, place, options)


@either_family
@pytest.mark.parametrize("client", ["node", "pod"], indirect=True)
def test_many_redis_clients(client: Namespace, family: int) -> None:
    rates = programs.redis_benchmark(client, *PLACES["cluster IP"].of("redis", family), 20_000)
    assert set(rates) == {"SET", "GET"}
    assert all(rates.values())


@pytest.fixture(scope="module")
def lonely(tmp_path_factory: pytest.TempPathFactory, capture: str) -> Iterator[Node]:
    """A node with nothing but lo, where everything runs: no default route, no address of its own."""
    directory = tmp_path_factory.mktemp("lonely")
    with Node(directory, capture) as node:
        programs.start_all(node.net, directory / "programs")
        node.apply(*everything(*LOOPBACK))
        node.start("--udp-timeout=5s")
        yield node


LONELY_PLACES = [
    pytest.param(place, id=what, marks=REDIRECTED if place.ips in (FOREIGN, INGRESS) else ())
    for what, place in PLACES.items()
    if place.ips != LOCAL
]


@either_family
@pytest.mark.parametrize("place", LONELY_PLACES)
def test_a_node_with_nothing_but_lo(lonely: Node, place: Place, family: int) -> None:
    client = lonely.net
    assert client.run(f"ip -{'64'[family == IPV4]} route show default") == ""
    assert programs.curl(client, *place.of("http", family)) == PAGE
    assert programs.dig(client, *place.of("dns", family), "web.test A +notcp") == ["192.0.2.80"]
    assert programs.dig(client, *place.of("dns", family), "web.test A +tcp") == ["192.0.2.80"]
    assert programs.redis(client, *place.of("redis", family), "PING") == "PONG"
    for options in BULK[::2]:
        assert_bulk_arrives(client, client, place.of("iperf3", family), options)
