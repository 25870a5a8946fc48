"""The kinds of values that can be set: how each is read, shown, explained and put into JSON.

A kind knows nothing of the flag it serves; many serve several. How values are spelled is in `values`, which flags there
are in `table`.
"""

from __future__ import annotations

import enum
import pathlib
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass

from userspace_proxy.config.values import (
    Address,
    format_duration,
    parse_address,
    parse_bind_address,
    parse_cidrs,
    parse_duration,
    parse_node_name,
    parse_path,
    parse_port_range,
    parse_switch,
    parse_trimmed,
    parse_url,
)

T = typing.TypeVar("T")
Choice = typing.TypeVar("Choice", bound=enum.StrEnum)


@dataclass(frozen=True, slots=True)
class Kind(typing.Generic[T]):
    """How the values of some flags are written."""

    placeholder: str
    """What stands for the value in the help text; empty for a switch."""
    allowed: str
    parse: Callable[[str], T]
    show: Callable[[T], str]
    """The reverse of `parse`: `parse(show(value)) == value`."""
    example: str
    repeats: bool = False
    """A list: given again, it grows. Other flags given again replace what was given before."""
    in_json: Callable[[T], object] | None = None
    """None: as `show` writes it."""


def duration(example: str, least: str = "") -> Kind[float]:
    """`least` is the shortest one allowed; empty: any above 0."""

    def parse(text: str) -> float:
        seconds = parse_duration(text)
        if seconds < 0 or (seconds == 0 and not least):
            raise ValueError("too short")
        return seconds

    allowed = f"a duration such as 300ms, 1.5s or 2h45m, {f'{least} or longer' if least else 'above 0'}"
    return Kind("DURATION", allowed, parse, format_duration, example)


def number(least: int, most: int, example: int) -> Kind[int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[-+]?[0-9]{1,18}", text):
            raise ValueError("not a whole number")
        if not least <= int(text) <= most:
            raise ValueError("too small" if int(text) < least else "too large")
        return int(text)

    return Kind("N", f"a whole number from {least} to {most}", parse, str, str(example), in_json=int)


def decimal(example: float) -> Kind[float]:
    def parse(text: str) -> float:
        if not re.fullmatch(r"[-+]?([0-9]{1,12}\.?[0-9]{0,12}|\.[0-9]{1,12})", text):
            raise ValueError("not a number")
        return float(text)

    return Kind("NUMBER", "a number such as 5 or 2.5", parse, "{:g}".format, f"{example:g}", in_json=float)


def choice(choices: type[Choice]) -> Kind[Choice]:
    words = [str(choice.value) for choice in choices]

    def parse(text: str) -> Choice:
        if text not in words:
            raise ValueError("no such choice")
        return choices(text)

    return Kind("|".join(words), f"{', '.join(words[:-1])} or {words[-1]}, in lower case", parse, str, words[0])


def server(port: int, example: str) -> Kind[Address | None]:
    """Where one of our servers listens; None: nowhere."""

    def parse(text: str) -> Address | None:
        return parse_address(text, port) if text else None

    allowed = f"an IP address, alone (port {port}) or with a port, or nothing at all (no server)"
    return Kind("IP[:PORT]", allowed, parse, lambda address: str(address or ""), example)


CIDRS = Kind(
    "CIDR,...",
    "CIDRs with commas between",
    parse_cidrs,
    ",".join,
    "192.0.2.0/24,2001:db8::/64",
    repeats=True,
    in_json=list,
)
SWITCH = Kind("", "true or false", parse_switch, lambda on: str(on).lower(), "true", in_json=bool)
PATHS = Kind(
    "PATH",
    "a file or a directory",
    parse_path,
    lambda paths: ",".join(map(str, paths)),
    "/etc/userspace-proxy/manifests",
    repeats=True,
    in_json=lambda paths: [str(path) for path in paths],
)
FILE = Kind("PATH", "a path, or nothing", parse_trimmed, str, "/etc/kubernetes/kube-proxy.conf")
DIRECTORY = Kind(
    "PATH",
    "a directory, or nothing",
    lambda text: pathlib.Path(text) if parse_trimmed(text) else None,
    lambda path: str(path or ""),
    "/var/lib/userspace-proxy",
)
URL = Kind("URL", "a URL with http:// or https://, HOST:PORT, or nothing", parse_url, str, "https://192.0.2.1:6443")
NODE_NAME = Kind("NAME", "the name of a node, or nothing", parse_node_name, str, "node-1")
IP = Kind("IP", "an IPv4 or IPv6 address", parse_bind_address, str, "0.0.0.0")
PORTS = Kind(
    "RANGE",
    "A, A-B or A+N (N more ports than A), without blanks inside, up to 65535; nothing or 0 for any",
    parse_port_range,
    lambda ports: str(ports or ""),
    "30000-32000",
)
