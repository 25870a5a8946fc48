"""Flags in the manner of Go programs: how they are spelled, read and complained about.

Here is what kube-proxy's users take for granted and argparse does not do: `-name` and `--name`, `_` for
`-`, switches that take a value only with `=`, durations such as `1h30m`, and every mistake told at once.
Which flags this program has, and what they mean, is in `config`.

A flag's parser raises ValueError that says what is wrong with the text, and no more: what is allowed,
and an example to write instead, are the flag's own and are added by `Flag.problem`.
"""

from __future__ import annotations

import difflib
import enum
import ipaddress
import re
import typing
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from userspace_proxy.model import join_host_port

T = typing.TypeVar("T")
Choice = typing.TypeVar("Choice", bound=enum.StrEnum)

_NANOSECONDS = {
    "ns": 1,
    "us": 1_000,
    "µs": 1_000,
    "μs": 1_000,
    "ms": 1_000_000,
    "s": 1_000_000_000,
    "m": 60_000_000_000,
    "h": 3_600_000_000_000,
}
"""The micro sign has two code points, and Go takes both."""
_LONGEST = 2**63 - 1
"""Nanoseconds in Go's longest duration, some 292 years."""
_STEP = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)([^0-9.]*)")
_TRUE = {"1", "t", "T", "true", "TRUE", "True"}
_FALSE = {"0", "f", "F", "false", "FALSE", "False"}


def parse_duration(text: str) -> float:
    """Seconds in a Go duration: `300ms`, `1.5h`, `2h45m`, and `0` alone."""
    digits = text[1:] if text[:1] in ("+", "-") else text
    if digits == "0":
        return 0.0
    nanoseconds = Fraction(0)
    end = 0
    for step in _STEP.finditer(digits):
        number, unit = step.groups()
        if step.start() != end or (unit and unit not in _NANOSECONDS):
            break
        if not unit:
            raise ValueError(f"{number} has no unit")
        nanoseconds += Fraction(number) * _NANOSECONDS[unit]
        end = step.end()
    if not end or end != len(digits):
        raise ValueError("not a duration")
    if nanoseconds > _LONGEST:
        raise ValueError("longer than 292 years")
    seconds = int(nanoseconds) / 1_000_000_000
    return -seconds if text.startswith("-") else seconds


def format_duration(seconds: float) -> str:
    """As Go prints it: `250ms`, `1.5s`, `15m0s`, `0s`."""
    sign = "-" if seconds < 0 else ""
    nanoseconds = round(abs(seconds) * 1_000_000_000)
    if not nanoseconds:
        return "0s"
    if nanoseconds < _NANOSECONDS["s"]:
        unit = next(unit for unit in ("ms", "µs", "ns") if nanoseconds >= _NANOSECONDS[unit])
        return sign + _decimal(nanoseconds, _NANOSECONDS[unit]) + unit
    minutes, rest = divmod(nanoseconds, _NANOSECONDS["m"])
    hours, minutes = divmod(minutes, 60)
    text = _decimal(rest, _NANOSECONDS["s"]) + "s"
    if hours or minutes:
        text = f"{minutes}m{text}"
    return f"{sign}{hours}h{text}" if hours else sign + text


def _decimal(nanoseconds: int, unit: int) -> str:
    whole, rest = divmod(nanoseconds, unit)
    fraction = str(unit + rest)[1:].rstrip("0")
    return f"{whole}.{fraction}" if fraction else str(whole)


def parse_switch(text: str) -> bool:
    if text not in _TRUE and text not in _FALSE:
        raise ValueError("neither true nor false")
    return text in _TRUE


def parse_ip(text: str) -> str:
    """An address in canonical form. Leading zeros are decimal and a mapped IPv4 address is that address, as in Go."""
    if "%" in text:
        raise ValueError("an address with a zone")
    try:
        ip = ipaddress.ip_address(re.sub(r"(^|[:.])0+(?=[0-9]+(\.|$))", r"\1", text) if "." in text else text)
    except ValueError:
        raise ValueError("not an IP address") from None
    return str((ip.version == 6 and ip.ipv4_mapped) or ip)


class Address(typing.NamedTuple):
    """Where one of our HTTP servers listens; port 0 is one the kernel picks."""

    ip: str
    port: int

    def __str__(self) -> str:
        return join_host_port(self.ip, self.port)


