"""Endpoints that are dead, silent, missing, or ourselves: what clients see of it, and who has to wait."""

from __future__ import annotations

import concurrent.futures
import re
import selectors
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.client import DATAGRAM, answer, ask, connect, crowd
from tests.e2e.node import Node, endpoints, port, service
from tests.netns import Namespace, eventually

pytestmark = pytest.mark.privileged

ENDPOINT = Path(__file__).with_name("endpoint.py")
ALIVE = "10.1.0.2:8080"
REFUSED = "10.1.0.2:9"
BLACK_HOLE = "10.1.0.4:8080"
dialled = pytest.mark.captures("iptables", why="endpoints are dialled the same way, however clients came")


@pytest.fixture
def node(tmp_path: Path, capture: str) -> Iterator[Node]:
    """Pods: one where an endpoint lives, and one that drops whatever it is sent."""
    with Node(tmp_path, capture) as made:
        for limit in ("ipv4/icmp_ratelimit", "ipv6/icmp/ratelimit"):  # else the seventh refusal of a second is silent
            made.net.run(f"sh -c 'echo 0 >/proc/sys/net/{limit}'")
        made.pod("10.1.0.2", "fd01::2").spawn(f"{sys.executable} {ENDPOINT} a 8080")
        made.pod("10.1.0.4").run("iptables-legacy -A INPUT -j DROP")
        yield made


@pytest.fixture
def pod(node: Node) -> Namespace:
    return node.pod("10.1.0.3", "fd01::3")


def web(*addresses: str) -> tuple[dict[str, object], ...]:
    slices = [endpoints("web", [address]) for address in addresses]
    for number, found in enumerate(slices):  # they differ in port, so each is a slice of its own
        found["metadata"]["name"] = f"web-{number}"
    return service("web", "10.96.0.10", [port(80, node_port=30080)]), *slices


def answers(pod: Namespace, count: int) -> list[tuple[int, bytes]]:
    """Open clients side by side that all ask at once; which was answered, and what, in the order of the answers."""
    found = []
    with crowd(count, pod, "10.96.0.10", 80) as clients, selectors.DefaultSelector() as selector:
        for number, client in enumerate(clients):
            client.send(b"hi")
            selector.register(client, selectors.EVENT_READ, number)
        end = time.monotonic() + 10
        while selector.get_map() and time.monotonic() < end:
            for key, _ in selector.select(1):
                selector.unregister(key.fileobj)
                found.append((key.data, clients[key.data].recv(100)))
    return found


@dialled
def test_clients_get_past_endpoints_that_refuse_or_are_silent(node: Node, pod: Namespace) -> None:
    node.apply(*web(ALIVE, REFUSED, BLACK_HOLE))
    node.start()
    found = answers(pod, 12)
    assert sorted(found) == [(number, b"a:hi") for number in range(12)]
    assert answer(node.net, "127.0.0.1", 30080) == b"a:hi"
    failures = {
        match[1]: float(match[2])
        for match in re.finditer(r'dial_failures_total\{.*errno="(\w+)".*\} (\S+)', node.get("/metrics"))
    }
    # Nobody is sent to the same dead endpoint twice, and the rounds pass over what is known to be dead.
    assert failures.keys() == {"ECONNREFUSED", "ETIMEDOUT"}
    assert max(failures.values()) <= 12


@dialled
def test_nobody_waits_for_the_dial_of_another(node: Node, pod: Namespace) -> None:
    """Round robin sends every second client to the silent endpoint first; the others are answered before them."""
    node.apply(*web(ALIVE, BLACK_HOLE))
    node.start()
    found = answers(pod, 16)
    assert sorted(found) == [(number, b"a:hi") for number in range(16)]
    assert len({number % 2 for number, _ in found[:8]}) == 1, found


@pytest.mark.parametrize(
    "dead",
    [
        pytest.param([REFUSED], id="refused"),
        pytest.param([REFUSED, BLACK_HOLE], id="refused and silent", marks=dialled),
    ],
)
def test_a_client_without_a_living_endpoint_is_reset(node: Node, pod: Namespace, dead: list[str]) -> None:
    node.apply(*web(*dead))
    node.start()

    def is_reset(where: Namespace) -> None:
        # The reset may be there before the client has seen that it was connected.
        with pytest.raises(ConnectionResetError), connect(where, "10.96.0.10", 80) as client:
            ask(client)

    with concurrent.futures.ThreadPoolExecutor() as both:  # for the ladder takes its time
        for done in [both.submit(is_reset, where) for where in (pod, node.net)]:
            done.result()
    assert 'outcome="dial_failed"' in node.get("/metrics")
    # Those who found nobody keep nobody from who is there a moment later.
    node.apply(*web(ALIVE))
    eventually(lambda: answer(pod, "10.96.0.10", 80) == b"a:hi")


