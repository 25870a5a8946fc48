"""Trays of datagrams: whole, in order, each with who sent it and where to; and back from there."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator

import pytest

from tests.netns import Namespace
from userspace_proxy.sockets.datagrams import COUNT, Inbox, Outbox, answering, ask_for_letterheads, sender

LARGEST = 65_507
LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
FAMILIES = pytest.mark.parametrize("family", LOOPBACK)


@contextlib.contextmanager
def ours(family: int) -> Iterator[socket.socket]:
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        ask_for_letterheads(sock)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        sock.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", 0))
        yield sock


@contextlib.contextmanager
def toward(sock: socket.socket, ip: str = "", *scope: int) -> Iterator[socket.socket]:
    with socket.socket(sock.family, socket.SOCK_DGRAM) as client:
        client.settimeout(5)
        client.connect((ip or LOOPBACK[sock.family], sock.getsockname()[1], *scope))
        yield client


def refuse(error: OSError) -> None:
    raise error


@FAMILIES
def test_whole_and_in_order_and_no_more_than_there_is_room_for(family: int) -> None:
    inbox = Inbox()
    sizes = [0, 1, LARGEST, *range(2, COUNT + 6)]
    with ours(family) as sock, toward(sock) as client:
        for size in sizes:
            client.send(bytes([size % 251]) * size)
        first = [(head, bytes(payload)) for head, payload in inbox.receive(sock)]
        second = [(head, bytes(payload)) for head, payload in inbox.receive(sock)]
        assert (len(first), len(second)) == (COUNT, len(sizes) - COUNT)
        assert [payload for _, payload in first + second] == [bytes([size % 251]) * size for size in sizes]
        assert len({head for head, _ in first + second}) == 1
        with pytest.raises(BlockingIOError):
            inbox.receive(sock)


@FAMILIES
def test_a_letterhead_names_who_wrote_and_where_to(family: int) -> None:
    inbox = Inbox()
    with ours(family) as sock, toward(sock) as one, toward(sock) as other:
        heads = []
        for client in (one, other, one):
            client.send(b"x")
            [(head, _)] = inbox.receive(sock)
            heads.append(head)
            assert sender(head) == client.getsockname()[:2]
        assert heads[0] == heads[2] != heads[1]


def test_one_client_at_two_of_our_addresses_is_two() -> None:
    inbox = Inbox()
    with ours(socket.AF_INET) as sock, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.bind(("127.0.0.1", 0))
        for ip in ("127.0.0.5", "127.0.0.6"):
            client.sendto(b"x", (ip, sock.getsockname()[1]))
        one, other = (head for head, _ in inbox.receive(sock))
        assert sender(one) == sender(other) == client.getsockname()
        assert one != other


def test_what_one_family_leaves_in_the_tray_is_not_in_the_letterheads_of_the_other() -> None:
    inbox = Inbox()
    with ours(socket.AF_INET) as sock, toward(sock) as client, ours(socket.AF_INET6) as six, toward(six) as client6:
        client.send(b"x")
        [(before, _)] = inbox.receive(sock)
        client6.send(b"x")
        inbox.receive(six)
        client.send(b"x")
        [(after, _)] = inbox.receive(sock)
        assert before == after


@FAMILIES
def test_replies_go_back_together_from_where_was_written_to(family: int) -> None:
    inbox, outbox = Inbox(), Outbox()
    ips = ["::1"] if family == socket.AF_INET6 else ["127.0.0.5", "127.0.0.6"]
    with ours(family) as sock, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(toward(sock, ip)) for ip in ips * (COUNT // len(ips))]
        for number, client in enumerate(clients):
            client.send(b"%d" % number)
        for head, payload in inbox.receive(sock):
            outbox.rooms[outbox.count][: len(payload)] = payload
            outbox.put(answering(head), len(payload))
        assert outbox.send(sock, refuse) == (COUNT, sum(len(b"%d" % number) for number in range(COUNT)))
        assert outbox.count == 0
        # A connected client hears nobody but the address it wrote to.
        assert [client.recv(100) for client in clients] == [b"%d" % number for number in range(COUNT)]


def test_one_that_cannot_go_keeps_back_no_other() -> None:
    inbox, outbox = Inbox(), Outbox()
    failures: list[OSError] = []
    with ours(socket.AF_INET) as sock, toward(sock) as client:
        client.send(b"x")
        [(head, _)] = inbox.receive(sock)
        sizes = [LARGEST + 1, 1, LARGEST + 1, LARGEST + 1, 0, 2, LARGEST + 1]
        for size in sizes:
            outbox.put(answering(head), size)
        assert outbox.send(sock, failures.append) == (3, 3)
        assert [len(client.recv(100)) for _ in range(3)] == [1, 0, 2]
        assert [failure.errno for failure in failures] == [errno.EMSGSIZE] * 4


@pytest.mark.privileged
def test_a_link_local_client_is_known_by_its_interface() -> None:
    inbox, outbox = Inbox(), Outbox()
    with Namespace() as node, Namespace() as pod:
        here, there = node.connect(pod, "fe80::a/64", "fe80::b/64")
        with pod.entered():
            scope = 0, socket.if_nametoindex(there)
        with node.entered(), ours(socket.AF_INET6) as sock, pod.entered(), toward(sock, "fe80::a", *scope) as client:
            client.send(b"x")
            with node.entered():
                [(head, _)] = inbox.receive(sock)
                assert sender(head) == (f"fe80::b%{here}", client.getsockname()[1])
            outbox.put(answering(head), 3)
            assert outbox.send(sock, refuse) == (1, 3)
            assert len(client.recv(100)) == 3
