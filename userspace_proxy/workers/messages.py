"""What the control process and its workers say to each other, in MessagePack, over a socket pair (see `channel`).

The control process tells each worker what to serve; everything a worker must know is said again to its successor.
A proxy socket goes by a number, its `id`, and so does an `account`: the load balancer and the counts that several
sockets may share. No number is used twice for the same kind of thing.
"""

from __future__ import annotations

import msgspec

from userspace_proxy.config import LoggingFormat
from userspace_proxy.metrics import Outcome
from userspace_proxy.model import Address, Portal, Protocol, ProxyProtocol, SessionAffinity, SocketKey
from userspace_proxy.sockets.base import Session
from userspace_proxy.sockets.path import RelaySettings


class Start(msgspec.Struct, frozen=True):
    """What a worker is told when it is started, in JSON on its command line."""

    index: int
    settings: RelaySettings
    max_ejection: float
    verbosity: int
    logging_format: LoggingFormat


class Open(msgspec.Struct, tag=True, frozen=True):
    """A proxy socket that is there, not served yet. Its account has been told of by `Balance`."""

    id: int
    account: int
    key: SocketKey
    protocol: Protocol


class Balance(msgspec.Struct, tag=True, frozen=True):
    """How to choose among which endpoints from now on. At first it makes the account."""

    account: int
    endpoints: tuple[Address, ...]
    """In the order of their turns, which begins elsewhere for each worker."""
    ejected: tuple[Address, ...]
    affinity: SessionAffinity
    affinity_timeout: float


class Admit(msgspec.Struct, tag=True, frozen=True):
    id: int
    portals: tuple[Portal, ...] | None


class Speak(msgspec.Struct, tag=True, frozen=True):
    id: int
    proxy_protocol: ProxyProtocol


class Serve(msgspec.Struct, tag=True, frozen=True):
    """Take clients from the socket that comes along."""

    id: int


class Take(msgspec.Struct, tag=True, frozen=True):
    """Serve the client whose connection comes along: it was in the queue when that was about to end."""

    id: int


class Refuse(msgspec.Struct, tag=True, frozen=True):
    """Let go of that socket. Clients are refused already."""

    id: int


class Close(msgspec.Struct, tag=True, frozen=True):
    """The last socket of an account takes that along, once its sessions have ended and that is told."""

    id: int


class Drain(msgspec.Struct, tag=True, frozen=True):
    protocol: Protocol


class EndAll(msgspec.Struct, tag=True, frozen=True):
    protocol: Protocol
    outcome: Outcome


class AskCounts(msgspec.Struct, tag=True, frozen=True):
    number: int


class AskSessions(msgspec.Struct, tag=True, frozen=True):
    number: int


class Dialled(msgspec.Struct, tag=True, frozen=True):
    """Both ways: a dial ejected this endpoint, or brought it back."""

    account: int
    address: Address
    worked: bool


class Probing(msgspec.Struct, tag=True, frozen=True):
    """Both ways: a client is sent to this ejected endpoint, so that nobody else need be."""

    account: int
    address: Address


class Counts(msgspec.Struct, frozen=True, array_like=True):
    """How much the counts of an account have grown since they were last told."""

    account: int
    opened: int
    active: int
    to_endpoint: int
    to_client: int
    dials: int
    received: int
    replied: int
    affinity_hits: int
    ended: dict[Outcome, int]
    dial_failures: dict[int, int]
    drops: dict[str, int]


class Report(msgspec.Struct, tag=True, frozen=True):
    """Now and then, and when asked to."""

    number: int
    """Of the question; 0: nobody asked."""
    counts: tuple[Counts, ...]
    over: tuple[int, ...]
    """Accounts that are let go: of them there is nothing more to tell than what is told here."""
    active: dict[Protocol, int]
    """Sessions now, those of service ports that are closed included."""
    accept_pauses: int
    """Since the last report."""
    descriptors_in_use: int


class Sessions(msgspec.Struct, tag=True, frozen=True):
    number: int
    sessions: tuple[Session, ...]


class Idle(msgspec.Struct, tag=True, frozen=True):
    """Drained: the last session of the protocol has ended."""

    protocol: Protocol


class Missed(msgspec.Struct, tag=True, frozen=True):
    """The socket of a `Serve` did not come through: no descriptor was left for it."""

    id: int


ToWorker = (
    Open
    | Balance
    | Admit
    | Speak
    | Serve
    | Take
    | Refuse
    | Close
    | Drain
    | EndAll
    | AskCounts
    | AskSessions
    | Dialled
    | Probing
)
ToControl = Report | Sessions | Idle | Dialled | Probing | Missed
