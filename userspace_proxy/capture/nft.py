"""The nftables capture's table of one family, as netlink messages: what is written, and how it reads back.

    table ip userspace-proxy {
        map portals { type ipv4_addr . inet_proto . inet_service : inet_service; }
        map node-ports { type inet_proto . inet_service : inet_service; }
        chain outside {
            meta l4proto tcp redirect to :ip daddr . meta l4proto . th dport map @portals
            fib daddr type local meta l4proto tcp redirect to :meta l4proto . th dport map @node-ports
        }
        chain inside { ... }
        chain prerouting {
            type nat hook prerouting priority dstnat - 10;
            ip saddr @inside-networks goto inside
            goto outside
        }
        chain output { type nat hook output priority dstnat - 10; goto inside; }
    }

For clients inside, the maps portals-inside and node-ports-inside are asked before those for all.
The chains never change while the proxy runs; a redirect is one element of a map, with its service port as comment. No
rule depends on another program's table, and none of the others' is touched. Rules are such as `nft` would write, so
that it lists them well and takes its own listing back. When what is written is in `nftables`; netlink in `netlink`.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from userspace_proxy.capture.netlink import CREATE, attribute, attributes, message
from userspace_proxy.capture.nft_expressions import (
    ADDRESS_SIZE,
    NFPROTO,
    go_to,
    is_local,
    is_protocol,
    load_destination,
    load_protocol_and_port,
    load_source,
    look_up,
    nested,
    number,
    text,
    to_this_host,
    translate,
)
from userspace_proxy.capture.rules import comment_of
from userspace_proxy.capture.scope import Network, Scope
from userspace_proxy.model import IPFamily, Protocol, Redirect

TABLE = "userspace-proxy"
PORTALS, NODE_PORTS = "portals", "node-ports"
INSIDE = {PORTALS: "portals-inside", NODE_PORTS: "node-ports-inside"}
"""Maps, and those that go before them for clients inside."""
MAPS = (*INSIDE, *INSIDE.values())

_NODE_ADDRESSES, _INSIDE_NETWORKS = "node-addresses", "inside-networks"
NETWORKS = (_NODE_ADDRESSES, _INSIDE_NETWORKS)
_SETS = (*MAPS, *NETWORKS)
"""Their order is their number within a transaction."""
_CHAINS = {
    "outside": ((PORTALS,), (NODE_PORTS,)),
    "inside": ((INSIDE[PORTALS], PORTALS), (INSIDE[NODE_PORTS], NODE_PORTS)),
}
"""What is asked for portals, then for node ports."""

_TABLE_NAME = TABLE.encode() + b"\0"

PROTOCOL_NUMBERS = {Protocol.TCP: 6, Protocol.UDP: 17, Protocol.SCTP: 132}

_SUBSYSTEM = 10
_NEW_TABLE, _GET_TABLE, _DELETE_TABLE, _NEW_CHAIN, _GET_CHAIN, _NEW_RULE, _GET_RULE = 0, 1, 2, 3, 4, 6, 7
_NEW_SET, _NEW_ELEMENTS, _GET_ELEMENTS, _DELETE_ELEMENTS, _NEW_GENERATION, _GET_GENERATION = 9, 12, 13, 14, 15, 16
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11

_TYPE_ADDRESS = {IPFamily.IPV4: 7, IPFamily.IPV6: 8}
_TYPE_PROTOCOL, _TYPE_PORT = 12, 13
"""nft's numbers for the types of its language; the kernel keeps them for it and looks at lengths alone."""
_MAP, _INTERVAL = 8, 4
_INTERVAL_END = 1
_HOOKS = {"prerouting": 0, "output": 3}
_PRIORITY = -110
"""Before the nat tables of others (-100): the first that translates a connection is the only one that does."""

_ELEMENTS_AT_ONCE = 400
"""In one message: an attribute ends at 64 KB, and an element with a comment takes up to 130 bytes."""
_COMMENT_LIMIT = 100


class Key(NamedTuple):
    """Where in the table a redirect is."""

    map: str
    bytes: bytes


class Value(NamedTuple):
    proxy_port: int
    comment: str = ""


