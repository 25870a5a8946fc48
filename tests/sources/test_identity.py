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
