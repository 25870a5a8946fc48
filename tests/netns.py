"""Throw-away network namespaces for tests: made in a moment, gone with their last descriptor.

    with Namespace() as node, Namespace() as client:
        node.connect(client, "10.1.0.1/24", "10.1.0.2/24")
        client.run("ip route add default via 10.1.0.1")
        server = node.spawn("python3 -m http.server 8000")
        with node.entered():
            ...  # sockets made and programs started by this thread, asyncio's included, belong to the node
        print(client.run("curl -s http://10.1.0.1:8000/"))

A namespace is held by a descriptor, not by a process or a name in /run/netns, so that nothing is left behind
however a test run ends. Its rules, routes, sockets, conntrack entries and /proc/sys/net are its own; files
(/run/xtables.lock among them) are shared with the machine. lo is up. Needs root: mark tests `privileged`.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import shlex
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)
_interface_numbers = itertools.count()


def _checked(result: int) -> None:
    if result:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


class Namespace:
    """A network namespace with nothing but lo, and the programs started in it."""

    def __init__(self) -> None:
        self._descriptor = _new_namespace()
        self._programs: list[subprocess.Popen[str]] = []
        self.run("ip link set lo up")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill the programs started here and let the namespace go. More than once is fine."""
        for program in self._programs:
            program.kill()
            program.communicate()
        self._programs.clear()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    @property
    def path(self) -> str:
        """For programs that take a namespace by path, such as ip and nsenter."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Move the calling thread into the namespace for a while.

        Threads started meanwhile stay inside; those that exist already, such as an executor's, stay outside.
        """
        outside = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _checked(_libc.setns(self._descriptor, _CLONE_NEWNET))
            try:
                yield
            finally:
                _checked(_libc.setns(outside, _CLONE_NEWNET))
        finally:
            os.close(outside)

    def run(self, command: str, *, text: str = "", check: bool = True, timeout: float = 30) -> str:
        """Run a program to its end and return its output, stderr included.

        Words are split as a shell does; for a pipe, run `sh -c '...'`. Fails with the output if the program does.
        """
        with self.entered():
            done = subprocess.run(
                shlex.split(command),
                input=text,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=timeout,
                check=False,
            )
        if check and done.returncode:
            raise AssertionError(f"{command}: exit status {done.returncode}\n{done.stdout}")
        return done.stdout

    def spawn(self, command: str, *, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        """Start a program that runs until the namespace is closed, or is ended by its test.

        Its output goes into one pipe: read it, or keep it below 64 KB.
        """
        with self.entered():
            program = subprocess.Popen(
                shlex.split(command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=env,
            )
        self._programs.append(program)
        return program

    def connect(self, other: Namespace, *addresses: str) -> tuple[str, str]:
        """Join two namespaces by a veth pair; returns the interfaces' names, here and there.

        Addresses come in pairs, ours and theirs, with their mask: "10.1.0.1/24", "10.1.0.2/24", "fd01::1/64", ...
        """
        number = next(_interface_numbers)
        here, there = f"veth{number}a", f"veth{number}b"
        self.run(f"ip link add {here} type veth peer name {there} netns {other.path}")
        for address in addresses[::2]:
            self.add_address(here, address)
        for address in addresses[1::2]:
            other.add_address(there, address)
        self.run(f"ip link set {here} up")
        other.run(f"ip link set {there} up")
        return here, there

    def add_address(self, interface: str, address: str) -> None:
        # Without nodad an IPv6 address cannot be used for its first second.
        self.run(f"ip addr add {address} dev {interface}{' nodad' if ':' in address else ''}")


def _new_namespace() -> int:
    """A descriptor of a new namespace. A thread makes it and ends, so that no other thread has to come back."""
    made: list[int | OSError] = []

    def make() -> None:
        try:
            _checked(_libc.unshare(_CLONE_NEWNET))
            made.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            made.append(error)

    maker = threading.Thread(target=make)
    maker.start()
    maker.join()
    if isinstance(made[0], OSError):
        raise made[0]
    return made[0]


def eventually(check: Callable[[], object], timeout: float = 5) -> None:
    """Wait until `check` gives something true; for what other processes bring about."""
    deadline = time.monotonic() + timeout
    while not check():
        assert time.monotonic() < deadline, f"still not so after {timeout:g} s: {check}"
        time.sleep(0.01)
