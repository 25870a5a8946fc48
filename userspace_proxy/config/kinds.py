"""The kinds of values that can be set: how each is read, shown, explained and put into JSON.

A kind knows nothing of the flag it serves; many serve several. How values are spelled is in `values`, which flags there
are in `table`.
"""

from __future__ import annotations

import enum
import operator
import pathlib
import re
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from userspace_proxy.config.gates import parse_gates, show_gates
from userspace_proxy.config.values import (
    Address,
    format_duration,
    parse_address,
    parse_bind_address,
    parse_cidr_pair,
    parse_cidrs,
    parse_duration,
    parse_mode,
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
    """A list or a map: given again, it grows. Other flags given again replace what was given before."""
    json: type = str
    """What it is in JSON and YAML: str, bool, int, float, list or dict."""
    choices: tuple[str, ...] = ()
    """All there are, where they can be told."""
    is_zero: Callable[[str], bool] = operator.not_
    """Whether a text is what Go takes for not set, where a file leaves no other way to say so."""

    def as_json(self, value: T) -> object:
        if self.json is list:
            return [str(each) for each in typing.cast(Iterable[object], value)] or None
        if self.json is dict:
            return dict(typing.cast(Iterable[tuple[str, object]], value))
        if self.json is float:
            return int(exact) if (exact := typing.cast(float, value)).is_integer() else exact
        return self.show(value) if self.json is str else value


def duration(example: str, least: str) -> Kind[float]:
    """`least` is the shortest one allowed."""

    def parse(text: str) -> float:
        seconds = parse_duration(text)
        if seconds < parse_duration(least):
            raise ValueError("too short")
        return seconds

    allowed = f"a duration such as 300ms, 1.5s or 2h45m, {least} or longer"
    return Kind("DURATION", allowed, parse, format_duration, example, is_zero=lambda text: parse_duration(text) == 0)


def number(least: int, most: int, example: int, zero: int = 0) -> Kind[int]:
    """`zero` is what 0 stands for."""

    def read(text: str) -> int:
        if not re.fullmatch(r"[-+]?[0-9]{1,18}", text):
            raise ValueError("not a whole number")
        if not least <= int(text) <= most:
            raise ValueError("too small" if int(text) < least else "too large")
        return int(text)

    allowed = f"a whole number from {least} to {most}"
    parse, is_zero = (lambda text: read(text) or zero), (lambda text: read(text) == 0)
    return Kind("N", allowed, parse, str, str(example), json=int, is_zero=is_zero)


_LARGEST = 3.4028234663852886e38
"""Go's float32."""


def decimal(example: float, zero: float = 0.0) -> Kind[float]:
    """`zero` is what 0 stands for."""

    def read(text: str) -> float:
        if not re.fullmatch(r"[-+]?([0-9]{1,40}\.?[0-9]{0,40}|\.[0-9]{1,40})([eE][-+]?[0-9]{1,2})?", text):
            raise ValueError("not a number")
        if abs(number := float(text)) > _LARGEST:
            raise ValueError("too large")
        return number

    return Kind(
        "NUMBER",
        "a number such as 5 or 2.5",
        lambda text: read(text) or zero,
        lambda number: repr(number).removesuffix(".0"),
        f"{example:g}",
        json=float,
        is_zero=lambda text: read(text) == 0,
    )


def choice(choices: type[Choice]) -> Kind[Choice]:
    """A member whose value is empty stands for nothing said."""
    words = tuple(str(choice.value) for choice in choices if choice.value)
    allowed = f"{', '.join(words[:-1])} or {words[-1]}, in this very case"
    if len(words) < len(choices):
        allowed += ", or nothing"

    def parse(text: str) -> Choice:
        if text not in list(choices):
            raise ValueError("no such choice")
        return choices(text)

    return Kind("|".join(words), allowed, parse, str, words[0], choices=words)


def server(port: int, example: str) -> Kind[Address | None]:
    """Where one of our servers listens; None: nowhere."""

    def parse(text: str) -> Address | None:
        return parse_address(text, port) if text else None

    allowed = f"an IP address, alone (port {port}) or with a port, or nothing at all (no server)"
    return Kind("IP[:PORT]", allowed, parse, lambda address: str(address or ""), example)


def matching(placeholder: str, allowed: str, pattern: str, why: str, example: str) -> Kind[str]:
    """Text that is only checked."""

    def parse(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(why)
        return text

    return Kind(placeholder, allowed, parse, str, example)


CIDRS = Kind(
    "CIDR,...",
    "CIDRs with commas between",
    parse_cidrs,
    ",".join,
    "192.0.2.0/24,2001:db8::/64",
    repeats=True,
    json=list,
)
SWITCH = Kind(
    "", "true or false", parse_switch, lambda on: str(on).lower(), "true", json=bool, choices=("true", "false")
)
PATHS = Kind(
    "PATH",
    "a file or a directory",
    parse_path,
    lambda paths: ",".join(map(str, paths)),
    "/etc/userspace-proxy/manifests",
    repeats=True,
    json=list,
)
FILE = Kind("PATH", "a path, or nothing", parse_trimmed, str, "/etc/kubernetes/kube-proxy.conf")
PATH = Kind(
    "PATH",
    "a path, or nothing",
    lambda text: pathlib.Path(text) if text else None,
    lambda path: str(path or ""),
    "/var/lib/kube-proxy/config.conf",
)
DIRECTORY = Kind(
    "PATH",
    "a directory, or nothing",
    lambda text: pathlib.Path(text) if parse_trimmed(text) else None,
    lambda path: str(path or ""),
    "/var/lib/userspace-proxy",
)
URL = Kind("URL", "a URL with http:// or https://, HOST:PORT, or nothing", parse_url, str, "https://192.0.2.1:6443")
NODE_NAME = Kind("NAME", "the name of a node, or nothing", parse_node_name, str, "node-1")
IP = Kind("IP", "an IPv4 or IPv6 address of this host, or 0.0.0.0 for all of them", parse_bind_address, str, "0.0.0.0")
PORTS = Kind(
    "RANGE",
    "A, A-B or A+N (N more ports than A), without blanks inside, up to 65535; nothing or 0 for any",
    parse_port_range,
    lambda ports: str(ports or ""),
    "30000-32000",
)
GATES = Kind(
    "GATE=BOOL,...",
    "feature gates of Kubernetes with true or false, and commas between",
    parse_gates,
    show_gates,
    "SCTPSupport=true",
    repeats=True,
    json=dict,
)
PROXY_MODE = Kind("MODE", "userspace, or nothing", parse_mode, str, "userspace", choices=("userspace",))
TEXT = Kind("TEXT", "any text", str, str, "text")
CLUSTER_CIDR = Kind(
    "CIDR[,CIDR]",
    "one CIDR, or one of each address family with a comma between, or nothing",
    parse_cidr_pair,
    ",".join,
    "192.0.2.0/24,2001:db8::/64",
)
VERSION_BEFORE = matching(
    "MAJOR.MINOR", "a version such as 1.24, or nothing", r"([1-9][0-9]?\.[0-9]{1,3})?", "not MAJOR.MINOR", "1.24"
)
PATTERNS = matching(
    "PATTERN=N,...",
    "names with a level each, and commas between, or nothing",
    r"([^=,]+=[0-9]{1,9}(,[^=,]+=[0-9]{1,9})*,?)?",
    "not a list of PATTERN=N",
    "proxier=4",
)
LINE = matching("FILE:N", "a file and a line, or nothing", r"([^:]*:[0-9]{1,9})?", "not FILE:N", "proxier.go:100")
SEVERITY = matching(
    "N", "INFO, WARNING, ERROR, FATAL, or 0 to 3", r"(?i)[0-3]|info|warning|error|fatal", "no such severity", "2"
)
