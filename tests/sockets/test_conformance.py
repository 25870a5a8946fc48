"""What every kind of proxy socket must do, whatever its protocol, family and loop."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from tests.proxy import Named, ProxyThread, address, ask, eventually, listener, plain
from tests.sockets.conftest import Start
from userspace_proxy.exceptions import PortError
from userspace_proxy.loadbalancer import LoadBalancer
from userspace_proxy.model import Endpoint, IPFamily, Protocol, SessionAffinity

VARIANTS = {
    Protocol.TCP: ("asyncio", "uvloop", "2 workers"),
    Protocol.UDP: ("asyncio", "uvloop", "2 workers"),
    Protocol.SCTP: ("asyncio", "uvloop"),  # with workers, the same code in the control process: see test_sctp
}

pytestmark = pytest.mark.parametrize(
    ("protocol", "variant"),
    [
        pytest.param(protocol, variant, marks=pytest.mark.sctp if protocol is Protocol.SCTP else ())
        for protocol, variants in VARIANTS.items()
        for variant in variants
    ],
    indirect=["variant"],
)


@pytest.fixture
def three(protocol: Protocol, family: IPFamily) -> Iterator[list[Named]]:
    endpoints = [Named(protocol, family, name) for name in "abc"]
    yield endpoints
    for endpoint in endpoints:
        endpoint.stop()


def refused(proxy: ProxyThread, source: str | None = None) -> bool:
    try:
        ask(proxy, source=source)
    except ConnectionRefusedError:
        return True
    return False


def test_each_new_client_goes_to_the_next_endpoint(
    start: Start, protocol: Protocol, family: IPFamily, three: list[Named]
) -> None:
    proxy = start(protocol, family, [e.address for e in three])
    names = [ask(proxy) for _ in range(9)]
    if proxy.workers == 1:
        assert names[:3] == names[3:6] == names[6:9]
        assert sorted(names[:3]) == [b"a", b"b", b"c"]
    # Each worker's turns are its own, so that each may be less than one client off.
    assert all(abs(names.count(name) - 3) < proxy.workers for name in (b"a", b"b", b"c"))


def test_a_client_with_affinity_stays(start: Start, protocol: Protocol, three: list[Named], family: IPFamily) -> None:
    proxy = start(protocol, family, [e.address for e in three], affinity=SessionAffinity.CLIENT_IP)
    assert len({ask(proxy) for _ in range(6)}) == 1


def test_two_clients_with_affinity_are_told_apart(start: Start, protocol: Protocol) -> None:
    endpoints = [Named(protocol, IPFamily.IPV4, name) for name in "ab"]
    proxy = start(protocol, IPFamily.IPV4, [e.address for e in endpoints], affinity=SessionAffinity.CLIENT_IP)
    first = {ask(proxy, source="127.0.0.2") for _ in range(3)}
    second = {ask(proxy, source="127.0.0.3") for _ in range(3)}
    for endpoint in endpoints:
        endpoint.stop()
    assert len(first) == len(second) == 1
    assert first != second


def test_no_endpoint_is_a_refusal_by_the_kernel(start: Start, protocol: Protocol, family: IPFamily) -> None:
    proxy = start(protocol, family, [])
    assert refused(proxy)
    assert proxy.counts.opened == 0


def test_endpoints_come_and_go_on_one_proxy_port(
    start: Start, protocol: Protocol, family: IPFamily, three: list[Named]
) -> None:
    proxy = start(protocol, family, [])
    for _ in range(3):
        assert refused(proxy)
        proxy.update([e.address for e in three])
        assert ask(proxy) in (b"a", b"b", b"c")
        proxy.update([])
    assert refused(proxy)


def test_the_port_is_ours_in_every_state(
    start: Start, protocol: Protocol, family: IPFamily, three: list[Named]
) -> None:
    """Nobody else gets it, not even with the options that usually help, nor another proxy's socket."""
    proxy = start(protocol, family, [])
    for endpoints in ([], [e.address for e in three]):
        proxy.update(endpoints)
        with plain(protocol, family) as other:
            if protocol is not Protocol.UDP:
                other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with pytest.raises(OSError, match="in use"):
                other.bind(proxy.address)
        with pytest.raises(PortError, match="in use"):
            balancer = LoadBalancer(time.monotonic, None, proxy.counts)
            proxy.call(proxy.sockets.open, proxy.socket.key, *proxy.address, balancer, proxy.counts)


