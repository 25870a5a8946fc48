"""A capture driven step by step on a node, and the traffic that shows what it does."""

from __future__ import annotations

import contextlib
import socket

from userspace_proxy.capture.base import Difference
from userspace_proxy.capture.iptables import IPTables
from userspace_proxy.capture.nftables import NFTables
from userspace_proxy.model import IPFamily

V4, V6 = IPFamily.IPV4, IPFamily.IPV6
PROXY_PORT = 40001
WAYS = {"iptables": IPTables, "nftables": NFTables}


class Captured:
    """A capture on the node, asked step by step, so that traffic can be tried in between."""

    def __init__(self, node, runner, way):
        self.node = node
        self._way = WAYS[way]
        self.capture = None
        self._runner = runner

    def start(self, bind_address="0.0.0.0", **options):
        self.capture = self._way(bind_address=bind_address, **options)
        self.run(self.capture.start())
        return self

    def replace(self, *redirects):
        return self.run(self.capture.replace(redirects))

    def change(self, redirects, gone=(), new=()):
        return self.run(self.capture.replace(redirects, Difference(tuple(gone), tuple(new))))

    def withdraw(self):
        self.run(self.capture.withdraw())

    def close(self):
        capture, self.capture = self.capture, None
        self.run(capture.close())

    def run(self, coroutine):
        with self.node.entered():
            return self._runner.run(coroutine)


@contextlib.contextmanager
def listening(node, family, address="", port=PROXY_PORT):
    with node.entered(), socket.socket(socket.AF_INET6 if family is V6 else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family is V6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind((address or family.wildcard, port))
        listener.listen()
        listener.settimeout(5)
        yield listener


def reach(namespace, address, listener):
    """Connect, and say as whom the listener sees us; both ways must work."""
    with namespace.entered(), socket.create_connection(address, timeout=5) as client:
        server, peer = listener.accept()
        with server:
            client.sendall(b"ping")
            assert server.recv(4) == b"ping"
            server.sendall(b"pong")
            assert client.recv(4) == b"pong"
    return peer[0]


def is_refused(namespace, address):
    """Or not answered: what is sent to an address that only has our route comes back and is dropped."""
    with namespace.entered():
        try:
            socket.create_connection(address, timeout=0.5).close()
        except OSError:
            return True
    return False
