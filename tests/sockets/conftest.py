from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.conftest import LOOPS
from tests.proxy import ProxyThread, no_descriptor_left
from userspace_proxy.model import IPFamily, Protocol

Start = Callable[..., ProxyThread]

also_with_workers = pytest.mark.parametrize("variant", ["asyncio", "uvloop", "2 workers"], indirect=True)
"""For tests of what clients see and /metrics tells, which must not depend on how many processes relay."""


@pytest.fixture(params=["asyncio", "uvloop"])
def variant(request: pytest.FixtureRequest) -> tuple[str, int]:
    """A loop, and a number of processes."""
    return ("uvloop", 2) if request.param == "2 workers" else (request.param, 1)


@pytest.fixture(params=IPFamily, ids=lambda family: family.value)
def family(request: pytest.FixtureRequest) -> IPFamily:
    value: IPFamily = request.param
    return value


@pytest.fixture
def start(variant: tuple[str, int]) -> Iterator[Start]:
    """Start proxy sockets; every one of them is stopped again and must have kept no descriptor."""
    loop, workers = variant
    running: list[ProxyThread] = []

    def start(protocol: Protocol, family: IPFamily, endpoints: Any, **options: Any) -> ProxyThread:
        proxy = ProxyThread(LOOPS[loop], protocol, family, endpoints, workers=workers, **options)
        running.append(proxy)
        return proxy

    with no_descriptor_left():
        yield start
        for proxy in running:
            proxy.stop()
    for proxy in running:
        assert proxy.metrics.descriptors_in_use() == 0
        assert proxy.counts.active == 0
