"""Bytes: all of them, in order, or a reset."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import hashlib
import os
import random
import socket
import struct
import threading
import time
from pathlib import Path

import pytest

from tests.proxy import ProxyThread, Servers, address, echo, eventually, listener, read_all
from tests.sockets.conftest import Start, also_with_workers
from userspace_proxy.metrics import Outcome, open_descriptors
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


def test_an_urgent_mark_does_not_stop_what_follows(start: Start, family: IPFamily) -> None:
    """A read stops short at the mark, and no further edge tells of the bytes behind it."""
    endpoint = listener(family)
    proxy = start(Protocol.TCP, family, [address(endpoint)])
    for _ in range(20):
        with proxy.connect() as client:
            client.sendall(b"abc")
            client.send(b"X", socket.MSG_OOB)
            client.sendall(b"def")
            server, _ = endpoint.accept()
            with server:
                server.settimeout(5)
                assert read_exactly(server, 6) == b"abcdef"
    endpoint.close()


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


@pytest.mark.parametrize("splice", [True, False], ids=["splice", "copy"])
def test_an_urgent_mark_in_bulk_is_no_end(start: Start, splice: bool) -> None:
    """splice() answers 0 at the mark if the end of file is queued behind it, and EAGAIN if it is not."""
    received: list[int] = []

    def slow(sock: socket.socket) -> None:
        time.sleep(0.2)  # for everything to pile up before it
        received.append(len(read_all(sock)))

    with Servers(slow) as endpoint:
        proxy = start(Protocol.TCP, V4, [endpoint.address], splice=splice)
        with proxy.connect() as client:
            client.sendall(bytes(20_000_000))
            client.send(b"!", socket.MSG_OOB)
            client.sendall(bytes(2_000_000))
            client.shutdown(socket.SHUT_WR)
            assert client.recv(1) == b""
    assert received == [22_000_000]


@also_with_workers
def test_bytes_pass_both_ways(start: Start, family: IPFamily) -> None:
    proxy, client, server = pair(start, family)
    with client, server:
        client.sendall(b"question")
        assert read_exactly(server, 8) == b"question"
        server.sendall(b"answer")
        assert read_exactly(client, 6) == b"answer"
    eventually(lambda: proxy.counts.active == 0)
    assert (proxy.counts.to_endpoint, proxy.counts.to_client) == (8, 6)


def test_a_server_that_speaks_first(start: Start, family: IPFamily) -> None:
    _, client, server = pair(start, family)
    with client, server:
        server.sendall(b"220 ready")
        assert read_exactly(client, 9) == b"220 ready"


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
@pytest.mark.parametrize("writer", ["client", "endpoint"])
def test_a_stalled_reader_stops_the_writer(start: Start, writer: str, splice: bool) -> None:
    """What is on the way is bounded by the kernel's buffers and one of ours, however long the writer goes on."""
    proxy, client, server = pair(start, splice=splice)
    source, sink = (client, server) if writer == "client" else (server, client)
    with client, server:
        source.settimeout(1)
        payload = os.urandom(MB)
        sent = 0
        with pytest.raises(TimeoutError):
            while sent < 200 * MB:
                sent += source.send(payload)
        assert sent < 100 * MB
        [session] = proxy.sessions()
        held = session["to_endpoint" if writer == "client" else "to_client"]
        assert held <= sent
        # Nothing was lost by the stall: every byte sent comes out.
        source.shutdown(socket.SHUT_WR)
        assert len(read_all(sink)) == sent


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


@also_with_workers
@pytest.mark.parametrize("splice", [True, False], ids=["splice", "copy"])
def test_random_writes_both_ways_arrive_whole(start: Start, splice: bool) -> None:
    for seed in range(5):
        proxy, client, server = pair(start, splice=splice)
        up, down = Stream(seed), Stream(seed + 1000)
        total = 8 * MB
        results: dict[str, int] = {}

        def end(sock: socket.socket, out: Stream, into: Stream, name: str, seed: int = seed) -> None:
            def write() -> None:
                write_randomly(sock, out, total, random.Random(seed))
                sock.shutdown(socket.SHUT_WR)

            writing = threading.Thread(target=write)
            writing.start()
            results[name] = read_checking(sock, into, random.Random(seed))
            writing.join(20)

        with client, server:
            both = [
                threading.Thread(target=end, args=(client, up, down, "client")),
                threading.Thread(target=end, args=(server, down, up, "server")),
            ]
            for thread in both:
                thread.start()
            for thread in both:
                thread.join(30)
        assert results == {"client": total, "server": total}


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


@also_with_workers
def test_pipes_are_given_back_when_a_stream_runs_dry(start: Start) -> None:
    proxy, client, server = pair(start)
    with client, server:
        for _ in range(3):
            digest = hashlib.sha256()
            payload = os.urandom(30 * MB)
            sending = send_all(client, payload)
            got = 0
            while got < len(payload):
                chunk = server.recv(MB)
                digest.update(chunk)
                got += len(chunk)
            sending.join(10)
            assert digest.digest() == hashlib.sha256(payload).digest()
        # Two for the connection; what is left over are pipes in the pool, not one for each burst.
        eventually(lambda: proxy.counts.active and proxy.call(proxy.metrics.descriptors_in_use) <= 4)


def test_an_idle_connection_holds_two_descriptors(start: Start) -> None:
    with Servers(echo) as endpoint:
        proxy = start(Protocol.TCP, V4, [endpoint.address])
        before = open_descriptors()
        clients = [proxy.connect() for _ in range(50)]
        for client in clients:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
        # Four a connection in this process: the client's, the endpoint's, and the proxy's two.
        assert open_descriptors() - before == 200
        for client in clients:
            client.close()
