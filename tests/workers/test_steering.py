"""The program as the kernel runs it: one address, one socket, and addresses of every pattern spread."""

from __future__ import annotations

import collections
import ipaddress
import socket
from collections.abc import Iterator

import pytest

from tests.netns import Namespace
from userspace_proxy.model import IPFamily
from userspace_proxy.sockets.base import AF, bind
from userspace_proxy.sockets.screen import screen
from userspace_proxy.workers.steering import by_client, steer, unsteer

PORT = 21000


def run_program(family: IPFamily, address: str, count: int) -> int:
    """The program's result, by the meaning of its instructions."""
    packet = bytearray(40)
    packed = ipaddress.ip_address(address).packed
    first = 12 if family is IPFamily.IPV4 else 8
    packet[first : first + len(packed)] = packed
    a = x = 0
    for code, _, _, k in by_client(family, count):
        match code:
            case 0x20:
                at = k - (0x100000000 - 0x100000)
                a = int.from_bytes(packet[at : at + 4])
            case 0x24:
                a = a * k & 0xFFFFFFFF
            case 0x74:
                a >>= k
            case 0x94:
                a %= k
            case 0xAC:
                a ^= x
            case 0x07:
                x = a
            case 0x16:
                return a
    raise AssertionError("no result")


@pytest.mark.parametrize("count", [2, 3, 4, 7])
@pytest.mark.parametrize("step", [1, 2, 16, 256, 65536])
@pytest.mark.parametrize("start", ["10.1.0.2", "fd00:1::2"])
def test_addresses_that_differ_in_few_bits_are_spread(start: str, step: int, count: int) -> None:
    first = ipaddress.ip_address(start)
    family = IPFamily.IPV6 if first.version == 6 else IPFamily.IPV4
    met = collections.Counter(run_program(family, str(first + step * n), count) for n in range(200))
    assert set(met) == set(range(count))
    assert max(met.values()) < 2.5 * 200 / count


@pytest.fixture
def _node() -> Iterator[None]:
    """With many addresses to be a client from."""
    with Namespace() as node:
        for number in range(2, 34):
            node.add_address("lo", f"fd00::{number:x}/128")
        with node.entered():
            yield


def clients(family: IPFamily) -> list[str]:
    return [f"127.0.0.{n}" if family is IPFamily.IPV4 else f"fd00::{n:x}" for n in range(2, 34)]


def group(family: IPFamily, count: int) -> list[socket.socket]:
    return [bind(family, socket.SOCK_DGRAM, family.wildcard, PORT, beside_ours=True) for _ in range(count)]


def send(family: IPFamily, client: str) -> None:
    with socket.socket(AF[family], socket.SOCK_DGRAM) as sock:
        sock.bind((client, 0))
        sock.sendto(client.encode(), (family.loopback, PORT))


def heard(members: list[socket.socket]) -> dict[str, set[int]]:
    """Which clients were heard by which sockets since the last call."""
    found: dict[str, set[int]] = collections.defaultdict(set)
    for index, sock in enumerate(members):
        while True:
            try:
                found[sock.recv(100).decode()].add(index)
            except BlockingIOError:
                break
    return found


@pytest.mark.privileged
@pytest.mark.usefixtures("_node")
@pytest.mark.parametrize("family", IPFamily, ids=lambda family: family.value)
def test_the_kernel_agrees(family: IPFamily) -> None:
    members = group(family, 3)
    for sock in members:
        screen(sock, family, ())
    for client in clients(family):
        send(family, client)
    assert not heard(members)
    steer(members[0], family, 3)
    for sock in members:
        screen(sock, family, None)
    for _ in range(4):  # ports differ each time
        for client in clients(family):
            send(family, client)
    assert heard(members) == {client: {run_program(family, client, 3)} for client in clients(family)}
    unsteer(members[1])
    unsteer(members[1])  # there is none any more: fine
    for _ in range(10):
        for client in clients(family):
            send(family, client)
    assert max(map(len, heard(members).values())) > 1
    for sock in members:
        sock.close()
