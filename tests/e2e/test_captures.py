"""What is one capture's own, or is between two of them; what they have in common, the other tests run over all."""

from __future__ import annotations

import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.client import answer, ask, connect
from tests.e2e.node import Node, endpoints, port, service
from tests.e2e.test_traffic import LOOPBACK
from tests.netns import Namespace, eventually

pytestmark = pytest.mark.privileged

WAYS = ("iptables", "nftables", "local")
ENDPOINT = "python3 tests/e2e/endpoint.py"


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    """With an endpoint beside the proxy, at :9000, and no route to anywhere."""
    with Node(tmp_path) as node:
        node.net.spawn(f"{ENDPOINT} one 9000")
        eventually(lambda: ":9000" in node.net.run("ss -Hltn") and ":9000" in node.net.run("ss -Hlun"))
        node.apply(*web("10.96.0.10", "fd00:96::10"))
        yield node


def web(*ips: str, name: str = "web", number: int = 80) -> list[dict[str, object]]:
    """TCP and UDP on one number, in both families."""
    ports = [port(number, name="tcp", node_port=number + 30000), port(number, name="udp", protocol="UDP")]
    slices = [
        endpoints(name, [f"{ip}:9000"], port_name=each["name"], protocol=each["protocol"])
        for ip in ("127.0.0.1", "[::1]")
        for each in ports
    ]
    return [service(name, list(ips), ports), *slices]


def left(node: Node) -> dict[str, str]:
    """What each way has put into the kernel."""
    routes = [node.net.run(f"ip -{family} route show table all proto 117") for family in "46"]
    return {
        "iptables": "".join(line for line in node.rules().splitlines(keepends=True) if "USERSPACE" in line),
        "nftables": node.net.run("nft list ruleset") if "userspace-proxy" in node.net.run("nft list tables") else "",
        "local": "".join(line for text in routes for line in text.splitlines(keepends=True) if "local" in line),
    }


def assert_served(node: Node, client: Namespace) -> None:
    for ip in ("10.96.0.10", "fd00:96::10"):
        assert answer(client, ip, 80) == b"one:hi"
        assert answer(client, ip, 80, socket.SOCK_DGRAM) == b"one:hi"
    for ip in LOOPBACK:
        assert answer(client, ip, 30080) == b"one:hi"


def test_one_way_leaves_nothing_for_the_next_though_it_was_killed(node: Node) -> None:
    for way in (*WAYS, WAYS[0], "none"):
        node.start(f"--capture={way}")
        assert {name for name, found in left(node).items() if found} == {way} - {"none"}
        if way != "none":
            assert_served(node, node.net)
        assert node.stop(signal.SIGKILL) == -signal.SIGKILL
    assert set(left(node).values()) == {""}


@pytest.mark.parametrize("way", WAYS[1:])
def test_services_come_and_go_and_connections_stay(node: Node, way: str) -> None:
    node.start(f"--capture={way}", "--iptables-min-sync-period=0s")
    with connect(node.net, "10.96.0.10", 80) as client:
        assert ask(client) == b"one:hi"
        node.apply(*web("10.96.0.11", "fd00:96::11", name="other", number=81), file="other")
        eventually(lambda: answer(node.net, "fd00:96::11", 81, timeout=1) == b"one:hi")
        assert "10.96.0.11" in left(node)[way]
        node.apply(file="other")
        eventually(lambda: "96.0.11" not in left(node)[way] and "96::11" not in left(node)[way])
        assert answer(node.net, "10.96.0.11", 81, timeout=1) == b""
        assert ask(client) == b"one:hi"
        # With no endpoint it is refused, not swallowed.
        node.apply(
            service("web", ["10.96.0.10", "fd00:96::10"], [port(80, name="tcp"), port(80, name="udp", protocol="UDP")])
        )
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            eventually(lambda kind=kind: is_refused(node.net, "10.96.0.10", kind))
            eventually(lambda kind=kind: is_refused(node.net, "fd00:96::10", kind))
        assert ask(client) == b"one:hi"


def is_refused(where: Namespace, ip: str, kind: int) -> bool:
    try:
        with connect(where, ip, 80, kind, 1) as client:
            ask(client)
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def test_a_foreign_flush_is_repaired_before_anybody_notices(node: Node) -> None:
    node.start("--capture=nftables", "--iptables-sync-period=1h", "--udp-timeout=1m")
    with connect(node.net, "10.96.0.10", 80) as client, connect(node.net, "fd00:96::10", 80, socket.SOCK_DGRAM) as flow:
        assert ask(client) == ask(flow) == b"one:hi"
        for damage in ("flush ruleset", "delete table ip userspace-proxy", "flush map ip6 userspace-proxy portals"):
            node.net.run(f"nft {damage}")
            eventually(lambda: left(node)["nftables"].count("default/web:tcp") == 4)  # no sync for an hour
            assert_served(node, node.net)
            assert ask(client) == ask(flow) == b"one:hi"
    eventually(lambda: node.log().count("was changed by nft (pid") == 4)


def test_a_listener_in_the_way_is_named_and_the_rest_is_served(node: Node) -> None:
    with node.net.entered(), socket.create_server(("0.0.0.0", 80)):
        node.start("--capture=local", "--iptables-sync-period=1s", "--iptables-min-sync-period=0s")
        row = next(row for row in node.services() if (row["protocol"], row["family"]) == ("TCP", "IPv4"))
        [problem] = row["problems"]
        assert re.match(r"10\.96\.0\.10:80 cannot be had: Address already in use, by \S+ \(pid \d+\); end it", problem)
        assert answer(node.net, "10.96.0.10", 80, socket.SOCK_DGRAM) == b"one:hi"
        assert answer(node.net, "127.0.0.1", 30080) == b"one:hi"
    eventually(lambda: answer(node.net, "10.96.0.10", 80, timeout=1) == b"one:hi")


def test_a_portal_that_passes_to_another_service_port_is_no_problem(node: Node) -> None:
    """Whoever gets it may be asked to listen there before the other has left."""
    node.start("--capture=local", "--iptables-min-sync-period=0s")
    for first, second in (("10.96.0.11", "10.96.0.10"), ("10.96.0.10", "10.96.0.11")):
        node.apply(*web(first, name="web"), *web(second, name="another", number=80)[:1])
        eventually(lambda ip=first: node.rows()["web:tcp"]["clusterIPs"] == [f"{ip}:80"])
        eventually(lambda ip=first: answer(node.net, ip, 80, timeout=1) == b"one:hi")
    assert not any(row["problems"] for row in node.services() if row["name"] == "web")
    assert "10:80 cannot be had" not in node.log()


@pytest.mark.parametrize("way", WAYS)
def test_five_thousand_services(node: Node, way: str) -> None:
    """In one family, because a proxy socket of each takes a descriptor, and under `local` two."""
    objects = []
    for number in range(5000):
        name, ip = f"s{number}", f"10.97.{number // 250}.{number % 250}"
        objects += [service(name, ip, [port(80)]), endpoints(name, ["127.0.0.1:9000"])]
    node.apply(*objects)
    node.start(f"--capture={way}", "--bind-address=0.0.0.0", wait=False)
    eventually(node.is_ready, 60)
    for ip in ("10.97.0.0", "10.97.9.9", "10.97.19.249"):
        assert answer(node.net, ip, 80) == b"one:hi"
    assert node.stop(timeout=60) == 0
    assert set(left(node).values()) == {""}
