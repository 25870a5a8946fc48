"""Kubernetes' own end-to-end scenarios for `Services`, each a test named after it."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest

from tests.e2e.client import DATAGRAM
from tests.e2e.cluster import (
    ADDRESSES,
    API_PORT,
    FLAGS,
    OTHER_PORT,
    PORT,
    REFUSED,
    SILENT,
    STREAM,
    Cluster,
    Service,
    endpoint,
    lives,
    met,
    node_object,
    reaches,
    terminating,
)
from tests.e2e.node import port
from tests.netns import eventually

pytestmark = pytest.mark.privileged

EXTERNAL_NAME: dict[str, Any] = {"type": "ExternalName", "externalName": "example.test"}
STICKY: dict[str, Any] = {"sessionAffinity": "ClientIP"}
LOCAL_INSIDE: dict[str, Any] = {"internalTrafficPolicy": "Local"}
LOCAL_OUTSIDE: dict[str, Any] = {"externalTrafficPolicy": "Local"}


def served(cluster: Cluster, *names: str, **spec: Any) -> Service:
    web = cluster.service(**spec)
    web.served_by(*names)
    reaches(cluster.one, web.ip, *names)
    return web


# Types


def test_change_the_type_from_cluster_ip_to_external_name(cluster: Cluster) -> None:
    web = served(cluster, "one", type="ClusterIP", ports=[port(80, name="http")])
    web.put(**EXTERNAL_NAME)
    eventually(lambda: not lives(cluster.one, web.ip))


def test_change_the_type_from_external_name_to_cluster_ip(cluster: Cluster) -> None:
    web = cluster.service(**EXTERNAL_NAME)
    web.served_by("one", "far")
    web.put(type="ClusterIP", ports=[port(80, name="http")])
    reaches(cluster.one, web.ip, "one", "far")


def test_change_the_type_from_external_name_to_node_port(cluster: Cluster) -> None:
    web = cluster.service(**EXTERNAL_NAME)
    web.served_by("one")
    web.put(type="NodePort")
    reaches(cluster.outside, ADDRESSES["host"], "one", number=web.node_port)
    reaches(cluster.one, web.ip, "one")


def test_change_the_type_from_node_port_to_external_name(cluster: Cluster) -> None:
    web = served(cluster, "one", type="NodePort")
    web.put(**EXTERNAL_NAME)
    eventually(lambda: met(cluster.outside, ADDRESSES["host"], web.node_port) == REFUSED)


def test_create_a_functioning_node_port_service(cluster: Cluster) -> None:
    web = served(cluster, "one", "two", "far", type="NodePort")
    for client in (cluster.outside, cluster.one, cluster.far, cluster.host):
        reaches(client, ADDRESSES["host"], "one", "two", "far", number=web.node_port)
    reaches(cluster.host, "127.0.0.1", "one", "two", "far", number=web.node_port)


def test_update_service_type_to_node_port_listening_on_same_port_number_but_different_protocols(
    cluster: Cluster,
) -> None:
    web = served(cluster, "one", type="ClusterIP", ports=[port(80, name="http")])
    web.put(type="NodePort")
    for kind in (STREAM, DATAGRAM):
        reaches(cluster.outside, ADDRESSES["host"], "one", number=web.node_port, kind=kind)


# Affinity


@pytest.mark.parametrize("way", ["NodePort service", "service with type clusterIP"])
def test_session_affinity(cluster: Cluster, way: str) -> None:
    """have session affinity work, switch session affinity, and have session affinity timeout work."""
    web = served(cluster, "one", "two", "far")
    ip, number = (web.ip, 80) if "clusterIP" in way else (ADDRESSES["host"], web.node_port)
    reaches(cluster.two, ip, "one", "two", "far", number=number)
    web.put(**STICKY)
    eventually(lambda: len({met(cluster.two, ip, number) for _ in range(6)}) == 1)
    web.put(sessionAffinity="None")
    reaches(cluster.two, ip, "one", "two", "far", number=number)
    web.put(**STICKY, sessionAffinityConfig={"clientIP": {"timeoutSeconds": 1}})
    eventually(lambda: len({met(cluster.two, ip, number) for _ in range(6)}) == 1)
    first = met(cluster.two, ip, number)
    eventually(lambda: after_a_pause(cluster, ip, number) != first, 15)


def after_a_pause(cluster: Cluster, ip: str, number: int) -> str:
    cluster.two.run("sleep 1.1")
    return met(cluster.two, ip, number)


# Endpoints


def test_serve_a_basic_endpoint_from_pods(cluster: Cluster) -> None:
    web = cluster.service()
    eventually(lambda: met(cluster.one, web.ip) == REFUSED)
    for names in (("one",), ("one", "two"), ("two",), (REFUSED,)):
        web.served_by(*(name for name in names if name != REFUSED))
        reaches(cluster.one, web.ip, *names)


def test_serve_multiport_endpoints_from_pods(cluster: Cluster) -> None:
    web = cluster.service(ports=[port(80, name="portname1"), port(81, name="portname2")])
    web.served_by("one", slice_name="a", ports={"portname1": PORT})
    web.served_by("two", slice_name="b", ports={"portname2": OTHER_PORT})
    reaches(cluster.far, web.ip, "one", number=80)
    reaches(cluster.far, web.ip, "two", number=81)
    web.served_by(slice_name="a", ports={"portname1": PORT})
    reaches(cluster.far, web.ip, REFUSED, number=80)
    reaches(cluster.far, web.ip, "two", number=81)


def test_serve_endpoints_on_same_port_and_different_protocols(cluster: Cluster) -> None:
    web = served(cluster, "one")
    reaches(cluster.two, web.ip, "one", kind=DATAGRAM)
    web.put(ports=web.ports[:1])
    eventually(lambda: not lives(cluster.two, web.ip, kind=DATAGRAM))
    reaches(cluster.two, web.ip, "one")


def test_provide_secure_master_service(cluster: Cluster) -> None:
    """The Service of the API server, whose endpoint is on the node itself."""
    web = cluster.service(ports=[port(443, name="https")])
    web.served_by("host", ports={"https": API_PORT})
    found = eventually_text(cluster, f"http://{web.ip}:443/api/v1/nodes")
    assert found["kind"] == "NodeList"


def eventually_text(cluster: Cluster, url: str) -> Any:
    eventually(lambda: "kind" in cluster.one.run(f"curl -s -m 2 {url}", check=False))
    return json.loads(cluster.one.run(f"curl -s -m 5 {url}"))


def test_allow_pods_to_hairpin_back_to_themselves_through_services(cluster: Cluster) -> None:
    web = served(cluster, "one")
    for kind in (STREAM, DATAGRAM):
        reaches(cluster.one, web.ip, "one", kind=kind)


def test_be_able_to_up_and_down_services(cluster: Cluster) -> None:
    first, second = served(cluster, "one"), served(cluster, "two", "far")
    first.delete()
    eventually(lambda: not lives(cluster.one, first.ip))
    reaches(cluster.host, second.ip, "two", "far")
    third = served(cluster, "far")
    reaches(cluster.host, second.ip, "two", "far")
    reaches(cluster.host, third.ip, "far")


@pytest.mark.parametrize("published", [True, False])
def test_connect_to_terminating_and_unready_endpoints_if_publish_not_ready_addresses(
    cluster: Cluster, published: bool
) -> None:
    web = cluster.service(publishNotReadyAddresses=published)
    web.served_by(endpoint("one", ready=False))
    reaches(cluster.two, web.ip, "one" if published else REFUSED)
    web.served_by(endpoint("one", ready=False, terminating=True))
    reaches(cluster.outside, ADDRESSES["host"], "one" if published else REFUSED, number=web.node_port)


@pytest.mark.captures("iptables", "nftables", why="where nothing is redirected, other hosts' addresses are theirs")
def test_connect_via_external_ip_when_the_external_ip_is_not_assigned_to_a_node(cluster: Cluster) -> None:
    web = served(cluster, "one", "two")
    web.put(externalIPs=[web.external])
    for client in (cluster.far, cluster.outside, cluster.host):
        reaches(client, web.external, "one", "two")


@pytest.mark.parametrize("kind", [STREAM, DATAGRAM])
def test_be_rejected_when_no_endpoints_exist(cluster: Cluster, kind: int) -> None:
    web = served(cluster, "one")
    web.served_by()
    for client in (cluster.one, cluster.host):
        reaches(client, web.ip, REFUSED, kind=kind)
    reaches(cluster.outside, ADDRESSES["host"], REFUSED, number=web.node_port, kind=kind)
    reaches(cluster.outside, web.ingress, REFUSED, kind=kind)


def test_be_rejected_for_evicted_pods(cluster: Cluster) -> None:
    web = served(cluster, "one")
    web.served_by(endpoint("one", ready=False))
    reaches(cluster.two, web.ip, REFUSED)


def test_be_updated_after_adding_or_deleting_ports(cluster: Cluster) -> None:
    web = served(cluster, "one", ports=[port(80, name="http")])
    web.put(ports=[port(80, name="http"), port(81, name="more")])
    web.served_by("one", ports={"http": PORT, "more": OTHER_PORT})
    reaches(cluster.two, web.ip, "one", number=81)
    reaches(cluster.two, web.ip, "one")
    web.put(ports=[port(81, name="more")])
    eventually(lambda: not lives(cluster.two, web.ip))
    reaches(cluster.two, web.ip, "one", number=81)


def test_prevent_node_port_collisions(cluster: Cluster) -> None:
    """The API server does; should two Services have the same node port all the same, the first keeps it."""
    first, second = served(cluster, "one"), cluster.service()
    second.served_by("two")
    second.put(ports=[port(80, name="http", node_port=first.node_port)])
    reaches(cluster.far, second.ip, "two")
    reaches(cluster.outside, ADDRESSES["host"], "one", number=first.node_port)


def test_release_node_ports_on_delete(cluster: Cluster) -> None:
    web = served(cluster, "one")
    assert not binds(cluster, web.node_port)
    web.delete()
    eventually(lambda: binds(cluster, web.node_port))


def binds(cluster: Cluster, number: int) -> bool:
    program = f"import socket; socket.create_server(('', {number}))"
    return not cluster.host.run(f'python3 -c "{program}"', check=False)


# Labels, addresses


@pytest.mark.parametrize("label", ["service.kubernetes.io/headless", "service.kubernetes.io/service-proxy-name"])
def test_implement_the_label(cluster: Cluster, label: str) -> None:
    web = served(cluster, "one")
    web.put(labels={label: "another"})
    eventually(lambda: not lives(cluster.two, web.ip))
    web.put()
    reaches(cluster.two, web.ip, "one")


def test_service_type_cluster_ip_with_leading_zeros_should_work_interpreted_as_decimal(cluster: Cluster) -> None:
    web = cluster.service()
    web.served_by("one")
    web.ip = web.ip.replace("10.96.1.", "10.96.01.0")
    web.put()
    plain = web.ip.replace("10.96.01.0", "10.96.1.")
    reaches(cluster.two, plain, "one")


@pytest.mark.parametrize("client", ["one", "far"])
def test_preserve_source_pod_ip_for_traffic_through_service_cluster_ip(cluster: Cluster, client: str) -> None:
    """Not so: a relayed connection comes from the node. What holds: the proxy itself knows the pod."""
    web = served(cluster, "two")
    web.put(**STICKY)
    with cluster.place(client).entered():
        seen = ask_who(web.ip)
    assert seen == "two:10.1.0.1"


def ask_who(ip: str) -> str:
    with socket.create_connection((ip, 80), timeout=5) as sock:
        sock.send(b"who?")
        return sock.recv(100).decode()


# Internal traffic policy


def test_respect_internal_traffic_policy_local_pod_to_pod(cluster: Cluster) -> None:
    web = cluster.service(**LOCAL_INSIDE)
    web.served_by("one", "far")
    for kind in (STREAM, DATAGRAM):
        reaches(cluster.two, web.ip, "one", kind=kind)
        reaches(cluster.outside, web.ingress, "one", "far", kind=kind)
    web.served_by("far")
    for kind in (STREAM, DATAGRAM):
        reaches(cluster.two, web.ip, SILENT, kind=kind)
    web.served_by()
    reaches(cluster.two, web.ip, REFUSED)


def test_respect_internal_traffic_policy_local_pod_with_host_network_to_pod(cluster: Cluster) -> None:
    web = cluster.service(**LOCAL_INSIDE)
    web.served_by("one", "far")
    reaches(cluster.host, web.ip, "one")
    web.served_by("far")
    reaches(cluster.host, web.ip, SILENT)


def test_respect_internal_traffic_policy_local_pod_and_node_to_pod_with_host_network(cluster: Cluster) -> None:
    web = cluster.service(**LOCAL_INSIDE)
    web.served_by("host", "far")
    for client in (cluster.one, cluster.host):
        reaches(client, web.ip, "host")


# Terminating endpoints


@pytest.mark.parametrize("policy", ["Local", "Cluster"])
def test_fallback_to_terminating_endpoints_with_external_traffic_policy(cluster: Cluster, policy: str) -> None:
    """fallback to (local) terminating endpoints when there are no ready endpoints."""
    local = policy == "Local"
    web = cluster.service(externalTrafficPolicy=policy)
    web.served_by(terminating("one"), terminating("far"))
    reaches(cluster.outside, web.ingress, *(["one"] if local else ["one", "far"]))
    reaches(cluster.outside, ADDRESSES["host"], *(["one"] if local else ["one", "far"]), number=web.node_port)
    web.served_by(terminating("one"), endpoint("far"))
    reaches(cluster.outside, web.ingress, "one" if local else "far")
    web.served_by(terminating("one"), endpoint("two"), endpoint("far"))
    reaches(cluster.outside, web.ingress, *(["two"] if local else ["two", "far"]))


@pytest.mark.parametrize("policy", ["Local", "Cluster"])
def test_fallback_to_terminating_endpoints_with_internal_traffic_policy(cluster: Cluster, policy: str) -> None:
    local = policy == "Local"
    web = cluster.service(internalTrafficPolicy=policy)
    web.served_by(terminating("one"), terminating("far"))
    reaches(cluster.two, web.ip, *(["one"] if local else ["one", "far"]))
    web.served_by(terminating("one"), endpoint("far"))
    reaches(cluster.two, web.ip, "one" if local else "far")


def test_fail_health_check_node_port_if_there_are_only_terminating_endpoints(cluster: Cluster) -> None:
    web = cluster.service(**LOCAL_OUTSIDE, healthCheckNodePort=31999)
    web.served_by("one")
    eventually(lambda: health_check(cluster, 31999) == (200, 1))
    web.served_by(terminating("one"), endpoint("far"))
    eventually(lambda: health_check(cluster, 31999) == (503, 0))
    web.delete()
    eventually(lambda: health_check(cluster, 31999) == (0, 0))


def health_check(cluster: Cluster, number: int) -> tuple[int, int]:
    """Status and local endpoints; zeros where nobody answers."""
    command = f"curl -s -m 2 -w %{{http_code}} http://{ADDRESSES['host']}:{number}/"
    text, status = (found := cluster.outside.run(command, check=False))[:-3], found[-3:]
    return int(status), json.loads(text)["localEndpoints"] if text else 0


# Nearness


def test_topology_hints(cluster: Cluster) -> None:
    """distribute endpoints evenly: to each zone its own, as long as hints tell whose each is."""
    web = cluster.service()
    web.served_by(endpoint("one", hints=["zone-a"]), endpoint("far", hints=["zone-b"]))
    reaches(cluster.two, web.ip, "one")
    cluster.api.put(node_object("zone-b"))
    reaches(cluster.two, web.ip, "far")
    cluster.api.put(node_object())
    web.served_by(endpoint("one", hints=["zone-a"]), endpoint("far"))
    reaches(cluster.two, web.ip, "one", "far")


@pytest.mark.parametrize("distribution", ["PreferClose", "PreferSameZone", "PreferSameNode"])
def test_route_traffic_to_an_endpoint_in_the_same_zone_when_using(cluster: Cluster, distribution: str) -> None:
    web = cluster.service(trafficDistribution=distribution)
    web.served_by(endpoint("one", zone="zone-a"), endpoint("far", zone="zone-b"))
    reaches(cluster.two, web.ip, "one")
    web.served_by(endpoint("far", zone="zone-b"))
    reaches(cluster.two, web.ip, "far")


# Slices


def test_support_a_service_with_multiple_ports_specified_in_multiple_endpoint_slices(cluster: Cluster) -> None:
    web = cluster.service(ports=[port(80, name="a"), port(81, name="b")])
    web.served_by("one", "two", slice_name="a", ports={"a": PORT})
    web.served_by("one", "two", slice_name="b", ports={"b": OTHER_PORT})
    for number in (80, 81):
        reaches(cluster.far, web.ip, "one", "two", number=number)


def test_support_a_service_with_multiple_endpoint_ips_specified_in_multiple_endpoint_slices(cluster: Cluster) -> None:
    web = cluster.service()
    web.served_by("one", slice_name="a")
    web.served_by("two", slice_name="b")
    web.served_by("far", slice_name="c")
    reaches(cluster.host, web.ip, "one", "two", "far")


def test_mirror_a_custom_endpoint_with_multiple_subsets_and_same_ip_address(cluster: Cluster) -> None:
    """The mirror makes a slice of each subset: one address, another port in each."""
    web = cluster.service(ports=[port(80, name="a"), port(81, name="b")])
    for name, number in (("a", PORT), ("b", OTHER_PORT)):
        mirrored = {"endpointslice.kubernetes.io/managed-by": "endpointslicemirroring-controller.k8s.io"}
        web.served_by("one", slice_name=name, ports={name: number}, labels=mirrored)
    for number in (80, 81):
        reaches(cluster.two, web.ip, "one", number=number)


# What goes away and comes back


def test_work_after_restarting_apiserver(cluster: Cluster) -> None:
    web = served(cluster, "one")
    cluster.api.away()
    reaches(cluster.two, web.ip, "one")
    with cluster.host.entered():
        cluster.api.back()
    later = cluster.service()
    later.served_by("two")
    reaches(cluster.two, later.ip, "two")
    reaches(cluster.two, web.ip, "one")


def test_work_after_restarting_kube_proxy(cluster: Cluster) -> None:
    web = served(cluster, "one")
    assert cluster.node.stop() == 0
    cluster.node.start(*FLAGS)
    reaches(cluster.two, web.ip, "one")
    reaches(cluster.outside, ADDRESSES["host"], "one", number=web.node_port)
