from __future__ import annotations

import functools
import socket

import pytest

from tests.proxy import address, closed_port, listener
from userspace_proxy.exceptions import PortError
from userspace_proxy.model import IPFamily, Protocol
from userspace_proxy.sockets.base import AF, Descriptors, bind, claim

KINDS = [socket.SOCK_STREAM, socket.SOCK_DGRAM]


def test_descriptors_are_given_up_to_the_limit() -> None:
    descriptors = Descriptors(4)
    assert descriptors.take(2)
    assert descriptors.take(2)
    assert not descriptors.take(1)
    descriptors.give(2)
    assert descriptors.take(2)


def test_who_waits_is_resumed_in_turn_as_room_comes() -> None:
    descriptors = Descriptors(4)
    descriptors.take(4)
    order: list[str] = []

    def taker(name: str) -> None:
        order.append(name)
        assert descriptors.take(2)

    def first() -> None:
        taker("first")

    def second() -> None:
        taker("second")

    descriptors.wait(first)
    descriptors.wait(second)
    descriptors.wait(first)
    descriptors.give(2)
    assert order == ["first"]
    descriptors.give(2)
    assert order == ["first", "second"]
    descriptors.give(2)
    assert order == ["first", "second"], "nobody waits any more"


def test_one_that_finds_its_clients_gone_does_not_keep_the_next_from_its_turn() -> None:
    descriptors = Descriptors(2)
    descriptors.take(2)
    order: list[str] = []
    descriptors.wait(lambda: order.append("no client left"))
    descriptors.wait(lambda: order.append("served"))
    descriptors.give(2)
    assert order == ["no client left", "served"]


def test_a_higher_limit_is_room_too() -> None:
    descriptors = Descriptors(2)
    descriptors.take(2)
    calls: list[int] = []
    descriptors.wait(lambda: calls.append(1))
    descriptors.allow(3)
    assert not calls
    descriptors.allow(4)
    assert calls == [1]


def test_one_that_waits_again_at_once_does_not_spin() -> None:
    descriptors = Descriptors(2)
    descriptors.take(2)
    calls: list[int] = []

    def again() -> None:
        calls.append(1)
        descriptors.wait(again)

    descriptors.wait(again)
    descriptors.give(2)
    assert len(calls) == 1
    descriptors.forget(again)
    descriptors.forget(again)
    descriptors.take(2)
    descriptors.give(2)
    assert len(calls) == 1


@pytest.mark.parametrize("family", IPFamily)
@pytest.mark.parametrize("kind", KINDS)
def test_a_claim_refuses_whoever_comes(family: IPFamily, kind: int) -> None:
    where = closed_port(family)
    with claim(family, kind, *where), socket.socket(AF[family], kind) as client:
        client.settimeout(5)
        with pytest.raises(ConnectionRefusedError):
            client.connect(where)
            client.send(b"x")
            client.recv(1)


@pytest.mark.parametrize("family", IPFamily)
@pytest.mark.parametrize("protocol", [Protocol.TCP, Protocol.UDP])
def test_a_port_in_use_cannot_be_claimed(family: IPFamily, protocol: Protocol) -> None:
    with (
        listener(family, protocol) as other,
        pytest.raises(PortError, match=f"{address(other)[1]} cannot be had: .*in use"),
    ):
        claim(family, other.type, *address(other))


@pytest.mark.parametrize("kind", KINDS)
def test_two_claims_exclude_each_other(kind: int) -> None:
    where = closed_port()
    with claim(IPFamily.IPV4, kind, *where), pytest.raises(PortError):
        claim(IPFamily.IPV4, kind, *where)
    claim(IPFamily.IPV4, kind, *where).close()


@pytest.mark.parametrize("family", IPFamily)
@pytest.mark.parametrize("kind", KINDS)
def test_a_claim_on_all_addresses_holds_each(family: IPFamily, kind: int) -> None:
    ip, port = closed_port(family)
    with claim(family, kind, family.wildcard, port), pytest.raises(PortError):
        claim(family, kind, ip, port)


def test_ipv6_leaves_ipv4_alone() -> None:
    _, port = closed_port()
    with bind(IPFamily.IPV6, socket.SOCK_STREAM, "::", port), bind(IPFamily.IPV4, socket.SOCK_STREAM, "0.0.0.0", port):
        pass


def test_an_address_that_is_not_ours_cannot_be_bound() -> None:
    with pytest.raises(PortError, match=r"192\.0\.2\.1:80 cannot be had"):
        bind(IPFamily.IPV4, socket.SOCK_STREAM, "192.0.2.1", 80)


def test_those_who_find_their_clients_gone_hand_on_what_they_were_given() -> None:
    """As many as there may be service ports, each resumed by the one before it: no deeper than a single one."""
    descriptors = Descriptors(2)
    assert descriptors.take(2)
    resumed = []

    def resume(number: int) -> None:
        assert descriptors.take(2)
        resumed.append(number)
        descriptors.give(2)

    for number in range(5000):
        descriptors.wait(functools.partial(resume, number))
    descriptors.give(2)
    assert resumed == list(range(5000))
    assert descriptors.used == 0
