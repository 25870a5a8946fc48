"""The shapes of the Kubernetes objects that say something to a proxy, and of these the fields that matter to one.

They give the shape only. Their leaves are `Any`, because a typed leaf would end the decoding at the first mistake, and
people want to hear of all of them at once. What the fields mean, and which values are refused, is in
`sources.services` and `sources.endpoints`.
"""

from __future__ import annotations

from typing import Any

import msgspec

from userspace_proxy.sources.checks import Port


class Metadata(msgspec.Struct):
    name: Any = None
    namespace: Any = None
    labels: dict[Any, Any] | None = None
    annotations: dict[Any, Any] | None = None


class ObjectShape(msgspec.Struct):
    metadata: Metadata | None = None


class ClientIPConfig(msgspec.Struct, rename="camel"):
    timeout_seconds: Any = None


class AffinityConfig(msgspec.Struct):
    client_ip: ClientIPConfig | None = msgspec.field(default=None, name="clientIP")


class ServiceSpec(msgspec.Struct, rename="camel"):
    type: Any = None
    cluster_ip: Any = msgspec.field(default=None, name="clusterIP")
    cluster_ips: list[Any] | None = msgspec.field(default=None, name="clusterIPs")
    external_ips: list[Any] | None = msgspec.field(default=None, name="externalIPs")
    ports: list[Port] | None = None
    session_affinity: Any = None
    session_affinity_config: AffinityConfig | None = None
    internal_traffic_policy: Any = None
    external_traffic_policy: Any = None
    load_balancer_source_ranges: list[Any] | None = None
    health_check_node_port: Any = None
    publish_not_ready_addresses: bool | None = None
    traffic_distribution: Any = None


class Ingress(msgspec.Struct, rename="camel"):
    ip: Any = None
    ip_mode: Any = None


class LoadBalancer(msgspec.Struct):
    ingress: list[Ingress] | None = None


class ServiceStatus(msgspec.Struct, rename="camel"):
    load_balancer: LoadBalancer | None = None


class ServiceShape(ObjectShape):
    spec: ServiceSpec | None = None
    status: ServiceStatus | None = None


class Conditions(msgspec.Struct):
    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class Hint(msgspec.Struct):
    name: Any = None


class Hints(msgspec.Struct, rename="camel"):
    for_zones: list[Hint] | None = None
    for_nodes: list[Hint] | None = None


class SliceEndpointShape(msgspec.Struct, rename="camel"):
    addresses: list[Any] | None = None
    conditions: Conditions | None = None
    node_name: Any = None
    zone: Any = None
    hints: Hints | None = None


class EndpointSliceShape(ObjectShape, rename="camel"):
    address_type: Any = None
    endpoints: list[SliceEndpointShape] | None = None
    ports: list[Port] | None = None


class Address(msgspec.Struct, rename="camel"):
    ip: Any = None
    node_name: Any = None


class Subset(msgspec.Struct, rename="camel"):
    addresses: list[Address] | None = None
    not_ready_addresses: list[Address] | None = None
    ports: list[Port] | None = None


class EndpointsShape(ObjectShape):
    subsets: list[Subset] | None = None


def learn(*structs: type[msgspec.Struct]) -> None:
    """Have msgspec look at structs now. It does when it first meets one, and crashes where two threads do (0.22)."""
    for struct in structs:
        msgspec.json.Decoder(struct)


learn(ServiceShape, EndpointSliceShape, EndpointsShape)
