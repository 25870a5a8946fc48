"""What this host is: its addresses, its limits, its numbers.

Asked for when a decision needs it, never kept: addresses come and go. Deciding is `plan`'s and `ports`';
changing anything about the host is `capture`'s.
"""

from __future__ import annotations

import ipaddress
import os
import resource
import socket
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import ifaddr

from userspace_proxy.model import IPFamily, family_of

_AF = {IPFamily.IPV4: socket.AF_INET, IPFamily.IPV6: socket.AF_INET6}
_CLOSED_NOT_DELIVERED = frozenset(("04", "09", "0B"))
"""FIN_WAIT1, LAST_ACK and CLOSING, as /proc/net/tcp has them."""
_NOT_CONNECTED = frozenset(("02", "06", "07", "0A"))
"""SYN_SENT, TIME_WAIT, CLOSE and LISTEN."""
_OPEN_TO_CLIENTS = frozenset(("0A", "07"))
"""LISTEN of TCP, and what an unconnected UDP socket is."""
_UNPRIVILEGED_PORTS = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
_NONLOCAL_BIND = {
    IPFamily.IPV4: Path("/proc/sys/net/ipv4/ip_nonlocal_bind"),
    IPFamily.IPV6: Path("/proc/sys/net/ipv6/ip_nonlocal_bind"),
}
_EPHEMERAL_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")


def is_local_address(ip: str) -> bool:
    """Whether this host owns an address: only then can a socket be bound to it."""
    family = family_of(ip)
    try:
        with socket.socket(_AF[family], socket.SOCK_DGRAM) as probe:
            probe.bind((ip, 0))
    except OSError:
        return False
    return not _may_bind_to_any(family) or ipaddress.ip_address(ip).is_loopback or _source_toward(ip) == ip


def _may_bind_to_any(family: IPFamily) -> bool:
    """As hosts let it be that share addresses (keepalived): then binding proves nothing."""
    with suppress(OSError):
        return _NONLOCAL_BIND[family].read_text().strip() == "1"
    return False


def _source_toward(ip: str) -> str:
    """The address that a datagram to `ip` would come from: toward one of this host's own, the same."""
    with socket.socket(_AF[family_of(ip)], socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((ip, 9))
        except OSError:
            return ""
        return str(probe.getsockname()[0])


def is_delivered_here(ip: str) -> bool:
    """Whether what is sent to an address comes back to this host, by a route alone if need be. Sends nothing."""
    return _source_toward(ip) in (family_of(ip).loopback, ip)


def sctp() -> str:
    """Why there is no SCTP on this host and what to do about it; empty if there is.

    Asking for a socket has the kernel load the module, where it may: this is a try, not a look at lists.
    """
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_SCTP).close()
    except OSError as error:
        return (
            f"this kernel offers no SCTP ({error.strerror}): load its module (modprobe sctp; Debian's cloud kernels "
            "lack it, its other kernels have it), or use another kernel; it is tried again at each sync"
        )
    return ""


def undelivered(ports: Collection[int]) -> int:
    """How many TCP sockets at these local ports are closed, with bytes or an end that the peer has not acknowledged.

    By then they belong to no process, so only the kernel can tell. Blocks for a millisecond a thousand sockets.
    """
    return sum(
        state in _CLOSED_NOT_DELIVERED and int(local[-4:], 16) in ports for _, local, _, state, _ in _sockets("tcp")
    )


def spoken_on(ips: Collection[str]) -> set[str]:
    """Those of these addresses that TCP connections of this host have at either end.

    Who only tries to connect is none, or clients that never give up would keep an address for ever. Blocks for a
    millisecond a thousand sockets.
    """
    if not ips:
        return set()
    written = {_written(ip): ip for ip in ips}
    # Sockets of IPv6 speak IPv4 as well.
    written |= {_written(f"::ffff:{ip}"): ip for ip in ips if family_of(ip) is IPFamily.IPV4}
    found = {
        place.partition(":")[0]
        for _, *ends, state, _ in _sockets("tcp")
        if state not in _NOT_CONNECTED
        for place in ends
    }
    return {written[address] for address in found & written.keys()}


