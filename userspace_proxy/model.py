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


class ServicePortName(NamedTuple):
    """The key of everything: one named port of one Service. The port's name is empty where it has none."""

    namespace: str
    name: str
    port: str = ""

    def __str__(self) -> str:
        text = f"{self.namespace}/{self.name}"
        return f"{text}:{self.port}" if self.port else text


class SocketKey(NamedTuple):
    """One proxy socket: a service port in one address family."""

    name: ServicePortName
    family: IPFamily

    def __str__(self) -> str:
        return f"{self.name} ({self.family.value})"


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
