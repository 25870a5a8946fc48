"""Bulk: iperf3, some streams, one way or both, as fast as it goes."""

from __future__ import annotations

import json
import shlex

from bench.loads.base import Subject, Work
from bench.programs import output, version

WAYS = {"to the endpoint": [], "to the client": ["-R"], "both ways": ["--bidir"]}


class Bulk:
    service = "stream"
    cost = "CPU s/GB"
    most_figure = "Gbit/s"

    def __init__(self, streams: int, way: str) -> None:
        self.name = f"{streams} {'stream' if streams == 1 else 'streams'} {way}"
        self._streams = streams
        self._options = WAYS[way]

    def run(self, subject: Subject, seconds: float) -> Work:
        options = ["-t", f"{seconds:g}", "-P", str(self._streams), *self._options]
        command = ["iperf3", "-c", subject.ip, "-p", str(subject.port), "-J", *options]
        end = json.loads(output(command, seconds))["end"]
        there = end["sum_received"]
        back = end.get("sum_received_bidir_reverse", {"bytes": 0})
        if "-R" in self._options:
            there, back = back, there
        total = there["bytes"] + back["bytes"]
        return Work(
            command=shlex.join(command),
            figures={"Gbit/s": total * 8e-9 / end["sum_received"]["seconds"]},
            units=total / 1e9,
            connections=1 + self._streams * (2 if "--bidir" in self._options else 1),
            to_endpoint=int(there["bytes"]),
            to_client=int(back["bytes"]),
        )


def versions() -> dict[str, str]:
    return {"iperf3": version("iperf3", "--version")}
