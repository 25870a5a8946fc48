"""The nouns every other module speaks: service ports, endpoints, portals, snapshots.

Here are values only: frozen, compared by what they hold, safe to share between the control and the
data path. How they are read from Kubernetes objects is in `sources`; what is done with them is in
`loadbalancer` (choosing), `plan` (ordering), `sockets` (relaying) and `capture` (redirecting).

Addresses are text in canonical form (`str(ipaddress.ip_address(x))`), so that equal addresses are
equal strings and go into socket calls as they are. All times are seconds.
"""

from __future__ import annotations

import enum
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import compress
from typing import NamedTuple, TypeVar

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


class IPFamily(enum.Enum):
    IPV4 = "IPv4"
    IPV6 = "IPv6"

    # Enum's own is a Python function, and members are in nearly every key that is looked up.
    __hash__ = object.__hash__

    @property
    def loopback(self) -> str:
        return "127.0.0.1" if self is IPFamily.IPV4 else "::1"

    @property
    def wildcard(self) -> str:
        return "0.0.0.0" if self is IPFamily.IPV4 else "::"


def family_of(ip: str) -> IPFamily:
    """The family of an address in text; only IPv6 text has a colon."""
    return IPFamily.IPV6 if ":" in ip else IPFamily.IPV4


def join_host_port(ip: str, port: int) -> str:
    """`10.0.0.1:80`, `[fd00::1]:80`."""
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


class Protocol(enum.StrEnum):
    TCP = "TCP"
    UDP = "UDP"
    SCTP = "SCTP"

    __hash__ = str.__hash__


class SessionAffinity(enum.StrEnum):
    NONE = "None"
    CLIENT_IP = "ClientIP"


DEFAULT_AFFINITY_TIMEOUT = 10800.0
"""Seconds a client stays with its endpoint where `timeoutSeconds` is not given (Kubernetes: 3 hours)."""


class TrafficPolicy(enum.StrEnum):
    """Which endpoints clients are sent to: any, or only those on this node."""

    CLUSTER = "Cluster"
    LOCAL = "Local"

    __hash__ = str.__hash__


class Preference(enum.StrEnum):
    """What `trafficDistribution` asks for, where endpoints carry no hints: those in this zone, or on this node."""

    NONE = ""
    ZONE = "zone"
    NODE = "node"


class ProxyProtocol(NamedTuple):
    """How clients of a TCP service port are introduced."""

    version: int = 0
    """Of the header that endpoints get; 0: none."""
    trusted: tuple[str, ...] = ()
    """Networks from which connections start with a header."""


_NO_PROXY_PROTOCOL = ProxyProtocol()


class ServicePortName(NamedTuple):
    """The key of everything: one named port of one Service. The port's name is empty where it has none."""

    namespace: str
    name: str
    port: str = ""

    def __str__(self) -> str:
        text = f"{self.namespace}/{self.name}"
        return f"{text}:{self.port}" if self.port else text


class SocketKey(NamedTuple):
    """One proxy socket: a service port in one address family, in one scope.

    The scope is what tells sockets of one service port apart: which endpoints its clients may be sent to, and which
    clients may come at all. Most service ports have one socket, in the widest scope.
    """

    name: ServicePortName
    family: IPFamily
    policy: TrafficPolicy = TrafficPolicy.CLUSTER
    screened: bool = False
    """Whether it hears only clients from the Service's source ranges."""

    @property
    def base(self) -> SocketKey:
        """The same for all scopes."""
        return SocketKey(self.name, self.family)

    @property
    def scope(self) -> str:
        """As people are shown it; empty for the widest."""
        local = "local endpoints" if self.policy is TrafficPolicy.LOCAL else ""
        return ", ".join(filter(None, (local, "source ranges" if self.screened else "")))

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(filter(None, (self.family.value, self.scope)))})"


Place = tuple[IPFamily, Protocol, str, int]
"""What can be owned once: family, protocol, address (empty: every local one) and port."""


class PortalKind(enum.StrEnum):
    CLUSTER_IP = "ClusterIP"
    EXTERNAL_IP = "ExternalIP"
    LOAD_BALANCER_IP = "LoadBalancerIP"
    NODE_PORT = "NodePort"

    __hash__ = str.__hash__


class Portal(NamedTuple):
    """An address whose traffic the kernel must hand to a proxy port.

    Two portals that differ in `kind` alone are the same place: `place` is what can be owned once.
    """

    family: IPFamily
    protocol: Protocol
    ip: str
    """Empty for a node port: every local address that `--nodeport-addresses` admits."""
    port: int
    kind: PortalKind

    @property
    def place(self) -> Place:
        return self.family, self.protocol, self.ip, self.port

    def __str__(self) -> str:
        where = join_host_port(self.ip, self.port) if self.ip else f"*:{self.port} ({self.family.value})"
        return f"{self.kind} {where}/{self.protocol}"


class Redirect(NamedTuple):
    """One portal and the proxy port that takes its traffic; `owner` is told in the rule's comment."""

    portal: Portal
    proxy_port: int
    owner: ServicePortName
    inside_port: int = 0
    """The proxy port for clients inside: on this node, or a pod. 0: the same as for all others."""


