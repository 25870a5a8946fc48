"""Clients for tests: a socket that belongs to a namespace, and the questions endpoints (`endpoint.py`) answer."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

from tests.netns import Namespace

DATAGRAM = socket.SOCK_DGRAM


def connect(
    where: Namespace, ip: str, number: int, kind: int = socket.SOCK_STREAM, timeout: float = 5
) -> socket.socket:
    """A connected socket of the namespace; it stays inside after this."""
    with where.entered():
        client = socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET, kind)
    client.settimeout(timeout)
    try:
        client.connect((ip, number))
    except OSError:
        client.close()
        raise
    return client


@contextlib.contextmanager
def crowd(
    count: int, where: Namespace, ip: str, number: int, kind: int = socket.SOCK_STREAM, timeout: float = 5
) -> Iterator[list[socket.socket]]:
    """So many clients at a time, all of them closed in the end."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(connect(where, ip, number, kind, timeout)) for _ in range(count)]


def ask(client: socket.socket) -> bytes:
    client.send(b"hi")
    return client.recv(100)


def answer(where: Namespace, ip: str, number: int, kind: int = socket.SOCK_STREAM, timeout: float = 5) -> bytes:
    """What a new client is answered; empty if it is not."""
    try:
        with connect(where, ip, number, kind, timeout) as client:
            return ask(client)
    except OSError:
        return b""
