"""Shapes are taken as they come; what is in their leaves is not yet looked at."""

from __future__ import annotations

import msgspec
import pytest

from userspace_proxy.sources.shapes import EndpointSliceShape, ServiceShape


def test_what_does_not_matter_is_passed_over_and_leaves_may_hold_anything() -> None:
    found = msgspec.convert({"kind": "Service", "spec": {"clusterIP": 7, "selector": {}}}, ServiceShape)
    assert found.spec is not None
    assert found.spec.cluster_ip == 7
    assert found.spec.external_traffic_policy is None
    assert found.metadata is None


def test_a_branch_that_is_none_is_told_with_its_path() -> None:
    with pytest.raises(msgspec.ValidationError, match=r"endpoints\[0\]\.hints\.forZones"):
        msgspec.convert({"endpoints": [{"hints": {"forZones": "a"}}]}, EndpointSliceShape)
