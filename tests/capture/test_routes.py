from __future__ import annotations

import socket

import pytest

from userspace_proxy.capture.routes import ROUTE_PROTOCOL, Routes
from userspace_proxy.model import IPFamily

pytestmark = pytest.mark.privileged

CASES = [
    pytest.param(IPFamily.IPV4, "10.96.0.1", "10.96.0.2", "127.96.0.10", id="IPv4"),
    pytest.param(IPFamily.IPV6, "fd00::a", "fd00::b", "::1", id="IPv6"),
]


@pytest.fixture
def routes_of(node):
    """Routes of a family in a namespace with nothing but lo."""
    opened = []

    def open_(family):
        with node.entered():
            opened.append(Routes(family))
        return opened[-1]

    yield open_
    for routes in opened:
        routes.close()


def ours(node, family):
    option = "-6" if family is IPFamily.IPV6 else "-4"
    lines = node.run(f"ip {option} route show proto {ROUTE_PROTOCOL}").splitlines()
    return {line.split()[0] for line in lines}


@pytest.mark.parametrize(("family", "ip", "other", "local"), CASES)
def test_an_unrouted_address_becomes_reachable_until_it_is_gone(node, routes_of, family, ip, other, local):
    routes = routes_of(family)
    with node.entered():
        assert routes.serve([ip, other, local]) == {}
        with socket.socket(socket.AF_INET6 if family is IPFamily.IPV6 else socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.connect((ip, 80))
            assert sender.getsockname()[0] == family.loopback
    assert ours(node, family) == {ip, other}
    with node.entered():
        assert routes.serve([other]) == {}
    assert ours(node, family) == {other}
    with node.entered():
        assert routes.serve([]) == {}
    assert ours(node, family) == set()


@pytest.mark.parametrize(("family", "ip", "other", "local"), CASES)
def test_a_routed_address_is_left_alone(node, client, routes_of, family, ip, other, local):
    default = {IPFamily.IPV4: "ip route add default via 10.1.0.2", IPFamily.IPV6: "ip -6 route add default via fd01::2"}
    node.run(default[family])
    routes = routes_of(family)
    with node.entered():
        assert routes.serve([ip]) == {}
    assert ours(node, family) == set()
    # The default route goes, which is seen by the next thorough look.
    node.run(default[family].replace("add", "del"))
    with node.entered():
        assert routes.serve([ip]) == {}
        assert ours(node, family) == set()
        routes.reread()
        assert routes.serve([ip]) == {}
    assert ours(node, family) == {ip}


@pytest.mark.parametrize(("family", "ip", "other", "local"), CASES)
def test_routes_of_an_earlier_run_are_known_by_their_protocol(node, routes_of, family, ip, other, local):
    option, mask = ("-6", 128) if family is IPFamily.IPV6 else ("-4", 32)
    node.run(f"ip {option} route add {other}/{mask} dev lo proto 99")
    with node.entered():
        routes_of(family).serve([ip])
        successor = routes_of(family)
        assert successor.serve([]) == {}
    assert ours(node, family) == set()
    assert other in node.run(f"ip {option} route show proto 99")


def test_a_route_that_others_took_away_is_missed_and_made_again(node, routes_of):
    routes = routes_of(IPFamily.IPV4)
    with node.entered():
        routes.serve(["10.96.0.1", "10.96.0.2"])
        node.run("ip route del 10.96.0.1")
        routes.reread()
        assert routes.serve(["10.96.0.1", "10.96.0.2"]) == {}
        assert ours(node, IPFamily.IPV4) == {"10.96.0.1", "10.96.0.2"}
        node.run("ip route flush proto 117")
        assert routes.serve([]) == {}


def test_what_cannot_be_added_is_told(node, routes_of):
    routes = routes_of(IPFamily.IPV4)
    with node.entered():
        node.run("ip link set lo down")
        [(ip, problem)] = routes.serve(["10.96.0.1"]).items()
    assert ip == "10.96.0.1"
    assert "10.96.0.1" in problem
    assert "add" in problem
