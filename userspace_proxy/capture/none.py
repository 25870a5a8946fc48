"""No capture at all: for hosts without netfilter, for running without root, for looking at one proxy port.

Nothing is put into the kernel, so clients have to be told the proxy ports; the log and the table at
start name them.
"""

from __future__ import annotations

from collections.abc import Collection

from userspace_proxy.capture.base import Changes, Difference
from userspace_proxy.model import Protocol, Redirect


class NoCapture:
    """Captures nothing, and needs nothing."""

    name = "none"
    rewrites_destination = False
    listens = frozenset[Protocol]()

    async def start(self) -> None:
        """Works everywhere."""

    async def replace(self, redirects: Collection[Redirect], difference: Difference | None = None) -> Changes:
        return Changes()

    async def withdraw(self) -> None:
        """There is nothing to take back."""

    async def close(self) -> None:
        """There is nothing to leave behind."""
