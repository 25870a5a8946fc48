"""Deleting conntrack entries by original destination, over netlink.

Conntrack decides once, at a flow's first packet, where the flow goes. A UDP client that keeps its port
would therefore be sent to where a portal used to lead for as long as it speaks; deleting the entry makes
its next datagram pass the rules again. An entry that leads to the right place already is left alone: it was
made by the new rule, and the reply on its way needs it.

One way serves every kernel: dump, let the kernel filter the dump by what all wanted places share (kernels
before 5.8 ignore the filter), compare here, and delete each match by its whole tuple. Deleting by filter
is newer, and scans the whole table once for every place. The messages are put together by hand, because
decoding whole entries costs 0.5 ms each with pyroute2, and only the tuple is of interest.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from userspace_proxy.model import IPFamily, Protocol

_NETLINK_NETFILTER = 12
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_DUMP = 0x01, 0x04, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_CT_NEW, _CT_GET, _CT_DELETE = 1 << 8, 1 << 8 | 1, 1 << 8 | 2
_CTA_TUPLE_ORIG, _CTA_TUPLE_REPLY, _CTA_ZONE, _CTA_FILTER = 1, 2, 18, 25
_CTA_TUPLE_IP, _CTA_TUPLE_PROTO = 1, 2
_CTA_IP_DST = {IPFamily.IPV4: 2, IPFamily.IPV6: 4}
_CTA_PROTO_NUM, _CTA_PROTO_SRC_PORT, _CTA_PROTO_DST_PORT = 1, 2, 3
_CTA_FILTER_ORIG_FLAGS = 1
_FILTER_PROTO_NUM, _FILTER_DST_PORT = 1 << 3, 1 << 5
_NESTED = 0x8000
_TYPE_MASK = 0x3FFF

_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_ADDRESS_FAMILY = {IPFamily.IPV4: socket.AF_INET, IPFamily.IPV6: socket.AF_INET6}
_PROTOCOL_NUMBER = {Protocol.TCP: 6, Protocol.UDP: 17, Protocol.SCTP: 132}

_RECEIVE_SIZE = 1 << 17
_DELETIONS_AT_ONCE = 64
"""Their acknowledgements must fit into the socket's receive buffer."""


class Place(NamedTuple):
    """The original destination of entries to delete."""

    protocol: Protocol
    ip: str
    """Empty, as for a node port: any address of this machine."""
    port: int


class _Entry(NamedTuple):
    protocol: int
    destination: bytes
    port: int
    leads_to: int
    """The port replies come from: another than `port` where the destination is translated."""
    selector: bytes
    """The attributes that name exactly this entry."""


def flush(family: IPFamily, places: Mapping[Place, int]) -> int:
    """Delete the entries whose original destination is one of these places; say how many.

    `places` tells for each the proxy port that its entries may go on leading to, 0 if there is none.
    Raises OSError, EINVAL in particular where the kernel has no nf_conntrack_netlink.
    """
    if not places:
        return 0
    wanted = {
        (_PROTOCOL_NUMBER[place.protocol], _packed(family, place.ip) if place.ip else b"", place.port): proxy_port
        for place, proxy_port in places.items()
    }
    local: dict[bytes, bool] = {}
    doomed = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER) as netlink:
        netlink.bind((0, 0))
        netlink.settimeout(10)
        for entry in _dump(netlink, family, wanted):
            right = wanted.get((entry.protocol, entry.destination, entry.port))
            if right is None:
                right = wanted.get((entry.protocol, b"", entry.port))
                if right is None:
                    continue
                # A forwarded flow may have a node port's number; it is none of ours.
                if entry.destination not in local:
                    local[entry.destination] = _is_local(family, entry.destination)
                if not local[entry.destination]:
                    continue
            # Where portal and proxy port have the same number, a translated entry looks like any other.
            if entry.leads_to != right or right == entry.port:
                doomed.append(entry.selector)
        for start in range(0, len(doomed), _DELETIONS_AT_ONCE):
            _delete(netlink, family, doomed[start : start + _DELETIONS_AT_ONCE])
    return len(doomed)


def _packed(family: IPFamily, ip: str) -> bytes:
    return socket.inet_pton(_ADDRESS_FAMILY[family], ip)


def _is_local(family: IPFamily, packed: bytes) -> bool:
    with socket.socket(_ADDRESS_FAMILY[family], socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((socket.inet_ntop(_ADDRESS_FAMILY[family], packed), 0))
        except OSError:
            return False
    return True


# Requests


def _attribute(kind: int, content: bytes) -> bytes:
    padding = b"\0" * (-len(content) % 4)
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(content), kind) + content + padding


