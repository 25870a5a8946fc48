"""The contract of a capture: making the kernel hand the traffic of portals to proxy ports.

A capture owns everything it puts into the kernel (rules, routes, conntrack entries) and nothing else:
it never touches what it did not make. It knows ports by number only; the sockets behind them are the
proxier's business, which calls `replace` after they listen and before they close.

A `Redirect` is all that there is to render: the traffic of its portal goes to `proxy_port`, unless it comes from
*inside* and there is an `inside_port`. Inside are this node itself, whose traffic passes OUTPUT, and clients in the
networks that the capture is given at the start (--cluster-cidr). A capture that cannot tell takes `proxy_port` for all.
Redirects do not move with endpoints. That clients from other networks than a Service's source ranges, or clients for
whom there is no endpoint on this node, hear nothing is seen to by the proxy sockets (`sockets.screen`), whatever the
capture: packets must reach them with the source address they came with.
"""

from __future__ import annotations

import typing
from collections.abc import Collection
from dataclasses import dataclass

from userspace_proxy.model import Protocol, Redirect


@dataclass(frozen=True, slots=True)
class Changes:
    """What one `replace` did to the kernel."""

    added: int = 0
    """Rules added because a redirect is new or changed."""
    removed: int = 0
    repaired: int = 0
    """Rules that should have been there, or not have been, because somebody else changed ours."""
    refused: tuple[str, ...] = ()
    """Redirects that cannot be had, one line each; all others are in force."""


@dataclass(frozen=True, slots=True)
class Difference:
    """What makes some redirects out of others."""

    gone: tuple[Redirect, ...] = ()
    new: tuple[Redirect, ...] = ()


class Capture(typing.Protocol):
    name: str
    """As written in `--capture`, `/metrics` and the log."""

    rewrites_destination: bool
    """Whether an accepted TCP connection can be asked for its original destination (SO_ORIGINAL_DST)."""

    listens: frozenset[Protocol]
    """Whose clients come to the portals themselves, where sockets have to listen once `replace` is done."""

    async def start(self) -> None:
        """Take over: find out by trying whether this way works here, remove the remains of a crashed run.

        Raises CaptureUnavailable, having left nothing behind, if it does not, and CaptureError where that cannot be
        found out; `close` is to be called then.
        """

    async def replace(self, redirects: Collection[Redirect], difference: Difference | None = None) -> Changes:
        """Make the kernel equal to these redirects.

        `difference` is to those of the last call, so that a change costs what changed; after a call that failed, and
        at first, there is none. With one that is empty, or without, what others changed in ours is repaired.

        Connections that are already established go on. Raises CaptureError if what is in force now is not known;
        the next call tries again.
        """

    async def withdraw(self) -> None:
        """Redirect nothing any more. Established connections, which conntrack translates, must go on until close()."""

    async def close(self) -> None:
        """Leave nothing behind. Called once, after the drain; works from any state."""
