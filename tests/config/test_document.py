"""The config file: every field of it, good and bad; and what is written."""

from __future__ import annotations

import json
import textwrap

import hypothesis
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.config.flags import M
from userspace_proxy.config import Address, Config, PortRange, parse, settings
from userspace_proxy.config.document import not_kept, only_flags, read_document, render
from userspace_proxy.config.table import API_VERSION, FLAGS, as_document
from userspace_proxy.config.unused import LocalMode
from userspace_proxy.exceptions import ConfigError

HEAD = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"

DEFAULTS = """\
apiVersion: kubeproxy.config.k8s.io/v1alpha1
bindAddress: 0.0.0.0
bindAddressHardFail: false
clientConnection:
  acceptContentTypes: ""
  burst: 10
  contentType: application/vnd.kubernetes.protobuf
  kubeconfig: ""
  qps: 5
clusterCIDR: ""
configSyncPeriod: 15m0s
conntrack:
  maxPerCore: 32768
  min: 131072
  tcpCloseWaitTimeout: 1h0m0s
  tcpEstablishedTimeout: 24h0m0s
detectLocal:
  bridgeInterface: ""
  interfaceNamePrefix: ""
detectLocalMode: ""
enableProfiling: false
healthzBindAddress: 0.0.0.0:10256
hostnameOverride: ""
iptables:
  masqueradeAll: false
  masqueradeBit: 14
  minSyncPeriod: 1s
  syncPeriod: 30s
ipvs:
  excludeCIDRs: null
  minSyncPeriod: 0s
  scheduler: ""
  strictARP: false
  syncPeriod: 30s
  tcpFinTimeout: 0s
  tcpTimeout: 0s
  udpTimeout: 0s
kind: KubeProxyConfiguration
metricsBindAddress: 127.0.0.1:10249
mode: ""
nodePortAddresses: null
oomScoreAdj: -999
portRange: ""
showHiddenMetricsForVersion: ""
udpIdleTimeout: 250ms
winkernel:
  enableDSR: false
  forwardHealthCheckVip: false
  networkName: ""
  rootHnsEndpointName: ""
  sourceVip: ""
"""
KUBEADM = """\
apiVersion: kubeproxy.config.k8s.io/v1alpha1
bindAddress: 0.0.0.0
bindAddressHardFail: false
clientConnection:
  acceptContentTypes: ""
  burst: 0
  contentType: ""
  kubeconfig: /var/lib/kube-proxy/kubeconfig.conf
  qps: 0
clusterCIDR: 10.244.0.0/16
configSyncPeriod: 0s
conntrack:
  maxPerCore: null
  min: null
  tcpCloseWaitTimeout: null
  tcpEstablishedTimeout: null
detectLocal:
  bridgeInterface: ""
  interfaceNamePrefix: ""
detectLocalMode: ""
enableProfiling: false
healthzBindAddress: ""
hostnameOverride: ""
iptables:
  localhostNodePorts: null
  masqueradeAll: false
  masqueradeBit: null
  minSyncPeriod: 0s
  syncPeriod: 0s
ipvs:
  excludeCIDRs: null
  minSyncPeriod: 0s
  scheduler: ""
  strictARP: false
  syncPeriod: 0s
  tcpFinTimeout: 0s
  tcpTimeout: 0s
  udpTimeout: 0s
kind: KubeProxyConfiguration
logging:
  flushFrequency: 0
  options:
    json:
      infoBufferSize: "0"
  verbosity: 0
metricsBindAddress: ""
mode: ""
nodePortAddresses: null
oomScoreAdj: null
portRange: ""
showHiddenMetricsForVersion: ""
winkernel:
  enableDSR: false
  forwardHealthCheckVip: false
  networkName: ""
  rootHnsEndpointName: ""
  sourceVip: ""
"""


def read(body: str, *, head: str = HEAD):
    return read_document(head + textwrap.dedent(body), "kp.yaml")


def in_yaml(place: str, value: str) -> str:
    section, _, name = place.rpartition(".")
    return f"{section}:\n  {name}: {value}\n" if section else f"{name}: {value}\n"


def test_the_defaults_as_they_are_written():
    assert render(Config()) == DEFAULTS


