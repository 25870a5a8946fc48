"""The contract of a source.

A source owns the reading and watching of Kubernetes objects and hands over whole, immutable
Snapshots. It never hands over a part: the first one comes when everything has been listed once. What
Services mean is decided in `sources.objects` and `sources.store`; what is done about them, in `proxier`.
"""

from __future__ import annotations

import asyncio
import typing
from collections.abc import Callable
from dataclasses import dataclass

from userspace_proxy.model import Snapshot

Publish = Callable[[Snapshot], None]
"""Called on the event loop's thread with each new state, oldest first. It must not block."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that a cluster should hear of: about this node, or about a Service."""

    reason: str
    action: str
    note: str
    warning: bool = False
    namespace: str = ""
    service: str = ""
    """Empty: it is about the node."""


@dataclass(frozen=True, slots=True)
class Told:
    """What an API server has told, or a saved state of it, for the source that comes after."""

    server: str
    """Named by where it was configured to be."""
    snapshot: Snapshot
    """With the node that it was told to."""


class Source(typing.Protocol):
    @property
    def problems(self) -> tuple[str, ...]:
        """Objects that are refused at present, one line each."""

    @property
    def told(self) -> Told | None:
        """What was published last, where another source cannot just read it anew."""

    async def run(self, publish: Publish) -> None:
        """Publish snapshots until cancelled. Raises only what makes going on pointless (ConfigError)."""

    def reload(self) -> None:
        """Read everything anew and publish it, even where no change was noticed (SIGHUP)."""

    def tell(self, event: Event) -> None:
        """Have the cluster hear of something, where there is one; at once, later, or never."""


async def first(source: Source) -> Snapshot:
    """What a source publishes first. What its `run` raises comes in an ExceptionGroup."""
    found: asyncio.Future[Snapshot] = asyncio.get_running_loop().create_future()
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(
            source.run(lambda snapshot: None if found.done() else found.set_result(snapshot)), name="source"
        )
        snapshot = await found
        running.cancel()
    return snapshot
