"""What others break, and what a killed run leaves: repaired, replaced, removed, with foreign rules untouched."""

from __future__ import annotations

import concurrent.futures
import contextlib
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.client import DATAGRAM, answer, ask, connect
from tests.e2e.node import Node, endpoints, port, service
from tests.netns import Namespace, eventually

pytestmark = pytest.mark.privileged

ENDPOINT = Path(__file__).with_name("endpoint.py")
DUAL = ["10.96.0.10", "fd00:96::10"]
WEB = service("web", DUAL, [port(80, node_port=30080)])
DNS = service("dns", ["10.96.0.11", "fd00:96::11"], [port(53, protocol="UDP", node_port=30053)])
WEB_ENDPOINTS = (endpoints("web", ["10.1.0.2:8080"]), endpoints("web", ["[fd01::2]:8080"]))
DNS_ENDPOINTS = tuple(endpoints("dns", [address], protocol="UDP") for address in ("10.1.0.2:8080", "[fd01::2]:8080"))
ALL = (WEB, *WEB_ENDPOINTS, DNS, *DNS_ENDPOINTS)
SOON = ("--iptables-sync-period=200ms", "--iptables-min-sync-period=50ms")

FOREIGN = (
    "-t nat -N FOREIGN",
    "-t nat -A FOREIGN -p tcp --dport 9 -j RETURN",
    "-t nat -A PREROUTING -p tcp --dport 9 -j FOREIGN",
    "-t nat -A OUTPUT -p tcp --dport 9 -j FOREIGN",
    "-t nat -A POSTROUTING -p tcp --dport 9 -j ACCEPT",
    "-t filter -N KUBE-FOREIGN",
    "-t filter -A INPUT -p tcp --dport 9 -m comment --comment default/web -j KUBE-FOREIGN",
    "-t mangle -A PREROUTING -p tcp --dport 9 -j MARK --set-mark 0x4000",
)


chains = pytest.mark.captures("iptables", why="it tells ours from foreign rules in tables that both share")


@pytest.fixture
def node(tmp_path: Path, capture: str) -> Iterator[Node]:
    """A node where others have rules too."""
    with Node(tmp_path, capture) as made:
        made.pod("10.1.0.2", "fd01::2").spawn(f"{sys.executable} {ENDPOINT} a 8080")
        for tool in ("iptables-legacy", "ip6tables-legacy"):
            for rule in FOREIGN:
                made.net.run(f"{tool} {rule}")
        made.apply(*ALL)
        yield made


@pytest.fixture
def pod(node: Node) -> Namespace:
    return node.pod("10.1.0.3", "fd01::3")


def tables(node: Node) -> str:
    """Everything iptables-save tells, in its order, chains included; without counters and dates."""
    saved = "".join(
        node.net.run(f"{tool}-legacy-save -t {table}")
        for tool in ("iptables", "ip6tables")
        for table in ("raw", "mangle", "nat", "filter")
    )
    return "\n".join(re.sub(r"\[\d+:\d+\]", "", line) for line in saved.splitlines() if not line.startswith("#"))


def kill(node: Node) -> None:
    assert node.process is not None
    node.process.kill()
    node.process.wait()


def syncs(node: Node) -> float:
    [count] = re.findall(r"\nkubeproxy_sync_proxy_rules_duration_seconds_count (.*)\n", node.get("/metrics"))
    return float(count)


def await_sync(node: Node) -> None:
    """Until a sync has begun and ended after this."""
    before = syncs(node)
    eventually(lambda: syncs(node) >= before + 2)


DAMAGE = (
    ("-t nat -F KUBE-PORTALS-CONTAINER", "-t nat -D PREROUTING 1", "-t nat -X KUBE-PORTALS-CONTAINER"),
    ("-t nat -D KUBE-PORTALS-HOST 1",),
    ("-t nat -A KUBE-NODEPORT-HOST -p tcp --dport 10 -j RETURN",),
    ("-t nat -I KUBE-PORTALS-CONTAINER -j RETURN",),
    ("-t filter -F USERSPACE-PROXY-HOLD", "-t filter -X USERSPACE-PROXY-HOLD"),
    ("-t filter -D INPUT 1",),
)


@pytest.mark.parametrize("tool", ["iptables-legacy", "ip6tables-legacy"])
@chains
def test_our_chains_are_repaired_and_foreign_rules_stay(node: Node, tool: str) -> None:
    node.start(*SOON)
    good = tables(node)
    for damage in DAMAGE:
        for command in damage:
            node.net.run(f"{tool} {command}")
        eventually(lambda: tables(node) == good)
        await_sync(node)
        assert tables(node) == good, damage
        assert re.search(r'repaired"} [1-9]', node.get("/metrics"))
    assert node.log().count("had been changed by others and are repaired") >= len(DAMAGE)
    for ip in DUAL:
        assert answer(node.net, ip, 80) == b"a:hi"


@chains
def test_foreign_rules_that_come_meanwhile_are_let_be(node: Node) -> None:
    node.start(*SOON)
    for rule in ("-t nat -I PREROUTING 1 -p tcp --dport 11 -j ACCEPT", "-t nat -A OUTPUT -p tcp --dport 11 -j ACCEPT"):
        node.net.run(f"iptables-legacy {rule}")
    changed = tables(node)
    await_sync(node)
    assert tables(node) == changed
    assert "repaired" not in node.log()
    assert node.stop() == 0
    left = tables(node)
    assert left.count("--dport 11 ") == 2
    assert left.count("--dport 9 ") == 2 * (len(FOREIGN) - 2)
    assert "KUBE-PORTALS" not in left


