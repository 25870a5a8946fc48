from __future__ import annotations

import pytest

from userspace_proxy.sources.checks import Check, Port, parse_ip, show


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("010.000.0.001", "10.0.0.1"),
        ("10.0.0.10", "10.0.0.10"),
        ("100.200.0.0", "100.200.0.0"),
        ("FD00::0:1", "fd00::1"),
    ],
)
def test_parse_ip(text, address):
    assert str(parse_ip(text)) == address


@pytest.mark.parametrize(
    "text", ["", "10.0.0", "10.0.0.256", "1:2", "web", "10.0.0.1/24", 5, None, " 10.0.0.1", "0x7f.0.0.1"]
)
def test_parse_ip_refuses(text):
    with pytest.raises(ValueError):
        parse_ip(text)


@pytest.mark.parametrize(
    ("ip", "problem"),
    [
        ("0.0.0.0", "not unspecified"),
        ("::", "not unspecified"),
        ("224.0.0.1", "multicast"),
        ("ff02::1", "multicast"),
        ("255.255.255.255", "broadcast"),
        ("169.254.1.1", "link-local"),
        ("fe80::1", "link-local"),
        ("127.1.2.3", "loopback"),
        ("::1", "loopback"),
        ("::ffff:127.0.0.1", "the same as IPv4, 127.0.0.1"),
        ("fd00::1%eth0", "without a zone"),
    ],
)
def test_endpoint_addresses_that_are_refused(ip, problem):
    check = Check(allow_loopback=False)
    check.endpoint_ip("f", ip)
    assert problem in " ".join(check.problems)
    assert check.problems[0].startswith("f: found ")


def test_loopback_where_it_is_allowed():
    check = Check(allow_loopback=True)
    assert [check.endpoint_ip("f", ip) for ip in ("127.0.0.1", "::1")] == ["127.0.0.1", "::1"]
    assert check.service_ip("f", "127.0.0.1", cluster=True) == "127.0.0.1"
    assert check.problems == []
    check.service_ip("f", "127.0.0.1")
    assert "(loopback)" in check.problems[0]


def test_only_a_cluster_ip_may_be_loopback_anyway():
    check = Check(allow_loopback=False)
    assert check.service_ip("f", "127.96.0.1", cluster=True) == "127.96.0.1"
    assert check.problems == []
    check.service_ip("f", "127.96.0.1")
    assert "loopback" in check.problems[0]


@pytest.mark.parametrize("name", ["a", "a-b", "9", "a" * 63])
def test_names(name):
    check = Check(allow_loopback=False)
    assert check.name("f", name) == name
    assert check.problems == []


@pytest.mark.parametrize("name", ["", "A", "-a", "a-", "a" * 64, "a.b", "a\n", "ä", "a/b", 5, True, None])
def test_names_that_are_refused(name):
    check = Check(allow_loopback=False)
    check.name("f", name)
    assert len(check.problems) == 1


def test_dotted_names():
    check = Check(allow_loopback=False)
    check.name("f", "web.v1-x", dotted=True)
    assert check.problems == []
    for name in ("a..b", ".a", "a.", "a" * 254):
        check.name("f", name, dotted=True)
    assert len(check.problems) == 4


@pytest.mark.parametrize("number", [0, 65536, -1, True, "80", 80.0, None, pytest.param(10**5000, id="huge")])
def test_ports_that_are_refused(number):
    check = Check(allow_loopback=False)
    check.ports("ports", [Port(port=number)])
    assert check.problems[0].startswith("ports[0].port: found ")
    assert check.problems[0].endswith("allowed: a number from 1 to 65535")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "nothing"),
        (True, "true"),
        ("a\nb", "'a\\nb'"),
        ([1], "[1]"),
        (list(range(9)), "a list"),
        pytest.param(10**5000, "a huge int", id="huge"),
    ],
)
def test_show(value, text):
    assert show(value) == text
    assert len(show("x" * 500)) == 80
