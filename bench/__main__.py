"""Measure this proxy beside its peers: `python -m bench`, or `make bench`.

Runs in namespaces of its own (`namespace`), round by round (`measure`), tells how it goes, and at the end
prints a table and saves it with all its numbers (`report`). Ctrl-C ends it, and everything it started.
"""

from __future__ import annotations

import argparse
import datetime
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Sequence

from bench import loads, namespace, report
from bench.measure import Run, rounds
from bench.peers import PEERS, Peer
from bench.programs import BenchError

RESULTS = pathlib.Path(__file__).parent / "results"
PROGRAMS = ("ip", "unshare", "setpriv", "taskset", "wrk", "nginx", "iperf3", "haproxy")


def main(arguments: Sequence[str]) -> int:
    options = _parse(arguments)
    if not options.inside:
        missing = [program for program in PROGRAMS if not shutil.which(program)]
        if missing:
            print(f"bench needs {', '.join(missing)}; as root, make bench installs them on Debian", file=sys.stderr)
            return 1
        return namespace.enter(arguments)
    namespace.furnish()
    place = namespace.leave_cpu_for_proxy()
    try:
        _measure(options, place)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _measure(options: argparse.Namespace, place: Sequence[str]) -> None:
    started = datetime.datetime.now(datetime.UTC)
    peers = [PEERS[name](place) for name in options.peers]
    chosen = [load for load in loads.LOADS if load.name in options.loads]
    about = _about(options, peers, chosen, started)
    estimate = options.rounds * len(peers) * (len(chosen) * (options.seconds + 0.4) + 0.7)
    print(f"{options.rounds} rounds, some {estimate / 60:.1f} minutes", flush=True)
    runs: list[Run] = []
    with tempfile.TemporaryDirectory() as folder, loads.endpoints(pathlib.Path(folder)):
        for run in rounds(options.rounds, peers, chosen, options.seconds):
            runs.append(run)
            print(_progress(run, started), flush=True)
    names = [peer.name for peer in peers]
    text = "\n".join((report.table(runs, names), "", *report.describe(about, runs)))
    folder = options.save / started.strftime("%Y-%m-%d")
    report.write(folder, report.document(runs, names, about), text)
    print(f"\n{text}\n\nsaved in {folder}")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure this proxy beside its peers.")
    names = [load.name for load in loads.LOADS]
    parser.add_argument("--rounds", type=_positive, default=5, help="how often each is measured (default 5)")
    parser.add_argument("--seconds", type=_positive, default=3, help="how long each load lasts (default 3)")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), help="whom to measure (default all)")
    parser.add_argument("--loads", nargs="+", choices=names, default=names, help="under what (default all)")
    parser.add_argument(
        "--save", type=pathlib.Path, default=RESULTS, help="results go to a folder in here named for the day"
    )
    parser.add_argument(namespace.INSIDE, dest="inside", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 100:
        raise argparse.ArgumentTypeError(f"{text} is not from 1 to 100")
    return number


def _about(
    options: argparse.Namespace, peers: Sequence[Peer], chosen: Sequence[loads.Load], started: datetime.datetime
) -> dict[str, object]:
    return {
        "started": started.isoformat(timespec="seconds"),
        "rounds": options.rounds,
        "seconds": options.seconds,
        "machine": report.machine(),
        "versions": {peer.name: peer.version for peer in peers} | loads.versions(),
        "loads": {load.name: load.title for load in chosen},
    }


def _progress(run: Run, started: datetime.datetime) -> str:
    took = datetime.datetime.now(datetime.UTC) - started
    figures = ((figure, figure.value(run)) for figure in report.FIGURES if figure.load == run.load)
    told = ", ".join(f"{f.title} {value:,.{f.digits}f} {f.unit}" for f, value in figures if value is not None)
    return f"{took.seconds:4d} s  round {run.round}  {run.peer:16}{run.load:12} {told}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
