"""Expressions as the kernel takes them and `nft` lists them; in whole rules they are tested with the table."""

from __future__ import annotations

import pytest

from tests.netns import Namespace
from userspace_proxy.capture import nft, nft_expressions
from userspace_proxy.capture.netlink import Netlink
from userspace_proxy.model import IPFamily

V4, V6 = IPFamily.IPV4, IPFamily.IPV6


@pytest.mark.privileged
@pytest.mark.parametrize(
    ("family", "expressions", "listed"),
    [
        (V4, [nft_expressions.load_source(V4), nft_expressions.look_up("some")], "ip saddr @some"),
        (V6, [nft_expressions.load_destination(V6), nft_expressions.look_up("some")], "ip6 daddr @some"),
        (V4, nft_expressions.is_local(), "fib daddr type local"),
        (V6, nft_expressions.is_protocol(132), "meta l4proto sctp"),
        (V4, [nft_expressions.go_to("other")], "goto other"),
    ],
)
def test_nft_lists_what_is_meant(node: Namespace, family: IPFamily, expressions: list[bytes], listed: str) -> None:
    table, kind = ("ip", "ipv4_addr") if family is V4 else ("ip6", "ipv6_addr")
    parts = f"set some {{\ntype {kind}\n}}\nchain one {{\n}}\nchain other {{\n}}"
    node.run("nft -f -", text=f"table {table} userspace-proxy {{\n{parts}\n}}")
    with node.entered():
        netlink = Netlink("nftables", 12)
        netlink.transact(nft.batch([nft._rule(family, "one", expressions)]))
        netlink.close()
    assert node.run(f"nft list chain {table} userspace-proxy one").splitlines()[2].strip() == listed
