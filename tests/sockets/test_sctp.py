"""SCTP on a real stack: messages with all that belongs to them, endings, limits, paths."""

from __future__ import annotations

import contextlib
import hashlib
import random
import resource
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import pytest
import sctp as pysctp

from tests.netns import Namespace
from tests.proxy import ProxyThread, address, eventually, listener, plain
from tests.sockets.conftest import Start
from userspace_proxy import host
from userspace_proxy.exceptions import ProtocolUnavailable
from userspace_proxy.metrics import Outcome
from userspace_proxy.model import IPFamily, Protocol, ServicePortName, SocketKey
from userspace_proxy.sockets import sctp

V4 = IPFamily.IPV4
SCTP = Protocol.SCTP
needs_sctp = pytest.mark.sctp
on_one_loop = pytest.mark.parametrize("variant", ["uvloop"], indirect=True)
"""For what takes seconds and is the kernel's doing more than a loop's."""


class Message(NamedTuple):
    content: bytes
    stream: int = 0
    ppid: bytes = bytes(4)
    unordered: bool = False


class Peer:
    """A client's or an endpoint's side of an association, with all that SCTP has to say of a message."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.settimeout(20)
        sock.setsockopt(socket.IPPROTO_SCTP, 3, 1)  # SCTP_NODELAY
        sock.setsockopt(socket.IPPROTO_SCTP, 32, 1)  # SCTP_RECVRCVINFO
        sock.setsockopt(socket.SOL_SOCKET, 32, 2 * sctp.MAX_MESSAGE)  # SO_SNDBUFFORCE

    def send(self, message: Message) -> None:
        info = struct.pack("=HH4sIi", message.stream, message.unordered, message.ppid, 0, 0)
        self.sock.sendmsg([message.content], [(socket.IPPROTO_SCTP, 2, info)])

    def receive(self) -> Message | None:
        """The next message, whole; None at the end."""
        pieces = []
        while True:
            content, ancillary, flags, _ = self.sock.recvmsg(1 << 18, 64)
            if not content:
                return None
            pieces.append(content)
            if flags & socket.MSG_EOR:
                break
        stream, _, flags, ppid = struct.unpack_from("=HHHxx4s", ancillary[0][2])
        return Message(b"".join(pieces), stream, ppid, bool(flags & 1))

    def abort(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def streams(self) -> tuple[int, int]:
        """Toward the other side, and from it."""
        status = pysctp.sctpsocket_tcp(self.sock.family, self.sock).get_status()
        return status.outstrms, status.instrms

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()


def widen(sock: socket.socket, streams: int, accepts: int) -> None:
    """To be done before an association begins; a window of 1 MiB, as the kernel's own loses what is longer."""
    sock.setsockopt(socket.SOL_SOCKET, 33, sctp.MAX_MESSAGE)  # SO_RCVBUFFORCE
    parameters = pysctp.sctpsocket_tcp(sock.family, sock).initparams
    parameters.num_ostreams, parameters.max_instreams = streams, accepts


def client_of(proxy: ProxyThread, streams: int = 16, accepts: int = 16) -> Peer:
    sock = plain(SCTP, proxy.family)
    widen(sock, streams, accepts)
    sock.settimeout(10)
    try:
        sock.connect(proxy.address)
    except OSError:
        sock.close()
        raise
    return Peer(sock)


@contextlib.contextmanager
def pair(
    start: Start, family: IPFamily = V4, streams: int = 16, accepts: int = 16
) -> Iterator[tuple[Peer, Peer, ProxyThread]]:
    """A client, the endpoint it came to, and the proxy between them."""
    with listener(family, SCTP) as endpoint:
        widen(endpoint, 1000, 1000)
        proxy = start(SCTP, family, [address(endpoint)])
        with client_of(proxy, streams, accepts) as client, Peer(endpoint.accept()[0]) as server:
            yield client, server, proxy


def ends(proxy: ProxyThread, outcome: Outcome) -> None:
    eventually(lambda: proxy.ended() == {outcome: 1}, lambda: str(proxy.ended()))


def test_a_kernel_without_it_is_told_of(start: Start) -> None:
    if not host.sctp():
        pytest.skip("this kernel has SCTP")
    proxy = start(Protocol.TCP, V4, [])
    key = SocketKey(ServicePortName("default", "calls"), V4)
    with pytest.raises(ProtocolUnavailable, match="modprobe sctp"):
        proxy.call(proxy.path.sockets[SCTP].open, key, "127.0.0.1", 29999, proxy.balancer, proxy.counts)


# -- messages


