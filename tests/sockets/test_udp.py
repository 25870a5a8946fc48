"""Flows: who gets which datagram, for how long, from which address."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from tests.proxy import ProxyThread, address, eventually, listener
from tests.sockets.conftest import Start, also_with_workers
from userspace_proxy.loadbalancer import LoadBalancer
from userspace_proxy.metrics import Outcome, ServicePortMetrics
from userspace_proxy.model import IPFamily, Protocol, ServicePortName, SocketKey
from userspace_proxy.sockets import udp
from userspace_proxy.sockets.base import AF, Descriptors
from userspace_proxy.sockets.datagrams import COUNT
from userspace_proxy.sockets.udp import Flow, UDPSockets

V4 = IPFamily.IPV4
OTHER = SocketKey(ServicePortName("default", "other", ""), V4)


class Echo:
    """An endpoint that sends each datagram back, and remembers from how many sockets it heard."""

    def __init__(self, family: IPFamily = V4, where: tuple[str, int] | None = None) -> None:
        if where is None:
            self.sock = listener(family, Protocol.UDP)
        else:
            self.sock = socket.socket(AF[family], socket.SOCK_DGRAM)
            self.sock.bind(where)
        self.sock.settimeout(0.05)
        self.address = address(self.sock)
        self.peers: list[tuple[str, int]] = []
        self._stop = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop:
            try:
                datagram, peer = self.sock.recvfrom(65535)
                self.peers.append(peer[:2])
                self.sock.sendto(datagram, peer)
            except (TimeoutError, OSError):
                continue

    def stop(self) -> None:
        self._stop = True
        self._thread.join(5)
        self.sock.close()


@pytest.fixture
def echo(family: IPFamily) -> Iterator[Echo]:
    endpoint = Echo(family)
    yield endpoint
    endpoint.stop()


@pytest.fixture
def echo4() -> Iterator[Echo]:
    endpoint = Echo()
    yield endpoint
    endpoint.stop()


def client_of(proxy: ProxyThread, timeout: float = 5.0) -> socket.socket:
    client = socket.socket(AF[proxy.family], socket.SOCK_DGRAM)
    client.settimeout(timeout)
    client.connect(proxy.address)
    return client


def ask(client: socket.socket, datagram: bytes = b"hi") -> bytes:
    client.send(datagram)
    return client.recv(65535)


@also_with_workers
@pytest.mark.parametrize("size", [0, 1, 1400, 9000, 65_507])
def test_datagrams_of_every_size_pass_whole(start: Start, family: IPFamily, echo: Echo, size: int) -> None:
    proxy = start(Protocol.UDP, family, [echo.address])
    with client_of(proxy) as client:
        assert ask(client, b"x" * size) == b"x" * size
    eventually(lambda: (proxy.counts.to_endpoint, proxy.counts.to_client) == (size, size))


def test_a_client_keeps_its_flow_and_another_gets_its_own(start: Start, echo4: Echo) -> None:
    proxy = start(Protocol.UDP, V4, [echo4.address], idle_timeout=5)
    with client_of(proxy) as one, client_of(proxy) as other:
        for _ in range(3):
            ask(one)
            ask(other)
    assert len(set(echo4.peers)) == 2
    assert proxy.counts.opened == 2


@also_with_workers
def test_an_idle_flow_ends_and_the_next_datagram_makes_a_new_one(start: Start, echo4: Echo) -> None:
    proxy = start(Protocol.UDP, V4, [echo4.address], idle_timeout=0.1)
    with client_of(proxy) as client:
        ask(client)
        eventually(lambda: proxy.counts.active == 0)
        ask(client)
    assert len(set(echo4.peers)) == 2
    assert proxy.ended()[Outcome.IDLE] >= 1


@also_with_workers
def test_a_refused_datagram_is_old_news_for_the_next(start: Start) -> None:
    """The only endpoint was down for a moment: what comes after its return is delivered, on the same flow."""
    endpoint = Echo()
    where = endpoint.address
    proxy = start(Protocol.UDP, V4, [where], idle_timeout=30)
    with client_of(proxy) as client:
        ask(client)
        endpoint.stop()
        client.send(b"lost")
        eventually(lambda: proxy.counts.dial_failures[errno.ECONNREFUSED] == 1)
        endpoint = Echo(where=where)
        assert ask(client, b"back") == b"back"
    endpoint.stop()
    assert proxy.counts.opened == 1


@also_with_workers
def test_a_flow_leaves_an_endpoint_that_refuses_while_there_is_another(start: Start, echo4: Echo) -> None:
    dead = listener(protocol=Protocol.UDP)
    proxy = start(Protocol.UDP, V4, [address(dead)], idle_timeout=30)
    with client_of(proxy) as client:
        client.send(b"one")
        assert dead.recv(10) == b"one"
        proxy.update([address(dead), echo4.address])
        dead.close()
        client.send(b"lost")
        eventually(lambda: proxy.counts.dial_failures[errno.ECONNREFUSED] == 1)
        assert ask(client) == b"hi"
    assert proxy.counts.opened == 1


@also_with_workers
def test_new_flows_pass_over_an_endpoint_that_refused_until_a_probe_is_answered(start: Start, echo4: Echo) -> None:
    dead = listener(protocol=Protocol.UDP)
    where = address(dead)
    dead.close()
    proxy = start(Protocol.UDP, V4, [where, echo4.address], idle_timeout=30, max_ejection=0.5)

    def asked() -> bool:
        with client_of(proxy) as client:
            client.settimeout(0.3)
            try:
                return ask(client) == b"hi"
            except TimeoutError:
                return False

    while not proxy.balancer.ejected:
        asked()
    assert all(asked() for _ in range(4))
    back = Echo(where=where)
    eventually(lambda: asked() and not proxy.balancer.ejected)
    back.stop()


def test_an_endpoint_that_never_answers_comes_back_when_nothing_bad_is_heard_of_it(
    start: Start, echo4: Echo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(udp, "SILENCE", 0.3)
    with listener(protocol=Protocol.UDP) as dead:
        where = address(dead)
    proxy = start(Protocol.UDP, V4, [where, echo4.address], idle_timeout=0.1, max_ejection=0.2)

    def one_more() -> bool:
        with client_of(proxy) as client:
            client.send(b"one way")
        time.sleep(0.02)
        return True

    eventually(lambda: one_more() and proxy.call(lambda: bool(proxy.balancer.ejected)))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sink:
        sink.bind(where)
        eventually(lambda: one_more() and not proxy.call(lambda: bool(proxy.balancer.ejected)))
        sink.settimeout(5)
        assert sink.recv(100) == b"one way"


def test_a_flow_that_came_back_to_an_endpoint_tells_that_it_answers(start: Start) -> None:
    """Though it has had answers before, from the same one and from another."""
    one, other = Echo(), Echo()
    proxy = start(Protocol.UDP, V4, [one.address], idle_timeout=30, max_ejection=600.0)
    with client_of(proxy) as client:
        assert ask(client) == b"hi"
        proxy.update([one.address, other.address])
        proxy.call(proxy.balancer.failed, one.address)
        assert proxy.call(lambda: bool(proxy.balancer.ejected))
        assert ask(client, b"still here") == b"still here"
        assert not proxy.call(lambda: bool(proxy.balancer.ejected))
    one.stop()
    other.stop()


def test_a_flow_moves_when_its_endpoint_is_removed(start: Start, echo4: Echo) -> None:
    gone = listener(protocol=Protocol.UDP)
    proxy = start(Protocol.UDP, V4, [address(gone)], idle_timeout=30)
    with client_of(proxy) as client, gone:
        client.send(b"one")
        assert gone.recv(10) == b"one"
        proxy.update([echo4.address])
        assert ask(client) == b"hi"
    assert proxy.counts.opened == 1


def test_a_flow_stays_when_another_endpoint_is_removed(start: Start, echo4: Echo) -> None:
    other = listener(protocol=Protocol.UDP)
    proxy = start(Protocol.UDP, V4, [echo4.address], idle_timeout=30)
    with client_of(proxy) as client, other:
        ask(client)
        proxy.update([echo4.address, address(other)])
        ask(client)
        proxy.update([echo4.address])
        ask(client)
    assert len(set(echo4.peers)) == 1


@also_with_workers
def test_a_burst_of_clients_is_capped_and_then_service_is_normal(start: Start, echo4: Echo) -> None:
    proxy = start(Protocol.UDP, V4, [echo4.address], max_flows=50, idle_timeout=30)
    sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sender.close()
    for _ in range(1000):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.sendto(b"x", proxy.address)
            assert proxy.sockets.active <= 50
    with client_of(proxy, timeout=0.5) as client:

        def is_answered() -> bool:
            try:
                return ask(client) == b"hi"
            except TimeoutError:
                return False

        # The endpoint's own queue may still be full of what came before.
        eventually(is_answered)
    assert proxy.ended()[Outcome.EVICTED] >= 900


def test_without_descriptors_flows_make_room_for_each_other(start: Start, echo4: Echo) -> None:
    proxy = start(Protocol.UDP, V4, [echo4.address], descriptors=3, idle_timeout=30)
    clients = [client_of(proxy) for _ in range(6)]
    for client in clients:
        assert ask(client) == b"hi"
        client.close()
    assert proxy.counts.active == 3


def test_with_no_descriptor_at_all_a_datagram_is_dropped_and_counted(start: Start, echo4: Echo) -> None:
    proxy = start(Protocol.UDP, V4, [echo4.address], descriptors=0)
    with client_of(proxy) as client:
        client.send(b"x")
        eventually(lambda: proxy.counts.drops["no room for a flow"] == 1)


def test_the_one_idle_longest_makes_room(start: Start, echo4: Echo) -> None:
    proxy = start(Protocol.UDP, V4, [echo4.address], max_flows=2, idle_timeout=30)
    with client_of(proxy) as busy, client_of(proxy) as idle, client_of(proxy) as new:
        ask(busy)
        ask(idle)
        ask(busy)
        ask(new)
        ask(busy)
        assert echo4.peers[0] == echo4.peers[2] == echo4.peers[4]
    assert proxy.ended() == {Outcome.EVICTED: 1}


@also_with_workers
def test_replies_leave_from_the_address_the_client_spoke_to(start: Start) -> None:
    """A wildcard socket that answers by routing alone would use 127.0.0.1 for a client of 127.0.0.9."""
    endpoint = Echo()
    proxy = start(Protocol.UDP, V4, [endpoint.address])
    wild = proxy.call(
        proxy.sockets.open,
        SocketKey(ServicePortName("default", "wild"), V4),
        "0.0.0.0",
        proxy.socket.port + 1,
        proxy.balancer,
        ServicePortMetrics(),
    )
    proxy.call(wild.serve)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(5)
        for ip in ("127.0.0.9", "127.0.0.10"):
            client.sendto(b"hi", (ip, wild.port))
            assert client.recvfrom(10) == (b"hi", (ip, wild.port))
    endpoint.stop()
    proxy.call(wild.close)


@also_with_workers
def test_a_client_that_is_gone_disturbs_nobody(start: Start, echo4: Echo) -> None:
    """Replies to a closed port come back as ICMP to the socket all clients share."""
    proxy = start(Protocol.UDP, V4, [echo4.address], idle_timeout=5)
    for _ in range(5):
        with client_of(proxy) as gone:
            gone.send(b"x")
    with client_of(proxy) as client:
        for _ in range(5):
            assert ask(client) == b"hi"


def test_an_endpoint_that_cannot_be_dialled_ends_the_flow(start: Start) -> None:
    proxy = start(Protocol.UDP, V4, [("255.255.255.255", 9)])
    with client_of(proxy) as client:
        client.send(b"x")
        eventually(lambda: proxy.ended() == {Outcome.DIAL_FAILED: 1})
    assert proxy.counts.dial_failures


@also_with_workers
def test_flows_end_with_their_endpoints_and_their_socket(start: Start, echo4: Echo) -> None:
    proxy = start(Protocol.UDP, V4, [echo4.address], idle_timeout=30)
    with client_of(proxy) as client:
        ask(client)
        proxy.update([])
        assert proxy.ended() == {Outcome.CLOSED: 1}
        with pytest.raises(ConnectionRefusedError):
            ask(client)
            ask(client)


class _Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class _Timers:
    """The poller's timers, run by hand: time passes when the test says so."""

    def __init__(self, clock: _Clock) -> None:
        self.clock = clock
        self.due: list[tuple[float, object]] = []

    def call_at(self, when: float, callback: object) -> None:
        self.due.append((when, callback))

    def at_end_of_batch(self, callback: object) -> None:
        """There is none."""

    def discard(self, sock: socket.socket) -> None:
        sock.close()

    def advance(self, seconds: float) -> None:
        end = self.clock.now + seconds
        while ready := [d for d in self.due if d[0] <= end]:
            first = min(ready, key=lambda d: d[0])
            self.due.remove(first)
            self.clock.now = max(self.clock.now, first[0])
            first[1]()  # type: ignore[operator]
        self.clock.now = end


