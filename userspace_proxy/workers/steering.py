"""Which of the sockets that share a port gets a client: a few instructions that the kernel runs for each.

Sockets bound to one port with SO_REUSEPORT are a group. The kernel picks one by a hash of addresses and ports,
unless the group has a program (classic BPF), whose result is an index into the group. Ours looks at the client's
address alone, so that one client always meets the same worker, who remembers where it was sent.

The index counts members in the order in which they joined: TCP sockets by listen(), UDP sockets by bind().
A member that leaves is replaced by the last one, and a result beyond the last falls back to the hash. To have members
in a known order, and none that comes or goes while clients are steered, is the business of `groups`.
"""

from __future__ import annotations

import ctypes
import errno
import socket
import struct
from socket import SocketType

from userspace_proxy.model import IPFamily

Instruction = tuple[int, int, int, int]
"""Code, jump if true, jump if false, constant."""

_SO_ATTACH_FILTER = 26
_SO_DETACH_FILTER = 27
_SO_ATTACH_REUSEPORT_CBPF = 51
_SO_DETACH_REUSEPORT_BPF = 68

_LOAD_WORD, _MULTIPLY, _SHIFT_RIGHT, _MODULO, _XOR_X, _COPY_TO_X, _RETURN_A, _RETURN = (
    *(0x20, 0x24, 0x74, 0x94, 0xAC, 0x07),
    *(0x16, 0x06),
)
_NETWORK_HEADER = 0x100000000 - 0x100000  # SKF_NET_OFF: offsets from here on count from the IP header
_SPREAD = 0x9E3779B1
_SOURCE = {IPFamily.IPV4: (12,), IPFamily.IPV6: (8, 12, 16, 20)}
"""Where the words of the source address are."""


def by_client(family: IPFamily, count: int) -> list[Instruction]:
    """A program that sends all of a client address's traffic to one of `count` sockets.

    The address is spread first: pods of one node tend to differ in few bits, which need not be the lowest.
    """
    program: list[Instruction] = []
    for offset in _SOURCE[family]:
        if program:
            program.append((_COPY_TO_X, 0, 0, 0))
        program.append((_LOAD_WORD, 0, 0, _NETWORK_HEADER + offset))
        if len(program) > 1:
            program.append((_XOR_X, 0, 0, 0))
    return [
        *program,
        (_MULTIPLY, 0, 0, _SPREAD),
        (_SHIFT_RIGHT, 0, 0, 16),
        (_MODULO, 0, 0, count),
        (_RETURN_A, 0, 0, 0),
    ]


def steer(sock: SocketType, family: IPFamily, count: int) -> None:
    """Have the group of this socket, which must be in it already, steered by client address."""
    _attach(sock, _SO_ATTACH_REUSEPORT_CBPF, by_client(family, count))


def unsteer(sock: SocketType) -> None:
    """Leave the group of this socket to the kernel's hash."""
    _detach(sock, _SO_DETACH_REUSEPORT_BPF)


def deafen(sock: SocketType) -> None:
    """Have everything that comes to this socket dropped, until `undeafen`: while its group is not complete."""
    _attach(sock, _SO_ATTACH_FILTER, [(_RETURN, 0, 0, 0)])


def undeafen(sock: SocketType) -> None:
    _detach(sock, _SO_DETACH_FILTER)


def _attach(sock: SocketType, option: int, program: list[Instruction]) -> None:
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *instruction) for instruction in program))
    sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("@HP", len(program), ctypes.addressof(code)))


def _detach(sock: SocketType, option: int) -> None:
    try:
        sock.setsockopt(socket.SOL_SOCKET, option, 0)
    except OSError as error:
        if error.errno != errno.ENOENT:  # there was none
            raise
