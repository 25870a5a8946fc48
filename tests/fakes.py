"""Small stand-ins for the seams, where what is tested is on this side of them."""

from __future__ import annotations

from collections.abc import Callable, Collection

from userspace_proxy.capture.base import Changes, Difference
from userspace_proxy.exceptions import CaptureError
from userspace_proxy.model import Protocol, Redirect


class RecordingCapture:
    """Keeps what it was told, and fails on demand. Calls back before each change, as the kernel would see it."""

    name = "recording"
    rewrites_destination = True
    listens = frozenset[Protocol]()

    def __init__(self) -> None:
        self.redirects: frozenset[Redirect] = frozenset()
        self.calls = 0
        self.whole = 0
        """Calls that did not say what the difference is."""
        self.withdrawn = False
        self.error = ""
        self.on_replace: Callable[[frozenset[Redirect]], None] = lambda _: None

    async def start(self) -> None:
        self.redirects = frozenset()

    async def replace(self, redirects: Collection[Redirect], difference: Difference | None = None) -> Changes:
        self.calls += 1
        wanted = frozenset(redirects)
        if difference is None:
            self.whole += 1
        else:
            assert (self.redirects - set(difference.gone)) | set(difference.new) == wanted
            assert self.redirects >= set(difference.gone)
        self.on_replace(wanted)
        if self.error:
            raise CaptureError(self.error)
        changes = Changes(len(wanted - self.redirects), len(self.redirects - wanted))
        self.redirects = wanted
        return changes

    async def withdraw(self) -> None:
        self.redirects = frozenset()
        self.withdrawn = True

    async def close(self) -> None:
        self.redirects = frozenset()
