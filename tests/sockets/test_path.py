"""What one process relays with, put together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from userspace_proxy.metrics import Metrics
from userspace_proxy.model import Protocol
from userspace_proxy.sockets.path import DataPath, RelaySettings


def test_sessions_get_what_proxy_sockets_leave(run: Callable[[Coroutine[Any, Any, Any]], Any]) -> None:
    async def main() -> None:
        metrics = Metrics()
        path = DataPath(RelaySettings(100, True, 300.0, 0.25, 10), metrics)
        assert set(path.sockets) == set(Protocol)
        assert path.descriptors.take(100)
        assert not path.descriptors.take(1)
        assert metrics.descriptors_in_use() == 100
        path.descriptors.give(100)
        path.fit(30)
        assert path.descriptors.limit == 70
        path.fit(1000)
        assert path.descriptors.limit == 2, "one connection at a time, rather than none"
        assert await path.sessions() == []
        await path.count()
        await path.close()
        await asyncio.sleep(0)

    run(main())
