from __future__ import annotations

import pytest

from tests.sources.objects import problems, service
from userspace_proxy.sources.identity import Identity, identify, is_other_kind, unpack
from userspace_proxy.sources.objects import decode


@pytest.mark.parametrize(
    ("api_version", "kind"), [("apps/v1", "Deployment"), ("serving.knative.dev/v1", "Service"), ("v1", "Pod")]
)
def test_other_kinds_are_skipped(api_version, kind):
    value = {"apiVersion": api_version, "kind": kind, "metadata": {"name": "x"}}
    assert is_other_kind(value)
    assert decode(value, "f") is None


@pytest.mark.parametrize(
    ("api_version", "kind", "meant"),
    [
        ("v1", "service", "Service"),
        ("v1", "ENDPOINTS", "Endpoints"),
        ("discovery.k8s.io/v1", "Endpointslice", "EndpointSlice"),
        ("v1", "list", "List"),
        ("v1", "Servicelist", "ServiceList"),
        ("discovery.k8s.io/v1", "endpointSliceList", "EndpointSliceList"),
    ],
)
def test_a_kind_in_the_wrong_case_is_refused_and_not_passed_over(api_version, kind, meant):
    value = {"apiVersion": api_version, "kind": kind, "metadata": {"name": "x"}}
    assert not is_other_kind(value)
    assert problems(value) == (f"kind: found '{kind}'; allowed: {meant}, in this very case",)
    assert identify(value) == (None if meant.endswith("List") else Identity(meant, "default", "x"))


def test_another_groups_kind_may_be_spelled_as_it_likes():
    assert is_other_kind({"apiVersion": "serving.knative.dev/v1", "kind": "service"})


def test_a_group_in_the_wrong_case_is_refused():
    value = {"apiVersion": "Discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": {"name": "x"}}
    assert "allowed: discovery.k8s.io/v1" in problems(value)[0].replace("'", "")


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
