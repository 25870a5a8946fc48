"""A connection through the proxy and what goes over it."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time

from tests.proxy import ProxyThread, address, listener
from tests.sockets.conftest import Start
from userspace_proxy.model import IPFamily, Protocol

V4 = IPFamily.IPV4
MB = 1 << 20
RESET = struct.pack("ii", 1, 0)


def pair(start: Start, family: IPFamily = V4, **options: object) -> tuple[ProxyThread, socket.socket, socket.socket]:
    """A client and the endpoint's end of its connection, with the proxy between them."""
    endpoint = listener(family)
    proxy = start(Protocol.TCP, family, [address(endpoint)], **options)
    client = proxy.connect()
    server, _ = endpoint.accept()
    server.settimeout(10)
    endpoint.close()
    return proxy, client, server


def send_all(sock: socket.socket, payload: bytes) -> threading.Thread:
    def send() -> None:
        with contextlib.suppress(OSError):
            sock.sendall(payload)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread


def read_exactly(sock: socket.socket, size: int) -> bytes:
    parts = []
    while size:
        chunk = sock.recv(min(size, MB))
        assert chunk, f"end of file {size} bytes early"
        parts.append(chunk)
        size -= len(chunk)
    return b"".join(parts)


class Stream:
    """Random bytes that can be told from any position: what is received is checked as it comes."""

    def __init__(self, seed: int) -> None:
        self._block = random.Random(seed).randbytes(MB + 7)

    def at(self, start: int, size: int) -> bytes:
        place = start % len(self._block)
        doubled = self._block[place : place + size]
        while len(doubled) < size:
            doubled += self._block[: size - len(doubled)]
        return doubled


def write_randomly(sock: socket.socket, stream: Stream, total: int, rng: random.Random) -> None:
    sent = 0
    while sent < total:
        size = min(total - sent, rng.choice((1, 100, 1448, 65536, 300_000)))
        sock.sendall(stream.at(sent, size))
        sent += size
        if rng.random() < 0.02:
            time.sleep(rng.random() * 0.002)


def read_checking(sock: socket.socket, stream: Stream, rng: random.Random) -> int:
    got = 0
    while chunk := sock.recv(rng.choice((1000, 65536, MB))):
        assert chunk == stream.at(got, len(chunk)), f"a wrong byte after {got}"
        got += len(chunk)
    return got
