"""Go's way of writing values, and what is said about those that are none."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from userspace_proxy.config.values import (
    Address,
    format_duration,
    parse_address,
    parse_cidrs,
    parse_duration,
    parse_ip,
    parse_switch,
)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0.0),
        ("-0", 0.0),
        ("0s", 0.0),
        ("300ms", 0.3),
        ("250us", 0.00025),
        ("250µs", 0.00025),
        ("250μs", 0.00025),
        ("7ns", 7e-9),
        ("1.5h", 5400.0),
        ("2h45m", 9900.0),
        ("1h1m1s1ms", 3661.001),
        (".5s", 0.5),
        ("5.s", 5.0),
        ("30s30s", 60.0),
        ("1m1h", 3660.0),
        ("+3s", 3.0),
        ("-1m30s", -90.0),
        ("1.0000000019s", 1.000000001),
        ("2562047h47m16.854775807s", 9223372036.854776),
    ],
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not a duration"),
        ("s", "not a duration"),
        (".s", "not a duration"),
        ("-", "not a duration"),
        ("--1s", "not a duration"),
        ("1s ", "not a duration"),
        (" 1s", "not a duration"),
        ("1 s", "not a duration"),
        ("1S", "not a duration"),
        ("1d", "not a duration"),
        ("1e3s", "not a duration"),
        ("1.2.3s", "1.2 has no unit"),
        ("٣s", "not a duration"),
        ("abc", "not a duration"),
        ("infs", "not a duration"),
        ("30", "30 has no unit"),
        ("1m30", "30 has no unit"),
        ("00", "00 has no unit"),
        ("2562047h47m16.854775808s", "longer than 292 years"),
        ("9" * 400 + "h", "longer than 292 years"),
    ],
)
def test_what_is_no_duration(text, why):
    with pytest.raises(ValueError) as caught:
        parse_duration(text)
    assert str(caught.value) == why


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0s"),
        (-0.0, "0s"),
        (1e-9, "1ns"),
        (0.0000011, "1.1µs"),
        (0.00025, "250µs"),
        (0.25, "250ms"),
        (0.0003005, "300.5µs"),
        (1.0, "1s"),
        (1.5, "1.5s"),
        (59.999999999, "59.999999999s"),
        (60.0, "1m0s"),
        (900.0, "15m0s"),
        (3600.0, "1h0m0s"),
        (9900.25, "2h45m0.25s"),
        (86400.0, "24h0m0s"),
        (-90.0, "-1m30s"),
    ],
)
def test_durations_as_go_prints_them(seconds, text):
    assert format_duration(seconds) == text


@given(st.integers(-(2**51), 2**51))
def test_a_printed_duration_reads_back_to_the_nanosecond(nanoseconds):
    seconds = nanoseconds / 1_000_000_000
    assert parse_duration(format_duration(seconds)) == seconds


@given(st.lists(st.tuples(st.integers(0, 999), st.sampled_from(["ns", "us", "ms", "s", "m", "h"])), min_size=1))
def test_a_duration_is_the_sum_of_its_steps(steps):
    units = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}
    text = "".join(f"{count}{unit}" for count, unit in steps)
    assert parse_duration(text) == sum(count * units[unit] for count, unit in steps) / 10**9


@given(st.text())
def test_any_other_text_is_refused_and_no_more(text):
    with contextlib.suppress(ValueError):
        parse_duration(text)


@pytest.mark.parametrize("text", ["1", "t", "T", "true", "TRUE", "True"])
def test_on(text):
    assert parse_switch(text) is True


@pytest.mark.parametrize("text", ["0", "f", "F", "false", "FALSE", "False"])
def test_off(text):
    assert parse_switch(text) is False


@pytest.mark.parametrize("text", ["", "yes", "no", "on", "tRUE", " true", "2"])
def test_neither_on_nor_off(text):
    with pytest.raises(ValueError, match="neither true nor false"):
        parse_switch(text)


@pytest.mark.parametrize(
    ("text", "ip"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("0.0.0.0", "0.0.0.0"),
        ("010.001.000.009", "10.1.0.9"),
        ("::", "::"),
        ("2001:DB8:0:0::1", "2001:db8::1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("64:ff9b::192.0.2.033", "64:ff9b::c000:221"),
    ],
)
def test_addresses_become_canonical(text, ip):
    assert parse_ip(text) == ip


@pytest.mark.parametrize(
    "text", ["", "localhost", "1.2.3", "1.2.3.256", "1.2.3.4.5", " 1.2.3.4", "[::1]", "1::2::3", "٣.1.1.1"]
)
def test_what_is_no_address(text):
    with pytest.raises(ValueError, match=r"^not an IP address$"):
        parse_ip(text)


def test_an_address_with_a_zone():
    with pytest.raises(ValueError, match="an address with a zone"):
        parse_ip("fe80::1%eth0")


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("0.0.0.0", ("0.0.0.0", 80)),
        ("127.0.0.1:8080", ("127.0.0.1", 8080)),
        ("::", ("::", 80)),
        ("[::1]", ("::1", 80)),
        ("[::1]:0", ("::1", 0)),
        ("2001:db8::1:8080", ("2001:db8::1:8080", 80)),
        ("1.2.3.4:65535", ("1.2.3.4", 65535)),
    ],
)
def test_address_and_port(text, address):
    assert parse_address(text, 80) == address


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (":80", "not an IP address"),
        ("localhost:80", "not an IP address"),
        ("1.2.3.4:", "not an IP address"),
        ("1.2.3.4:http", "not an IP address"),
        ("1.2.3.4:-1", "not an IP address"),
        ("1.2.3.4:65536", "65536 is no port"),
        ("[::1]:99999", "99999 is no port"),
        ("[]:80", "not an IP address"),
        ("[127.0.0.1]:80", "an IPv4 address in brackets"),
        ("[::1", "not an IP address"),
    ],
)
def test_what_is_no_address_and_port(text, why):
    with pytest.raises(ValueError) as caught:
        parse_address(text, 80)
    assert str(caught.value) == why


@given(st.ip_addresses(), st.integers(0, 65535))
def test_a_printed_address_reads_back(ip, port):
    ip = ip.ipv4_mapped or ip if ip.version == 6 else ip
    if (ip.version == 6 and ip.scope_id is None) or ip.version == 4:
        address = Address(str(ip), port)
        assert parse_address(str(address), 1) == address


@pytest.mark.parametrize(
    ("text", "cidrs"),
    [
        ("", ()),
        ("10.0.0.0/8", ("10.0.0.0/8",)),
        ("10.1.2.3/8", ("10.0.0.0/8",)),
        ("0.0.0.0/0,::/0", ("0.0.0.0/0", "::/0")),
        ("192.0.2.7/32,2001:DB8::1/128", ("192.0.2.7/32", "2001:db8::1/128")),
    ],
)
def test_cidrs(text, cidrs):
    assert parse_cidrs(text) == cidrs


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("192.0.2.1", "'192.0.2.1': a bare address; write 192.0.2.1/32"),
        ("10.0.0.0/8,2001:DB8::1", "'2001:DB8::1': a bare address; write 2001:db8::1/128"),
        ("10.0.0.0/33", "'10.0.0.0/33': 33 is no prefix length of this family"),
        ("::/129", "'::/129': 129 is no prefix length of this family"),
        ("10.0.0.0/255.0.0.0", "'10.0.0.0/255.0.0.0': no prefix length after the '/'"),
        ("10.0.0.0/", "'10.0.0.0/': no prefix length after the '/'"),
        ("10.0.0.0/-1", "'10.0.0.0/-1': no prefix length after the '/'"),
        ("10.0.0.0/8,", "'': not an IP address"),
        ("primary", "'primary': not an IP address"),
        ("10.0.0.0/8, ::/0", "' ::/0': not an IP address"),
    ],
)
def test_what_is_no_cidr(text, why):
    with pytest.raises(ValueError) as caught:
        parse_cidrs(text)
    assert str(caught.value) == why
