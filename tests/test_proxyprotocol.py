"""Headers against the examples of the specification, and any bytes at all."""

from __future__ import annotations

import ipaddress
import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from userspace_proxy.exceptions import HeaderError
from userspace_proxy.proxyprotocol import LONGEST, Header, decode, encode

SIGNATURE = bytes.fromhex("0d0a0d0a000d0a515549540a")
PORTS = st.integers(0, 65535)
ADDRESSES = st.tuples(st.ip_addresses().map(str), PORTS)


def binary(command: int, family: int, body: bytes) -> bytes:
    return SIGNATURE + struct.pack("!BBH", command, family, len(body)) + body


@pytest.mark.parametrize(
    ("line", "source", "destination"),
    [
        (b"PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n", ("255.255.255.255", 65535), None),
        (b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n", ("192.168.0.1", 56324), ("192.168.0.11", 443)),
        (b"PROXY TCP6 2001:db8::1 ::1 1 2\r\n", ("2001:db8::1", 1), ("::1", 2)),
        (b"PROXY UNKNOWN\r\n", None, None),
        (b"PROXY UNKNOWN ffff:f...f:ffff ffff:f...f:ffff 65535 65535\r\n", None, None),
    ],
)
def test_lines(line: bytes, source: object, destination: object) -> None:
    found = decode(line + b"GET / HTTP/1.0\r\n")
    assert found is not None
    assert found.length == len(line)
    assert found.source == source
    assert destination is None or found.destination == destination


def test_binary_headers() -> None:
    body = bytes([192, 0, 2, 1, 198, 51, 100, 2]) + struct.pack("!HH", 4000, 80)
    more = b"\x04\0\x02ab"  # a TLV that nobody asked for
    assert decode(binary(0x21, 0x11, body) + b"x") == Header(28, ("192.0.2.1", 4000), ("198.51.100.2", 80))
    assert decode(binary(0x21, 0x11, body + more)) == Header(33, ("192.0.2.1", 4000), ("198.51.100.2", 80))
    for command, family, rest in ((0x20, 0, b""), (0x20, 0x11, body), (0x21, 0, b"abc"), (0x21, 0x31, bytes(216))):
        assert decode(binary(command, family, rest)) == Header(16 + len(rest), None, None)


@pytest.mark.parametrize(
    "start",
    [
        b"GET / HTTP/1.0\r\n\r\n",
        b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\n\n" + bytes(100),
        b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443" + b" " * 62,
        b"PROXY TCP4 192.168.0.1 ::1 56324 443\r\n",
        b"PROXY TCP6 192.168.0.1 192.168.0.2 56324 443\r\n",
        b"PROXY TCP4 192.168.0.1 192.168.0.300 56324 443\r\n",
        b"PROXY TCP4 192.168.0.1 192.168.0.11 65536 443\r\n",
        b"PROXY TCP4 192.168.0.1 192.168.0.11 56324\r\n",
        b"PROXY TCP5 192.168.0.1 192.168.0.11 56324 443\r\n",
        b"PROXY UDP4 192.168.0.1 192.168.0.11 56324 443\r\n",
        b"PROXY UNKNOWNS\r\n",
        b"\r\n\r\n\0\r\nQUIT\r",
        binary(0x11, 0x11, bytes(12)),
        binary(0x22, 0x11, bytes(12)),
        binary(0x21, 0x11, bytes(11)),
        binary(0x21, 0x21, bytes(35)),
        binary(0x21, 0x11, bytes(LONGEST)),
    ],
)
def test_what_is_no_header(start: bytes) -> None:
    with pytest.raises(HeaderError):
        decode(start)


@given(version=st.sampled_from([1, 2]), source=ADDRESSES, destination=ADDRESSES, name=st.text(max_size=300))
def test_what_is_sent_is_what_is_read(
    version: int, source: tuple[str, int], destination: tuple[str, int], name: str
) -> None:
    header = encode(version, source, destination, name)
    found = decode(header + b"more")
    assert found is not None
    assert found.length == len(header)
    for wanted, got in ((source, found.source), (destination, found.destination)):
        assert got is not None
        ip = ipaddress.ip_address(got[0])
        same = getattr(ip, "ipv4_mapped", None) if ":" not in wanted[0] and ip.version == 6 else ip
        assert (same, got[1]) == (ipaddress.ip_address(wanted[0]), wanted[1])


@given(version=st.sampled_from([1, 2]), source=ADDRESSES, destination=ADDRESSES, data=st.data())
def test_nothing_is_decided_before_its_end(
    version: int, source: tuple[str, int], destination: tuple[str, int], data: st.DataObject
) -> None:
    header = encode(version, source, destination, "a/b:c")
    assert decode(header[: data.draw(st.integers(0, len(header) - 1))]) is None


@given(st.sampled_from([b"", b"PROXY ", b"PROXY TCP4 ", SIGNATURE, SIGNATURE + b"\x21\x11\0\x0c"]), st.binary())
@example(b"", b"")
def test_any_bytes_are_a_header_or_its_start_or_refused(start: bytes, rest: bytes) -> None:
    try:
        found = decode(start + rest)
    except HeaderError:
        return
    assert found is None or 0 < found.length <= len(start + rest)
