"""Proxy-port numbers, and who gets a portal."""

from __future__ import annotations

import errno
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from userspace_proxy.config import PortRange
from userspace_proxy.exceptions import PortError
from userspace_proxy.model import IPFamily, Portal, PortalKind, Protocol, ServicePortName, SocketKey
from userspace_proxy.ports import Conflict, ProxyPorts, advice, assign

V4, V6 = IPFamily.IPV4, IPFamily.IPV6


def key(name: str, family: IPFamily = V4) -> SocketKey:
    return SocketKey(ServicePortName("default", name, "http"), family)


def portal(
    ip: str, port: int = 80, kind: PortalKind = PortalKind.CLUSTER_IP, protocol: Protocol = Protocol.TCP
) -> Portal:
    return Portal(V6 if ":" in ip else V4, protocol, ip, port, kind)


PLACES = [portal(f"10.96.0.{number}", kind=kind) for number in range(4) for kind in list(PortalKind)[:3]]


class Loaded:
    """Dice that fall as the test says."""

    def __init__(self, *falls: int) -> None:
        self._falls = list(falls)

    def randrange(self, start: int, /) -> int:
        fall = self._falls.pop(0)
        assert 0 <= fall < start
        return fall


@pytest.mark.parametrize(
    ("code", "bind", "words"),
    [
        (errno.EADDRINUSE, "0.0.0.0", "see --proxy-port-range"),
        (errno.EADDRNOTAVAIL, "8.8.8.8", "--bind-address=0.0.0.0"),
        (errno.EADDRNOTAVAIL, "0.0.0.0", "ip link set lo up"),
        (errno.EMFILE, "8.8.8.8", "ulimit -n"),
    ],
)
def test_advice_fits_what_is_wrong(code: int, bind: str, words: str) -> None:
    assert words in advice(code, bind, V4)
    assert not advice(errno.ENOMEM, bind, V4)


class TestProxyPorts:
    @given(st.integers(1, 65535), st.integers(0, 400), st.randoms(use_true_random=False))
    def test_every_free_port_comes_exactly_once(self, first: int, size: int, rng: random.Random) -> None:
        last = min(first + size, 65535)
        ports = ProxyPorts(PortRange(first, last), rng)
        everything = range(first, last + 1)
        taken = rng.sample(everything, rng.randrange(len(everything) + 1))
        avoid = frozenset(rng.sample(everything, rng.randrange(len(everything) + 1)))
        for port in taken:
            ports.take(port)
        assert sorted(ports.candidates(avoid)) == sorted(set(everything) - set(taken) - avoid)

    def test_the_whole_range_of_numbers(self) -> None:
        assert set(ProxyPorts(PortRange(1, 65535), random.Random(1)).candidates()) == set(range(1, 65536))

    def test_that_there_is_none_is_explained(self) -> None:
        ports = ProxyPorts(PortRange(30000, 30001), random.Random(1))
        ports.take(30000)
        assert "is a node port" in ports.exhausted({30001})
        assert "is a node port" in ports.exhausted({30000, 30001})
        ports.take(30001)
        assert ports.exhausted({30001}).startswith("every port of 30000-30001 is taken by a service port;")

    def test_order_is_random(self) -> None:
        ports = ProxyPorts(PortRange(30000, 32767), random.Random(7))
        firsts = {next(ports.candidates()) for _ in range(200)}
        assert len(firsts) > 150
        assert list(ports.candidates()) != list(ports.candidates())

    def test_each_step_meets_a_new_port(self) -> None:
        # The dice ask for steps of 4, then 5 is the first length that does not share a divisor with 10.
        ports = ProxyPorts(PortRange(100, 109), Loaded(8, 3))
        assert list(ports.candidates()) == [108, 105, 102, 109, 106, 103, 100, 107, 104, 101]

    def test_range_of_one(self) -> None:
        ports = ProxyPorts(PortRange(40000, 40000), random.Random(0))
        (port,) = ports.candidates()
        ports.take(port)
        assert list(ports.candidates()) == []
        ports.release(port)
        assert list(ports.candidates()) == [40000]

    def test_taken_while_looking(self) -> None:
        ports = ProxyPorts(PortRange(1, 2), Loaded(0, 0))
        looking = ports.candidates()
        assert next(looking) == 1
        ports.take(2)
        assert next(looking, None) is None

    def test_taken_twice(self) -> None:
        ports = ProxyPorts(PortRange(1, 100), random.Random(0))
        ports.take(7)
        with pytest.raises(PortError, match="7 is taken already"):
            ports.take(7)

    def test_release_of_what_was_not_taken(self) -> None:
        ProxyPorts(PortRange(1, 100), random.Random(0)).release(7)


