"""What flags must not be given together, what comes before everything else, and all mistakes at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.config.test_table import M, problem, problems
from userspace_proxy.config import Config, PortRange, Show, parse
from userspace_proxy.exceptions import ConfigError


def test_all_problems_at_once():
    lines = problems(
        "extra", "--udp-timeout=0", "--splice", "no", "--cleanupp", "--proxy-port-range=2-1", "--v=x", "--drain-timeout"
    )
    assert [line.partition(":")[0] for line in lines] == [
        "'extra'",
        "'no'",
        "--cleanupp",
        "--drain-timeout",
        "--udp-timeout='0'",
        "--proxy-port-range='2-1'",
        "--v='x'",
    ]
    assert "--cleanupp: unknown flag; did you mean --cleanup?" in lines


@pytest.mark.parametrize("name", ["kubeconfig", "master"])
def test_there_is_one_source(name):
    assert problem(M, f"--{name}=x").startswith(f"--{name}='x': --manifests is given too; allowed: one source")
    assert getattr(parse([f"--{name}=x"]), name) == "x"
    assert parse([]) == Config(), "a pod's own cluster, which is looked for later"


@pytest.mark.parametrize("capture", ["auto", "iptables"])
@pytest.mark.parametrize("ip", ["127.0.0.1", "127.0.0.53", "::1"])
def test_a_loopback_address_cannot_be_captured_to(capture, ip):
    line = problem(M, f"--capture={capture}", f"--bind-address={ip}")
    assert line.startswith(f"--bind-address='{ip}': traffic of other hosts and pods cannot be captured")
    assert line.endswith("write --capture=none or --bind-address=0.0.0.0")
    assert parse([M, "--capture=none", f"--bind-address={ip}"]).bind_address == ip
    assert parse(["--cleanup", f"--capture={capture}", f"--bind-address={ip}"]).cleanup


def test_the_shortest_sync_period_is_no_longer_than_the_longest():
    line = problem(M, "--iptables-min-sync-period=1m", "--iptables-sync-period=45s")
    assert line == (
        "--iptables-min-sync-period='1m0s': longer than --iptables-sync-period (45s); allowed: 45s at most; "
        "write for example --iptables-min-sync-period=45s"
    )
    assert problem(M, "--iptables-sync-period=500ms").startswith("--iptables-min-sync-period='1s': longer than")


@pytest.mark.parametrize(
    ("health", "metrics", "instead"),
    [
        ("0.0.0.0:10249", "127.0.0.1", "127.0.0.1:10256"),
        ("127.0.0.1:7", "127.0.0.1:7", "127.0.0.1:10249"),
        ("127.0.0.1:7", "0.0.0.0:7", "0.0.0.0:10249"),
        ("[::]:7", "127.0.0.1:7", "127.0.0.1:10249"),
        ("127.0.0.1:7", "[::]:7", "[::]:10249"),
    ],
)
def test_two_servers_cannot_have_one_address(health, metrics, instead):
    line = problem(M, f"--healthz-bind-address={health}", f"--metrics-bind-address={metrics}")
    assert f"--healthz-bind-address={health} has this port" in line
    assert line.endswith(f"write for example --metrics-bind-address={instead}")


@pytest.mark.parametrize(
    ("health", "metrics"),
    [
        ("127.0.0.1:7", "127.0.0.2:7"),
        ("0.0.0.0:7", "[::1]:7"),
        ("0.0.0.0:7", "0.0.0.0:8"),
        ("0.0.0.0:0", "0.0.0.0:0"),
        ("", "0.0.0.0:7"),
        ("", ""),
    ],
)
def test_two_servers_side_by_side(health, metrics):
    parse([M, f"--healthz-bind-address={health}", f"--metrics-bind-address={metrics}"])


def test_a_flag_that_cannot_be_read_is_not_blamed_twice():
    assert problem(M, "--iptables-sync-period=x", "--iptables-min-sync-period=1h").startswith(
        "--iptables-sync-period='x'"
    )
    assert problem(M, "--capture=x", "--bind-address=127.0.0.1").startswith("--capture='x'")
    assert problem("--manifests=").startswith("--manifests=''")


@pytest.mark.parametrize(
    "argv", [["--help"], ["-h"], ["-help"], ["--help=true"], ["x", "--v=z", "--nope", "-h"], ["--version", "-h"]]
)
def test_help_comes_before_everything_else(argv):
    assert parse(argv) is Show.HELP


def test_version_needs_nothing_else_but_what_is_given_must_be_right():
    assert parse(["--version"]) is Show.VERSION
    assert parse(["--version", "--bind-address=127.0.0.1"]) is Show.VERSION
    assert problem("--version", "--nope") == "--nope: unknown flag; --help lists those there are"


@given(st.integers(1, 65535), st.integers(1, 65535))
def test_port_ranges_read_back_in_each_spelling(one, other):
    first, last = sorted((one, other))
    expected = PortRange(first, last)
    for text in (f"{first}-{last}", f"{first}+{last - first}", str(expected)):
        assert parse([M, f"--proxy-port-range={text}"]).proxy_port_range == expected
    if first != last:
        assert "ends before it begins" in problem(M, f"--proxy-port-range={last}-{first}")


@given(st.text(alphabet="0123456789+- x", max_size=12))
def test_any_port_range_is_read_or_refused(text):
    try:
        ports = parse([M, f"--proxy-port-range={text}"]).proxy_port_range
    except ConfigError:
        return
    assert ports is None or 1 <= ports.first <= ports.last <= 65535
