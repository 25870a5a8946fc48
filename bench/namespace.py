"""A place of its own for a run: fresh network and PID namespaces, entered by running this program anew in them.

In a fresh network namespace there is nothing but lo: nobody else's traffic, rules or conntrack, and nothing
can leave the machine. In a fresh PID namespace this program is the first, and when it ends, however it ends,
the kernel kills whatever it started. What differs from host to host and decides bulk throughput is settled
here too: congestion control, and who shares a CPU with whom.
"""

from __future__ import annotations

import os
import pathlib
import signal
import socket
import subprocess
import sys
import types
from collections.abc import Sequence

CONGESTION_CONTROL = "reno"
"""The one that every kernel has and every namespace may choose; lo loses nothing, so that cubic would do the same."""
INSIDE = "--inside-namespaces"
"""The argument this program is given in its second life."""


def enter(arguments: Sequence[str]) -> int:
    """Run the same program inside, and return its exit status.

    Root is not needed where users may make namespaces in a user namespace of their own. Signals that ask this
    process to end are passed on, since `unshare` ignores them; should it be killed, all inside is killed too.
    """
    as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    unshare = ["unshare", *as_root, "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    command = ["setpriv", "--pdeathsig", "KILL", *unshare, sys.executable, "-m", "bench", INSIDE, *arguments]
    inside = subprocess.Popen(command, start_new_session=True)

    def pass_on(_signal: int, _frame: types.FrameType | None) -> None:
        os.killpg(inside.pid, signal.SIGINT)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    return inside.wait()


def furnish() -> None:
    """Check that this is such a place, and make it ready."""
    if os.getpid() != 1 or {name for _, name in socket.if_nameindex()} != {"lo"}:
        sys.exit(f"{INSIDE} is what this program tells itself, in namespaces it made; run it without")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    pathlib.Path("/proc/sys/net/ipv4/tcp_congestion_control").write_text(CONGESTION_CONTROL)


def leave_cpu_for_proxy() -> list[str]:
    """Keep off one CPU, with all that this process starts; returns the words before a command that make it run there.

    The proxy has it to itself, as all peers have in turn. Left to the scheduler, a proxy that uses little is
    given the worse company, and a run's throughput is a matter of luck. Without a second CPU nothing is done.
    """
    *others, last = sorted(os.sched_getaffinity(0))
    if not others:
        return []
    os.sched_setaffinity(0, others)
    return ["taskset", "--cpu-list", str(last)]
