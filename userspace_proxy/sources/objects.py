"""Kubernetes objects are read here: Service, EndpointSlice and Endpoints, decoded, validated, turned into model values.

An object comes as a parsed value (dicts, lists, text, numbers); where it was found and how it was parsed is the
caller's business, what is done with several of them is in `sources.store`. Fields that do not matter to a proxy are
never looked at. Everything that does matter is untrusted: an object is taken whole or refused whole, with one
ObjectError that tells all its problems, each as `field: found X; allowed: Y`. Their shapes are in `sources.shapes`.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from userspace_proxy.exceptions import ObjectError
from userspace_proxy.model import (
    DEFAULT_AFFINITY_TIMEOUT,
    Endpoint,
    Preference,
    Protocol,
    ProxyProtocol,
    ServicePort,
    ServicePortName,
    SessionAffinity,
    TrafficPolicy,
    family_of,
)
from userspace_proxy.sources.checks import Check, show
from userspace_proxy.sources.shapes import (
    ClientIPConfig,
    Conditions,
    EndpointSliceShape,
    EndpointsShape,
    LoadBalancer,
    Metadata,
    ObjectShape,
    ServiceShape,
    ServiceSpec,
    SliceEndpointShape,
)

logger = logging.getLogger(__name__)

API_VERSIONS = {"Service": "v1", "Endpoints": "v1", "EndpointSlice": "discovery.k8s.io/v1"}
LISTS = {"List": "", **{f"{kind}List": kind for kind in API_VERSIONS}}
"""Kinds that hold others, and the kind of their items where that is settled by the list's own."""

SERVICE_NAME = "kubernetes.io/service-name"
NOT_OURS = ("service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless")
"""Labels that, with any value, take an object away from the node's default proxy."""

MAX_AFFINITY_TIMEOUT = 86400
MAX_PAIRS = 100_000
"""Pairs of an address and a port in one object: the API documents 1,000 endpoints with 100 ports as the
most. They are made between two turns of the data path."""

SEND_PROXY = "userspace-proxy/send-proxy-protocol"
ACCEPT_PROXY = "userspace-proxy/accept-proxy-protocol-from"
_VERSIONS = {"none": 0, "v1": 1, "v2": 2}

_PREFERENCES = {
    "PreferClose": Preference.ZONE,
    "PreferSameZone": Preference.ZONE,
    "PreferSameNode": Preference.NODE,
}
"""By `trafficDistribution`; of one that is not known yet there is nothing to prefer."""


class Identity(NamedTuple):
    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class Service:
    identity: Identity
    ports: Mapping[ServicePortName, ServicePort]


@dataclass(frozen=True, slots=True)
class EndpointSet:
    """What one EndpointSlice or Endpoints object says about `service`, by service port; duplicates included."""

    identity: Identity
    service: tuple[str, str]
    endpoints: Mapping[ServicePortName, tuple[Endpoint, ...]]
    protocols: Mapping[ServicePortName, Protocol]
    """A service port of the same name and another protocol has other endpoints."""


_SHAPES: Mapping[str, type[ObjectShape]] = {
    "Service": ServiceShape,
    "Endpoints": EndpointsShape,
    "EndpointSlice": EndpointSliceShape,
}


def unpack(value: object) -> Iterator[object]:
    """The object itself, or those of a List. Items of a typed list (ServiceList) need not repeat their kind."""
    items = value.get("items") if isinstance(value, dict) and _kind_of(value) in LISTS else None
    if not isinstance(value, dict) or not isinstance(items, list):
        yield value
        return
    kind = LISTS[_kind_of(value)]
    for item in items:
        if kind and isinstance(item, dict) and item.get("kind") is None and item.get("apiVersion") is None:
            item.update(kind=kind, apiVersion=API_VERSIONS[kind])
        yield item


