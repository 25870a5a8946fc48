"""Flags that decide where the proxy listens and who gets in, as clients see them."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.client import DATAGRAM, answer, ask, connect
from tests.e2e.node import Node, endpoints, port, service
from tests.e2e.programs import await_listener
from tests.netns import Namespace, eventually

pytestmark = pytest.mark.privileged

ENDPOINT = Path(__file__).with_name("endpoint.py")
CLUSTER = ["10.96.0.10", "fd00:96::10"]
FOREIGN = ["198.51.100.7", "2001:db8:7::7"]
WEB = [
    service("web", CLUSTER, [port(80, name="t", node_port=30080), port(80, name="u", protocol="UDP", node_port=30080)]),
    *(
        endpoints("web", [f"{ip}:8080"], port_name=name, protocol=protocol)
        for ip in ("10.1.0.2", "[fd01::2]")
        for name, protocol in (("t", "TCP"), ("u", "UDP"))
    ),
]
WEB[0]["spec"]["externalIPs"] = FOREIGN
KINDS = {"TCP": 1, "UDP": DATAGRAM}


@pytest.fixture
def node(tmp_path: Path, capture: str) -> Iterator[Node]:
    with Node(tmp_path, capture) as made:
        for limit in ("ipv4/icmp_ratelimit", "ipv6/icmp/ratelimit"):  # else the seventh refusal of a second is silent
            made.net.run(f"sh -c 'echo 0 >/proc/sys/net/{limit}'")
        server = made.pod("10.1.0.2", "fd01::2")
        server.spawn(f"{sys.executable} {ENDPOINT} a 8080")
        await_listener(server, 8080)
        made.apply(*WEB)
        yield made


@pytest.fixture
def pod(node: Node) -> Namespace:
    return node.pod("10.1.0.3", "fd01::3")


@pytest.fixture
def outside(node: Node) -> Namespace:
    """A host of 10.2.0.0/24 and fd02::/64, where the node is 10.2.0.1 and fd02::1."""
    return node.outside()


def is_refused(where: Namespace, ip: str, number: int, kind: int = 1) -> bool:
    try:
        with connect(where, ip, number, kind, timeout=2) as client:
            ask(client)
    except OSError as error:
        return isinstance(error, ConnectionRefusedError)
    return False


# Each address of the node, and who may call it.
NODE_ADDRESSES = [
    ("10.1.0.1", ("pod", "outside", "node")),
    ("fd01::1", ("pod", "outside", "node")),
    ("10.2.0.1", ("pod", "outside", "node")),
    ("fd02::1", ("pod", "outside", "node")),
    ("127.0.0.1", ("node",)),
    ("::1", ("node",)),
]


@pytest.mark.parametrize(
    ("networks", "served"),
    [
        pytest.param("10.2.0.0/24,fd02::/64", {"10.2.0.1", "fd02::1"}, id="one network of each family"),
        pytest.param("127.0.0.0/8", {"127.0.0.1"}, id="loopback"),
        pytest.param("::/0", {"fd01::1", "fd02::1", "::1"}, id="one family"),
        pytest.param("192.0.2.0/24", set(), id="none"),
        pytest.param("", {ip for ip, _ in NODE_ADDRESSES}, id="all"),
    ],
)
def test_node_ports_on_some_addresses_only(
    node: Node, pod: Namespace, outside: Namespace, networks: str, served: set[str]
) -> None:
    node.start(f"--nodeport-addresses={networks}")
    clients = {"pod": pod, "outside": outside, "node": node.net}
    for kind in KINDS.values():
        for ip, names in NODE_ADDRESSES:
            for name in names:
                if ip in served:
                    assert answer(clients[name], ip, 30080, kind) == b"a:hi", (ip, name)
                else:
                    assert is_refused(clients[name], ip, 30080, kind), (ip, name)
        for ip in CLUSTER:
            assert answer(pod, ip, 80, kind) == b"a:hi"


@pytest.mark.parametrize("family", [0, 1], ids=["IPv4", "IPv6"])
def test_one_bind_address_serves_everybody(node: Node, pod: Namespace, outside: Namespace, family: int) -> None:
    """The proxy listens on one address of the node, which takes another kind of rule; one family is served then."""
    bind, loopback = [("10.1.0.1", "127.0.0.1"), ("fd01::1", "::1")][family]
    node.own(FOREIGN[family])
    node.start(f"--bind-address={bind}")
    is_local = node.capture == "local"
    assert is_local or re.search("-j DNAT|dnat", node.captured())
    assert not re.search("-j REDIRECT|redirect", node.captured())
    for kind in KINDS.values():
        for client in (pod, outside, node.net):
            for ip, number in ((CLUSTER[family], 80), (FOREIGN[family], 80), (bind, 30080)):
                assert answer(client, ip, number, kind) == b"a:hi", (ip, number)
        # Where nothing is redirected, node ports are listened on there as well.
        assert answer(node.net, loopback, 30080, kind) == (b"" if is_local else b"a:hi")
    row = next(row for row in node.services() if (row["protocol"], row["family"]) == ("TCP", f"IPv{'46'[family]}"))
    proxy_port = row["proxyPort"]
    listeners = re.findall(rf" \[?([^ ]*?)\]?:{proxy_port} ", node.net.run("ss -Hlnt"))
    assert listeners == [loopback if is_local else bind]


def test_proxy_ports_come_from_their_range(node: Node, pod: Namespace) -> None:
    node.start("--proxy-port-range=40000-40003")
    assert sorted(row["proxyPort"] for row in node.services()) == [*range(40000, 40004)]
    for ip in CLUSTER:
        for kind in KINDS.values():
            assert answer(pod, ip, 80, kind) == b"a:hi"


@pytest.mark.captures("iptables", why="who gets a proxy port is settled before anything is captured")
def test_a_range_that_is_too_small_serves_as_many_as_it_can(node: Node, pod: Namespace) -> None:
    second = service("second", "10.96.0.20", [port(80)])
    node.apply(service("first", "10.96.0.10", [port(80)]), endpoints("first", ["10.1.0.2:8080"]))
    node.apply(second, endpoints("second", ["10.1.0.2:8080"]), file="second")
    node.start("--proxy-port-range=40000", "--iptables-sync-period=300ms", "--iptables-min-sync-period=50ms")
    [up] = [name for name, row in node.rows().items() if row["state"] == "serving"]
    [down] = [row for row in node.rows().values() if row["state"] == "down"]
    ips = {"first": "10.96.0.10", "second": "10.96.0.20"}
    assert answer(pod, ips[up], 80) == b"a:hi"
    assert "--proxy-port-range" in down["problems"][0]
    # Once the one goes, the other has its turn by itself.
    node.apply(file="all" if up == "first" else "second")
    eventually(lambda: answer(pod, ips[down["name"]], 80, timeout=1) == b"a:hi")


@pytest.mark.captures("iptables", "nftables", why="where nothing is redirected, nobody comes by another way")
@pytest.mark.parametrize("bind", ["0.0.0.0", "10.1.0.1"])
def test_who_connects_to_a_proxy_port_itself_is_reset(
    node: Node, pod: Namespace, outside: Namespace, bind: str
) -> None:
    node.start(f"--bind-address={bind}")
    tcp = next(row for row in node.services() if (row["family"], row["protocol"]) == ("IPv4", "TCP"))
    own = {node.net: ["10.1.0.1"] + ["127.0.0.1"] * (bind == "0.0.0.0")}
    strangers = [(client, ip) for client in (pod, outside, node.net) for ip in own.get(client, ["10.1.0.1"])]
    for client, ip in strangers:
        with pytest.raises(ConnectionResetError), connect(client, ip, tcp["proxyPort"]) as sock:
            ask(sock)
    assert re.search(rf'\{{outcome="not_captured",.*service="web"\}} {len(strangers)}\.0', node.get("/metrics"))
    assert answer(pod, CLUSTER[0], 80) == b"a:hi"


CONFIG = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: userspace\n"


@pytest.mark.parametrize(
    "workers", [1, pytest.param(2, marks=pytest.mark.captures("iptables", why="workers know nothing of the capture"))]
)
def test_a_config_map_that_changes(node: Node, pod: Namespace, tmp_path: Path, workers: int) -> None:
    """As kubelet changes it, by turning a link. The same process goes on, and keeps nothing of what was before."""
    for number, body in enumerate(("portRange: 21000-21100\n", "portRange: 22000-22100\nudpIdleTimeout: 9s\n")):
        (tmp_path / f"data{number}").mkdir()
        (tmp_path / f"data{number}" / "config.conf").write_text(CONFIG + body)
    (tmp_path / "data").symlink_to("data0")
    before = node.captured()
    node.start(
        f"--config={tmp_path}/data/config.conf", f"--workers={workers}", "--drain-timeout=200ms", "--udp-timeout=1m"
    )
    assert node.process is not None
    assert answer(pod, CLUSTER[0], 80) == b"a:hi"
    assert {row["proxyPort"] // 1000 for row in node.rows().values()} == {21}
    descriptors = node.descriptors()
    (tmp_path / "next").symlink_to("data1")
    (tmp_path / "next").rename(tmp_path / "data")
    eventually(lambda: node.log().count("SERVICE PORT") == 2, 20)
    assert {row["proxyPort"] // 1000 for row in node.rows().values()} == {22}
    assert not re.search(r"--to-ports 21", node.captured())
    assert not re.search(r":21\d\d\d ", node.net.run("ss -Hlntu"))
    for ip in CLUSTER:
        for kind in KINDS.values():
            assert answer(pod, ip, 80, kind) == b"a:hi"
    eventually(lambda: abs(node.descriptors() - descriptors) <= 2)  # the two flows; connections have just ended
    assert len(Path(f"/proc/{node.process.pid}/task/{node.process.pid}/children").read_text().split()) <= 2 + workers
    assert node.stop() == 0
    assert node.captured() == before