def test_what_is_written_is_read_back():
    argv = (
        "--bind-address=:: --proxy-port-range=10-20 --nodeport-addresses=10.0.0.0/8,::/0 --feature-gates=SCTPSupport=f"
    )
    argv += " --oom-score-adj=0 --kube-api-qps=2.5 --udp-timeout=1m --healthz-bind-address=[::1]:7 --cluster-cidr=::/0"
    config = parse([*argv.split(), "--proxy-mode=userspace", "--hostname-override=yes", "--conntrack-min=0"])
    text = render(config)
    assert 'hostnameOverride: "yes"\n' in text or "hostnameOverride: 'yes'\n" in text
    assert "nodePortAddresses:\n- 10.0.0.0/8\n- ::/0\n" in text
    found = read_document(text, "kp.yaml")
    assert (found.problems, found.notices) == ([], [])
    set_there = {flag.name: value for flag, value in settings(config) if flag.place}
    read_there = {name: found.values.get(name, flag_default(name)) for name in set_there}
    assert read_there == set_there


def flag_default(name: str):
    return {flag.name: value for flag, value in settings(Config())}[name]


def test_json_is_read_as_well():
    found = read_document(json.dumps(as_document(Config())), "kp.json")
    assert (found.problems, found.notices) == ([], [])
    assert {name: value for name, value in found.values.items() if value != flag_default(name)} == {}


def test_flags_without_a_place_are_told():
    config = parse([M, "--capture=none", "--udp-timeout=1s", "-v2"])
    assert only_flags(config) == ["manifests", "capture", "v"]


GOOD = {
    "bindAddress": {"192.0.2.1": "192.0.2.1", '"::"': "::"},
    "bindAddressHardFail": {"true": True, "yes": True},
    "clientConnection.acceptContentTypes": {"application/json": "application/json"},
    "clientConnection.burst": {"20": 20},
    "clientConnection.contentType": {"application/json": "application/json"},
    "clientConnection.kubeconfig": {"/var/lib/kube-proxy/kubeconfig.conf": "/var/lib/kube-proxy/kubeconfig.conf"},
    "clientConnection.qps": {"7": 7.0, "2.5": 2.5, "1e3": 1000.0, "1.0e-07": 1e-7, "-1e+2": -100.0},
    "clusterCIDR": {"10.0.0.0/8,fd00::/8": ("10.0.0.0/8", "fd00::/8")},
    "configSyncPeriod": {"1m": 60.0},
    "conntrack.maxPerCore": {"0": 0, "5": 5},
    "conntrack.min": {"0": 0},
    "conntrack.tcpCloseWaitTimeout": {"0s": 0.0, "1h": 3600.0},
    "conntrack.tcpEstablishedTimeout": {"0": 0.0, "25h": 90000.0},
    "detectLocal.bridgeInterface": {"cni0": "cni0"},
    "detectLocal.interfaceNamePrefix": {"veth": "veth"},
    "detectLocalMode": {"NodeCIDR": LocalMode.NODE_CIDR},
    "enableProfiling": {"true": True},
    "featureGates": {"{SCTPSupport: true, AllAlpha: false}": (("SCTPSupport", True), ("AllAlpha", False))},
    "healthzBindAddress": {"127.0.0.1": Address("127.0.0.1", 10256), '"[::1]:1"': Address("::1", 1)},
    "hostnameOverride": {"Node-1": "node-1"},
    "iptables.masqueradeAll": {"true": True},
    "iptables.masqueradeBit": {"0": 0, "31": 31},
    "iptables.minSyncPeriod": {"2s": 2.0},
    "iptables.syncPeriod": {"1m0s": 60.0},
    "ipvs.excludeCIDRs": {"[10.0.0.0/8]": ("10.0.0.0/8",)},
    "ipvs.minSyncPeriod": {"5s": 5.0},
    "ipvs.scheduler": {"rr": "rr"},
    "ipvs.strictARP": {"true": True},
    "ipvs.syncPeriod": {"5s": 5.0},
    "ipvs.tcpFinTimeout": {"5s": 5.0},
    "ipvs.tcpTimeout": {"5s": 5.0},
    "ipvs.udpTimeout": {"5s": 5.0},
    "metricsBindAddress": {"0.0.0.0:1": Address("0.0.0.0", 1)},
    "mode": {"userspace": "userspace"},
    "nodePortAddresses": {'[10.0.0.0/8, "::/0"]': ("10.0.0.0/8", "::/0")},
    "oomScoreAdj": {"0": 0, "-1000": -1000},
    "portRange": {"10-20": PortRange(10, 20), '"10"': PortRange(10, 10)},
    "showHiddenMetricsForVersion": {'"1.24"': "1.24"},
    "udpIdleTimeout": {"2s": 2.0},
    "winkernel.enableDSR": {"true": True},
    "winkernel.forwardHealthCheckVip": {"true": True},
    "winkernel.networkName": {"net": "net"},
    "winkernel.rootHnsEndpointName": {"end": "end"},
    "winkernel.sourceVip": {"192.0.2.1": "192.0.2.1"},
}
ZERO = {
    "bindAddress": '""',
    "clientConnection.burst": "0",
    "clientConnection.contentType": '""',
    "clientConnection.qps": "0",
    "configSyncPeriod": "0s",
    "healthzBindAddress": '""',
    "iptables.minSyncPeriod": "0s",
    "iptables.syncPeriod": "0",
    "ipvs.syncPeriod": "0s",
    "metricsBindAddress": '""',
    "nodePortAddresses": "[]",
    "portRange": '""',
    "udpIdleTimeout": "0",
}
NAMES = {flag.place: name for name, flag in FLAGS.items() if flag.place}


