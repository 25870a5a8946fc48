"""Routes and conntrack as a capture's redirects come and go; flushing is tested with each capture."""

from __future__ import annotations

import socket
import struct

import pytest

from tests.capture.conversation import many, redirect
from userspace_proxy.capture.upkeep import Upkeep
from userspace_proxy.model import IPFamily

pytestmark = pytest.mark.privileged


@pytest.fixture
def upkeep(node):
    with node.entered():
        upkeep = Upkeep(IPFamily.IPV4)
        yield upkeep
        upkeep.end()


def routes(node):
    return {line.split()[0] for line in node.run("ip route show proto 117").splitlines()}


def test_an_address_is_routed_while_any_portal_has_it(node, upkeep):
    both = [redirect(), redirect(port=81)]
    assert upkeep.follow([], both, thoroughly=False) == []
    assert upkeep.follow(both[:1], [], thoroughly=False) == []
    assert routes(node) == {"10.96.0.10"}
    assert upkeep.follow(both[1:], [redirect("10.96.0.11")], thoroughly=False) == []
    assert routes(node) == {"10.96.0.11"}


def test_what_others_took_away_comes_back_thoroughly_only(node, upkeep):
    upkeep.follow([], [redirect()], thoroughly=False)
    node.run("ip route flush proto 117")
    upkeep.follow([], [redirect("10.96.0.11")], thoroughly=False)
    assert routes(node) == {"10.96.0.11"}
    upkeep.follow([], [], thoroughly=True)
    assert routes(node) == {"10.96.0.10", "10.96.0.11"}


def test_an_address_keeps_its_way_while_a_client_of_the_node_is_connected_to_it(node, upkeep):
    upkeep.follow([], [redirect()], thoroughly=False)
    node.run("ip addr add 10.96.0.10/32 dev lo")  # in place of a redirect
    with node.entered():
        server = socket.create_server(("10.96.0.10", 80))
        successor = Upkeep(IPFamily.IPV4)
    with server, socket.create_connection(("10.96.0.10", 80)) as client, server.accept()[0]:
        assert upkeep.follow([redirect()], [redirect("10.96.0.11")], thoroughly=False) == []
        assert routes(node) == {"10.96.0.10", "10.96.0.11"}
        node.run("ip addr del 10.96.0.10/32 dev lo")
        node.run("ip route flush proto 117")
        upkeep.follow([], [], thoroughly=True)
        assert routes(node) == {"10.96.0.10", "10.96.0.11"}
        assert successor.follow([], [redirect("10.96.0.11")], thoroughly=False) == []
        assert routes(node) == {"10.96.0.10", "10.96.0.11"}
        node.run("ip addr add 10.96.0.10/32 dev lo")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # ends at once, on both sides
    for each in (upkeep, successor):
        assert each.follow([], [], thoroughly=True) == []
    assert routes(node) == {"10.96.0.11"}
    assert successor.end() == ([], [])


def test_at_the_end_and_at_the_start_nothing_is_left(node):
    with node.entered():
        first = Upkeep(IPFamily.IPV4)
        first.follow([], many(50), thoroughly=False)
        assert len(routes(node)) == 50
        second = Upkeep(IPFamily.IPV4)
        assert second.take_over() == []
        assert routes(node) == set()
        assert first.end() == ([], [])
        assert second.end() == ([], [])
