#!/usr/bin/env python3
"""Run a command as root in a user-mode Linux machine, whose kernel has SCTP and netfilter where this one may not.

    tests/uml/machine.py [--writable DIRECTORY]... COMMAND ARGUMENT...

The guest sees this machine's files, read-only but for the directories given, has its own /tmp, /run and /dev/shm,
one CPU and no network but lo, and powers off when the command ends: about 3 seconds besides the command's own. Its
kernel is Debian's package `user-mode-linux`. Exit status: the command's own; 124: out of time; 125: the guest failed.
Environment: UML_MEM (512M), UML_SECONDS (480).

This file is also the guest's init, run by the same Python. The host's half is at the end, `host`; which tests run
here is decided in `tests.uml.reports`.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import time
import traceback
from pathlib import Path

MODULES = """
    hmac sctp sctp_diag bridge dummy veth iptable_nat iptable_filter ip6table_nat ip6table_filter
    xt_REDIRECT xt_nat xt_tcpudp xt_sctp xt_comment xt_addrtype xt_conntrack xt_multiport xt_state
""".split()  # noqa: SIM905 - for people
MODULE_TREE = Path("/usr/lib/uml/modules")
OUT_OF_TIME = 124
GUEST_FAILED = 125

_FINIT_MODULE = 313  # the number on x86-64, the one machine that Debian has a user-mode kernel for
_READ_ONLY = 1
_POWER_OFF = 0x4321FEDC
_SIOCSIFFLAGS = 0x8914
_UP_LOOPBACK_RUNNING = 0x1 | 0x8 | 0x40
_PR_SET_PDEATHSIG = 1


# -- the guest


def _told(what: str, result: int) -> None:
    if result:
        print(f"guest: {what}: {os.strerror(ctypes.get_errno())}", file=sys.stderr)


def _mount(libc: ctypes.CDLL, kind: str, where: str, source: str = "", flags: int = 0) -> None:
    os.makedirs(where, exist_ok=True)
    options = source.encode() if source else None
    _told(f"mount {where}", libc.mount(kind.encode(), where.encode(), kind.encode(), ctypes.c_ulong(flags), options))


def _furnish(libc: ctypes.CDLL, job: dict) -> None:
    """File systems, modules, an interface: what a program takes for granted."""
    _mount(libc, "proc", "/proc")
    _mount(libc, "sysfs", "/sys")
    for kind, where in (("devpts", "/dev/pts"), ("tmpfs", "/dev/shm"), ("tmpfs", "/run"), ("tmpfs", "/tmp")):
        _mount(libc, kind, where)
    for directory in job["hidden"]:
        _mount(libc, "hostfs", directory, directory, _READ_ONLY)
    for directory in job["writable"]:
        _mount(libc, "hostfs", directory, directory)
    for link, target in (("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        if not os.path.lexists(f"/dev/{link}"):
            os.symlink(target, f"/dev/{link}")
    with contextlib.suppress(termios.error):  # newlines as they are
        attributes = termios.tcgetattr(1)
        attributes[1] &= ~termios.OPOST
        termios.tcsetattr(1, termios.TCSANOW, attributes)
    for path in job["modules"]:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        _told(f"load {path}", libc.syscall(_FINIT_MODULE, fd, b"", 0))
        os.close(fd)
    socket.sethostname("uml")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", _UP_LOOPBACK_RUNNING))
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")


def _run(job: dict) -> int:
    """The command's exit status. Whatever it leaves behind is reaped, as an init does."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
            os.chdir(job["directory"])
            for number in (signal.SIGINT, signal.SIGPIPE):
                signal.signal(number, signal.SIG_DFL)
            os.execvpe(job["command"][0], job["command"], job["environment"])
        except OSError as error:
            print(f"guest: {job['command'][0]}: {error}", file=sys.stderr)
        os._exit(127)
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def guest() -> None:
    """PID 1."""
    libc = ctypes.CDLL(None, use_errno=True)
    status = GUEST_FAILED
    _mount(libc, "hostfs", "/mnt", os.environ["UML_JOB"])
    try:
        job = json.loads(Path("/mnt/job.json").read_text())
        _furnish(libc, job)
        status = _run(job)
    except BaseException:  # noqa: BLE001 - an init that ends is a panic: it tells, and powers off
        traceback.print_exc()
    Path("/mnt/status").write_text(str(status))
    os.sync()
    with contextlib.suppress(termios.error):
        termios.tcdrain(1)
    libc.reboot(_POWER_OFF)
    time.sleep(60)


