from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
import sys

import pytest

from userspace_proxy.capture import conntrack
from userspace_proxy.capture.conntrack import Place
from userspace_proxy.model import IPFamily, Protocol

pytestmark = pytest.mark.privileged

V4, V6 = IPFamily.IPV4, IPFamily.IPV6
TCP, UDP = Protocol.TCP, Protocol.UDP
HERE = {V4: "127.0.0.5", V6: "::1"}


@pytest.fixture
def tracked(node):
    """The node, with conntrack on: it is, as long as some rule needs it."""
    for program in ("iptables-legacy", "ip6tables-legacy"):
        node.run(f"{program} -A INPUT -m conntrack --ctstate INVALID -j DROP")
    return node


def say(namespace, ip, port, sources=1, protocol=UDP):
    """Datagrams, or connections, to a place, each from another port."""
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    with namespace.entered(), contextlib.ExitStack() as stack:
        for _ in range(sources):
            if protocol is TCP:
                stack.enter_context(socket.create_server((ip, port), family=family))
                stack.enter_context(socket.create_connection((ip, port)))
            else:
                sender = stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
                sender.sendto(b"x", (ip, port))


def entries(namespace, family=V4):
    """Protocol, original destination and its port of each entry."""
    return sorted(
        (match[1], str(ipaddress.ip_address(match[2])), match[3])
        for line in namespace.run(f"conntrack -L -f {family.value.lower()}").splitlines()
        if (match := re.match(r"(\w+) .*? dst=(\S+) sport=\d+ dport=(\d+)", line))
    )


def flush(namespace, family, *places, proxy_port=0):
    with namespace.entered():
        return conntrack.flush(family, dict.fromkeys(places, proxy_port))


@pytest.mark.parametrize("family", IPFamily)
def test_entries_of_a_place_go_and_others_stay(tracked, family):
    ip = HERE[family]
    say(tracked, ip, 53, sources=3)
    say(tracked, ip, 54)
    say(tracked, ip, 53, protocol=TCP)
    assert flush(tracked, family, Place(UDP, ip, 53)) == 3
    assert entries(tracked, family) == [("tcp", ip, "53"), ("udp", ip, "54")]


@pytest.mark.parametrize("family", IPFamily)
def test_many_places_and_both_protocols_at_once(tracked, family):
    ip = HERE[family]
    for port in range(1000, 1100):
        say(tracked, ip, port)
    say(tracked, ip, 53, protocol=TCP)
    say(tracked, ip, 999)
    places = [Place(UDP, ip, port) for port in range(1000, 1100)]
    assert flush(tracked, family, *places, Place(TCP, ip, 53)) == 101
    assert entries(tracked, family) == [("udp", ip, "999")]


def test_a_node_port_stands_for_every_address_of_the_machine_but_no_other(tracked, client):
    tracked.run("sysctl -qw net.ipv4.ip_forward=1")
    say(tracked, "127.0.0.5", 30053)
    say(tracked, "127.0.0.6", 30053)
    say(client, "10.1.0.1", 30053)
    say(tracked, "10.1.0.2", 30053)
    assert flush(tracked, V4, Place(UDP, "", 30053)) == 3
    assert entries(tracked) == [("udp", "10.1.0.2", "30053")]


def test_it_is_the_original_destination_that_counts(tracked):
    tracked.run("iptables-legacy -t nat -A OUTPUT -d 127.0.0.5 -p udp --dport 53 -j REDIRECT --to-ports 40001")
    say(tracked, "127.0.0.5", 53)
    assert flush(tracked, V4, Place(UDP, "127.0.0.1", 40001)) == 0
    assert flush(tracked, V4, Place(UDP, "127.0.0.5", 53)) == 1


@pytest.mark.parametrize("family", IPFamily)
def test_entries_that_lead_to_the_right_place_stay(tracked, family):
    ip, program = HERE[family], {V4: "iptables-legacy", V6: "ip6tables-legacy"}[family]
    say(tracked, ip, 53, sources=2)
    tracked.run(f"{program} -t nat -A OUTPUT -d {ip} -p udp -j REDIRECT --to-ports 40001")
    say(tracked, ip, 53, sources=3)
    say(tracked, ip, 40001)
    assert flush(tracked, family, Place(UDP, ip, 53), Place(UDP, ip, 40001), proxy_port=40001) == 3
    assert entries(tracked, family) == [("udp", ip, "53")] * 3
    assert flush(tracked, family, Place(UDP, "", 53), proxy_port=40001) == 0
    assert flush(tracked, family, Place(UDP, "", 53), proxy_port=40002) == 3


def test_entries_without_ports_are_passed_over(tracked):
    with tracked.entered(), socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as pinger:
        pinger.sendto(bytes.fromhex("0800f7ff00000000"), ("127.0.0.5", 0))
    assert "icmp" in tracked.run("conntrack -L")
    say(tracked, "127.0.0.5", 53, protocol=TCP)
    assert flush(tracked, V4, Place(UDP, "", 53), Place(TCP, "", 53), Place(TCP, "", 54)) == 1
    assert "icmp" in tracked.run("conntrack -L")


def test_more_entries_than_one_batch_of_deletions(tracked):
    say(tracked, "127.0.0.5", 53, sources=1500)
    assert flush(tracked, V4, Place(UDP, "127.0.0.5", 53)) == 1500
    assert entries(tracked) == []


def test_nothing_to_flush_asks_nobody(node):
    assert flush(node, V4) == 0
    assert flush(node, V4, Place(UDP, "127.0.0.5", 53)) == 0


def test_without_permission_it_says_so(tracked):
    program = (
        "import os; from userspace_proxy.capture import conntrack; from userspace_proxy.model import *; "
        "os.setuid(65534); conntrack.flush(IPFamily.IPV4, {conntrack.Place(Protocol.UDP, '127.0.0.5', 53): 0})"
    )
    assert "PermissionError: [Errno 1] conntrack over netlink" in tracked.run(
        f'{sys.executable} -c "{program}"', check=False
    )
