"""Messages and descriptors between two processes, over a pair of Unix sockets.

A message is its length, whether a descriptor comes with it, and MessagePack. Descriptors travel beside the bytes
(SCM_RIGHTS), at most one a message, in the messages' order. What the other side does not take at once waits here, up to
a bound: a peer that far behind is stuck. The end of the channel is how each side learns that the other is gone.

What is said is in `messages`; who says what when, in `pool` and `worker`.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import logging
import os
import socket
import struct
import typing
from collections import deque
from collections.abc import Callable

import msgspec

logger = logging.getLogger(__name__)

Message = typing.TypeVar("Message")

BACKLOG = 64 * 1024 * 1024
"""Bytes that may wait: more than all of 10,000 services, told at once."""
_HEADER = struct.Struct("!IB")
_READ = 256 * 1024
_SENT_LATER = (errno.EAGAIN, errno.ETOOMANYREFS)
"""No room in the socket; too many descriptors on their way already, which only a user without privileges can meet."""
_RETRY = 0.01


class Channel(typing.Generic[Message]):
    """One side. `on_message` gets each message, with its descriptor, -1 for one that was lost, or None.

    `on_end` is called once, after the last message, and not for `close`.
    """

    def __init__(
        self,
        sock: socket.socket,
        expected: typing.Any,
        on_message: Callable[[Message, int | None], None],
        on_end: Callable[[], None],
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(expected)
        self._on_message = on_message
        self._on_end = on_end
        self._received = bytearray()
        self._descriptors: deque[int] = deque()
        self._waiting: deque[tuple[memoryview, int | None]] = deque()
        self._backlog = 0
        self._open = True
        self._loop.add_reader(sock.fileno(), self.read)

    def send(self, message: object, descriptor: int | None = None) -> None:
        """Send it now or as soon as there is room. The descriptor stays the caller's. Nothing is said when it ended."""
        if not self._open:
            return
        body = self._encoder.encode(message)
        frame = memoryview(_HEADER.pack(len(body), descriptor is not None) + body)
        if not self._waiting:
            sent = self._send(frame, descriptor)
            if sent == len(frame):
                return
            if sent:
                frame, descriptor = frame[sent:], None
        self._waiting.append((frame, descriptor if descriptor is None else os.dup(descriptor)))
        self._backlog += len(frame)
        if len(self._waiting) == 1:
            self._await_room()
        if self._backlog > BACKLOG:
            logger.error("the process at the other end takes no messages any more")
            self._end()

    def read(self) -> None:
        """Take what has come. Called by the loop; and by an owner who knows that there is nothing more to come."""
        while self._open:
            try:
                chunk, ancillary, flags, _ = self._sock.recvmsg(
                    _READ, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
                )
            except BlockingIOError:
                return
            except OSError:
                chunk, ancillary, flags = b"", [], 0
            if not chunk:
                self._end()
                return
            for _, _, raw in ancillary:
                self._descriptors.extend(array.array("i", raw))
            if flags & socket.MSG_CTRUNC and not ancillary:
                self._descriptors.append(-1)
            self._received += chunk
            self._parse()

    def close(self) -> None:
        if not self._open:
            return
        self._open = False
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        for descriptor in (*self._descriptors, *(waiting for _, waiting in self._waiting if waiting is not None)):
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._waiting.clear()
        self._descriptors.clear()

    def _end(self) -> None:
        self.close()
        self._on_end()

    def _parse(self) -> None:
        received, start = self._received, 0
        while self._open and len(received) >= start + _HEADER.size:
            length, with_descriptor = _HEADER.unpack_from(received, start)
            end = start + _HEADER.size + length
            if len(received) < end:
                break
            message = self._decoder.decode(received[start + _HEADER.size : end])
            start = end
            descriptor = self._descriptors.popleft() if with_descriptor else None
            try:
                self._on_message(message, descriptor)
            except Exception:
                logger.exception("%s: not seen through", type(message).__name__)
        del received[:start]

    def _send(self, frame: memoryview, descriptor: int | None) -> int:
        """How many bytes were taken; the descriptor goes with the first of them."""
        rights = [] if descriptor is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", descriptor))]
        try:
            return self._sock.sendmsg([frame], rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError as error:
            if error.errno in _SENT_LATER:
                return 0
            return len(frame)  # nobody is there any more, which reading tells

    def _await_room(self) -> None:
        self._loop.add_writer(self._sock.fileno(), self._go_on)

    def _go_on(self) -> None:
        while self._waiting:
            frame, descriptor = self._waiting[0]
            sent = self._send(frame, descriptor)
            if not sent:
                # Writable and not taken: it is descriptors that are too many, of which no event tells.
                self._loop.remove_writer(self._sock.fileno())
                self._loop.call_later(_RETRY, self._retry)
                return
            self._backlog -= sent
            if descriptor is not None:
                os.close(descriptor)
            if sent < len(frame):
                self._waiting[0] = (frame[sent:], None)
                return
            self._waiting.popleft()
        self._loop.remove_writer(self._sock.fileno())

    def _retry(self) -> None:
        if self._open and self._waiting:
            self._await_room()
