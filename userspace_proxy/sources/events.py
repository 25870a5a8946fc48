"""What this proxy tells the cluster about itself, as kube-proxy does: a few Events that `kubectl get events` shows.

Nobody waits for one and nothing depends on it. Those that cannot be written are tried again for a while and then
forgotten, and of many at once the later ones are. What is worth an Event is decided by who calls `tell`.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
from collections.abc import Callable
from typing import Any

from userspace_proxy.exceptions import APIError
from userspace_proxy.sources.base import Event
from userspace_proxy.sources.connection import Connection

logger = logging.getLogger(__name__)

REPORTER = "userspace-proxy"
WAITING = 64
TRIES = 12
PAUSE = 10.0
"""Seconds between two tries, kube-proxy's."""
LONGEST_NOTE = 1024


class Events:
    """`now` is the wall clock, `node` the name of this one."""

    def __init__(
        self, connection: Connection, node: str, now: Callable[[], datetime.datetime], *, pause: float = PAUSE
    ) -> None:
        self._connection = connection
        self._node = node
        self._now = now
        self._pause = pause
        self._waiting: asyncio.Queue[tuple[str, dict[str, Any]]] = asyncio.Queue(WAITING)

    def tell(self, event: Event) -> None:
        path, value = written(event, self._node, self._now())
        try:
            self._waiting.put_nowait((path, value))
        except asyncio.QueueFull:
            logger.debug("too many events wait to be written; forgotten: %s", event)

    async def run(self) -> None:
        """Write what there is to tell, one after the other, until cancelled."""
        while True:
            await self._write(*await self._waiting.get())

    async def _write(self, path: str, value: dict[str, Any]) -> None:
        for left in reversed(range(TRIES)):
            try:
                async with self._connection.request(path, {}, value) as response:
                    if response.status >= 400:
                        logger.info(
                            "the API server takes no event (%d); this node's account should be allowed to create "
                            "events of the group events.k8s.io",
                            response.status,
                        )
                return
            except APIError as error:
                logger.debug("an event cannot be written, %d tries are left: %s", left, error)
            if left:
                await asyncio.sleep(self._pause)


def written(event: Event, node: str, now: datetime.datetime) -> tuple[str, dict[str, Any]]:
    """Where to write it, and what."""
    namespace = event.namespace or "default"
    name = event.service or node
    # kube-proxy's way to speak of its node: no namespace, and the name for an ID.
    regarding = {"kind": "Service", "namespace": namespace} if event.service else {"kind": "Node", "uid": node}
    microseconds = int(now.timestamp()) * 1_000_000 + now.microsecond
    return f"/apis/events.k8s.io/v1/namespaces/{namespace}/events", {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": f"{name}.{microseconds * 1000:x}", "namespace": namespace},
        "eventTime": f"{now:%Y-%m-%dT%H:%M:%S.%fZ}",
        "reportingController": REPORTER,
        "reportingInstance": f"{REPORTER}-{node}",
        "type": "Warning" if event.warning else "Normal",
        "reason": event.reason,
        "action": event.action,
        "note": event.note[:LONGEST_NOTE],
        "regarding": {**regarding, "name": name},
    }