def random_messages(seed: int, count: int, streams: int) -> list[Message]:
    """Most are small, some up to 300 kB."""
    rng = random.Random(seed)
    noise = rng.randbytes(600_000)
    special = [bytes.fromhex(ppid) for ppid in ("00000080", "000000ff", "deadbeef", "ffffffff", "80000000")]
    messages = []
    for _ in range(count):
        size = max(1, round(300_000 ** (rng.random() ** 4)))
        begin = rng.randrange(len(noise) - size)
        ppid = rng.choice((*special, rng.randbytes(4)))
        messages.append(Message(noise[begin : begin + size], rng.randrange(streams), ppid, rng.random() < 0.3))
    return messages


def fingerprint(message: Message) -> tuple[bytes, int, bytes, bool]:
    return hashlib.blake2b(message.content, digest_size=16).digest(), *message[1:]


def assert_same(sent: Sequence[Message], received: Sequence[tuple[bytes, int, bytes, bool]], streams: int) -> None:
    marks = [fingerprint(message) for message in sent]
    assert len(received) == len(marks)
    for stream in range(streams):
        ordered = [mark for mark in marks if mark[1] == stream and not mark[3]]
        assert [mark for mark in received if mark[1] == stream and not mark[3]] == ordered, f"stream {stream}"
    assert Counter(mark for mark in received if mark[3]) == Counter(mark for mark in marks if mark[3])


@needs_sctp
def test_ten_thousand_messages_each_way(start: Start, variant: tuple[str, int]) -> None:
    streams, count = 16, 10_000
    with pair(start) as (client, server, proxy):
        up, down = random_messages(1, count, streams), random_messages(2, count, streams)
        received: dict[Peer, list[tuple[bytes, int, bytes, bool]]] = {client: [], server: []}

        def say(peer: Peer, messages: list[Message]) -> None:
            for message in messages:
                peer.send(message)

        def hear(peer: Peer) -> None:
            while len(received[peer]) < count and (message := peer.receive()):
                received[peer].append(fingerprint(message))

        threads = [threading.Thread(target=say, args=pair) for pair in ((client, up), (server, down))]
        threads += [threading.Thread(target=hear, args=(peer,)) for peer in (client, server)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert_same(up, received[server], streams)
        assert_same(down, received[client], streams)
        proxy.wait_for(proxy.path.count())
        assert (proxy.counts.received, proxy.counts.replied) == (count, count)
        assert proxy.counts.to_endpoint == sum(len(message.content) for message in up)


@needs_sctp
def test_a_message_of_one_mebibyte_stays_whole(start: Start, family: IPFamily) -> None:
    with pair(start, family) as (client, server, _):
        message = Message(random.Random(1).randbytes(sctp.MAX_MESSAGE), 3, b"\xde\xad\xbe\xef")
        for source, sink in ((client, server), (server, client)):
            source.send(message)
            source.send(Message(b"next"))
            assert sink.receive() == message
            assert sink.receive() == Message(b"next")


@needs_sctp
def test_a_longer_one_is_an_abort_to_both(start: Start) -> None:
    with pair(start) as (client, server, proxy):
        client.send(Message(bytes(sctp.MAX_MESSAGE + 1)))
        for peer in (client, server):
            with pytest.raises(ConnectionResetError):
                peer.receive()
        ends(proxy, Outcome.UNDELIVERABLE)
        assert dict(proxy.counts.drops) == {"message too long": 1}


@needs_sctp
def test_streams_are_agreed_on_as_if_both_spoke_directly(start: Start) -> None:
    with pair(start, streams=300, accepts=7) as (client, server, _):
        assert client.streams() == (300, 7)
        assert server.streams() == (7, 300)
        server.send(Message(b"last stream", 6))
        client.send(Message(b"last stream", 299))
        for peer, stream in ((client, 6), (server, 299)):
            assert peer.receive() == Message(b"last stream", stream)


@needs_sctp
def test_a_stream_the_endpoint_does_not_have_is_an_abort(start: Start) -> None:
    with listener(V4, SCTP) as endpoint:
        pysctp.sctpsocket_tcp(endpoint.family, endpoint).initparams.max_instreams = 4
        proxy = start(SCTP, V4, [address(endpoint)])
        with client_of(proxy) as client, Peer(endpoint.accept()[0]) as server:
            client.send(Message(b"fits", 3))
            assert server.receive() == Message(b"fits", 3)
            client.send(Message(b"does not", 4))
            for peer in (client, server):
                with pytest.raises(ConnectionResetError):
                    peer.receive()
        ends(proxy, Outcome.UNDELIVERABLE)
        assert dict(proxy.counts.drops) == {"no such stream": 1}


# -- endings


@needs_sctp
@pytest.mark.parametrize("first", ["client", "endpoint"])
def test_a_shutdown_comes_behind_all_messages(start: Start, family: IPFamily, first: str) -> None:
    with pair(start, family) as (client, server, proxy):
        one, other = (client, server) if first == "client" else (server, client)
        for number in range(200):
            one.send(Message(b"%d" % number * 1000, number % 16))
        one.sock.shutdown(socket.SHUT_WR)
        for number in range(200):
            assert other.receive() == Message(b"%d" % number * 1000, number % 16)
        assert other.receive() is None
        ends(proxy, Outcome.CLIENT_CLOSED if first == "client" else Outcome.ENDPOINT_CLOSED)


@needs_sctp
@pytest.mark.parametrize("first", ["client", "endpoint"])
def test_an_abort_is_passed_on_as_one(start: Start, first: str) -> None:
    with pair(start) as (client, server, proxy):
        one, other = (client, server) if first == "client" else (server, client)
        one.send(Message(b"last words"))
        assert other.receive() == Message(b"last words")
        one.abort()
        with pytest.raises(ConnectionResetError):
            other.receive()
        ends(proxy, Outcome.CLIENT_RESET if first == "client" else Outcome.ENDPOINT_RESET)


@needs_sctp
def test_what_comes_for_a_client_that_has_shut_down_is_not_lost_in_silence(start: Start) -> None:
    with pair(start) as (client, server, proxy):

        def cross() -> None:
            # On the loop's own thread, so that the proxy meets both at once.
            client.sock.shutdown(socket.SHUT_WR)
            server.send(Message(b"too late"))
            time.sleep(0.05)

        proxy.call(cross)
        with pytest.raises(ConnectionResetError):
            server.receive()
        ends(proxy, Outcome.CLIENT_CLOSED)
        assert dict(proxy.counts.drops) == {"receiver has shut down": 1}


@needs_sctp
def test_clients_in_the_queue_when_the_last_endpoint_goes_are_told(start: Start) -> None:
    with listener(V4, SCTP) as endpoint:
        proxy = start(SCTP, V4, [address(endpoint)])

        def connect_and_refuse() -> list[Peer]:
            clients = [client_of(proxy) for _ in range(80)]
            proxy.balancer.update([])
            proxy.socket.refuse()
            return clients

        clients = proxy.call(connect_and_refuse)
        for client in clients:
            with client, pytest.raises(ConnectionResetError):
                client.receive()


# -- limits


@needs_sctp
@on_one_loop
@pytest.mark.parametrize("writer", ["client", "endpoint"])
def test_a_stalled_reader_stops_its_writer(start: Start, writer: str) -> None:
    with pair(start) as (client, server, proxy):
        source, sink = (client, server) if writer == "client" else (server, client)
        source.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 100_000)
        source.sock.settimeout(1)
        sent = 0
        with contextlib.suppress(TimeoutError):
            while sent < 2000:
                source.send(Message(b"%8d" % sent * 1000))
                sent += 1
        assert sent < 1000, "8 MB fit nowhere"
        for number in range(sent):
            message = sink.receive()
            assert message is not None
            assert message.content == b"%8d" % number * 1000
        sink.send(Message(b"done"))
        assert source.receive() == Message(b"done")
        assert proxy.counts.active == 1


