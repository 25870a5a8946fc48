"""Node ports that are held: on which addresses, against whom, and what is said where they cannot be."""

from __future__ import annotations

import socket

import pytest

from userspace_proxy.claims import Claims
from userspace_proxy.model import IPFamily, Protocol, ServicePortName, SocketKey
from userspace_proxy.plan import LocalPort
from userspace_proxy.problems import Problems

V4 = IPFamily.IPV4
KEY = SocketKey(ServicePortName("default", "web", "http"), V4)


def test_node_ports_are_held_on_all_addresses_unless_networks_are_given() -> None:
    def addresses(*networks: str) -> tuple[str, ...]:
        return Claims(networks, Problems(), lambda place: None).addresses()

    assert addresses() == ("0.0.0.0", "::")
    assert addresses("127.0.0.0/8") == ("127.0.0.1",)
    assert addresses("127.99.0.0/16") == ()


@pytest.mark.parametrize("protocol", [Protocol.TCP, Protocol.UDP])
def test_a_node_port_is_held_on_the_addresses_that_serve_it(protocol: Protocol) -> None:
    kind = socket.SOCK_STREAM if protocol is Protocol.TCP else socket.SOCK_DGRAM
    claims = Claims((), Problems(), lambda place: None)
    place = LocalPort(V4, protocol, 30201)
    assert claims.hold(place, ("127.0.0.2", "127.0.0.3", "::1"), KEY)
    assert place in claims
    assert list(claims) == [place]
    assert claims.descriptors == 2
    with socket.socket(socket.AF_INET, kind) as other:
        other.bind(("127.0.0.1", 30201))  # nobody's address for node ports
    for ip in ("127.0.0.2", "127.0.0.3"):
        with socket.socket(socket.AF_INET, kind) as other, pytest.raises(OSError, match="in use"):
            other.bind((ip, 30201))
    claims.release(place)
    assert place not in claims
    assert claims.descriptors == 0
    with socket.socket(socket.AF_INET, kind) as other:
        other.bind(("127.0.0.2", 30201))


def test_a_claim_that_fails_half_way_holds_nothing() -> None:
    problems = Problems()
    claims = Claims((), problems, lambda place: None)
    with socket.socket() as other:
        other.bind(("127.0.0.3", 30202))
        place = LocalPort(V4, Protocol.TCP, 30202)
        assert not claims.hold(place, ("127.0.0.2", "127.0.0.3"), KEY)
        assert place not in claims
        assert claims.descriptors == 0
    [problem] = problems.of(KEY)
    assert "node port *:30202/TCP (IPv4) is in use on this host: 127.0.0.3:30202" in problem
    assert problem.endswith("; end what uses it")
    assert claims.hold(place, ("127.0.0.2", "127.0.0.3"), KEY)
    claims.close()
    assert claims.descriptors == 0
