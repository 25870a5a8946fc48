from __future__ import annotations

import pytest

from tests.sources.objects import endpoint_slice, endpoints, only, problems
from userspace_proxy.model import (
    Endpoint,
    ServicePortName,
)
from userspace_proxy.sources.endpoints import MAX_PAIRS
from userspace_proxy.sources.objects import decode


def test_names_are_not_looked_up():
    assert decode(endpoint_slice(addressType="FQDN", endpoints=[{"addresses": ["a.example"]}]), "f") is None


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


@pytest.mark.parametrize("number", [None, 0])
def test_a_port_without_a_number_is_passed_over(number):
    found = decode(endpoint_slice(ports=[{"name": "any", "port": number}, {"name": "http", "port": 8080}]), "f")
    assert list(found.endpoints) == [ServicePortName("default", "web", "http")]
    assert not decode(endpoint_slice(ports=[{}]), "f").endpoints


def test_a_port_without_a_name():
    value = endpoint_slice(ports=[{"name": None, "port": 1}])
    assert list(decode(value, "f").endpoints) == [ServicePortName("default", "web", "")]


def test_one_port_of_a_slice_may_be_without_a_name():
    ports = [{"name": "", "port": 8080}, {"name": "metrics", "port": 9090}]
    found = decode(endpoint_slice(ports=ports), "f").endpoints
    assert {name.port: [str(e) for e in listed] for name, listed in found.items()} == {
        "": ["10.1.0.1:8080"],
        "metrics": ["10.1.0.1:9090"],
    }
    for another in ({"port": 8081}, {"name": "metrics", "port": 8081}):
        (problem,) = problems(endpoint_slice(ports=[*ports, another]))
        assert problem.startswith("ports[2].name: found ")
        assert problem.endswith("allowed: a name that no other port has")


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
        ({"ports": [{"name": "a", "port": -1}]}, "ports[0].port: found -1"),
        ({"ports": [{"name": "a", "port": False}]}, "ports[0].port: found false"),
    ],
)
def test_slices_that_are_refused(changes, problem):
    (found,) = problems(endpoint_slice(**changes))
    assert found.startswith(problem)


def test_loopback_endpoints_where_they_are_allowed():
    value = endpoint_slice(endpoints=[{"addresses": ["127.0.0.1"]}])
    assert only(value, allow_loopback=True) == (Endpoint("127.0.0.1", 8080),)


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