def test_every_field_is_in_the_table():
    assert set(GOOD) == set(NAMES)


@pytest.mark.parametrize(("place", "text", "value"), [(p, t, v) for p, each in GOOD.items() for t, v in each.items()])
def test_good_values(place, text, value):
    found = read(in_yaml(place, text))
    assert (found.problems, found.notices) == ([], [])
    assert found.values == {NAMES[place]: value}
    assert type(found.values[NAMES[place]]) is type(value)


@pytest.mark.parametrize("place", GOOD)
@pytest.mark.parametrize("text", ["null", "~", ""])
def test_null_is_the_default(place, text):
    found = read(in_yaml(place, text))
    assert (found.values, found.problems, found.notices) == ({}, [], [])


@pytest.mark.parametrize(("place", "text"), ZERO.items())
def test_what_go_cannot_tell_from_nothing_is_the_default(place, text):
    found = read(in_yaml(place, text))
    assert (found.values, found.problems, found.notices) == ({}, [], [])


WRONG = {
    "bindAddress": {"localhost": "'localhost': not an IP address", "5": "'5': not a string, in quotes"},
    "bindAddressHardFail": {
        '"true"': "'true': not true or false, without quotes",
        "1": "'1': not true or false",
        "!!bool maybe": "'maybe': not true or false",
    },
    "clientConnection.burst": {
        "-1": "'-1': too small",
        "2.5": "'2.5': not a whole number",
        "!!int _": "'_': not a whole number",
        '"5"': "'5': not a whole",
    },
    "clientConnection.qps": {"fast": "'fast': not a number", '"5"': "'5': not a number"},
    "conntrack.min": {"-1": "'-1': too small"},
    "enableProfiling": {"[true]": "not true or false, without quotes"},
    "featureGates": {
        "[SCTPSupport]": "not a mapping",
        "{SCTPSupport: on and on}": "not true or false, without quotes",
        "{SctpSupport: true}": "there is no feature gate 'SctpSupport'; did you mean SCTPSupport?",
    },
    "iptables.syncPeriod": {"30": "'30': not a string, in quotes", "-1s": "'-1s': too short"},
    "mode": {"ipvs": "'ipvs': there the kernel spreads the load"},
    "nodePortAddresses": {"10.0.0.0/8": "'10.0.0.0/8': not a list", "[10.0.0.1]": "'10.0.0.1': a bare address"},
    "oomScoreAdj": {"1001": "'1001': too large"},
    "showHiddenMetricsForVersion": {"1.24": "'1.24': not a string, in quotes"},
    "udpIdleTimeout": {"1d": "'1d': not a duration", "{s: 1}": "not a string"},
}


@pytest.mark.parametrize(("place", "text", "why"), [(p, t, w) for p, each in WRONG.items() for t, w in each.items()])
def test_bad_values(place, text, why):
    found = read(in_yaml(place, text))
    (line,) = found.problems
    assert line.startswith(f"kp.yaml:{4 if '.' in place else 3}: {place}: {why}")
    assert found.values == {}
    assert found.unusable == {NAMES[place]}
    example = line.rpartition("; write for example ")[2]
    again = read(f"{place.partition('.')[0]}:\n  {example}\n" if "." in place else example)
    assert again.problems == [], "what is proposed is accepted"


@pytest.mark.parametrize("place", GOOD)
def test_the_example_of_each_field_is_accepted(place):
    (line,) = read(in_yaml(place, "{a: {b: c}}")).problems
    example = line.rpartition("; write for example ")[2]
    again = read(f"{place.partition('.')[0]}:\n  {example}\n" if "." in place else example)
    assert (again.problems, len(again.values) + len(again.notices)) == ([], 1)


