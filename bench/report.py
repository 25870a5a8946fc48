"""What the runs come to: figures, each with its median, spread and ratio, as a table and as JSON.

A `Figure` makes a number of a run. What counts is the ratio of the medians, ours by the reference's: a burst of
something else on the machine spoils single runs, and a round's own ratio with them; the lowest and highest of
those are shown beside it. Another figure is another line in `FIGURES`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import platform
import statistics
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bench.measure import Run

OURS = "userspace-proxy"
REFERENCE = "haproxy"


class Target(typing.NamedTuple):
    """What the ratio ours / reference must not be above, or below."""

    at_most: float | None = None
    at_least: float | None = None

    def is_met(self, ratio: float) -> bool:
        return (self.at_most is None or ratio <= self.at_most) and (self.at_least is None or ratio >= self.at_least)

    def __str__(self) -> str:
        return f"<= {self.at_most:g}" if self.at_most is not None else f">= {self.at_least:g}"


@dataclass(frozen=True, slots=True)
class Figure:
    title: str
    unit: str
    load: str
    value: Callable[[Run], float | None]
    """None where a run has no such number."""
    digits: int
    target: Target | None = None


def _cpu_per(count: Callable[[Run], float], scale: float) -> Callable[[Run], float | None]:
    return lambda run: run.cpu.total / count(run) * scale if run.cpu else None


def _rate(count: Callable[[Run], float], scale: float = 1) -> Callable[[Run], float | None]:
    return lambda run: count(run) / run.work.seconds * scale


def _requests(run: Run) -> float:
    return run.work.requests


def _bytes(run: Run) -> float:
    return run.work.to_endpoint


FIGURES: Sequence[Figure] = (
    Figure("CPU per request", "us", "keep-alive", _cpu_per(_requests, 1e6), 2, Target(at_most=1.1)),
    Figure("requests", "1/s", "keep-alive", _rate(_requests), 0),
    Figure("CPU per connection", "us", "connections", _cpu_per(_requests, 1e6), 1, Target(at_most=1.4)),
    Figure("connections", "1/s", "connections", _rate(_requests), 0),
    Figure("bulk throughput", "Gbit/s", "bulk", _rate(_bytes, 8e-9), 2, Target(at_least=1.2)),
    Figure("CPU per gigabyte", "ms", "bulk", _cpu_per(_bytes, 1e12), 0),
)


@dataclass(frozen=True, slots=True)
class Spread:
    """What comes of all rounds, and of the single one at least and at most."""

    median: float
    low: float
    high: float

    def show(self, digits: int) -> str:
        return f"{self.median:,.{digits}f} ({self.low:,.{digits}f}..{self.high:,.{digits}f})"


def spread(figure: Figure, runs: Sequence[Run], peer: str) -> Spread | None:
    values = _by_round(figure, runs, peer).values()
    return Spread(statistics.median(values), min(values), max(values)) if values else None


def ratio(figure: Figure, runs: Sequence[Run]) -> Spread | None:
    """Ours by the reference's: of the medians, and of the single rounds."""
    ours, theirs = (_by_round(figure, runs, peer) for peer in (OURS, REFERENCE))
    single = [ours[number] / theirs[number] for number in ours if number in theirs]
    if not single:
        return None
    return Spread(statistics.median(ours.values()) / statistics.median(theirs.values()), min(single), max(single))


def _by_round(figure: Figure, runs: Sequence[Run], peer: str) -> dict[int, float]:
    found = ((run.round, figure.value(run)) for run in runs if (run.peer, run.load) == (peer, figure.load))
    return {number: value for number, value in found if value is not None}


def verdict(figure: Figure, of_rounds: Spread | None) -> str:
    if figure.target is None or of_rounds is None:
        return ""
    return f"{figure.target}: {'met' if figure.target.is_met(of_rounds.median) else 'MISSED'}"


def table(runs: Sequence[Run], peers: Sequence[str]) -> str:
    """Markdown that can be read as it is. Each cell: median (lowest..highest)."""
    rows = [["", *peers, f"{OURS} / {REFERENCE}", "target"]]
    for figure in FIGURES:
        cells = [spread(figure, runs, peer) for peer in peers]
        if not any(cells):
            continue
        compared = ratio(figure, runs)
        rows.append(
            [
                f"{figure.title}, {figure.unit}",
                *(cell.show(figure.digits) if cell else "-" for cell in cells),
                compared.show(2) if compared else "-",
                verdict(figure, compared),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    lines = (" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"| {line} |" for line in lines)


def machine() -> dict[str, str]:
    cpu = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = next((line.partition(":")[2].strip() for line in _lines("/proc/meminfo")), "")
    return {
        "cpu": f"{cpu[0] if cpu else platform.machine()}, {os.cpu_count()} cores",
        "memory": memory,
        "kernel": f"{platform.system()} {platform.release()}",
        "congestion control": _lines("/proc/sys/net/ipv4/tcp_congestion_control")[0],
        "load average at the start": f"{os.getloadavg()[0]:.2f}",
        "system": platform.freedesktop_os_release().get("PRETTY_NAME", ""),
    }


def describe(about: Mapping[str, typing.Any], runs: Sequence[Run]) -> list[str]:
    """What the table was measured on, and how, as lines of Markdown."""
    lines = [
        f"Begun {about['started']}: {about['rounds']} rounds, {about['seconds']} s for each load.",
        "In the table: median (lowest..highest); the ratio is that of the medians (lowest..highest of single rounds).",
        "",
        *(f"- {what}: {value}" for what, value in (about["machine"] | about["versions"]).items()),
        "",
    ]
    for peer in dict.fromkeys(run.peer for run in runs):
        its = [run for run in runs if run.peer == peer and run.round == 1]
        lines += [f"{peer}:", "", *(f"    {command}" for command in _commands(its)), ""]
    return lines[:-1]


def _commands(runs: Sequence[Run]) -> list[str]:
    """The proxy's, if there is one, then each load's."""
    return [*dict.fromkeys(run.proxy for run in runs if run.proxy), *(run.work.command for run in runs)]


def document(runs: Sequence[Run], peers: Sequence[str], about: Mapping[str, object]) -> dict[str, object]:
    """Everything, for machines."""
    figures = []
    for figure in FIGURES:
        compared = ratio(figure, runs)
        figures.append(
            {
                "title": figure.title,
                "unit": figure.unit,
                "load": figure.load,
                "peers": {peer: _numbers(values) for peer in peers if (values := spread(figure, runs, peer))},
                "ratio": _numbers(compared) if compared else None,
                "target": str(figure.target) if figure.target else None,
                "met": figure.target.is_met(compared.median) if figure.target and compared else None,
            }
        )
    return {**about, "figures": figures, "runs": [dataclasses.asdict(run) for run in runs]}


def write(folder: pathlib.Path, result: Mapping[str, object], text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "table.md").write_text(text + "\n")


def _numbers(values: Spread) -> dict[str, float]:
    return {"median": values.median, "min": values.low, "max": values.high}


def _lines(path: str) -> list[str]:
    return pathlib.Path(path).read_text().splitlines()
