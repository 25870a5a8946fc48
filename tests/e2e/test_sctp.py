"""SCTP Services end to end: the command itself, from a pod, from outside and from the node."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.node import Node, endpoints, port, service
from tests.netns import Namespace

pytestmark = [pytest.mark.sctp, pytest.mark.privileged, pytest.mark.timeout(110)]

CLUSTER = "10.96.0.10"
EXTERNAL = "198.51.100.7"


def plain(where: Namespace) -> socket.socket:
    with where.entered():
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_SCTP)
    sock.settimeout(5)
    return sock


def answer(where: Namespace, ip: str, number: int) -> bytes:
    with plain(where) as client:
        client.connect((ip, number))
        client.send(b"hi")
        return client.recv(100)


@contextlib.contextmanager
def answering(where: Namespace, name: bytes) -> Iterator[None]:
    """An endpoint on port 8080 of the namespace."""
    with plain(where) as server:
        server.bind(("", 8080))
        server.listen(10)
        server.settimeout(None)
        over = threading.Event()

        def run() -> None:
            while not over.is_set():
                client, _ = server.accept()
                with client, contextlib.suppress(OSError):
                    client.send(name + b":" + client.recv(100))
                    client.recv(1)  # until the client has its answer and leaves

        thread = threading.Thread(target=run)
        thread.start()
        yield
        over.set()
        with plain(where) as last:
            last.connect(("127.0.0.1", 8080))
        thread.join(10)


@pytest.mark.parametrize("capture", ["iptables", "local"])
def test_every_address_from_everywhere(tmp_path: Path, capture: str) -> None:
    with Node(tmp_path) as node:
        pod, other = node.pod("10.1.0.2"), node.pod("10.1.0.3")
        places = {"pod": other, "outside": node.outside(), "node": node.net}
        mixed = [
            port(80, name="calls", protocol="SCTP", node_port=30080),
            port(80, name="web", protocol="TCP", node_port=30080),
        ]
        node.apply(
            service("mixed", CLUSTER, mixed, externalIPs=[EXTERNAL]),
            endpoints("mixed", ["10.1.0.2:8080"], port_name="calls", protocol="SCTP"),
        )
        node.net.run(f"ip addr add {EXTERNAL}/32 dev lo")
        with answering(pod, b"pod"):
            node.start(f"--capture={capture}")
            for client in places:
                for ip, number in ((CLUSTER, 80), (EXTERNAL, 80), ("10.1.0.1", 30080)):
                    assert answer(places[client], ip, number) == b"pod:hi", f"from {client} to {ip}:{number}"
            assert node.rows()["mixed:web"]["state"] == "refusing"
        assert node.stop() == 0
