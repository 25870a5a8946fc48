"""How the proxy does with many services: its start, single changes, and many while it relays.

Services come from a folder of manifest files, some hundred to a file, and clients by cluster IPs. Two of them are
in files of their own, to be changed and waited for; a hundred more are there to be changed steadily. All have the
same web server behind them, at two addresses; which one answers is what a change decides.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence

from bench import namespace
from bench.loads.http import CONCURRENT, wrk
from bench.measure import Run
from bench.peers import UserspaceProxy, Way, objects, write_manifest
from bench.programs import PATIENCE, Address, BenchError, Program
from bench.results import OURS, of_samples
from bench.services import HTTP, Service, endpoints

GROUP = "control"
SIZES = (100, 1000, 5000, 10000)
COMPARED = 5000
CHURNED = 50
TO_A_FILE = 100
RATE = 100
"""Changes a second."""
CHURN_SECONDS = 2
ENDPOINT_CHANGES = 100
"""Cheap enough for a p99 that is not the slowest."""
SERVICE_CHANGES = 6
"""A second each: of so few, the slowest is told for what it is."""
TO_ENDPOINT, TO_SERVICE = "ms to an endpoint change", "ms to a service change"
MIN_SYNC_PERIOD = 1.0
SAMPLE = 16
"""Services that are asked again and again during the start; in the end all are."""
A: Address = ("127.1.1.1", HTTP)
B: Address = ("127.1.1.2", HTTP)


def duration(size: int) -> float:
    """Seconds that `measure` takes, about."""
    return (17 + size / 1000) * len(_captures(size))


def _captures(size: int) -> Mapping[str, str]:
    """By the peer's name. The other way of capturing is measured where the targets are."""
    return {OURS: "iptables"} | ({f"{OURS}-nftables": "nftables"} if size == COMPARED else {})


def measure(number: int, size: int, place: Sequence[str]) -> Iterator[Run]:
    for name, capture in _captures(size).items():
        yield _measure(number, size, UserspaceProxy(place, name=name, capture=capture))


def _measure(number: int, size: int, peer: UserspaceProxy) -> Run:
    namespace.fresh()
    with contextlib.ExitStack() as stack:
        folder, manifests, elsewhere = (
            pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-"))) for _ in range(3)
        )
        stack.enter_context(endpoints(folder))
        everything = _write(manifests, size)
        _write_churn(elsewhere, [])
        begin = time.monotonic()
        program = stack.enter_context(peer.serve(manifests, Way.CLUSTER, folder))
        figures = _start(peer, program, [service.cluster for service in everything], begin)
        samples, costs = _changes(program, manifests, everything)
        figures |= of_samples(TO_ENDPOINT, samples[TO_ENDPOINT], "p50", "p99")
        figures |= of_samples(TO_SERVICE, samples[TO_SERVICE], "p50", "slowest")
        figures |= costs
        quiet = _relaying(everything[-1], elsewhere)
        busy = _relaying(everything[-1], manifests)
        figures |= {f"p99 ms {when}": values["p99 ms"] for when, values in (("quiet", quiet), ("busy", busy))}
        figures |= {f"requests/s {when}": values["requests/s"] for when, values in (("quiet", quiet), ("busy", busy))}
        figures["p99 busy / quiet"] = busy["p99 ms"] / quiet["p99 ms"]
        command = " ".join(program.command)
    if any(_answer(service.cluster) for service in everything[:SAMPLE]):
        raise BenchError("the proxy is stopped but somebody answers: who was measured?")
    return Run(number, GROUP, Way.CLUSTER, peer.name, f"{size:,} services", figures, [command], samples=samples)


# -- what is served


def _service(number: int, *addresses: Address, cluster: int | None = None) -> Service:
    place = number if cluster is None else cluster
    return Service(
        f"s{number}", "tcp", (f"127.{96 + place // 65025}.{place // 255 % 255}.{place % 255 + 1}", 80), addresses
    )


def _write(manifests: pathlib.Path, size: int) -> list[Service]:
    """The first two are those to be changed one by one, the last stays as it is."""
    everything = [_service(number, A) for number in range(size)]
    for service in everything[:2]:
        write_manifest(manifests / f"{service.name}.json", [*objects(service)])
    churned, others = everything[2 : 2 + CHURNED], everything[2 + CHURNED :]
    _write_churn(manifests, churned)
    for first in range(0, len(others), TO_A_FILE):
        some = others[first : first + TO_A_FILE]
        write_manifest(manifests / f"some-{first}.json", [item for service in some for item in objects(service)])
    return everything


