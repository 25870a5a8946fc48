"""What this host offers, what would be used of it, and what to do about each gap: `userspace-proxy check`.

Ways to capture are found by trying them, in a network namespace that is made for it and gone afterwards: neither a
proxy that runs already nor anything else on the host notices. Who may not make one may not change rules either, so that
a try in place does no harm. Capturing itself is `capture`'s; what a flag means, `config`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import json
import logging
import os
import platform
import re
import socket
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from userspace_proxy import host
from userspace_proxy.capture import conntrack
from userspace_proxy.capture.choose import AUTO, NAMES, choose
from userspace_proxy.capture.conntrack import Place
from userspace_proxy.capture.none import NoCapture
from userspace_proxy.config import Config
from userspace_proxy.exceptions import CaptureError
from userspace_proxy.model import IPFamily, Protocol

OK, LIMITED, MISSING = "ok", "limited", "missing"

_CAPABILITIES = {"NET_ADMIN": 12, "NET_RAW": 13, "NET_BIND_SERVICE": 10}
_WHAT_FOR = {
    "NET_ADMIN": "rules and routes: run as root, or in a user namespace that owns its network (unshare -Urn)",
    "NET_RAW": "legacy iptables: run as root",
    "NET_BIND_SERVICE": "capture local at ports below {}: run as root, or sysctl net.ipv4.ip_unprivileged_port_start",
}
_FEW_DESCRIPTORS = 16384
_CLONE_NEWNET = 0x40000000
_SET_FLAGS, _UP = 0x8914, 0x1
_SCTP = 132


class Finding(NamedTuple):
    name: str
    state: str
    found: str
    todo: str = ""
    """Empty where nothing needs to be done."""


class Report(NamedTuple):
    capture: str
    """What would be used; empty: what was asked for does not work."""
    findings: tuple[Finding, ...]

    def as_json(self) -> str:
        findings = [finding._asdict() for finding in self.findings]
        return json.dumps({"capture": self.capture, "findings": findings}, indent=2) + "\n"

    def as_table(self) -> str:
        rows = [("", "STATE", "FOUND"), *((each.name, each.state, each.found) for each in self.findings)]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        lines = []
        for number, (name, state, found) in enumerate(rows):
            lines.append(f"{name:{widths[0]}}  {state:{widths[1]}}  {found}")
            if number and self.findings[number - 1].todo:
                lines.append(f"{'':{widths[0]}}  {'':{widths[1]}}  -> {self.findings[number - 1].todo}")
        used = f"capture {self.capture} will be used" if self.capture else "what was asked for does not work here"
        return "\n".join((*lines, "", used, ""))


def report(config: Config) -> Report:
    """Look at everything. Call it once, in a process of its own: it leaves the network namespace, if it may."""
    of_the_host = [*_system(), *_sockets(), *_limits()]
    capabilities = _held()
    listeners = host.listeners_on_all_addresses()
    elsewhere = _leave()
    if not elsewhere and "NET_ADMIN" in capabilities:
        tried = {
            name: Finding(f"capture {name}", LIMITED, "not tried", "run this with CAP_SYS_ADMIN too, to try it aside")
            for name in NAMES[1:]
        }
    else:
        tried = {name: _try(name, config) for name in NAMES[1:]}
    if tried["local"].state is not MISSING and listeners:
        ports = ", ".join(map(str, listeners))
        besides = f"; what listens on all addresses would answer at service addresses too: ports {ports}"
        tried["local"] = tried["local"]._replace(found=tried["local"].found + besides)
    works = [name for name, finding in tried.items() if finding.state is not MISSING]
    asked = config.capture.value
    used = next(iter(works), "") if asked == AUTO else asked if asked in works else ""
    return Report(used, (*of_the_host, *_permissions(capabilities), *tried.values(), _conntrack()))


# The host


def _system() -> Iterator[Finding]:
    yield Finding("kernel", OK, platform.release())
    for family in IPFamily:
        if host.is_local_address(family.loopback):
            yield Finding(family.value, OK, f"{family.loopback} can be bound")
        else:
            yield Finding(
                family.value, MISSING, f"{family.loopback} cannot be bound", "ip link set lo up, or do without"
            )


def _sockets() -> Iterator[Finding]:
    yield Finding("splice", OK, "works") if _splices() else Finding("splice", MISSING, "fails", "add --splice=false")
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, _SCTP).close()
        yield Finding("SCTP", OK, "sockets can be opened")
    except OSError as error:
        yield Finding("SCTP", MISSING, error.strerror or "", "for Services of SCTP: modprobe sctp")


def _splices() -> bool:
    """Bytes from one socket to another, through a pipe."""
    with contextlib.ExitStack() as stack:
        client, entry = (stack.enter_context(each) for each in socket.socketpair())
        out, server = (stack.enter_context(each) for each in socket.socketpair())
        drain, fill = os.pipe()
        stack.callback(os.close, drain)
        stack.callback(os.close, fill)
        client.send(b"through")
        try:
            moved = os.splice(entry.fileno(), fill, 100)
            os.splice(drain, out.fileno(), moved)
        except OSError:
            return False
        return server.recv(100) == b"through"


def _limits() -> Iterator[Finding]:
    most = host.raise_descriptor_limit()
    found = f"{most} descriptors at most, two for each connection"
    few = most < _FEW_DESCRIPTORS
    yield Finding("descriptors", LIMITED if few else OK, found, "ulimit -n, or LimitNOFILE in its unit" if few else "")
    backlog = _read("net/core/somaxconn")
    few = 0 < backlog < 4096
    yield Finding(
        "listen queue",
        LIMITED if few else OK,
        f"{backlog} clients can wait for each service port",
        "sysctl net.core.somaxconn=4096" if few else "",
    )


def _read(name: str) -> int:
    try:
        return int((Path("/proc/sys") / name).read_text())
    except OSError:
        return 0


# Permissions


def _held() -> set[str]:
    status = Path("/proc/self/status").read_text()
    effective = int(next(line for line in status.splitlines() if line.startswith("CapEff:")).split()[1], 16)
    return {name for name, bit in _CAPABILITIES.items() if effective >> bit & 1}


def _permissions(held: set[str]) -> Iterator[Finding]:
    for name, what_for in _WHAT_FOR.items():
        todo = what_for.format(host.first_unprivileged_port())
        yield Finding(f"CAP_{name}", *((OK, "held") if name in held else (MISSING, "not held", todo)))


def _leave() -> bool:
    """Into a network namespace of our own, with lo up. Whether that is allowed."""
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
        return False
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SET_FLAGS, struct.pack("16sH14x", b"lo", _UP))
    return True


# Capture


class _Remarks(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _try(name: str, config: Config) -> Finding:
    """Start it for real, and take it back."""
    if name == NoCapture.name:
        return Finding("capture none", OK, "works; clients must be given the proxy ports")
    remarks = _Remarks()
    logger = logging.getLogger("userspace_proxy.capture")
    logger.addHandler(remarks)
    logger.propagate = False
    try:
        asyncio.run(_start_and_close(name, config))
    except CaptureError as error:
        return Finding(f"capture {name}", MISSING, *_split(str(error)))
    finally:
        logger.removeHandler(remarks)
        logger.propagate = True
    if remarks.lines:
        return Finding(f"capture {name}", LIMITED, f"works; {'; '.join(remarks.lines)}")
    return Finding(f"capture {name}", OK, "works")


def _split(problem: str) -> tuple[str, str]:
    """What is wrong, and what to do about it; of a problem of both families, each has its own."""
    parts = re.split(r"; (?=IPv[46] is not available)", problem)
    wrong, todo = zip(*(part.rsplit(": ", 1) if ": " in part else (part, "") for part in parts), strict=True)
    return "; ".join(wrong), "; ".join(dict.fromkeys(filter(None, todo)))


async def _start_and_close(name: str, config: Config) -> None:
    capture = await choose(
        name,
        bind_address=config.bind_address,
        nodeport_cidrs=config.nodeport_addresses,
        inside=config.cluster_cidr,
    )
    await capture.close()


def _conntrack() -> Finding:
    """Whether UDP clients can be sent anew when a Service changes."""
    place = Place(Protocol.UDP, "192.0.2.1", 9)
    try:
        conntrack.flush(IPFamily.IPV4, {place: 0})
    except OSError as error:
        first = "run as root" if error.errno == errno.EPERM else "modprobe nf_conntrack_netlink, as root"
        todo = f"for UDP Services: {first}; captures local and none need it not"
        return Finding("conntrack", MISSING, error.strerror or str(error), todo)
    most = _read("net/netfilter/nf_conntrack_max")
    return Finding("conntrack", OK, "entries can be deleted" + (f", {most} of them fit" if most else ""))


FORMATS: Mapping[str, Callable[[Report], str]] = {"table": Report.as_table, "json": Report.as_json}


def split(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The output's format, as it was given, and all other flags."""
    form, rest = "table", []
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name in ("-o", "--output"):
            form = value if equals else next(words, "")
        else:
            rest.append(word)
    return form, rest
