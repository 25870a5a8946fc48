"""Pictures of results: what it costs beside whom, how that grows, and what coming by cluster IP adds.

A `Panel` is one small chart; another one is another line. Panels for which nothing was measured are left out,
and pictures without panels.
"""

from __future__ import annotations

import pathlib
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from bench.control import SIZES as SERVICES
from bench.loads.http import CONCURRENT, by_connections
from bench.plan import FLOWS, IDLE, KEEP_ALIVE, SIZES, STREAMS, TWO_WORKERS
from bench.results import CLUSTER, OURS, STRAIGHT, Cell, Results, Spread, short
from bench.services import BODIES

COLOURS = {
    OURS: "#d55e00",
    TWO_WORKERS: "#f4a570",
    f"{OURS}-nftables": "#cc79a7",
    "haproxy": "#0072b2",
    "haproxy-splice": "#56b4e9",
    "haproxy-2": "#003f66",
    "haproxy-2-splice": "#8ecbee",
    "nginx": "#009e73",
    "socat": "#999999",
    "direct": "#d8d8d8",
}
OTHER = "#000000"


BESIDE = 4
"""How many times as long as all others the longest bar may be; what is longer is cut off."""


class Panel(typing.NamedTuple):
    """Bars, one for each peer."""

    title: str
    group: str
    load: str
    figure: str
    better: str


COSTS: Sequence[Panel] = (
    Panel("CPU per request, 64 keep-alive connections", "keep-alive", "64 connections", "CPU us/request", "less"),
    Panel("CPU per connection", "connections", "1 endpoint", "CPU us/connection", "less"),
    Panel("connections/s, 1 of 4 endpoints a black hole", "dead", "1 of 4 is a black hole", "connections/s", "more"),
    Panel("memory per idle connection, of 8,000", "idle", "idle connections", "bytes/connection at 8,000", "less"),
    Panel("bulk, 1 stream", "bulk", "1 stream to the endpoint", "Gbit/s", "more"),
    Panel("CPU per GB, 1 stream", "bulk", "1 stream to the endpoint", "CPU s/GB", "less"),
    Panel("CPU per UDP round trip, 64 bytes", "udp", "64 bytes, 16 flows", "CPU us/round trip", "less"),
    Panel("new UDP flows", "udp", "new flows", "flows/s", "more"),
)


@dataclass(frozen=True, slots=True)
class Growth:
    """A line for each peer, and where its points come from."""

    title: str
    group: str
    x_label: str
    points: Sequence[tuple[float, str, str]]
    """x, load, figure"""
    way: str = STRAIGHT


def _growth(title: str, group: str, x_label: str, figure: str, points: Sequence[tuple[float, str]]) -> Growth:
    return Growth(title, group, x_label, [(x, load, figure) for x, load in points])


def _control(title: str, figure: str) -> Growth:
    points = [(size, f"{size:,} services", figure) for size in SERVICES]
    return Growth(title, "control", "services", points, CLUSTER)


_BY_CONNECTIONS = [(number, by_connections(number)) for number in KEEP_ALIVE]
_BY_BODY = [(size, f"{size:,} bytes") for size in BODIES]
_BY_SIZE = [(size, f"{size:,} bytes, {FLOWS[0]} flows") for size in SIZES]
_BY_STREAMS = [(number, f"{number} stream{'s' if number > 1 else ''} to the endpoint") for number in STREAMS]
GROWTHS: Sequence[Growth] = (
    _growth("CPU us/request", "keep-alive", "keep-alive connections", "CPU us/request", _BY_CONNECTIONS),
    _growth("p99 ms", "keep-alive", "keep-alive connections", "p99 ms", _BY_CONNECTIONS),
    _growth(f"CPU us/request, {CONCURRENT} connections", "sizes", "bytes of each answer", "CPU us/request", _BY_BODY),
    _growth("CPU us/UDP round trip", "udp", "bytes of each datagram", "CPU us/round trip", _BY_SIZE),
    _growth("Gbit/s to the endpoint", "bulk", "streams", "Gbit/s", _BY_STREAMS),
    Growth(
        "RSS MB",
        "idle",
        "idle connections",
        [(number, "idle connections", f"RSS MB at {number:,}") for number in IDLE],
    ),
    _control("s from start to the last one reachable", "s to the last one"),
    _control("p99 ms to an endpoint change", "p99 ms to an endpoint change"),
    _control("slowest ms to a service change", "slowest ms to a service change"),
    _control("CPU ms/service change", "CPU ms/service change"),
    _control("RSS MB (the proxy and its rule writers)", "RSS MB"),
    _control("p99 ms of requests while 100 changes/s arrive", "p99 ms busy"),
)


def draw(folder: pathlib.Path, results: Results) -> list[pathlib.Path]:
    """Those pictures for which there is something to show."""
    mpl.use("Agg")
    pictures = {
        "costs": [_bars(panel, results) for panel in COSTS],
        "growth": [_lines(growth, results) for growth in GROWTHS],
        "ways": [_both_ways(panel, results) for panel in COSTS],
    }
    drawn = []
    for name, panels in pictures.items():
        charts = [panel for panel in panels if panel is not None]
        if charts:
            drawn.append(folder / f"{name}.png")
            _grid(charts, drawn[-1])
    return drawn


