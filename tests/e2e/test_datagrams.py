"""Datagrams: how long an answer may take, how large they may be, and that none is cut short."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.client import DATAGRAM, answer, ask, connect
from tests.e2e.node import Node, Object, endpoints, port, service
from tests.e2e.programs import await_listener
from tests.netns import Namespace

pytestmark = pytest.mark.privileged

ENDPOINT = Path(__file__).with_name("endpoint.py")
QUICK, MIDDLING, SLOW = ("10.96.0.10", "fd00:96::10"), ("10.96.0.11", "fd00:96::11"), ("10.96.0.12", "fd00:96::12")
DELAYS = {QUICK: ("9000", 0.0), MIDDLING: ("9002", 0.2), SLOW: ("9004", 0.4)}
either_family = pytest.mark.parametrize("family", [0, 1], ids=["IPv4", "IPv6"])
LARGEST = 65_507


def objects() -> list[Object]:
    found = []
    for ips, (number, _) in DELAYS.items():
        name = f"udp{number}"
        found.append(service(name, list(ips), [port(53, protocol="UDP", node_port=int(number) + 21000)]))
        found.append(endpoints(name, [f"10.1.0.2:{number}"], protocol="UDP"))
        found.append(endpoints(name, [f"[fd01::2]:{number}"], protocol="UDP"))
    return found


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory, capture: str) -> Iterator[Node]:
    """A node whose endpoints take their time: none, 200 ms, 400 ms."""
    with Node(tmp_path_factory.mktemp("site"), capture) as made:
        server = made.pod("10.1.0.2", "fd01::2")
        for number, delay in DELAYS.values():
            server.spawn(f"{sys.executable} {ENDPOINT} a {number} {delay}")
        for number, _ in DELAYS.values():
            await_listener(server, int(number))
        made.apply(*objects())
        made.start()
        yield made


@pytest.fixture(scope="module")
def pod(node: Node) -> Namespace:
    return node.pod("10.1.0.3", "fd01::3")


def answers(where: Namespace, ip: str) -> Iterator[bytes]:
    """To a few clients, one after the other, for a busy machine adds to any delay; a lost one is empty."""
    for _ in range(3):
        yield answer(where, ip, 53, DATAGRAM, timeout=0.7)


@either_family
@pytest.mark.parametrize("where", ["pod", "node"])
def test_an_answer_within_the_idle_timeout_arrives(node: Node, pod: Namespace, where: str, family: int) -> None:
    assert b"a:hi" in answers(pod if where == "pod" else node.net, MIDDLING[family])


@either_family
@pytest.mark.parametrize("where", ["pod", "node"])
def test_an_answer_after_the_idle_timeout_is_lost(node: Node, pod: Namespace, where: str, family: int) -> None:
    assert b"" in answers(pod if where == "pod" else node.net, SLOW[family])


@either_family
def test_a_client_whose_answer_was_lost_goes_on_with_its_port(pod: Namespace, family: int) -> None:
    """The late answer meets a closed flow; neither it nor the ICMP it causes harms the client's next flow."""
    with connect(pod, SLOW[family], 53, DATAGRAM, timeout=0.6) as client:
        port_before = client.getsockname()[1]
        for _ in range(3):
            try:
                ask(client)
            except TimeoutError:
                break
        else:
            pytest.fail("no answer was lost")
        client.connect((QUICK[family], 53))
        client.settimeout(5)
        assert client.getsockname()[1] == port_before
        assert ask(client) == b"a:hi"


@either_family
def test_datagrams_keep_a_flow_alive_beyond_the_timeout(pod: Namespace, family: int) -> None:
    """The clock runs from the last datagram either way, so a slow answer arrives if the client goes on asking."""
    with connect(pod, SLOW[family], 53, DATAGRAM, timeout=0.1) as client:
        for _ in range(15):
            client.send(b"hi")
            with contextlib.suppress(TimeoutError):
                assert client.recv(100) == b"a:hi"
                return
    pytest.fail("no answer arrived")


@pytest.mark.parametrize("size", [0, 1, 1472, 1473, 4097, 20_000, LARGEST])
@pytest.mark.parametrize("ip", QUICK)
@pytest.mark.parametrize("where", ["pod", "node"])
def test_datagrams_of_every_size_arrive_whole(node: Node, pod: Namespace, where: str, ip: str, size: int) -> None:
    """From a pod they come and go in fragments; on the node's lo even the largest is one packet."""
    message = random.Random(size).randbytes(size)
    with connect(pod if where == "pod" else node.net, ip, 53, DATAGRAM) as client:
        assert client.send(message) == size
        assert client.recv(65535) == (b"a:" + message)[:LARGEST]


def test_a_longer_timeout_lets_slow_answers_arrive(tmp_path: Path, capture: str) -> None:
    with Node(tmp_path, capture) as node:
        server, pod = node.pod("10.1.0.2", "fd01::2"), node.pod("10.1.0.3")
        number, delay = DELAYS[SLOW]
        server.spawn(f"{sys.executable} {ENDPOINT} a {number} {delay}")
        await_listener(server, int(number))
        node.apply(*objects())
        node.start("--udp-timeout=1s")
        for where, ip, number in ((pod, SLOW[0], 53), (node.net, SLOW[1], 53), (pod, "10.1.0.1", 30004)):
            assert answer(where, ip, number, DATAGRAM) == b"a:hi"
