"""Measure this proxy beside its peers: `python -m bench`, or `make bench`.

Runs in namespaces of its own (`namespace`), round by round (`measure`, `control`), what `plan` says, tells how
it goes, and at the end prints a table and saves it with all its numbers and pictures (`report`, `pictures`).
Ctrl-C ends it, and everything it started.
"""

from __future__ import annotations

import argparse
import datetime
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from bench import control, namespace, plan, report
from bench.loads import bulk, http, udp
from bench.measure import Run, relay
from bench.peers import Peer, Way
from bench.programs import BenchError
from bench.results import OURS
from bench.services import versions

RESULTS = pathlib.Path(__file__).parent / "results"
ENOUGH = 5
"""Rounds of which medians say something."""
PROGRAMS = {
    program: package
    for package, programs in {
        "iproute2": ["ip"],
        "iptables": ["iptables-legacy"],
        "haproxy": ["haproxy"],
        "libnginx-mod-stream": ["nginx"],
        "socat": ["socat"],
        "wrk": ["wrk"],
        "apache2-utils": ["ab"],
        "iperf3": ["iperf3"],
        "dnsperf": ["dnsperf"],
        "nsd": ["nsd"],
    }.items()
    for program in programs
}


def main(arguments: Sequence[str]) -> int:
    options = _parse(arguments)
    if not options.inside:
        missing = sorted({package for program, package in PROGRAMS.items() if not shutil.which(program)})
        if missing:
            print(f"bench needs {', '.join(missing)}; as root, make bench installs them on Debian", file=sys.stderr)
            return 1
        return namespace.enter("bench", arguments)
    namespace.furnish()
    place = namespace.leave_cpu_for_proxy()
    try:
        return 1 if _measure(options, place) else 0
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _measure(options: argparse.Namespace, place: Sequence[str]) -> int:
    """Returns how much did not count."""
    started = datetime.datetime.now(datetime.UTC)
    makers = plan.peers(place)
    stages = plan.stages(options.only, options.peers or list(makers))
    sizes = options.services if control.GROUP in options.only and OURS in (options.peers or makers) else []
    if not namespace.may_have_rules():
        print("not root: rules cannot be made, so nobody comes by cluster IPs", flush=True)
        stages, sizes = [stage for stage in stages if stage.way is Way.STRAIGHT], []
    if not report.can_draw():
        print(
            "no matplotlib: there will be no pictures; make bench installs it, pip install '.[bench]' too", flush=True
        )
    peers = {name: makers[name]() for name in dict.fromkeys(name for stage in stages for name in stage.peers)}
    about = _about(options, peers, started)
    folder = options.save or RESULTS / _folder(started, options.rounds, stages, sizes, list(makers))
    estimate = options.rounds * (sum(_duration(s, options.seconds) for s in stages) + sum(map(control.duration, sizes)))
    print(f"{options.rounds} rounds, some {estimate / 60:.0f} minutes, to be saved in {folder}", flush=True)
    begin = time.monotonic()
    runs: list[Run] = []
    problems: list[str] = []
    for number in range(1, options.rounds + 1):
        for stage in _round(number, stages, peers, sizes, place, options.seconds):
            try:
                runs += _told(stage, begin)
            except BenchError as error:
                problems.append(f"round {number}, and nothing of this stage of it: {error}")
                print(f"not counted: {problems[-1]}", file=sys.stderr, flush=True)
    problems += [f"round {run.round}, {run.peer}, {run.load}: {run.problem}" for run in runs if run.problem]
    about |= {"minutes": round((time.monotonic() - begin) / 60, 1), "not counted": problems}
    text = report.save(folder, runs, about)
    print(f"\n{text}\n\nsaved in {folder}; {len(problems)} problems")
    return len(problems)


def _folder(
    started: datetime.datetime, rounds: int, stages: Sequence[plan.Stage], sizes: Sequence[int], peers: Sequence[str]
) -> str:
    """Named for the day; results of a part of what there is do not take the place of all of them."""
    is_whole = stages == plan.stages(_groups(), peers) and set(sizes) >= set(control.SIZES) and rounds >= ENOUGH
    return started.strftime("%Y-%m-%d" if is_whole else "%Y-%m-%d-partial")


def _groups() -> list[str]:
    return [*(group.name for group in plan.GROUPS), control.GROUP]


def _round(
    number: int,
    stages: Sequence[plan.Stage],
    peers: Mapping[str, Peer],
    sizes: Sequence[int],
    place: Sequence[str],
    seconds: float,
) -> Iterator[Iterator[Run]]:
    """The stages, none of which begins before it is gone through."""
    for stage in stages:
        first = (number - 1) % len(stage.peers)
        turns = (*stage.peers[first:], *stage.peers[:first])
        yield relay(number, stage, [peers[name] for name in turns], seconds)
    for size in sizes:
        yield control.measure(number, size, place)


def _told(stage: Iterator[Run], begin: float) -> list[Run]:
    """All runs of a stage, each told when it is over."""
    runs = []
    for run in stage:
        runs.append(run)
        print(f"{time.monotonic() - begin:5.0f} s  round {run.round}  {report.one_line(run)}", flush=True)
    return runs


def _duration(stage: plan.Stage, seconds: float) -> float:
    """Seconds that a stage takes, about: learned from runs."""
    each = 2 * seconds + 1.5 if stage.group.name == "idle" else seconds + 0.3
    return 2 + len(stage.peers) * each * len(stage.group.loads)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure this proxy beside its peers.")
    groups = _groups()
    number = _number(int, 1, 100)
    parser.add_argument("--rounds", type=number, default=ENOUGH, help=f"how often each is measured (default {ENOUGH})")
    parser.add_argument(
        "--seconds",
        type=_number(int, 1, 60),
        default=1,
        help="how long each load lasts (default 1; wrk knows whole ones)",
    )
    parser.add_argument("--only", nargs="+", choices=groups, default=groups, metavar="GROUP", help=", ".join(groups))
    parser.add_argument("--peers", nargs="+", choices=plan.peers([]), metavar="PEER", help=", ".join(plan.peers([])))
    parser.add_argument(
        "--services",
        nargs="+",
        type=_number(int, 10, 20000),
        default=control.SIZES,
        metavar="N",
        help=f"how many there are, for control (default {' '.join(map(str, control.SIZES))})",
    )
    parser.add_argument(
        "--save",
        type=pathlib.Path,
        metavar="FOLDER",
        help="where results go (default: a folder in bench/results named for the day, and with -partial behind that "
        "for less than all peers, groups and sizes, or fewer rounds)",
    )
    parser.add_argument(namespace.INSIDE, dest="inside", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _number(kind: Callable[[str], float], least: float, most: float) -> Callable[[str], float]:
    def number(text: str) -> float:
        found = kind(text)
        if not least <= found <= most:
            raise argparse.ArgumentTypeError(f"{text} is not from {least:g} to {most:g}")
        return found

    return number


def _about(options: argparse.Namespace, peers: Mapping[str, Peer], started: datetime.datetime) -> dict[str, object]:
    return {
        "started": started.isoformat(timespec="seconds"),
        "rounds": options.rounds,
        "seconds": options.seconds,
        "machine": report.machine(),
        "versions": {name: peer.version() for name, peer in peers.items()}
        | versions()
        | http.versions()
        | bulk.versions()
        | udp.versions(),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