def _write_churn(folder: pathlib.Path, services: Sequence[Service]) -> None:
    """Two variants of each; every tenth changes its port, the others their endpoint. Without services: idle copies."""
    for number, service in enumerate(services or [_service(number, A) for number in range(2, 2 + CHURNED)]):
        ip, port = service.cluster
        other = (
            Service(service.name, "tcp", (ip, port + 1), (A,))
            if number % 10 == 0
            else Service(service.name, "tcp", service.cluster, (B,))
        )
        for variant, of_it in ((".a", service), (".b", other)):
            write_manifest(folder / f"{service.name}{variant}", [*objects(of_it)])
        (folder / f"{service.name}.json").write_bytes((folder / f"{service.name}.a").read_bytes())


# -- what is measured


def _start(peer: UserspaceProxy, program: Program, clusters: Sequence[Address], begin: float) -> dict[str, float]:
    """Until the last one answers. A few are asked all the time, then all of them, each until it does."""
    sample = clusters[:: max(1, len(clusters) // SAMPLE)]
    for address in sample:
        _wait_for(program, address)
    reached = time.monotonic()
    for address in clusters:
        if _answer(address) is None:  # the sample was wrong about the rest
            _wait_for(program, address)
            reached = time.monotonic()
    program.wait_until(peer.is_ready, "ready")
    return {
        "s to the last one": reached - begin,
        "CPU s to start": program.cpu().total,
        "RSS MB": program.memory()[0] / 1e6,
    }


def _wait_for(program: Program, address: Address) -> None:
    program.wait_until(lambda: _answer(address) is not None, "answering at all its services")


def _changes(
    program: Program, manifests: pathlib.Path, everything: Sequence[Service]
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """One change at a time, from the rename to the first answer that shows it; and what they cost."""
    time.sleep(2 * MIN_SYNC_PERIOD)
    of_endpoint, before = [], program.cpu()
    for number in range(ENDPOINT_CHANGES):
        to = (B, A)[number % 2]
        of_endpoint.append(_effect(manifests, _service(0, to), everything[0].cluster, to))
    between = program.cpu()
    of_service = []
    for number in range(SERVICE_CHANGES):
        time.sleep(1.1 * MIN_SYNC_PERIOD)  # so that it need not wait for the last one's
        moved = _service(1, A, cluster=len(everything) + number)
        of_service.append(_effect(manifests, moved, moved.cluster, A))
    after = program.cpu()
    return {TO_ENDPOINT: of_endpoint, TO_SERVICE: of_service}, {
        "CPU ms/endpoint change": (between - before).total / ENDPOINT_CHANGES * 1e3,
        "CPU ms/service change": (after - between).total / SERVICE_CHANGES * 1e3,
    }


def _effect(manifests: pathlib.Path, service: Service, at: Address, endpoint: Address) -> float:
    """Milliseconds."""
    begin = time.monotonic()
    write_manifest(manifests / f"{service.name}.json", [*objects(service)])
    while _answer(at) != endpoint[0]:
        if time.monotonic() - begin > PATIENCE:
            raise BenchError(f"{service.name} is not served by {endpoint} after {PATIENCE:g} s")
        time.sleep(0.0005)
    return round((time.monotonic() - begin) * 1e3, 3)


def _relaying(service: Service, changed: pathlib.Path) -> dict[str, float]:
    """Requests while manifests change: those that are served, or copies, so that the machine has the same to do."""
    command = [sys.executable, "-m", "bench.clients.changes", str(changed), str(RATE), str(CHURN_SECONDS + 0.5)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as changer:
        time.sleep(0.25)
        work = wrk(f"http://{service.cluster[0]}:{service.cluster[1]}/", CONCURRENT, CHURN_SECONDS)
        made = json.loads(changer.communicate(timeout=PATIENCE)[0])["changes"]
    if made < RATE * CHURN_SECONDS:
        raise BenchError(f"{' '.join(command)}: no more than {made} changes")
    return work.figures


def _answer(address: Address) -> str | None:
    """Which endpoint answers there."""
    with contextlib.suppress(OSError), socket.create_connection(address, timeout=2) as sock:
        sock.sendall(b"GET /where HTTP/1.0\r\n\r\n")
        with sock.makefile("rb") as answer:
            return answer.read().rpartition(b"\r\n\r\n")[2].decode().strip() or None
    return None
