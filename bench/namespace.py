"""Places of their own for measuring: namespaces with nothing in them but lo.

`enter` runs this program anew in a fresh PID namespace: there it is the first, and when it ends, however it
ends, the kernel kills whatever it started. Inside, `fresh` makes a network namespace for each stage of a
round: nobody else's traffic, rules, conntrack entries or connections in TIME_WAIT, and nothing can leave the
machine. What differs from host to host and decides throughput is settled here too: congestion control, ports,
descriptors, and who shares a CPU with whom.
"""

from __future__ import annotations

import ctypes
import os
import pathlib
import resource
import signal
import socket
import subprocess
import sys
import types
from collections.abc import Sequence

SETTINGS = {
    # The one that every kernel has and every namespace may choose; lo loses nothing, so that cubic would do the same.
    "ipv4/tcp_congestion_control": "reno",
    # Above all that listens at a fixed port here.
    "ipv4/ip_local_port_range": "16384 65535",
    # Connections that are over stay in conntrack for minutes, flows for half of one, and soon it is full.
    "netfilter/nf_conntrack_tcp_timeout_time_wait": "2",
    "netfilter/nf_conntrack_udp_timeout": "2",
    "netfilter/nf_conntrack_udp_timeout_stream": "2",
}
INSIDE = "--inside-namespaces"
"""The argument this program is given in its second life."""

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def enter(module: str, arguments: Sequence[str]) -> int:
    """Run `module` inside, and return its exit status.

    Root is not needed where users may make namespaces in a user namespace of their own. Signals that ask this
    process to end are passed on, since `unshare` ignores them; should it be killed, all inside is killed too.
    """
    as_root = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    unshare = ["unshare", *as_root, "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    command = ["setpriv", "--pdeathsig", "KILL", *unshare, sys.executable, "-m", module, INSIDE, *arguments]
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
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    fresh()


def fresh() -> None:
    """Move on to a new network namespace; the last one goes with the last program that was left in it."""
    if _libc.unshare(_CLONE_NEWNET):
        code = ctypes.get_errno()
        raise OSError(code, f"cannot make a network namespace: {os.strerror(code)}")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    for name, value in SETTINGS.items():
        setting = pathlib.Path("/proc/sys/net", name)
        if os.access(setting, os.W_OK):  # conntrack's are not there before it is loaded, or not ours without root
            setting.write_text(value)


def may_have_rules() -> bool:
    """Whether iptables can be used: root by name has the right to, but only real root has the lock."""
    return os.access("/run/xtables.lock" if os.path.exists("/run/xtables.lock") else "/run", os.W_OK)


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


def anywhere() -> list[str]:
    """The words before a command that make it run on every CPU: for a proxy that means to use more than one."""
    return ["taskset", "--cpu-list", f"0-{(os.cpu_count() or 1) - 1}"]
