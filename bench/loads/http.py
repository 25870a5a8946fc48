"""Requests: over connections that stay (wrk), and over a new one each (ab)."""

from __future__ import annotations

import csv
import json
import pathlib
import re
import shlex
import tempfile

from bench.loads.base import Subject, Work
from bench.programs import BenchError, output, version

CONCURRENT = 64


class KeepAlive:
    """wrk: on each of some connections one request under way at any time."""

    service = "http"
    cost = "CPU us/request"
    most_figure = "requests/s"

    def __init__(self, connections: int, size: int | None = None) -> None:
        self.name = by_connections(connections) if size is None else f"{size:,} bytes"
        self._connections = connections
        self._path = "" if size is None else str(size)

    def run(self, subject: Subject, seconds: float) -> Work:
        url = f"http://{subject.ip}:{subject.port}/{self._path}"
        return wrk(url, self._connections, seconds)


def by_connections(number: int) -> str:
    return f"{number:,} connection{'s' if number > 1 else ''}"


def wrk(url: str, connections: int, seconds: float) -> Work:
    script = pathlib.Path(__file__).with_name("wrk.lua")
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "-s", str(script), url]
    result = json.loads(output(command, seconds).splitlines()[-1])
    requests = int(result["requests"])
    if result["errors"] or not requests:
        raise BenchError(f"{shlex.join(command)}: {requests} requests, {result['errors']} errors")
    return Work(
        command=shlex.join(command),
        figures={
            "requests/s": requests / result["microseconds"] * 1e6,
            "p50 ms": result["p50"] / 1e3,
            "p99 ms": result["p99"] / 1e3,
            "p99.9 ms": result["p999"] / 1e3,
        },
        units=requests,
        connections=connections,
        to_client=int(result["bytes"]),
    )


class Connections:
    """ab: connect, one request, close. Its times are from the call of connect to the end of the answer.

    With `some_fail`, connections may fail, and how many do is a figure.
    """

    cost = "CPU us/connection"
    most_figure = "connections/s"

    def __init__(self, name: str, service: str, *, some_fail: bool = False) -> None:
        self.name = name
        self.service = service
        self._some_fail = some_fail

    def run(self, subject: Subject, seconds: float) -> Work:
        with tempfile.NamedTemporaryFile("r", suffix=".csv") as percentiles:
            limits = ["-t", f"{max(1, round(seconds))}", "-n", "500000", "-c", str(CONCURRENT), "-s", "5"]
            command = ["ab", "-q", "-r", *limits, "-e", percentiles.name, f"http://{subject.ip}:{subject.port}/"]
            printed = output(command, seconds)
            times = {row[0]: row[1] for row in csv.reader(percentiles)}
        done = int(_printed(printed, "Complete requests"))
        failed = int(_printed(printed, "Failed requests"))
        answered = done - failed
        if answered < 1 or (failed and not self._some_fail):
            raise BenchError(f"{shlex.join(command)}: {answered} connections were answered, {failed} failed")
        figures = {
            "connections/s": answered / _printed(printed, "Time taken for tests"),
            "p50 ms": float(times["50"]),
            "p99 ms": float(times["99"]),
        }
        if self._some_fail:
            figures["failed %"] = 100 * failed / done
        return Work(
            command=shlex.join(command),
            figures=figures,
            units=answered,
            connections=answered,
            to_client=0 if failed else int(_printed(printed, "Total transferred")),
        )


def _printed(text: str, what: str) -> float:
    found = re.search(rf"^{what}:\s+([\d.]+)", text, re.MULTILINE)
    if not found:
        raise BenchError(f"ab told no {what}:\n{text}")
    return float(found[1])


def versions() -> dict[str, str]:
    return {"wrk": version("wrk", "-v"), "ab": version("ab", "-V")}
