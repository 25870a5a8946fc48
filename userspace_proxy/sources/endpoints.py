"""What EndpointSlices and Endpoints say: where a Service's endpoints are, whether they are ready, whom they are for.

Whose they are has been settled in `sources.objects`, and what single fields may hold is in `sources.checks`. What
several objects say about one Service is put together in `sources.store`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from userspace_proxy.model import Endpoint, Protocol, ServicePortName, family_of
from userspace_proxy.sources.checks import Check
from userspace_proxy.sources.identity import Identity
from userspace_proxy.sources.shapes import Conditions, EndpointSliceShape, EndpointsShape, SliceEndpointShape

logger = logging.getLogger(__name__)

SERVICE_NAME = "kubernetes.io/service-name"
MAX_PAIRS = 100_000
"""Pairs of an address and a port in one object: the API documents 1,000 endpoints with 100 ports as the most.
They are made between two turns of the data path."""


@dataclass(frozen=True, slots=True)
class EndpointSet:
    """What one EndpointSlice or Endpoints object says about `service`, by service port; duplicates included."""

    identity: Identity
    service: tuple[str, str]
    endpoints: Mapping[ServicePortName, tuple[Endpoint, ...]]
    protocols: Mapping[ServicePortName, Protocol]
    """A service port of the same name and another protocol has other endpoints."""


def read_slice(
    decoded: EndpointSliceShape, identity: Identity, labels: Mapping[Any, Any], check: Check
) -> EndpointSet | None:
    service = check.name(f"metadata.labels[{SERVICE_NAME}]", labels.get(SERVICE_NAME))
    family = decoded.address_type
    if family == "FQDN":
        return None  # names are not looked up, by kube-proxy neither
    if family not in ("IPv4", "IPv6"):
        check.refuse("addressType", family, "IPv4, IPv6")
    # A port without a number stands for all of them; there is none to send a client to, so it is passed over.
    ports = [port for port in check.ports("ports", decoded.ports or (), of_slice=True) if port.port]
    listed = decoded.endpoints or ()
    if not _are_few("endpoints", len(listed) * len(ports), check):
        return None
    by_port: dict[str, list[Endpoint]] = {port.name: [] for port in ports}
    for i, endpoint in enumerate(listed):
        conditions = endpoint.conditions or Conditions()
        told = {
            "ready": conditions.ready is not False,
            "serving": conditions.serving is not False,
            "terminating": bool(conditions.terminating),
            **_read_whereabouts(endpoint, f"endpoints[{i}]", check),
        }
        ip = _read_address(endpoint, family, f"endpoints[{i}].addresses", check)
        for port in ports:
            by_port[port.name].append(Endpoint(ip, port.port, **told))
    if further := sum(len(endpoint.addresses or ()) > 1 for endpoint in listed):
        logger.info(
            "%s: of %d endpoints only the first address is used; write others as endpoints of their own",
            identity,
            further,
        )
    namespace = identity.namespace
    named = {ServicePortName(namespace, service, name): tuple(found) for name, found in by_port.items()}
    protocols = {ServicePortName(namespace, service, port.name): port.protocol for port in ports}
    return EndpointSet(identity, (namespace, service), named, protocols)


def _are_few(field: str, pairs: int, check: Check) -> bool:
    if pairs > MAX_PAIRS:
        check.refuse(field, pairs, f"at most {MAX_PAIRS} pairs of an address and a port; write several objects")
    return pairs <= MAX_PAIRS


def _read_address(endpoint: SliceEndpointShape, family: Any, field: str, check: Check) -> str:
    """The first, as kube-proxy takes it: what others mean is not defined."""
    if not endpoint.addresses:
        check.refuse(field, endpoint.addresses, "at least one address")
        return ""
    address = endpoint.addresses[0]
    ip = check.endpoint_ip(f"{field}[0]", address)
    if ip and family in ("IPv4", "IPv6") and family_of(ip).value != family:
        check.refuse(f"{field}[0]", address, f"{family}, as addressType says")
    return ip


def _read_whereabouts(endpoint: SliceEndpointShape, field: str, check: Check) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if endpoint.node_name is not None:
        found["node"] = _read_text(f"{field}.nodeName", endpoint.node_name, check)
    if endpoint.zone is not None:
        found["zone"] = _read_text(f"{field}.zone", endpoint.zone, check)
    if endpoint.hints is not None:
        for name, key, hints in (
            ("forZones", "zone_hints", endpoint.hints.for_zones),
            ("forNodes", "node_hints", endpoint.hints.for_nodes),
        ):
            found[key] = tuple(
                _read_text(f"{field}.hints.{name}[{i}].name", hint.name, check) for i, hint in enumerate(hints or ())
            )
    return found


def _read_text(field: str, found: Any, check: Check) -> str:
    """A name that many endpoints have in common, and which is therefore kept once."""
    if isinstance(found, str):
        return sys.intern(found)
    check.refuse(field, found, "text")
    return ""


def read_endpoints(decoded: EndpointsShape, identity: Identity, check: Check) -> EndpointSet:
    by_port: dict[str, list[Endpoint]] = {}
    protocols: dict[ServicePortName, Protocol] = {}
    pairs = 0
    for i, subset in enumerate(decoded.subsets or ()):
        ports = check.ports(f"subsets[{i}].ports", subset.ports or ())
        pairs += len(ports) * (len(subset.addresses or ()) + len(subset.not_ready_addresses or ()))
        if not _are_few("subsets", pairs, check):
            break
        protocols |= {ServicePortName(identity.namespace, identity.name, port.name): port.protocol for port in ports}
        for which, addresses, ready in (
            ("addresses", subset.addresses, True),
            ("notReadyAddresses", subset.not_ready_addresses, False),
        ):
            for j, address in enumerate(addresses or ()):
                at = f"subsets[{i}].{which}[{j}]"
                ip = check.endpoint_ip(f"{at}.ip", address.ip)
                node = "" if address.node_name is None else _read_text(f"{at}.nodeName", address.node_name, check)
                for port in ports:
                    by_port.setdefault(port.name, []).append(Endpoint(ip, port.port, ready, ready, node=node))
    key = identity.namespace, identity.name
    named = {ServicePortName(*key, name): tuple(found) for name, found in by_port.items()}
    return EndpointSet(identity, key, named, protocols)
