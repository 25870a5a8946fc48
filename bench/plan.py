"""Who is measured under what: the groups of loads, the peers of each, and which way clients come.

Peers cost a run each under each load, so each group has those that say something there: splice(2) is for bulk,
UDP is not for HAProxy. By cluster IP only those come that are compared: what their rules cost is the same for all.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bench import namespace, others
from bench.loads.base import Load
from bench.loads.bulk import WAYS, Bulk
from bench.loads.http import CONCURRENT, Connections, KeepAlive
from bench.loads.idle import Idle
from bench.loads.udp import Datagrams, Dns
from bench.peers import Direct, Peer, UserspaceProxy, Way
from bench.results import OURS
from bench.services import BODIES

KEEP_ALIVE = (1, CONCURRENT, 1000)
STREAMS = (1, 16)
IDLE = (1000, 8000)
SIZES = (64, 512, 1400)
FLOWS = (16, 1000)
RATE = 10000
COMPARED = (OURS, "haproxy", "direct")
TWO_WORKERS = f"{OURS}-2"
"""As HAProxy with two threads: what it gains shows where there are more CPUs than it and its clients need."""


@dataclass(frozen=True, slots=True)
class Group:
    """Loads that are measured in one go, by the same proxies one after another."""

    name: str
    title: str
    reference: str
    """The peer that ours is compared with."""
    loads: Sequence[Load]
    peers: Mapping[Way, Sequence[str]]
    more: bool = True
    """Whether peers from the environment can do it."""


GROUPS: Sequence[Group] = (
    Group(
        "keep-alive",
        "Requests over connections that stay",
        "haproxy",
        [KeepAlive(connections) for connections in KEEP_ALIVE],
        {Way.STRAIGHT: (OURS, TWO_WORKERS, "haproxy", "haproxy-2", "nginx", "socat", "direct"), Way.CLUSTER: COMPARED},
    ),
    Group(
        "sizes",
        f"Answers of some size, {CONCURRENT} connections that stay",
        "haproxy",
        [KeepAlive(CONCURRENT, size) for size in BODIES],
        {Way.STRAIGHT: (OURS, "haproxy", "haproxy-splice", "nginx")},
    ),
    Group(
        "connections",
        "A connection for each request",
        "haproxy",
        [Connections("1 endpoint", "http")],
        {Way.STRAIGHT: (OURS, TWO_WORKERS, "haproxy", "haproxy-2", "nginx", "socat", "direct"), Way.CLUSTER: COMPARED},
    ),
    Group(
        "dead",
        "A connection for each request, to four endpoints",
        "haproxy",
        [
            Connections("4 endpoints", "four"),
            Connections("1 of 4 refuses", "refusing", some_fail=True),
            Connections("1 of 4 is a black hole", "silent", some_fail=True),
        ],
        {Way.STRAIGHT: (OURS, "haproxy", "nginx"), Way.CLUSTER: (OURS, "haproxy")},
        more=False,
    ),
    Group(
        "bulk",
        "Bulk",
        "haproxy",
        [Bulk(streams, way) for streams in STREAMS for way in WAYS],
        {
            Way.STRAIGHT: (OURS, "haproxy", "haproxy-splice", "haproxy-2-splice", "nginx", "socat", "direct"),
            Way.CLUSTER: (OURS, "haproxy"),
        },
    ),
    Group(
        "idle",
        "Idle connections",
        "haproxy",
        [Idle(IDLE)],
        {Way.STRAIGHT: (OURS, "haproxy", "nginx"), Way.CLUSTER: (OURS, "haproxy")},
    ),
    Group(
        "udp",
        "Datagrams",
        "nginx",
        [
            *(Datagrams.round_trips(size, FLOWS[0]) for size in SIZES),
            *(Datagrams.round_trips(size, FLOWS[1]) for size in (SIZES[0], SIZES[-1])),
            Datagrams.new_flows(),
            Datagrams.steadily(RATE),
            Dns(),
        ],
        {Way.STRAIGHT: (OURS, "nginx", "direct"), Way.CLUSTER: (OURS, "nginx")},
        more=False,
    ),
)


def peers(place: Sequence[str]) -> Mapping[str, Callable[[], Peer]]:
    """All there are, by name, not made before they are asked for: nobody needs what is not measured.

    `place` are the words that a command begins with to be run where proxies with one thread are.
    """
    anywhere = namespace.anywhere()
    found: dict[str, Callable[[], Peer]] = {
        OURS: lambda: UserspaceProxy(place),
        TWO_WORKERS: lambda: UserspaceProxy(anywhere, name=TWO_WORKERS, flags=("--workers=2",), metrics_port=9800),
        "haproxy": lambda: others.HAProxy("haproxy", place, 9100),
        "haproxy-splice": lambda: others.HAProxy("haproxy-splice", place, 9200, splice=True),
        "haproxy-2": lambda: others.HAProxy("haproxy-2", anywhere, 9300, threads=2),
        "haproxy-2-splice": lambda: others.HAProxy("haproxy-2-splice", anywhere, 9400, threads=2, splice=True),
        "nginx": lambda: others.Nginx(place, 9500),
        "socat": lambda: others.Command("socat", others.SOCAT, place, 9600),
        "direct": Direct,
    }
    for number, (name, command) in enumerate(others.from_environment().items()):
        found[name] = _command(name, command, place, 9900 + 10 * number)
    return found


def _command(name: str, command: str, place: Sequence[str], first_port: int) -> Callable[[], Peer]:
    return lambda: others.Command(name, command, place, first_port)


class Stage(typing.NamedTuple):
    """A group, one way, and who is measured."""

    group: Group
    way: Way
    peers: Sequence[str]


def stages(groups: Sequence[str], only_peers: Sequence[str]) -> list[Stage]:
    extra = tuple(others.from_environment())
    return [
        Stage(group, way, chosen)
        for group in GROUPS
        if group.name in groups
        for way, names in group.peers.items()
        if (chosen := [name for name in (*names, *(extra if group.more else ())) if name in only_peers])
    ]
