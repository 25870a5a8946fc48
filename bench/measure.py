"""Rounds: each peer in turn under each load, and what that used.

A stage of a round has a fresh network namespace. All its proxies are there from its beginning, started anew;
under each load they take turns, in another order each round, so that whatever else the machine does meets
them alike. Those whose turn it is not are idle.

A run counts only if the port its clients were led to is the proxy's own, if the proxy's account of it, where it
keeps one, agrees with the client's, and if nobody answers any more once the proxy is stopped. What the runs mean is
`report`'s.
"""

from __future__ import annotations

import contextlib
import pathlib
import shlex
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from bench import namespace
from bench.loads.base import Load, Subject, Work
from bench.peers import Account, Peer, Running
from bench.plan import Stage
from bench.programs import CPU, BenchError, is_answering, is_listening
from bench.services import Service, endpoints, services

SETTLE = 0.2
"""Seconds for a proxy to see off the last connections, which belong to the run as the first do."""
START = "its start"
"""The load of a peer that does not get as far as loads."""
OVERHEAD = 1.05
UNDER_WAY = 1100
"""More than the client counted, by so much, may have gone through: what was under way at the end of its time."""


@dataclass(frozen=True, slots=True)
class Run:
    """One peer under one load, once."""

    round: int
    group: str
    way: str
    peer: str
    load: str
    figures: Mapping[str, float]
    commands: Sequence[str]
    """The proxy's, where there is one, and the client's."""
    cpu: CPU | None = None
    account: Account | None = None
    problem: str = ""
    """Why it does not count; there are no figures then."""
    samples: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Single ones, of which there are too few in a round to say much: those of all rounds are put together."""


def relay(number: int, stage: Stage, peers: Sequence[Peer], seconds: float) -> Iterator[Run]:
    """A stage of a round. `peers` are its own, in the order in which they take turns; those that cannot be started
    are left out.

    Raises BenchError if none of its runs are to be believed.
    """
    namespace.fresh()
    offered = {peer.name: services(place) for place, peer in enumerate(peers, 1)}
    proxies: dict[str, Running] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(endpoints(_folder(stack)))
        with contextlib.ExitStack() as started:
            for peer in peers:
                beginning = peer.start(offered[peer.name], stage.way, _folder(started))
                try:
                    proxies[peer.name] = started.enter_context(beginning)
                except BenchError as error:
                    yield Run(number, stage.group.name, stage.way, peer.name, START, {}, [], problem=str(error))
            for load in stage.group.loads:
                for name, proxy in proxies.items():
                    try:
                        yield _measured(number, stage, name, load, proxy, offered[name], seconds)
                    except BenchError as error:
                        yield Run(number, stage.group.name, stage.way, name, load.name, {}, [], problem=str(error))
        _nobody_answers(stage, proxies, offered)


def _folder(stack: contextlib.ExitStack) -> pathlib.Path:
    return pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))


def _measured(
    number: int,
    stage: Stage,
    name: str,
    load: Load,
    proxy: Running,
    offered: Mapping[str, Service],
    seconds: float,
) -> Run:
    program, port = proxy.program(load.service), proxy.own_port(load.service)
    protocol = offered[load.service].protocol
    if program and port and not program.has(protocol, port):
        raise BenchError(f"{protocol} port {port} is not {name}'s: who would be measured?")
    subject = Subject(*proxy.address(load.service), program)
    relayed = proxy.account()
    # Innermost, so that asking for the account is not on the bill.
    used = program.cpu() if program else None
    work = load.run(subject, seconds)
    time.sleep(SETTLE)
    if program and used:
        used = program.cpu() - used
    account = proxy.account()
    if account and relayed:
        account -= relayed
        _audit(name, work, account)
    figures = dict(work.figures)
    if used and work.units:
        figures[load.cost] = used.total / work.units * (1e6 if " us/" in load.cost else 1)
    commands = [*([shlex.join(program.command)] if program else []), work.command]
    return Run(number, stage.group.name, stage.way, name, load.name, figures, commands, used, account)


def _audit(peer: str, work: Work, account: Account) -> None:
    """The client's count and the proxy's must be of the same traffic."""
    counts = {
        "connections": (work.connections, account.connections),
        "bytes to the endpoint": (work.to_endpoint, account.to_endpoint),
        "bytes to the client": (work.to_client, account.to_client),
    }
    for what, (wanted, found) in counts.items():
        if found < wanted:
            raise BenchError(f"{peer} relayed {found:,} {what}, {work.command} counted {wanted:,}: not through it")
    if account.connections > work.connections * OVERHEAD + UNDER_WAY > UNDER_WAY:
        raise BenchError(
            f"{peer} relayed {account.connections:,} connections, {work.command} made {work.connections:,}"
        )


def _nobody_answers(stage: Stage, proxies: Mapping[str, Running], offered: Mapping[str, Mapping[str, Service]]) -> None:
    for name, proxy in proxies.items():
        for service in {load.service for load in stage.group.loads}:
            if proxy.own_port(service) is None:
                continue
            answers = is_listening if offered[name][service].protocol == "tcp" else is_answering
            if answers(proxy.address(service)):
                raise BenchError(f"{name} is stopped but somebody answers for {service}: who was measured?")
