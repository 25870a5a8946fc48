"""Clients that are introduced by the PROXY protocol, to us and by us, over real connections."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import struct
import subprocess
import time
from pathlib import Path

import pytest

from tests.proxy import Named, ProxyThread, Servers, closed_port, echo, eventually, read_all
from tests.sockets.conftest import Start, also_with_workers
from userspace_proxy.metrics import Outcome
from userspace_proxy.model import IPFamily, Protocol, ProxyProtocol, SessionAffinity
from userspace_proxy.proxyprotocol import decode, encode
from userspace_proxy.sockets import introduction

V4 = IPFamily.IPV4
CLIENT, PLACE = ("192.0.2.7", 4000), ("198.51.100.1", 80)
FROM_LOOPBACK = ProxyProtocol(trusted=("127.0.0.0/8", "::1/128"))


def speaking(
    start: Start, proxy_protocol: ProxyProtocol, *endpoints: tuple[str, int], **options: object
) -> ProxyThread:
    proxy: ProxyThread = start(Protocol.TCP, options.pop("family", V4), list(endpoints), **options)
    proxy.call(proxy.socket.speak, proxy_protocol)
    return proxy


def headers_and_all() -> Servers:
    """Answers with everything it has been sent, once that has ended."""
    return Servers(lambda sock: sock.sendall(read_all(sock)))


def said(proxy: ProxyThread, message: bytes) -> bytes:
    with proxy.connect() as client:
        client.sendall(message)
        client.shutdown(socket.SHUT_WR)
        return read_all(client)


@also_with_workers
@pytest.mark.parametrize("version", [1, 2])
def test_a_header_is_taken_off_and_what_follows_is_left(start: Start, version: int) -> None:
    with Servers(echo) as endpoint:
        proxy = speaking(start, FROM_LOOPBACK, endpoint.address)
        for message in (b"", b"x", b"y" * 100_000):
            assert said(proxy, encode(version, CLIENT, PLACE) + message) == message
        assert said(proxy, b"PROXY UNKNOWN\r\nhello") == b"hello"
        eventually(lambda: proxy.ended() == {Outcome.CLIENT_CLOSED: 4})


def test_a_header_may_come_in_pieces(start: Start) -> None:
    with Servers(echo) as endpoint:
        proxy = speaking(start, FROM_LOOPBACK, endpoint.address)
        with proxy.connect() as client:
            for byte in encode(2, CLIENT, PLACE, "a/b"):
                client.sendall(bytes([byte]))
                time.sleep(0.001)
            client.sendall(b"hello")
            assert client.recv(100) == b"hello"


@also_with_workers
@pytest.mark.parametrize("start_of_it", [b"GET / HTTP/1.0\r\n\r\n", b"PROXY TCP4 a b c d\r\n", b"PROXY TCP4 1.", b""])
def test_who_is_not_introduced_is_reset_and_counted(start: Start, start_of_it: bytes) -> None:
    with Servers(echo) as endpoint:
        proxy = speaking(start, FROM_LOOPBACK, endpoint.address)
        with proxy.connect() as client, contextlib.suppress(ConnectionResetError):
            client.sendall(start_of_it)
            if not start_of_it.endswith(b"\r\n"):
                client.shutdown(socket.SHUT_WR)
            assert not client.recv(1), "served"
        eventually(lambda: proxy.ended() == {Outcome.NOT_INTRODUCED: 1})
        assert endpoint.accepted == 0


@pytest.mark.parametrize("start_of_it", [b"", b"PROXY TCP4 192.0.2.7 "])
def test_a_header_that_does_not_come_is_not_waited_for(
    start: Start, monkeypatch: pytest.MonkeyPatch, start_of_it: bytes
) -> None:
    monkeypatch.setattr(introduction, "PATIENCE", 0.1)
    with Servers(echo) as endpoint:
        proxy = speaking(start, FROM_LOOPBACK, endpoint.address)
        with proxy.connect() as client:
            client.sendall(start_of_it)
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        assert proxy.ended() == {Outcome.NOT_INTRODUCED: 1}


def test_clients_from_elsewhere_are_served_as_they_are(start: Start) -> None:
    header = encode(1, CLIENT, PLACE)
    with Servers(echo) as endpoint:
        proxy = speaking(start, ProxyProtocol(trusted=("127.0.0.2/32",)), endpoint.address)
        assert said(proxy, header + b"x") == header + b"x", "believed"
        with proxy.connect(source="127.0.0.2") as client:
            client.sendall(header + b"x")
            assert client.recv(100) == b"x"


def test_source_ranges_are_for_who_connects_whatever_a_header_says(start: Start) -> None:
    """A header cannot let anybody in, nor keep anybody out."""
    with Servers(echo) as endpoint:
        proxy = speaking(start, FROM_LOOPBACK, endpoint.address)
        proxy.call(proxy.socket.screen, ["127.0.1.0/24"])
        with proxy.connect(source="127.0.1.1") as client:
            client.sendall(encode(2, CLIENT, PLACE) + b"x")
            assert client.recv(100) == b"x"
        with pytest.raises(TimeoutError), socket.socket() as stranger:
            stranger.settimeout(0.3)
            stranger.connect(proxy.address)
        eventually(lambda: proxy.ended() == {Outcome.CLIENT_CLOSED: 1})


def test_affinity_is_that_of_who_was_introduced(start: Start) -> None:
    with contextlib.ExitStack() as stack:
        named = [stack.enter_context(Named(Protocol.TCP, V4, name)) for name in "abcde"]
        proxy = speaking(start, FROM_LOOPBACK, *(n.address for n in named), affinity=SessionAffinity.CLIENT_IP)
        found = {}
        for last in range(1, 6):
            header = encode(2, (f"192.0.2.{last}", 4000), PLACE)
            answers = {said(proxy, header + b"hi") for _ in range(3)}
            assert len(answers) == 1
            found[last] = answers.pop()
        assert len(set(found.values())) == 5


@also_with_workers
@pytest.mark.parametrize("version", [1, 2])
def test_an_endpoint_is_told_who_the_client_is(start: Start, family: IPFamily, version: int) -> None:
    with Servers(lambda sock: sock.sendall(read_all(sock)), family) as endpoint:
        proxy = speaking(start, ProxyProtocol(version), endpoint.address, family=family)
        with proxy.connect() as client:
            source = client.getsockname()[:2]
            client.sendall(b"hello")
            client.shutdown(socket.SHUT_WR)
            answer = read_all(client)
        header = decode(answer)
        assert header is not None
        assert (header.source, header.destination) == (source, proxy.address)
        assert answer[header.length :] == b"hello"
        if version == 2:
            name = b"default/web:http"
            assert answer[: header.length].endswith(struct.pack("!BH", 0xE0, len(name)) + name)


def test_each_dial_gets_its_own_header_and_the_first_bytes_follow(start: Start) -> None:
    with headers_and_all() as endpoint:
        proxy = speaking(start, ProxyProtocol(1), closed_port(), endpoint.address)
        for _ in range(4):
            answer = said(proxy, b"hello")
            assert answer.count(b"PROXY TCP4") == 1
            assert answer.endswith(b"\r\nhello")
        assert sum(proxy.counts.dial_failures.values()) >= 1


def test_what_one_load_balancer_says_is_passed_on(start: Start) -> None:
    with headers_and_all() as endpoint:
        proxy = speaking(start, ProxyProtocol(2, FROM_LOOPBACK.trusted), endpoint.address)
        answer = said(proxy, encode(1, CLIENT, PLACE) + b"hello")
        header = decode(answer)
        assert header is not None
        assert (header.source, header.destination) == (CLIENT, PLACE)
        assert answer[header.length :] == b"hello"


def test_an_endpoint_that_speaks_first_is_not_held_up(start: Start) -> None:
    """And gets its header though the client says nothing."""

    def greet(sock: socket.socket) -> None:
        sock.sendall(b"220 ready\r\n")
        sock.sendall(sock.recv(1000))

    with Servers(greet) as endpoint:
        proxy = speaking(start, ProxyProtocol(1), endpoint.address)
        with proxy.connect() as client:
            assert client.recv(11) == b"220 ready\r\n"
            assert client.recv(1000).startswith(b"PROXY TCP4 127.0.0.1 ")


def test_those_who_wait_are_reset_at_the_end(start: Start) -> None:
    with Servers(echo) as endpoint:
        proxy = speaking(start, FROM_LOOPBACK, endpoint.address)
        with proxy.connect() as client:
            eventually(lambda: proxy.counts.active == 1)
            assert proxy.call(lambda: proxy.sockets.active) == 1
            proxy.stop()
            with pytest.raises(ConnectionResetError):
                client.recv(1)


HAPROXY = """\
defaults
    mode http
    timeout client 5s
