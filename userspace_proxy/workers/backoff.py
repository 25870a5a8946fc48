"""How long to wait before a worker that died is replaced: not at all, unless it dies again and again."""

from __future__ import annotations

HEALTHY = 10.0
"""Seconds of life after which a death is the first of its kind."""
FIRST = 0.1
LONGEST = 5.0
"""Clients of this worker wait in its queue meanwhile."""


class Backoff:
    __slots__ = ("_deaths",)

    def __init__(self) -> None:
        self._deaths = 0
        """Early ones, in a row."""

    def after(self, lived: float) -> float:
        """Seconds to wait after a life of so many seconds."""
        self._deaths = 0 if lived >= HEALTHY else self._deaths + 1
        return min(LONGEST, FIRST * 2.0 ** (self._deaths - 2)) if self._deaths > 1 else 0.0
