"""Choosing how to capture: the way that was asked for, or the first that works.

What works is found by starting it, not by looking at versions or module lists.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from userspace_proxy.capture import iptables, local, nftables, sole
from userspace_proxy.capture.base import Capture
from userspace_proxy.capture.beside import Beside
from userspace_proxy.capture.none import NoCapture
from userspace_proxy.exceptions import CaptureError, CaptureUnavailable
from userspace_proxy.model import Protocol

logger = logging.getLogger(__name__)

AUTO = "auto"


@dataclass(frozen=True)
class Way:
    make: Callable[[str, Sequence[str], Sequence[str]], Capture]
    """From the bind address, the node ports' networks, and those whose clients are inside."""
    cleanup: Callable[[], Awaitable[None]] | None = None
    """Removes what an earlier run left."""


def _with_sctp(capture: Capture, bind: str) -> Capture:
    """SCTP takes another way than the kernel's NAT, on a kernel that has none as well: its module may come later."""
    return Beside(capture, local.Local(bind_address=bind, alone=False), [Protocol.SCTP])


_WAYS: Mapping[str, Way] = {
    "iptables": Way(
        lambda bind, cidrs, inside: _with_sctp(
            iptables.IPTables(bind_address=bind, nodeport_cidrs=cidrs, inside=inside), bind
        ),
        iptables.cleanup,
    ),
    "nftables": Way(
        lambda bind, cidrs, inside: _with_sctp(
            nftables.NFTables(bind_address=bind, nodeport_cidrs=cidrs, inside=inside), bind
        ),
        nftables.cleanup,
    ),
    "local": Way(lambda bind, cidrs, inside: local.Local(bind_address=bind), local.cleanup),
    "none": Way(lambda bind, cidrs, inside: NoCapture()),
}
"""In the order in which `auto` tries them; the last one works everywhere."""

NAMES = (AUTO, *_WAYS)
"""What `--capture` can be."""

_LEGACY_TABLES = ("/proc/net/ip_tables_names", "/proc/net/ip6_tables_names")


async def choose(
    name: str, *, bind_address: str, nodeport_cidrs: Sequence[str] = (), inside: Sequence[str] = ()
) -> Capture:
    """A capture that has been started. `inside` are networks whose clients are.

    Raises CaptureUnavailable if the one asked for does not work here (`auto` always finds one), and CaptureError where
    that cannot be found out.
    """
    capture = await (_first if name == AUTO else partial(_start, name))(bind_address, nodeport_cidrs, inside)
    try:
        await _clear(way for way in _WAYS if way != capture.name)
    except BaseException:
        await capture.close()
        raise
    return capture


async def _start(name: str, bind_address: str, nodeport_cidrs: Sequence[str], inside: Sequence[str]) -> Capture:
    capture = _WAYS[name].make(bind_address, nodeport_cidrs, inside)
    try:
        await capture.start()
    except BaseException:
        # Cancelled half-way, by a signal for one, it may have made rules already.
        await capture.close()
        raise
    return capture


async def _first(bind_address: str, nodeport_cidrs: Sequence[str], inside: Sequence[str]) -> Capture:
    for way in _WAYS:
        try:
            capture = await _start(way, bind_address, nodeport_cidrs, inside)
        except CaptureUnavailable as error:
            logger.warning("capture %s does not work here, trying the next way: %s", way, error)
            continue
        if capture.name == NoCapture.name:
            logger.warning("capture none: no traffic is redirected, clients must be given the proxy ports")
        return capture
    raise CaptureUnavailable(f"none of {', '.join(_WAYS)} works")


async def _clear(ways: Iterable[str]) -> None:
    """Remove what an earlier run, that captured in another way and was killed, has left."""
    for name in ways:
        remove = _WAYS[name].cleanup
        if remove is None or (name == iptables.IPTables.name and not _has_legacy_nat()):
            continue
        try:
            await remove()
        except CaptureError as error:
            logger.debug("what an earlier run may have left of capture %s cannot be removed: %s", name, error)


def _has_legacy_nat() -> bool:
    """Whether there can be rules of ours: to look for them in a table is to bring it into being."""
    found = ""
    for name in _LEGACY_TABLES:
        with suppress(OSError):
            found += Path(name).read_text()
    return "nat" in found.split()


async def cleanup() -> None:
    """Leave the kernel as if no proxy had ever captured here; raises CaptureError for what cannot be removed."""
    if other := sole.holder():
        logger.warning("%s captures here and will do so again with its next sync; end it first", other)
    problems = []
    for way in _WAYS.values():
        if way.cleanup is not None:
            try:
                await way.cleanup()
            except CaptureError as error:
                problems.append(str(error))
    if problems:
        raise CaptureError("; ".join(problems))