# -- the host


def _in_load_order(release: str) -> list[str]:
    """The paths of the modules wanted, each behind those it depends on; what is built in has none."""
    dependencies: dict[str, list[str]] = {}
    for line in (MODULE_TREE / release / "modules.dep").read_text().splitlines():
        path, _, rest = line.partition(":")
        dependencies[path] = rest.split()
    by_name = {Path(path).stem: path for path in dependencies}
    order: dict[str, None] = {}

    def add(path: str) -> None:
        if path not in order:
            for dependency in reversed(dependencies[path]):
                add(dependency)
            order[path] = None

    for name in MODULES:
        if name in by_name:
            add(by_name[name])
    return [str(MODULE_TREE / release / path) for path in order]


def kernel() -> str | None:
    """The user-mode kernel, if there is one here that has its modules."""
    found = shutil.which("linux.uml")
    return found if found and MODULE_TREE.is_dir() and any(MODULE_TREE.iterdir()) else None


def _describe(job: Path, command: list[str], writable: list[str]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TMPDIR"}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "IN_UML": "1"}
    # What the guest's own /tmp and /run would hide, and the command needs.
    needed = map(os.path.realpath, (os.getcwd(), sys.prefix, sys.base_prefix))
    release = max(path.name for path in MODULE_TREE.iterdir())
    description = {
        "command": command,
        "environment": environment,
        "directory": os.getcwd(),
        "writable": [os.path.realpath(path) for path in writable],
        "hidden": [path for path in dict.fromkeys(needed) if path.startswith(("/tmp/", "/run/"))],
        "modules": _in_load_order(release),
    }
    (job / "job.json").write_text(json.dumps(description))
    # Isolated and without site: the kernel gives it no environment.
    (job / "init").write_text(f"#!{sys.executable} -IS\n" + Path(__file__).read_text().split("\n", 1)[1])
    (job / "init").chmod(0o755)


def host(command: list[str], writable: list[str]) -> int:
    program = kernel()
    if program is None:
        print("user-mode Linux is not installed: apt-get install user-mode-linux", file=sys.stderr)
        return GUEST_FAILED
    with tempfile.TemporaryDirectory(prefix="uml.") as directory:
        job = Path(directory)
        _describe(job, command, writable)
        # In a pid namespace of its own nothing of it outlives this process; sh is that namespace's init.
        arguments = [
            *("unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", '"$@"; exit $?', "sh"),
            *(program, f"mem={os.environ.get('UML_MEM', '512M')}", f"uml_dir={job}/", "umid=u"),
            *("rootfstype=hostfs", "rootflags=/", "ro", f"init={job}/init", f"UML_JOB={job}"),
            *("con=null", "con0=null,fd:1", "ssl=null", "quiet", "loglevel=3", "selinux=0", "panic=-1", "noreboot"),
        ]
        libc = ctypes.CDLL(None)
        machine = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
        )
        out_of_time = False

        def stop(*_: object) -> None:
            nonlocal out_of_time
            out_of_time = True
            os.killpg(machine.pid, signal.SIGKILL)

        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        signal.signal(signal.SIGALRM, stop)
        signal.alarm(int(os.environ.get("UML_SECONDS", "480")))
        try:
            while chunk := machine.stdout.read1(65536):
                os.write(1, chunk)
            machine.wait()
        finally:
            signal.alarm(0)
            if machine.poll() is None:
                os.killpg(machine.pid, signal.SIGKILL)
                machine.wait()
        if out_of_time:
            print("the guest ran out of time (UML_SECONDS)", file=sys.stderr)
            return OUT_OF_TIME
        try:
            return int((job / "status").read_text())
        except (OSError, ValueError):
            print(f"the guest ended early, its kernel with status {machine.returncode}", file=sys.stderr)
            return GUEST_FAILED


def main(arguments: list[str]) -> int:
    writable = []
    while arguments[:1] == ["--writable"]:
        writable.append(arguments[1])
        arguments = arguments[2:]
    if not arguments:
        sys.exit(__doc__)
    return host(arguments, writable)


if __name__ == "__main__":
    if os.getpid() == 1 and "UML_JOB" in os.environ:
        guest()
    else:
        sys.exit(main(sys.argv[1:]))