def test_a_config_map_as_kubeadm_makes_it():
    """It says next to nothing, in many words; some of them are for other versions."""
    found = read_document(KUBEADM, "kp.yaml")
    assert found.values == {
        "kubeconfig": "/var/lib/kube-proxy/kubeconfig.conf",
        "cluster-cidr": ("10.244.0.0/16",),
        **{name: flag_default(name) for name in found.values if name not in ("kubeconfig", "cluster-cidr")},
    }
    assert found.problems == []
    assert [line.partition(" is known")[0] for line in found.notices] == [
        "kp.yaml:25: no field 'iptables.localhostNodePorts'",
        "kp.yaml:40: no field 'logging'",
    ]


def test_unknown_fields_are_told_with_their_line_and_the_nearest_name():
    found = read("""\
        udpTimeout: 1s
        iptables:
          syncperiod: 1s
          udpIdleTimeout: 1s
        syncPeriod: 1s
        conntrak: {}
        logging: {flushFrequency: 0}
        """)
    assert (found.values, found.problems) == ({}, [])
    assert found.notices == [
        "kp.yaml:3: no field 'udpTimeout' is known; did you mean udpIdleTimeout?; passed over",
        "kp.yaml:5: no field 'iptables.syncperiod' is known; did you mean iptables.syncPeriod?; passed over",
        "kp.yaml:6: no field 'iptables.udpIdleTimeout' is known; did you mean udpIdleTimeout?; passed over",
        "kp.yaml:7: no field 'syncPeriod' is known; did you mean configSyncPeriod?; passed over",
        "kp.yaml:8: no field 'conntrak' is known; did you mean conntrack?; passed over",
        "kp.yaml:9: no field 'logging' is known; passed over",
    ]


def test_of_duplicate_fields_the_last_counts_and_that_is_told():
    found = read("udpIdleTimeout: 1s\noomScoreAdj: 1\nudpIdleTimeout: 2s\niptables: {syncPeriod: 1m, syncPeriod: 2m}\n")
    assert found.values == {"udp-timeout": 2.0, "oom-score-adj": 1, "iptables-sync-period": 120.0}
    assert found.notices == [
        "kp.yaml:5: udpIdleTimeout is in line 3 already; what comes last counts",
        "kp.yaml:6: iptables.syncPeriod is in line 6 already; what comes last counts",
    ]
    found = read("featureGates:\n  SCTPSupport: true\n  SCTPSupport: false\n")
    assert dict(found.values["feature-gates"]) == {"SCTPSupport": False}
    assert found.notices == ["kp.yaml:5: featureGates.SCTPSupport is in line 4 already; what comes last counts"]
    assert read("udpIdleTimeout: 1s\nudpIdleTimeout: null\n").values == {}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "kp.yaml: not a mapping; allowed: a KubeProxyConfiguration"),
        ("- 1", "kp.yaml: not a mapping"),
        ("udpIdleTimeout", "kp.yaml: not a mapping"),
        ("a: [", "kp.yaml:1: not YAML: "),
        ("a: b\n\tc: d", "kp.yaml:2: not YAML: "),
        (
            "bindAddress: ::",
            "kp.yaml:1: not YAML: mapping values are not allowed here; an address such as :: needs quotes",
        ),
        (f"{HEAD}---\n{HEAD}", "kp.yaml:3: not YAML: but found another document"),
        ("\x00", "kp.yaml: not YAML: "),
        ("[" * 5000, "kp.yaml: nested too deeply"),
    ],
)
def test_what_is_no_such_document(text, problem):
    (line,) = read_document(text, "kp.yaml").problems
    assert line.startswith(problem)


def test_what_it_is_must_be_told():
    found = read("udpIdleTimeout: 0x\n", head="kind: KubeletConfiguration\n")
    assert found.problems == [
        f"kp.yaml: no apiVersion; allowed: {API_VERSION}; write apiVersion: {API_VERSION}",
        "kp.yaml:1: kind: 'KubeletConfiguration'; allowed: KubeProxyConfiguration; write it so",
    ]
    (line,) = read("", head=HEAD.replace("v1alpha1", "v1")).problems
    assert line.startswith("kp.yaml:1: apiVersion: 'kubeproxy.config.k8s.io/v1'; allowed: ")


