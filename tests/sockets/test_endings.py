"""How connections end: in order when both sides have finished, by a reset whenever bytes may be missing."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import random
import socket
import struct
import threading
import time
from pathlib import Path

import pytest

from tests.proxy import ProxyThread, Servers, address, eventually, listener, read_all
from tests.sockets.conftest import Start, also_with_workers
from tests.sockets.streams import MB, RESET, V4, Stream, pair, read_checking, read_exactly, send_all, write_randomly
from userspace_proxy.metrics import Outcome
from userspace_proxy.model import IPFamily, Protocol


@also_with_workers
def test_the_end_of_file_travels_with_the_last_bytes(start: Start, family: IPFamily) -> None:
    """One segment where two would cost another way through the network stack, and the client another wake-up."""

    def last_words(sock: socket.socket) -> None:
        sock.send(b"bye", socket.MSG_MORE)

    with Servers(last_words, family) as endpoint:
        proxy = start(Protocol.TCP, family, [endpoint.address])
        with proxy.connect() as client:
            assert read_all(client) == b"bye"
            (received,) = struct.unpack_from("=I", client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192), 140)
            assert received == 2  # the handshake's, and this one


@also_with_workers
@pytest.mark.parametrize("splice", [True, False], ids=["splice", "copy"])
@pytest.mark.parametrize("first", ["client", "endpoint"])
def test_half_close_lets_the_other_side_go_on(start: Start, first: str, splice: bool) -> None:
    """10 MB each way, then the first to finish still gets 10 MB after its end of file was seen."""
    proxy, client, server = pair(start, splice=splice)
    finisher, other = (client, server) if first == "client" else (server, client)
    forth, back, later = (os.urandom(10 * MB) for _ in range(3))
    with client, server:
        sending = [send_all(finisher, forth), send_all(other, back)]
        received: list[bytes] = []
        reading = threading.Thread(target=lambda: received.append(read_exactly(finisher, len(back))))
        reading.start()
        assert read_exactly(other, len(forth)) == forth
        for thread in (*sending, reading):
            thread.join(20)
        assert received == [back]
        finisher.shutdown(socket.SHUT_WR)
        assert other.recv(1) == b""
        send_all(other, later).join(0)
        assert read_exactly(finisher, len(later)) == later
        other.shutdown(socket.SHUT_WR)
        assert finisher.recv(1) == b""
    eventually(lambda: proxy.counts.active == 0)
    outcome = Outcome.CLIENT_CLOSED if first == "client" else Outcome.ENDPOINT_CLOSED
    assert proxy.ended() == {outcome: 1}


@also_with_workers
def test_a_forgotten_half_close_ends(start: Start) -> None:
    proxy, client, server = pair(start, half_close_timeout=0.4)
    with client, server:
        client.shutdown(socket.SHUT_WR)
        assert server.recv(1) == b""
        for _ in range(6):  # as long as something moves it lives, well over the time-out
            time.sleep(0.15)
            server.sendall(b".")
            assert client.recv(1) == b"."
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    assert proxy.ended() == {Outcome.HALF_CLOSE_TIMEOUT: 1}


@also_with_workers
@pytest.mark.parametrize("splice", [True, False], ids=["splice", "copy"])
@pytest.mark.parametrize("side", ["client", "endpoint"])
def test_a_reset_reaches_the_other_side_as_a_reset(start: Start, side: str, splice: bool) -> None:
    proxy, client, server = pair(start, splice=splice)
    victim, survivor = (client, server) if side == "client" else (server, client)
    sending = send_all(victim, os.urandom(20 * MB))
    survivor.recv(MB)
    _reset(victim)
    sending.join(5)
    with survivor, pytest.raises(ConnectionResetError):
        while survivor.recv(MB):
            pass
    eventually(lambda: proxy.counts.active == 0)


@also_with_workers
@pytest.mark.parametrize("side", ["client", "endpoint"])
def test_a_reset_after_end_of_file_is_noticed(start: Start, side: str) -> None:
    """The side that finished is gone altogether while the other has nothing to send: only its error tells."""
    proxy, client, server = pair(start)
    victim, survivor = (client, server) if side == "client" else (server, client)
    victim.shutdown(socket.SHUT_WR)
    assert survivor.recv(1) == b""
    victim.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    victim.close()
    eventually(lambda: proxy.counts.active == 0)
    with survivor, pytest.raises((ConnectionResetError, BrokenPipeError)):
        survivor.send(b"x")
        time.sleep(0.1)
        survivor.send(b"y")
    assert proxy.ended() == {Outcome.CLIENT_RESET if side == "client" else Outcome.ENDPOINT_RESET: 1}


@also_with_workers
def test_a_client_that_resets_frees_a_connection_whose_endpoint_is_stalled(start: Start) -> None:
    proxy, client, server = pair(start)
    client.settimeout(0.5)
    with contextlib.suppress(TimeoutError):
        client.sendall(bytes(100 * MB))
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    client.close()
    eventually(lambda: proxy.counts.active == 0)
    with server, pytest.raises(ConnectionResetError):
        while server.recv(MB):
            pass


@also_with_workers
def test_an_early_answer_followed_by_a_reset_is_passed_on(start: Start) -> None:
    """A server answers before it has read everything, and closes: the answer arrives ahead of the reset."""
    _, client, server = pair(start)
    with client:
        client.sendall(bytes(200_000))
        assert server.recv(10)
        server.sendall(b"413 too large")
        server.close()  # unread bytes make it a reset
        received = b""
        with pytest.raises(ConnectionResetError):
            while chunk := client.recv(100):
                received += chunk
    assert received == b"413 too large"


def test_a_proxy_that_is_killed_resets_both_sides(tmp_path: Path) -> None:
    endpoint = listener()
    told = tmp_path / "port"
    child = os.fork()
    if child == 0:
        proxy = ProxyThread(asyncio.new_event_loop, Protocol.TCP, V4, [address(endpoint)])
        told.write_text(f"{proxy.socket.port}\n")
        time.sleep(60)
        os._exit(1)
    try:
        eventually(lambda: told.exists() and told.read_text().endswith("\n"))
        port = int(told.read_text())
        client = socket.create_connection(("127.0.0.1", port), 10)
        server, _ = endpoint.accept()
        client.sendall(b"x")
        assert server.recv(1) == b"x"
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    with client, server, endpoint:
        for sock in (client, server):
            with pytest.raises(ConnectionResetError):
                sock.recv(1)


def other_end(endpoint: socket.socket, client: socket.socket) -> socket.socket:
    """What the endpoint has of a client. On a machine that stood still, a dial given up may be in its queue before."""
    client.sendall(b"!")
    while True:
        server, _ = endpoint.accept()
        server.settimeout(10)
        with contextlib.suppress(ConnectionResetError):
            if server.recv(1):
                return server
        server.close()


@also_with_workers
@pytest.mark.timeout(300)
@pytest.mark.parametrize("splice", [True, False], ids=["splice", "copy"])
def test_killed_at_any_moment_there_is_never_a_wrong_byte_nor_a_clean_loss(start: Start, splice: bool) -> None:
    """Either side is reset at a random moment; the other sees the right bytes and then a reset, or all of them."""
    endpoint = listener()
    proxy = start(Protocol.TCP, V4, [address(endpoint)], splice=splice)
    rng = random.Random(7)
    for seed in range(150):
        client = proxy.connect()
        server = other_end(endpoint, client)
        survivor, victim = rng.sample((client, server), 2)
        total = rng.choice((1000, MB, 16 * MB))
        stream = Stream(seed)
        moment = rng.random() * 0.01
        verdict: list[object] = []

        def read(sock: socket.socket = survivor, stream: Stream = stream, seed: int = seed) -> None:
            try:
                verdict.append(read_checking(sock, stream, random.Random(seed)))
            except ConnectionResetError:
                verdict.append("reset")
            except AssertionError as error:
                verdict.append(error)

        reading = threading.Thread(target=read)
        reading.start()
        finished = threading.Event()

        def write(sock: socket.socket = victim, stream: Stream = stream, seed: int = seed, total: int = total) -> None:
            with contextlib.suppress(OSError):
                write_randomly(sock, stream, total, random.Random(seed))
                finished.set()

        writing = threading.Thread(target=write)
        writing.start()
        time.sleep(moment)
        victim.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        if finished.is_set() and rng.random() < 0.5:
            victim.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))
            victim.shutdown(socket.SHUT_WR)
            reading.join(20)
            assert verdict == [total]
            victim.close()
        else:
            _reset(victim)
            reading.join(20)
            assert verdict == ["reset"], f"round {seed}"
        writing.join(10)
        survivor.close()
    endpoint.close()
    eventually(lambda: proxy.counts.active == 0, lambda: f"{proxy.counts.active} connections left")


def _reset(sock: socket.socket) -> None:
    """Reset a connection another thread may be writing to: connect(AF_UNSPEC) is TCP's abort."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.connect(sock.fileno(), struct.pack("H14x", socket.AF_UNSPEC), 16):
        number = ctypes.get_errno()
        assert number in (errno.ENOTCONN, errno.ECONNRESET), os.strerror(number)
    sock.close()
