"""Taking clients: in batches, within the limit of descriptors, and only those who were sent here."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import time

import pytest

from tests.proxy import Servers, address, echo, eventually, listener
from tests.sockets.conftest import Start, also_with_workers
from userspace_proxy.metrics import Outcome
from userspace_proxy.model import IPFamily, Portal, PortalKind, Protocol
from userspace_proxy.sockets import dial, tcp

V4 = IPFamily.IPV4


def answered(client: socket.socket) -> bool:
    client.sendall(b"x")
    return client.recv(1) == b"x"


@also_with_workers
def test_more_clients_at_once_than_one_turn_takes(start: Start, family: IPFamily) -> None:
    with Servers(echo, family) as endpoint:
        proxy = start(Protocol.TCP, family, [endpoint.address])
        clients = [proxy.connect() for _ in range(3 * tcp.ACCEPTS)]
        assert all(answered(client) for client in clients)
        for client in clients:
            client.close()
        eventually(lambda: proxy.counts.active == 0)
        assert proxy.counts.opened == len(clients)


def test_clients_beyond_the_limit_wait_and_are_served_when_others_leave(start: Start) -> None:
    with Servers(echo) as endpoint:
        proxy = start(Protocol.TCP, V4, [endpoint.address], descriptors=20)
        clients = [proxy.connect() for _ in range(30)]
        assert all(answered(client) for client in clients[:10])
        clients[10].settimeout(0.3)
        clients[10].sendall(b"x")
        with pytest.raises(TimeoutError):
            clients[10].recv(1)
        assert proxy.metrics.accept_pauses
        for client in clients[:10]:
            client.close()
        clients[10].settimeout(5)
        assert clients[10].recv(1) == b"x"
        for client in clients[10:20]:
            client.close()
        assert all(answered(client) for client in clients[20:])
        for client in clients:
            client.close()


def test_the_kernel_out_of_descriptors_is_weather(start: Start) -> None:
    """EMFILE itself: the limit is lowered under a proxy that thinks it has plenty."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Servers(echo) as endpoint:
        proxy = start(Protocol.TCP, V4, [endpoint.address])
        clients = [socket.socket() for _ in range(5)]
        spare: list[int] = []
        highest = max(map(int, os.listdir("/proc/self/fd")))
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest, hard))
        try:
            # Nothing else comes or goes meanwhile: the endpoint, which shares the limit, would not survive it.
            with contextlib.suppress(OSError):
                while True:
                    spare.append(os.open("/dev/null", os.O_RDONLY))
            for client in clients:
                client.settimeout(5)
                client.connect(proxy.address)
            eventually(lambda: proxy.metrics.accept_pauses > 0)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in spare:
                os.close(fd)
        for client in clients:
            assert answered(client)
            client.close()


@also_with_workers
def test_a_stranger_at_the_proxy_port_is_refused(start: Start, family: IPFamily) -> None:
    with Servers(echo, family) as endpoint:
        proxy = start(Protocol.TCP, family, [endpoint.address])
        portal = Portal(family, Protocol.TCP, "10.96.0.1" if family is V4 else "fd00::1", 80, PortalKind.CLUSTER_IP)
        proxy.call(proxy.socket.admit, [portal])
        with pytest.raises(OSError), proxy.connect() as client:
            answered(client)
        eventually(lambda: proxy.ended() == {Outcome.NOT_CAPTURED: 1})
        assert proxy.counts.opened == 0
        proxy.call(proxy.socket.admit, None)
        with proxy.connect() as client:
            assert answered(client)


@also_with_workers
def test_connections_outlive_their_socket(start: Start) -> None:
    with Servers(echo) as endpoint:
        proxy = start(Protocol.TCP, V4, [endpoint.address])
        with proxy.connect() as client:
            assert answered(client)
            proxy.call(proxy.socket.close)
            with pytest.raises(ConnectionRefusedError):
                proxy.connect()
            assert answered(client)


@also_with_workers
def test_connections_outlive_their_endpoints_removal(start: Start) -> None:
    with Servers(echo) as endpoint:
        proxy = start(Protocol.TCP, V4, [endpoint.address])
        with proxy.connect() as client:
            assert answered(client)
            proxy.update([])
            assert answered(client)


def test_clients_in_the_queue_when_the_last_endpoint_goes_are_told(start: Start) -> None:
    endpoint = listener()
    proxy = start(Protocol.TCP, V4, [address(endpoint)])

    def connect_and_refuse() -> socket.socket:
        # On the loop's own thread: the client is in the queue and no event has been seen.
        client = proxy.connect()
        proxy.balancer.update([])
        proxy.socket.refuse()
        return client

    client = proxy.call(connect_and_refuse)
    with client, endpoint, pytest.raises(ConnectionResetError):
        client.recv(1)
    assert proxy.ended() == {Outcome.NO_ENDPOINTS: 1}


@also_with_workers
def test_bytes_of_live_connections_can_be_counted(start: Start) -> None:
    with Servers(echo) as endpoint:
        proxy = start(Protocol.TCP, V4, [endpoint.address])
        with proxy.connect() as client:
            assert answered(client)
            for _ in range(2):
                proxy.wait_for(proxy.path.count())
                assert (proxy.counts.to_endpoint, proxy.counts.to_client) == (1, 1)


def test_half_open_strangers_do_not_hold_the_loop(start: Start) -> None:
    """A thousand connections that come and go at once cost nobody else their answer."""
    with Servers(echo) as endpoint:
        proxy = start(Protocol.TCP, V4, [endpoint.address])
        with proxy.connect() as client:
            for _ in range(1000):
                stranger = socket.socket()
                stranger.connect(proxy.address)
                stranger.close()
            assert answered(client)
        eventually(lambda: proxy.counts.active == 0)


def test_a_dial_that_worked_while_we_were_late_is_not_repeated(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop is held up for longer than an attempt is given, with the answer in the kernel."""
    with Servers(echo) as endpoint:
        proxy = start(Protocol.TCP, V4, [endpoint.address])
        take = proxy.socket.on_events  # type: ignore[attr-defined]

        def take_and_stall(events: int) -> None:
            take(events)
            time.sleep(dial.LADDER[0] + 0.1)

        monkeypatch.setattr(proxy.socket, "on_events", take_and_stall)
        with proxy.connect() as client:
            assert answered(client)
        assert proxy.counts.dials == endpoint.accepted == 1
        assert not proxy.counts.dial_failures
