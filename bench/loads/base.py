"""What a load is.

A `Load` runs one client against a `Subject` for a bounded time and returns a `Work`: what was done as counted
by the client, and its figures, each named with its unit. Another load is another class with `run`, and a
line in `plan`.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass

from bench.programs import Program


@dataclass(frozen=True, slots=True)
class Subject:
    """Where clients go, and what relays them; None where nothing does."""

    ip: str
    port: int
    program: Program | None


@dataclass(frozen=True, slots=True)
class Work:
    """What a client got done. Connections and bytes are what must have gone through the proxy, at least."""

    command: str
    figures: dict[str, float]
    units: float
    """What the proxy's CPU is divided by for the load's cost; 0 if that says nothing."""
    connections: int = 0
    to_endpoint: int = 0
    to_client: int = 0


class Load(typing.Protocol):
    name: str
    service: str
    """Which one it talks to."""
    cost: str
    """What CPU divided by units is called, with its unit, us or s."""
    most_figure: str
    """The figure of which more is better, and by which runs are told as they go."""

    def run(self, subject: Subject, seconds: float) -> Work: ...