class TestAssign:
    def test_each_gets_what_it_asks_for(self) -> None:
        a, b = portal("10.96.0.1"), portal("10.96.0.2")
        assert assign({key("a"): [a], key("b"): [b]}, {}) == ({a: key("a"), b: key("b")}, [])

    def test_first_by_name_whatever_the_order(self) -> None:
        place = portal("", 30080, PortalKind.NODE_PORT)
        for want in ({key("b"): [place], key("a"): [place]}, {key("a"): [place], key("b"): [place]}):
            portals, conflicts = assign(want, {})
            assert portals == {place: key("a")}
            assert conflicts == [Conflict(place, wanted_by=key("b"), owned_by=key("a"))]

    def test_owner_keeps_its_place(self) -> None:
        place = portal("", 30080, PortalKind.NODE_PORT)
        portals, conflicts = assign({key("a"): [place], key("b"): [place]}, {place: key("b")})
        assert portals == {place: key("b")}
        assert conflicts == [Conflict(place, wanted_by=key("a"), owned_by=key("b"))]

    def test_owner_that_wants_it_no_more_does_not_block(self) -> None:
        place, other = portal("10.96.0.1"), portal("10.96.0.2")
        assert assign({key("a"): [place], key("b"): [other]}, {place: key("b")}) == (
            {place: key("a"), other: key("b")},
            [],
        )
        assert assign({key("a"): [place]}, {place: key("gone")}) == ({place: key("a")}, [])

    def test_a_conflict_costs_one_portal_only(self) -> None:
        mine, contested = portal("10.96.0.2"), portal("", 30080, PortalKind.NODE_PORT)
        portals, conflicts = assign({key("b"): [mine, contested], key("a"): [contested]}, {})
        assert portals == {mine: key("b"), contested: key("a")}
        assert [conflict.portal for conflict in conflicts] == [contested]

    @pytest.mark.parametrize("owned", [False, True])
    def test_one_place_in_two_kinds(self, owned: bool) -> None:
        external = portal("192.0.2.1", kind=PortalKind.EXTERNAL_IP)
        ingress = portal("192.0.2.1", kind=PortalKind.LOAD_BALANCER_IP)
        have = {ingress: key("a")} if owned else {}
        assert assign({key("a"): [external, ingress]}, have) == ({external: key("a")}, [])

    def test_one_place_in_two_kinds_is_still_one_place(self) -> None:
        external = portal("192.0.2.1", kind=PortalKind.EXTERNAL_IP)
        ingress = portal("192.0.2.1", kind=PortalKind.LOAD_BALANCER_IP)
        portals, (conflict,) = assign({key("a"): [ingress], key("b"): [external]}, {})
        assert portals == {ingress: key("a")}
        assert (conflict.portal, conflict.wanted_by, conflict.owned_by) == (external, key("b"), key("a"))

    def test_protocols_and_families_do_not_meet(self) -> None:
        places = [
            Portal(family, protocol, "", 30053, PortalKind.NODE_PORT) for family in IPFamily for protocol in Protocol
        ]
        want = {key(str(number), place.family): [place] for number, place in enumerate(places)}
        portals, conflicts = assign(want, {})
        assert list(portals) == places
        assert conflicts == []

    def test_message_says_who_what_and_what_to_do(self) -> None:
        text = str(Conflict(portal("10.96.0.1"), key("a"), key("b")))
        assert "ClusterIP 10.96.0.1:80/TCP belongs to default/b:http" in text
        assert "default/a:http cannot have it" in text
        assert "change it in one of the two" in text

    @given(
        st.dictionaries(st.sampled_from([key(name) for name in "abcde"]), st.lists(st.sampled_from(PLACES), max_size=5))
    )
    def test_the_outcome_is_whole_and_stays(self, want: dict[SocketKey, list[Portal]]) -> None:
        portals, conflicts = assign(want, {})
        assert assign(want, portals) == (portals, conflicts)
        # Every place that is asked for is given, once, to somebody who asked for it; every other request failed.
        assert sorted(given.ip for given in portals) == sorted({asked.ip for ps in want.values() for asked in ps})
        assert all(given in want[owner] for given, owner in portals.items())
        owners = {given.place: owner for given, owner in portals.items()}
        refused = {(conflict.wanted_by, conflict.portal) for conflict in conflicts}
        assert refused == {(k, asked) for k, ps in want.items() for asked in ps if owners[asked.place] != k}
        assert all(owners[conflict.portal.place] == conflict.owned_by for conflict in conflicts)
