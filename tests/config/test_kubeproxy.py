"""Each flag that does what it does with kube-proxy: its default, good values and bad."""

from __future__ import annotations

import pathlib

import pytest

from tests.config.flags import accepted, by_default, cases, declared, refused
from userspace_proxy.config import Address, PortRange
from userspace_proxy.config.kubeproxy import KubeProxySettings


def test_defaults():
    assert by_default(KubeProxySettings) == {
        "config": None,
        "kubeconfig": "",
        "master": "",
        "hostname_override": "",
        "config_sync_period": 900.0,
        "kube_api_qps": 5.0,
        "kube_api_burst": 10,
        "bind_address": "0.0.0.0",
        "proxy_port_range": None,
        "nodeport_addresses": (),
        "cluster_cidr": (),
        "udp_timeout": 0.25,
        "iptables_sync_period": 30.0,
        "iptables_min_sync_period": 1.0,
        "healthz_bind_address": Address("0.0.0.0", 10256),
        "metrics_bind_address": Address("127.0.0.1", 10249),
        "bind_address_hard_fail": False,
        "profiling": False,
        "verbosity": 0,
        "conntrack_max_per_core": 32768,
        "conntrack_min": 131072,
        "conntrack_tcp_timeout_established": 86400.0,
        "conntrack_tcp_timeout_close_wait": 3600.0,
        "oom_score_adj": -999,
        "proxy_mode": "",
        "feature_gates": (),
        "write_config_to": None,
        "cleanup": False,
    }


