"""What a field of a Kubernetes object may hold, and what is said of one that holds something else.

One `Check` goes through one object and collects its problems, each as `field: found X; allowed: Y`, instead of
raising at the first. Which fields there are is told in `sources.shapes`, what they mean in `sources.services` and
`sources.endpoints`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from userspace_proxy.model import Protocol

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_SUBDOMAIN = re.compile(r"(?=.{1,253}\Z)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_LABEL_TEXT = "lower-case letters, digits and '-', at most 63, with a letter or digit at both ends"
_LEADING_ZEROS = re.compile(r"\b0+(?=\d)")


class Port(msgspec.Struct, rename="camel"):
    name: Any = None
    protocol: Any = None
    port: Any = None
    node_port: Any = None


class CheckedPort(NamedTuple):
    name: str
    protocol: Protocol
    port: int
    node_port: int


class Check:
    """Collects the problems of one object. What is refused still gives a value of the right type, to go on with."""

    def __init__(self, allow_loopback: bool) -> None:
        self.problems: list[str] = []
        self.passed_over: list[str] = []
        """Of what is not the writer's own: said of a part that is left out, while the rest of the object counts."""
        self.remarks: list[str] = []
        """What people should know of an object that is not refused."""
        self._allow_loopback = allow_loopback

    def refuse(self, field: str, found: object, allowed: str) -> None:
        self.problems.append(f"{field}: found {show(found)}; allowed: {allowed}")

    def name(self, field: str, value: object, *, dotted: bool = False) -> str:
        pattern = _SUBDOMAIN if dotted else _LABEL
        if not isinstance(value, str):
            self.refuse(field, value, "text" if value is None else "text; put it in quotes")
        elif not pattern.fullmatch(value):
            self.refuse(field, value, _LABEL_TEXT + (", with dots between" if dotted else ""))
        return value if isinstance(value, str) else ""

    def number(self, field: str, value: object, low: int, high: int) -> int:
        """The number, or 0 for one that is refused."""
        if type(value) is int and low <= value <= high:
            return value
        self.refuse(field, value, f"a number from {low} to {high}")
        return 0

    def ports(self, field: str, ports: Sequence[Port], *, of_slice: bool = False) -> list[CheckedPort]:
        """Ports with names that are their own, and numbers.

        A slice's may be without a number, or have 0, and one of them be without a name, whatever others it has: its
        numbers are not checked by the API server.
        """
        checked = [
            self._port(f"{field}[{i}]", port, unnamed=of_slice or len(ports) == 1, numbered=not of_slice)
            for i, port in enumerate(ports)
        ]
        names: set[str] = set()
        for i, port in enumerate(checked):
            if port.name in names and (port.name or of_slice):
                self.refuse(f"{field}[{i}].name", port.name or None, "a name that no other port has")
            names.add(port.name)
        return checked

    def service_ports(self, ports: Sequence[Port]) -> list[CheckedPort]:
        if not ports:
            self.refuse("spec.ports", None, "at least one port")
        checked = self.ports("spec.ports", ports)
        taken: set[tuple[str, Protocol, int]] = set()
        for i, port in enumerate(checked):
            for field, number in (("port", port.port), ("nodePort", port.node_port)):
                if number and (field, port.protocol, number) in taken:
                    allowed = f"a number that no other {port.protocol} port of the Service has"
                    self.refuse(f"spec.ports[{i}].{field}", number, allowed)
                taken.add((field, port.protocol, number))
        return checked

    def _port(self, field: str, port: Port, *, unnamed: bool, numbered: bool) -> CheckedPort:
        if port.name in (None, ""):
            if not unnamed:
                self.refuse(f"{field}.name", port.name, "a name, as there are several ports")
        else:
            self.name(f"{field}.name", port.name)
        protocol = Protocol.TCP
        if port.protocol not in (None, ""):
            try:
                protocol = Protocol(port.protocol.upper() if isinstance(port.protocol, str) else port.protocol)
            except ValueError:
                self.refuse(f"{field}.protocol", port.protocol, ", ".join(Protocol))
        has_number = numbered or port.port is not None
        number = self.number(f"{field}.port", port.port, int(numbered), 65535) if has_number else 0
        node_port = 0 if port.node_port is None else self.number(f"{field}.nodePort", port.node_port, 0, 65535)
        return CheckedPort(port.name if isinstance(port.name, str) else "", protocol, number, node_port)

    def service_ip(self, field: str, value: object, *, cluster: bool = False) -> str:
        """An address to be captured. A cluster IP may be a loopback address, as those of a single machine often are."""
        ip = self._address(field, value)
        if ip is not None and not cluster:
            self._refuse_local(field, value, ip, loopback=True)
        return str(ip or "")

    def status_ip(self, field: str, value: object) -> str:
        """A load balancer's address, or empty for one that is passed over.

        Whoever writes a Service cannot put right what a controller has told of it.
        """
        alone = Check(self._allow_loopback)
        ip = alone.service_ip(field, value)
        self.passed_over += alone.problems
        return "" if alone.problems else ip

    def endpoint_ip(self, field: str, value: object) -> str:
        ip = self._address(field, value)
        if ip is not None:
            self._refuse_local(field, value, ip, loopback=not self._allow_loopback)
        return str(ip or "")

    def network(self, field: str, value: object) -> str:
        """A network, with or without bits set beyond its mask; blanks around it have always been taken."""
        try:
            if not isinstance(value, str):
                raise ValueError(value)
            return str(ipaddress.ip_network(_without_zeros(value.strip()), strict=False))
        except ValueError:
            self.refuse(field, value, "a network, as 192.0.2.0/24 or 2001:db8::/32")
            return "0.0.0.0/32"

    def _refuse_local(
        self, field: str, value: object, ip: ipaddress.IPv4Address | ipaddress.IPv6Address, *, loopback: bool
    ) -> None:
        if ip.is_link_local:
            self.refuse(field, f"{value} (link-local)", "an address that means the same on every network")
        elif ip.is_loopback and loopback:
            self.refuse(field, f"{value} (loopback)", "an address outside 127.0.0.0/8 and ::1")

    def _address(self, field: str, value: object) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
        try:
            ip = parse_ip(value)
        except ValueError:
            self.refuse(field, value, "an IPv4 or IPv6 address")
            return None
        if ip.is_unspecified or ip.is_multicast or ip == ipaddress.IPv4Address("255.255.255.255"):
            self.refuse(field, value, "the address of one host: not unspecified, multicast or broadcast")
        elif ip.version == 6 and ip.ipv4_mapped is not None:
            self.refuse(field, value, f"the same as IPv4, {ip.ipv4_mapped}")
        elif ip.version == 6 and ip.scope_id is not None:
            self.refuse(field, value, "an address without a zone")
        return ip


def parse_ip(value: object) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Read an address; leading zeros in IPv4 are decimal, as Kubernetes always read them. Raises ValueError."""
    if not isinstance(value, str):
        raise ValueError("not text")
    return ipaddress.ip_address(_without_zeros(value))


def _without_zeros(text: str) -> str:
    return text if ":" in text or len(text) >= 64 else _LEADING_ZEROS.sub("", text)


def show(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    try:
        text = repr(value) if not isinstance(value, (list, dict)) or len(value) < 8 else f"a {type(value).__name__}"
    except (ValueError, RecursionError):  # an integer of thousands of digits
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."