@pytest.mark.parametrize("kind", ["TCP", "UDP"])
def test_without_endpoints_clients_are_refused_until_there_is_one(node: Node, pod: Namespace, kind: str) -> None:
    ips = ["10.96.0.10", "fd00:96::10"]
    alone = service("web", ips, [port(80, protocol=kind, node_port=30080)], ipFamilyPolicy="RequireDualStack")
    slices = [endpoints("web", [address], protocol=kind) for address in (ALIVE, "[fd01::2]:8080")]
    places = [
        (where, ip, number)
        for where, own in ((pod, ("10.1.0.1", "fd01::1")), (node.net, ("127.0.0.1", "10.1.0.1", "fd01::1")))
        for ip, number in [*((ip, 80) for ip in ips), *((ip, 30080) for ip in own)]
    ]

    def is_refused(where: Namespace, ip: str, number: int) -> bool:
        try:
            with connect(where, ip, number, DATAGRAM if kind == "UDP" else 1, timeout=1) as client:
                ask(client)
        except OSError as error:
            return isinstance(error, ConnectionRefusedError)
        return False

    node.apply(alone)
    node.start()
    for place in places:
        assert is_refused(*place), place
    node.apply(alone, *slices)
    for where, ip, number in places:
        eventually(lambda: answer(where, ip, number, DATAGRAM if kind == "UDP" else 1) == b"a:hi")
    node.apply(alone)
    for place in places:
        eventually(lambda: is_refused(*place))


@pytest.mark.parametrize(
    "own",
    ["10.96.0.10:80", "10.96.0.12:80", "127.0.0.1:30080", "10.1.0.1:30080"],
    ids=["another's cluster IP", "its own cluster IP", "a node port of loopback", "a node port of the node"],
)
def test_an_endpoint_that_is_a_place_of_ours_is_not_dialled(node: Node, pod: Namespace, own: str) -> None:
    loop = service("loop", "10.96.0.12", [port(80)])
    node.apply(*web(ALIVE), loop, endpoints("loop", [own]))
    node.start()
    assert node.rows()["loop"]["state"] == "refusing"
    [line] = [line for line in node.log().splitlines() if "own place" in line]
    assert "default/loop" in line
    assert own in line
    for where in (pod, node.net):
        with pytest.raises(ConnectionRefusedError):
            connect(where, "10.96.0.12", 80)
    assert answer(pod, "10.96.0.10", 80) == b"a:hi"
    # Beside a real one it is passed over: every client is answered, at the first attempt.
    second = endpoints("loop", [ALIVE])
    second["metadata"]["name"] = "loop-real"
    node.apply(*web(ALIVE), loop, endpoints("loop", [own]), second)
    eventually(lambda: answer(pod, "10.96.0.12", 80) == b"a:hi")
    for _ in range(4):
        assert answer(pod, "10.96.0.12", 80) == b"a:hi"
    assert "userspace_proxy_dial_failures_total{" not in node.get("/metrics")


def test_an_endpoint_that_becomes_ours_is_dialled_no_more(node: Node, pod: Namespace) -> None:
    """A Service takes, as its cluster IP, the address another one has for an endpoint."""
    loop = service("loop", "10.96.0.12", [port(80)])
    node.apply(loop, endpoints("loop", ["10.96.0.10:80"]))
    node.start("--iptables-min-sync-period=50ms")
    assert node.rows()["loop"]["state"] == "serving"
    node.apply(loop, endpoints("loop", ["10.96.0.10:80"]), *web(ALIVE))
    eventually(lambda: node.rows()["loop"]["state"] == "refusing")
    eventually(lambda: answer(pod, "10.96.0.10", 80, timeout=1) == b"a:hi")
    node.apply(loop, endpoints("loop", ["10.96.0.10:80"]))
    eventually(lambda: node.rows()["loop"]["state"] == "serving")
