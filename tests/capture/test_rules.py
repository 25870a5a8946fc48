from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from userspace_proxy.capture import rules
from userspace_proxy.capture.rules import Jump
from userspace_proxy.capture.scope import Scope
from userspace_proxy.model import IPFamily, Portal, PortalKind, Protocol, Redirect, ServicePortName

V4, V6 = IPFamily.IPV4, IPFamily.IPV6
WEB = ServicePortName("default", "web", "http")
SCOPE4, SCOPE6 = Scope(V4, "0.0.0.0"), Scope(V6, "::")


def redirect(
    ip="10.96.0.1", port=80, to=40001, kind=PortalKind.CLUSTER_IP, protocol=Protocol.TCP, owner=WEB, family=None
):
    if kind is PortalKind.NODE_PORT:
        ip = ""
    family = family or (V6 if ":" in ip else V4)
    return Redirect(Portal(family, protocol, ip, port, kind), to, owner)


def nat(redirects, scope=SCOPE4):
    return rules.render(redirects, scope)["nat"].chains


# Rendering

START = '-p tcp -m comment --comment "default/web:http" -m tcp --dport'


@pytest.mark.parametrize(
    ("scope", "given_", "text"),
    [
        (SCOPE4, redirect(), f"-d 10.96.0.1/32 {START} 80 -j REDIRECT --to-ports 40001"),
        (SCOPE6, redirect("fd00::a"), f"-d fd00::a/128 {START} 80 -j REDIRECT --to-ports 40001"),
        (
            Scope(V4, "192.168.1.2"),
            redirect(),
            f"-d 10.96.0.1/32 {START} 80 -j DNAT --to-destination 192.168.1.2:40001",
        ),
        (
            Scope(V6, "fd01::2"),
            redirect("fd00::a"),
            f"-d fd00::a/128 {START} 80 -j DNAT --to-destination [fd01::2]:40001",
        ),
        (SCOPE4, redirect(kind=PortalKind.EXTERNAL_IP), f"-d 10.96.0.1/32 {START} 80 -j REDIRECT --to-ports 40001"),
        (
            SCOPE4,
            redirect(protocol=Protocol.UDP, port=53, owner=ServicePortName("kube-system", "dns")),
            (
                '-d 10.96.0.1/32 -p udp -m comment --comment "kube-system/dns" -m udp --dport 53 '
                "-j REDIRECT --to-ports 40001"
            ),
        ),
    ],
)
def test_a_portal_with_an_address_has_one_rule_in_each_hook(scope, given_, text):
    table = rules.render([given_], scope)["nat"]
    assert table.chains == {
        rules.PORTALS_CONTAINER: (text,),
        rules.PORTALS_HOST: (text,),
        rules.NODEPORT_CONTAINER: (),
        rules.NODEPORT_HOST: (),
    }
    assert rules.render([given_], scope)["filter"].chains[rules.NODEPORT_NON_LOCAL] == ()


def test_a_node_port_is_let_in_by_its_proxy_port():
    rendered = rules.render([redirect(kind=PortalKind.NODE_PORT, port=30080)], SCOPE4)
    text = f"{START} 30080 -j REDIRECT --to-ports 40001"
    assert rendered["nat"].chains[rules.NODEPORT_CONTAINER] == (text,)
    assert rendered["nat"].chains[rules.NODEPORT_HOST] == (text,)
    assert rendered["nat"].chains[rules.PORTALS_HOST] == ()
    assert rendered["filter"].chains[rules.NODEPORT_NON_LOCAL] == (f"{START} 40001 -m state --state NEW -j ACCEPT",)


@pytest.mark.parametrize(
    ("family", "cidrs", "destinations"),
    [
        (V4, (), ("",)),
        (V4, ("10.0.0.0/8", "127.0.0.0/8"), ("-d 10.0.0.0/8 ", "-d 127.0.0.0/8 ")),
        (V4, ("10.0.0.0/8", "10.0.0.0/8"), ("-d 10.0.0.0/8 ",)),
        (V4, ("0.0.0.0/0",), ("",)),
        (V6, ("10.0.0.0/8", "fd00::/64"), ("-d fd00::/64 ",)),
        (V6, ("10.0.0.0/8",), ()),
        (V6, ("::/0",), ("",)),
    ],
)
def test_node_ports_are_captured_on_the_addresses_asked_for(family, cidrs, destinations):
    scope = Scope(family, family.wildcard, cidrs)
    rendered = rules.render([redirect(kind=PortalKind.NODE_PORT, port=30080, family=family)], scope)
    chains = rendered["nat"].chains
    expected = tuple(f"{d}{START} 30080 -j REDIRECT --to-ports 40001" for d in destinations)
    assert chains[rules.NODEPORT_CONTAINER] == chains[rules.NODEPORT_HOST] == expected
    assert bool(rendered["filter"].chains[rules.NODEPORT_NON_LOCAL]) is bool(destinations)


