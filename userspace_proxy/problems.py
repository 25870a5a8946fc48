"""What is wrong with which service port: told once when it is new, and kept for as long as it lasts.

What can go wrong is known where it does: in `serving`, `claims` and `plan`. Here nothing is decided.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from userspace_proxy.model import IPFamily, ServicePortName, SocketKey

logger = logging.getLogger(__name__)


class Problems:
    """What is wrong with which service port; logged when it is new, kept for /services while it lasts.

    Of the keys the scope does not matter: what is wrong concerns the service port in its family.
    """

    def __init__(self) -> None:
        self._now: dict[SocketKey, list[str]] = {}
        self._before: dict[SocketKey, list[str]] = {}

    def __len__(self) -> int:
        return len(self._now)

    def begin(self, names: Iterable[ServicePortName]) -> None:
        """A new round for these service ports: what is not noted again has passed."""
        keys = (SocketKey(name, family) for name in names for family in IPFamily)
        self._before = {key: self._now.pop(key) for key in keys if key in self._now}

    def note(self, key: SocketKey, message: str) -> None:
        key = key.base
        families = [SocketKey(key.name, family) for family in IPFamily]
        said = any(message in noted.get(each, ()) for noted in (self._now, self._before) for each in families)
        found = self._now.setdefault(key, [])
        if message not in found:
            found.append(message)
        if not said:
            logger.warning("%s: %s", key.name, message)

    def forget(self, key: SocketKey, message: str) -> None:
        """It has passed before the round was over; one that is not noted is no fault."""
        if message in (noted := self._now.get(key.base, [])):
            noted.remove(message)
            if not noted:
                del self._now[key.base]

    def of(self, key: SocketKey) -> list[str]:
        return list(self._now.get(key.base, ()))
