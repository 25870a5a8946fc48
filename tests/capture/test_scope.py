from __future__ import annotations

from userspace_proxy.capture.scope import Scope
from userspace_proxy.model import IPFamily

V4, V6 = IPFamily.IPV4, IPFamily.IPV6


def test_networks_are_those_of_the_family_each_once():
    cidrs = ("10.0.0.0/8", "fd00::/64", "10.0.0.0/8", "192.0.2.1/32")
    assert [str(network) for network in Scope(V4, "0.0.0.0", cidrs).nodeport_networks] == ["10.0.0.0/8", "192.0.2.1/32"]
    assert [str(network) for network in Scope(V6, "::", (), cidrs).inside_networks] == ["fd00::/64"]


def test_node_ports_are_everywhere_unless_networks_are_given():
    assert Scope(V4, "0.0.0.0").nodeport_destinations == ("",), "no match at all"
    assert Scope(V4, "0.0.0.0", ("10.0.0.0/8",)).nodeport_destinations == ("-d 10.0.0.0/8 ",)
    assert Scope(V6, "::", ("10.0.0.0/8",)).nodeport_destinations == (), "networks of the other family only"


def test_nobody_else_is_inside_unless_networks_are_given():
    assert Scope(V4, "0.0.0.0").inside_sources == ()
    assert Scope(V4, "0.0.0.0", (), ("10.0.0.0/8", "0.0.0.0/0")).inside_sources == ("-s 10.0.0.0/8 ", "")
