"""The contract of a source.

A source owns the reading and watching of Kubernetes objects and hands over whole, immutable
Snapshots. It never hands over a part: the first one comes when everything has been listed once. What
Services mean is decided in `sources.objects` and `sources.store`; what is done about them, in `proxier`.
"""

from __future__ import annotations

import typing
from collections.abc import Callable

from userspace_proxy.model import Snapshot

Publish = Callable[[Snapshot], None]
"""Called on the event loop's thread with each new state, oldest first. It must not block."""


class Source(typing.Protocol):
    @property
    def problems(self) -> tuple[str, ...]:
        """Objects that are refused at present, one line each."""

    async def run(self, publish: Publish) -> None:
        """Publish snapshots until cancelled. Raises only what makes going on pointless (ConfigError)."""

    def reload(self) -> None:
        """Read everything anew and publish it, even where no change was noticed (SIGHUP)."""
