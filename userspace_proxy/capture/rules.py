"""The rules of the iptables capture, as data: what our chains must hold, and what reading them back tells.

A rule is the text that iptables-save writes for it after `-A CHAIN `. In that form rules are rendered
here, read back from the kernel, compared (`changes`), and written again.

Chains, comments and order are those of kube-proxy's userspace mode, so that the remains of one are
recognised and replaced. Two things differ: redirects in OUTPUT need no host address (REDIRECT goes to
loopback there), and external IPs are captured from everywhere, like cluster IPs.

How the kernel is read and written is in `xtables`; when, in `worker`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from userspace_proxy.capture.scope import Scope
from userspace_proxy.model import (
    IPFamily,
    Portal,
    PortalKind,
    Protocol,
    Redirect,
    ServicePortName,
    family_of,
    join_host_port,
)

PORTALS_CONTAINER = "KUBE-PORTALS-CONTAINER"
PORTALS_HOST = "KUBE-PORTALS-HOST"
NODEPORT_CONTAINER = "KUBE-NODEPORT-CONTAINER"
NODEPORT_HOST = "KUBE-NODEPORT-HOST"
NODEPORT_NON_LOCAL = "KUBE-NODEPORT-NON-LOCAL"
HOLD = "USERSPACE-PROXY-HOLD"
PROBE = "USERSPACE-PROXY-PROBE"

OWNED: Mapping[str, frozenset[str]] = {
    "filter": frozenset({NODEPORT_NON_LOCAL, HOLD}),
    "nat": frozenset({PORTALS_CONTAINER, PORTALS_HOST, NODEPORT_CONTAINER, NODEPORT_HOST, PROBE}),
}
"""Every chain that may be ours, by table. What another program jumps to or keeps in them is not kept."""

_PORTALS_COMMENT = "handle ClusterIPs; NOTE: this must be before the NodePort rules"
_NODEPORT_COMMENT = "handle service NodePorts; NOTE: this must be the last rule in the chain"
_NON_LOCAL_COMMENT = "Ensure that non-local NodePort traffic can flow"

_HOLD_RULE = (
    '-m conntrack --ctstate RELATED -m comment --comment "keeps conntrack on while connections drain" -j RETURN'
)
"""Nobody jumps to it: that it exists is enough. With the last rule that needs conntrack, the kernel takes
conntrack out of the namespace, and connections that are being translated freeze."""

_HOST_CHAIN = {PORTALS_CONTAINER: PORTALS_HOST, NODEPORT_CONTAINER: NODEPORT_HOST}
"""Where the redirects of a chain for clients elsewhere are for this node's own."""

_COMMENT_LIMIT = 255
_UNFIT_FOR_COMMENT = re.compile(r"[^A-Za-z0-9_./:-]")
_KIND_ORDER = {kind: order for order, kind in enumerate(PortalKind)}

Chains = Mapping[str, Sequence[str]]
"""A table as read: every chain, ours or not, and the text of its rules in order."""


class Jump(NamedTuple):
    hook: str
    text: str
    on_top: bool
    """Where it goes when it is missing; one that is present stays where it is."""


def _jump(hook: str, chain: str, comment: str, *, match: str = "", on_top: bool) -> Jump:
    return Jump(hook, f'{match}-m comment --comment "{comment}" -j {chain}', on_top)


_LOCAL = "-m addrtype --dst-type LOCAL "
_NAT_JUMPS = (
    _jump("PREROUTING", PORTALS_CONTAINER, _PORTALS_COMMENT, on_top=True),
    _jump("OUTPUT", PORTALS_HOST, _PORTALS_COMMENT, on_top=True),
    _jump("PREROUTING", NODEPORT_CONTAINER, _NODEPORT_COMMENT, match=_LOCAL, on_top=False),
    _jump("OUTPUT", NODEPORT_HOST, _NODEPORT_COMMENT, match=_LOCAL, on_top=False),
)
_FILTER_JUMPS = (_jump("INPUT", NODEPORT_NON_LOCAL, _NON_LOCAL_COMMENT, on_top=True),)