Elements = Mapping[Key, Value]
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def elements(redirects: Iterable[Redirect]) -> dict[Key, Value]:
    """What stands in the table for redirects that are without `objection`."""
    found = {}
    for redirect in redirects:
        portal = redirect.portal
        where = _padded(bytes([PROTOCOL_NUMBERS[portal.protocol]])) + _padded(struct.pack("!H", portal.port))
        comment = comment_of(redirect.owner)[:_COMMENT_LIMIT]
        name = PORTALS if portal.ip else NODE_PORTS
        if portal.ip:
            where = ipaddress.ip_address(portal.ip).packed + where
        found[Key(name, where)] = Value(redirect.proxy_port, comment)
        if redirect.inside_port:
            found[Key(INSIDE[name], where)] = Value(redirect.inside_port, comment)
    return found


def place(key: Key) -> tuple[Protocol, str, int] | None:
    """Protocol, address (empty: node port) and port; None for an element that cannot be ours."""
    if len(key.bytes) not in (8, 12, 24):
        return None
    address, protocol, port = key.bytes[:-8], key.bytes[-8], int.from_bytes(key.bytes[-4:-2], "big")
    for name, its_number in PROTOCOL_NUMBERS.items():
        if its_number == protocol:
            return name, str(ipaddress.ip_address(address)) if address else "", port
    return None


def _padded(component: bytes) -> bytes:
    return component + bytes(-len(component) % 4)


# Messages


def _message(kind: int, flags: int, family: IPFamily, *parts: bytes) -> bytes:
    header = struct.pack("!BBH", NFPROTO[family], 0, 0)
    return message(_SUBSYSTEM << 8 | kind, flags, header + b"".join(parts))


def batch(messages: Iterable[bytes]) -> bytes:
    """A transaction: all of it is done, at one moment, or nothing."""
    mark = struct.pack("!BBH", 0, 0, _SUBSYSTEM)
    return b"".join((message(_BATCH_BEGIN, 0, mark), *messages, message(_BATCH_END, 0, mark)))


def removal(family: IPFamily) -> list[bytes]:
    """Takes the table out; put in first, so that there is one."""
    name = text(1, TABLE)
    return [_message(_NEW_TABLE, CREATE, family, name), _message(_DELETE_TABLE, 0, family, name)]


def whole(scope: Scope, elements: Elements) -> list[bytes]:
    """The table with these elements, in place of what is there."""
    family = scope.family
    protocol_and_port = ((_TYPE_PROTOCOL, 4), (_TYPE_PORT, 4))
    keys = {
        PORTALS: ((_TYPE_ADDRESS[family], ADDRESS_SIZE[family]), *protocol_and_port),
        NODE_PORTS: protocol_and_port,
    }
    return [
        *removal(family),
        _message(_NEW_TABLE, CREATE, family, text(1, TABLE)),
        *(_set(family, each, _MAP, types) for name, types in keys.items() for each in (name, INSIDE[name])),
        *_networks(family, _NODE_ADDRESSES, scope.nodeport_networks if _is_choosy(scope) else ()),
        *_networks(family, _INSIDE_NETWORKS, scope.inside_networks),
        *_chains(scope),
        *additions(family, elements),
    ]


def additions(family: IPFamily, elements: Elements) -> Iterator[bytes]:
    """Adds elements to the maps."""
    for name, encoded in _by_map(elements.items()).items():
        yield from _element_lists(family, _NEW_ELEMENTS, CREATE, name, encoded)


def deletions(family: IPFamily, keys: Iterable[Key]) -> Iterator[bytes]:
    """Deletes elements; of those that are not there, the transaction fails."""
    for name, encoded in _by_map((key, None) for key in keys).items():
        yield from _element_lists(family, _DELETE_ELEMENTS, 0, name, encoded)


def _set(family: IPFamily, name: str, flags: int, types: Sequence[tuple[int, int]]) -> bytes:
    kind = 0
    for component, _ in types:
        kind = kind << 6 | component
    key = (number(4, kind), number(5, sum(size for _, size in types)))
    data = (number(6, _TYPE_PORT), number(7, 2)) if flags & _MAP else ()
    start = (text(1, TABLE), text(2, name), number(3, flags))
    return _message(_NEW_SET, CREATE, family, *start, *key, *data, number(10, 1 + _SETS.index(name)))


