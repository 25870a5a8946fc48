"""Rounds: each peer in turn under each load, and what that used.

All proxies of a round are there from its beginning, started anew, each toward an endpoint address that nobody
has used before; under each load they take turns, in another order each round, so that whatever else the
machine does meets them alike. Those whose turn it is not are idle.

A run counts only if the proxy's own account of it agrees with the client's, and if nobody answers any more
once the proxy is stopped. What the runs mean is `report`'s.
"""

from __future__ import annotations

import contextlib
import pathlib
import shlex
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.loads import CONNECTIONS, ENDPOINT_PORTS, Load, Work
from bench.peers import Account, Peer, Running
from bench.programs import CPU, BenchError, is_listening

SETTLE = 0.3
"""Seconds for a proxy to see off the last connections, which belong to the run as the first do."""
OVERHEAD = 1.05
"""More than the client counted, by so much, may have gone through: what was under way at the end of its time."""


@dataclass(frozen=True, slots=True)
class Run:
    """One peer under one load, once."""

    round: int
    peer: str
    load: str
    work: Work
    cpu: CPU | None
    """Used by the proxy; None where there is none."""
    account: Account | None
    proxy: str = ""
    """The command it was started by."""


def rounds(count: int, peers: Sequence[Peer], loads: Sequence[Load], seconds: int) -> Iterator[Run]:
    for number in range(1, count + 1):
        first = (number - 1) % len(peers)
        yield from _round(number, (*peers[first:], *peers[:first]), loads, seconds)


def _round(number: int, peers: Sequence[Peer], loads: Sequence[Load], seconds: int) -> Iterator[Run]:
    endpoints = {
        peer.name: {name: (f"127.1.{number}.{place}", port) for name, port in ENDPOINT_PORTS.items()}
        for place, peer in enumerate(peers, 1)
    }
    proxies: dict[str, Running | None] = {}
    with contextlib.ExitStack() as stack:
        for peer in peers:
            folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
            proxies[peer.name] = stack.enter_context(peer.start(endpoints[peer.name], folder))
        for load in loads:
            for name, proxy in proxies.items():
                if proxy is None:
                    work = load.run(*endpoints[name][load.serves], seconds)
                    yield Run(number, name, load.name, work, None, None)
                else:
                    yield _measured(number, name, load, proxy, seconds)
    for name, proxy in proxies.items():
        alive = [port for port in map(proxy.address, ENDPOINT_PORTS) if is_listening(*port)] if proxy else []
        if alive:
            raise BenchError(f"{name} is stopped but somebody answers at {alive}: who was measured?")


def _measured(number: int, peer: str, load: Load, proxy: Running, seconds: int) -> Run:
    relayed = proxy.account()
    # Innermost, so that asking for the account is not on the bill.
    used = proxy.program.cpu()
    work = load.run(*proxy.address(load.serves), seconds)
    time.sleep(SETTLE)
    used = proxy.program.cpu() - used
    run = Run(number, peer, load.name, work, used, proxy.account() - relayed, shlex.join(proxy.program.command))
    _audit(run)
    return run


def _audit(run: Run) -> None:
    """The client's count and the proxy's must be of the same traffic."""
    work, account = run.work, run.account
    assert account is not None
    counts = {
        "connections": (work.connections, account.connections),
        "bytes to the endpoint": (work.to_endpoint, account.to_endpoint),
        "bytes to the client": (work.to_client, account.to_client),
    }
    for what, (wanted, found) in counts.items():
        if wanted and not wanted <= found <= wanted * OVERHEAD + CONNECTIONS:
            raise BenchError(
                f"{run.peer} says it relayed {found:,} {what}, {work.command} counted {wanted:,}: "
                "the load did not go through it, or through more than it"
            )
