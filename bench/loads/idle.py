"""Idle connections: how long they take to be there, what they weigh, and whom they slow down."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence

from bench.loads.base import Subject, Work
from bench.loads.http import CONCURRENT, wrk
from bench.programs import BenchError


class Idle:
    """Connections that have had one small request each, more and more; at the end, an active client beside them.

    Memory is what the proxy has grown by since its start, divided by the connections.
    """

    name = "idle connections"
    service = "http"
    cost = ""
    most_figure = "requests/s beside"

    def __init__(self, counts: Sequence[int]) -> None:
        self._counts = counts

    def run(self, subject: Subject, seconds: float) -> Work:
        assert subject.program
        command = [sys.executable, "-m", "bench.clients.hold", subject.ip, str(subject.port)]
        figures: dict[str, float] = {}
        own_before = subject.program.memory()[1]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
            assert holder.stdin
            assert holder.stdout
            for count in self._counts:
                print(count, file=holder.stdin, flush=True)
                line = holder.stdout.readline()
                if not line:
                    raise BenchError(f"{shlex.join(command)}: could not hold {count:,} connections")
                resident, own = subject.program.memory()
                figures[f"bytes/connection at {count:,}"] = (own - own_before) / count
                figures[f"RSS MB at {count:,}"] = resident / 1e6
                figures[f"s to take the last of {count:,}"] = json.loads(line)["seconds"]
            url = f"http://{subject.ip}:{subject.port}/"
            active = wrk(url, CONCURRENT, seconds)
            figures["requests/s beside"] = active.figures["requests/s"]
            figures["p99 ms beside"] = active.figures["p99 ms"]
            holder.stdin.close()
        alone = wrk(url, CONCURRENT, seconds)
        figures["requests/s alone, afterwards"] = alone.figures["requests/s"]
        figures["p99 ms alone, afterwards"] = alone.figures["p99 ms"]
        return Work(
            command=f"{shlex.join(command)} and {active.command}",
            figures=figures,
            units=0,
            connections=self._counts[-1] + active.connections + alone.connections,
        )
