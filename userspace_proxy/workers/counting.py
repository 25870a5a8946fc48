"""Counts of a service port on their way from a worker to the control process: what has grown, and adding it up.

Told is the growth, so that sums never fall: what a worker counted stays when it dies. Only `active` can shrink,
and the control process takes back what a dead worker had.
"""

from __future__ import annotations

import typing

from userspace_proxy.metrics import ServicePortMetrics
from userspace_proxy.workers.messages import Counts

_NUMBERS = ("opened", "active", "to_endpoint", "to_client", "dials", "received", "replied", "affinity_hits")
_TABLES = ("ended", "dial_failures", "drops")


class Tally:
    """What a worker has told of an account."""

    __slots__ = ("_account", "_mark", "_metrics", "_told")

    def __init__(self, account: int, metrics: ServicePortMetrics) -> None:
        self._account = account
        self._metrics = metrics
        self._told = ServicePortMetrics()
        self._mark: tuple[int, ...] = (0,) * (len(_NUMBERS) + len(_TABLES))

    def growth(self) -> Counts | None:
        """Since the last call; None: nothing changed. Asked for thousands of service ports, most of them idle."""
        now, told = self._metrics, self._told
        mark = (
            *(now.opened, now.active, now.to_endpoint, now.to_client, now.dials, now.received, now.replied),
            now.affinity_hits,
            *(sum(now.ended.values()), sum(now.dial_failures.values()), sum(now.drops.values())),
        )
        if mark == self._mark:
            return None
        self._mark = mark
        numbers = {name: getattr(now, name) - getattr(told, name) for name in _NUMBERS}
        tables = {}
        for name in _TABLES:
            current, known = getattr(now, name), getattr(told, name)
            tables[name] = {key: count - known[key] for key, count in current.items() if count != known[key]}
            known.update(current)
        for name in _NUMBERS:
            setattr(told, name, getattr(now, name))
        grown: dict[str, typing.Any] = {**numbers, **tables}
        return Counts(self._account, **grown)


def add(counts: Counts, metrics: ServicePortMetrics) -> None:
    for name in _NUMBERS:
        setattr(metrics, name, getattr(metrics, name) + getattr(counts, name))
    for name in _TABLES:
        table = getattr(metrics, name)
        for key, count in getattr(counts, name).items():
            table[key] += count
