"""What every netfilter capture does for clients, on the node and elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest

from tests.capture.captured import PROXY_PORT, V4, V6, WAYS, Captured, is_refused, listening, reach
from tests.capture.conversation import CLUSTER_IP, node_port, redirect
from tests.netns import Namespace
from userspace_proxy.model import IPFamily, PortalKind, Protocol

pytestmark = pytest.mark.privileged

VETH = {V4: "10.1.0.1", V6: "fd01::1"}
EXTERNAL = {V4: "198.51.100.1", V6: "2001:db8::1"}


@pytest.fixture(params=WAYS)
def captured(node, request):
    with asyncio.Runner() as runner:
        captured = Captured(node, runner, request.param)
        yield captured
        if captured.capture:
            captured.close()


@pytest.mark.parametrize("family", IPFamily)
def test_from_a_node_that_has_nothing_but_lo(captured, node, family):
    captured.start().replace(redirect(CLUSTER_IP[family]))
    with listening(node, family) as listener:
        assert reach(node, (CLUSTER_IP[family], 80), listener) == family.loopback
    assert is_refused(node, (CLUSTER_IP[family], 81))


@pytest.mark.parametrize("family", IPFamily)
def test_from_a_second_machine(captured, node, client, family):
    external = redirect(EXTERNAL[family], kind=PortalKind.EXTERNAL_IP)
    balanced = redirect(VETH[family], 8080, kind=PortalKind.LOAD_BALANCER_IP)
    captured.start().replace(redirect(CLUSTER_IP[family]), external, balanced, node_port(family=family))
    them = "10.1.0.2" if family is V4 else "fd01::2"
    with listening(node, family) as listener:
        for address in (
            (CLUSTER_IP[family], 80),
            (EXTERNAL[family], 80),
            (VETH[family], 8080),
            (VETH[family], 30080),
        ):
            assert reach(client, address, listener) == them
            reach(node, address, listener)
        reach(node, (family.loopback, 30080), listener)


@pytest.mark.parametrize("family", IPFamily)
def test_with_a_specific_bind_address(captured, node, client, family):
    captured.start(VETH[family]).replace(redirect(CLUSTER_IP[family]), node_port(family=family))
    assert captured.capture.families == {family}
    with listening(node, family, VETH[family]) as listener:
        for address in ((CLUSTER_IP[family], 80), (VETH[family], 30080)):
            reach(client, address, listener)
            reach(node, address, listener)
        reach(node, (family.loopback, 30080), listener)


def test_node_ports_only_on_the_addresses_asked_for(captured, node, client):
    captured.start(nodeport_cidrs=["127.0.0.0/8"]).replace(node_port())
    with listening(node, V4) as listener:
        reach(node, ("127.0.0.1", 30080), listener)
        assert is_refused(node, ("10.1.0.1", 30080))
        assert is_refused(client, ("10.1.0.1", 30080))


@pytest.mark.parametrize("family", IPFamily)
def test_datagrams_and_their_answers(captured, node, client, family):
    captured.start().replace(redirect(CLUSTER_IP[family], 53, protocol=Protocol.UDP))
    kind = socket.AF_INET6 if family is V6 else socket.AF_INET
    with node.entered():
        server = socket.socket(kind, socket.SOCK_DGRAM)
    with server:
        server.bind((family.wildcard, PROXY_PORT))
        server.settimeout(5)
        for where in (node, client):
            with where.entered(), socket.socket(kind, socket.SOCK_DGRAM) as asker:
                asker.settimeout(5)
                asker.connect((CLUSTER_IP[family], 53))
                asker.send(b"question")
                question, sender = server.recvfrom(100)
                server.sendto(question + b"?", sender)
                assert asker.recv(100) == b"question?"


def test_a_connection_outlives_withdraw_and_nothing_new_comes_in(captured, node, client):
    """With no other rule that needs conntrack, that of ours is what keeps the connection translated."""
    captured.start().replace(redirect())
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(listening(node, V4))
        ends = []
        for where in (node, client):
            with where.entered():
                ends.append(stack.enter_context(socket.create_connection(("10.96.0.10", 80), timeout=5)))
            ends.append(stack.enter_context(listener.accept()[0]))
        for end in ends:
            end.settimeout(1)
        captured.withdraw()
        assert is_refused(node, ("10.96.0.10", 80))
        for one, other in (ends[:2], ends[1::-1], ends[2:], ends[:1:-1]):
            one.sendall(b"still here")
            assert other.recv(100) == b"still here"
        captured.close()
        # Not translated any more, what the server's end sends comes from a stranger.
        ends[3].sendall(b"too late")
        with pytest.raises((TimeoutError, ConnectionError)):
            assert ends[2].recv(100) == b""


@pytest.mark.parametrize("family", IPFamily)
def test_clients_inside_have_a_port_of_their_own(captured, node, client, family):
    """The node itself, and a network that is told; portals without one are for everybody."""
    captured.start(inside=["10.1.0.0/24", "10.0.0.0/8", "fd01::/64"])
    balanced = redirect(EXTERNAL[family], kind=PortalKind.LOAD_BALANCER_IP)._replace(inside_port=40002)
    by_node_port = node_port(family=family)._replace(inside_port=40002)
    captured.replace(balanced, by_node_port, redirect(CLUSTER_IP[family]))
    with Namespace() as stranger:
        node.connect(stranger, "192.0.2.1/24", "192.0.2.2/24", "fd02::1/64", "fd02::2/64")
        stranger.run("ip route add default via 192.0.2.1")
        stranger.run("ip -6 route add default via fd02::1")
        with listening(node, family) as everybodys, listening(node, family, port=40002) as insiders:
            for where, listener in ((node, insiders), (client, insiders), (stranger, everybodys)):
                reach(where, (EXTERNAL[family], 80), listener)
                reach(where, (VETH[family], 30080), listener)
                reach(where, (CLUSTER_IP[family], 80), everybodys)
    captured.replace(balanced._replace(inside_port=0))
    with listening(node, family) as everybodys:
        reach(node, (EXTERNAL[family], 80), everybodys)