@needs_sctp
def test_clients_beyond_the_limit_wait_and_are_served_when_others_leave(start: Start) -> None:
    with listener(V4, SCTP) as endpoint, contextlib.ExitStack() as stack:
        proxy = start(SCTP, V4, [address(endpoint)], descriptors=20)
        clients = [stack.enter_context(client_of(proxy)) for _ in range(15)]
        for _ in range(10):
            stack.enter_context(endpoint.accept()[0])
        endpoint.settimeout(0.3)
        with pytest.raises(TimeoutError):
            endpoint.accept()
        assert proxy.metrics.accept_pauses
        for client in clients[:10]:
            client.sock.close()
        endpoint.settimeout(10)
        for _ in range(5):
            stack.enter_context(endpoint.accept()[0])


def resident() -> int:
    """Bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@needs_sctp
@pytest.mark.timeout(60)
@on_one_loop
def test_a_thousand_associations_leave_nothing(start: Start) -> None:
    with listener(V4, SCTP) as endpoint:
        proxy = start(SCTP, V4, [address(endpoint)])

        def come_and_go(count: int) -> None:
            for number in range(count):
                with client_of(proxy) as client, Peer(endpoint.accept()[0]) as server:
                    client.send(Message(b"hello"))
                    assert server.receive() == Message(b"hello")
                    if number % 4 == 0:
                        client.abort()
            eventually(lambda: proxy.counts.active == 0)

        come_and_go(200)
        before = resident()
        come_and_go(800)
        assert resident() - before < 2 << 20
        assert proxy.counts.opened == 1000


# -- endpoints and paths


@needs_sctp
@pytest.mark.privileged
@pytest.mark.parametrize("family", [V4, IPFamily.IPV6])
def test_dials_go_on_past_a_refusing_and_a_silent_endpoint(start: Start, family: IPFamily) -> None:
    with Namespace() as node, node.entered():
        node.run("ip link add hole type dummy")
        for text in ("192.0.2.1/24", "2001:db8::1/64"):
            node.add_address("hole", text)
        node.run("ip link set hole up")
        silent = "192.0.2.2" if family is V4 else "2001:db8::2"
        with listener(family, SCTP) as endpoint, contextlib.ExitStack() as stack:
            proxy = start(SCTP, family, [(family.loopback, 9), (silent, 9), address(endpoint)])
            clients = [stack.enter_context(client_of(proxy)) for _ in range(3)]
            for client in clients:
                client.send(Message(b"found"))
            for server in [stack.enter_context(Peer(endpoint.accept()[0])) for _ in clients]:
                assert server.receive() == Message(b"found")
        assert set(proxy.counts.dial_failures) == {111, 110}
        # All three gone, the client is told by an ABORT.
        with client_of(proxy) as client, pytest.raises(ConnectionResetError):
            client.receive()
        proxy.stop()


@needs_sctp
@pytest.mark.privileged
@on_one_loop
@pytest.mark.parametrize("lost", ["client", "endpoint"])
def test_a_lost_peer_is_told_to_the_other(start: Start, monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    for name, value in {"RTO_INITIAL": 1000, "RTO_MAX": 1000, "RETRIES": 1, "PATH_RETRIES": 1}.items():
        monkeypatch.setattr(sctp, name, value)
    with Namespace() as node, Namespace() as far, node.entered():
        here, _ = node.connect(far, "10.1.0.1/24", "10.1.0.2/24")
        of_client, of_endpoint = (far, node) if lost == "client" else (node, far)
        with of_endpoint.entered():
            endpoint = plain(SCTP, V4)
            endpoint.bind(("10.1.0.1" if of_endpoint is node else "10.1.0.2", 5000))
            endpoint.listen(5)
        proxy = start(SCTP, V4, [address(endpoint)], bind=V4.wildcard)
        with of_client.entered():
            client = plain(SCTP, V4)
        with endpoint, Peer(client) as client_peer:
            client.connect(("10.1.0.1", proxy.socket.port))
            with Peer(endpoint.accept()[0]) as server:
                node.run(f"ip link set {here} down")
                left = server if lost == "client" else client_peer
                left.send(Message(b"is anybody there"))
                with pytest.raises(ConnectionResetError):
                    left.receive()
        ends(proxy, Outcome.CLIENT_LOST if lost == "client" else Outcome.ENDPOINT_LOST)
        proxy.stop()


@needs_sctp
@pytest.mark.privileged
@on_one_loop
def test_a_client_of_two_paths_may_lose_one_in_the_middle(start: Start) -> None:
    with Namespace() as node, Namespace() as pod, node.entered():
        node.connect(pod, "10.1.0.1/24", "10.1.0.2/24")
        there = node.connect(pod, "10.2.0.1/24", "10.2.0.2/24")[1]
        with listener(V4, SCTP) as endpoint:
            proxy = start(SCTP, V4, [address(endpoint)], bind=V4.wildcard)
            with pod.entered():
                sock = plain(SCTP, V4)
                both = pysctp.sctpsocket_tcp(sock.family, sock)
                both.bindx([("10.1.0.2", 0)])
                port = sock.getsockname()[1]
                both.bindx([("10.2.0.2", port)])
            sock.settimeout(20)
            sock.connect(("10.2.0.1", proxy.socket.port))
            with Peer(sock) as client, Peer(endpoint.accept()[0]) as server:
                assert {ip for ip, _ in pysctp.sctpsocket_tcp(sock.family, sock).getpaddrs()} >= {
                    "10.1.0.1",
                    "10.2.0.1",
                }
                for number in range(300):
                    if number == 100:
                        pod.run(f"ip link set {there} down")
                    client.send(Message(b"%d" % number * 100))
                    message = server.receive()
                    assert message is not None
                    assert message.content == b"%d" % number * 100
                    server.send(Message(b"yes"))
                    assert client.receive() == Message(b"yes")
        proxy.stop()


@needs_sctp
@pytest.mark.parametrize("variant", ["2 workers"], indirect=True)
def test_with_workers_the_control_process_relays(start: Start) -> None:
    with pair(start) as (client, server, proxy):
        client.send(Message(b"hello", 5))
        assert server.receive() == Message(b"hello", 5)
        [session] = proxy.sessions()
        assert session["protocol"] == "SCTP"
        assert proxy.counts.to_endpoint == 5
