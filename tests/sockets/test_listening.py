from __future__ import annotations

import socket
import struct

import pytest

from userspace_proxy.model import IPFamily
from userspace_proxy.sockets.base import bind
from userspace_proxy.sockets.listening import listen, prepare, stop_listening


@pytest.fixture
def listener():
    with socket.socket() as sock:
        prepare(sock)
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            address = other.getsockname()
        sock.bind(address)  # an explicit number, which is kept
        listen(sock)
        yield sock


def test_connections_inherit_what_the_listener_is_told(listener: socket.socket) -> None:
    with socket.create_connection(listener.getsockname(), 5), listener.accept()[0] as taken:
        assert taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert taken.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert taken.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == struct.pack("ii", 1, 0)


def test_clients_are_refused_in_between_and_the_port_is_kept(listener: socket.socket) -> None:
    address = listener.getsockname()
    with socket.create_connection(address, 5) as waiting:
        stop_listening(listener)
        with pytest.raises(ConnectionResetError):
            waiting.recv(1)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, 5)
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(address)
    listen(listener)
    with socket.create_connection(address, 5), listener.accept()[0]:
        pass


def test_the_time_wait_of_its_connections_keeps_no_successor_out(listener: socket.socket) -> None:
    address = listener.getsockname()
    with socket.create_connection(address, 5) as client:
        taken, _ = listener.accept()
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))
        taken.close()  # first to close: TIME_WAIT is on this side
        assert client.recv(1) == b""
    stop_listening(listener)
    listener.close()
    bind(IPFamily.IPV4, socket.SOCK_STREAM, *address, prepare=prepare).close()
