"""Which endpoints clients may be sent to: tables, then any endpoints, and what must hold for all of them."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from userspace_proxy.model import (
    Endpoint,
    IPFamily,
    Node,
    Preference,
    Protocol,
    ServicePort,
    ServicePortName,
    SocketKey,
    TrafficPolicy,
)
from userspace_proxy.policy import NOWHERE, eligible, is_silent, local_ready, sources

V4, V6 = IPFamily.IPV4, IPFamily.IPV6
LOCAL = TrafficPolicy.LOCAL
NAME = ServicePortName("default", "web", "http")
CLUSTER = SocketKey(NAME, V4)
HERE = SocketKey(NAME, V4, LOCAL)
NODE = Node("n1", "z1")
SERVICE = ServicePort(Protocol.TCP, 80, ("10.96.0.1",))


def pod(
    number: int, node: str = "", zone: str = "", *, ready: bool = True, terminating: bool = False, hints: str = ""
) -> Endpoint:
    """Pod `number`; one that is not ready serves on if it is terminating."""
    told = tuple(hints.split())
    zones, nodes = (tuple(hint for hint in told if hint[0] == kind) for kind in "zn")
    serving = ready or terminating
    return Endpoint(f"10.1.0.{number}", 80, ready, serving, terminating, node, zone, zones, nodes)


def chosen(endpoints: list[Endpoint], key: SocketKey = CLUSTER, node: Node = NODE, **service: object) -> list[int]:
    found = eligible(endpoints, key, dataclasses.replace(SERVICE, **service), node)  # type: ignore[arg-type]
    return [int(e.ip.rsplit(".", 1)[1]) for e in found]


class TestLocal:
    def test_endpoints_of_this_node_only(self) -> None:
        assert chosen([pod(1, "n1"), pod(2, "n2"), pod(3)], HERE) == [1]
        assert chosen([pod(1, "n1"), pod(2, "n2"), pod(3)]) == [1, 2, 3]

    def test_nothing_is_local_to_a_node_without_a_name(self) -> None:
        assert chosen([pod(1), pod(2, "n2")], HERE, NOWHERE) == []

    def test_hints_do_not_lead_away(self) -> None:
        assert chosen([pod(1, "n1", hints="z2"), pod(2, "n2", hints="z1")], HERE) == [1]

    @pytest.mark.parametrize(
        ("elsewhere", "silent"),
        [
            ([], False),
            ([pod(1, "n2")], True),
            ([pod(1, "n2", ready=False)], False),
            ([pod(1, "n2", ready=False, terminating=True)], True),
        ],
    )
    def test_silence_where_others_could_serve(self, elsewhere: list[Endpoint], silent: bool) -> None:
        assert is_silent(elsewhere, HERE, SERVICE) is silent
        assert not is_silent(elsewhere, CLUSTER, SERVICE)

    def test_endpoints_of_the_other_family_serve_nobody_here(self) -> None:
        assert not is_silent([Endpoint("fd00::1", 80, node="n2")], HERE, SERVICE)


class TestNear:
    def test_hints_for_this_zone(self) -> None:
        assert chosen([pod(1, hints="z1"), pod(2, hints="z2"), pod(3, hints="z1 z2")]) == [1, 3]

    def test_hints_for_this_node_come_before_those_for_the_zone(self) -> None:
        assert chosen([pod(1, hints="z1 n2"), pod(2, hints="z1 n1")]) == [2]
        assert chosen([pod(1, hints="z1 n2"), pod(2, hints="z2 n3")]) == [1]

    @pytest.mark.parametrize(
        "endpoints",
        [
            [pod(1, hints="z1"), pod(2)],  # one has none
            [pod(1, hints="z2"), pod(2, hints="z3")],  # none is meant for us
            [pod(1, hints="z1", ready=False), pod(2, hints="z2")],  # the one that is cannot be used
        ],
    )
    def test_otherwise_hints_are_passed_over(self, endpoints: list[Endpoint]) -> None:
        assert chosen(endpoints) == [1, 2]

    def test_one_that_is_not_ready_needs_no_hints(self) -> None:
        assert chosen([pod(1, hints="z1"), pod(2, hints="z2"), pod(3, ready=False)]) == [1]

    def test_a_node_without_a_zone(self) -> None:
        assert chosen([pod(1, hints="z1"), pod(2, hints="z2")], node=Node("n1")) == [1, 2]

    def test_the_service_prefers_this_zone(self) -> None:
        both = [pod(1, zone="z1"), pod(2, zone="z2")]
        assert chosen(both, preference=Preference.ZONE) == [1]
        assert chosen(both) == [1, 2]
        assert chosen([pod(2, zone="z2")], preference=Preference.ZONE) == [2]
        assert chosen(both, node=Node("n1"), preference=Preference.ZONE) == [1, 2]

    def test_the_service_prefers_this_node_and_then_this_zone(self) -> None:
        three = [pod(1, "n1", "z1"), pod(2, "n2", "z1"), pod(3, "n3", "z2")]
        assert chosen(three, preference=Preference.NODE) == [1]
        assert chosen(three[1:], preference=Preference.NODE) == [2]
        assert chosen(three[2:], preference=Preference.NODE) == [3]

    def test_hints_are_worth_more_than_where_endpoints_are(self) -> None:
        assert chosen([pod(1, zone="z1", hints="z2"), pod(2, zone="z2", hints="z1")], preference=Preference.ZONE) == [2]


def test_those_that_are_not_ready_are_published() -> None:
    (found,) = eligible([pod(1, ready=False)], CLUSTER, dataclasses.replace(SERVICE, publish_not_ready=True), NODE)
    assert found.ready
    assert is_silent([pod(1, "n2", ready=False)], HERE, dataclasses.replace(SERVICE, publish_not_ready=True))


def test_source_ranges_are_those_of_the_family_and_of_screened_sockets() -> None:
    service = dataclasses.replace(SERVICE, source_ranges=("192.0.2.0/24", "2001:db8::/32"))
    assert sources(CLUSTER, service) is None
    assert sources(CLUSTER._replace(screened=True), service) == ("192.0.2.0/24",)
    assert sources(SocketKey(NAME, V6, screened=True), service) == ("2001:db8::/32",)
    only_v6 = dataclasses.replace(SERVICE, source_ranges=("2001:db8::/32",))
    assert sources(CLUSTER._replace(screened=True), only_v6) == ()


def test_load_balancers_are_told_of_pods_not_of_ports() -> None:
    found = [pod(1, "n1"), dataclasses.replace(pod(1, "n1"), port=443), pod(2, "n2"), pod(3, "n1", ready=False)]
    assert local_ready(found, NODE) == 1
    assert local_ready(found, NOWHERE) == 0


ENDPOINTS = st.lists(
    st.builds(
        Endpoint,
        st.sampled_from(["10.1.0.1", "10.1.0.2", "10.1.0.3", "fd00::1"]),
        st.just(80),
        st.booleans(),
        st.booleans(),
        st.booleans(),
        st.sampled_from(["", "n1", "n2"]),
        st.sampled_from(["", "z1", "z2"]),
        st.sampled_from([(), ("z1",), ("z2",), ("z1", "z2")]),
        st.sampled_from([(), ("n1",), ("n2",)]),
    ),
    max_size=6,
)
KEYS = st.builds(SocketKey, st.just(NAME), st.sampled_from(IPFamily), st.sampled_from(TrafficPolicy))
SERVICES = st.builds(
    lambda preference, publish: dataclasses.replace(SERVICE, preference=preference, publish_not_ready=publish),
    st.sampled_from(Preference),
    st.booleans(),
)
NODES = st.sampled_from([NOWHERE, NODE, Node("n1"), Node("n3", "z2")])


@given(ENDPOINTS, KEYS, SERVICES, NODES)
def test_whatever_there_is(endpoints: list[Endpoint], key: SocketKey, service: ServicePort, node: Node) -> None:
    found = eligible(endpoints, key, service, node)
    # They are some of those that there are, in their order.
    rest = iter(e.address for e in endpoints)
    assert all(e.address in rest for e in found)
    assert all((":" in e.ip) is (key.family is V6) for e in found)
    family = [e for e in endpoints if (":" in e.ip) is (key.family is V6)]
    if key.policy is LOCAL:
        assert all(e.node == node.name for e in found)
        assert is_silent(endpoints, key, service) or not any(e.is_usable for e in found)
    else:
        # A wish for nearness costs nobody the service.
        assert any(e.ready for e in found) is any(e.ready or service.publish_not_ready for e in family)
        assert any(e.is_usable for e in found) is any(e.is_usable or service.publish_not_ready for e in family)
