"""What the capture was told last, by place, and how a part of it is exchanged.

The redirects of all service ports are kept here, so that a change is told as its difference to them. After a call
that failed nobody knows what is in force, and the next one tells the capture everything. Problems are logged when
they are new. Which redirects there should be is decided in `plan`; what a capture does with them, in `capture`.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping

from userspace_proxy.capture.base import Capture, Changes, Difference
from userspace_proxy.exceptions import CaptureError
from userspace_proxy.metrics import Metrics
from userspace_proxy.model import Place, Redirect

logger = logging.getLogger(__name__)


class Captured:
    def __init__(self, capture: Capture, metrics: Metrics) -> None:
        self.redirects: Mapping[Place, Redirect] = {}
        """In force, each place once; while not `known`, those that were in force when it last was."""
        self.known = False
        self.error = ""
        """Why the capture failed last, if it has not worked since."""
        self._capture = capture
        self._metrics = metrics
        self._refused: tuple[str, ...] = ()

    async def exchange(self, places: Collection[Place], now: Iterable[Redirect]) -> bool:
        """Make these the redirects of the places, and leave all others as they are. Whether that worked."""
        redirects = dict(self.redirects)
        before = {place: redirects.pop(place) for place in places if place in redirects}
        after = {redirect.portal.place: redirect for redirect in now}
        redirects.update(after)
        gone = tuple(redirect for place, redirect in before.items() if after.get(place) != redirect)
        new = tuple(redirect for place, redirect in after.items() if before.get(place) != redirect)
        return await self._tell(redirects, Difference(gone, new))

    async def repair(self) -> bool:
        """Put right what others have changed in the kernel. Whether that worked."""
        return await self._tell(self.redirects, Difference())

    async def _tell(self, redirects: Mapping[Place, Redirect], difference: Difference) -> bool:
        known, self.known = self.known, False
        try:
            changes = await self._capture.replace(redirects.values(), difference if known else None)
        except CaptureError as error:
            self._metrics.capture_failures.inc()
            if str(error) != self.error:
                logger.error("capture %s: %s; tried again at every sync", self._capture.name, error)
            self.error = str(error)
            return False
        self.known, self.error, self.redirects = True, "", redirects
        self._report(changes)
        return True

    def _report(self, changes: Changes) -> None:
        name = self._capture.name
        for change, count in (("added", changes.added), ("removed", changes.removed), ("repaired", changes.repaired)):
            self._metrics.capture_changes.labels(change).inc(count)
        for problem in changes.refused:
            if problem not in self._refused:
                logger.warning("capture %s: refused: %s; the other redirects are in force", name, problem)
        self._metrics.capture_failures.inc(len(changes.refused))
        self._refused = changes.refused
        if changes.repaired:
            logger.warning("capture %s: %d rules had been changed by others and are repaired", name, changes.repaired)
        elif changes.added or changes.removed:
            logger.info("capture %s: %d rules added, %d removed", name, changes.added, changes.removed)
