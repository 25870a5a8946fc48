from __future__ import annotations

import copy
import logging

import pytest

from tests.sources.objects import endpoint_slice, endpoints, problems, service
from userspace_proxy.sources.objects import decode


def test_the_namespace_is_default_where_none_is_given():
    value = service()
    del value["metadata"]["namespace"]
    assert decode(value, "f").identity.namespace == "default"


@pytest.mark.parametrize("label", ["service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless"])
@pytest.mark.parametrize("value", [service(), endpoint_slice(), endpoints()], ids=["Service", "slice", "Endpoints"])
def test_labels_that_take_an_object_away(value, label):
    value = copy.deepcopy(value)
    value["metadata"].setdefault("labels", {})[label] = ""
    assert decode(value, "f") is None


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


def test_what_has_not_its_shape_does_not_hide_other_problems():
    ports = [80, *({"name": f"p{i}", "port": 1000 + i} for i in range(1, 10)), {"name": "p10", "port": 70000}, "81"]
    assert list(problems(service(ports=ports, sessionAffinity="sticky", externalIPs="10.0.0.1"))) == [
        "spec.ports[0]: found int; allowed: a mapping",
        "spec.ports[11]: found str; allowed: a mapping",
        "spec.externalIPs: found str; allowed: a list",
        "spec.sessionAffinity: found 'sticky'; allowed: None, ClientIP",
        "spec.ports[10].port: found 70000; allowed: a number from 1 to 65535",
    ]


@pytest.mark.parametrize("wrong", [{"type": "clusterip"}, {"externalIPs": "10.0.0.1"}, None])
def test_what_is_refused_is_not_said_to_be_left_out_as_well(wrong, caplog):
    """Its last good version may well be served."""
    caplog.set_level(logging.INFO)
    value = service(**(wrong or {}))
    del value["spec"]["clusterIP"]
    if wrong:
        assert problems(value)
    else:
        assert decode(value, "f") is None
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == (
        [] if wrong else ["Service shop/web: not served, it has no clusterIP"]
    )


@pytest.mark.parametrize("value", [None, "text", 5, [], {}, {"kind": 5}, {"kind": "Service"}, {"apiVersion": "v1"}])
def test_what_is_no_object_is_refused(value):
    assert problems(value)
