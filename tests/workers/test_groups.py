"""The sockets of one port: one client meets one of them, in every state, whoever else holds them."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from tests.netns import Namespace
from userspace_proxy.exceptions import PortError
from userspace_proxy.model import IPFamily, Protocol
from userspace_proxy.sockets.base import AF
from userspace_proxy.workers.groups import GROUPS, Group

pytestmark = pytest.mark.privileged

PORT = 21000
KIND = {Protocol.TCP: socket.SOCK_STREAM, Protocol.UDP: socket.SOCK_DGRAM}
REFUSED = -1


@pytest.fixture(autouse=True)
def _node() -> Iterator[None]:
    with Namespace() as node:
        for number in range(2, 34):
            node.add_address("lo", f"fd00::{number:x}/128")
        with node.entered():
            yield


@pytest.fixture(params=GROUPS)
def protocol(request: pytest.FixtureRequest) -> Protocol:
    value: Protocol = request.param
    return value


@pytest.fixture(params=IPFamily, ids=lambda family: family.value)
def family(request: pytest.FixtureRequest) -> IPFamily:
    value: IPFamily = request.param
    return value


@pytest.fixture(params=["wildcard", "one address"])
def ip(request: pytest.FixtureRequest, family: IPFamily) -> str:
    return family.wildcard if request.param == "wildcard" else family.loopback


@pytest.fixture
def group(protocol: Protocol, family: IPFamily, ip: str) -> Iterator[Group]:
    made = GROUPS[protocol](family, ip, PORT, 3)
    yield made
    made.close()
    with socket.socket(AF[family], KIND[protocol]) as other:
        other.bind((ip, PORT))


def clients(family: IPFamily) -> list[str]:
    return [f"127.0.0.{n}" if family is IPFamily.IPV4 else f"fd00::{n:x}" for n in range(2, 34)]


def meets(group: Group, protocol: Protocol, family: IPFamily, client: str) -> int:
    """Which of the sockets a client meets, or that it is refused."""
    with socket.socket(AF[family], KIND[protocol]) as sock:
        sock.bind((client, 0))
        sock.settimeout(2)
        try:
            sock.connect((family.loopback, PORT))
            sock.send(b"x")
            if protocol is Protocol.UDP and not group.sockets:
                sock.recv(1)
        except ConnectionRefusedError:
            return REFUSED
        for index, member in enumerate(group.sockets):
            try:
                if protocol is Protocol.TCP:
                    member.accept()[0].close()
                else:
                    member.recv(1)
            except BlockingIOError:
                continue
            return index
    raise AssertionError(f"{client} met nobody")


def table(group: Group, protocol: Protocol, family: IPFamily) -> dict[str, int]:
    """Where each client ends up, asked twice from another port each time."""
    first, second = ({c: meets(group, protocol, family, c) for c in clients(family)} for _ in range(2))
    assert first == second
    return first


def test_each_client_meets_one_and_the_same_whenever_it_serves(
    group: Group, protocol: Protocol, family: IPFamily
) -> None:
    """Also while others still hold the sockets of an earlier time, and when they let go of them."""
    assert meets(group, protocol, family, clients(family)[0]) == REFUSED
    held: list[int] = []
    met: list[dict[str, int]] = []
    for turn in range(4):
        group.serve(steered=True)
        held += [os.dup(sock.fileno()) for sock in group.sockets]
        met.append(table(group, protocol, family))
        while turn == 2 and held:  # in the middle of serving, in an order that would change a group
            os.close(held.pop(0))
            met.append(table(group, protocol, family))
        group.refuse()
        assert meets(group, protocol, family, clients(family)[0]) == REFUSED
    for fd in held:
        os.close(fd)
    assert set(met[0].values()) == {0, 1, 2}
    assert all(again == met[0] for again in met)


def test_affinity_is_switched_while_it_serves(group: Group, protocol: Protocol, family: IPFamily) -> None:
    """For connections, that is. Datagrams of a client meet the same as before, whatever is switched."""
    group.serve(steered=True)
    steered = table(group, protocol, family)
    group.steer(False)
    client = clients(family)[0]
    alone = protocol is Protocol.UDP
    assert (len({meets(group, protocol, family, client) for _ in range(64)}) == 1) is alone
    group.steer(True)
    assert table(group, protocol, family) == steered
    group.refuse()
    group.serve(steered=False)
    assert (len({meets(group, protocol, family, client) for _ in range(64)}) == 1) is alone
    if alone:
        assert table(group, protocol, family) == steered


def test_it_is_refused_wherever_else_the_sockets_are_held(group: Group, protocol: Protocol, family: IPFamily) -> None:
    group.serve(steered=False)
    held = [os.dup(sock.fileno()) for sock in group.sockets]
    group.refuse()
    assert {meets(group, protocol, family, client) for client in clients(family)} == {REFUSED}
    group.serve(steered=False)
    assert REFUSED not in {meets(group, protocol, family, client) for client in clients(family)}
    for fd in held:
        os.close(fd)


def test_nobody_else_gets_the_port(group: Group, protocol: Protocol, family: IPFamily, ip: str) -> None:
    for serve in (False, True, False):
        if serve:
            group.serve(steered=True)
        else:
            group.refuse()
        with pytest.raises(PortError, match="in use"):
            GROUPS[protocol](family, ip, PORT, 2)


def test_a_port_that_cannot_be_had_leaves_nothing(protocol: Protocol, family: IPFamily) -> None:
    with socket.socket(AF[family], KIND[protocol]) as other:
        other.bind((family.loopback, PORT))
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(PortError, match="in use"):
            GROUPS[protocol](family, family.loopback, PORT, 2)
        assert len(os.listdir("/proc/self/fd")) == before


def test_clients_that_migrate_between_listeners_are_no_hindrance(family: IPFamily) -> None:
    """With net.ipv4.tcp_migrate_req a listener that leaves stays in the group's books."""
    with open("/proc/sys/net/ipv4/tcp_migrate_req", "w") as setting:
        setting.write("1")
    group = GROUPS[Protocol.TCP](family, family.wildcard, PORT, 3)
    met = []
    for _ in range(3):
        group.serve(steered=True)
        met.append(table(group, Protocol.TCP, family))
        group.refuse()
        assert meets(group, Protocol.TCP, family, clients(family)[0]) == REFUSED
    group.close()
    assert set(met[0].values()) == {0, 1, 2}
    assert met[0] == met[1] == met[2]
