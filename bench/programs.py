"""Programs that run beside the measuring one: started, waited for, looked at, ended.

A `Program` is a process and all its descendants. What it uses and which ports are its own is read from /proc;
what it prints lies in a file, and is shown when it fails. Which programs there are is in `peers` (what is
measured), `services` (what that is put before) and `loads` (what it is measured with).
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shlex
import shutil
import socket
import struct
import subprocess
import tempfile
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType

Address = tuple[str, int]

PATIENCE = 60.0
"""Seconds a program gets to start or to end."""

_TICKS = os.sysconf("SC_CLK_TCK")
_LISTENING = {"tcp": "0A", "udp": "07"}


class BenchError(Exception):
    """The run is worth nothing; the message says why."""


@dataclass(frozen=True, slots=True)
class CPU:
    """Processor time in seconds."""

    total: float
    """To the nanosecond, but for children that have ended."""
    user: float
    system: float
    """To a tick of the clock, 10 ms."""

    def __sub__(self, earlier: CPU) -> CPU:
        return CPU(self.total - earlier.total, self.user - earlier.user, self.system - earlier.system)


class Program:
    """A program in the foreground, for a `with`. Its output goes to a file in `folder`."""

    def __init__(self, command: Sequence[str], folder: pathlib.Path) -> None:
        """Raises BenchError if there is none."""
        self.command = tuple(command)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".log", delete=False) as output:
            self._output = pathlib.Path(output.name)
            try:
                self._process = subprocess.Popen(
                    self.command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
                )
            except OSError as error:
                raise BenchError(f"{shlex.join(command)}: cannot be started: {error.strerror}") from error
        self.pid = self._process.pid

    def __enter__(self) -> typing.Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End it in order; kill it if it will not."""
        if self._process.returncode is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def wait_until(self, is_ready: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not is_ready():
            if self._process.poll() is not None:
                raise BenchError(f"{self._said()}{shlex.join(self.command)}: ended, {self._process.returncode}")
            if time.monotonic() > deadline:
                raise BenchError(f"{self._said()}{shlex.join(self.command)}: not {what} within {PATIENCE:g} s")
            time.sleep(0.01)

    def pids(self) -> Iterator[int]:
        """All its processes, itself first."""
        return _family(self.pid)

    def cpu(self) -> CPU:
        """What all its processes and their threads have used so far, those that have ended included."""
        alive, user, system, ended = 0.0, 0, 0, 0
        for pid in self.pids():
            with contextlib.suppress(OSError):  # ended: its parent has its time
                # After the name, which may hold anything, in brackets: state is field 3; 14 to 17 are its own
                # time, user and system, and that of the children it has waited for.
                fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                alive += time.clock_gettime(_clock(pid))
                user += int(fields[11]) + int(fields[13])
                system += int(fields[12]) + int(fields[14])
                ended += int(fields[13]) + int(fields[14])
        return CPU(alive + ended / _TICKS, user / _TICKS, system / _TICKS)

    def memory(self) -> tuple[int, int]:
        """Resident bytes of all its processes: everything, and what is neither shared nor in a file."""
        resident = own = 0
        for pid in self.pids():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                lines = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
                sizes = {line.split()[0]: int(line.split()[1]) * 1024 for line in lines}
                resident += sizes["Rss:"]
                own += sizes["Pss_Anon:"]
        return resident, own

    def has(self, protocol: str, port: int) -> bool:
        """Whether it is this program that listens at a port."""
        # While others come and go by the thousand, the kernel's list of sockets can pass over one: so more than once.
        for _ in range(10):
            if any(_listeners(protocol, port) & set(_descriptors(pid)) for pid in self.pids()):
                return True
            time.sleep(0.1)
        return False

    def _said(self) -> str:
        said = self._output.read_text(errors="replace")[-2000:].rstrip()
        return f"{said}\n" if said else ""


def _clock(pid: int) -> int:
    """The clock of a process's time on processors, its ended threads' included: what clock_getcpuclockid(3) tells."""
    return (~pid << 3) | 2


def _family(pid: int) -> Iterator[int]:
    yield pid
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for thread in pathlib.Path(f"/proc/{pid}/task").iterdir():
            for child in (thread / "children").read_text().split():
                yield from _family(int(child))


def _listeners(protocol: str, port: int) -> set[str]:
    rows = (line.split() for line in pathlib.Path(f"/proc/net/{protocol}").read_text().splitlines()[1:])
    return {
        f"socket:[{row[9]}]"
        for row in rows
        if row[3] == _LISTENING[protocol] and int(row[1].rpartition(":")[2], 16) == port
    }


def _descriptors(pid: int) -> Iterator[str]:
    for descriptor in pathlib.Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            yield os.readlink(descriptor)


def output(command: Sequence[str], seconds: float) -> str:
    """What a client prints, which is to end by itself after some `seconds`."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 30, check=False)
    except subprocess.TimeoutExpired:
        raise BenchError(f"{shlex.join(command)}: not over after {seconds + 30:g} s") from None
    if done.returncode:
        raise BenchError(f"{shlex.join(command)}: exit status {done.returncode}\n{done.stdout[-2000:]}{done.stderr}")
    return done.stdout


def is_listening(address: Address) -> bool:
    try:
        socket.create_connection(address, timeout=1).close()
    except OSError:
        return False
    return True


QUESTION = struct.pack("!6H", 1, 0, 1, 0, 0, 0) + b"\5bench\0" + struct.pack("!2H", 16, 1)
"""A question about TXT of bench., as a DNS message, and as good as any other datagram."""


def is_answering(address: Address) -> bool:
    """Whether a datagram is answered."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(0.5)
        try:
            sock.connect(address)
            sock.send(QUESTION)
            sock.recv(2048)
        except OSError:
            return False
    return True


def version(*command: str) -> str:
    """The line of a program's output that says which it is."""
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=10,
    )
    lines = [line for line in done.stdout.splitlines() if any(character.isdigit() for character in line)]
    told = next((line for line in lines if "version" in line.lower()), lines[0] if lines else "version unknown")
    return told.split(" Copyright")[0].strip()


def packaged(package: str) -> str:
    """The version of a Debian package, for a program that does not say which it is."""
    if shutil.which("dpkg-query"):
        done = subprocess.run(
            ["dpkg-query", "--show", "--showformat=${Version}", package], capture_output=True, text=True, check=False
        )
        if done.stdout:
            return f"{package} {done.stdout}"
    return "version unknown"
