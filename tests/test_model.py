"""The nouns: text forms, families, portals."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from userspace_proxy.model import (
    DEFAULT_AFFINITY_TIMEOUT,
    Endpoint,
    IPFamily,
    Portal,
    PortalKind,
    Protocol,
    Redirect,
    ServicePort,
    ServicePortName,
    SessionAffinity,
    Snapshot,
    SocketKey,
    changed,
    family_of,
    join_host_port,
)

V4, V6 = IPFamily.IPV4, IPFamily.IPV6


@pytest.mark.parametrize(
    ("ip", "family", "text"),
    [
        ("10.0.0.1", V4, "10.0.0.1:80"),
        ("fd00::1", V6, "[fd00::1]:80"),
        ("::", V6, "[::]:80"),
        ("::ffff:10.0.0.1", V6, "[::ffff:10.0.0.1]:80"),
    ],
)
def test_address_text(ip: str, family: IPFamily, text: str) -> None:
    assert family_of(ip) is family
    assert join_host_port(ip, 80) == text
    assert str(Endpoint(ip, 80)) == text
    assert Endpoint(ip, 80).address == (ip, 80)


@pytest.mark.parametrize("family", IPFamily)
def test_well_known_addresses_are_of_their_family(family: IPFamily) -> None:
    assert family_of(family.loopback) is family
    assert family_of(family.wildcard) is family
    assert family.loopback != family.wildcard


def test_names_as_the_log_shows_them() -> None:
    name = ServicePortName("default", "web", "http")
    assert str(name) == "default/web:http"
    assert str(ServicePortName("default", "web")) == "default/web"
    assert str(SocketKey(name, V6)) == "default/web:http (IPv6)"
    assert str(Portal(V4, Protocol.TCP, "10.96.0.1", 80, PortalKind.CLUSTER_IP)) == "ClusterIP 10.96.0.1:80/TCP"
    assert str(Portal(V6, Protocol.UDP, "", 30053, PortalKind.NODE_PORT)) == "NodePort *:30053 (IPv6)/UDP"


def test_portals_in_the_order_of_kube_proxy() -> None:
    service = ServicePort(
        Protocol.TCP,
        80,
        cluster_ips=("fd00::a", "10.96.0.10"),
        node_port=30080,
        external_ips=("192.0.2.1", "2001:db8::1"),
        load_balancer_ips=("192.0.2.2",),
    )
    assert service.families == (V6, V4)
    assert [(portal.kind, portal.ip, portal.port) for portal in service.portals(V4)] == [
        (PortalKind.CLUSTER_IP, "10.96.0.10", 80),
        (PortalKind.EXTERNAL_IP, "192.0.2.1", 80),
        (PortalKind.LOAD_BALANCER_IP, "192.0.2.2", 80),
        (PortalKind.NODE_PORT, "", 30080),
    ]
    assert [(portal.kind, portal.ip, portal.port) for portal in service.portals(V6)] == [
        (PortalKind.CLUSTER_IP, "fd00::a", 80),
        (PortalKind.EXTERNAL_IP, "2001:db8::1", 80),
        (PortalKind.NODE_PORT, "", 30080),
    ]
    assert {portal.family for portal in service.portals(V6)} == {V6}


def test_no_node_port_no_portal() -> None:
    assert [p.kind for p in ServicePort(Protocol.UDP, 53, ("10.96.0.10",)).portals(V4)] == [PortalKind.CLUSTER_IP]


def test_portals_of_two_kinds_can_be_one_place() -> None:
    one = Portal(V4, Protocol.TCP, "192.0.2.1", 80, PortalKind.EXTERNAL_IP)
    two = one._replace(kind=PortalKind.LOAD_BALANCER_IP)
    assert one != two
    assert one.place == two.place
    assert one.place != one._replace(protocol=Protocol.UDP).place


def test_values_are_values() -> None:
    service = ServicePort(Protocol.TCP, 80, ("10.96.0.10",))
    assert (service.affinity, service.affinity_timeout) == (SessionAffinity.NONE, DEFAULT_AFFINITY_TIMEOUT)
    assert service == ServicePort(Protocol.TCP, 80, ("10.96.0.10",))
    assert service != dataclasses.replace(service, port=81)
    name = ServicePortName("a", "b")
    portal = service.portals(V4)[0]
    assert len({Redirect(portal, 40000, name), Redirect(portal, 40000, name), Redirect(portal, 40001, name)}) == 2
    assert Snapshot() == Snapshot({}, {})
    with pytest.raises(dataclasses.FrozenInstanceError):
        service.port = 81  # type: ignore[misc]


small = st.dictionaries(st.sampled_from("abcdef"), st.integers(1000, 1003))


@given(small, small)
def test_what_changed(before: dict[str, int], now: dict[str, int]) -> None:
    assert changed(before, now) == {key for key in before | now if before.get(key) != now.get(key)}


@given(small, small)
def test_what_changed_in_a_copy(before: dict[str, int], new: dict[str, int]) -> None:
    now = before | new
    assert changed(before, now) == {key for key in now if before.get(key) != now[key]}


def test_kept_values_are_not_looked_at() -> None:
    looked = []

    class Key(str):
        __slots__ = ()

        def __hash__(self) -> int:
            looked.append(self)
            return super().__hash__()

    class Value:
        def __eq__(self, other: object) -> bool:
            raise AssertionError("compared")

        __hash__ = None  # type: ignore[assignment]

    before: dict[str, object] = {Key(number): Value() for number in range(1000)}
    now = dict(before)
    now[Key(7)] = "new"
    looked.clear()
    before[Key(7)] = "old"
    looked.clear()
    found = changed(before, now)
    times = len(looked)
    assert found == {"7"}
    assert times < 10