def test_the_idle_clock_runs_from_the_last_datagram_either_way() -> None:
    clock = _Clock()
    timers = _Timers(clock)
    shared = UDPSockets(timers, Descriptors(10), idle_timeout=10.0, max_flows=10)  # type: ignore[arg-type]
    owner = type("Owner", (), {"flows": {}, "metrics": ServicePortMetrics(), "balancer": LoadBalancer})()
    assert shared.room()
    flow = Flow(owner, struct.pack("=H", socket.AF_INET).ljust(72, b"\0"), clock.now)
    flow.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    shared.add(flow)
    for _ in range(5):
        timers.advance(9.0)
        assert shared.active == 1
        flow.last = clock.now
    timers.advance(9.9)
    assert shared.active == 1
    timers.advance(0.2)
    assert shared.active == 0
    assert not [d for d in timers.due if d[0] < clock.now]


def test_flows_that_never_were_leave_nothing_to_wait_for(start: Start) -> None:
    """Each is ended as its endpoint cannot be connected to, long before its time."""
    proxy = start(Protocol.UDP, V4, [("255.255.255.255", 9)], idle_timeout=3600)
    for _ in range(500):
        with client_of(proxy) as client:
            client.send(b"x")
    eventually(lambda: proxy.ended()[Outcome.DIAL_FAILED] == 500)
    assert len(proxy.sockets._idle) < 100  # type: ignore[attr-defined]


