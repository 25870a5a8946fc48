"""What cannot be set together."""

from __future__ import annotations

import pytest

from tests.config.flags import M, problem
from userspace_proxy.config import Config, parse
from userspace_proxy.exceptions import ConfigError


@pytest.mark.parametrize("name", ["kubeconfig", "master"])
def test_there_is_one_source(name):
    assert problem(M, f"--{name}=x").startswith(f"--{name}='x': --manifests is given too; allowed: one source")
    assert getattr(parse([f"--{name}=x"]), name) == "x"
    assert parse([]) == Config(), "a pod's own cluster, which is looked for later"


@pytest.mark.parametrize("capture", ["auto", "iptables", "nftables"])
@pytest.mark.parametrize("ip", ["127.0.0.1", "127.0.0.53", "::1"])
def test_a_loopback_address_cannot_be_captured_to(capture, ip):
    line = problem(M, f"--capture={capture}", f"--bind-address={ip}")
    assert line.startswith(f"--bind-address='{ip}': traffic of other hosts and pods cannot be captured")
    assert line.endswith("write --capture=none or --bind-address=0.0.0.0")
    for without in ("local", "none"):
        assert parse([M, f"--capture={without}", f"--bind-address={ip}"]).bind_address == ip
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


@pytest.mark.parametrize(
    ("mode", "flag"),
    [("BridgeInterface", "--pod-bridge-interface"), ("InterfaceNamePrefix", "--pod-interface-name-prefix")],
)
def test_what_a_mode_needs(mode, flag):
    line = problem(M, f"--detect-local-mode={mode}")
    assert line == f"--detect-local-mode={mode!r}: needs {flag}, which is empty; set it"
    parse([M, f"--detect-local-mode={mode}", f"{flag}=veth"])


def test_a_place_in_the_config_file_is_called_by_its_name(tmp_path):
    file = tmp_path / "config"
    head = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
    file.write_text(head + "iptables: {syncPeriod: 1s, minSyncPeriod: 2s}\nclientConnection: {kubeconfig: /x}\n")
    with pytest.raises(ConfigError) as caught:
        parse([M, f"--config={file}"])
    source, period = caught.value.problems
    assert source.startswith(f"{file}: clientConnection.kubeconfig='/x': --manifests is given too")
    assert period.startswith(f"{file}: iptables.minSyncPeriod='2s': longer than {file}: iptables.syncPeriod (1s)")