GOOD = [
    (["--hostname-override", " Node-1 "], "hostname_override", "node-1"),
    (["--config-sync-period=1m"], "config_sync_period", 60.0),
    (["--kube-api-qps=2.5"], "kube_api_qps", 2.5),
    (["--kube-api-qps=-1"], "kube_api_qps", -1.0),
    (["--kube-api-qps=1e3"], "kube_api_qps", 1000.0),
    (["--kube-api-qps=0"], "kube_api_qps", 5.0),
    (["--kube-api-burst=0"], "kube_api_burst", 10),
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
    (["--udp-timeout=1ms"], "udp_timeout", 0.001),
    (["--udp_timeout", "1m"], "udp_timeout", 60.0),
    (["--nodeport-addresses="], "nodeport_addresses", ()),
    (
        ["--nodeport-addresses=10.1.2.3/8,::1/128", "--nodeport-addresses", "127.0.0.0/8"],
        "nodeport_addresses",
        ("10.0.0.0/8", "::1/128", "127.0.0.0/8"),
    ),
    (["--cluster-cidr="], "cluster_cidr", ()),
    (["--cluster-cidr=10.1.0.0/16"], "cluster_cidr", ("10.1.0.0/16",)),
    (["--cluster-cidr", "10.0.0.0/8,fd00::/8"], "cluster_cidr", ("10.0.0.0/8", "fd00::/8")),
    (["--cluster-cidr=fd00::/8,10.0.0.0/8"], "cluster_cidr", ("fd00::/8", "10.0.0.0/8")),
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
    (["--cleanup"], "cleanup", True),
    (["-v=10"], "verbosity", 10),
    (["-v", "4"], "verbosity", 4),
    (["-v2"], "verbosity", 2),
    (["--v=1", "--v=3"], "verbosity", 3),
    (["--config="], "config", None),
    (["--profiling"], "profiling", True),
    (["-v=99"], "verbosity", 99),
    (["--conntrack-max-per-core=0"], "conntrack_max_per_core", 0),
    (["--conntrack-min", "1"], "conntrack_min", 1),
    (["--conntrack-tcp-timeout-established=0"], "conntrack_tcp_timeout_established", 0.0),
    (["--conntrack-tcp-timeout-close-wait=1h30m"], "conntrack_tcp_timeout_close_wait", 5400.0),
    (["--oom-score-adj=-1000"], "oom_score_adj", -1000),
    (["--oom-score-adj", "0"], "oom_score_adj", 0),
    (["--proxy-mode="], "proxy_mode", ""),
    (["--proxy-mode", "userspace"], "proxy_mode", "userspace"),
    (["--feature-gates="], "feature_gates", ()),
    (
        ["--feature-gates=SCTPSupport=true, AllAlpha=0", "--feature_gates", "SCTPSupport=F"],
        "feature_gates",
        (("SCTPSupport", True), ("AllAlpha", False), ("SCTPSupport", False)),
    ),
    (["--write-config-to=/x"], "write_config_to", pathlib.Path("/x")),
    (["--healthz-port=1"], "healthz_bind_address", Address("0.0.0.0", 1)),
    (["--healthz-port=0"], "healthz_bind_address", None),
    (["--healthz-port=1", "--healthz-bind-address=::1"], "healthz_bind_address", Address("::1", 1)),
    (["--healthz-port=1", "--healthz-bind-address=[::1]:2"], "healthz_bind_address", Address("::1", 2)),
    (["--healthz-port=0", "--healthz-bind-address=[::1]:2"], "healthz_bind_address", Address("::1", 2)),
    (["--metrics-port=0"], "metrics_bind_address", None),
    (["--metrics-port=65535"], "metrics_bind_address", Address("127.0.0.1", 65535)),
]
BAD = {
    "kubeconfig": {" x": "blanks around it"},
    "master": {"ftp://192.0.2.1": "ftp is not spoken by API servers", "x ": "blanks around it"},
    "hostname-override": {"  ": "only blanks"},
    "config-sync-period": {"0": "too short", "999ms": "too short", "900": "900 has no unit"},
    "kube-api-qps": {"": "not a number", "five": "not a number", "1e39": "too large", "nan": "not a number"},
    "kube-api-burst": {"-1": "too small", "2.5": "not a whole number"},
    "bind-address": {
        "localhost": "not an IP address",
        "1.2.3.4:80": "not an IP address",
        "10.0.0.0/8": "not an IP address",
        "fe80::1%eth0": "an address with a zone",
        "224.0.0.1": "a multicast address",
        "ff02::1": "a multicast address",
        "255.255.255.255": "the broadcast address",
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
        "999us": "too short",
        "-1s": "too short",
        "250": "250 has no unit",
        "fast": "not a duration",
        "": "not a duration",
    },
    "nodeport-addresses": {
        "192.0.2.1": "'192.0.2.1': a bare address; write 192.0.2.1/32",
        "::1": "'::1': a bare address; write ::1/128",
        "10.0.0.0/8,,": "'': not an IP address",
        "10.0.0.0/40": "'10.0.0.0/40': 40 is no prefix length of this family",
    },
    "cluster-cidr": {
        "10.0.0.0": "'10.0.0.0': a bare address; write 10.0.0.0/32",
        "10.0.0.0/8,11.0.0.0/8": "both of one address family",
        "10.0.0.0/8,fd00::/8,fd01::/16": "3 networks",
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
    "iptables-sync-period": {
        "0s": "too short",
        "99ms": "too short",
        "-30s": "too short",
        "30": "30 has no unit",
        "1d": "not a duration",
    },
    "iptables-min-sync-period": {"-1s": "too short", "1": "1 has no unit"},
    "v": {"-1": "too small", "2147483648": "too large", "debug": "not a whole number"},
    "cleanup": {"maybe": "neither true nor false"},
    "profiling": {"full": "neither true nor false"},
    "conntrack-max-per-core": {"-1": "too small", "lots": "not a whole number"},
    "conntrack-min": {"-1": "too small", "2147483648": "too large"},
    "conntrack-tcp-timeout-established": {"-1s": "too short", "86400": "86400 has no unit"},
    "conntrack-tcp-timeout-close-wait": {"-1s": "too short", "1d": "not a duration"},
    "oom-score-adj": {"-1001": "too small", "1001": "too large", "": "not a whole number"},
    "proxy-mode": {
        "iptables": "there the kernel spreads the load, and that is kube-proxy's; this program relays by itself",
        "ipvs": "there the kernel spreads the load, and that is kube-proxy's; this program relays by itself",
        "kernelspace": "that is kube-proxy's on Windows",
        "Userspace": "no such mode",
        " userspace": "no such mode",
    },
    "feature-gates": {
        "SCTPSupport": "'SCTPSupport' has no '='",
        "SCTPSupport=yes": "'SCTPSupport=yes' is neither true nor false",
        "SCTPSuport=true": "there is no feature gate 'SCTPSuport'; did you mean SCTPSupport?",
        "=true": "there is no feature gate ''",
    },
    "healthz-port": {"-1": "too small", "65536": "too large"},
    "metrics-port": {"http": "not a whole number"},
}


@pytest.mark.parametrize(("argv", "field", "value"), GOOD, ids=[" ".join(argv) for argv, _, _ in GOOD])
def test_good_values(argv, field, value):
    accepted(argv, field, value)


@pytest.mark.parametrize(("name", "text", "why"), cases(BAD))
def test_bad_values(name, text, why):
    refused(name, text, why)


def test_every_flag_that_can_be_has_been_given_badly():
    any_path = {"config", "write-config-to"}
    assert set(BAD) == declared(KubeProxySettings) - any_path | {"healthz-port", "metrics-port"}
