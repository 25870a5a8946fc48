"""What a Service says: the service ports that it has.

Whose it is has been settled in `sources.objects`, and what single fields may hold is in `sources.checks`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from userspace_proxy.model import (
    DEFAULT_AFFINITY_TIMEOUT,
    Preference,
    ProxyProtocol,
    ServicePort,
    ServicePortName,
    SessionAffinity,
    TrafficPolicy,
    family_of,
)
from userspace_proxy.sources.checks import Check, show
from userspace_proxy.sources.identity import Identity
from userspace_proxy.sources.shapes import ClientIPConfig, LoadBalancer, ServiceShape, ServiceSpec, ServiceStatus

MAX_AFFINITY_TIMEOUT = 86400

SEND_PROXY = "userspace-proxy/send-proxy-protocol"
ACCEPT_PROXY = "userspace-proxy/accept-proxy-protocol-from"
_VERSIONS = {"none": 0, "v1": 1, "v2": 2}

_PREFERENCES = {
    "PreferClose": Preference.ZONE,
    "PreferSameZone": Preference.ZONE,
    "PreferSameNode": Preference.NODE,
}
"""By `trafficDistribution`; of one that is not known yet there is nothing to prefer."""


@dataclass(frozen=True, slots=True)
class Service:
    identity: Identity
    ports: Mapping[ServicePortName, ServicePort]


def read_service(decoded: ServiceShape, identity: Identity, check: Check) -> Service | None:
    spec = decoded.spec or ServiceSpec()
    kinds = ("ClusterIP", "NodePort", "LoadBalancer", "ExternalName")
    if spec.type not in (None, "", *kinds):
        check.refuse("spec.type", spec.type, ", ".join(kinds))
    given = spec.cluster_ips or ([spec.cluster_ip] if spec.cluster_ip not in (None, "") else [])
    if spec.type == "ExternalName" or not given or given[0] in ("None", ""):
        if spec.type != "ExternalName" and not given:
            check.remarks.append("not served, it has no clusterIP; without a cluster nobody allocates one: write it")
        return None
    cluster_ips = _read_cluster_ips(spec, given, check)
    external_ips = tuple(check.service_ip(f"spec.externalIPs[{i}]", ip) for i, ip in enumerate(spec.external_ips or ()))
    balancer_ips, proxied_ips = _read_ingress(decoded.status, check)
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
            load_balancer_ips=balancer_ips,
            proxied_ips=proxied_ips,
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


def _read_ingress(status: ServiceStatus | None, check: Check) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The load balancer's addresses: those to capture, and those that are the load balancer's own to serve."""
    balancer = (status and status.load_balancer) or LoadBalancer()
    captured: dict[str, None] = {}
    proxied: dict[str, None] = {}
    for i, ingress in enumerate(balancer.ingress or ()):
        if ingress.ip in (None, ""):  # some clouds give a host name instead
            continue
        field = f"status.loadBalancer.ingress[{i}].ip"
        if ip := check.status_ip(field, ingress.ip):
            # Modes that are not known yet are left alone as well, as by kube-proxy.
            (captured if ingress.ip_mode in (None, "", "VIP") else proxied)[ip] = None
    return tuple(captured), tuple(proxied)


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