def parse_address(text: str, default_port: int) -> Address:
    """`192.0.2.1:80`, `[2001:db8::1]:80`, or an address alone, bare or (IPv6) in brackets."""
    split = re.fullmatch(r"\[([^\[\]]*)\](?::([0-9]+))?|([^:]*):([0-9]+)", text)
    if split is None:
        return Address(parse_ip(text), default_port)
    bracketed, after_bracket, plain, after_plain = split.groups()
    if bracketed and ":" not in bracketed:
        raise ValueError("an IPv4 address in brackets")
    port = int(after_bracket or after_plain or default_port)
    if port > 65535:
        raise ValueError(f"{port} is no port")
    return Address(parse_ip(bracketed or plain or ""), port)


def parse_cidrs(text: str) -> tuple[str, ...]:
    """Networks with commas between; bits after the prefix are dropped, as in Go."""
    return tuple(_cidr(part) for part in text.split(",")) if text else ()


def _cidr(text: str) -> str:
    address, slash, length = text.partition("/")
    try:
        ip = parse_ip(address)
    except ValueError as why:
        raise ValueError(f"{text!r}: {why}") from None
    longest = 128 if ":" in ip else 32
    if not slash:
        raise ValueError(f"{text!r}: a bare address; write {ip}/{longest}")
    if not re.fullmatch(r"[0-9]{1,3}", length):
        raise ValueError(f"{text!r}: no prefix length after the '/'")
    if int(length) > longest:
        raise ValueError(f"{text!r}: {length} is no prefix length of this family")
    return str(ipaddress.ip_network((ip, int(length)), strict=False))


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


class Given(typing.NamedTuple):
    """One flag as it stands on the command line; a switch without a value has `true`."""

    flag: Flag[typing.Any]
    value: str


def read(argv: Sequence[str], known: Mapping[str, Flag[typing.Any]]) -> tuple[list[Given], list[str]]:
    """Split a command line (without the program's name) into flags and their values, and problems."""
    given: list[Given] = []
    problems: list[str] = []
    args = deque(argv)
    while args:
        arg = args.popleft()
        if arg == "--":
            problems += [_stray(arg, given) for arg in args if arg]
            break
        if arg == "-" or not arg.startswith("-"):
            if arg:
                problems.append(_stray(arg, given))
            continue
        name, equals, value = _split(arg, known)
        flag = known.get(name)
        follows = bool(args) and not _names_a_flag(args[0], known)
        if flag is None:
            problems.append(_unknown(arg.partition("=")[0], known))
            if not equals and follows and not args[0].startswith("-"):
                args.popleft()  # most probably its value, and no second mistake
        elif equals:
            given.append(Given(flag, value))
        elif flag.is_switch:
            given.append(Given(flag, "true"))
        elif follows:
            given.append(Given(flag, args.popleft()))
        else:
            problems.append(flag.problem(None, "has no value"))
    return given, problems


def _split(arg: str, known: Mapping[str, Flag[typing.Any]]) -> tuple[str, str, str]:
    spelled, equals, value = arg.partition("=")
    name = spelled[2 if spelled.startswith("--") else 1 :].replace("_", "-")
    if not equals and not arg.startswith("--") and name not in known and name[:1] in known and name[1:].isdigit():
        return name[0], "=", name[1:]  # -v4
    return name, equals, value


def _names_a_flag(arg: str, known: Mapping[str, Flag[typing.Any]]) -> bool:
    return arg.startswith("--") and _split(arg, known)[0] in known


def _unknown(spelled: str, known: Mapping[str, Flag[typing.Any]]) -> str:
    near = difflib.get_close_matches(spelled.lstrip("-").replace("_", "-").lower(), known, n=1)
    proposal = f"did you mean --{near[0]}?" if near else "--help lists those there are"
    return f"{spelled}: unknown flag; {proposal}"


def _stray(arg: str, given: Sequence[Given]) -> str:
    if given and given[-1].flag.is_switch and (arg in _TRUE or arg in _FALSE):
        return f"{arg!r}: a switch takes its value with '='; write --{given[-1].flag.name}={arg}"
    return f"{arg!r}: unexpected argument; everything is set by flags, which --help lists"