def _chain(family: IPFamily, name: str, *more: bytes) -> bytes:
    return _message(_NEW_CHAIN, CREATE, family, text(1, TABLE), text(3, name), *more)


def _chains(scope: Scope) -> Iterator[bytes]:
    family = scope.family
    for chain, (portals, node_ports) in _CHAINS.items():
        yield _chain(family, chain)
        for rule in _services(scope, portals, node_ports):
            yield _rule(family, chain, rule)
    for name, hook in _HOOKS.items():
        yield _chain(family, name, nested(4, number(1, hook), number(2, _PRIORITY)), text(7, "nat"))
    if scope.inside_networks:
        come_from_inside = [load_source(family), look_up(_INSIDE_NETWORKS)]
        yield _rule(family, "prerouting", [*come_from_inside, go_to("inside")])
    yield _rule(family, "prerouting", [go_to("outside")])
    yield _rule(family, "output", [go_to("inside")])


def _rule(family: IPFamily, chain: str, expressions: Sequence[bytes]) -> bytes:
    # 0x800: at the end of the chain.
    listed = nested(4, *(nested(1, expression) for expression in expressions))
    return _message(_NEW_RULE, CREATE | 0x800, family, text(1, TABLE), text(2, chain), listed)


def _by_map(elements: Iterable[tuple[Key, Value | None]]) -> dict[str, list[bytes]]:
    encoded: dict[str, list[bytes]] = {}
    for (name, key), value in elements:
        parts = nested(1, attribute(1, key))
        if value is not None:
            parts += nested(2, attribute(1, struct.pack("!H", value.proxy_port)))
            if value.comment:
                comment = value.comment.encode() + b"\0"
                parts += attribute(6, bytes((0, len(comment))) + comment)
        encoded.setdefault(name, []).append(nested(1, parts))
    return encoded


def _element_lists(family: IPFamily, kind: int, flags: int, name: str, encoded: Sequence[bytes]) -> Iterator[bytes]:
    for start in range(0, len(encoded), _ELEMENTS_AT_ONCE):
        listed = nested(3, *encoded[start : start + _ELEMENTS_AT_ONCE])
        yield _message(kind, flags, family, text(1, TABLE), text(2, name), listed)


# What is in the chains


def _services(scope: Scope, portals: Iterable[str], node_ports: Iterable[str]) -> Iterator[list[bytes]]:
    """Rules, in the order in which they are asked: what belongs to an address goes before node ports."""
    family = scope.family
    is_wildcard = scope.bind_address == family.wildcard
    target = to_this_host() if is_wildcard else translate(family, ipaddress.ip_address(scope.bind_address).packed)
    local = is_local()
    if _is_choosy(scope):
        local += [load_destination(family), look_up(_NODE_ADDRESSES)]
    # One rule a protocol: nft takes ports of a protocol that it knows.
    protocols = [is_protocol(each) for each in PROTOCOL_NUMBERS.values()]
    for name in portals:
        end = [
            load_destination(family),
            *load_protocol_and_port(ADDRESS_SIZE[family]),
            look_up(name, found=True),
            *target,
        ]
        yield from (protocol + end for protocol in protocols)
    for name in node_ports if scope.nodeport_networks else ():
        end = [*load_protocol_and_port(0), look_up(name, found=True), *target]
        yield from (local + protocol + end for protocol in protocols)


def _is_choosy(scope: Scope) -> bool:
    return all(network.prefixlen for network in scope.nodeport_networks)


def _networks(family: IPFamily, name: str, networks: Sequence[Network]) -> Iterator[bytes]:
    """A set of networks, if there are any."""
    if not networks:
        return
    yield _set(family, name, _INTERVAL, [(_TYPE_ADDRESS[family], ADDRESS_SIZE[family])])
    encoded = []
    for first, last in _ranges(networks):
        encoded.append(nested(1, nested(1, attribute(1, first.packed))))
        if int(last) + 1 < 1 << last.max_prefixlen:
            encoded.append(nested(1, nested(1, attribute(1, (last + 1).packed)), number(3, _INTERVAL_END)))
    yield from _element_lists(family, _NEW_ELEMENTS, CREATE, name, encoded)


