"""The ladder: which endpoints are tried, for how long, and that nobody else waits for it."""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
import time

import pytest

from tests.proxy import Servers, address, black_hole, closed_port, echo, eventually, listener
from tests.sockets.conftest import Start, also_with_workers
from userspace_proxy.metrics import Outcome
from userspace_proxy.model import IPFamily, Protocol
from userspace_proxy.sockets import dial, tcp

V4 = IPFamily.IPV4


@also_with_workers
def test_a_refusing_endpoint_is_passed_over(start: Start, family: IPFamily) -> None:
    with Servers(echo, family) as alive:
        proxy = start(Protocol.TCP, family, [closed_port(family), alive.address])
        for _ in range(6):
            with proxy.connect() as client:
                client.sendall(b"x")
                assert client.recv(1) == b"x"
        # Retries take their turn too, so with two endpoints nearly every client meets the dead one first.
        failures = proxy.counts.dial_failures[errno.ECONNREFUSED]
        assert 5 <= failures <= 6
        assert proxy.counts.dials == 6 + failures


@also_with_workers
def test_a_black_hole_costs_one_step_of_the_ladder_and_only_its_own_client(start: Start) -> None:
    """Clients side by side: those sent to the live endpoint do not wait for those sent to the dead one."""
    with Servers(echo) as alive, black_hole() as dead:
        proxy = start(Protocol.TCP, V4, [dead, alive.address])
        order: list[tuple[int, int]] = []
        clients = []
        for number in range(6):
            client = proxy.connect()
            client.sendall(bytes([number]))
            clients.append(client)

        def read(client: socket.socket) -> None:
            order.append((client.recv(1)[0], proxy.counts.dial_failures[errno.ETIMEDOUT]))

        threads = [threading.Thread(target=read, args=(c,)) for c in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        for client in clients:
            client.close()
        # Three were answered before any dial timed out; all six in the end, and each failed at most once.
        assert sum(1 for _, timeouts in order if timeouts == 0) == 3
        assert len(order) == 6
        assert proxy.counts.dial_failures[errno.ETIMEDOUT] == 3


def test_a_dead_endpoint_is_met_once_and_then_passed_over(start: Start, family: IPFamily) -> None:
    with Servers(echo, family) as alive:
        proxy = start(Protocol.TCP, family, [closed_port(family), alive.address], max_ejection=10.0)
        for _ in range(10):
            with proxy.connect() as client:
                client.sendall(b"x")
                assert client.recv(1) == b"x"
        assert proxy.counts.dial_failures[errno.ECONNREFUSED] == 1
        assert proxy.counts.ejections == 1


@also_with_workers
def test_an_endpoint_that_comes_back_is_found_by_a_probe(start: Start) -> None:
    place = closed_port()
    with Servers(echo) as alive:
        proxy = start(Protocol.TCP, V4, [place, alive.address], max_ejection=0.2)

        def answered() -> bool:
            with proxy.connect() as client:
                client.sendall(b"x")
                return client.recv(1) == b"x"

        while not proxy.balancer.ejected:
            assert answered()
        with Servers(echo, port=place[1]):
            eventually(lambda: answered() and not proxy.balancer.ejected)
            assert all(answered() for _ in range(4))


def test_a_want_of_our_own_ejects_nobody(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    with Servers(echo) as one, Servers(echo) as other:
        proxy = start(Protocol.TCP, V4, [one.address, other.address], max_ejection=10.0)

        def exhausted(_dial: dial.Dial) -> socket.socket:
            raise OSError(errno.EMFILE, "Too many open files")

        with monkeypatch.context() as patch:
            patch.setattr(dial.Dial, "_connect", exhausted)
            with pytest.raises(ConnectionResetError), proxy.connect() as client:
                client.recv(1)
        assert proxy.counts.dial_failures == {errno.EMFILE: len(dial.LADDER)}
        assert not proxy.balancer.ejected


@also_with_workers
def test_all_dead_is_a_reset(start: Start, family: IPFamily) -> None:
    proxy = start(Protocol.TCP, family, [closed_port(family), closed_port(family)])
    with pytest.raises(ConnectionResetError), proxy.connect() as client:
        client.recv(1)
    assert proxy.ended() == {Outcome.DIAL_FAILED: 1}
    assert proxy.counts.dials == len(dial.LADDER)


@also_with_workers
def test_all_silent_is_a_reset_after_the_ladder(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dial, "LADDER", (0.05, 0.05, 0.05, 0.05))
    with black_hole() as dead:
        proxy = start(Protocol.TCP, V4, [dead])
        with pytest.raises(ConnectionResetError), proxy.connect() as client:
            client.recv(1)
    assert proxy.counts.dial_failures == {errno.ETIMEDOUT: 4}


@also_with_workers
def test_what_the_client_sent_early_is_not_lost_by_retries(start: Start) -> None:
    with Servers(echo) as alive:
        proxy = start(Protocol.TCP, V4, [closed_port(), alive.address])
        for _ in range(2):
            with proxy.connect() as client:
                client.sendall(b"early" * 1000)
                client.shutdown(socket.SHUT_WR)
                received = b""
                while chunk := client.recv(65536):
                    received += chunk
                assert received == b"early" * 1000


@also_with_workers
def test_endpoints_that_vanish_while_dialling(start: Start) -> None:
    with black_hole() as dead:
        proxy = start(Protocol.TCP, V4, [dead])
        with proxy.connect() as client:
            eventually(lambda: proxy.counts.dials == 1)
            proxy.update([])
            with pytest.raises(ConnectionResetError):
                client.recv(1)
    assert proxy.ended() == {Outcome.DIAL_FAILED: 1}


def test_a_local_endpoint_that_is_down_is_not_reached_by_meeting_oneself(start: Start) -> None:
    """A free port the kernel also hands out as a source port: after enough dials one connects to itself."""
    with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
        first, last = map(int, file.read().split())
    target = ("127.0.0.1", (first + last) // 2 | 1)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(target)
        # A socket connected to itself is what the dial must recognise; made here on purpose.
        probe.connect(target)
        assert dial.Dial._met_itself(_dial_to(target), probe)
    with Servers(echo) as alive, socket.create_connection(alive.address) as other:
        assert not dial.Dial._met_itself(_dial_to(alive.address), other)


def _dial_to(endpoint: tuple[str, int]) -> dial.Dial:
    attempt = dial.Dial.__new__(dial.Dial)
    attempt.endpoint = endpoint
    return attempt


def test_ended_from_outside_while_dialling(start: Start) -> None:
    with black_hole() as dead:
        proxy = start(Protocol.TCP, V4, [dead])
        client = proxy.connect()
        eventually(lambda: proxy.counts.dials == 1)
        proxy.call(proxy.sockets.end_all, Outcome.DRAIN_TIMEOUT)
        with client, pytest.raises(ConnectionResetError):
            client.recv(1)
        time.sleep(0.3)  # past the first step: nothing goes on dialling
        assert proxy.counts.dials == 1
    assert proxy.ended() == {Outcome.DRAIN_TIMEOUT: 1}


def test_options_of_a_connection_that_lasts(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "LASTING", 0.05)
    endpoint = listener()
    proxy = start(Protocol.TCP, V4, [address(endpoint)])
    with proxy.connect(), endpoint.accept()[0], contextlib.closing(endpoint):
        eventually(lambda: bool(proxy.sockets._relays))  # type: ignore[attr-defined]
        [relay] = proxy.call(lambda: list(proxy.sockets._relays))  # type: ignore[attr-defined]
        eventually(lambda: relay.kept_alive)
        for sock in (relay.to_endpoint.source, relay.to_client.source):
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 15
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == b"\1\0\0\0\0\0\0\0"
