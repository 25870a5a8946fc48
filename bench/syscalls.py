"""System calls per connection and per request, counted: `python -m bench.syscalls`.

Times are noisy, counts are not. strace counts those of a proxy while ab makes so many connections with one request
each, and then as many requests over connections that stay; what is left is divided by how many there were. With
`--concurrent 1`, each event comes alone and counts are exact; with more, some are shared.
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

from bench import namespace, plan
from bench.peers import Peer, Way
from bench.programs import BenchError, Program, output
from bench.results import OURS
from bench.services import endpoints, services

PEERS = (OURS, "haproxy", "nginx")
LEAST = 0.005
"""Rarer calls belong to the clock, not to the load."""

Counts = Mapping[str, float]


def main(arguments: Sequence[str]) -> int:
    options = _parse(arguments)
    if not options.inside:
        if not shutil.which("strace"):
            print("bench.syscalls needs strace; as root, make bench installs it on Debian", file=sys.stderr)
            return 1
        return namespace.enter("bench.syscalls", arguments)
    namespace.furnish()
    makers = plan.peers(namespace.leave_cpu_for_proxy())
    try:
        columns = {name: _count(makers[name](), options) for name in options.peers}
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    for what in ("connection", "request"):
        print(f"\nSystem calls per {what}, {options.number:,} of them, {options.concurrent} at a time\n")
        print(table({name: of_it[what] for name, of_it in columns.items()}))
    return 0


def _count(peer: Peer, options: argparse.Namespace) -> dict[str, Counts]:
    namespace.fresh()
    offered = {"http": services(1)["http"]}
    with contextlib.ExitStack() as stack:
        folder, its = (pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(2))
        stack.enter_context(endpoints(folder))
        running = stack.enter_context(peer.start(offered, Way.STRAIGHT, its))
        program = running.program("http")
        if program is None:
            raise BenchError(f"{peer.name} is no program that makes system calls")
        running.account()  # workers that still start answer later: what that takes is on no bill
        ip, port = running.address("http")
        load = ["-q", "-n", str(options.number), "-c", str(options.concurrent), f"http://{ip}:{port}/"]
        return {
            "connection": _traced(program, ["ab", *load], its, options.number),
            "request": _traced(program, ["ab", "-k", *load], its, options.number),
        }


def _traced(program: Program, command: Sequence[str], folder: pathlib.Path, number: int) -> Counts:
    summary = folder / "strace"
    # Following forks finds the children to come, not those that are there.
    attached = [word for pid in program.pids() for word in ("-p", str(pid))]
    strace = subprocess.Popen(["strace", "-f", "-c", *attached, "-o", str(summary)], stderr=subprocess.PIPE)
    assert strace.stderr
    for _ in attached[::2]:
        strace.stderr.readline()  # that it is attached
    printed = output(command, 120)
    if not re.search(rf"^Complete requests:\s+{number}\nFailed requests:\s+0$", printed, re.MULTILINE):
        raise BenchError(f"{' '.join(command)}: not all were answered\n{printed}")
    time.sleep(0.3)
    strace.send_signal(signal.SIGINT)
    strace.communicate(timeout=30)
    return {name: calls / number for name, calls in counts(summary.read_text()).items()}


def counts(summary: str) -> dict[str, int]:
    """Calls by name, from what `strace -c` prints, with those that failed under a name of their own."""
    found = {}
    for line in summary.splitlines():
        row = re.fullmatch(r"\s*[\d.]+\s+[\d.]+\s+\d+\s+(\d+)\s+(\d+)?\s+(\w+)", line)
        if row and row[3] != "total":
            found[row[3]] = int(row[1])
            if row[2]:
                found[f"{row[3]} that failed"] = int(row[2])
    return found


def table(columns: Mapping[str, Counts]) -> str:
    names = sorted(
        {name for counts in columns.values() for name, count in counts.items() if count >= LEAST},
        key=lambda name: (-max(counts.get(name.split()[0], 0) for counts in columns.values()), name),
    )
    rows = [["", *columns]]
    rows += [[name, *(_show(counts.get(name, 0)) for counts in columns.values())] for name in names]
    totals = (sum(count for name, count in counts.items() if " " not in name) for counts in columns.values())
    rows.append(["all", *map(_show, totals)])
    return "\n".join("  ".join([f"{row[0]:26}", *(f"{cell:>16}" for cell in row[1:])]) for row in rows)


def _show(count: float) -> str:
    return f"{count:.2f}" if count >= LEAST else "-"


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.syscalls", description="Count system calls.")
    parser.add_argument("--number", type=int, default=2000, help="of connections, then of requests (default 2000)")
    parser.add_argument("--concurrent", type=int, default=1, help="at a time (default 1)")
    parser.add_argument("--peers", nargs="+", choices=plan.peers([]), default=PEERS, metavar="PEER")
    parser.add_argument(namespace.INSIDE, dest="inside", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
