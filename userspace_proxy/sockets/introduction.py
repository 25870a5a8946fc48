"""Who the client is, told by the PROXY protocol: by a load balancer in front of us, and by us to the endpoint.

A connection from an address that a service port trusts starts with a header, which is taken off before anybody is
dialled, and its source is the client from then on. An endpoint that wants one gets a header of its own with each
connection, before the client's first byte. How headers are written is in `proxyprotocol`; service ports that have
nothing to do with it pay one comparison a connection.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import Callable
from functools import partial
from socket import SocketType
from typing import Generic, TypeVar

from userspace_proxy.exceptions import HeaderError
from userspace_proxy.model import Address, IPFamily
from userspace_proxy.poller import EDGE_IN, ERR, HUP, RDHUP, Poller
from userspace_proxy.proxyprotocol import LONGEST, Header, decode, encode
from userspace_proxy.sockets.base import AF

logger = logging.getLogger(__name__)

PATIENCE = 3.0
"""Seconds for a header to come whole. It is sent with the connection, so only a stranger takes longer."""

_DONTWAIT = int(socket.MSG_DONTWAIT)
_ENDS = ERR | HUP | RDHUP

# (level, option, length, the address's place in the answer): SO_ORIGINAL_DST and its IPv6 twin have no names here.
_ORIGINAL_DESTINATION = {
    IPFamily.IPV4: (socket.SOL_IP, 80, 16, slice(4, 8)),
    IPFamily.IPV6: (socket.IPPROTO_IPV6, 80, 28, slice(8, 24)),
}

_Owner = TypeVar("_Owner")


class Trusted:
    """Networks whose clients are load balancers."""

    def __init__(self, networks: tuple[str, ...]) -> None:
        self._networks = [ipaddress.ip_network(network) for network in networks]

    def __bool__(self) -> bool:
        return bool(self._networks)

    def __contains__(self, ip: str) -> bool:
        address = ipaddress.ip_address(ip)
        return any(address in network for network in self._networks)


class Introduction(Generic[_Owner]):
    """A client whose header has not come whole."""

    __slots__ = ("_all", "client", "owner")

    def __init__(self, everybody: Introductions[_Owner], owner: _Owner, client: SocketType) -> None:
        self._all = everybody
        self.owner = owner
        self.client = client

    def on_events(self, events: int) -> None:
        # Looked at, not taken: what follows the header is for the endpoint, and stays where it is.
        header = None
        over = bool(events & _ENDS)
        try:
            header = decode(self.client.recv(LONGEST, _DONTWAIT | socket.MSG_PEEK))
            if header is not None:
                self.client.recv(header.length, _DONTWAIT)
        except BlockingIOError:
            pass
        except (OSError, HeaderError) as error:
            logger.debug("no PROXY protocol header: %s", error)
            over = True
        if header is not None or over:
            self._all.end(self, header)


class Introductions(Generic[_Owner]):
    """All connections whose header is waited for. `on_end` gets each with its header, None where none came."""

    def __init__(self, poller: Poller, on_end: Callable[[_Owner, SocketType, Header | None], None]) -> None:
        self._poller = poller
        self._on_end = on_end
        self._waiting: set[Introduction[_Owner]] = set()

    def __len__(self) -> int:
        return len(self._waiting)

    def wait(self, owner: _Owner, client: SocketType) -> None:
        introduction = Introduction(self, owner, client)
        self._waiting.add(introduction)
        self._poller.register(client, introduction, EDGE_IN | RDHUP)
        self._poller.call_at(self._poller.clock() + PATIENCE, partial(self.end, introduction, None))

    def end(self, introduction: Introduction[_Owner], header: Header | None) -> None:
        if introduction in self._waiting:
            self._waiting.remove(introduction)
            self._poller.unregister(introduction.client)
            self._on_end(introduction.owner, introduction.client, header)

    def end_all(self) -> None:
        for introduction in list(self._waiting):
            self.end(introduction, None)


def introduce(
    endpoint: SocketType, client: SocketType, family: IPFamily, header: Header | None, *, version: int, name: str
) -> bool:
    """Tell the endpoint who the client is. Whether that worked; nothing has been sent to this endpoint before."""
    source, destination = (header.source, header.destination) if header else (None, None)
    try:
        text = encode(
            version,
            source or client.getpeername()[:2],
            destination or _destination(client, family),
            name,
        )
        return endpoint.send(text, _DONTWAIT) == len(text)
    except OSError:
        return False  # one of the two is gone already


def original_destination(client: SocketType, family: IPFamily) -> tuple[bytes, bytes] | None:
    """Port and address that a client connected to before it was redirected; None if conntrack does not know it."""
    level, option, length, address = _ORIGINAL_DESTINATION[family]
    try:
        raw = client.getsockopt(level, option, length)
    except OSError:
        return None
    return raw[2:4], raw[address]


def _destination(client: SocketType, family: IPFamily) -> Address:
    found = original_destination(client, family)
    if found is None:
        ip, port, *_ = client.getsockname()
        return ip, port
    return socket.inet_ntop(AF[family], found[1]), int.from_bytes(found[0], "big")
