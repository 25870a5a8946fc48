"""What a capture by netfilter is told once: the family, where proxy sockets listen, and which networks mean what.

The same for iptables (`rules`) and nftables (`nft`), each of which writes it in its own way.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass

from userspace_proxy.model import IPFamily, family_of

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class Scope:
    """What is fixed for a family while the proxy runs."""

    family: IPFamily
    bind_address: str
    """Of this family: its wildcard, or the address that proxy sockets are bound to."""
    nodeport_cidrs: tuple[str, ...] = ()
    """Of either family; empty: node ports are captured on every local address."""
    inside: tuple[str, ...] = ()
    """Networks whose clients are inside, like this node itself; of either family."""

    @property
    def inside_networks(self) -> tuple[Network, ...]:
        return _networks(self.inside, self.family)

    @property
    def inside_sources(self) -> tuple[str, ...]:
        """`-s` arguments, one a rule."""
        return tuple(f"-s {network} " if network.prefixlen else "" for network in self.inside_networks)

    @property
    def nodeport_networks(self) -> tuple[Network, ...]:
        """Whose addresses have node ports; none at all if the CIDRs given are all of the other family."""
        return _networks(self.nodeport_cidrs or ("0.0.0.0/0", "::/0"), self.family)

    @property
    def nodeport_destinations(self) -> tuple[str, ...]:
        """`-d` arguments, one a rule."""
        return tuple(f"-d {network} " if network.prefixlen else "" for network in self.nodeport_networks)


def _networks(cidrs: Iterable[str], family: IPFamily) -> tuple[Network, ...]:
    return tuple(dict.fromkeys(ipaddress.ip_network(cidr) for cidr in cidrs if family_of(cidr) is family))