def _ranges(networks: Iterable[Network]) -> list[tuple[Address, Address]]:
    """First and last addresses; the kernel takes no two that overlap."""
    ranges: list[tuple[Address, Address]] = []
    for network in sorted(networks, key=lambda network: (int(network.network_address), network.prefixlen)):
        # Of two networks one contains the other, or they are apart.
        if not ranges or int(ranges[-1][1]) < int(network.network_address):
            ranges.append((network.network_address, network.broadcast_address))
    return ranges


# Reading back


def ask_for_tables(family: IPFamily) -> tuple[int, bytes]:
    return _SUBSYSTEM << 8 | _GET_TABLE, _question(family)


def ask_for_chains(family: IPFamily) -> tuple[int, bytes]:
    return _SUBSYSTEM << 8 | _GET_CHAIN, _question(family)


def ask_for_rules(family: IPFamily) -> tuple[int, bytes]:
    return _SUBSYSTEM << 8 | _GET_RULE, _question(family) + text(1, TABLE)


def ask_for_elements(family: IPFamily, name: str) -> tuple[int, bytes]:
    return _SUBSYSTEM << 8 | _GET_ELEMENTS, _question(family) + text(1, TABLE) + text(2, name)


def ask_for_generation() -> tuple[int, bytes]:
    return _SUBSYSTEM << 8 | _GET_GENERATION, struct.pack("!BBH", 0, 0, 0)


def _question(family: IPFamily) -> bytes:
    return struct.pack("!BBH", NFPROTO[family], 0, 0)


def read_frame(kind: int, body: bytes) -> bytes:
    """What tells our table, or a chain or rule of it, from what it could be changed into; empty if it is not ours."""
    found = dict(attributes(body[4:]))
    if found.get(1) != _TABLE_NAME:
        return b""
    telling = {_NEW_TABLE: (2,), _NEW_CHAIN: (3, 4, 7)}.get(kind & 0xFF, (2, 4))
    return b"|".join((b"%d" % (kind & 0xFF), *(found.get(number, b"") for number in telling)))


def read_listed(body: bytes) -> list[bytes]:
    """The elements of a set of networks in one message of a dump, as they are."""
    return [content for _, content in attributes(dict(attributes(body[4:])).get(3, b""))]


def read_elements(body: bytes, name: str) -> Iterator[tuple[Key, Value]]:
    """The elements in one message of a dump."""
    listed = dict(attributes(body[4:])).get(3, b"")
    for _, content in attributes(listed):
        found = dict(attributes(content))
        key = dict(attributes(found.get(1, b""))).get(1, b"")
        data = dict(attributes(found.get(2, b""))).get(1, b"")
        comment = found.get(6, b"")[2:-1].decode(errors="replace")
        yield Key(name, key), Value(int.from_bytes(data[:2], "big"), comment)


def read_generation(body: bytes) -> int:
    """The number of the transaction that was the last one in this network namespace, whoever made it."""
    return int.from_bytes(dict(attributes(body[4:])).get(1, b""), "big")


def concerns(kind: int, body: bytes) -> IPFamily | None:
    """Of which family the table of ours is that a notification is about, if it is."""
    if kind >> 8 != _SUBSYSTEM or kind & 0xFF == _NEW_GENERATION:
        return None
    if dict(attributes(body[4:])).get(1) != _TABLE_NAME:  # the same number in all of them
        return None
    return next((family for family, number in NFPROTO.items() if number == body[0]), None)


def read_culprit(kind: int, body: bytes) -> str:
    """Who made the transaction that a notification ends; empty if it is another one."""
    found = dict(attributes(body[4:]))
    if kind != _SUBSYSTEM << 8 | _NEW_GENERATION or 3 not in found:
        return ""
    return f"{found[3].rstrip(bytes(1)).decode(errors='replace')} (pid {int.from_bytes(found[2], 'big')})"