@dataclass(frozen=True, slots=True)
class ServicePort:
    """What to proxy for one service port."""

    protocol: Protocol
    port: int
    cluster_ips: tuple[str, ...]
    node_port: int = 0
    """0: none."""
    external_ips: tuple[str, ...] = ()
    load_balancer_ips: tuple[str, ...] = ()
    affinity: SessionAffinity = SessionAffinity.NONE
    affinity_timeout: float = DEFAULT_AFFINITY_TIMEOUT
    internal_policy: TrafficPolicy = TrafficPolicy.CLUSTER
    """For clients of cluster IPs."""
    external_policy: TrafficPolicy = TrafficPolicy.CLUSTER
    """For clients from outside, who come by all other portals."""
    source_ranges: tuple[str, ...] = ()
    """Networks that clients of load-balancer IPs must be in; empty: no matter which."""
    health_check_node_port: int = 0
    """Of the whole Service: where load balancers ask whether this node has endpoints; 0: nowhere."""
    publish_not_ready: bool = False
    """Endpoints take clients whether they are ready or not."""
    preference: Preference = Preference.NONE
    proxy_protocol: ProxyProtocol = _NO_PROXY_PROTOCOL
    proxied_ips: tuple[str, ...] = ()
    """Load-balancer IPs at which the load balancer wants all clients itself (`ipMode: Proxy`): not captured."""

    @property
    def families(self) -> tuple[IPFamily, ...]:
        """Families that have a cluster IP, in the Service's own order; each is served by a socket of its own."""
        return tuple(dict.fromkeys(family_of(ip) for ip in self.cluster_ips))

    def portals(self, family: IPFamily) -> tuple[Portal, ...]:
        """Cluster IP, external IPs, load-balancer IPs, node port: the order in which kube-proxy opens them."""
        portals = [
            Portal(family, self.protocol, ip, self.port, kind)
            for kind, ips in (
                (PortalKind.CLUSTER_IP, self.cluster_ips),
                (PortalKind.EXTERNAL_IP, self.external_ips),
                (PortalKind.LOAD_BALANCER_IP, self.load_balancer_ips),
            )
            for ip in ips
            if family_of(ip) is family
        ]
        if self.node_port:
            portals.append(Portal(family, self.protocol, "", self.node_port, PortalKind.NODE_PORT))
        return tuple(portals)

    def key(self, name: ServicePortName, portal: Portal) -> SocketKey:
        """The proxy socket for clients of a portal; those from inside may have another one, see `inside`."""
        if portal.kind is PortalKind.CLUSTER_IP:
            return SocketKey(name, portal.family, self.internal_policy)
        screened = portal.kind is PortalKind.LOAD_BALANCER_IP and bool(self.source_ranges)
        return SocketKey(name, portal.family, self.external_policy, screened)


def inside(portal: Portal, key: SocketKey) -> SocketKey:
    """The socket for clients inside of a portal that `key` serves.

    The external policy is about where load balancers send clients, so it does not concern those who are inside already.
    """
    return key if portal.kind is PortalKind.CLUSTER_IP else key._replace(policy=TrafficPolicy.CLUSTER)


Address = tuple[str, int]
"""An endpoint as socket calls take it."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One address a service port's clients may be sent to."""

    ip: str
    port: int
    ready: bool = True
    serving: bool = True
    terminating: bool = False
    node: str = ""
    """The name of the node it runs on; empty: not told."""
    zone: str = ""
    zone_hints: tuple[str, ...] = ()
    """Zones whose clients it is meant for; empty: not told."""
    node_hints: tuple[str, ...] = ()

    @property
    def is_usable(self) -> bool:
        """Whether it takes clients, if only as long as there is no better one."""
        return self.ready or (self.serving and self.terminating)

    @property
    def address(self) -> Address:
        return self.ip, self.port

    def __str__(self) -> str:
        return join_host_port(self.ip, self.port)


@dataclass(frozen=True, slots=True)
class Node:
    """The node this proxy runs on, as the cluster knows it; `zone` is empty where it has none."""

    name: str
    zone: str = ""
    leaving: bool = False
    """It is being deleted, or about to be by an autoscaler."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All service ports and their endpoints at one moment.

    A source that publishes the next one keeps the values of what did not change, so that comparing two
    snapshots is mostly comparing identities.
    """

    services: Mapping[ServicePortName, ServicePort] = field(default_factory=dict)
    endpoints: Mapping[ServicePortName, tuple[Endpoint, ...]] = field(default_factory=dict)
    node: Node | None = None
    """None: there is no cluster, or it has not told of this node yet."""


def changed(before: Mapping[_Key, _Value], now: Mapping[_Key, _Value]) -> set[_Key]:
    """The keys whose values differ, those of one side only included.

    Where `now` was made by copying `before` and putting in what is new, as Snapshots are, nothing is hashed or
    compared but what was put in: thousands of kept values cost some tens of microseconds.
    """
    if len(before) == len(now) and all(map(operator.is_, before, now)):
        found = set(compress(now, map(operator.is_not, now.values(), before.values())))
    else:
        found = {key for key, value in now.items() if before.get(key) is not value}
        found.update(before.keys() - now.keys())
    return {key for key in found if before.get(key) != now.get(key)}
