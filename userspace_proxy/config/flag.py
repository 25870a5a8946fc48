"""One flag: its name, its kind, its group in the help text, and what it does.

`setting` declares a flag and the field of a settings class that it sets, in one go, so that help, docs, parsing and
/configz are all drawn from one place.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass

from userspace_proxy.config.kinds import Kind

T = typing.TypeVar("T")

SERVICES = "What to serve"
CLUSTER = "The API server"
CAPTURE = "Addresses and capture"
RELAY = "Connections and flows"
SYNC = "Syncing"
ADMIN = "Health and metrics"
LOGGING = "Logging"
INSTEAD = "Instead of serving"


@dataclass(frozen=True, slots=True)
class Flag(typing.Generic[T]):
    name: str
    kind: Kind[T]
    group: str
    help: str

    @property
    def is_switch(self) -> bool:
        return not self.kind.placeholder

    @property
    def spelled(self) -> str:
        """As the help text heads it: `--udp-timeout DURATION`, `--splice`, `-v, --v N`."""
        name = f"--{self.name}" if len(self.name) > 1 else f"-{self.name}, --{self.name}"
        return f"{name} {self.kind.placeholder}".rstrip()

    def problem(self, found: str | None, why: object) -> str:
        """One line: the flag and its value (None: it was not given), what is allowed, what to write instead."""
        what = f"--{self.name}" if found is None else f"--{self.name}={found!r}"
        return f"{what}: {why}; allowed: {self.kind.allowed}; write for example --{self.name}={self.kind.example}"


def setting(default: T, name: str, kind: Kind[T], group: str, text: str) -> T:
    """A field of a settings class, with the flag that sets it."""
    return dataclasses.field(default=default, metadata={"flag": Flag(name, kind, group, text)})
