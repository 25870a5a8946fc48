from __future__ import annotations

import pytest

from tests.sources.objects import only, problems, service
from userspace_proxy.model import (
    IPFamily,
    Preference,
    Protocol,
    ProxyProtocol,
    ServicePort,
    ServicePortName,
    SessionAffinity,
    TrafficPolicy,
)
from userspace_proxy.sources.identity import Identity
from userspace_proxy.sources.objects import decode


def test_a_service_with_defaults():
    found = decode(service(), "f")
    assert found.identity == Identity("Service", "shop", "web")
    assert found.ports == {ServicePortName("shop", "web", "http"): ServicePort(Protocol.TCP, 80, ("10.96.0.1",))}


def test_a_service_with_everything():
    value = service(
        type="LoadBalancer",
        clusterIPs=["010.96.0.1", "FD00::1"],
        clusterIP="010.96.0.1",
        externalIPs=["192.0.2.1", "192.0.2.1", "2001:db8::1"],
        sessionAffinity="ClientIP",
        sessionAffinityConfig={"clientIP": {"timeoutSeconds": 86400}},
        ports=[
            {"name": "a", "port": 53, "protocol": "udp", "nodePort": 30053},
            {"name": "b", "port": 53, "protocol": "TCP", "nodePort": 30053},
            {"name": "c", "port": 53, "protocol": "SCTP"},
        ],
    )
    value["status"] = {"loadBalancer": {"ingress": [{"ip": "192.0.2.9"}, {"hostname": "lb.example"}]}}
    found = list(decode(value, "f").ports.values())
    assert [port.protocol for port in found] == [Protocol.UDP, Protocol.TCP, Protocol.SCTP]
    assert found[0] == ServicePort(
        protocol=Protocol.UDP,
        port=53,
        cluster_ips=("10.96.0.1", "fd00::1"),
        node_port=30053,
        external_ips=("192.0.2.1", "2001:db8::1"),
        load_balancer_ips=("192.0.2.9",),
        affinity=SessionAffinity.CLIENT_IP,
        affinity_timeout=86400.0,
    )


def balanced(*ingress):
    return service(type="LoadBalancer") | {"status": {"loadBalancer": {"ingress": list(ingress)}}}


def test_addresses_that_a_load_balancer_wants_for_itself_are_told_apart():
    found = only(
        balanced(
            {"ip": "203.0.113.5", "ipMode": "Proxy"},
            {"ip": "203.0.113.6", "ipMode": "VIP"},
            {"ip": "203.0.113.7", "ipMode": None},
            {"ip": "203.0.113.8", "ipMode": "OfTheFuture"},
        )
    )
    assert found.load_balancer_ips == ("203.0.113.6", "203.0.113.7")
    assert found.proxied_ips == ("203.0.113.5", "203.0.113.8")
    captured = {portal.ip for portal in found.portals(IPFamily.IPV4)}
    assert captured == {"10.96.0.1", "203.0.113.6", "203.0.113.7"}


@pytest.mark.parametrize("ip", ["127.0.0.1", "169.254.1.1", "fe80::1", "::1", "0.0.0.0", "not an address", 7])
@pytest.mark.parametrize("mode", ["VIP", "Proxy"])
def test_an_address_in_the_status_that_cannot_be_captured_costs_nothing_else(ip, mode, caplog):
    found = only(balanced({"ip": ip, "ipMode": mode}, {"ip": "192.0.2.9"}, {"hostname": "lb.example"}))
    assert found == ServicePort(Protocol.TCP, 80, ("10.96.0.1",), load_balancer_ips=("192.0.2.9",))
    (said,) = caplog.messages
    assert said.startswith("f: Service shop/web: status.loadBalancer.ingress[0].ip: found ")
    assert said.endswith("it is passed over, and the rest served")


def test_a_load_balancer_that_has_a_name_only(caplog):
    assert only(balanced({"hostname": "lb.example"})) == ServicePort(Protocol.TCP, 80, ("10.96.0.1",))
    assert not caplog.messages


