"""Whom a proxy socket hears: a few instructions that the kernel runs for each packet that would wake it.

To clients outside the networks given, nobody is there: their packets are dropped without an answer, so that they try
again, and nothing of ours runs for them. Since the screen sits on the socket it needs no rule in any capture, is in
force at once, and sees the client's own address, which a capture leaves alone. Connections inherit it, which costs
them little; those that are established go on, whatever the listener's screen is by then.

Programs are classic BPF, as for `workers.steering`: plain bytes, no compiler, no privileges.
"""

from __future__ import annotations

import ctypes
import errno
import ipaddress
import socket
import struct
from collections.abc import Sequence
from socket import SocketType

from userspace_proxy.exceptions import PortError
from userspace_proxy.model import IPFamily

Instruction = tuple[int, int, int, int]
"""Code, jump if true, jump if false, constant."""

SOURCE = {IPFamily.IPV4: (12,), IPFamily.IPV6: (8, 12, 16, 20)}
"""Where the words of the source address are, from the beginning of the IP header."""
NETWORK_HEADER = 0x100000000 - 0x100000  # SKF_NET_OFF: offsets from here on count from the IP header
LOAD_WORD = 0x20

_AND, _JUMP_IF_EQUAL, _RETURN = 0x54, 0x15, 0x06
_WHOLE_PACKET = 0xFFFFFFFF
_WORD = 0xFFFFFFFF
_MOST = 4096
"""Instructions of one program; the kernel's own limit."""

_SO_ATTACH_FILTER = 26
_SO_DETACH_FILTER = 27


def only_from(family: IPFamily, networks: Sequence[str]) -> list[Instruction]:
    """A program that lets packets in whose source is in one of the networks, all of the family.

    Raises PortError if there are more networks than a program can hold.
    """
    program: list[Instruction] = []
    for network in ipaddress.collapse_addresses(map(ipaddress.ip_network, networks)):  # type: ignore[type-var]
        program += _if_from(family, network)
    program.append((_RETURN, 0, 0, 0))
    if len(program) > _MOST:
        raise PortError(f"found {len(networks)} source ranges, {len(program)} instructions; allowed: {_MOST}")
    return program


def _if_from(family: IPFamily, network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> list[Instruction]:
    words = [
        (offset, wanted, mask)
        for offset, wanted, mask in zip(
            SOURCE[family], _words(network.network_address.packed), _words(network.netmask.packed), strict=True
        )
        if mask
    ]
    test: list[Instruction] = []
    for offset, wanted, mask in words:
        test.append((LOAD_WORD, 0, 0, NETWORK_HEADER + offset))
        if mask != _WORD:
            test.append((_AND, 0, 0, mask))
        test.append((_JUMP_IF_EQUAL, 0, 0, wanted))
    # Whatever differs leads past the end, to the next network.
    return [
        (code, 0, len(test) - place if code == _JUMP_IF_EQUAL else 0, constant)
        for place, (code, _, _, constant) in enumerate(test)
    ] + [(_RETURN, 0, 0, _WHOLE_PACKET)]


def _words(packed: bytes) -> tuple[int, ...]:
    return struct.unpack(f"!{len(packed) // 4}I", packed)


def screen(sock: SocketType, family: IPFamily, networks: Sequence[str] | None) -> None:
    """Have a socket hear only clients from these networks; None: all of them, and with none at all: nobody.

    Raises PortError.
    """
    try:
        if networks is not None:
            attach(sock, _SO_ATTACH_FILTER, only_from(family, networks))
        else:
            detach(sock, _SO_DETACH_FILTER)
    except OSError as error:
        many = f"{len(networks or ())} source ranges"
        raise PortError(f"the kernel takes no program for {many}: {error.strerror}; see net.core.optmem_max") from error


def attach(sock: SocketType, option: int, program: Sequence[Instruction]) -> None:
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *instruction) for instruction in program))
    sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("@HP", len(program), ctypes.addressof(code)))


def detach(sock: SocketType, option: int) -> None:
    try:
        sock.setsockopt(socket.SOL_SOCKET, option, 0)
    except OSError as error:
        if error.errno != errno.ENOENT:  # there was none
            raise
