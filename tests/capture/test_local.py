"""Addresses made the node's own: which, which not, and that they go again."""

from __future__ import annotations

import asyncio
import os
import socket
import sys

import pytest

from tests.capture.conversation import CLUSTER_IP, node_port, redirect
from tests.netns import eventually
from userspace_proxy.capture.base import Changes, Difference
from userspace_proxy.capture.local import Local, cleanup
from userspace_proxy.exceptions import CaptureUnavailable
from userspace_proxy.model import IPFamily, PortalKind

pytestmark = pytest.mark.privileged

V4, V6 = IPFamily.IPV4, IPFamily.IPV6


@pytest.fixture
def run(node):
    with asyncio.Runner() as runner:

        def run(coroutine):
            with node.entered():
                return runner.run(coroutine)

        yield run


@pytest.fixture
def capture(run):
    capture = Local(bind_address="0.0.0.0")
    run(capture.start())
    yield capture
    run(capture.close())


def ours(node):
    lines = [line for option in "46" for line in node.run(f"ip -{option} route show table all proto 117").splitlines()]
    return {line.split()[1] if line.startswith("local") else line for line in lines}


@pytest.mark.parametrize("family", IPFamily)
def test_a_cluster_ip_is_the_nodes_while_it_is_a_portal(capture, run, node, family):
    ip = CLUSTER_IP[family]
    assert run(capture.replace([redirect(ip), redirect(ip, 81), node_port(family=family)])) == Changes(added=1)
    assert ours(node) == {ip}
    assert run(capture.replace([redirect(ip, 81)], Difference(gone=(redirect(ip),)))) == Changes()
    assert ours(node) == {ip}
    assert run(capture.replace([], Difference(gone=(redirect(ip, 81),)))) == Changes(removed=1)
    assert ours(node) == set()


def test_what_the_host_has_already_needs_nothing(capture, run, node, client):
    external = redirect("10.1.0.1", kind=PortalKind.EXTERNAL_IP)
    assert run(capture.replace([redirect("127.96.0.10"), redirect("fd01::1"), external])) == Changes()
    assert ours(node) == set()


@pytest.mark.parametrize("kind", [PortalKind.EXTERNAL_IP, PortalKind.LOAD_BALANCER_IP])
def test_an_address_of_somebody_elses_is_not_taken_until_it_is_ours(capture, run, node, client, kind):
    wanted = [redirect("198.51.100.1", kind=kind), redirect()]
    assert run(capture.replace(wanted)) == Changes(added=1)
    assert ours(node) == {"10.96.0.10"}
    node.add_address("lo", "198.51.100.1/32")
    assert run(capture.replace(wanted, Difference())) == Changes()
    assert ours(node) == {"10.96.0.10"}


def test_a_route_that_others_took_away_comes_back_with_the_next_sync(capture, run, node):
    run(capture.replace([redirect()]))
    node.run("ip route flush table local proto 117")
    assert run(capture.replace([redirect()], Difference())) == Changes(repaired=1)
    assert ours(node) == {"10.96.0.10"}
    assert run(capture.replace([redirect()], Difference())) == Changes()


def test_withdrawn_addresses_stay_for_what_is_established(capture, run, node):
    run(capture.replace([redirect()]))
    run(capture.withdraw())
    assert ours(node) == {"10.96.0.10"}


@pytest.mark.parametrize("family", IPFamily)
def test_an_address_goes_when_the_last_connection_to_it_has_ended(capture, run, node, client, family):
    ip = CLUSTER_IP[family]
    run(capture.replace([redirect(ip)]))
    with node.entered():
        listener = socket.socket(socket.AF_INET6 if family is V6 else socket.AF_INET)
    if family is V6:
        listener.setsockopt(socket.IPPROTO_IPV6, 78, 1)  # IPV6_FREEBIND
    with listener:
        listener.bind((ip, 80))
        listener.listen()
        with client.entered():
            peer = socket.create_connection((ip, 80), timeout=5)
        server, _ = listener.accept()
    with peer, server:
        assert run(capture.replace([], Difference(gone=(redirect(ip),)))) == Changes()
        assert run(capture.replace([], Difference())) == Changes()
        assert ours(node) == {ip}
        peer.send(b"still there")
        server.settimeout(5)
        assert server.recv(100) == b"still there"
        peer.close()
        assert server.recv(100) == b""
    eventually(lambda: run(capture.replace([], Difference())) == Changes(removed=1))
    assert ours(node) == set()


def test_a_crashed_run_is_taken_over_whichever_way_it_captured(run, node):
    for left in (
        "local 10.96.0.66/32 dev lo table local",
        "10.96.0.67/32 dev lo src 127.0.0.1",
        "local fd00::66 dev lo table local",
    ):
        node.run(f"ip route add {left} proto 117")
    node.run("ip route add local 10.96.0.68/32 dev lo table local proto 99")
    capture = Local(bind_address="0.0.0.0")
    run(capture.start())
    assert ours(node) == set()
    run(capture.replace([redirect()]))
    run(cleanup())
    assert ours(node) == set()
    assert "10.96.0.68" in node.run("ip route show table local")
    run(capture.close())


def test_without_permission_what_the_host_has_is_served_and_the_rest_refused(node):
    script = (
        "import asyncio\n"
        "from tests.capture.conversation import redirect\n"
        "from userspace_proxy.capture.local import Local\n"
        "async def main():\n"
        "    capture = Local(bind_address='0.0.0.0')\n"
        "    await capture.start()\n"
        "    for line in (await capture.replace([redirect(), redirect('127.96.0.10')])).refused: print(line)\n"
        "    await capture.close()\n"
        "asyncio.run(main())"
    )
    said = node.run(f'setpriv --bounding-set=-net_admin {sys.executable} -c "{script}"').splitlines()
    assert "only addresses that this host has are served in IPv4" in said[0]
    assert said[2].startswith("default/web:main: ClusterIP 10.96.0.10:80/TCP: route to 10.96.0.10: cannot add it: ")
    assert said[2].endswith("it takes CAP_NET_ADMIN")
    assert len(said) == 3


def test_one_family_only_where_the_bind_address_is_of_one(run, node):
    capture = Local(bind_address="10.1.0.1")
    run(capture.start())
    run(capture.replace([redirect(), redirect(CLUSTER_IP[V6])]))
    assert ours(node) == {"10.96.0.10"}
    run(capture.close())


def test_without_a_loopback_address_it_is_unavailable(run, node):
    node.run("ip link set lo down")
    node.run("ip addr flush dev lo")
    descriptors = len(os.listdir("/proc/self/fd"))
    capture = Local(bind_address="0.0.0.0")
    with pytest.raises(CaptureUnavailable, match="ip link set lo up"):
        run(capture.start())
    run(capture.close())
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 1  # the thread's


@pytest.mark.parametrize("family", IPFamily)
def test_whoever_sends_to_it_is_delivered_here(capture, run, node, client, family):
    ip = CLUSTER_IP[family]
    run(capture.replace([redirect(ip)]))
    kind = socket.AF_INET if family is V4 else socket.AF_INET6
    with node.entered(), socket.socket(kind) as listener:
        if family is V6:
            listener.setsockopt(socket.IPPROTO_IPV6, 78, 1)
        listener.bind((ip, 80))
        listener.listen()
        for where in (node, client):
            with where.entered():
                socket.create_connection((ip, 80), timeout=5).close()
