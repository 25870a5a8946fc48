"""Choosing how to capture: the way that was asked for, or the first that works.

What works is found by starting it, not by looking at versions or module lists.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

from userspace_proxy.capture import iptables
from userspace_proxy.capture.base import Capture
from userspace_proxy.capture.none import NoCapture
from userspace_proxy.exceptions import CaptureUnavailable

logger = logging.getLogger(__name__)

AUTO = "auto"

_WAYS: Mapping[str, Callable[[str, Sequence[str], Sequence[str]], Capture]] = {
    "iptables": lambda bind_address, nodeport_cidrs, inside: iptables.IPTables(
        bind_address=bind_address, nodeport_cidrs=nodeport_cidrs, inside=inside
    ),
    "none": lambda bind_address, nodeport_cidrs, inside: NoCapture(),
}
"""In the order in which `auto` tries them; the last one works everywhere."""

NAMES = (AUTO, *_WAYS)
"""What `--capture` can be."""


async def choose(
    name: str, *, bind_address: str, nodeport_cidrs: Sequence[str] = (), inside: Sequence[str] = ()
) -> Capture:
    """A capture that has been started. `inside` are networks whose clients are.

    Raises CaptureUnavailable if the one asked for does not work here; `auto` always finds one.
    """
    if name != AUTO:
        capture = _WAYS[name](bind_address, nodeport_cidrs, inside)
        try:
            await capture.start()
        except BaseException:
            # Cancelled half-way, by a signal for one, it may have made rules already.
            await capture.close()
            raise
        return capture
    for way in _WAYS:
        try:
            capture = await choose(way, bind_address=bind_address, nodeport_cidrs=nodeport_cidrs, inside=inside)
        except CaptureUnavailable as error:
            logger.warning("capture %s does not work here, trying the next way: %s", way, error)
            continue
        if capture.name == NoCapture.name:
            logger.warning("capture none: no traffic is redirected, clients must be given the proxy ports")
        return capture
    raise CaptureUnavailable(f"none of {', '.join(_WAYS)} works")


async def cleanup() -> None:
    """Leave the kernel as if no proxy had ever captured here; raises CaptureError for what cannot be removed."""
    await iptables.cleanup()
