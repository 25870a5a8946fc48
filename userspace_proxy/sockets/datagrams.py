"""Several datagrams a system call: recvmmsg(2) and sendmmsg(2), which Python's `socket` does not have.

An `Inbox` takes what clients have sent to one socket, an `Outbox` collects replies and sends them together. Both are
arrays in memory of their own, laid out once and shared by all sockets of a process. Who a datagram came from, and
which of our addresses it was sent to, stay the bytes that the kernel wrote, a *letterhead*: as a dict's key they name
a flow, and put before a reply they bring it back. They are taken apart only where somebody asks who the client is.

What is done with datagrams is in `udp`.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import struct
import sys
from collections.abc import Callable
from socket import SocketType

from userspace_proxy.model import Address

COUNT = 32
"""Datagrams a call."""
LARGEST = 65536
"""Bytes of one, and more than the largest payload (65,507 over IPv4), so that nothing is ever truncated."""

_DONTWAIT = int(socket.MSG_DONTWAIT)
_IP_PKTINFO = 8
_IPV6_PKTINFO = 50
_IPV6_RECVPKTINFO = 49

_NAME = 32
"""Room for the address of a peer, of either family, and for what comes next to be aligned."""
_CONTROL = socket.CMSG_SPACE(20)
"""Room for the larger of the two structs of packet information."""
_HEAD = _NAME + _CONTROL
_BLANK = bytes(COUNT * _HEAD)
_CONTROL_HEADER = struct.Struct("@Nii")


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Header(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint32),
        ("vectors", ctypes.c_void_p),
        ("vector_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _Message(ctypes.Structure):
    _fields_ = (("header", _Header), ("length", ctypes.c_uint))


_SIZE = ctypes.sizeof(_Message)
_FIRST, _STEP = _Message.length.offset // 4, _SIZE // 4
"""Where the lengths of messages are, among all their 32-bit words."""

_libc = ctypes.CDLL(None, use_errno=True)
_receive, _send = _libc.recvmmsg, _libc.sendmmsg


class _Tray:
    """Room for COUNT datagrams. Pages that no datagram was large enough to touch take no memory."""

    def __init__(self) -> None:
        self._heads = mmap.mmap(-1, COUNT * _HEAD)  # whose slices are bytes, without a second copy
        memory = mmap.mmap(-1, COUNT * LARGEST)
        room = memoryview(memory)
        self.rooms = [room[at : at + LARGEST] for at in range(0, COUNT * LARGEST, LARGEST)]
        self._vectors = (_Vector * COUNT)()
        self._messages = (_Message * COUNT)()
        head = ctypes.addressof(ctypes.c_char.from_buffer(self._heads))
        base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for number, (vector, message) in enumerate(zip(self._vectors, self._messages, strict=True)):
            vector.base, vector.length = base + number * LARGEST, LARGEST
            header = message.header
            header.name, header.name_length = head + number * _HEAD, _NAME
            header.vectors, header.vector_count = ctypes.addressof(vector), 1
            header.control, header.control_length = head + number * _HEAD + _NAME, _CONTROL
        self._pointer = ctypes.byref(self._messages)


class Inbox(_Tray):
    def __init__(self) -> None:
        super().__init__()
        self._written = memoryview(self._messages).cast("B")
        self._fresh = bytes(self._written)
        self._lengths = self._written.cast("I")

    def receive(self, sock: SocketType) -> list[tuple[bytes, memoryview]]:
        """Letterhead and payload of each datagram that waits, up to COUNT; they hold until the next call.

        Raises OSError as recvmsg does.
        """
        self._written[:] = self._fresh  # the kernel has written there how much it filled
        self._heads[:] = _BLANK  # IPv4 fills less than IPv6
        count = _receive(sock.fileno(), self._pointer, COUNT, _DONTWAIT, None)
        if count < 0:
            raise _error()
        heads, rooms, lengths = self._heads, self.rooms, self._lengths
        return [
            (heads[at * _HEAD : at * _HEAD + _HEAD], rooms[at][: lengths[at * _STEP + _FIRST]]) for at in range(count)
        ]


class Outbox(_Tray):
    """A payload is written into `rooms[count]`, then `put`."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self._lengths = memoryview(self._vectors).cast("B").cast("L")

    def put(self, head: bytes, size: int) -> None:
        """Take up what is in the next room, to go where the letterhead says."""
        at = self.count
        self._heads[at * _HEAD : at * _HEAD + _HEAD] = head
        self._lengths[2 * at + 1] = size
        self.count = at + 1

    def send(self, sock: SocketType, failed: Callable[[OSError], None]) -> tuple[int, int]:
        """How many went, and of how many bytes together. `failed` is told why of each that did not."""
        count, self.count = self.count, 0
        sizes = self._lengths[1 : 2 * count : 2].tolist()
        at = 0
        while at < count:
            sent = _send(sock.fileno(), ctypes.byref(self._messages, at * _SIZE), count - at, _DONTWAIT)
            if sent < 0:  # which tells of the first alone
                failed(_error())
                sizes[at] = -1
            at += max(1, sent)
        gone = [size for size in sizes if size >= 0]
        return len(gone), sum(gone)


def ask_for_letterheads(sock: SocketType) -> None:
    """Have the kernel tell which of our addresses a datagram was sent to. Raises OSError."""
    if sock.family == socket.AF_INET:
        sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVPKTINFO, 1)


def sender(head: bytes) -> Address:
    """Who wrote."""
    family = int.from_bytes(head[:2], sys.byteorder)
    port = int.from_bytes(head[2:4], "big")
    if family == socket.AF_INET:
        return socket.inet_ntop(family, head[4:8]), port
    ip = socket.inet_ntop(family, head[8:24])
    link = int.from_bytes(head[24:28], sys.byteorder)
    return f"{ip}%{_name_of(link)}" if link else ip, port


def _name_of(link: int) -> str:
    try:
        return socket.if_indextoname(link)
    except OSError:  # it is gone again
        return str(link)


def answering(head: bytes) -> bytes:
    """The letterhead of replies: to the sender, from the address that was written to.

    The interface is left to routing (0): naming the one it came by loses replies under NAT to loopback. Only
    link-local IPv6 addresses mean nothing without it.
    """
    name, found = head[:_NAME], head[_NAME + _CONTROL_HEADER.size :]
    if int.from_bytes(head[:2], sys.byteorder) == socket.AF_INET:
        level, kind, packet_info = socket.IPPROTO_IP, _IP_PKTINFO, struct.pack("=I4s4s", 0, found[8:12], bytes(4))
    else:
        link_local = found[0] == 0xFE and found[1] & 0xC0 == 0x80
        interface = found[16:20] if link_local else bytes(4)
        level, kind, packet_info = socket.IPPROTO_IPV6, _IPV6_PKTINFO, found[:16] + interface
    control = _CONTROL_HEADER.pack(socket.CMSG_LEN(len(packet_info)), level, kind) + packet_info
    return name + control.ljust(_CONTROL, b"\0")


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
