"""Whom a socket hears: the program by the meaning of its instructions, and as the kernel runs it."""

from __future__ import annotations

import ipaddress
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from userspace_proxy.exceptions import PortError
from userspace_proxy.model import IPFamily
from userspace_proxy.sockets.base import AF, bind
from userspace_proxy.sockets.screen import only_from, screen

V4, V6 = IPFamily.IPV4, IPFamily.IPV6


def lets_in(family: IPFamily, networks: list[str], client: str) -> bool:
    packet = bytearray(40)
    packed = ipaddress.ip_address(client).packed
    first = 12 if family is V4 else 8
    packet[first : first + len(packed)] = packed
    program = only_from(family, networks)
    at = a = 0
    while True:
        code, if_true, if_false, k = program[at]
        at += 1
        match code:
            case 0x20:
                offset = k - (0x100000000 - 0x100000)
                a = int.from_bytes(packet[offset : offset + 4])
            case 0x54:
                a &= k
            case 0x15:
                at += if_true if a == k else if_false
            case 0x06:
                return bool(k)


def addresses(family: IPFamily) -> st.SearchStrategy[str]:
    """From few bits, so that they meet networks."""
    base = int(ipaddress.ip_address("10.0.0.0" if family is V4 else "fd00::"))
    width = 32 if family is V4 else 128
    bits = st.sets(st.integers(0, width - 1), max_size=3)
    make = ipaddress.IPv4Address if family is V4 else ipaddress.IPv6Address
    return bits.map(lambda chosen: str(make(base ^ sum(1 << bit for bit in chosen))))


@st.composite
def cases(draw: st.DrawFn) -> tuple[IPFamily, list[str], str]:
    family = draw(st.sampled_from(IPFamily))
    lengths = st.integers(0, 32 if family is V4 else 128)
    network = st.builds(
        lambda ip, length: str(ipaddress.ip_network(f"{ip}/{length}", strict=False)), addresses(family), lengths
    )
    return family, draw(st.lists(network, max_size=4)), draw(addresses(family))


@given(cases())
def test_who_is_in_one_of_the_networks_is_heard(case: tuple[IPFamily, list[str], str]) -> None:
    family, networks, client = case
    inside = any(ipaddress.ip_address(client) in ipaddress.ip_network(network) for network in networks)
    assert lets_in(family, networks, client) is inside


def test_many_networks() -> None:
    networks = [f"10.{n}.{m}.0/24" for n in range(10) for m in range(0, 200, 2)]
    assert lets_in(V4, networks, "10.9.198.7")
    assert not lets_in(V4, networks, "10.9.199.7")


def test_more_than_the_kernel_takes() -> None:
    with pytest.raises(PortError, match="found 4096 source ranges"):
        only_from(V4, [f"10.{n >> 8}.{n & 255}.0/25" for n in range(4096)])


def connects(client: str, port: int) -> bool:
    """Silence, where a refusal would be an error."""
    family = V6 if ":" in client else V4
    with socket.socket(AF[family], socket.SOCK_STREAM) as sock:
        sock.settimeout(0.1)
        sock.bind((client, 0))
        try:
            sock.connect((family.loopback, port))
        except TimeoutError:
            return False
    return True


def test_the_kernel_agrees_for_tcp() -> None:
    with bind(V4, socket.SOCK_STREAM, "127.0.0.1", 0) as listener:
        listener.listen()
        port = listener.getsockname()[1]
        screen(listener, V4, ["127.0.1.0/24", "127.9.9.9/32"])
        assert connects("127.0.1.7", port)
        assert connects("127.9.9.9", port)
        assert not connects("127.0.0.1", port)
        screen(listener, V4, ())
        assert not connects("127.0.1.7", port)
        screen(listener, V4, None)
        screen(listener, V4, None)  # there is none any more: fine
        assert connects("127.0.0.1", port)


def test_the_kernel_agrees_for_tcp_over_ipv6() -> None:
    with bind(V6, socket.SOCK_STREAM, "::1", 0) as listener:
        listener.listen()
        port = listener.getsockname()[1]
        screen(listener, V6, ["2001:db8::/32"])
        assert not connects("::1", port)
        screen(listener, V6, ["2001:db8::/32", "::/127"])
        assert connects("::1", port)


def test_the_kernel_agrees_for_udp() -> None:
    with bind(V4, socket.SOCK_DGRAM, "127.0.0.1", 0) as server, socket.socket(type=socket.SOCK_DGRAM) as client:
        client.connect(server.getsockname())
        screen(server, V4, ["127.0.1.0/24"])
        client.send(b"from elsewhere")
        screen(server, V4, ["127.0.0.0/24"])
        client.send(b"from there")
        assert server.recv(100) == b"from there"
