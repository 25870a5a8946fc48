"""What feature gates that are off leave of a Snapshot. Which gates there are is in `config.gates`.

All of them are on by themselves, and then this costs nothing. EndpointSliceProxying is not here: it decides what an API
server is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Generic, TypeVar

from userspace_proxy.model import Endpoint, Preference, Protocol, ServicePort, ServicePortName, Snapshot, TrafficPolicy

T = TypeVar("T")

_PORTS: Mapping[str, Callable[[ServicePort], ServicePort | None]] = {
    "LoadBalancerIPMode": lambda port: replace(
        port, load_balancer_ips=tuple(dict.fromkeys((*port.load_balancer_ips, *port.proxied_ips))), proxied_ips=()
    ),
    "SCTPSupport": lambda port: None if port.protocol is Protocol.SCTP else port,
    "ServiceInternalTrafficPolicy": lambda port: replace(port, internal_policy=TrafficPolicy.CLUSTER),
    "ServiceTrafficDistribution": lambda port: replace(port, preference=Preference.NONE),
}
"""What is left of a service port without the gate; None: nothing."""
_ENDPOINTS: Mapping[str, Callable[[Endpoint], Endpoint | None]] = {
    "TopologyAwareHints": lambda endpoint: replace(endpoint, zone_hints=()),
    "PreferSameTrafficDistribution": lambda endpoint: replace(endpoint, node_hints=()),
    "ProxyTerminatingEndpoints": lambda endpoint: None if endpoint.terminating and not endpoint.ready else endpoint,
}
GATES = frozenset({*_PORTS, *_ENDPOINTS})


def gated(publish: Callable[[Snapshot], None], is_on: Callable[[str], bool]) -> Callable[[Snapshot], None]:
    """`publish`, without what is off."""
    off = {gate for gate in GATES if not is_on(gate)}
    if not off:
        return publish
    left = Filter(off)
    return lambda snapshot: publish(left(snapshot))


class Filter:
    """From Snapshot to Snapshot. What did not change since the last one is the same value again, as with sources."""

    def __init__(self, off: set[str]) -> None:
        ports = [leave for gate, leave in _PORTS.items() if gate in off]
        endpoints = [leave for gate, leave in _ENDPOINTS.items() if gate in off]
        self._ports = _Kept[ServicePort](lambda port: _left(port, ports))
        self._endpoints = _Kept[tuple[Endpoint, ...]](
            lambda before: tuple(left for each in before if (left := _left(each, endpoints)) is not None)
        )

    def __call__(self, snapshot: Snapshot) -> Snapshot:
        services = self._ports(snapshot.services)
        served = {name: found for name, found in snapshot.endpoints.items() if name in services}
        return replace(snapshot, services=services, endpoints=self._endpoints(served))


class _Kept(Generic[T]):
    """A change of values that is made once for each, as long as it is there."""

    def __init__(self, change: Callable[[T], T | None]) -> None:
        self._change = change
        self._made: dict[ServicePortName, tuple[T, T | None]] = {}

    def __call__(self, values: Mapping[ServicePortName, T]) -> dict[ServicePortName, T]:
        made = {}
        for name, before in values.items():
            known = self._made.get(name)
            made[name] = known if known and known[0] is before else (before, self._change(before))
        self._made = made
        return {name: after for name, (_, after) in made.items() if after is not None}


def _left(value: T, changes: list[Callable[[T], T | None]]) -> T | None:
    left: T | None = value
    for change in changes:
        if left is not None:
            left = change(left)
    return left
