from __future__ import annotations

import copy

import pytest

from userspace_proxy.exceptions import ObjectError
from userspace_proxy.model import (
    Endpoint,
    Preference,
    Protocol,
    ProxyProtocol,
    ServicePort,
    ServicePortName,
    SessionAffinity,
    TrafficPolicy,
)
from userspace_proxy.sources.objects import MAX_PAIRS, Identity, Service, decode, identify, is_other_kind, unpack


def service(**spec):
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web", "namespace": "shop", "uid": "is not looked at"},
        "spec": {"clusterIP": "10.96.0.1", "ports": [{"name": "http", "port": 80}], **spec},
    }


def endpoint_slice(**changes):
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": "web-1.x", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080}],
        "endpoints": [{"addresses": ["10.1.0.1"]}],
        **changes,
    }


def endpoints(*subsets):
    return {"apiVersion": "v1", "kind": "Endpoints", "metadata": {"name": "web"}, "subsets": list(subsets)}


def only(value, **options):
    """The one service port, or the endpoints of the one port, that an object has."""
    found = decode(value, "f", **options)
    (value,) = (found.ports if isinstance(found, Service) else found.endpoints).values()
    return value


def problems(value, **options):
    with pytest.raises(ObjectError) as caught:
        decode(value, "some.yaml", **options)
    assert caught.value.where == "some.yaml"
    return caught.value.problems


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


def test_the_namespace_is_default_where_none_is_given():
    value = service()
    del value["metadata"]["namespace"]
    assert decode(value, "f").identity.namespace == "default"


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


@pytest.mark.parametrize("label", ["service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless"])
@pytest.mark.parametrize("value", [service(), endpoint_slice(), endpoints()], ids=["Service", "slice", "Endpoints"])
def test_labels_that_take_an_object_away(value, label):
    value = copy.deepcopy(value)
    value["metadata"].setdefault("labels", {})[label] = ""
    assert decode(value, "f") is None


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


def test_all_problems_at_once():
    value = service(externalIPs=["x"], ports=[{"name": "A", "port": 0, "protocol": "Z"}], sessionAffinity="y")
    value["apiVersion"] = "v2"
    value["metadata"]["name"] = "Web"
    fields = [problem.partition(":")[0] for problem in problems(value)]
    assert sorted(fields) == [
        "apiVersion",
        "metadata.name",
        "spec.externalIPs[0]",
        "spec.ports[0].name",
        "spec.ports[0].port",
        "spec.ports[0].protocol",
        "spec.sessionAffinity",
    ]


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


def test_names_are_not_looked_up():
    assert decode(endpoint_slice(addressType="FQDN", endpoints=[{"addresses": ["a.example"]}]), "f") is None


def test_what_has_not_its_shape_does_not_hide_other_problems():
    ports = [80, *({"name": f"p{i}", "port": 1000 + i} for i in range(1, 10)), {"name": "p10", "port": 70000}, "81"]
    assert list(problems(service(ports=ports, sessionAffinity="sticky", externalIPs="10.0.0.1"))) == [
        "spec.ports[0]: found int; allowed: a mapping",
        "spec.ports[11]: found str; allowed: a mapping",
        "spec.externalIPs: found str; allowed: a list",
        "spec.sessionAffinity: found 'sticky'; allowed: None, ClientIP",
        "spec.ports[10].port: found 70000; allowed: a number from 1 to 65535",
    ]


def test_a_slice_and_its_conditions():
    conditions = [None, {}, {"ready": None, "serving": None}, {"ready": False}, {"ready": False, "terminating": True}]
    value = endpoint_slice(
        endpoints=[{"addresses": [f"10.1.0.{i}"], "conditions": c} for i, c in enumerate(conditions)]
    )
    assert [(e.ready, e.serving, e.terminating) for e in only(value)] == [
        (True, True, False),
        (True, True, False),
        (True, True, False),
        (False, True, False),
        (False, True, True),
    ]
    assert decode(value, "f").service == ("default", "web")


def test_each_port_of_a_slice_has_each_endpoint():
    value = endpoint_slice(
        ports=[{"name": "a", "port": 1}, {"name": "b", "port": 2, "protocol": "UDP"}],
        endpoints=[{"addresses": ["10.1.0.1"]}, {"addresses": ["10.1.0.2"]}],
    )
    found = decode(value, "f").endpoints
    assert {name.port: [str(e) for e in listed] for name, listed in found.items()} == {
        "a": ["10.1.0.1:1", "10.1.0.2:1"],
        "b": ["10.1.0.1:2", "10.1.0.2:2"],
    }


