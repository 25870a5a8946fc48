"""The header of the PROXY protocol: who connected to whom, told before the first byte of a connection.

Both versions as HAProxy's proxy-protocol.txt has them: the first is a line of text, the second is binary and may carry
more. Here bytes become a Header and the other way round, no more; when one is sent and from whom one is believed is in
`sockets.introduction`.
"""

from __future__ import annotations

import ipaddress
import re
import struct
from typing import NamedTuple

from userspace_proxy.exceptions import HeaderError
from userspace_proxy.model import Address

LONGEST = 4096
"""Bytes of a header that are looked at; no sender of headers comes near."""
LONGEST_LINE = 107
SERVICE_PORT_TLV = 0xE0
"""The first of the types left to applications: the name of the service port, as `namespace/name:port`."""

_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
_PREAMBLE = struct.Struct("!12sBBH")
_LINE_START = b"PROXY "
_LINE = re.compile(rb"PROXY TCP([46]) ([0-9A-Fa-f.:]{2,39}) ([0-9A-Fa-f.:]{2,39}) (\d{1,5}) (\d{1,5})")
_UNKNOWN = re.compile(rb"PROXY UNKNOWN(?: .*)?")
_LOCAL, _PROXY = 0x20, 0x21
_TCP4, _TCP6 = 0x11, 0x21
_ADDRESSES = {_TCP4: struct.Struct("!4s4sHH"), _TCP6: struct.Struct("!16s16sHH")}


class Header(NamedTuple):
    """`length` in bytes. Without addresses it says nothing of the connection, which is then its sender's own."""

    length: int
    source: Address | None
    destination: Address | None


def decode(start: bytes) -> Header | None:
    """The header that a connection starts with; None as long as it may be one whose end is to come.

    Raises HeaderError for what is none.
    """
    if start.startswith(_SIGNATURE[: len(start)]):
        return _decode_binary(start)
    if start.startswith(_LINE_START[: len(start)]):
        return _decode_line(start)
    raise HeaderError(f"found {start[:16]!r}; allowed: a header of the PROXY protocol, version 1 or 2")


def _decode_line(start: bytes) -> Header | None:
    line, end, _ = start[:LONGEST_LINE].partition(b"\r\n")
    if not end:
        if len(start) < LONGEST_LINE:
            return None
        raise HeaderError(f"found no end of the line in {LONGEST_LINE} bytes")
    length = len(line) + len(end)
    if _UNKNOWN.fullmatch(line):
        return Header(length, None, None)
    match = _LINE.fullmatch(line)
    if match is None:
        raise HeaderError(f"found {line!r}; allowed: PROXY TCP4 or TCP6, two addresses, two ports")
    version, *ips, source_port, destination_port = (text.decode() for text in match.groups())
    try:
        source, destination = (ipaddress.ip_address(ip) for ip in ips)
    except ValueError as error:
        raise HeaderError(str(error)) from None
    ports = int(source_port), int(destination_port)
    if {source.version, destination.version} != {int(version)} or max(ports) > 65535:
        raise HeaderError(f"found {line!r}; allowed: addresses of IPv{version}, ports up to 65535")
    return Header(length, (str(source), ports[0]), (str(destination), ports[1]))


def _decode_binary(start: bytes) -> Header | None:
    if len(start) < _PREAMBLE.size:
        return None
    _, command, family, rest = _PREAMBLE.unpack_from(start)
    length = _PREAMBLE.size + rest
    if command not in (_LOCAL, _PROXY):
        raise HeaderError(f"found version and command {command:#x}; allowed: {_LOCAL:#x}, {_PROXY:#x}")
    if length > LONGEST:
        raise HeaderError(f"found a header of {length} bytes; allowed: {LONGEST}")
    if len(start) < length:
        return None
    addresses = _ADDRESSES.get(family)
    if command == _LOCAL or addresses is None:  # of Unix sockets, datagrams and what is yet to come nothing is taken
        return Header(length, None, None)
    if rest < addresses.size:
        raise HeaderError(f"found {rest} bytes of addresses; allowed: {addresses.size} and more")
    source, destination, source_port, destination_port = addresses.unpack_from(start, _PREAMBLE.size)
    return Header(length, (_text(source), source_port), (_text(destination), destination_port))


def encode(version: int, source: Address, destination: Address, name: str = "") -> bytes:
    """A header of version 1, or of version 2 with the service port's name."""
    pair = ipaddress.ip_address(source[0]), ipaddress.ip_address(destination[0])
    if pair[0].version != pair[1].version:
        pair = _as_ipv6(pair[0]), _as_ipv6(pair[1])
    if version == 1:
        return f"PROXY TCP{pair[0].version} {pair[0]} {pair[1]} {source[1]} {destination[1]}\r\n".encode()
    family = _TCP4 if pair[0].version == 4 else _TCP6
    body = _ADDRESSES[family].pack(pair[0].packed, pair[1].packed, source[1], destination[1])
    if name:
        body += struct.pack("!BH", SERVICE_PORT_TLV, len(name.encode())) + name.encode()
    return _PREAMBLE.pack(_SIGNATURE, _PROXY, family, len(body)) + body


def _as_ipv6(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> ipaddress.IPv6Address:
    return ipaddress.IPv6Address(f"::ffff:{ip}") if ip.version == 4 else ip


def _text(packed: bytes) -> str:
    return str(ipaddress.ip_address(packed))
