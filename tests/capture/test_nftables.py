"""The nftables capture from the proxy's side: what others do to it, beside it, and what it leaves."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import re
import struct
import sys
import time

import pytest

from tests.capture.captured import V4, V6, Captured, is_refused, listening, reach
from tests.capture.conversation import CLUSTER_IP, many, node_port, redirect
from tests.conftest import LOOPS
from userspace_proxy.capture import nftables
from userspace_proxy.capture.base import Changes, Difference
from userspace_proxy.capture.netlink import CREATE, Netlink, attribute, message
from userspace_proxy.capture.nft import batch
from userspace_proxy.capture.nftables import NFTables, cleanup
from userspace_proxy.exceptions import CaptureUnavailable
from userspace_proxy.model import IPFamily

pytestmark = pytest.mark.privileged

on_each_loop = pytest.mark.parametrize("captured", LOOPS, indirect=True)


@pytest.fixture
def captured(node, request):
    with asyncio.Runner(loop_factory=LOOPS[getattr(request, "param", "uvloop")]) as runner:
        captured = Captured(node, runner, "nftables")
        yield captured
        if captured.capture:
            captured.close()


def ruleset(namespace):
    """Tables are listed in the order in which they were made last."""
    return "".join(sorted(re.split(r"(?m)^(?=table )", namespace.run("nft list ruleset"))))


@on_each_loop
def test_a_foreign_flush_is_repaired_at_once(captured, node, caplog):
    captured.start().replace(redirect(), redirect(CLUSTER_IP[V6]), node_port())
    before = ruleset(node)

    async def flushed():
        node.run("nft flush ruleset")
        began = time.monotonic()
        while ruleset(node) != before and time.monotonic() - began < 5:  # noqa: ASYNC110 - the kernel's
            await asyncio.sleep(0.01)

    captured.run(flushed())
    assert ruleset(node) == before
    captured.run(asyncio.sleep(0.05))
    assert "our IPv4 table was changed by nft (pid " in caplog.text
    # It is told with the next sync: 3 elements, and in each family the table, 4 chains and 20 rules.
    assert captured.change([], []).repaired == 3 + 2 * 25
    assert captured.change([], []).repaired == 0


@pytest.mark.parametrize(
    "damage",
    [
        "flush map ip userspace-proxy portals",
        "add element ip userspace-proxy portals { 10.96.0.66 . tcp . 80 : 6666 }",
        "insert rule ip userspace-proxy inside accept",
        "flush chain ip userspace-proxy output",
        "add chain ip userspace-proxy mine",
        "delete table ip userspace-proxy",
        "add table ip userspace-proxy { flags dormant; }",
        "add element ip userspace-proxy inside-networks { 192.0.2.0/24 }",
        "flush set ip userspace-proxy node-addresses",
        "flush ruleset",
    ],
)
def test_without_the_kernels_word_the_next_sync_repairs(captured, node, damage):
    """Nothing is heard here, since the loop does not run meanwhile and is not asked to first."""
    networks = {"inside": ("10.1.0.0/16",), "nodeport_cidrs": ("127.0.0.0/8",)} if " set " in damage else {}
    networks = {"inside": ("10.1.0.0/16",)} if "element ip userspace-proxy inside" in damage else networks
    captured.start(**networks).replace(redirect())
    before = ruleset(node)
    captured.capture._hear = lambda: None
    node.run("nft -f -", text=damage)
    assert captured.change([redirect()], []).repaired >= 1
    assert ruleset(node) == before


def test_a_change_comes_through_what_others_did_meanwhile(captured, node):
    captured.start().replace(redirect(), node_port())
    node.run("nft flush ruleset")
    assert captured.change([node_port()], gone=[redirect()]).removed == 1
    text = ruleset(node)
    assert "30080" in text
    assert "10.96.0.10" not in text


def test_what_others_do_to_their_tables_is_nothing_to_us(captured, node, caplog):
    captured.start().replace(redirect())
    node.run("nft -f -", text="table ip nat { chain x { type nat hook prerouting priority dstnat; accept; }; }")
    theirs = node.run("nft list table ip nat")
    captured.run(asyncio.sleep(0.2))
    assert captured.change([redirect()], []) == Changes()
    assert caplog.messages == []
    captured.close()
    assert ruleset(node) == theirs


def test_beside_iptables_nft_and_a_firewall_in_the_way_of_firewalld(captured, node, client):
    """Its input chain drops what it does not know, but for what has been redirected."""
    node.run("iptables-nft -t nat -A PREROUTING -p tcp --dport 80 -j REDIRECT --to-ports 9")
    node.run("iptables-nft -t nat -A OUTPUT -p tcp --dport 80 -j REDIRECT --to-ports 9")
    node.run(
        "nft -f -",
        text="table inet firewalld { chain filter_INPUT { type filter hook input priority filter + 10; policy drop;\n"
        "ct state established,related accept\nct status dnat accept\niifname lo accept\n}\n}",
    )
    captured.start().replace(redirect(), node_port())
    with listening(node, V4) as listener:
        for where, address in (
            (node, ("10.96.0.10", 80)),
            (client, ("10.96.0.10", 80)),
            (client, ("10.1.0.1", 30080)),
        ):
            reach(where, address, listener)
        assert is_refused(client, ("10.1.0.1", 40001))
    node.run("iptables-nft -t nat -F")
    assert "userspace-proxy" in ruleset(node)


def test_five_thousand_services_and_a_change_among_them(captured, node):
    captured.start()
    services = many(5000)
    assert captured.replace(*services) == Changes(added=5000)
    assert ruleset(node).count(" comment ") == 5000
    assert captured.replace(*services) == Changes()
    assert captured.change(services[1:], gone=services[:1]) == Changes(removed=1)
    moved = services[1]._replace(proxy_port=9999)
    assert captured.change([], gone=[services[1]], new=[moved]) == Changes(added=1, removed=1)
    assert ": 9999" in ruleset(node)


def test_what_is_refused_is_told_and_the_rest_is_in(captured, node):
    captured.start()
    bad = redirect("10.96.0.11", proxy_port=0)
    changes = captured.replace(bad, redirect())
    assert changes.refused == ("default/web:main: ClusterIP 10.96.0.11:80/TCP: proxy port 0: must be 1 to 65535",)
    assert changes.added == 1
    assert "10.96.0.10" in ruleset(node)
    assert captured.change([redirect()], gone=[bad]).refused == ()


async def killed():
    """A run that leaves everything behind."""
    first = NFTables(bind_address="0.0.0.0")
    await first.start()
    await first.replace([redirect(), redirect("10.96.0.66")])
    asyncio.get_running_loop().remove_reader(first._monitor.fileno())
    first._monitor.close()
    first._thread.shutdown()
    for table in first._tables.values():
        table._netlink.close()
        table._upkeep._routes.close()


def test_a_run_that_was_killed_is_taken_over(captured, node):
    captured.run(killed())
    assert "10.96.0.66" in ruleset(node)
    captured.start()
    assert "10.96" not in ruleset(node)
    assert node.run("ip route show table all proto 117") == ""


def test_cleanup_without_a_proxy_and_again(captured, node):
    captured.run(cleanup())
    assert ruleset(node) == ""
    captured.run(killed())
    for _ in range(2):
        captured.run(cleanup())
        assert ruleset(node) == ""


@contextlib.contextmanager
def owned_by_another(node, *families):
    """The kernel lets nobody else touch a table that has an owner, for as long as that keeps its socket."""
    with node.entered():
        netlink = Netlink("somebody", 12)
    numbers = {V4: 2, V6: 10}
    name, owner = attribute(1, b"userspace-proxy\0"), attribute(2, struct.pack("!I", 2))
    tables = [message(0xA00, CREATE, struct.pack("!BBH", numbers[family], 0, 0) + name + owner) for family in families]
    netlink.transact(batch(tables))
    yield
    netlink.close()


def test_a_family_that_cannot_be_had_does_not_keep_the_other(captured, node, caplog):
    with owned_by_another(node, V6):
        captured.start()
        assert captured.capture.families == {V4}
        assert "IPv6 is not available" in caplog.text
        assert "only IPv4 is captured" in caplog.text
        assert captured.replace(redirect(), redirect(CLUSTER_IP[V6])) == Changes(added=1)
        assert caplog.messages[1:] == ["capture nftables: IPv6 portals exist, but are not captured"]
        captured.close()
    assert ruleset(node) == ""


def test_with_no_family_it_is_unavailable(captured, node):
    descriptors = len(os.listdir("/proc/self/fd"))
    with owned_by_another(node, V4, V6):
        capture = NFTables(bind_address="0.0.0.0")
        with pytest.raises(CaptureUnavailable, match=r"IPv4 is not available: .*; IPv6 is not available"):
            captured.run(capture.start())
        captured.run(capture.close())
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_without_permission_it_says_what_to_do(node):
    script = (
        "import asyncio\n"
        "from userspace_proxy.capture.nftables import NFTables\n"
        "asyncio.run(NFTables(bind_address='0.0.0.0').start())"
    )
    said = node.run(f'setpriv --bounding-set=-net_admin,-net_raw {sys.executable} -c "{script}"', check=False)
    assert "CaptureUnavailable: IPv4 is not available: " in said
    assert "run as root, or with CAP_NET_ADMIN" in said


@pytest.mark.parametrize(
    ("code", "advice"),
    [(errno.EPERM, "CAP_NET_ADMIN"), (errno.EOPNOTSUPP, "modprobe"), (errno.EMSGSIZE, "wmem_max"), (errno.EIO, "")],
)
def test_what_is_missing_is_told_with_what_to_do(code, advice):
    assert advice in nftables._advice(OSError(code, "refused"))


@on_each_loop
def test_an_asker_that_is_cancelled_does_not_confuse_the_next(captured, node):
    captured.start()

    async def cancelled():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await captured.capture.replace(many(3000))

    captured.run(cancelled())
    captured.replace(redirect())
    assert ruleset(node).count(" comment ") == 1


def test_close_works_from_any_state(node, loop_factory):
    async def main():
        await NFTables(bind_address="0.0.0.0").close()
        capture = NFTables(bind_address="0.0.0.0")
        await capture.start()
        await capture.replace([redirect()])
        node.run("nft flush ruleset")
        await capture.close()

    with node.entered(), asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(main())
    assert ruleset(node) == ""
    assert node.run("ip route show table all proto 117") == ""


@pytest.mark.parametrize("family", IPFamily)
def test_a_difference_concerns_its_own_family(captured, node, family, caplog):
    caplog.set_level(logging.WARNING)
    captured.start()
    new = redirect(CLUSTER_IP[family])
    assert captured.run(captured.capture.replace([new], Difference(new=(new,)))) == Changes(added=1)
    assert node.run(f"nft list table {'ip' if family is V4 else 'ip6'} userspace-proxy").count(" comment ") == 1