def test_of_an_endpoint_the_first_address_is_used_and_others_are_not_looked_at(caplog):
    caplog.set_level("INFO")
    assert only(endpoint_slice(endpoints=[{"addresses": ["10.1.0.1", "10.1.0.2", "::"]}])) == (
        Endpoint("10.1.0.1", 8080),
    )
    (said,) = caplog.messages
    assert said.startswith("EndpointSlice default/web-1.x: of 1 endpoints only the first address is used; write")


@pytest.mark.parametrize("count", [MAX_PAIRS // 100, MAX_PAIRS // 100 + 1])
def test_the_pairs_of_addresses_and_ports_are_limited(count):
    ports = [{"name": f"p{i}", "port": 1 + i} for i in range(100)]
    addresses = [f"10.1.{i >> 8}.{i & 255}" for i in range(count)]
    a_slice = endpoint_slice(ports=ports, endpoints=[{"addresses": [ip]} for ip in addresses])
    half = {"addresses": [{"ip": ip} for ip in addresses[::2]], "notReadyAddresses": [], "ports": ports}
    other = {"addresses": [], "notReadyAddresses": [{"ip": ip} for ip in addresses[1::2]], "ports": ports}
    for value, field in ((a_slice, "endpoints"), (endpoints(half, other), "subsets")):
        if count * 100 <= MAX_PAIRS:
            assert sum(map(len, decode(value, "f").endpoints.values())) == MAX_PAIRS
        else:
            (found,) = problems(value)
            assert found == (
                f"{field}: found {count * 100}; allowed: at most {MAX_PAIRS} pairs of an address and a port; "
                "write several objects"
            )


def test_a_port_without_a_number_is_passed_over():
    found = decode(endpoint_slice(ports=[{"name": "any"}, {"name": "http", "port": 8080}]), "f")
    assert list(found.endpoints) == [ServicePortName("default", "web", "http")]
    assert not decode(endpoint_slice(ports=[{}]), "f").endpoints


def test_a_port_without_a_name():
    value = endpoint_slice(ports=[{"name": None, "port": 1}])
    assert list(decode(value, "f").endpoints) == [ServicePortName("default", "web", "")]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"addressType": "IPX"}, "addressType: found 'IPX'; allowed: IPv4, IPv6"),
        ({"addressType": "IPv6"}, "endpoints[0].addresses[0]: found '10.1.0.1'; allowed: IPv6, as addressType says"),
        ({"apiVersion": "discovery.k8s.io/v1beta1"}, "apiVersion: found 'discovery.k8s.io/v1beta1'"),
        ({"metadata": {"name": "x"}}, "metadata.labels[kubernetes.io/service-name]: found nothing"),
        ({"endpoints": [{"addresses": ["127.0.0.1"]}]}, "endpoints[0].addresses[0]: found '127.0.0.1 (loopback)'"),
        ({"endpoints": [{"addresses": []}]}, "endpoints[0].addresses: found []; allowed: at least one"),
        ({"endpoints": [{"addresses": ["10.1.0.1"], "conditions": {"ready": "no"}}]}, "endpoints[0].conditions.ready"),
        ({"ports": [{"name": "a", "port": 0}]}, "ports[0].port: found 0"),
    ],
)
def test_slices_that_are_refused(changes, problem):
    (found,) = problems(endpoint_slice(**changes))
    assert found.startswith(problem)


def test_loopback_endpoints_where_they_are_allowed():
    value = endpoint_slice(endpoints=[{"addresses": ["127.0.0.1"]}])
    assert only(value, allow_loopback=True) == (Endpoint("127.0.0.1", 8080),)


@pytest.mark.parametrize("ip", ["127.0.0.1", "::1"])
def test_loopback_addresses_are_never_captured_from_outside(ip):
    found = problems(service(externalIPs=[ip]), allow_loopback=True)
    assert f"spec.externalIPs[0]: found '{ip} (loopback)'" in found[0]


def test_an_endpoints_object():
    value = endpoints(
        {"addresses": [{"ip": "10.1.0.1"}], "notReadyAddresses": [{"ip": "10.1.0.2"}], "ports": [{"port": 80}]},
        {"addresses": [{"ip": "fd00::1"}], "ports": [{"port": 81}]},
    )
    assert only(value) == (
        Endpoint("10.1.0.1", 80),
        Endpoint("10.1.0.2", 80, ready=False, serving=False),
        Endpoint("fd00::1", 81),
    )


