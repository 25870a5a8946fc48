"""Which of the sockets that share a port gets a client: a few instructions that the kernel runs for each.

Sockets bound to one port with SO_REUSEPORT are a group. The kernel picks one by a hash of addresses and ports,
unless the group has a program (classic BPF), whose result is an index into the group. Ours looks at the client's
address alone, so that one client always meets the same worker, who remembers where it was sent.

The index counts members in the order in which they joined: TCP sockets by listen(), UDP sockets by bind().
A member that leaves is replaced by the last one, and a result beyond the last falls back to the hash. To have members
in a known order, and none that comes or goes while clients are steered, is the business of `groups`.
"""

from __future__ import annotations

from socket import SocketType

from userspace_proxy.model import IPFamily
from userspace_proxy.sockets.screen import LOAD_WORD, NETWORK_HEADER, SOURCE, Instruction, attach, detach

_SO_ATTACH_REUSEPORT_CBPF = 51
_SO_DETACH_REUSEPORT_BPF = 68

_MULTIPLY, _SHIFT_RIGHT, _MODULO, _XOR_X, _COPY_TO_X, _RETURN_A = 0x24, 0x74, 0x94, 0xAC, 0x07, 0x16
_SPREAD = 0x9E3779B1


def by_client(family: IPFamily, count: int) -> list[Instruction]:
    """A program that sends all of a client address's traffic to one of `count` sockets.

    The address is spread first: pods of one node tend to differ in few bits, which need not be the lowest.
    """
    program: list[Instruction] = []
    for offset in SOURCE[family]:
        if program:
            program.append((_COPY_TO_X, 0, 0, 0))
        program.append((LOAD_WORD, 0, 0, NETWORK_HEADER + offset))
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
    attach(sock, _SO_ATTACH_REUSEPORT_CBPF, by_client(family, count))


def unsteer(sock: SocketType) -> None:
    """Leave the group of this socket to the kernel's hash."""
    detach(sock, _SO_DETACH_REUSEPORT_BPF)
