"""Shapes are taken as they come; what is in their leaves is not yet looked at."""

from __future__ import annotations

import subprocess
import sys

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


FIRST_OF_ALL = """
import sys, threading
import msgspec
from userspace_proxy.sources import answers, saved, shapes

sys.setswitchinterval(1e-6)
together = threading.Barrier(4)

def meet():
    together.wait()
    for struct in (answers._Page, shapes.ServiceShape, saved._Header, shapes.EndpointSliceShape, shapes.EndpointsShape):
        try:
            msgspec.json.decode(b'{"metadata": {}}', type=struct)
        except msgspec.ValidationError:
            pass

threads = [threading.Thread(target=meet) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


@pytest.mark.parametrize("_time", range(10))
def test_threads_that_read_first_of_all_and_at_once_end_nobody(_time: int) -> None:
    assert subprocess.run([sys.executable, "-c", FIRST_OF_ALL], timeout=60, check=False).returncode == 0