def _message(kind: int, flags: int, family: IPFamily, attributes: bytes) -> bytes:
    body = struct.pack("=BBH", _ADDRESS_FAMILY[family], 0, 0) + attributes
    return _HEADER.pack(_HEADER.size + len(body), kind, _NLM_F_REQUEST | flags, 0, 0) + body


def _filter(wanted: Collection[tuple[int, bytes, int]]) -> bytes:
    """Attributes that let the kernel leave out what differs from all of `wanted` alike.

    Not by address: Linux (6.18 still) lets exactly the wrong IPv6 entries through when asked for one.
    """
    protocols, _, ports = (set(values) for values in zip(*wanted, strict=True))
    # The kernel reads a port only together with the protocol it belongs to.
    if len(protocols) > 1:
        return b""
    flags = _FILTER_PROTO_NUM
    proto = _attribute(_CTA_PROTO_NUM, bytes(protocols))
    if len(ports) == 1:
        flags |= _FILTER_DST_PORT
        proto += _attribute(_CTA_PROTO_DST_PORT, ports.pop().to_bytes(2, "big"))
    original = _attribute(_NESTED | _CTA_TUPLE_PROTO, proto)
    marks = _attribute(_CTA_FILTER_ORIG_FLAGS, struct.pack("=I", flags))
    return _attribute(_NESTED | _CTA_TUPLE_ORIG, original) + _attribute(_NESTED | _CTA_FILTER, marks)


def _delete(netlink: socket.socket, family: IPFamily, selectors: list[bytes]) -> None:
    netlink.send(b"".join(_message(_CT_DELETE, _NLM_F_ACK, family, selector) for selector in selectors))
    unanswered = len(selectors)
    while unanswered:
        for kind, body in _messages(netlink.recv(_RECEIVE_SIZE)):
            if kind == _NLMSG_ERROR:
                unanswered -= 1
                _raise_unless(body, ignored=errno.ENOENT)


# Answers


def _dump(netlink: socket.socket, family: IPFamily, wanted: Collection[tuple[int, bytes, int]]) -> Iterator[_Entry]:
    netlink.send(_message(_CT_GET, _NLM_F_DUMP, family, _filter(wanted)))
    while True:
        for kind, body in _messages(netlink.recv(_RECEIVE_SIZE)):
            if kind == _NLMSG_DONE:
                return
            if kind == _NLMSG_ERROR:
                _raise_unless(body)
            elif kind == _CT_NEW and (entry := _entry(family, body)):
                yield entry


def _raise_unless(body: bytes, ignored: int = 0) -> None:
    (code,) = struct.unpack_from("=i", body)
    if code and -code != ignored:
        raise OSError(-code, f"conntrack over netlink: {os.strerror(-code)}")


def _messages(received: bytes) -> Iterator[tuple[int, bytes]]:
    offset = 0
    while offset + _HEADER.size <= len(received):
        length, kind, *_ = _HEADER.unpack_from(received, offset)
        yield kind, received[offset + _HEADER.size : offset + length]
        offset += (length + 3) & ~3


def _attributes(content: bytes) -> Iterator[tuple[int, bytes]]:
    offset = 0
    while offset + _ATTRIBUTE.size <= len(content):
        length, kind = _ATTRIBUTE.unpack_from(content, offset)
        yield kind & _TYPE_MASK, content[offset + _ATTRIBUTE.size : offset + length]
        offset += (length + 3) & ~3


def _entry(family: IPFamily, body: bytes) -> _Entry | None:
    """The original tuple of an entry; None for one without ports, such as ICMP."""
    selector = original = reply = b""
    for kind, content in _attributes(body[4:]):
        if kind == _CTA_TUPLE_ORIG:
            original = content
            selector += _attribute(_NESTED | _CTA_TUPLE_ORIG, content)
        elif kind == _CTA_TUPLE_REPLY:
            reply = content
        elif kind == _CTA_ZONE:
            selector += _attribute(_CTA_ZONE, content)
    parts = dict(_attributes(original))
    proto = dict(_attributes(parts.get(_CTA_TUPLE_PROTO, b"")))
    destination = dict(_attributes(parts.get(_CTA_TUPLE_IP, b""))).get(_CTA_IP_DST[family])
    if destination is None or _CTA_PROTO_DST_PORT not in proto:
        return None
    answering = dict(_attributes(dict(_attributes(reply)).get(_CTA_TUPLE_PROTO, b"")))
    port = int.from_bytes(proto[_CTA_PROTO_DST_PORT], "big")
    leads_to = int.from_bytes(answering.get(_CTA_PROTO_SRC_PORT, b""), "big")
    return _Entry(proto[_CTA_PROTO_NUM][0], destination, port, leads_to, selector)
