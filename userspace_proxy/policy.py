"""Which of a service port's endpoints the clients of one proxy socket may be sent to, and what those hear who may not.

Here are the Service's traffic policies and the wish to stay near: endpoints on this node, in this zone. What comes out
still holds endpoints that are not ready; which of them are used, and whose turn it is, is the `loadbalancer`'s.

A `Local` policy is an order: clients are never sent to another node. Hints and `trafficDistribution` are wishes: where
they cannot be met for want of a ready endpoint, or hints are not told for each of them, all endpoints will do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from userspace_proxy.model import (
    Endpoint,
    Node,
    Preference,
    ServicePort,
    SocketKey,
    TrafficPolicy,
    family_of,
)

NOWHERE = Node("")
"""A node that no endpoint can be on."""


def eligible(
    endpoints: Sequence[Endpoint], key: SocketKey, service: ServicePort, node: Node = NOWHERE
) -> tuple[Endpoint, ...]:
    """Those of the endpoints that may be had through this socket, in their order."""
    found = tuple(e for e in endpoints if family_of(e.ip) is key.family)
    if service.publish_not_ready:
        found = tuple(e if e.ready else replace(e, ready=True) for e in found)
    if key.policy is TrafficPolicy.LOCAL:
        return tuple(e for e in found if is_local(e, node))
    return _near(found, service.preference, node)


def is_local(endpoint: Endpoint, node: Node) -> bool:
    return bool(node.name) and endpoint.node == node.name


def is_silent(endpoints: Sequence[Endpoint], key: SocketKey, service: ServicePort) -> bool:
    """Whether clients hear nothing where none of the endpoints may be had, instead of being refused.

    With endpoints on other nodes only, the client was sent to the wrong node, or too early: it does well to try again.
    """
    return key.policy is TrafficPolicy.LOCAL and any(
        (service.publish_not_ready or e.is_usable) and family_of(e.ip) is key.family for e in endpoints
    )


def sources(key: SocketKey, service: ServicePort) -> tuple[str, ...] | None:
    """The networks whose clients are heard; None: no matter which.

    Ranges of the other family only admit nobody: who has written where clients come from did not mean everywhere else.
    """
    if not key.screened:
        return None
    return tuple(network for network in service.source_ranges if family_of(network) is key.family)


def local_ready(endpoints: Sequence[Endpoint], node: Node) -> int:
    """How many pods of this node load balancers may count on: addresses, however many ports each has."""
    return len({e.ip for e in endpoints if e.ready and is_local(e, node)})


def _near(endpoints: tuple[Endpoint, ...], preference: Preference, node: Node) -> tuple[Endpoint, ...]:
    ready = [e for e in endpoints if e.ready]
    for is_told, is_meant in _wishes(preference, node):
        if all(map(is_told, ready)) and any(map(is_meant, ready)):
            return tuple(filter(is_meant, endpoints))
    return endpoints


Test = Callable[[Endpoint], bool]


def _wishes(preference: Preference, node: Node) -> list[tuple[Test, Test]]:
    """For each wish, the dearest first: whether it can be told of an endpoint, and whether it holds for it."""
    wishes: list[tuple[Test, Test]] = [
        (lambda e: bool(e.node_hints), lambda e: node.name in e.node_hints),
        (lambda e: bool(e.zone_hints), lambda e: node.zone in e.zone_hints),
    ]
    if preference is Preference.NODE:
        wishes.append((lambda e: not e.node_hints, lambda e: is_local(e, node)))
    if preference is not Preference.NONE:
        wishes.append((lambda e: not e.zone_hints, lambda e: bool(node.zone) and e.zone == node.zone))
    return wishes
