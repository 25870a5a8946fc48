"""Each flag of the program: its default, good values and bad."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import pytest

from userspace_proxy.config import (
    Address,
    CaptureWay,
    Config,
    ContentType,
    LoggingFormat,
    PortRange,
    parse,
    settings,
)
from userspace_proxy.exceptions import ConfigError

M = "--manifests=m"
SOURCES = ("manifests", "kubeconfig", "master")


def problems(*argv: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        parse(argv)
    return caught.value.problems


def problem(*argv: str) -> str:
    (only,) = problems(*argv)
    return only


def test_defaults():
    assert parse([M]) == Config(manifests=(pathlib.Path("m"),))
    assert Config() == Config(
        manifests=(),
        kubeconfig="",
        master="",
        hostname_override="",
        state_dir=None,
        config_sync_period=900.0,
        kube_api_qps=5.0,
        kube_api_burst=10,
        kube_api_content_type=ContentType.JSON,
        capture=CaptureWay.AUTO,
        bind_address="0.0.0.0",
        proxy_port_range=None,
        nodeport_addresses=(),
        workers=1,
        udp_timeout=0.25,
        max_udp_flows=4096,
        half_close_timeout=300.0,
        max_ejection_time=10.0,
        splice=True,
        drain_timeout=5.0,
        iptables_sync_period=30.0,
        iptables_min_sync_period=1.0,
        healthz_bind_address=Address("0.0.0.0", 10256),
        metrics_bind_address=Address("127.0.0.1", 10249),
        bind_address_hard_fail=False,
        verbosity=0,
        logging_format=LoggingFormat.TEXT,
        cleanup=False,
    )


def test_it_is_a_value_that_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().splice = False
    assert hash(parse([M])) == hash(parse([M]))


GOOD = [
    (["--manifests", "a", "--manifests=b,c"], "manifests", (pathlib.Path("m"), pathlib.Path("a"), pathlib.Path("b,c"))),
    (["--hostname-override", " Node-1 "], "hostname_override", "node-1"),
    (["--state-dir=/x"], "state_dir", pathlib.Path("/x")),
    (["--state-dir="], "state_dir", None),
    (["--config-sync-period=1m"], "config_sync_period", 60.0),
    (["--kube-api-qps=2.5"], "kube_api_qps", 2.5),
    (["--kube-api-qps=-1"], "kube_api_qps", -1.0),
    (["--kube-api-burst=0"], "kube_api_burst", 0),
    (["--kube-api-content-type=application/vnd.kubernetes.protobuf"], "kube_api_content_type", ContentType.PROTOBUF),
    (["--capture=none"], "capture", CaptureWay.NONE),
    (["--capture", "iptables"], "capture", CaptureWay.IPTABLES),
    (["--bind-address=192.0.2.1"], "bind_address", "192.0.2.1"),
    (["--bind-address=192.000.002.010"], "bind_address", "192.0.2.10"),
    (["--bind-address=::"], "bind_address", "::"),
    (["--bind-address="], "bind_address", "0.0.0.0"),
    (["--bind-address=127.0.0.1", "--capture=none"], "bind_address", "127.0.0.1"),
    (["--bind-address=::1", "--capture=none"], "bind_address", "::1"),
    (["--proxy-port-range=100-200"], "proxy_port_range", PortRange(100, 200)),
    (["--proxy-port-range", " 100-200 "], "proxy_port_range", PortRange(100, 200)),
    (["--proxy-port-range=100"], "proxy_port_range", PortRange(100, 100)),
    (["--proxy-port-range=1+0"], "proxy_port_range", PortRange(1, 1)),
    (["--proxy-port-range=100+200"], "proxy_port_range", PortRange(100, 300)),
    (["--proxy-port-range=1+65534"], "proxy_port_range", PortRange(1, 65535)),
    *(
        [[f"--proxy-port-range={text}"], "proxy_port_range", None]
        for text in ("", "0", "0-0", "0+100", "0-65535", "  ")
    ),
    (["--udp-timeout=1ns"], "udp_timeout", 1e-9),
    (["--udp_timeout", "1m"], "udp_timeout", 60.0),
    (["--nodeport-addresses="], "nodeport_addresses", ()),
    (
        ["--nodeport-addresses=10.1.2.3/8,::1/128", "--nodeport-addresses", "127.0.0.0/8"],
        "nodeport_addresses",
        ("10.0.0.0/8", "::1/128", "127.0.0.0/8"),
    ),
    (["--healthz-bind-address="], "healthz_bind_address", None),
    (["--healthz-bind-address=::"], "healthz_bind_address", Address("::", 10256)),
    (["--healthz-bind-address=[::1]:1"], "healthz_bind_address", Address("::1", 1)),
    (["--healthz-bind-address=127.0.0.1:0"], "healthz_bind_address", Address("127.0.0.1", 0)),
    (["--metrics-bind-address="], "metrics_bind_address", None),
    (["--metrics-bind-address=0.0.0.0"], "metrics_bind_address", Address("0.0.0.0", 10249)),
    (["--metrics-bind-address=0.0.0.0:65535"], "metrics_bind_address", Address("0.0.0.0", 65535)),
    (["--bind-address-hard-fail"], "bind_address_hard_fail", True),
    (["--bind-address-hard-fail=F"], "bind_address_hard_fail", False),
    (["--iptables-sync-period=1h"], "iptables_sync_period", 3600.0),
    (["--iptables-min-sync-period=0"], "iptables_min_sync_period", 0.0),
    (["--iptables-min-sync-period=30s"], "iptables_min_sync_period", 30.0),
    (["--drain-timeout=0s"], "drain_timeout", 0.0),
    (["--half-close-timeout=1.5h"], "half_close_timeout", 5400.0),
    (["--max-ejection-time=0"], "max_ejection_time", 0.0),
    (["--max-ejection-time=1m"], "max_ejection_time", 60.0),
    (["--splice=false"], "splice", False),
    (["--splice=false", "--splice"], "splice", True),
    (["--max-udp-flows=1"], "max_udp_flows", 1),
    (["--workers", "4"], "workers", 4),
    (["--cleanup"], "cleanup", True),
    (["-v=10"], "verbosity", 10),
    (["-v", "4"], "verbosity", 4),
    (["-v2"], "verbosity", 2),
    (["--v=1", "--v=3"], "verbosity", 3),
    (["--logging-format=json"], "logging_format", LoggingFormat.JSON),
    (["--version=false"], "cleanup", False),
]


@pytest.mark.parametrize(("argv", "field", "value"), GOOD, ids=[" ".join(argv) for argv, _, _ in GOOD])
def test_good_values(argv, field, value):
    config = parse([M, *argv])
    assert getattr(config, field) == value
    assert type(getattr(config, field)) is type(value)


BAD = {
    "manifests": {"": "an empty path"},
    "kubeconfig": {" x": "blanks around it"},
    "master": {"ftp://192.0.2.1": "ftp is not spoken by API servers", "x ": "blanks around it"},
    "hostname-override": {"  ": "only blanks"},
    "state-dir": {" ": "blanks around it"},
    "config-sync-period": {"0": "too short", "900": "900 has no unit"},
    "kube-api-qps": {"": "not a number", "five": "not a number", "1e3": "not a number", "nan": "not a number"},
    "kube-api-burst": {"-1": "too small", "2.5": "not a whole number"},
    "kube-api-content-type": {"": "no such choice", "application/yaml": "no such choice"},
    "capture": {"": "no such choice", "IPTABLES": "no such choice", "nftables": "no such choice"},
    "bind-address": {
        "localhost": "not an IP address",
        "1.2.3.4:80": "not an IP address",
        "10.0.0.0/8": "not an IP address",
        "fe80::1%eth0": "an address with a zone",
    },
    "proxy-port-range": {
        "100 - 200": "not a range of ports",
        "-100": "not a range of ports",
        "100-": "not a range of ports",
        "+5": "not a range of ports",
        "1+-1": "not a range of ports",
        "1-+1": "not a range of ports",
        "1-2-3": "not a range of ports",
        "http": "not a range of ports",
        "٣": "not a range of ports",
        "200-100": "ends before it begins",
        "60000-70000": "70000 is no port",
        "70000": "70000 is no port",
        "0+70000": "70000 is no port",
        "1+65535": "65536 is no port",
    },
    "udp-timeout": {
        "0": "too short",
        "-1s": "too short",
        "250": "250 has no unit",
        "fast": "not a duration",
        "": "not a duration",
    },
    "workers": {"0": "too small", "65": "too large", "auto": "not a whole number"},
    "max-udp-flows": {
        "0": "too small",
        "-5": "too small",
        "2000000": "too large",
        "many": "not a whole number",
        "1.5": "not a whole number",
    },
    "nodeport-addresses": {
        "192.0.2.1": "'192.0.2.1': a bare address; write 192.0.2.1/32",
        "::1": "'::1': a bare address; write ::1/128",
        "10.0.0.0/8,,": "'': not an IP address",
        "10.0.0.0/40": "'10.0.0.0/40': 40 is no prefix length of this family",
    },
    "healthz-bind-address": {
        "localhost": "not an IP address",
        ":10256": "not an IP address",
        "0.0.0.0:65536": "65536 is no port",
    },
    "metrics-bind-address": {
        "10249": "not an IP address",
        "::1:99999": "not an IP address",
        "[::1]:70000": "70000 is no port",
    },
    "bind-address-hard-fail": {"yes": "neither true nor false", "": "neither true nor false"},
    "iptables-sync-period": {"0s": "too short", "-30s": "too short", "30": "30 has no unit", "1d": "not a duration"},
    "iptables-min-sync-period": {"-1s": "too short", "1": "1 has no unit"},
    "drain-timeout": {"-1ms": "too short", "5": "5 has no unit"},
    "max-ejection-time": {"-1s": "too short", "never": "not a duration"},
    "half-close-timeout": {"0": "too short", "forever": "not a duration"},
    "splice": {"no": "neither true nor false"},
    "v": {"-1": "too small", "11": "too large", "debug": "not a whole number"},
    "logging-format": {"JSON": "no such choice", "xml": "no such choice"},
    "cleanup": {"maybe": "neither true nor false"},
    "version": {"raw": "neither true nor false"},
    "help": {"me": "neither true nor false"},
}
CASES = [(name, text, why) for name, texts in BAD.items() for text, why in texts.items()]


@pytest.mark.parametrize(("name", "text", "why"), CASES)
def test_bad_values(name, text, why):
    given = [] if name in SOURCES else [M]
    line = problem(*given, f"--{name}={text}")
    assert line.startswith(f"--{name}={text!r}: {why}; allowed: ")
    example = line.rpartition("; write for example ")[2]
    if name not in ("help", "version"):
        parse([*given, example])  # what is proposed is accepted


def test_every_flag_has_been_given_badly():
    assert {flag.name for flag, _ in settings(Config())} | {"help", "version"} == set(BAD)


def test_each_default_can_be_written_as_it_is_shown():
    for flag, value in settings(Config()):
        if flag.name != "manifests":
            assert flag.kind.parse(flag.kind.show(value)) == value, flag.name


def test_configz_is_json_with_the_flags_names():
    shown = parse(
        [M, "--proxy-port-range=10+5", "--nodeport-addresses=::/0", "-v3", "--healthz-bind-address="]
    ).configz()
    assert json.loads(json.dumps(shown)) == {
        "userspaceproxy.config": {
            "manifests": ["m"],
            "kubeconfig": "",
            "master": "",
            "hostnameOverride": "",
            "stateDir": "",
            "configSyncPeriod": "15m0s",
            "kubeApiQps": 5.0,
            "kubeApiBurst": 10,
            "kubeApiContentType": "application/json",
            "capture": "auto",
            "bindAddress": "0.0.0.0",
            "proxyPortRange": "10-15",
            "nodeportAddresses": ["::/0"],
            "workers": 1,
            "udpTimeout": "250ms",
            "maxUdpFlows": 4096,
            "halfCloseTimeout": "5m0s",
            "maxEjectionTime": "10s",
            "splice": True,
            "drainTimeout": "5s",
            "iptablesSyncPeriod": "30s",
            "iptablesMinSyncPeriod": "1s",
            "healthzBindAddress": "",
            "metricsBindAddress": "127.0.0.1:10249",
            "bindAddressHardFail": False,
            "v": 3,
            "loggingFormat": "text",
            "cleanup": False,
        }
    }
