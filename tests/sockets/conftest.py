from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.proxy import ProxyThread, no_descriptor_left
from userspace_proxy.model import IPFamily, Protocol

Start = Callable[..., ProxyThread]


@pytest.fixture(params=IPFamily, ids=lambda family: family.value)
def family(request: pytest.FixtureRequest) -> IPFamily:
    value: IPFamily = request.param
    return value


@pytest.fixture
def start(loop_factory: Callable[[], asyncio.AbstractEventLoop]) -> Iterator[Start]:
    """Start proxy sockets; every one of them is stopped again and must have kept no descriptor."""
    running: list[ProxyThread] = []

    def start(protocol: Protocol, family: IPFamily, endpoints: Any, **options: Any) -> ProxyThread:
        proxy = ProxyThread(loop_factory, protocol, family, endpoints, **options)
        running.append(proxy)
        return proxy

    with no_descriptor_left():
        yield start
        for proxy in running:
            proxy.stop()
    for proxy in running:
        assert proxy.descriptors.used == 0
        assert proxy.counts.active == 0
