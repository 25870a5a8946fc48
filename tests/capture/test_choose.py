from __future__ import annotations

import asyncio
import contextlib
import logging
import sys

import pytest

from tests.capture.conversation import CLUSTER_IP, redirect, saved
from userspace_proxy.capture import choose as choosing
from userspace_proxy.capture.choose import NAMES, choose, cleanup
from userspace_proxy.exceptions import CaptureUnavailable
from userspace_proxy.model import IPFamily, Protocol


def test_the_names_are_those_of_the_flag():
    assert NAMES == ("auto", "iptables", "nftables", "local", "none")


def test_none_works_everywhere(run):
    assert run(choose("none", bind_address="0.0.0.0")).name == "none"


@pytest.mark.privileged
@pytest.mark.parametrize("name", ["auto", "iptables"])
def test_where_iptables_works_it_is_taken(node, loop_factory, name):
    async def main():
        capture = await choose(name, bind_address="::", nodeport_cidrs=["127.0.0.0/8"])
        assert capture.name == "iptables"
        assert capture.listens == {Protocol.SCTP}
        changes = await capture.replace([redirect(CLUSTER_IP[family]) for family in IPFamily])
        assert changes.added >= 2
        assert not changes.refused
        await capture.close()

    with node.entered(), asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(main())


@pytest.mark.privileged
def test_beside_it_nobody_is_warned_of_what_only_sctp_would_need(node, loop_factory, caplog):
    node.run("sysctl -qw net.ipv6.conf.all.disable_ipv6=1")
    calls = redirect(protocol=Protocol.SCTP)
    calls6 = redirect(CLUSTER_IP[IPFamily.IPV6], protocol=Protocol.SCTP)

    async def main():
        capture = await choose("nftables", bind_address="0.0.0.0")
        assert not caplog.messages
        [refused] = (await capture.replace([calls, calls6])).refused
        assert refused.startswith(f"default/web:main: {calls6.portal}: route to ")
        assert "local 10.96.0.10 dev lo" in node.run("ip route show table local")
        await capture.close()

    with node.entered(), asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(main())
    assert "10.96" not in node.run("ip route show table all")


@pytest.mark.privileged
@pytest.mark.parametrize("moment", [0.05, 0.2, 0.35, 0.5])
def test_a_start_that_is_cancelled_leaves_nothing_behind(node, loop_factory, moment):
    before = saved(node)

    async def main():
        capture = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(moment):
                capture = await choose("iptables", bind_address="0.0.0.0")
        if capture:
            await capture.close()

    with node.entered(), asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(main())
    assert saved(node) == before


class Unavailable(choosing.NoCapture):
    async def start(self):
        raise CaptureUnavailable("no tables in this kernel")


def test_auto_goes_on_to_the_next_and_says_why(run, caplog, monkeypatch):
    unavailable = choosing.Way(lambda bind, cidrs, inside: Unavailable())
    monkeypatch.setattr(
        choosing, "_WAYS", choosing._WAYS | dict.fromkeys(("iptables", "nftables", "local"), unavailable)
    )
    caplog.set_level(logging.WARNING)
    assert run(choose("auto", bind_address="0.0.0.0")).name == "none"
    assert "iptables" in caplog.messages[0]
    assert "no tables in this kernel" in caplog.messages[0]
    assert "nftables" in caplog.messages[1]
    assert "local" in caplog.messages[2]
    assert "proxy ports" in caplog.messages[3]
    with pytest.raises(CaptureUnavailable, match="no tables"):
        run(choose("iptables", bind_address="0.0.0.0"))


@pytest.mark.privileged
def test_cleanup_of_a_clean_machine(node, loop_factory):
    with node.entered(), asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(cleanup())
        assert node.run("cat /proc/net/ip_tables_names /proc/net/ip6_tables_names") == ""
        runner.run(cleanup())
    assert "KUBE" not in saved(node)


@pytest.mark.privileged
def test_without_root_auto_serves_the_addresses_that_the_host_has(node):
    script = (
        "import asyncio\n"
        "from userspace_proxy.capture.choose import choose\n"
        "print(asyncio.run(choose('auto', bind_address='0.0.0.0')).name)"
    )
    said = node.run(f'setpriv --bounding-set=-net_admin,-net_raw {sys.executable} -c "{script}"')
    assert said.splitlines()[-1] == "local"


@pytest.mark.privileged
@pytest.mark.parametrize(("killed", "successor"), [("iptables", "nftables"), ("nftables", "iptables")])
def test_what_another_way_left_when_it_was_killed_is_removed(node, killed, successor):
    node.run(
        f"{sys.executable} -c '"
        "import asyncio, os, signal\n"
        "from tests.capture.conversation import redirect\n"
        "from userspace_proxy.capture.choose import choose\n"
        "async def main():\n"
        f'    capture = await choose("{killed}", bind_address="0.0.0.0")\n'
        "    await capture.replace([redirect()])\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())'",
        check=False,
    )
    assert "10.96.0.10" in saved(node) + node.run("nft list ruleset")

    async def main():
        capture = await choose(successor, bind_address="0.0.0.0")
        assert "10.96.0.10" not in saved(node) + node.run("nft list ruleset")
        await capture.close()

    with node.entered(), asyncio.Runner() as runner:
        runner.run(main())
    assert "KUBE" not in saved(node)
    assert node.run("nft list tables") == "" or successor == "iptables"
