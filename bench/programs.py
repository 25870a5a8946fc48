"""Programs that run beside the measuring one: started, waited for, looked at, ended.

A `Program` is a process and all its descendants. What it used is read from /proc; what it printed lies in a
file, and is shown when it fails. Which programs there are is in `peers` (what is measured) and `loads` (what
it is measured with).
"""

from __future__ import annotations

import os
import pathlib
import socket
import subprocess
import tempfile
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType

PATIENCE = 15.0
"""Seconds a program gets to start or to end."""

_TICKS = os.sysconf("SC_CLK_TCK")


class BenchError(Exception):
    """The run is worth nothing; the message says why."""


@dataclass(frozen=True, slots=True)
class CPU:
    """Processor time in seconds."""

    user: float
    system: float

    def __sub__(self, earlier: CPU) -> CPU:
        return CPU(self.user - earlier.user, self.system - earlier.system)

    @property
    def total(self) -> float:
        return self.user + self.system


class Program:
    """A program in the foreground, for a `with`. Its output goes to a file in `folder`."""

    def __init__(self, command: Sequence[str], folder: pathlib.Path) -> None:
        self.command = tuple(command)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".log", delete=False) as output:
            self._output = pathlib.Path(output.name)
            self._process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )

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
                raise BenchError(
                    f"{self._said()}\n{' '.join(self.command)}: ended with status {self._process.returncode}"
                )
            if time.monotonic() > deadline:
                raise BenchError(f"{self._said()}\n{' '.join(self.command)}: not {what} within {PATIENCE:g} s")
            time.sleep(0.02)

    def cpu(self) -> CPU:
        """What all its processes and their threads have used so far."""
        user = system = 0
        for pid in self._family(self._process.pid):
            # After the name, which may hold anything, in brackets: state is field 3, utime 14, stime 15.
            fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            user += int(fields[11])
            system += int(fields[12])
        return CPU(user / _TICKS, system / _TICKS)

    def _family(self, pid: int) -> Iterator[int]:
        yield pid
        for thread in pathlib.Path(f"/proc/{pid}/task").iterdir():
            for child in (thread / "children").read_text().split():
                yield from self._family(int(child))

    def _said(self) -> str:
        return self._output.read_text(errors="replace")[-2000:].rstrip()


def is_listening(ip: str, port: int) -> bool:
    try:
        socket.create_connection((ip, port), timeout=1).close()
    except OSError:
        return False
    return True


def version(*command: str) -> str:
    """The line of a program's output that says which it is."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=10)
    return done.stdout.strip().splitlines()[0].split(" Copyright")[0].strip()
