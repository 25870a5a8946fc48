"""What flags must not be given together, what comes before everything else, and all mistakes at once."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.config.flags import M, problem, problems
from userspace_proxy.config import Address, CaptureWay, Config, LoggingFormat, PortRange, Show, parse
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


HEAD = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"


def with_file(tmp_path, body, *argv):
    file = tmp_path / "config.conf"
    file.write_text(HEAD + body)
    return parse([M, *argv, f"--config={file}"])


def test_a_file_takes_the_place_of_the_flags_it_has_fields_for(tmp_path):
    config = with_file(
        tmp_path, "udpIdleTimeout: 2s\nmode: userspace\n", "--udp-timeout=9s", "--oom-score-adj=5", "--kube-api-qps=1"
    )
    assert config == replace(
        Config(), manifests=config.manifests, config=config.config, udp_timeout=2.0, proxy_mode="userspace"
    )
    file = config.config
    assert config.notices == (
        f"--udp-timeout is not looked at, as --config is given; write udpIdleTimeout in {file}",
        f"--oom-score-adj is not looked at, as --config is given; write oomScoreAdj in {file}",
        f"--kube-api-qps is not looked at, as --config is given; write clientConnection.qps in {file}",
    )


def test_flags_without_a_field_count_beside_a_file(tmp_path):
    config = with_file(tmp_path, "", "--capture=none", "-v4", "--workers=2", "--cleanup", "--logging-format=json")
    assert (config.capture, config.verbosity, config.workers) == (CaptureWay.NONE, 4, 2)
    assert (config.cleanup, config.logging_format, config.notices) == (True, LoggingFormat.JSON, ())


@pytest.mark.parametrize(
    ("field", "flag", "name"),
    [("", "", ""), ("A", "", "a"), ("", "B", "b"), ("A", "B", "b")],
)
def test_hostname_override_wins_over_its_field(tmp_path, field, flag, name):
    config = with_file(tmp_path, f"hostnameOverride: '{field}'\n", f"--hostname-override={flag}")
    assert config.hostname_override == name
    assert config.notices == ()


def test_deprecated_ports_are_not_looked_at_beside_a_file(tmp_path):
    config = with_file(tmp_path, "", "--healthz-port=1", "--metrics-port=0")
    assert config.healthz_bind_address == Config().healthz_bind_address
    assert config.metrics_bind_address == Config().metrics_bind_address
    assert config.notices == tuple(
        f"--{name} is not looked at, as --config is given" for name in ("healthz-port", "metrics-port")
    )


@pytest.mark.parametrize(
    ("body", "health", "metrics"),
    [
        ('bindAddress: "::"', Address("::", 10256), Address("::1", 10249)),
        ('bindAddress: "::"\nhealthzBindAddress: 0.0.0.0:1', Address("0.0.0.0", 1), Address("::1", 10249)),
        ("bindAddress: 0.0.0.0", Address("0.0.0.0", 10256), Address("127.0.0.1", 10249)),
    ],
)
def test_with_a_file_the_servers_are_of_the_bind_address_family(tmp_path, body, health, metrics):
    config = with_file(tmp_path, body)
    assert (config.healthz_bind_address, config.metrics_bind_address) == (health, metrics)


def test_what_flags_and_file_have_wrong_is_told_together(tmp_path):
    with pytest.raises(ConfigError) as caught:
        with_file(tmp_path, "udpIdleTimeout: 0x\nmod: x\n", "--workers=0", "--nope")
    file = tmp_path / "config.conf"
    assert [line.partition(";")[0] for line in caught.value.problems] == [
        "--nope: unknown flag",
        "--workers='0': too small",
        f"{file}:3: udpIdleTimeout: '0x': not a duration",
    ]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "--config='{file}': No such file or directory; name a file that can be read"),
        (b"\xff", "{file}: byte 0 is not UTF-8; allowed: YAML or JSON in UTF-8"),
        (b"", "{file}: not a mapping; allowed: a KubeProxyConfiguration, as --write-config-to writes it"),
    ],
)
def test_a_file_that_cannot_be_read_is_the_one_problem(tmp_path, content, problem):
    file = tmp_path / "config.conf"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        parse([M, f"--config={file}", "--iptables-sync-period=100ms"])
    assert caught.value.problems == (problem.format(file=file),)


@pytest.mark.timeout(20)
def test_a_file_is_not_waited_for(tmp_path):
    file = tmp_path / "config.conf"
    os.mkfifo(file)
    with pytest.raises(ConfigError) as caught:
        parse([M, f"--config={file}"])
    assert caught.value.problems == (f"--config='{file}': not a regular file; name a file that can be read",)


def test_fields_without_effect_are_told_where_they_differ_from_the_default(tmp_path):
    config = with_file(
        tmp_path, "detectLocalMode: ClusterCIDR\niptables: {masqueradeAll: false}\nwinkernel: {sourceVip: x}\n"
    )
    masquerade, windows = config.notices
    assert masquerade.startswith("detectLocalMode: without effect; which clients are inside")
    assert windows.startswith("winkernel.sourceVip: without effect; ")


def test_flags_without_effect_are_told_by_the_reason():
    config = parse(
        [M, "--masquerade-all", "--iptables-masquerade-bit=5", "--ipvs-scheduler=rr", "--feature-gates=CPUManager=f"]
    )
    masquerade, ipvs, gates = config.notices
    assert masquerade.startswith("--masquerade-all, --iptables-masquerade-bit: without effect; ")
    assert ipvs.startswith("--ipvs-scheduler: without effect; ")
    assert gates.startswith("feature gates CPUManager: without effect; ")
    assert parse([M, "--proxy-mode=userspace", "-v2"]).notices == ()


def test_manifests_that_are_not_there_are_told_with_the_rest(tmp_path):
    lines = problems(f"--manifests={tmp_path}/no", "--workers=0", "--manifests=/", f"--manifests={__file__}/y")
    assert [line.partition(";")[0] for line in lines] == [
        "--workers='0': too small",
        f"--manifests='{tmp_path}/no': No such file or directory",
        f"--manifests='{__file__}/y': Not a directory",
    ]
    parse([f"--manifests={tmp_path}/no", "--cleanup"])
    parse([f"--manifests={tmp_path}/no", "--write-config-to=x"])
