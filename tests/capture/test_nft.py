"""What is written of a table is what the kernel and `nft` read."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.capture.conversation import node_port, redirect
from userspace_proxy.capture import nft
from userspace_proxy.capture.netlink import Netlink
from userspace_proxy.capture.scope import Scope
from userspace_proxy.model import IPFamily, Portal, PortalKind, Protocol, Redirect, ServicePortName

V4, V6 = IPFamily.IPV4, IPFamily.IPV6

addresses = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)).map(str)
ports = st.integers(1, 65535)


@given(st.one_of(addresses, st.just("")), ports, st.sampled_from(Protocol), ports, st.text(max_size=300))
def test_a_key_tells_the_place_again(ip, port, protocol, proxy_port, name):
    family = V6 if ":" in ip else V4
    kind = PortalKind.CLUSTER_IP if ip else PortalKind.NODE_PORT
    owner = ServicePortName("default", name)
    [(key, value)] = nft.elements([Redirect(Portal(family, protocol, ip, port, kind), proxy_port, owner)]).items()
    assert nft.place(key) == (protocol, ip, port)
    assert value.proxy_port == proxy_port
    assert len(value.comment.encode()) <= 100


def test_a_key_of_somebody_elses_is_no_place():
    assert nft.place(nft.Key(nft.PORTALS, b"abc")) is None
    assert nft.place(nft.Key(nft.NODE_PORTS, bytes(8))) is None


@pytest.mark.parametrize(
    ("family", "cidrs", "listed"),
    [
        (V4, (), None),
        (V4, ("0.0.0.0/0", "10.0.0.0/8"), None),
        (V4, ("10.0.0.0/8", "10.1.0.0/16", "255.0.0.0/8", "fd00::/8"), ["10.0.0.0/8", "255.0.0.0/8"]),
        (V4, ("10.0.0.0/9", "10.128.0.0/9", "192.0.2.1/32"), ["10.0.0.0/9", "10.128.0.0/9", "192.0.2.1"]),
        (V6, ("fd00::/8", "ff00::/8", "::1/128"), ["::1", "fd00::/8", "ff00::/8"]),
    ],
)
@pytest.mark.parametrize("bind", ["", "10.1.0.1", "fd01::1"])
@pytest.mark.privileged
def test_nft_takes_its_own_listing_back(node, family, cidrs, listed, bind):
    if bind and (":" in bind) != (family is V6):
        return
    scope = Scope(family, bind or family.wildcard, cidrs)
    ip = "10.96.0.10" if family is V4 else "fd00:96::10"
    redirects = [redirect(ip, protocol=protocol) for protocol in Protocol] + [node_port(family=family)]
    with node.entered():
        netlink = Netlink("nftables", 12)
        netlink.transact(nft.batch(nft.whole(scope, nft.elements(redirects))))
        netlink.close()
    text = node.run("nft list ruleset")
    assert node.run("nft -f -", text=f"flush ruleset\n{text}") == ""
    assert node.run("nft list ruleset") == text
    for protocol in ("tcp", "udp", "sctp"):
        assert f'{ip} . {protocol} . 80 comment "default/web:main" : 40001' in text
    assert ("dnat to " in text) is bool(bind)
    found = re.search(r"flags interval\s+elements = \{([^}]*)\}", text)
    assert ([each.strip() for each in found[1].split(",")] if found else None) == listed


@pytest.mark.privileged
def test_where_no_address_of_the_family_has_node_ports_none_is_asked_for(node):
    with node.entered():
        netlink = Netlink("nftables", 12)
        netlink.transact(nft.batch(nft.whole(Scope(V4, "0.0.0.0", ("fd00::/8",)), {})))
        netlink.close()
    assert "@node-ports" not in node.run("nft list ruleset")
