"""One flag: its name, its kind, its group in the help text, its place in the config file, and what it does.

`setting` declares a flag and the field of a settings class that it sets, in one go, so that help, docs, completion,
parsing, the config file and /configz are all drawn from one place. `unused` does for a flag that is taken as kube-proxy
takes it and changes nothing here.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass

from userspace_proxy.config.kinds import Kind

T = typing.TypeVar("T")

OWN = "What kube-proxy has not"
SERVER = "The API server"
ADDRESSES = "Addresses, ports and flows"
SYNC = "Syncing"
ADMIN = "Health, metrics and logs"
HOST = "This host"
MODE = "Mode and features"
INSTEAD = "Instead of serving"
UNUSED = "Taken as kube-proxy takes them, without effect"
GROUPS = (OWN, SERVER, ADDRESSES, SYNC, ADMIN, HOST, MODE, INSTEAD, UNUSED)
"""In the order of the help text."""


@dataclass(frozen=True, slots=True)
class Flag(typing.Generic[T]):
    name: str
    """As on the command line; with a dot in it, there is no flag, and this is the place in the file."""
    kind: Kind[T]
    group: str
    help: str
    """Of an unused one: why it changes nothing."""
    place: str = ""
    """Where it is in a KubeProxyConfiguration, as `iptables.syncPeriod`. Empty: on the command line alone."""
    keeps_zero: bool = False
    """In a file 0 is 0. With others it stands for the default, as Go cannot tell it from nothing."""

    @property
    def is_switch(self) -> bool:
        return not self.kind.placeholder

    @property
    def in_file_only(self) -> bool:
        return "." in self.name

    @property
    def spelled(self) -> str:
        """As the help text heads it: `--udp-timeout DURATION`, `--splice`, `-v, --v N`."""
        name = f"--{self.name}" if len(self.name) > 1 else f"-{self.name}, --{self.name}"
        return f"{name} {self.kind.placeholder}".rstrip()

    def problem(self, found: str | None, why: object) -> str:
        """One line: the flag and its value (None: it was not given), what is allowed, what to write instead."""
        what = f"--{self.name}" if found is None else f"--{self.name}={found!r}"
        return f"{what}: {why}; allowed: {self.kind.allowed}; write for example --{self.name}={self.kind.example}"


def setting(
    default: T, name: str, kind: Kind[T], group: str, text: str, *, place: str = "", keeps_zero: bool = False
) -> T:
    """A field of a settings class, with the flag that sets it."""
    if "." in name:
        place = name
    return dataclasses.field(default=default, metadata={"flag": Flag(name, kind, group, text, place, keeps_zero)})


def unused(default: T, name: str, kind: Kind[T], why: str, place: str = "", *, keeps_zero: bool = False) -> T:
    """As `setting`, for what is read, checked and written, and changes nothing."""
    return setting(default, name, kind, UNUSED, why, place=place, keeps_zero=keeps_zero)