def test_endpoints_that_are_refused():
    value = endpoints({"addresses": [{"ip": "0.0.0.0"}, {}], "ports": [{"port": 80}, {"port": 81}]})
    fields = [problem.partition(":")[0] for problem in problems(value)]
    assert fields == [
        "subsets[0].ports[0].name",
        "subsets[0].ports[1].name",
        "subsets[0].addresses[0].ip",
        "subsets[0].addresses[1].ip",
    ]


@pytest.mark.parametrize("value", [None, "text", 5, [], {}, {"kind": 5}, {"kind": "Service"}, {"apiVersion": "v1"}])
def test_what_is_no_object_is_refused(value):
    assert problems(value)


@pytest.mark.parametrize(
    ("api_version", "kind"), [("apps/v1", "Deployment"), ("serving.knative.dev/v1", "Service"), ("v1", "Pod")]
)
def test_other_kinds_are_skipped(api_version, kind):
    value = {"apiVersion": api_version, "kind": kind, "metadata": {"name": "x"}}
    assert is_other_kind(value)
    assert decode(value, "f") is None


def test_lists():
    pod = {"apiVersion": "v1", "kind": "Pod"}
    assert list(unpack({"kind": "List", "apiVersion": "v1", "items": [service(), pod]})) == [service(), pod]
    bare = service()
    del bare["kind"], bare["apiVersion"]
    assert list(unpack({"kind": "ServiceList", "apiVersion": "v1", "items": [bare]})) == [service()]
    assert list(unpack(service())) == [service()]
    (broken,) = unpack({"kind": "List", "apiVersion": "v1", "items": "none"})
    assert "items: found 'none'; allowed: a list of objects" in problems(broken)[0]
    (inner,) = unpack(
        {"kind": "List", "apiVersion": "v1", "items": [{"kind": "List", "apiVersion": "v1", "items": []}]}
    )
    assert "not of Lists" in problems(inner)[0]


@pytest.mark.parametrize(
    "value",
    [None, {}, {"kind": "Pod"}, {"kind": "Service"}, {"kind": "Service", "metadata": {"name": 5}}],
)
def test_identify_gives_none_where_it_cannot_tell(value):
    assert identify(value) is None


def test_identify_tells_even_of_what_will_be_refused():
    assert identify({"kind": "Service", "metadata": {"name": "Bad"}}) == Identity("Service", "default", "Bad")


def test_policies_and_what_goes_with_them():
    value = service()
    value["spec"] = {
        "type": "LoadBalancer",
        "clusterIP": "10.96.0.1",
        "ports": [{"name": "http", "port": 80, "nodePort": 30080}],
        "internalTrafficPolicy": "Local",
        "externalTrafficPolicy": "Local",
        "loadBalancerSourceRanges": [" 192.0.2.0/24", "2001:DB8::/32", "192.0.2.9/24"],
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


def test_where_endpoints_are_and_whom_they_are_meant_for():
    value = endpoint_slice(
        endpoints=[
            {
                "addresses": ["10.1.0.1"],
                "nodeName": "node-1",
                "zone": "a",
                "hints": {"forZones": [{"name": "a"}, {"name": "b"}], "forNodes": [{"name": "node-2"}]},
            },
            {"addresses": ["10.1.0.2"], "nodeName": None, "hints": {}},
        ]
    )
    assert only(value) == (
        Endpoint("10.1.0.1", 8080, node="node-1", zone="a", zone_hints=("a", "b"), node_hints=("node-2",)),
        Endpoint("10.1.0.2", 8080),
    )
    old = endpoints({"addresses": [{"ip": "10.1.0.1", "nodeName": "node-1"}], "ports": [{"port": 8080}]})
    assert only(old) == (Endpoint("10.1.0.1", 8080, node="node-1"),)


def test_whereabouts_that_are_no_text_are_refused():
    value = endpoint_slice(
        endpoints=[{"addresses": ["10.1.0.1"], "nodeName": 1, "zone": True, "hints": {"forZones": [{"name": 5}, {}]}}]
    )
    assert list(problems(value)) == [
        "endpoints[0].nodeName: found 1; allowed: text",
        "endpoints[0].zone: found true; allowed: text",
        "endpoints[0].hints.forZones[0].name: found 5; allowed: text",
        "endpoints[0].hints.forZones[1].name: found nothing; allowed: text",
    ]
