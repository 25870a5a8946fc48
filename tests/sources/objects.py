"""Kubernetes objects as tests write them, and what is read of one."""

from __future__ import annotations

import pytest

from userspace_proxy.exceptions import ObjectError
from userspace_proxy.sources.objects import decode
from userspace_proxy.sources.services import Service


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