def unheard(proxy: ProxyThread, source: str | None = None) -> bool:
    """Neither answered nor refused."""
    with plain(proxy.protocol, proxy.family) as client:
        client.settimeout(0.1)
        if source:
            client.bind((source, 0))
        try:
            client.connect(proxy.address)
            client.send(b"hi")
            client.recv(10)
        except TimeoutError:
            return True
    return False


@pytest.mark.parametrize("affinity", SessionAffinity)
def test_silence_is_neither_service_nor_refusal(
    start: Start, protocol: Protocol, family: IPFamily, three: list[Named], affinity: SessionAffinity
) -> None:
    proxy = start(protocol, family, [], affinity=affinity)
    proxy.call(proxy.socket.screen, ())
    assert refused(proxy)
    proxy.call(proxy.socket.serve)
    assert unheard(proxy)
    assert proxy.counts.opened == 0
    proxy.call(proxy.balancer.update, [Endpoint(*e.address) for e in three])
    assert unheard(proxy)
    proxy.call(proxy.socket.screen, None)
    assert ask(proxy) in (b"a", b"b", b"c")


@pytest.mark.parametrize("affinity", SessionAffinity)
def test_only_clients_from_some_networks_are_heard(start: Start, protocol: Protocol, affinity: SessionAffinity) -> None:
    with Named(protocol, IPFamily.IPV4, "a") as endpoint:
        proxy = start(protocol, IPFamily.IPV4, [endpoint.address], affinity=affinity)
        proxy.call(proxy.socket.screen, ["127.0.1.0/24"])
        for _ in range(2):  # and again when it has refused in between
            assert ask(proxy, source="127.0.1.9") == b"a"
            assert unheard(proxy, source="127.0.2.9")
            proxy.update([])
            assert refused(proxy, source="127.0.1.9")
            proxy.update([endpoint.address])


def test_a_closed_socket_leaves_the_port_to_others(start: Start, protocol: Protocol, family: IPFamily) -> None:
    proxy = start(protocol, family, [])
    proxy.call(proxy.socket.close)
    with plain(protocol, family) as other:
        other.bind(proxy.address)


def test_what_is_live_is_listed(start: Start, protocol: Protocol, family: IPFamily) -> None:
    endpoint = listener(family, protocol)
    proxy = start(protocol, family, [address(endpoint)], idle_timeout=30)
    with plain(protocol, family) as client:
        client.connect(proxy.address)
        client.send(b"hello")
        eventually(lambda: bool(proxy.sessions()) and proxy.sessions()[0]["to_endpoint"] > 0)
        [session] = proxy.sessions()
        assert session["client"].endswith(f":{client.getsockname()[1]}")
        assert session["endpoint"].endswith(f":{address(endpoint)[1]}")
        assert session["protocol"] == protocol.value
    endpoint.close()


def test_draining_takes_nobody_new(start: Start, protocol: Protocol, family: IPFamily, three: list[Named]) -> None:
    proxy = start(protocol, family, [e.address for e in three])
    ask(proxy)
    idle: list[bool] = []
    proxy.call(proxy.sockets.drain, lambda: idle.append(True))
    eventually(lambda: idle == [True])
    before = proxy.counts.opened
    with plain(protocol, family) as client:
        client.settimeout(0.3)
        client.connect(proxy.address)
        client.send(b"hi")
        with pytest.raises(OSError):
            client.recv(10)
    assert proxy.counts.opened == before
