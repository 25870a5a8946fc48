from __future__ import annotations

import contextlib
import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns import Namespace, eventually
from userspace_proxy import host


def test_own_addresses_are_local_and_others_are_not() -> None:
    assert host.is_local_address("127.0.0.1")
    assert host.is_local_address("127.1.2.3")
    assert host.is_local_address("::1")
    assert not host.is_local_address("192.0.2.1")
    assert not host.is_local_address("2001:db8::1")


@pytest.mark.privileged
def test_addresses_within_networks() -> None:
    with Namespace() as node, Namespace() as other:
        here, _ = node.connect(other, "10.1.0.1/24", "10.1.0.2/24")
        node.add_address(here, "10.2.0.1/16")
        node.add_address(here, "fd01::1/64")
        with node.entered():
            assert host.local_addresses(["10.1.0.0/16"]) == ("10.1.0.1",)
            assert host.local_addresses(["10.0.0.0/8", "127.0.0.0/8"]) == ("10.1.0.1", "10.2.0.1", "127.0.0.1")


@pytest.mark.privileged
def test_addresses_of_both_families() -> None:
    with Namespace() as node, node.entered():
        assert host.local_addresses(["::1/128"]) == ("::1",)
        assert host.local_addresses(["127.0.0.0/8", "::/0"]) == ("127.0.0.1", "::1")


def test_ephemeral_ports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first, last = host.ephemeral_ports()
    assert 1 <= first < last <= 65535
    monkeypatch.setattr(host, "_EPHEMERAL_PORTS", tmp_path / "missing")
    assert host.ephemeral_ports() == (32768, 60999)


def test_the_descriptor_limit_is_raised_as_far_as_allowed() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard // 2, hard))
    try:
        assert host.raise_descriptor_limit() == hard
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
        assert host.raise_descriptor_limit() == hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_what_the_peer_has_not_taken_is_undelivered(family: int) -> None:
    with socket.create_server(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0), family=family) as server:
        number = server.getsockname()[1]
        with socket.socket(family) as client:
            client.connect(server.getsockname())
            accepted, _ = server.accept()
            assert host.undelivered({number}) == 0
            accepted.settimeout(0)
            with contextlib.suppress(BlockingIOError):
                while True:
                    accepted.send(bytes(65536))
            accepted.close()
            assert host.undelivered({number}) == 1
            assert host.undelivered({number + 1}) == 0
            while client.recv(1 << 20):
                pass
        eventually(lambda: not host.undelivered({number}))


@pytest.mark.parametrize("ip", ["127.0.0.2", "::1"])
def test_what_connections_are_spoken_on(ip: str) -> None:
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    with socket.create_server((ip, 0), family=family) as server, socket.socket(family) as client:
        if family == socket.AF_INET:
            assert host.spoken_on({ip, "192.0.2.1"}) == set()  # a listener is no connection
            client.bind(("127.0.0.3", 0))
        client.connect(server.getsockname())
        with server.accept()[0]:
            assert host.spoken_on({ip, "127.0.0.4", "192.0.2.1", "2001:db8::1"}) == {ip}
            assert host.spoken_on(()) == set()


@pytest.mark.privileged
@pytest.mark.parametrize(("family", "prefix"), [(socket.AF_INET, ""), (socket.AF_INET6, "::ffff:")])
def test_connections_are_spoken_on_at_their_far_end_too(family: int, prefix: str) -> None:
    """By sockets of IPv6 as well. Who only tries to connect is none."""
    with Namespace() as node, Namespace() as other:
        node.connect(other, "10.1.0.1/24", "10.1.0.2/24")
        with other.entered():
            server = socket.create_server(("10.1.0.2", 80))
        with server, node.entered(), socket.socket(family) as client, socket.socket(family) as trying:
            client.connect((f"{prefix}10.1.0.2", 80))
            trying.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                trying.connect((f"{prefix}10.1.0.3", 80))
            assert host.spoken_on({"10.1.0.2", "10.1.0.3"}) == {"10.1.0.2"}


OURS = f"{Path('/proc/self/comm').read_text().strip()} (pid {os.getpid()})"


def test_who_has_a_port_is_told_by_name(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    assert host.who_has("tcp", "127.0.0.1", port) == OURS
    assert port not in host.listeners_on_all_addresses()
    listener.close()
    assert host.who_has("tcp", "127.0.0.1", port) == ""


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize("at", ["127.0.0.1", "127.0.0.2", "0.0.0.0", "::1", "::"])
@pytest.mark.parametrize("wanted", ["127.0.0.1", "0.0.0.0", "::1", "::"])
def test_who_has_a_port_is_who_is_in_the_way(protocol: str, at: str, wanted: str) -> None:
    """Held to the kernel, which binds there or does not; a wildcard of both families is in the way of either."""
    kind = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}[protocol]
    with bound(at, 0, kind) as there:
        port = there.getsockname()[1]
        try:
            bound(wanted, port, kind).close()
            in_the_way = ""
        except OSError:
            in_the_way = OURS
        assert host.who_has(protocol, wanted, port) == in_the_way
        assert host.who_has({"tcp": "udp", "udp": "tcp"}[protocol], wanted, port) == ""


def bound(ip: str, port: int, kind: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET, kind)
    try:
        sock.bind((ip, port))
        if kind == socket.SOCK_STREAM:
            sock.listen()
    except OSError:
        sock.close()
        raise
    return sock


@pytest.mark.parametrize(("family", "ip"), [(socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")])
def test_who_listens_on_all_addresses(family: int, ip: str) -> None:
    with socket.create_server((ip, 0), family=family) as everywhere:
        assert everywhere.getsockname()[1] in host.listeners_on_all_addresses()


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def test_what_is_delivered_here() -> None:
    assert host.is_delivered_here("127.96.0.10")
    assert host.is_delivered_here("::1")
    assert not host.is_delivered_here("255.255.255.255")


def test_ports_below_the_first_that_all_may_have() -> None:
    assert 0 <= host.first_unprivileged_port() <= 65535


def test_sctp_or_what_to_do_about_it() -> None:
    problem = host.sctp()
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_SCTP).close()
    except OSError:
        assert "modprobe sctp" in problem
    else:
        assert not problem


@pytest.mark.sctp
def test_a_kernel_with_sctp_is_no_problem() -> None:
    assert host.sctp() == ""


@pytest.mark.privileged
def test_where_anything_can_be_bound_to_binding_proves_nothing() -> None:
    with Namespace() as node:
        node.run("ip link set lo up")
        node.run("ip addr add 198.51.100.1/32 dev lo")
        node.run("ip addr add 2001:db8::7/128 dev lo")
        node.run("sysctl -qw net.ipv4.ip_nonlocal_bind=1 net.ipv6.ip_nonlocal_bind=1")
        with node.entered():
            for ip in ("127.0.0.1", "127.1.2.3", "::1", "198.51.100.1", "2001:db8::7"):
                assert host.is_local_address(ip)
            for ip in ("192.0.2.1", "2001:db8::1"):
                assert not host.is_local_address(ip)