frontend here
    bind 127.0.0.1:{port} accept-proxy
    http-request return status 200 content-type text/plain lf-string "%[src] %[src_port] %[dst] %[dst_port]"
"""
NGINX = """\
daemon off;
pid {directory}/pid;
error_log stderr;
events {{}}
http {{
    access_log off;
    client_body_temp_path {directory}; proxy_temp_path {directory}; fastcgi_temp_path {directory};
    uwsgi_temp_path {directory}; scgi_temp_path {directory};
    server {{
        listen 127.0.0.1:{port} proxy_protocol;
        location / {{
            set $source "$proxy_protocol_addr $proxy_protocol_port";
            return 200 "$source $proxy_protocol_server_addr $proxy_protocol_server_port";
        }}
    }}
}}
"""


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("program", "config"), [("haproxy -db -f", HAPROXY), ("nginx -e stderr -c", NGINX)], ids=["haproxy", "nginx"]
)
def test_others_read_what_we_send(start: Start, tmp_path: Path, program: str, config: str, version: int) -> None:
    command = program.split()
    if shutil.which(command[0], path=os.environ["PATH"] + ":/usr/sbin") is None:
        pytest.skip(f"no {command[0]} here")
    endpoint = closed_port()
    file = tmp_path / "config"
    file.write_text(config.format(port=endpoint[1], directory=tmp_path))
    with subprocess.Popen([*command, str(file)], env={"PATH": "/usr/sbin:/usr/bin"}) as server:
        try:
            eventually(lambda: listens(endpoint))
            proxy = speaking(start, ProxyProtocol(version), endpoint)
            with proxy.connect() as client:
                source = client.getsockname()
                client.sendall(b"GET / HTTP/1.0\r\n\r\n")
                answer = read_all(client).rpartition(b"\r\n\r\n")[2]
        finally:
            server.terminate()
    assert answer.decode() == " ".join(map(str, (*source, *proxy.address)))


def listens(place: tuple[str, int]) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(place) == 0
