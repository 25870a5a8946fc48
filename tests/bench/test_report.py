"""What is left in a folder of results."""

from __future__ import annotations

import json
import pathlib

from bench.measure import Run
from bench.report import FILES, save

ABOUT = {
    "started": "2026-01-01T00:00:00+00:00",
    "minutes": 1.0,
    "rounds": 1,
    "seconds": 1,
    "machine": {},
    "versions": {},
    "not counted": [],
}


def test_nothing_of_another_run_is_left_beside_the_results(tmp_path: pathlib.Path):
    for name in (*FILES, "notes.txt"):
        (tmp_path / name).write_text("old")
    save(tmp_path, [], ABOUT)
    assert {path.name for path in tmp_path.iterdir()} == {"table.md", "results.json", "index.html", "notes.txt"}
    assert [path.name for path in tmp_path.iterdir() if path.read_text() == "old"] == ["notes.txt"]


def test_every_single_run_is_saved(tmp_path: pathlib.Path):
    run = Run(1, "udp", "straight", "nginx", "DNS", {"queries/s": 5.0}, ["nginx", "dnsperf"])
    save(tmp_path, [run], ABOUT)
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["runs"][0]["figures"] == {"queries/s": 5.0}
    assert "queries/s" in (tmp_path / "table.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} <= set(FILES)