def local_addresses(networks: Sequence[str]) -> tuple[str, ...]:
    """This host's addresses within the networks.

    Without IPv6 link-local ones, which mean nothing without their interface and cannot be bound alone.
    """
    wanted = [ipaddress.ip_network(network) for network in networks]
    # Of IPv6 there is more to an address than its text, which comes first.
    found = {ip.ip if isinstance(ip.ip, str) else ip.ip[0] for link in ifaddr.get_adapters() for ip in link.ips}
    addresses = [ipaddress.ip_address(text) for text in found]
    bindable = [ip for ip in addresses if ip.version == 4 or not ip.is_link_local]
    within = [ip for ip in bindable if any(ip in network for network in wanted)]
    return tuple(str(ip) for ip in sorted(within, key=lambda ip: (ip.version, ip.packed)))


def ephemeral_ports() -> tuple[int, int]:
    """First and last of the ports the kernel hands out by itself."""
    try:
        first, last = map(int, _EPHEMERAL_PORTS.read_text().split())
    except OSError:
        return 32768, 60999
    return first, last


def first_unprivileged_port() -> int:
    try:
        return int(_UNPRIVILEGED_PORTS.read_text())
    except OSError:
        return 1024


def who_has(protocol: str, ip: str, port: int) -> str:
    """Name and process of who listens where a "tcp" or "udp" socket of this place would, as far as we may see that.

    Blocks for some milliseconds.
    """
    inodes = {
        f"socket:[{rest.split()[5]}]"
        for _, local, _, state, rest in _sockets(protocol)
        if state in _OPEN_TO_CLIENTS and int(local[-4:], 16) == port and _exclude_each_other(_address(local), ip)
    }
    for process in Path("/proc").glob("[0-9]*") if inodes else ():
        with suppress(OSError), os.scandir(process / "fd") as descriptors:
            if any(os.readlink(descriptor) in inodes for descriptor in descriptors):
                return f"{(process / 'comm').read_text().strip()} (pid {process.name})"
    return ""


def _exclude_each_other(there: str, here: str) -> bool:
    """Whether sockets at these addresses cannot have the same port. One at :: may be one for IPv4 as well."""
    if family_of(there) is not family_of(here):
        return "::" in (there, here)
    return there == here or family_of(here).wildcard in (there, here)


def listeners_on_all_addresses() -> list[int]:
    """The TCP ports that somebody listens at, wherever clients come to."""
    return sorted(
        {
            int(local[-4:], 16)
            for _, local, _, state, _ in _sockets("tcp")
            if state == "0A" and not local.partition(":")[0].strip("0")
        }
    )


def _sockets(protocol: str) -> Iterator[list[str]]:
    """Number, local place, remote place and state of each socket of both families, and the rest of its line."""
    for name in (protocol, f"{protocol}6"):
        with suppress(OSError), open(f"/proc/thread-self/net/{name}") as lines:
            next(lines)
            for line in lines:
                yield line.split(maxsplit=4)


def _written(ip: str) -> str:
    """An address as the kernel writes it: words of 32 bits in its own byte order."""
    packed = ipaddress.ip_address(ip).packed
    words = (packed[at : at + 4] for at in range(0, len(packed), 4))
    return "".join(f"{int.from_bytes(word, sys.byteorder):08X}" for word in words)


def _address(place: str) -> str:
    """The address of a place as the kernel writes it, and the port."""
    words = place.partition(":")[0]
    packed = b"".join(int(words[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(words), 8))
    address = ipaddress.ip_address(packed)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)


def raise_descriptor_limit() -> int:
    """Allow ourselves as many descriptors as we may; how many that is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return soft
