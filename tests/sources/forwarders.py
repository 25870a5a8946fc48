"""Two real proxies on loopback, as small as they get: HTTP CONNECT and SOCKS5. Both say where they were asked to go."""

from __future__ import annotations

import abc
import base64
import contextlib
import socket
import struct
import threading

from tests.proxy import Servers


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while chunk := source.recv(65536):
            sink.sendall(chunk)
    for sock in (source, sink):
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


def _exactly(sock: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        chunk = sock.recv(size - len(found))
        if not chunk:
            raise OSError("gone")
        found += chunk
    return found


class Forwarder(Servers, abc.ABC):
    """`user` and `password`, where given, are asked for."""

    scheme = ""

    def __init__(self, user: str = "", password: str = "") -> None:
        self.asked: list[str] = []
        self.hosts: dict[str, str] = {}
        """Names that nobody but this proxy knows."""
        self._login = (user, password) if user else None
        super().__init__(self._forward)

    @property
    def url(self) -> str:
        login = f"{self._login[0]}:{self._login[1]}@" if self._login else ""
        return f"{self.scheme}://{login}{self.address[0]}:{self.address[1]}"

    def _forward(self, client: socket.socket) -> None:
        host, port = self._greet(client)
        self.asked.append(f"{host}:{port}")
        with socket.create_connection((self.hosts.get(host, host), port), 10) as server:
            self._agree(client)
            server.settimeout(20)
            back = threading.Thread(target=_pump, args=(server, client), daemon=True)
            back.start()
            _pump(client, server)
            back.join(5)

    @abc.abstractmethod
    def _greet(self, client: socket.socket) -> tuple[str, int]:
        """Hear whereto the client wants to be connected."""

    @abc.abstractmethod
    def _agree(self, client: socket.socket) -> None:
        """Tell it that it is."""


class HTTPForwarder(Forwarder):
    scheme = "http"

    def _greet(self, client: socket.socket) -> tuple[str, int]:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += _exactly(client, 1)
        first, *lines = head.decode().splitlines()
        method, place, _ = first.split()
        if self._login:
            wanted = base64.b64encode(":".join(self._login).encode()).decode()
            if f"proxy-authorization: basic {wanted}".lower() not in [line.lower() for line in lines]:
                client.sendall(b"HTTP/1.1 407 Who are you\r\nContent-Length: 0\r\n\r\n")
                raise OSError("refused")
        assert method == "CONNECT"
        host, _, port = place.rpartition(":")
        return host, int(port)

    def _agree(self, client: socket.socket) -> None:
        client.sendall(b"HTTP/1.1 200 Go ahead\r\n\r\n")


class SOCKSForwarder(Forwarder):
    scheme = "socks5"

    def _greet(self, client: socket.socket) -> tuple[str, int]:
        version, count = _exactly(client, 2)
        methods = _exactly(client, count)
        assert version == 5
        if self._login:
            assert 2 in methods
            client.sendall(b"\x05\x02")
            _, size = _exactly(client, 2)
            user = _exactly(client, size).decode()
            password = _exactly(client, _exactly(client, 1)[0]).decode()
            client.sendall(b"\x01" + bytes([(user, password) != self._login]))
        else:
            client.sendall(b"\x05\x00")
        _, _, _, kind = _exactly(client, 4)
        if kind == 3:
            host = _exactly(client, _exactly(client, 1)[0]).decode()
        else:
            size, family = (4, socket.AF_INET) if kind == 1 else (16, socket.AF_INET6)
            host = socket.inet_ntop(family, _exactly(client, size))
        [port] = struct.unpack("!H", _exactly(client, 2))
        return host, port

    def _agree(self, client: socket.socket) -> None:
        client.sendall(b"\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00")
