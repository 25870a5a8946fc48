"""How results are told: a table for people (Markdown), a page with pictures (HTML), everything for machines (JSON).

Tables are lists of rows of text first, and rendered either way; what the numbers are is decided in `results`.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import importlib.util
import json
import os
import pathlib
import platform
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.plan import GROUPS
from bench.results import CLUSTER, OURS, STRAIGHT, TARGETS, Cell, Results, short

if typing.TYPE_CHECKING:
    from bench.measure import Run

Rows = Sequence[Sequence[str]]
FILES = ("table.md", "results.json", "index.html", "costs.png", "growth.png", "ways.png")
"""All that is ever saved."""
EXPLAINED = (
    "Each cell: median of the rounds (lowest..highest); for times to a change, the quantile of all rounds' changes "
    "instead of a median. Ratios are those of the medians (lowest..highest of single rounds). CPU is the proxy's "
    "alone, user and system."
)


@dataclass(frozen=True, slots=True)
class Section:
    title: str
    rows: Rows
    notes: Sequence[str]
    """Commands, one a line."""


def save(folder: pathlib.Path, runs: Sequence[Run], about: Mapping[str, typing.Any]) -> str:
    """Write all files into the folder, in place of any that are left of another run; returns what there is to print."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    results = Results(runs)
    document = {**about, "targets": _verdicts(results), "runs": [dataclasses.asdict(run) for run in runs]}
    (folder / "results.json").write_text(json.dumps(document, indent=1) + "\n")
    found = sections(results, runs)
    text = "\n".join(_markdown(found, about))
    (folder / "table.md").write_text(text)
    pictures: Sequence[pathlib.Path] = ()
    if can_draw():
        from bench import pictures as drawing  # here, because nothing else needs matplotlib

        pictures = drawing.draw(folder, results)
    (folder / "index.html").write_text(_page(found, about, pictures))
    return "\n\n".join(f"{section.title}\n\n{_table(section.rows)}" for section in found)


def can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def one_line(run: Run) -> str:
    told = (
        ", ".join(f"{short(value)} {figure}" for figure, value in run.figures.items()) or f"NOT COUNTED: {run.problem}"
    )
    return f"{run.group:11} {run.way:10} {run.peer:16} {run.load:22} {told}"


def sections(results: Results, runs: Sequence[Run]) -> list[Section]:
    groups = {group.name: (group.title, group.reference) for group in GROUPS}
    targets = _targets(results)
    found = [Section("Targets", targets, ())] if len(targets) > 1 else []
    for group, way in dict.fromkeys((run.group, run.way) for run in runs):
        title, reference = groups.get(group, ("Many services", ""))
        how = "straight to the proxy port" if way == STRAIGHT else "by cluster IP"
        of_it = [run for run in runs if (run.group, run.way, run.round) == (group, way, 1)]
        found.append(Section(f"{title}, {how}", _figures(results, group, way, reference), _commands(of_it)))
    return found


def _targets(results: Results) -> list[list[str]]:
    rows = [["", "target", STRAIGHT, f"by {CLUSTER}", ""]]
    for target in TARGETS:
        found = {way: target.found(results, way) for way in target.ways}
        first = found[target.ways[0]]
        if first is None:
            continue
        cells = [str(spread) if (spread := found.get(way)) else "-" for way in (STRAIGHT, CLUSTER)]
        rows.append([target.title, str(target), *cells, "met" if target.is_met(first.median) else "MISSED"])
    return rows


def _verdicts(results: Results) -> list[dict[str, object]]:
    return [
        {
            "title": target.title,
            "target": str(target),
            "way": way,
            "found": found._asdict(),
            "met": target.is_met(found.median),
        }
        for target in TARGETS
        for way in target.ways
        if (found := target.found(results, way))
    ]


def _figures(results: Results, group: str, way: str, reference: str) -> list[list[str]]:
    peers = results.peers(group, way)
    peers.sort(key=lambda peer: peer != OURS)
    compared = reference in peers and OURS in peers
    rows = [["", "", *peers, *([f"{OURS} / {reference}"] if compared else [])]]
    last = ""
    for load, figure in results.rows(group, way):
        spreads = [results.spread(Cell(group, load, figure, peer), way) for peer in peers]
        row = ["" if load == last else load, figure, *(str(spread) if spread else "-" for spread in spreads)]
        if compared:
            of_both = results.ratio(Cell(group, load, figure), Cell(group, load, figure, reference), way)
            row.append(str(of_both) if of_both else "-")
        rows.append(row)
        last = load
    return rows