@contextlib.contextmanager
def held(proxy: ProxyThread) -> Iterator[None]:
    """What happens meanwhile meets the proxy all at once."""
    release = threading.Event()
    proxy.loop.call_soon_threadsafe(release.wait, 10)
    yield
    release.set()


def test_replies_of_one_wake_up_find_their_ways(start: Start) -> None:
    """More than go together, of two service ports among each other."""
    with listener(V4, Protocol.UDP) as endpoint, contextlib.ExitStack() as stack:
        endpoint.settimeout(5)
        proxy = start(Protocol.UDP, V4, [address(endpoint)], idle_timeout=60)
        with listener(V4, Protocol.UDP) as free:
            _, number = address(free)
        other = proxy.call(proxy.sockets.open, OTHER, "127.0.0.1", number, proxy.balancer, ServicePortMetrics())
        stack.callback(proxy.call, other.close)
        proxy.call(other.serve)
        clients = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(4 * COUNT)]
        for number, client in enumerate(clients):
            stack.enter_context(client).settimeout(5)
            client.connect(("127.0.0.1", (proxy.socket.port, other.port)[number % 2]))
            client.send(b"%d" % number)
        heard = [endpoint.recvfrom(100) for _ in clients]
        with held(proxy):
            for datagram, flow in heard:
                endpoint.sendto(datagram, flow)
        assert [client.recv(100) for client in clients] == [b"%d" % number for number in range(len(clients))]
        assert proxy.counts.replied == proxy.call(lambda: other.metrics.replied) == 2 * COUNT  # type: ignore[attr-defined]