INSIDE4 = Scope(V4, "0.0.0.0", (), ("10.1.0.0/16", "fd00:1::/64", "10.2.0.0/16"))


def to(port):
    return f"-j REDIRECT --to-ports {port}"


@pytest.mark.parametrize(
    ("scope", "sources"),
    [(INSIDE4, ("-s 10.1.0.0/16 ", "-s 10.2.0.0/16 ")), (Scope(V4, "0.0.0.0", (), ("fd00::/64",)), ()), (SCOPE4, ())],
)
def test_clients_inside_have_a_proxy_port_of_their_own(scope, sources):
    balancer = redirect("192.0.2.1", kind=PortalKind.LOAD_BALANCER_IP)._replace(inside_port=40009)
    chains = nat([balancer], scope)
    start = f"-d 192.0.2.1/32 {START} 80 "
    assert chains[rules.PORTALS_CONTAINER] == (
        *(f"{source}{start}{to(40009)}" for source in sources),
        f"{start}{to(40001)}",
    )
    assert chains[rules.PORTALS_HOST] == (f"{start}{to(40009)}",)
    assert rules.places(chains) == {(Protocol.TCP, "192.0.2.1", 80)}


def test_clients_inside_of_a_node_port():
    node_port = redirect(kind=PortalKind.NODE_PORT, port=30080)._replace(inside_port=40009)
    rendered = rules.render([node_port], Scope(V4, "0.0.0.0", ("10.0.0.0/8",), ("10.1.0.0/16",)))
    chains = rendered["nat"].chains
    assert chains[rules.NODEPORT_CONTAINER] == (
        f"-s 10.1.0.0/16 -d 10.0.0.0/8 {START} 30080 {to(40009)}",
        f"-d 10.0.0.0/8 {START} 30080 {to(40001)}",
    )
    assert chains[rules.NODEPORT_HOST] == (f"-d 10.0.0.0/8 {START} 30080 {to(40009)}",)
    assert rendered["filter"].chains[rules.NODEPORT_NON_LOCAL] == tuple(
        f"{START} {port} -m state --state NEW -j ACCEPT" for port in (40001, 40009)
    )


def test_jumps_are_those_of_the_userspace_mode():
    rendered = rules.render([], SCOPE4)
    portals = '-m comment --comment "handle ClusterIPs; NOTE: this must be before the NodePort rules" -j '
    node_ports = (
        "-m addrtype --dst-type LOCAL "
        '-m comment --comment "handle service NodePorts; NOTE: this must be the last rule in the chain" -j '
    )
    assert rendered["nat"].jumps == (
        Jump("PREROUTING", portals + "KUBE-PORTALS-CONTAINER", on_top=True),
        Jump("OUTPUT", portals + "KUBE-PORTALS-HOST", on_top=True),
        Jump("PREROUTING", node_ports + "KUBE-NODEPORT-CONTAINER", on_top=False),
        Jump("OUTPUT", node_ports + "KUBE-NODEPORT-HOST", on_top=False),
    )
    assert rendered["filter"].jumps == (
        Jump(
            "INPUT",
            '-m comment --comment "Ensure that non-local NodePort traffic can flow" -j KUBE-NODEPORT-NON-LOCAL',
            on_top=True,
        ),
    )


def test_order_is_by_service_then_kind_whatever_the_order_given():
    other = ServicePortName("default", "api")
    redirects = [
        redirect("10.0.0.3", kind=PortalKind.LOAD_BALANCER_IP),
        redirect("10.0.0.9", kind=PortalKind.EXTERNAL_IP),
        redirect("10.0.0.2", kind=PortalKind.EXTERNAL_IP),
        redirect("10.0.0.8"),
        redirect("10.0.0.5", owner=other),
    ]
    destinations = [text.split()[1] for text in nat(redirects)[rules.PORTALS_HOST]]
    assert destinations == ["10.0.0.5/32", "10.0.0.8/32", "10.0.0.2/32", "10.0.0.9/32", "10.0.0.3/32"]
    assert nat(redirects[::-1]) == nat(redirects)


def test_an_address_of_two_kinds_has_one_rule():
    redirects = [redirect(kind=PortalKind.EXTERNAL_IP), redirect(kind=PortalKind.LOAD_BALANCER_IP)]
    assert len(nat(redirects)[rules.PORTALS_HOST]) == 1