def _commands(runs: Sequence[Run]) -> list[str]:
    """The proxies', and the clients' as they were for the first of them; JSON has each."""
    proxies = dict.fromkeys(f"{run.peer}: {run.commands[0]}" for run in runs if run.commands and run.peer != "direct")
    first = runs[0].peer if runs else ""
    clients = dict.fromkeys(run.commands[-1] for run in runs if run.peer == first and len(run.commands) > 1)
    return [*proxies, *clients]


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


def _lines(path: str) -> list[str]:
    return pathlib.Path(path).read_text().splitlines()


# -- rendering


def _about(about: Mapping[str, typing.Any]) -> list[str]:
    lines = [f"{what}: {value}" for what, value in (about["machine"] | about["versions"]).items()]
    return [*lines, *(f"not counted: {'; '.join(problem.splitlines())}" for problem in about["not counted"])]


def _begun(about: Mapping[str, typing.Any]) -> str:
    return (
        f"Begun {about['started']}, {about['minutes']} minutes: {about['rounds']} rounds, {about['seconds']:g} s for "
        f"each load. {EXPLAINED}"
    )


def _markdown(found: Sequence[Section], about: Mapping[str, typing.Any]) -> list[str]:
    lines = ["# Results", "", _begun(about), ""]
    for section in found:
        lines += [f"## {section.title}", "", _table(section.rows), ""]
        if section.notes:
            lines += [*(f"    {note}" for note in section.notes), ""]
    return [*lines, "## Measured on and with", "", *(f"- {line}" for line in _about(about)), ""]


def _table(rows: Rows) -> str:
    """Markdown that can be read as it is."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    padded.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1300px; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto }
td, th { border-bottom: 1px solid #ddd; padding: 3px 10px; text-align: left; white-space: nowrap }
td span { color: #888 } img { max-width: 100% } pre { font-size: 12px; overflow-x: auto; background: #f6f6f6 }
.MISSED { color: #b00; font-weight: bold } .met { color: #070 }
"""


def _page(found: Sequence[Section], about: Mapping[str, typing.Any], pictures: Sequence[pathlib.Path]) -> str:
    """One file, nothing fetched from anywhere."""
    parts = [f"<h1>userspace-proxy beside its peers</h1><p>{html.escape(_begun(about))}</p>"]
    for section in found:
        parts.append(f"<h2>{html.escape(section.title)}</h2>{_html_table(section.rows)}")
        if section.title == "Targets":
            parts += [_image(picture) for picture in pictures]
        if section.notes:
            commands = html.escape("\n".join(section.notes))
            parts.append(f"<details><summary>commands</summary><pre>{commands}</pre></details>")
    if not any(section.title == "Targets" for section in found):
        parts += [_image(picture) for picture in pictures]
    items = "".join(f"<li>{html.escape(line)}</li>" for line in _about(about))
    parts.append(f"<h2>Measured on and with</h2><ul>{items}</ul>")
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>userspace-proxy: bench</title><style>{_STYLE}'
    return f"{head}</style>\n" + "\n".join(parts) + "</html>\n"


def _html_table(rows: Rows) -> str:
    head, *body = rows
    lines = ["<table><tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(map(_html_cell, row)) + "</tr>" for row in body]
    return "\n".join([*lines, "</table>"])


def _html_cell(text: str) -> str:
    median, bracket, rest = html.escape(text).partition(" (")
    if text in {"met", "MISSED"}:
        return f'<td class="{text}">{text}</td>'
    return f"<td>{median}{f' <span>({rest}</span>' if bracket else ''}</td>"


def _image(picture: pathlib.Path) -> str:
    data = base64.b64encode(picture.read_bytes()).decode()
    return f'<p><img alt="{picture.stem}" src="data:image/png;base64,{data}"></p>'