@chains
def test_the_route_of_a_cluster_ip_comes_back(node: Node) -> None:
    node.start(*SOON)
    routes = node.net.run("ip route show table all proto 117")
    assert "10.96.0.10" in routes
    node.net.run("ip route flush table all proto 117")
    eventually(lambda: node.net.run("ip route show table all proto 117") == routes)
    assert answer(node.net, "10.96.0.10", 80) == b"a:hi"


def test_a_killed_proxys_clients_are_told(node: Node, pod: Namespace) -> None:
    node.start()
    with connect(pod, "10.96.0.10", 80) as client:
        assert ask(client) == b"a:hi"
        kill(node)
        with pytest.raises(ConnectionResetError):
            client.recv(1)


@chains
def test_what_a_killed_run_served_is_gone_with_the_next_start(node: Node, pod: Namespace) -> None:
    before = tables(node)
    node.start()
    first = {name: row["proxyPort"] for name, row in node.rows().items()}
    kill(node)
    node.apply(DNS, *DNS_ENDPOINTS)
    node.start()
    rules = tables(node)
    assert 'default/web" -m' not in rules
    assert "10.96.0.10" not in node.net.run("ip route show table all proto 117")
    assert f"--to-ports {first['web']}" not in rules
    assert node.rows()["dns"]["proxyPort"] != first["dns"]
    assert answer(pod, "10.96.0.11", 53, DATAGRAM) == b"a:hi"
    assert not answer(pod, "10.96.0.10", 80, timeout=1)
    assert node.stop() == 0
    assert tables(node) == before


@chains
def test_kills_in_a_row_pile_nothing_up(node: Node, pod: Namespace) -> None:
    before = tables(node)
    counts = set()
    for delay in (0.0, 0.05, 0.1):
        node.start()
        counts.add(len(tables(node).splitlines()))
        kill(node)
        node.start(wait=False)
        eventually(lambda: "KUBE-PORTALS-HOST" in tables(node))
        time.sleep(delay)  # somewhere in the first sync
        kill(node)
    assert len(counts) == 1
    node.start()
    assert len(tables(node).splitlines()) in counts
    assert answer(pod, "10.96.0.10", 80) == b"a:hi"
    assert node.stop() == 0
    assert tables(node) == before


@chains
def test_cleanups_side_by_side_leave_the_tables_as_they_were(node: Node) -> None:
    """Two proxies are taken off a node at a time; what each finds half removed is no error."""
    before = tables(node), node.net.run("ip -4 route show table all")
    node.start()
    kill(node)
    assert "KUBE-PORTALS-HOST" in tables(node)
    with concurrent.futures.ThreadPoolExecutor() as both:
        for done in [both.submit(node.cleanup) for _ in range(2)]:
            assert done.result().returncode == 0, done.result().stderr
    assert (tables(node), node.net.run("ip -4 route show table all")) == before
    assert "proto 117" not in node.net.run("ip -6 route show table all")
    assert node.cleanup().returncode == 0
    assert tables(node) == before[0]


@chains
def test_cleanup_beside_a_running_proxy_is_undone_by_its_next_sync(node: Node, pod: Namespace) -> None:
    node.start(*SOON)
    good = tables(node)
    done = node.cleanup()
    assert done.returncode == 0, done.stderr
    eventually(lambda: tables(node) == good)
    assert answer(pod, "10.96.0.10", 80) == b"a:hi"


@pytest.mark.parametrize("way", ["stop", "cleanup"])
@chains
def test_a_foreign_jump_into_our_chain_goes_with_the_chain(node: Node, way: str) -> None:
    """No chain can be deleted while a rule points to it, so such a rule cannot be kept; all others are."""
    before = tables(node)
    node.start()
    node.net.run("iptables-legacy -t nat -A OUTPUT -p tcp --dport 12 -j KUBE-PORTALS-HOST")
    if way == "stop":
        assert node.stop(signal.SIGINT) == 0
    else:
        kill(node)
        assert node.cleanup().returncode == 0
    assert tables(node) == before
    assert "proto 117" not in node.net.run("ip route show table all")


def test_a_udp_client_goes_on_with_its_port_through_kill_and_restart(node: Node, pod: Namespace) -> None:
    """Also through a node port, and from the node itself: each is its own conntrack entry, to a port that is gone.

    Of what the killed run has put into the kernel, nothing is left beside the next one's.
    """
    places = [
        (pod, "10.96.0.11", 53),
        (pod, "fd00:96::11", 53),
        (pod, "10.1.0.1", 30053),
        (pod, "fd01::1", 30053),
        (node.net, "10.96.0.11", 53),
        (node.net, "127.0.0.1", 30053),
    ]
    node.start()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(*place, DATAGRAM)) for place in places]
        for client in clients:
            assert ask(client) == b"a:hi"
        first, count = node.rows()["dns"]["proxyPort"], len(node.captured().splitlines())
        kill(node)
        assert all(map(node.captures, DUAL))
        node.start()
        assert len(node.captured().splitlines()) == count
        for row in node.services():
            assert row["proxyPort"] != first
            assert node.capture == "local" or re.search(rf"(--to-ports|:) {row['proxyPort']}\b", node.captured())
        for client in clients:
            assert ask(client) == b"a:hi"