@given(st.text(), st.text(), st.text())
def test_a_comment_needs_no_quoting_and_fits(namespace, name, port):
    comment = rules.comment_of(ServicePortName(namespace, name, port))
    assert len(comment.encode()) <= 255
    assert not set(comment) & set("\"'\\ \t\n\0;")


@pytest.mark.parametrize(
    ("given_", "why"),
    [
        (redirect(), ""),
        (redirect(kind=PortalKind.NODE_PORT, port=30080), ""),
        (redirect("fd00::1"), "IPv6"),
        (redirect(port=0), "port 0"),
        (redirect(port=65536), "port 65536"),
        (redirect(to=0), "proxy port 0"),
        (redirect("10.96.0.1/8"), "not an IP address"),
        (redirect("10.96.0.300"), "not an IP address"),
        (redirect("10.96.0.1 -j ACCEPT"), "not an IP address"),
        (redirect("fd00:0::1", family=V4), "canonical"),
        (redirect(""), "a node port has none"),
        (Redirect(Portal(V4, Protocol.TCP, "10.0.0.1", 1, PortalKind.NODE_PORT), 2, WEB), "a node port has none"),
    ],
)
def test_what_no_rule_can_be_made_for_is_told(given_, why):
    objection = rules.objection(given_, V4)
    assert why in objection
    assert bool(why) is bool(objection)


# Reading back

SAVED = """\
# Generated by iptables-save v1.8.9 on a day
*nat
:PREROUTING ACCEPT [12:720]
:KUBE-PORTALS-HOST - [0:0]
-A PREROUTING -j DOCKER
-A KUBE-PORTALS-HOST -d 10.96.0.1/32 -p tcp -m comment --comment "a/b: c" -m tcp --dport 80 -j REDIRECT --to-ports 1
COMMIT
# Completed on a day
"""


def test_a_saved_table_is_read_as_its_chains():
    assert rules.parse(SAVED) == {
        "PREROUTING": ["-j DOCKER"],
        "KUBE-PORTALS-HOST": [
            '-d 10.96.0.1/32 -p tcp -m comment --comment "a/b: c" -m tcp --dport 80 -j REDIRECT --to-ports 1'
        ],
    }
    assert rules.parse("") == {}


def test_an_ipv6_address_is_the_same_in_either_notation():
    """The C library writes the last 32 bits of ::/96 as an IPv4 address."""
    (text,) = nat([redirect(str(ipaddress.ip_address("::1.2.3.4")))], SCOPE6)[rules.PORTALS_HOST]
    saved = f":{rules.PORTALS_HOST} - [0:0]\n-A {rules.PORTALS_HOST} {text.replace('::102:304', '::1.2.3.4')}"
    assert rules.parse(saved) == {rules.PORTALS_HOST: [text]}


def test_what_rules_redirected_can_be_read_from_them():
    redirects = [
        redirect(),
        redirect("10.96.0.2", 53, protocol=Protocol.UDP),
        redirect(kind=PortalKind.NODE_PORT, port=30080),
    ]
    assert rules.places(nat(redirects)) == {
        (Protocol.TCP, "10.96.0.1", 80),
        (Protocol.UDP, "10.96.0.2", 53),
        (Protocol.TCP, "", 30080),
    }
    assert rules.places({rules.PORTALS_HOST: ["-j ACCEPT"], "PREROUTING": list(nat(redirects))}) == set()


# Leaving out what is refused

MANY = [redirect(f"10.96.1.{number}") for number in range(200)]


@given(st.sets(st.sampled_from(MANY), max_size=4), st.integers(0, 150))
def test_only_what_is_refused_is_left_out(bad, known):
    tried = []

    def accepts(redirects):
        tried.append(redirects)
        return not redirects & bad

    good = frozenset(MANY[:known]) - bad
    doubtful = [each for each in MANY if each not in good]
    taken, refused = rules.sift(good, doubtful, accepts, tries=100)
    assert set(refused) == bad
    assert taken == frozenset(MANY) - bad
    assert len(tried) <= 100


def test_with_nothing_in_doubt_nothing_is_tried():
    assert rules.sift(frozenset(MANY), [], lambda redirects: pytest.fail("tried"), tries=10) == (frozenset(MANY), ())


def test_sifting_ends_when_its_tries_have_run_out():
    tried = []
    taken, refused = rules.sift(frozenset(), MANY, lambda redirects: tried.append(redirects) is not None, tries=10)
    assert len(tried) == 10
    assert not taken
    assert len(refused) == len(MANY)