def identify(value: object) -> Identity | None:
    """Whom a value speaks of, as far as it can be told even of one that will be refused."""
    if not isinstance(value, dict) or _kind_of(value) not in API_VERSIONS:
        return None
    metadata = value.get("metadata")
    if not isinstance(metadata, dict) or not isinstance(metadata.get("name"), str):
        return None
    namespace = metadata.get("namespace") or "default"
    return Identity(_kind_of(value), namespace, metadata["name"]) if isinstance(namespace, str) else None


def is_other_kind(value: object) -> bool:
    """Whether this is a whole object of a kind that says nothing to a proxy: a Deployment, a Knative Service."""
    if not isinstance(value, dict) or not isinstance(value.get("apiVersion"), str):
        return False
    kind = _kind_of(value)
    if kind in API_VERSIONS:
        return bool(_group(value["apiVersion"]) != _group(API_VERSIONS[kind]))
    return bool(kind) and kind not in LISTS


def decode(value: object, where: str, *, allow_loopback: bool = False) -> Service | EndpointSet | None:
    """Read one object. None: there is nothing to proxy in it (another kind, headless, ExternalName, not ours).

    Loopback endpoints are for manifests of a machine's own; from a cluster they would lead into the node.

    Raises ObjectError.
    """
    identity = identify(value)
    kind = _kind_of(value)
    if is_other_kind(value):
        logger.debug("%s: %s: no Service, EndpointSlice or Endpoints; skipped", where, kind)
        return None
    check = Check(allow_loopback)
    if kind not in API_VERSIONS or not isinstance(value, dict):
        raise ObjectError(where, f"{kind or 'object'}", [_unknown(value)])
    if value.get("apiVersion") != API_VERSIONS[kind]:
        check.refuse("apiVersion", value.get("apiVersion"), API_VERSIONS[kind])
    decoded, misshapen = _shaped(value, _SHAPES[kind])
    labels = (decoded.metadata and decoded.metadata.labels) or {}
    if any(label in labels for label in NOT_OURS):
        logger.debug("%s: %s: labelled for another proxy or headless; skipped", where, identity or kind)
        return None
    found = _read(decoded, kind, labels, check)
    # What has not its shape was read as nothing, and people should hear of it once.
    known = tuple(f"{path}{next_}" for path in misshapen for next_ in ":.[")
    others = [problem for problem in check.problems if not problem.startswith(known)]
    if misshapen or others:
        raise ObjectError(where, str(identity or kind), [*misshapen.values(), *others])
    return found


def _read(decoded: ObjectShape, kind: str, labels: Mapping[Any, Any], check: Check) -> Service | EndpointSet | None:
    metadata = decoded.metadata or Metadata()
    namespace = "default" if metadata.namespace in (None, "") else metadata.namespace
    name = check.name("metadata.name", metadata.name, dotted=kind != "Service")
    identity = Identity(kind, check.name("metadata.namespace", namespace), name)
    if isinstance(decoded, ServiceShape):
        return _read_service(decoded, identity, check)
    if isinstance(decoded, EndpointSliceShape):
        return _read_slice(decoded, identity, labels, check)
    assert isinstance(decoded, EndpointsShape)
    return _read_endpoints(decoded, identity, check)


