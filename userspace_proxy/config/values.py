"""Values as Go programs write them: durations, switches, addresses, networks, ranges of ports.

Text in, value out, and nothing more. A parser raises ValueError that says what is wrong with the text; what is allowed
and an example to write instead belong to the flag or the field that the value is for (`kinds`).
"""

from __future__ import annotations

import ipaddress
import pathlib
import re
import typing
from dataclasses import dataclass
from fractions import Fraction

from userspace_proxy.model import join_host_port

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
TRUE = {"1", "t", "T", "true", "TRUE", "True"}
FALSE = {"0", "f", "F", "false", "FALSE", "False"}


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
    nanoseconds = min(round(Fraction(abs(seconds)) * 1_000_000_000), _LONGEST)
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
    if text not in TRUE and text not in FALSE:
        raise ValueError("neither true nor false")
    return text in TRUE


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


def parse_cidr_pair(text: str) -> tuple[str, ...]:
    """One network, or one of each family."""
    cidrs = parse_cidrs(text)
    if len(cidrs) > 2:
        raise ValueError(f"{len(cidrs)} networks")
    if len({":" in cidr for cidr in cidrs}) < len(cidrs):
        raise ValueError("both of one address family")
    return cidrs


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
class PortRange:
    """Port numbers, both ends included."""

    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"


def parse_bind_address(text: str) -> str:
    ip = ipaddress.ip_address(parse_ip(text) if text else "0.0.0.0")
    if ip.is_multicast or ip == ipaddress.IPv4Address("255.255.255.255"):
        raise ValueError("a multicast address" if ip.is_multicast else "the broadcast address")
    return str(ip)


def parse_port_range(text: str) -> PortRange | None:
    parts = re.fullmatch(r"([0-9]+)(?:([-+])([0-9]+))?", text.strip() or "0")
    if parts is None:
        raise ValueError("not a range of ports")
    first = last = int(parts[1])
    if parts[2]:
        last = int(parts[3]) if parts[2] == "-" else first + int(parts[3])
    if last > 65535 or first > 65535:
        raise ValueError(f"{max(first, last)} is no port")
    if last < first:
        raise ValueError("ends before it begins")
    return PortRange(first, last) if first else None


def parse_node_name(text: str) -> str:
    name = text.strip().lower()
    if text and not name:
        raise ValueError("only blanks")
    return name


def parse_trimmed(text: str) -> str:
    if text != text.strip():
        raise ValueError("blanks around it")
    return text


def parse_url(text: str) -> str:
    scheme, separator, _ = parse_trimmed(text).partition("://")
    if separator and scheme not in ("http", "https"):
        raise ValueError(f"{scheme} is not spoken by API servers")
    return text


def parse_path(text: str) -> tuple[pathlib.Path, ...]:
    if not text:
        raise ValueError("an empty path")
    return (pathlib.Path(text),)


def parse_mode(text: str) -> str:
    """--proxy-mode: there is one."""
    if text in ("iptables", "ipvs", "nftables"):
        raise ValueError("there the kernel spreads the load, and that is kube-proxy's; this program relays by itself")
    if text == "kernelspace":
        raise ValueError("that is kube-proxy's on Windows")
    if text not in ("", "userspace"):
        raise ValueError("no such mode")
    return text