@pytest.mark.parametrize("status", [5, {"loadBalancer": []}, {"loadBalancer": {"ingress": "192.0.2.9"}}])
def test_a_status_without_its_shape_costs_nothing_else(status, caplog):
    assert only(service() | {"status": status}) == ServicePort(Protocol.TCP, 80, ("10.96.0.1",))
    assert "f: Service shop/web: status" in caplog.text
    (found,) = problems(service(externalIPs=[5]) | {"status": status})
    assert found.startswith("spec.externalIPs[0]"), "what the writer is to put right"


@pytest.mark.parametrize(
    "spec",
    [
        {"clusterIP": "None"},
        {"clusterIP": "", "clusterIPs": []},
        {"clusterIP": None},
        {"clusterIPs": ["None"], "clusterIP": "None"},
        {"type": "ExternalName", "externalName": "x.example"},
    ],
)
def test_services_without_anything_to_capture_are_skipped(spec):
    assert decode(service(**spec), "f") is None


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ({"type": "Clusterip"}, "spec.type: found 'Clusterip'; allowed: ClusterIP, NodePort"),
        ({"clusterIP": "10.96.0"}, "spec.clusterIP: found '10.96.0'; allowed: an IPv4 or IPv6 address"),
        ({"clusterIPs": ["10.96.0.1", "10.96.0.2"]}, "spec.clusterIPs: found ['10.96.0.1', '10.96.0.2']; allowed: one"),
        ({"clusterIPs": ["10.96.0.1", "fd00::1", "fd00::2"]}, "allowed: one address, or one of each family"),
        ({"clusterIPs": ["10.96.0.2"]}, "spec.clusterIP: found '10.96.0.1'; allowed: the first of spec.clusterIPs"),
        ({"externalIPs": ["169.254.0.1"]}, "spec.externalIPs[0]: found '169.254.0.1 (link-local)'"),
        ({"ports": []}, "spec.ports: found nothing; allowed: at least one port"),
        ({"ports": [{"port": 0}]}, "spec.ports[0].port: found 0; allowed: a number from 1 to 65535"),
        ({"ports": [{"port": "80"}]}, "spec.ports[0].port: found '80'"),
        ({"ports": [{"port": 80, "nodePort": 70000}]}, "spec.ports[0].nodePort: found 70000"),
        (
            {"ports": [{"port": 80, "protocol": "ICMP"}]},
            "spec.ports[0].protocol: found 'ICMP'; allowed: TCP, UDP, SCTP",
        ),
        ({"ports": [{"port": 80, "protocol": 6}]}, "spec.ports[0].protocol: found 6"),
        ({"ports": [{"port": 80, "name": "Http"}]}, "spec.ports[0].name: found 'Http'; allowed: lower-case"),
        ({"ports": [{"port": 80, "name": True}]}, "spec.ports[0].name: found true; allowed: text; put it in quotes"),
        ({"ports": [{"port": 80}, {"port": 81, "name": "b"}]}, "spec.ports[0].name: found nothing; allowed: a name"),
        ({"ports": [{"port": 80, "name": "a"}, {"port": 81, "name": "a"}]}, "spec.ports[1].name: found 'a'; allowed"),
        ({"ports": [{"port": 80, "name": "a"}, {"port": 80, "name": "b"}]}, "spec.ports[1].port: found 80; allowed: a"),
        ({"ports": "80"}, "spec.ports: found str; allowed: a list"),
        ({"ports": [80]}, "spec.ports[0]: found int; allowed: a mapping"),
        ({"sessionAffinity": "clientip"}, "spec.sessionAffinity: found 'clientip'; allowed: None, ClientIP"),
        (
            {"sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 86401}}},
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds: found 86401; allowed: a number from 1 to 86400",
        ),
    ],
)
def test_services_that_are_refused(spec, problem):
    (found,) = problems(service(**spec))
    assert found.startswith(problem) or problem in found


def annotated(**annotations):
    value = service()
    value["metadata"]["annotations"] = {
        f"userspace-proxy/{name.replace('_', '-')}": v for name, v in annotations.items()
    }
    return value


