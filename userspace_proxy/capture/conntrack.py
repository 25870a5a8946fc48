"""Deleting conntrack entries by original destination, over netlink.

Conntrack decides once, at a flow's first packet, where the flow goes. A UDP client that keeps its port
would therefore be sent to where a portal used to lead for as long as it speaks; deleting the entry makes
its next datagram pass the rules again. An entry that leads to the right place already is left alone: it was
made by the new rule, and the reply on its way needs it.

One way serves every kernel: dump, let the kernel filter the dump by what all wanted places share (kernels
before 5.8 ignore the filter), compare here, and delete each match by its whole tuple. Deleting by filter
is newer, and scans the whole table once for every place.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from userspace_proxy.capture.netlink import ACK, NESTED, Netlink, attribute, attributes, message
from userspace_proxy.host import is_local_address
from userspace_proxy.model import IPFamily, Protocol

_NETLINK_NETFILTER = 12
_CT_NEW, _CT_GET, _CT_DELETE = 1 << 8, 1 << 8 | 1, 1 << 8 | 2
_CTA_TUPLE_ORIG, _CTA_TUPLE_REPLY, _CTA_ZONE, _CTA_FILTER = 1, 2, 18, 25
_CTA_TUPLE_IP, _CTA_TUPLE_PROTO = 1, 2
_CTA_IP_DST = {IPFamily.IPV4: 2, IPFamily.IPV6: 4}
_CTA_PROTO_NUM, _CTA_PROTO_SRC_PORT, _CTA_PROTO_DST_PORT = 1, 2, 3
_CTA_FILTER_ORIG_FLAGS = 1
_FILTER_PROTO_NUM, _FILTER_DST_PORT = 1 << 3, 1 << 5

_ADDRESS_FAMILY = {IPFamily.IPV4: socket.AF_INET, IPFamily.IPV6: socket.AF_INET6}
_PROTOCOL_NUMBER = {Protocol.TCP: 6, Protocol.UDP: 17, Protocol.SCTP: 132}


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
    with contextlib.closing(Netlink("conntrack", _NETLINK_NETFILTER)) as netlink:
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
        for code in netlink.change([message(_CT_DELETE, ACK, _body(family, selector)) for selector in doomed]):
            if code not in (0, errno.ENOENT):
                raise OSError(code, f"conntrack over netlink: {os.strerror(code)}")
    return len(doomed)


def _packed(family: IPFamily, ip: str) -> bytes:
    return socket.inet_pton(_ADDRESS_FAMILY[family], ip)


def _is_local(family: IPFamily, packed: bytes) -> bool:
    return is_local_address(socket.inet_ntop(_ADDRESS_FAMILY[family], packed))


# Requests


def _body(family: IPFamily, more: bytes) -> bytes:
    return struct.pack("=BBH", _ADDRESS_FAMILY[family], 0, 0) + more


def _filter(wanted: Collection[tuple[int, bytes, int]]) -> bytes:
    """Attributes that let the kernel leave out what differs from all of `wanted` alike.

    Not by address: Linux (6.18 still) lets exactly the wrong IPv6 entries through when asked for one.
    """
    protocols, _, ports = (set(values) for values in zip(*wanted, strict=True))
    # The kernel reads a port only together with the protocol it belongs to.
    if len(protocols) > 1:
        return b""
    flags = _FILTER_PROTO_NUM
    proto = attribute(_CTA_PROTO_NUM, bytes(protocols))
    if len(ports) == 1:
        flags |= _FILTER_DST_PORT
        proto += attribute(_CTA_PROTO_DST_PORT, ports.pop().to_bytes(2, "big"))
    original = attribute(NESTED | _CTA_TUPLE_PROTO, proto)
    marks = attribute(_CTA_FILTER_ORIG_FLAGS, struct.pack("=I", flags))
    return attribute(NESTED | _CTA_TUPLE_ORIG, original) + attribute(NESTED | _CTA_FILTER, marks)


# Answers


def _dump(netlink: Netlink, family: IPFamily, wanted: Collection[tuple[int, bytes, int]]) -> Iterator[_Entry]:
    for kind, body in netlink.dump(_CT_GET, _body(family, _filter(wanted))):
        if kind == _CT_NEW and (entry := _entry(family, body)):
            yield entry


def _entry(family: IPFamily, body: bytes) -> _Entry | None:
    """The original tuple of an entry; None for one without ports, such as ICMP."""
    selector = original = reply = b""
    for kind, content in attributes(body[4:]):
        if kind == _CTA_TUPLE_ORIG:
            original = content
            selector += attribute(NESTED | _CTA_TUPLE_ORIG, content)
        elif kind == _CTA_TUPLE_REPLY:
            reply = content
        elif kind == _CTA_ZONE:
            selector += attribute(_CTA_ZONE, content)
    parts = dict(attributes(original))
    proto = dict(attributes(parts.get(_CTA_TUPLE_PROTO, b"")))
    destination = dict(attributes(parts.get(_CTA_TUPLE_IP, b""))).get(_CTA_IP_DST[family])
    if destination is None or _CTA_PROTO_DST_PORT not in proto:
        return None
    answering = dict(attributes(dict(attributes(reply)).get(_CTA_TUPLE_PROTO, b"")))
    port = int.from_bytes(proto[_CTA_PROTO_DST_PORT], "big")
    leads_to = int.from_bytes(answering.get(_CTA_PROTO_SRC_PORT, b""), "big")
    return _Entry(proto[_CTA_PROTO_NUM][0], destination, port, leads_to, selector)
