"""Datagrams: round trips, new flows, a fixed rate, and DNS (dnsperf)."""

from __future__ import annotations

import json
import pathlib
import re
import shlex
import sys
from collections.abc import Sequence

from bench.loads.base import Subject, Work
from bench.programs import BenchError, output, packaged

WINDOW = 64


class Datagrams:
    """Our own client; every datagram comes back from the endpoint. A round trip is two datagrams relayed."""

    service = "echo"

    def __init__(self, name: str, options: Sequence[str], *, rate: str, unit: str, size: int = 64) -> None:
        self.name = name
        self.most_figure = rate
        self.cost = f"CPU us/{unit}"
        self._size = size
        self._options = ["--size", str(size), *options]

    @classmethod
    def round_trips(cls, size: int, flows: int) -> Datagrams:
        name = f"{size:,} bytes, {flows:,} flows"
        options = ["--flows", str(flows), "--window", str(WINDOW)]
        return cls(name, options, rate="round trips/s", unit="round trip", size=size)

    @classmethod
    def new_flows(cls) -> Datagrams:
        return cls("new flows", ["--new-flows", "--window", str(WINDOW)], rate="flows/s", unit="flow")

    @classmethod
    def steadily(cls, rate: int) -> Datagrams:
        return cls(f"{rate:,} datagrams/s", ["--rate", str(rate)], rate="answers/s", unit="round trip")

    def run(self, subject: Subject, seconds: float) -> Work:
        client = [sys.executable, "-m", "bench.clients.datagrams", subject.ip, str(subject.port)]
        command = [*client, *self._options, "--seconds", f"{seconds:g}"]
        result = json.loads(output(command, seconds))
        answered = result["answered"]
        if not answered:
            raise BenchError(f"{shlex.join(command)}: {result['sent']} sent, nothing came back")
        figures = {self.most_figure: answered / result["seconds"], "lost %": 100 * result["lost"] / result["sent"]}
        if result["p99"]:
            figures |= {"p50 ms": result["p50"] / 1e3, "p99 ms": result["p99"] / 1e3}
        return Work(
            command=shlex.join(command),
            figures=figures,
            units=answered,
            to_endpoint=answered * self._size,
            to_client=answered * self._size,
        )


class Dns:
    name = "DNS"
    service = "dns"
    cost = "CPU us/query"
    most_figure = "queries/s"

    def run(self, subject: Subject, seconds: float) -> Work:
        to = ["-s", subject.ip, "-p", str(subject.port), "-d", str(pathlib.Path(__file__).with_name("dns.queries"))]
        command = ["dnsperf", *to, "-c", "16", "-q", str(WINDOW), "-t", "1", "-l", f"{max(1, round(seconds))}"]
        printed = output(command, seconds)
        sent, done, lost = (_printed(printed, f"Queries {what}") for what in ("sent", "completed", "lost"))
        if not done:
            raise BenchError(f"{shlex.join(command)}: {sent:.0f} queries, no answer\n{printed}")
        return Work(
            command=shlex.join(command),
            figures={
                "queries/s": _printed(printed, "Queries per second"),
                "average ms": _printed(printed, "Average Latency (s)") * 1e3,
                "lost %": 100 * lost / sent,
            },
            units=done,
            to_endpoint=int(done * 20),
            to_client=int(done * 20),
        )


def _printed(text: str, what: str) -> float:
    found = re.search(rf"{re.escape(what)}:\s+([\d.]+)", text)
    if not found:
        raise BenchError(f"dnsperf told no {what}:\n{text}")
    return float(found[1])


def versions() -> dict[str, str]:
    return {"dnsperf": packaged("dnsperf")}