def test_all_problems_at_once():
    found = read("udpIdleTimeout: 0x\noomScoreAdj: big\niptables: 5\nipvs:\n  syncPeriod: 1\nmode: ''\n")
    assert [line.partition(": ")[2].partition(":")[0] for line in found.problems] == [
        "udpIdleTimeout",
        "oomScoreAdj",
        "iptables",
        "ipvs.syncPeriod",
    ]


DURATIONS = st.integers(10**9, 2**63 - 1).map(lambda ns: f"{ns}ns") | st.sampled_from(["0", "1.5s", "2h45m"])
TEXTS: dict[str, st.SearchStrategy[str]] = {
    "kube-api-qps": st.floats(allow_nan=False, allow_infinity=False, width=32).map(str)
    | st.sampled_from(["0", "0.0000001", "1e3", "-1", ".5"]),
    "kube-api-burst": st.integers(0, 2**31 - 1).map(str),
    "iptables-sync-period": DURATIONS,
    "iptables-min-sync-period": DURATIONS,
    "conntrack-tcp-timeout-established": DURATIONS,
    "ipvs-sync-period": DURATIONS,
    "oom-score-adj": st.integers(-1000, 1000).map(str),
    "healthz-bind-address": st.sampled_from(["", "::", "192.0.2.1:0", "[::1]:1"]),
    "metrics-port": st.sampled_from(["0", "1"]),
    "proxy-port-range": st.sampled_from(["", "0", "7", "7+3", "7-9"]),
    "kubeconfig": st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=9),
    "ipvs-scheduler": st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=9),
    "kube-api-content-type": st.sampled_from(["", "0", "true", "null", "1e3"]),
    "cluster-cidr": st.sampled_from(["", "10.0.0.0/8", "::/0,10.0.0.0/8"]),
    "nodeport-addresses": st.sampled_from(["", "10.0.0.0/8", "::/0,10.0.0.0/8"]),
    "feature-gates": st.sampled_from(["", "SCTPSupport=false", "SCTPSupport=t,AllBeta=f,SCTPSupport=f"]),
    "profiling": st.sampled_from(["true", "false"]),
}


@hypothesis.settings(deadline=None)
@given(st.fixed_dictionaries({}, optional=TEXTS))
def test_what_is_written_is_read_back_or_told(texts):
    """Two that cannot be set together need not be."""
    try:
        config = parse([f"--{name}={text}" for name, text in texts.items()])
    except ConfigError as error:
        assert all("longer than" in each or "too short" in each or "blanks" in each for each in error.problems)  # noqa: PT017
        return
    found = read_document(render(config), "kp.yaml")
    assert (found.problems, found.notices) == ([], [])
    lost = {notice.partition("=")[0].removeprefix("--") for notice in not_kept(config)}
    assert lost <= {"iptables-min-sync-period", "ipvs-sync-period", "healthz-bind-address", "metrics-bind-address"} | {
        "kube-api-content-type"
    }
    for flag, value in settings(config):
        if flag.place and flag.name not in lost:
            assert flag.kind.as_json(found.values.get(flag.name, flag_default(flag.name))) == flag.kind.as_json(value)


def test_what_the_file_cannot_say_is_told():
    config = parse([M, "--iptables-min-sync-period=0", "--metrics-port=0", "--kube-api-qps=0", "--kube-api-burst=0"])
    assert not_kept(config) == [
        "--iptables-min-sync-period='0s': the file cannot say so; there it stands for the default",
        "--metrics-bind-address='': the file cannot say so; there it stands for the default",
    ]
    assert not_kept(Config()) == []


FIELDS = st.sampled_from([*NAMES, *(place.partition(".")[0] for place in NAMES), "x", "apiVersion"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(FIELDS | SCALARS, inner), max_leaves=6)


@given(st.dictionaries(FIELDS, VALUES, max_size=4))
def test_whatever_is_in_it_is_read_or_told(content):
    found = read_document(HEAD + yaml.safe_dump(content), "kp.yaml")
    assert all(line.startswith("kp.yaml") and "\n" not in line for line in (*found.problems, *found.notices))
    for name, value in found.values.items():
        assert FLAGS[name].kind.parse(FLAGS[name].kind.show(value)) == value


@given(st.text(max_size=40) | st.text(alphabet="{}[]:,&*!|>-?'\"\n ab", max_size=30))
def test_whatever_a_file_holds_is_told_in_a_line(text):
    found = read_document(text, "kp.yaml")
    assert found.problems
    assert all("\n" not in line for line in found.problems)