def _read_service(decoded: ServiceShape, identity: Identity, check: Check) -> Service | None:
    spec = decoded.spec or ServiceSpec()
    kinds = ("ClusterIP", "NodePort", "LoadBalancer", "ExternalName")
    if spec.type not in (None, "", *kinds):
        check.refuse("spec.type", spec.type, ", ".join(kinds))
    given = spec.cluster_ips or ([spec.cluster_ip] if spec.cluster_ip not in (None, "") else [])
    if spec.type == "ExternalName" or not given or given[0] in ("None", ""):
        if spec.type != "ExternalName" and not given:
            logger.info(
                "%s: not served, it has no clusterIP; without a cluster nobody allocates one: write it", identity
            )
        return None
    cluster_ips = _read_cluster_ips(spec, given, check)
    external_ips = tuple(check.service_ip(f"spec.externalIPs[{i}]", ip) for i, ip in enumerate(spec.external_ips or ()))
    balancer = (decoded.status and decoded.status.load_balancer) or LoadBalancer()
    balancer_ips = tuple(
        check.service_ip(f"status.loadBalancer.ingress[{i}].ip", ingress.ip)
        for i, ingress in enumerate(balancer.ingress or ())
        if ingress.ip not in (None, "")  # some clouds give a host name instead
    )
    affinity, timeout = _read_affinity(spec, check)
    policies: dict[str, Any] = {
        "internal_policy": _read_policy("spec.internalTrafficPolicy", spec.internal_traffic_policy, check),
        "external_policy": _read_policy("spec.externalTrafficPolicy", spec.external_traffic_policy, check),
        "source_ranges": _read_source_ranges(spec, check),
        "health_check_node_port": _read_health_check(spec, check),
        "publish_not_ready": bool(spec.publish_not_ready_addresses),
        "preference": _read_preference(spec.traffic_distribution),
        "proxy_protocol": _read_proxy_protocol((decoded.metadata and decoded.metadata.annotations) or {}, check),
    }
    ports: dict[ServicePortName, ServicePort] = {}
    for port in check.service_ports(spec.ports or ()):
        ports[ServicePortName(identity.namespace, identity.name, port.name)] = ServicePort(
            protocol=port.protocol,
            port=port.port,
            cluster_ips=cluster_ips,
            node_port=port.node_port,
            external_ips=tuple(dict.fromkeys(external_ips)),
            load_balancer_ips=tuple(dict.fromkeys(balancer_ips)),
            affinity=affinity,
            affinity_timeout=timeout,
            **policies,
        )
    return Service(identity, ports)


def _read_cluster_ips(spec: ServiceSpec, given: Sequence[Any], check: Check) -> tuple[str, ...]:
    field = "spec.clusterIPs" if spec.cluster_ips else "spec.clusterIP"
    ips = tuple(
        check.service_ip(f"{field}[{i}]" if spec.cluster_ips else field, ip, cluster=True) for i, ip in enumerate(given)
    )
    families = [family_of(ip) for ip in ips if ip]
    if len(families) > 2 or len(set(families)) < len(families):
        check.refuse(field, list(given), "one address, or one of each family")
    if spec.cluster_ips and spec.cluster_ip not in (None, "", given[0]):
        check.refuse("spec.clusterIP", spec.cluster_ip, f"the first of spec.clusterIPs, {show(given[0])}")
    return ips


def _read_affinity(spec: ServiceSpec, check: Check) -> tuple[SessionAffinity, float]:
    affinity = SessionAffinity.NONE
    if spec.session_affinity == SessionAffinity.CLIENT_IP.value:
        affinity = SessionAffinity.CLIENT_IP
    elif spec.session_affinity not in (None, "", "None"):
        check.refuse("spec.sessionAffinity", spec.session_affinity, "None, ClientIP")
    config = (spec.session_affinity_config and spec.session_affinity_config.client_ip) or ClientIPConfig()
    if config.timeout_seconds is None:
        return affinity, DEFAULT_AFFINITY_TIMEOUT
    field = "spec.sessionAffinityConfig.clientIP.timeoutSeconds"
    return affinity, float(check.number(field, config.timeout_seconds, 1, MAX_AFFINITY_TIMEOUT))


def _read_policy(field: str, found: Any, check: Check) -> TrafficPolicy:
    try:
        return TrafficPolicy(found or TrafficPolicy.CLUSTER)
    except ValueError:
        check.refuse(field, found, ", ".join(TrafficPolicy))
        return TrafficPolicy.CLUSTER


def _read_source_ranges(spec: ServiceSpec, check: Check) -> tuple[str, ...]:
    if spec.type != "LoadBalancer":
        return ()
    field = "spec.loadBalancerSourceRanges"
    ranges = (check.network(f"{field}[{i}]", each) for i, each in enumerate(spec.load_balancer_source_ranges or ()))
    return tuple(dict.fromkeys(ranges))