@dataclass(frozen=True, slots=True)
class TableRules:
    """What one table must hold of ours."""

    chains: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    jumps: tuple[Jump, ...] = ()


Ruleset = Mapping[str, TableRules]
"""By table; a chain of `OWNED` that is not in it must not exist."""

NOTHING: Ruleset = {"filter": TableRules(), "nat": TableRules()}
HOLD_ONLY: Ruleset = {"filter": TableRules({HOLD: (_HOLD_RULE,)}), "nat": TableRules()}


def comment_of(owner: ServicePortName) -> str:
    """A rule's comment. It is the only free text in a rule, so nothing in it may need quoting."""
    return _UNFIT_FOR_COMMENT.sub("?", str(owner))[:_COMMENT_LIMIT]


def objection(redirect: Redirect, family: IPFamily) -> str:
    """Why there can be no rule for it; empty if there can. The kernel takes port 0, for one, without a word."""
    portal = redirect.portal
    if portal.family is not family:
        return f"it is {portal.family.value}, these rules are {family.value}"
    inside_port = redirect.inside_port or redirect.proxy_port
    for what, port in (("port", portal.port), ("proxy port", redirect.proxy_port), ("proxy port", inside_port)):
        if not 1 <= port <= 65535:
            return f"{what} {port}: must be 1 to 65535"
    if bool(portal.ip) is (portal.kind is PortalKind.NODE_PORT):
        return f"address {portal.ip!r}: a node port has none, every other portal has one"
    if portal.ip:
        try:
            address = ipaddress.ip_address(portal.ip)
        except ValueError:
            return f"address {portal.ip!r}: not an IP address"
        if str(address) != portal.ip or family_of(portal.ip) is not family:
            return f"address {portal.ip!r}: must be {family.value} in canonical form"
    return ""


def order(redirect: Redirect) -> tuple[object, ...]:
    """Sort key: services by name; within one, cluster, external, load-balancer IPs, node port."""
    portal = redirect.portal
    place = portal.ip, portal.protocol, portal.port
    return redirect.owner, _KIND_ORDER[portal.kind], *place, redirect.proxy_port, redirect.inside_port


def _target(scope: Scope, proxy_port: int) -> str:
    if scope.bind_address == scope.family.wildcard:
        return f"REDIRECT --to-ports {proxy_port}"
    return f"DNAT --to-destination {join_host_port(scope.bind_address, proxy_port)}"


def render(redirects: Collection[Redirect], scope: Scope) -> Ruleset:
    """The whole of our rules for these redirects, each of which is without `objection`."""
    chains: dict[str, list[str]] = {chain: [] for chain in (*_HOST_CHAIN, *_HOST_CHAIN.values())}
    non_local: list[str] = []
    node_port_destinations, inside_sources = scope.nodeport_destinations, scope.inside_sources
    host_mask = 128 if scope.family is IPFamily.IPV6 else 32
    for redirect in sorted(redirects, key=order):
        portal = redirect.portal
        protocol = portal.protocol.lower()
        start = f'-p {protocol} -m comment --comment "{comment_of(redirect.owner)}" -m {protocol} --dport'
        outside = f"{start} {portal.port} -j {_target(scope, redirect.proxy_port)}"
        inside = f"{start} {portal.port} -j {_target(scope, redirect.inside_port)}" if redirect.inside_port else outside
        container = NODEPORT_CONTAINER if portal.kind is PortalKind.NODE_PORT else PORTALS_CONTAINER
        destinations = (
            node_port_destinations if portal.kind is PortalKind.NODE_PORT else (f"-d {portal.ip}/{host_mask} ",)
        )
        for destination in destinations:
            if redirect.inside_port:
                chains[container] += (f"{source}{destination}{inside}" for source in inside_sources)
            chains[container].append(f"{destination}{outside}")
            chains[_HOST_CHAIN[container]].append(f"{destination}{inside}")
        if portal.kind is PortalKind.NODE_PORT and destinations:
            # INPUT sees the packet after its translation, hence the proxy ports.
            ports = filter(None, (redirect.proxy_port, redirect.inside_port))
            non_local += (f"{start} {port} -m state --state NEW -j ACCEPT" for port in ports)
    return {
        "filter": TableRules({NODEPORT_NON_LOCAL: _once(non_local), HOLD: (_HOLD_RULE,)}, _FILTER_JUMPS),
        "nat": TableRules({chain: _once(texts) for chain, texts in chains.items()}, _NAT_JUMPS),
    }


