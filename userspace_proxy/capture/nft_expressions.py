"""What rules of nf_tables are made of: expressions, in the kernel's words, as parts of netlink messages.

An expression loads something into registers, or goes on with the rule only if what is there is as it should be, or ends
the rule. Here are those that ours need, and put together as the `nft` program would, so that it can list them. What
rules there are is in `nft`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

from userspace_proxy.capture.netlink import NESTED, attribute
from userspace_proxy.model import IPFamily

NFPROTO = {IPFamily.IPV4: 2, IPFamily.IPV6: 10}
ADDRESS_SIZE = {IPFamily.IPV4: 4, IPFamily.IPV6: 16}

_SOURCE_OFFSET = {IPFamily.IPV4: 12, IPFamily.IPV6: 8}
_DESTINATION_OFFSET = {IPFamily.IPV4: 16, IPFamily.IPV6: 24}

_VERDICT, _FIRST = 0, 1
_SMALL = 8
"""Registers 8 to 23 are those of 4 bytes each; 1 is the first four of them, under the name from when all had 16."""
_GOTO = -4
_L4PROTO, _NETWORK_HEADER, _TRANSPORT_HEADER = 16, 1, 2
_FIB_TYPE, _FIB_DESTINATION, _LOCAL = 3, 2, 2
_PORT_GIVEN = 2
_DESTINATION_NAT = 1


def text(kind: int, content: str) -> bytes:
    return attribute(kind, content.encode() + b"\0")


def number(kind: int, content: int) -> bytes:
    return attribute(kind, struct.pack("!I", content & 0xFFFFFFFF))


def nested(kind: int, *parts: bytes) -> bytes:
    return attribute(NESTED | kind, b"".join(parts))


def _expression(name: str, *parts: bytes) -> bytes:
    return text(1, name) + nested(2, *parts)


def _numbers(*contents: int) -> list[bytes]:
    """Attributes counted from 1."""
    return [number(kind, content) for kind, content in enumerate(contents, 1)]


# Loading. Keys of several parts stand in registers side by side, each part in whole ones.


def load_source(family: IPFamily) -> bytes:
    return _load_address(family, _SOURCE_OFFSET)


def load_destination(family: IPFamily) -> bytes:
    return _load_address(family, _DESTINATION_OFFSET)


def load_protocol_and_port(after: int) -> list[bytes]:
    """Of the destination, behind so many bytes that are loaded already."""
    place = _SMALL + after // 4
    port = _expression("payload", *_numbers(place + 1, _TRANSPORT_HEADER, 2, 2))
    return [_load_protocol(place if after else _FIRST), port]


def _load_address(family: IPFamily, offsets: Mapping[IPFamily, int]) -> bytes:
    return _expression("payload", *_numbers(_FIRST, _NETWORK_HEADER, offsets[family], ADDRESS_SIZE[family]))


def _load_protocol(register: int) -> bytes:
    return _expression("meta", *_numbers(register, _L4PROTO))


# Going on, or not


def is_protocol(protocol: int) -> list[bytes]:
    return [_load_protocol(_FIRST), _equals(bytes([protocol]))]


def is_local() -> list[bytes]:
    """Whether the destination is an address of this host."""
    return [_expression("fib", *_numbers(_FIRST, _FIB_TYPE, _FIB_DESTINATION)), _equals(struct.pack("=I", _LOCAL))]


def look_up(name: str, *, found: bool = False) -> bytes:
    """Whether what is loaded is in a set. `found`: it is a map, and what it leads to is loaded in place of the key."""
    result = [number(3, _FIRST)] if found else []
    return _expression("lookup", text(1, name), number(2, _FIRST), *result)


def _equals(value: bytes) -> bytes:
    return _expression("cmp", *_numbers(_FIRST, 0), nested(3, attribute(1, value)))


# Ending


def go_to(chain: str) -> bytes:
    verdict = nested(2, number(1, _GOTO), text(2, chain))
    return _expression("immediate", number(1, _VERDICT), nested(2, verdict))


def to_this_host() -> list[bytes]:
    """To the port that is loaded."""
    return [_expression("redir", *_numbers(_FIRST, _FIRST, _PORT_GIVEN))]


def translate(family: IPFamily, address: bytes) -> list[bytes]:
    """To the port that is loaded, at an address."""
    place = _SMALL + 4
    return [
        _expression("immediate", number(1, place), nested(2, attribute(1, address))),
        _expression("nat", *_numbers(_DESTINATION_NAT, NFPROTO[family], place, place, _FIRST, _FIRST)),
    ]