def test_how_clients_are_introduced():
    assert only(service()).proxy_protocol == ProxyProtocol()
    assert only(annotated(send_proxy_protocol="v2")).proxy_protocol == ProxyProtocol(2)
    found = only(
        annotated(send_proxy_protocol="none", accept_proxy_protocol_from="10.0.0.1/8, fd00::/8,")
    ).proxy_protocol
    assert found == ProxyProtocol(0, ("10.0.0.0/8", "fd00::/8"))


def test_introductions_that_are_refused():
    version, networks = problems(annotated(send_proxy_protocol="2", accept_proxy_protocol_from="anybody"))
    assert version == "metadata.annotations[userspace-proxy/send-proxy-protocol]: found '2'; allowed: none, v1, v2"
    assert networks.startswith(
        "metadata.annotations[userspace-proxy/accept-proxy-protocol-from]: found 'anybody'; allowed: a network, as "
    )
    (found,) = problems(annotated(accept_proxy_protocol_from=8))
    assert "found 8; allowed: networks" in found
    for version in (["v1"], {"a": 1}, 1):
        (found,) = problems(annotated(send_proxy_protocol=version))
        assert "allowed: none, v1, v2" in found


def test_a_distribution_that_is_no_text_is_none():
    assert only(service(trafficDistribution=16**5000)).preference is Preference.NONE


@pytest.mark.parametrize("ip", ["127.0.0.1", "::1"])
def test_loopback_addresses_are_never_captured_from_outside(ip):
    found = problems(service(externalIPs=[ip]), allow_loopback=True)
    assert f"spec.externalIPs[0]: found '{ip} (loopback)'" in found[0]


def test_policies_and_what_goes_with_them():
    value = service()
    value["spec"] = {
        "type": "LoadBalancer",
        "clusterIP": "10.96.0.1",
        "ports": [{"name": "http", "port": 80, "nodePort": 30080}],
        "internalTrafficPolicy": "Local",
        "externalTrafficPolicy": "Local",
        "loadBalancerSourceRanges": [" 192.0.02.0/24", "2001:DB8::/32", "192.0.2.9/24"],
        "healthCheckNodePort": 30100,
        "publishNotReadyAddresses": True,
        "trafficDistribution": "PreferClose",
    }
    assert only(value) == ServicePort(
        Protocol.TCP,
        80,
        ("10.96.0.1",),
        30080,
        internal_policy=TrafficPolicy.LOCAL,
        external_policy=TrafficPolicy.LOCAL,
        source_ranges=("192.0.2.0/24", "2001:db8::/32"),
        health_check_node_port=30100,
        publish_not_ready=True,
        preference=Preference.ZONE,
    )
    value["spec"]["externalTrafficPolicy"] = "Cluster"
    assert only(value).health_check_node_port == 0, "load balancers ask for local endpoints only"
    value["spec"]["type"] = "NodePort"
    assert only(value).source_ranges == (), "there is no load balancer"


@pytest.mark.parametrize(
    ("wish", "preference"),
    [
        (None, Preference.NONE),
        ("PreferClose", Preference.ZONE),
        ("PreferSameZone", Preference.ZONE),
        ("PreferSameNode", Preference.NODE),
        ("PreferSomethingOfTheFuture", Preference.NONE),
    ],
)
def test_what_a_service_prefers(wish, preference):
    value = service()
    value["spec"]["trafficDistribution"] = wish
    assert only(value).preference is preference


def test_what_is_refused_of_policies():
    value = service()
    value["spec"] |= {
        "type": "LoadBalancer",
        "internalTrafficPolicy": "Nearby",
        "externalTrafficPolicy": "Local",
        "loadBalancerSourceRanges": ["192.0.2.0/33", 7],
        "healthCheckNodePort": 70000,
    }
    assert list(problems(value)) == [
        "spec.internalTrafficPolicy: found 'Nearby'; allowed: Cluster, Local",
        "spec.loadBalancerSourceRanges[0]: found '192.0.2.0/33'; allowed: a network, as 192.0.2.0/24 or 2001:db8::/32",
        "spec.loadBalancerSourceRanges[1]: found 7; allowed: a network, as 192.0.2.0/24 or 2001:db8::/32",
        "spec.healthCheckNodePort: found 70000; allowed: a number from 0 to 65535",
    ]