def probe(scope: Scope) -> TableRules:
    """A scratch chain with every kind of rule that redirects need, to find out whether they work here."""
    ip = "192.0.2.1" if scope.family is IPFamily.IPV4 else "2001:db8::1"
    portals = [
        Portal(scope.family, protocol, ip, 9, PortalKind.CLUSTER_IP) for protocol in (Protocol.TCP, Protocol.UDP)
    ]
    owner = ServicePortName("userspace-proxy", "probe")
    rules = render([Redirect(portal, 9, owner) for portal in portals], scope)["nat"].chains[PORTALS_HOST]
    return TableRules({PROBE: rules})


def _once(texts: Iterable[str]) -> tuple[str, ...]:
    """Without repetitions: an address can be both an external and a load-balancer IP of its service."""
    return tuple(dict.fromkeys(texts))


# Reading back

_MIXED_NOTATION = re.compile(r"(?<=-d )[0-9a-f:]*:\d+\.\d+\.\d+\.\d+(?=/)")
_PORTAL_RULE = re.compile(
    r"(?:-s \S+ )?(?:-d ([0-9a-f.:]+)/(?:32|128) )?-p (tcp|udp|sctp) .*--dport (\d+) -j (?:REDIRECT|DNAT) "
)


def parse(saved: str) -> dict[str, list[str]]:
    """The chains in iptables-save's output for one table."""
    chains: dict[str, list[str]] = {}
    for line in saved.splitlines():
        if line.startswith("-A "):
            _, chain, text = line.split(" ", 2)
            # The C library writes ::1.2.3.4 where Python writes ::102:304.
            chains[chain].append(_MIXED_NOTATION.sub(lambda found: str(ipaddress.ip_address(found[0])), text))
        elif line.startswith(":"):
            chains[line[1:].split(" ", 1)[0]] = []
    return chains


def as_read(left: TableRules) -> Chains:
    """What reading a table would find, as far as it concerns us, had nobody touched what was `left` there."""
    chains: dict[str, Sequence[str]] = dict(left.chains)
    for jump in left.jumps:
        chains[jump.hook] = (*chains.get(jump.hook, ()), jump.text)
    return chains


def places(chains: Chains) -> set[tuple[Protocol, str, int]]:
    """Protocol, address (empty: node port) and port of the portals that an earlier run left rules for."""
    found = (
        _PORTAL_RULE.match(text)
        for chain in (PORTALS_HOST, PORTALS_CONTAINER, NODEPORT_HOST, NODEPORT_CONTAINER)
        for text in chains.get(chain, ())
    )
    return {(Protocol(match[2].upper()), match[1] or "", int(match[3])) for match in found if match}


# Leaving out what is refused


def sift(
    good: frozenset[Redirect], doubtful: Sequence[Redirect], accepts: Callable[[frozenset[Redirect]], bool], tries: int
) -> tuple[frozenset[Redirect], tuple[Redirect, ...]]:
    """The largest set that is accepted, made of `good` and as much of `doubtful` as goes in, and the rest.

    Halves what is refused, so that one bad redirect among n takes about 2 log2 n tries; when these have
    run out, what has not been accepted yet counts as refused.
    """
    refused: list[Redirect] = []
    pending = [tuple(doubtful)]
    while pending:
        batch = pending.pop()
        if not batch:
            continue
        tries -= 1
        if tries >= 0 and accepts(good | frozenset(batch)):
            good |= frozenset(batch)
        elif tries < 0 or len(batch) == 1:
            refused += batch
        else:
            middle = len(batch) // 2
            pending += [batch[middle:], batch[:middle]]
    return good, tuple(refused)
