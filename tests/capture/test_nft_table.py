"""The table in the kernel: that a change costs what changed, that conntrack and routes go with it, and refusals."""

from __future__ import annotations

import errno
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.capture.conversation import many, node_port, redirect
from userspace_proxy.capture import nft
from userspace_proxy.capture.nft_table import FamilyTable, remove
from userspace_proxy.capture.scope import Scope
from userspace_proxy.model import IPFamily, Protocol

pytestmark = pytest.mark.privileged

V4 = IPFamily.IPV4


@pytest.fixture
def table(node):
    with node.entered():
        table = FamilyTable(Scope(V4, "0.0.0.0"))
        table.open()
        yield table
        table.close()


def udp_entries(namespace):
    return {
        (match[1], int(match[2]))
        for line in namespace.run("conntrack -L -p udp").splitlines()
        if (match := re.search(r" dst=(\S+) sport=\d+ dport=(\d+)", line))
    }


def send(*addresses):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for address in addresses:
            sender.sendto(b"x", address)


@pytest.mark.parametrize("count", [10, 3000])
def test_a_change_sends_the_kernel_what_changed(table, count, monkeypatch):
    table.replace(many(count))
    sent = []
    transact = table._netlink.transact
    monkeypatch.setattr(table._netlink, "transact", lambda batch: sent.append(len(batch)) or transact(batch))
    table.change([], [redirect("10.97.0.1")])
    table.change([redirect("10.97.0.1")], [])
    assert len(sent) == 2
    assert sum(sent) < 500


def test_udp_clients_are_sent_anew_when_a_redirect_comes_changes_and_goes(node, table):
    dns, by_node_port = redirect("127.96.0.10", 53, 40002, Protocol.UDP), node_port(30053, 40002, Protocol.UDP)
    moved = redirect("127.96.0.10", 53, 40003, Protocol.UDP)
    other = ("127.96.0.99", 53)
    both = [("127.96.0.10", 53), ("127.0.0.1", 30053)]

    def flushed_by(gone, new):
        send(*both, other)
        before = udp_entries(node)
        assert before >= {*both, other}
        table.change(gone, new)
        return before - udp_entries(node)

    assert flushed_by([], [dns, by_node_port]) == set(both)
    assert flushed_by([], []) == set()
    assert flushed_by([dns], [moved]) == {both[0]}
    assert flushed_by([], [redirect()]) == set()
    assert flushed_by([moved], []) == {both[0]}
    assert flushed_by([by_node_port], []) == {both[1]}


def test_at_the_start_and_at_cleanup_portals_of_the_last_run_are_flushed(node, table):
    table.replace([redirect("127.96.0.10", 53, 40002, Protocol.UDP)])
    send(("127.96.0.10", 53))
    table._netlink.close()
    table._upkeep._routes.close()
    table.__init__(Scope(V4, "0.0.0.0"))
    table.open()
    assert udp_entries(node) == set()
    table.replace([redirect("127.96.0.10", 53, 40002, Protocol.UDP)])
    send(("127.96.0.10", 53))
    assert remove(V4) == []
    # Without the last rule that needs it, conntrack takes its entries along; nothing is left either way.
    assert ("127.96.0.10", 53) not in udp_entries(node)


def test_routes_follow_the_redirects_and_outlast_withdraw(node, table):
    def routes():
        return [line.split()[0] for line in node.run("ip route show proto 117").splitlines()]

    table.replace([redirect(), redirect(port=81), redirect("10.96.0.11"), node_port(), redirect("127.96.0.10")])
    assert routes() == ["10.96.0.10", "10.96.0.11"]
    table.change([redirect(), redirect("10.96.0.11")], [])
    assert routes() == ["10.96.0.10"]
    node.run("ip route flush proto 117")
    table.change([], [])
    assert routes() == ["10.96.0.10"]
    table.withdraw()
    assert routes() == ["10.96.0.10"]
    assert "10.96" not in node.run("nft list ruleset")
    assert "hook output" in node.run("nft list ruleset")


def test_a_kernel_that_refuses_leaves_what_was(table, monkeypatch):
    table.replace([redirect()])
    monkeypatch.setattr(nft, "additions", lambda family, elements: iter([b"\x14\0\0\0\xff\x0a\1\0" + bytes(12)]))
    with pytest.raises(OSError, match="nftables over netlink") as caught:
        table.change([], [redirect("10.96.0.11")])
    assert caught.value.errno == errno.EINVAL
    monkeypatch.undo()
    assert table.repair() == 0
    assert table.change([], [redirect("10.96.0.11")]).added == 1


SCRIPT = """
from tests.capture.conversation import many
from userspace_proxy.capture.nft_table import FamilyTable
from userspace_proxy.capture.scope import Scope
from userspace_proxy.model import IPFamily
table = FamilyTable(Scope(IPFamily.IPV4, "0.0.0.0"))
table.open()
table.replace(many({count}))
print("written", table._damage())
table.close()
"""


@pytest.mark.parametrize("count", [5000])
def test_thousands_in_one_transaction_without_root(count):
    """In a user namespace the send buffer cannot be forced beyond the host's limit, which is larger than that."""
    if int(Path("/proc/sys/net/core/wmem_max").read_text()) < 2 << 20:
        pytest.skip("net.core.wmem_max is too small here")
    command = ["unshare", "-Urn", "sh", "-c", 'ip link set lo up; exec "$0" -c "$1"', sys.executable]
    done = subprocess.run(
        [*command, SCRIPT.format(count=count)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "written 0\n", done.stderr
