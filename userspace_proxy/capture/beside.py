"""Two captures side by side: one that redirects, and for the protocols whose NAT fails one that needs none.

The kernel's NAT of SCTP looks at single addresses, while the peers tell each other all that they have: from a node of
several addresses to itself no redirect works, and to others only some. So where there is SCTP its portals are listened
at, as `local` has it, beside the rules for everything else. What each does is its own business.
"""

from __future__ import annotations

from collections.abc import Collection
from operator import attrgetter

from userspace_proxy.capture.base import Capture, Changes, Difference
from userspace_proxy.exceptions import CaptureError
from userspace_proxy.model import Protocol, Redirect

_COUNTS = tuple(map(attrgetter, ("added", "removed", "repaired")))


class Beside:
    def __init__(self, capture: Capture, listening: Capture, protocols: Collection[Protocol]) -> None:
        """`listening` has these protocols, and its name is not told."""
        self.name = capture.name
        self.rewrites_destination = capture.rewrites_destination
        self.listens = frozenset(protocols)
        self._capture = capture
        self._listening = listening
        self._listened = 0
        """How many redirects are of these protocols: mostly none, and then nobody need look through thousands."""
        self._refused: dict[bool, tuple[str, ...]] = {}
        """By whether it is of those that are listened for."""

    async def start(self) -> None:
        """The one that listens first: it removes the remains of routes of every kind."""
        await self._listening.start()
        await self._capture.start()

    async def replace(self, redirects: Collection[Redirect], difference: Difference | None = None) -> Changes:
        new, gone = (difference.new, difference.gone) if difference else (redirects, ())
        self._listened = (self._listened if difference else 0) + self._count(new) - self._count(gone)
        done = [
            await self._replace(self._listening, True, redirects, difference),
            await self._replace(self._capture, False, redirects, difference),
        ]
        added, removed, repaired = (sum(map(count, done)) for count in _COUNTS)
        return Changes(added, removed, repaired, (*self._refused[False], *self._refused[True]))

    async def _replace(
        self, capture: Capture, listens: bool, redirects: Collection[Redirect], difference: Difference | None
    ) -> Changes:
        part = difference and Difference(self._of(listens, difference.gone), self._of(listens, difference.new))
        if part == Difference() != difference:
            return Changes()  # an empty one would ask for repairs
        own = self._of(listens, redirects) if self._listened else () if listens else redirects
        changes = await capture.replace(own, part)
        self._refused[listens] = changes.refused
        return changes

    def _count(self, redirects: Collection[Redirect]) -> int:
        return sum(redirect.portal.protocol in self.listens for redirect in redirects)

    def _of(self, listens: bool, redirects: Collection[Redirect]) -> tuple[Redirect, ...]:
        return tuple(redirect for redirect in redirects if (redirect.portal.protocol in self.listens) is listens)

    async def withdraw(self) -> None:
        await self._capture.withdraw()
        await self._listening.withdraw()

    async def close(self) -> None:
        problems = []
        for capture in (self._capture, self._listening):
            try:
                await capture.close()
            except CaptureError as error:
                problems.append(str(error))
        if problems:
            raise CaptureError("; ".join(problems))