def _read_preference(distribution: object) -> Preference:
    return _PREFERENCES.get(distribution, Preference.NONE) if isinstance(distribution, str) else Preference.NONE


def _read_proxy_protocol(annotations: Mapping[Any, Any], check: Check) -> ProxyProtocol:
    field = f"metadata.annotations[{SEND_PROXY}]"
    version = annotations.get(SEND_PROXY, "none")
    if not isinstance(version, str) or version not in _VERSIONS:
        check.refuse(field, version, ", ".join(_VERSIONS))
        version = "none"
    field, trusted = f"metadata.annotations[{ACCEPT_PROXY}]", annotations.get(ACCEPT_PROXY, "")
    if not isinstance(trusted, str):
        check.refuse(field, trusted, "networks, as 192.0.2.0/24, with commas between them")
        trusted = ""
    networks = tuple(check.network(field, each) for each in trusted.split(",") if each.strip())
    return ProxyProtocol(_VERSIONS[version], networks)


def _read_health_check(spec: ServiceSpec, check: Check) -> int:
    if spec.type != "LoadBalancer" or spec.external_traffic_policy != TrafficPolicy.LOCAL.value:
        return 0
    port = spec.health_check_node_port
    return 0 if port is None else check.number("spec.healthCheckNodePort", port, 0, 65535)


def _read_slice(
    decoded: EndpointSliceShape, identity: Identity, labels: Mapping[Any, Any], check: Check
) -> EndpointSet | None:
    service = check.name(f"metadata.labels[{SERVICE_NAME}]", labels.get(SERVICE_NAME))
    family = decoded.address_type
    if family == "FQDN":
        return None  # names are not looked up, by kube-proxy neither
    if family not in ("IPv4", "IPv6"):
        check.refuse("addressType", family, "IPv4, IPv6")
    # A port without a number stands for all of them; there is none to send a client to, so it is passed over.
    ports = [port for port in check.ports("ports", decoded.ports or (), numbered=False) if port.port]
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


def _read_endpoints(decoded: EndpointsShape, identity: Identity, check: Check) -> EndpointSet:
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


def _kind_of(value: object) -> str:
    kind = value.get("kind") if isinstance(value, dict) else None
    return kind if isinstance(kind, str) else ""


def _group(api_version: object) -> str:
    group, slash, _ = str(api_version).partition("/")
    return group if slash else ""


def _unknown(value: object) -> str:
    if not isinstance(value, dict):
        return f"found {show(value)}; allowed: an object with apiVersion, kind and metadata"
    if _kind_of(value) in LISTS:
        return f"items: found {show(value.get('items'))}; allowed: a list of objects, not of Lists"
    field = "apiVersion" if _kind_of(value) else "kind"
    return f"{field}: found {show(value.get(field))}; allowed: what every Kubernetes object says of itself"


def _shaped(value: Any, struct: type[ObjectShape]) -> tuple[ObjectShape, dict[str, str]]:
    """The struct, without the parts of the value that have not their shape, and what is said of each of these."""
    problems: dict[str, str] = {}
    while True:
        try:
            return msgspec.convert(value, struct), problems
        except msgspec.ValidationError as error:
            match = re.fullmatch(r"Expected `(.+?)`, got `(.+?)` - at `\$\.(.+)`", str(error))
            if match is None or match[3] in problems:
                raise
            expected, got, path = match.groups()
            words = expected.replace("array", "a list").replace("object", "a mapping").replace(" | null", "")
            problems[path] = f"{path}: found {got}; allowed: {words}"
            value = _blanked(value, re.findall(r"\w+", path))


def _blanked(value: Any, path: Sequence[str]) -> Any:
    """A copy with nothing at the end of the path; in a list, which has no room for nothing, an empty object."""
    if not path:
        return None
    step, *rest = path
    if isinstance(value, dict):
        return {**value, step: _blanked(value[step], rest)}
    at = int(step)
    inside = _blanked(value[at], rest)
    return [*value[:at], {} if inside is None else inside, *value[at + 1 :]]
