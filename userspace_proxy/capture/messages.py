"""What the iptables capture and its workers say to each other: one JSON object a line.

A worker is asked one thing at a time and answers each `Ask` with one `Reply` of the same number. It
keeps no secrets: everything that its successor must know to go on is in `Open` and `Replace`.
"""

from __future__ import annotations

import msgspec

from userspace_proxy.model import IPFamily, Redirect


class Open(msgspec.Struct, tag=True, frozen=True):
    """First of all: which family to serve, and how."""

    family: IPFamily
    bind_address: str
    nodeport_cidrs: tuple[str, ...]
    inside: tuple[str, ...]
    """Networks whose clients are inside; of either family."""
    use_library: bool
    """Whether python-iptables may be used; not after it has brought one down at the start."""
    take_over: bool
    """Remove the remains of an earlier run. Not so where a worker succeeds one of the same run."""


class Replace(msgspec.Struct, tag=True, frozen=True):
    redirects: tuple[Redirect, ...]


class Change(msgspec.Struct, tag=True, frozen=True):
    """The difference to the redirects asked for before. With none, repair what others have changed."""

    gone: tuple[Redirect, ...] = ()
    new: tuple[Redirect, ...] = ()


class Withdraw(msgspec.Struct, tag=True, frozen=True):
    pass


class Close(msgspec.Struct, tag=True, frozen=True):
    pass


class Cleanup(msgspec.Struct, tag=True, frozen=True):
    """Instead of `Open`: remove what an earlier run, or kube-proxy's userspace mode, left of a family."""

    family: IPFamily


Request = Open | Replace | Change | Withdraw | Close | Cleanup


class Ask(msgspec.Struct, frozen=True):
    number: int
    request: Request


class Reply(msgspec.Struct, frozen=True):
    number: int = 0
    added: int = 0
    removed: int = 0
    repaired: int = 0
    refused: tuple[str, ...] = ()
    """Redirects that could not be had, one line each; all others are in place."""
    notes: tuple[str, ...] = ()
    """What a human should know though the request was met."""
    error: str = ""
    """Set if the request was not met."""
