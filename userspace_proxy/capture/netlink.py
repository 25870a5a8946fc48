"""Netlink, as far as conntrack and routes need it: messages put together and taken apart, dumps, batches of changes.

By hand, because decoding whole entries and routes costs up to 0.5 ms each with pyroute2, there are thousands of
them, and only an attribute or two are of interest. What goes into a message is its user's to know.
"""

from __future__ import annotations

import os
import select
import socket
import struct
from collections.abc import Iterator, Sequence

REQUEST, ACK, DUMP, EXCLUSIVE, CREATE = 0x01, 0x04, 0x300, 0x200, 0x400
NESTED = 0x8000
_ERROR, _DONE = 2, 3
_SOL_NETLINK, _ADD_MEMBERSHIP, _STRICT_CHECKS = 270, 1, 12
_SO_SNDBUFFORCE = 32
_TYPE_MASK = 0x3FFF

_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")

_RECEIVE_SIZE = 1 << 17
_CHANGES_AT_ONCE = 64
"""Their acknowledgements must fit into the socket's receive buffer."""


class Netlink:
    """A socket of one netlink protocol, with a name for messages; the kernel is given ten seconds for each answer."""

    def __init__(self, name: str, protocol: int) -> None:
        self._name = name
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self._socket.bind((0, 0))
        self._socket.settimeout(10)

    def close(self) -> None:
        self._socket.close()

    def filter_strictly(self) -> None:
        """Have the kernel leave out of dumps what differs from the request. Raises OSError before Linux 4.20."""
        self._socket.setsockopt(_SOL_NETLINK, _STRICT_CHECKS, 1)

    def dump(self, kind: int, body: bytes) -> Iterator[tuple[int, bytes]]:
        """Type and body of everything the kernel tells. Raises OSError if it refuses."""
        self._socket.send(message(kind, DUMP, body))
        while True:
            for found, _, content in _messages(self._socket.recv(_RECEIVE_SIZE)):
                if found == _DONE:
                    return
                if found == _ERROR:
                    if code := _error(content):
                        raise OSError(code, f"{self._name} over netlink: {os.strerror(code)}")
                else:
                    yield found, content

    def change(self, messages: Sequence[bytes]) -> list[int]:
        """Send messages that are each to be acknowledged; the errno of each, 0 where it was done."""
        codes: list[int] = []
        for start in range(0, len(messages), _CHANGES_AT_ONCE):
            self._socket.send(b"".join(messages[start : start + _CHANGES_AT_ONCE]))
            awaited = min(start + _CHANGES_AT_ONCE, len(messages))
            while len(codes) < awaited:
                received = _messages(self._socket.recv(_RECEIVE_SIZE))
                codes += (_error(content) for found, _, content in received if found == _ERROR)
        return codes

    def ask(self, kind: int, body: bytes) -> bytes:
        """The body of the one message that answers. Raises OSError if the kernel refuses."""
        self._socket.send(message(kind, 0, body))
        found, _, content = next(_messages(self._socket.recv(_RECEIVE_SIZE)))
        if found == _ERROR:
            raise OSError(_error(content), f"{self._name} over netlink: {os.strerror(_error(content))}")
        return content

    def transact(self, batch: bytes) -> None:
        """Send messages that are done together or not at all, none of which asks to be acknowledged.

        Messages of this kind have been answered when `send` returns. Raises OSError with the first refusal.
        """
        # One piece is what makes it a transaction; half of the buffer is the kernel's for its book-keeping.
        if len(batch) > self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 2:
            size = len(batch) + (1 << 16)
            try:
                self._socket.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, size)
            except PermissionError:  # in a user namespace, where only the host's limit is left: net.core.wmem_max
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)
        self._socket.send(batch)
        first = next((code for kind, _, content in self.waiting() if kind == _ERROR and (code := _error(content))), 0)
        for _ in self.waiting():
            pass
        if first:
            raise OSError(first, f"{self._name} over netlink: {os.strerror(first)}")

    # -- being told

    def follow(self, group: int) -> None:
        """Be sent what the kernel tells about changes, by whomever they were made."""
        self._socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def port(self) -> int:
        """This socket's name among those of its network namespace."""
        return int(self._socket.getsockname()[0])

    def waiting(self) -> Iterator[tuple[int, int, bytes]]:
        """Type, port of who caused it, and body of all messages that are here. Raises OSError if some are lost."""
        asker = select.poll()  # select() knows descriptors below 1024 only
        asker.register(self._socket, select.POLLIN)
        while asker.poll(0):
            yield from _messages(self._socket.recv(_RECEIVE_SIZE))


def message(kind: int, flags: int, body: bytes) -> bytes:
    return _HEADER.pack(_HEADER.size + len(body), kind, REQUEST | flags, 0, 0) + body


def attribute(kind: int, content: bytes) -> bytes:
    padding = b"\0" * (-len(content) % 4)
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(content), kind) + content + padding


def attributes(content: bytes) -> Iterator[tuple[int, bytes]]:
    offset = 0
    while offset + _ATTRIBUTE.size <= len(content):
        length, kind = _ATTRIBUTE.unpack_from(content, offset)
        yield kind & _TYPE_MASK, content[offset + _ATTRIBUTE.size : offset + length]
        offset += (length + 3) & ~3


def _messages(received: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Type, port and body."""
    offset = 0
    while offset + _HEADER.size <= len(received):
        length, kind, _, _, port = _HEADER.unpack_from(received, offset)
        yield kind, port, received[offset + _HEADER.size : offset + length]
        offset += (length + 3) & ~3


def _error(content: bytes) -> int:
    (code,) = struct.unpack_from("=i", content)
    return -int(code)
