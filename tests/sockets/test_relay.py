"""Bytes: all of them, in order, whatever stops in between."""

from __future__ import annotations

import hashlib
import os
import random
import socket
import threading
import time

import pytest

from tests.proxy import Servers, address, echo, eventually, listener, read_all
from tests.sockets.conftest import Start, also_with_workers
from tests.sockets.streams import MB, V4, Stream, pair, read_checking, read_exactly, send_all, write_randomly
from userspace_proxy.metrics import open_descriptors
from userspace_proxy.model import IPFamily, Protocol


@also_with_workers
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


@also_with_workers
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


@also_with_workers
def test_a_server_that_speaks_first(start: Start, family: IPFamily) -> None:
    _, client, server = pair(start, family)
    with client, server:
        server.sendall(b"220 ready")
        assert read_exactly(client, 9) == b"220 ready"


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
