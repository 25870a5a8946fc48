"""What the runs come to: medians and spreads, ratios, and which targets are met.

Pure: numbers in, numbers out. A `Target` compares one figure of ours with a bound, or with another figure of the
same runs; another target is another line in `TARGETS`. How it is told is in `report` and `pictures`.
"""

from __future__ import annotations

import math
import statistics
import typing
from collections.abc import Sequence
from dataclasses import dataclass

if typing.TYPE_CHECKING:
    from bench.measure import Run

OURS = "userspace-proxy"
STRAIGHT = "straight"
CLUSTER = "cluster IP"
QUANTILES = {"p50": 0.5, "p99": 0.99, "slowest": 1.0}
"""What the names of figures that come of single samples begin with."""


class Cell(typing.NamedTuple):
    """Where a figure comes from."""

    group: str
    load: str
    figure: str
    peer: str = OURS


class Spread(typing.NamedTuple):
    """What comes of all rounds, and of the single one at least and at most."""

    median: float
    """Of the rounds; of a figure that comes of samples, the figure of all rounds' samples together."""
    low: float
    high: float

    def __str__(self) -> str:
        if self.low == self.high:
            return short(self.median)
        return f"{short(self.median)} ({short(self.low)}..{short(self.high)})"


class Results:
    """All runs, by cell and way."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._values: dict[tuple[Cell, str], dict[int, float]] = {}
        self._samples: dict[tuple[Cell, str], list[float]] = {}
        for run in runs:
            for figure, value in run.figures.items():
                cell = Cell(run.group, run.load, figure, run.peer)
                self._values.setdefault((cell, run.way), {})[run.round] = value
            for what, samples in run.samples.items():
                cell = Cell(run.group, run.load, what, run.peer)
                self._samples.setdefault((cell, run.way), []).extend(samples)

    def spread(self, cell: Cell, way: str = STRAIGHT) -> Spread | None:
        values = self._values.get((cell, way), {}).values()
        return Spread(self._middle(cell, way), min(values), max(values)) if values else None

    def ratio(self, cell: Cell, to: Cell, way: str = STRAIGHT) -> Spread | None:
        """Of the medians: a burst of something else on the machine spoils single rounds, and their own ratios with
        them. The lowest and highest of those are the spread."""
        above, below = self._values.get((cell, way), {}), self._values.get((to, way), {})
        single = [above[number] / below[number] for number in above if below.get(number)]
        if not single or not (divisor := self._middle(to, way)):
            return None
        return Spread(self._middle(cell, way) / divisor, min(single), max(single))

    def _middle(self, cell: Cell, way: str) -> float:
        quantile_, _, what = cell.figure.partition(" ")
        samples = self._samples.get((cell._replace(figure=what), way))
        if samples and quantile_ in QUANTILES:
            return quantile(samples, QUANTILES[quantile_])
        return statistics.median(self._values[cell, way].values())

    def peers(self, group: str, way: str) -> list[str]:
        return list(dict.fromkeys(cell.peer for cell, its_way in self._values if (cell.group, its_way) == (group, way)))

    def rows(self, group: str, way: str) -> list[tuple[str, str]]:
        """Load and figure, in the order of first sight, a load's figures together."""
        found = dict.fromkeys(
            (cell.load, cell.figure) for cell, its_way in self._values if (cell.group, its_way) == (group, way)
        )
        loads = list(dict.fromkeys(load for load, _ in found))
        return sorted(found, key=lambda row: loads.index(row[0]))


@dataclass(frozen=True, slots=True)
class Target:
    """A bound for a figure of ours, or for its ratio to another."""

    title: str
    cell: Cell
    to: Cell | None = None
    at_most: float | None = None
    at_least: float | None = None
    unit: str = ""
    ways: Sequence[str] = (STRAIGHT, CLUSTER)

    def found(self, results: Results, way: str) -> Spread | None:
        return results.ratio(self.cell, self.to, way) if self.to else results.spread(self.cell, way)

    def is_met(self, value: float) -> bool:
        return (self.at_most is None or value <= self.at_most) and (self.at_least is None or value >= self.at_least)

    def __str__(self) -> str:
        bound = f"<= {self.at_most:g}" if self.at_most is not None else f">= {self.at_least:g}"
        if self.to is None:
            return f"{bound} {self.unit}".rstrip()
        return f"{bound}x {self.to.peer if self.to.peer != OURS else self.to.load}"


def _against(
    peer: str, title: str, cell: Cell, *, at_most: float | None = None, at_least: float | None = None
) -> Target:
    return Target(title, cell, cell._replace(peer=peer), at_most, at_least)


_IDLE = Cell("idle", "idle connections", "bytes/connection at 8,000")


def _control(title: str, figure: str, at_most: float, unit: str = "") -> Target:
    return Target(title, Cell("control", "5,000 services", figure), at_most=at_most, unit=unit, ways=(CLUSTER,))


TARGETS: Sequence[Target] = (
    _against(
        "haproxy",
        "CPU per request, 64 keep-alive connections",
        Cell("keep-alive", "64 connections", "CPU us/request"),
        at_most=0.9,
    ),
    _against("haproxy", "CPU per connection", Cell("connections", "1 endpoint", "CPU us/connection"), at_most=1.0),
    Target(
        "connections/s, one of four endpoints a black hole",
        Cell("dead", "1 of 4 is a black hole", "connections/s"),
        Cell("dead", "4 endpoints", "connections/s"),
        at_least=0.7,
    ),
    _against("haproxy", "bulk, 1 stream", Cell("bulk", "1 stream to the endpoint", "Gbit/s"), at_least=1.4),
    Target("memory per idle connection, of 8,000", _IDLE, at_most=1024, unit="bytes"),
    _against("haproxy", "memory per idle connection, of 8,000", _IDLE, at_most=0.4),
    _against("nginx", "UDP CPU per round trip", Cell("udp", "64 bytes, 16 flows", "CPU us/round trip"), at_most=0.9),
    _control("5,000 services, start to all reachable", "s to the last one", 5, "s"),
    _control("p99 to an endpoint change among them", "p99 ms to an endpoint change", 50, "ms"),
    _control("slowest of all service changes among them", "slowest ms to a service change", 100, "ms"),
    _control("p99 of requests while 100 changes/s arrive / in quiet", "p99 busy / quiet", 1.3),
)


def quantile(values: Sequence[float], part: float) -> float:
    """The smallest of them that this part of them are not above."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(part * len(ordered)) - 1)]


def of_samples(what: str, samples: Sequence[float], *quantiles: str) -> dict[str, float]:
    """Figures of one round's."""
    return {f"{name} {what}": quantile(samples, QUANTILES[name]) for name in quantiles}


def short(value: float) -> str:
    """Three digits that count, no more; all of those before the point."""
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 10 else f"{value:.2f}" if size >= 1 else f"{value:.3g}"
