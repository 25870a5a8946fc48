"""Messages over SCTP, ours beside socat and beside nobody: python -m bench.sctp [MESSAGES]

One association, messages on its streams in turn, some on their way at a time, each sent back by the endpoint. Where the
kernel has no SCTP all of it runs in a user-mode Linux with one slow CPU: there only what stands in one table compares.
"""

from __future__ import annotations

import contextlib
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial

from bench.peers import write_manifest
from bench.programs import CPU, Program
from userspace_proxy import host

MACHINE = pathlib.Path(__file__).parent.parent / "tests" / "uml" / "machine.py"
ENDPOINT, OURS, SOCAT = ("127.0.0.1", 8080), ("127.0.0.1", 20000), ("127.0.0.1", 20001)
MESSAGES = 5000
SIZES = (100, 1400)
WINDOW = 16
STREAMS = 8
ROUNDS = 3

_SNDINFO, _NODELAY = 2, 3


def sctp() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_SCTP)
    sock.setsockopt(socket.IPPROTO_SCTP, _NODELAY, 1)
    return sock


def answer() -> None:
    """The endpoint: whatever comes goes back."""

    def echo(client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            while message := client.recv(65536):
                client.send(message)

    with sctp() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(ENDPOINT)
        server.listen(16)
        while True:
            client, _ = server.accept()
            threading.Thread(target=echo, args=(client,), daemon=True).start()


def exchange(place: tuple[str, int], size: int, count: int) -> float:
    """Messages a second, there and back."""
    message = bytes(size)
    with sctp() as client:
        client.settimeout(60)
        client.connect(place)
        began = time.monotonic()
        sent = received = 0
        while received < count:
            while sent < count and sent - received < WINDOW:
                control = (sent % STREAMS).to_bytes(2, sys.byteorder) + bytes(14)
                client.sendmsg([message], [(socket.IPPROTO_SCTP, _SNDINFO, control)])
                sent += 1
            if len(client.recv(65536)) != size:
                raise SystemExit(f"{place}: an answer of another size")
            received += 1
        return count / (time.monotonic() - began)


@contextlib.contextmanager
def proxies(folder: pathlib.Path) -> Iterator[dict[str, tuple[tuple[str, int], Program | None]]]:
    port = {"name": "calls", "port": OURS[1], "protocol": "SCTP"}
    service = {"metadata": {"name": "calls"}, "spec": {"clusterIP": "127.96.0.10", "ports": [port]}}
    subset = {"addresses": [{"ip": ENDPOINT[0]}], "ports": [port | {"port": ENDPOINT[1]}]}
    manifest = folder / "calls.json"
    write_manifest(
        manifest,
        [
            {"apiVersion": "v1", "kind": "Service", **service},
            {"apiVersion": "v1", "kind": "Endpoints", "metadata": {"name": "calls"}, "subsets": [subset]},
        ],
    )
    flags = [f"--manifests={manifest}", "--capture=none", "--bind-address=127.0.0.1", f"--proxy-port-range={OURS[1]}"]
    commands = {
        "userspace-proxy": [sys.executable, "-m", "userspace_proxy", *flags],
        "socat": ["socat", f"SCTP-LISTEN:{SOCAT[1]},fork,reuseaddr", f"SCTP:{ENDPOINT[0]}:{ENDPOINT[1]}"],
    }
    with contextlib.ExitStack() as stack:
        endpoint = stack.enter_context(Program([sys.executable, "-m", "bench.sctp", "endpoint"], folder))
        endpoint.wait_until(lambda: _answers(ENDPOINT), "answering")
        found: dict[str, tuple[tuple[str, int], Program | None]] = {"direct": (ENDPOINT, None)}
        for (name, command), place in zip(commands.items(), (OURS, SOCAT), strict=True):
            program = stack.enter_context(Program(command, folder))
            program.wait_until(partial(_answers, place), "answering")
            found[name] = (place, program)
        yield found


def _answers(place: tuple[str, int]) -> bool:
    try:
        return exchange(place, 1, 1) > 0
    except OSError:
        return False


def measure(count: int) -> None:
    print(f"{'':18}{'bytes':>7}{'messages/s':>13}{'CPU us/message':>17}", flush=True)
    with tempfile.TemporaryDirectory() as folder, proxies(pathlib.Path(folder)) as peers:
        for size in SIZES:
            rates: dict[str, list[float]] = {name: [] for name in peers}
            costs: dict[str, list[float]] = {name: [] for name in peers}
            for _ in range(ROUNDS):
                for name, (place, program) in peers.items():
                    before = program.cpu() if program else CPU(0, 0, 0)
                    rates[name].append(exchange(place, size, count))
                    time.sleep(0.2)  # a child that has ended counts once its parent has waited for it
                    spent = program.cpu() - before if program else CPU(0, 0, 0)
                    costs[name].append(spent.total / count * 1e6)
            for name in peers:
                cost = f"{statistics.median(costs[name]):17.1f}" if peers[name][1] else f"{'-':>17}"
                print(f"{name:18}{size:7}{statistics.median(rates[name]):13,.0f}{cost}", flush=True)


def main(arguments: Sequence[str]) -> int:
    if list(arguments) == ["endpoint"]:
        answer()
    if host.sctp():
        command = [sys.executable, str(MACHINE), sys.executable, "-m", "bench.sctp", *arguments]
        return subprocess.run(command, check=False).returncode
    measure(int(arguments[0]) if arguments else MESSAGES)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