Chart = Callable[[Axes], None]


def _grid(charts: Sequence[Chart], path: pathlib.Path) -> None:
    columns = min(4, len(charts))
    rows = -(-len(charts) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 2.9 * rows), squeeze=False, layout="constrained")
    for place in axes.flat[len(charts) :]:
        place.set_visible(False)
    for chart, place in zip(charts, axes.flat, strict=False):
        place.spines[["top", "right"]].set_visible(False)
        place.tick_params(labelsize=8)
        chart(place)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(panel: Panel, results: Results) -> Chart | None:
    def spread(peer: str) -> Spread | None:
        return results.spread(Cell(panel.group, panel.load, panel.figure, peer))

    found = {peer: value for peer in _ordered(results.peers(panel.group, STRAIGHT)) if (value := spread(peer))}
    if OURS not in found:
        return None

    def chart(place: Axes) -> None:
        names = list(found)[::-1]
        for row, name in enumerate(names):
            _bar(place, row, found[name], COLOURS.get(name, OTHER))
        place.set_yticks(range(len(names)), names)
        _finish(place, panel, [value.median for value in found.values()])

    return chart


def _both_ways(panel: Panel, results: Results) -> Chart | None:
    found = {
        (peer, way): value
        for peer in _ordered(results.peers(panel.group, CLUSTER))
        for way in (STRAIGHT, CLUSTER)
        if (value := results.spread(Cell(panel.group, panel.load, panel.figure, peer), way))
    }
    if not {(OURS, STRAIGHT), (OURS, CLUSTER)} <= set(found):
        return None

    def chart(place: Axes) -> None:
        names = list(found)[::-1]
        for row, (peer, way) in enumerate(names):
            _bar(place, row, found[peer, way], COLOURS.get(peer, OTHER), 0.55 if way == CLUSTER else 1.0)
        labels = [peer if way == STRAIGHT else f"by {CLUSTER}" for peer, way in names]
        place.set_yticks(range(len(names)), labels)
        _finish(place, panel, [value.median for value in found.values()])

    return chart


def _bar(place: Axes, row: int, value: Spread, colour: str, alpha: float = 1.0) -> None:
    place.barh(row, value.median, color=colour, alpha=alpha, height=0.7)
    place.plot([value.low, value.high], [row, row], color="#00000070", linewidth=1.2)


def _finish(place: Axes, panel: Panel, medians: Sequence[float]) -> None:
    """The numbers beside the bars, and an axis that one far worse than all others does not stretch."""
    *others, most = sorted(medians)
    cut = panel.better == "less" and most > BESIDE * max(others, default=most)
    shown = BESIDE * others[-1] if cut else most
    for row, median in enumerate(reversed(medians)):
        if median > shown:
            place.text(shown * 1.24, row, f"{short(median)} \N{RIGHTWARDS ARROW}", va="center", ha="right", fontsize=8)
        else:
            place.text(median, row, f" {short(median)}", va="center", fontsize=8)
    place.set_xlim(0, shown * 1.25)
    place.xaxis.set_major_locator(MaxNLocator(5))
    place.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    place.set_title(panel.title, fontsize=10, loc="left")
    place.set_xlabel(f"{panel.figure} ({panel.better} is better)", fontsize=8)


def _lines(growth: Growth, results: Results) -> Chart | None:
    found: dict[str, list[tuple[float, Spread]]] = {}
    for peer in _ordered(results.peers(growth.group, growth.way)):
        points = [
            (x, value)
            for x, load, figure in growth.points
            if (value := results.spread(Cell(growth.group, load, figure, peer), growth.way))
        ]
        if len(points) > 1 and peer not in {"socat", "direct"}:  # far off, they would flatten all others
            found[peer] = points
    if not found:
        return None

    def chart(place: Axes) -> None:
        for peer, points in found.items():
            xs, medians = [x for x, _ in points], [value.median for _, value in points]
            below = [value.median - value.low for _, value in points]
            above = [value.high - value.median for _, value in points]
            width = 2.2 if peer == OURS else 1.3
            colour = COLOURS.get(peer, OTHER)
            place.errorbar(xs, medians, (below, above), color=colour, label=peer, marker="o", ms=3, lw=width, capsize=2)
        place.set_xscale("log")
        place.set_xticks([x for x, _, _ in growth.points], [f"{x:,g}" for x, _, _ in growth.points])
        place.minorticks_off()
        place.set_ylim(bottom=0)
        place.set_title(growth.title, fontsize=10, loc="left")
        place.set_xlabel(growth.x_label, fontsize=8)
        if len(found) > 1:
            place.legend(fontsize=7, frameon=False)

    return chart


def _ordered(peers: Sequence[str]) -> list[str]:
    known = list(COLOURS)
    return sorted(peers, key=lambda peer: known.index(peer) if peer in known else len(known))
