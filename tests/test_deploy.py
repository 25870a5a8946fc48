"""What is in deploy/: that a cluster would take it, that the program does, and that the rights in it are enough."""

from __future__ import annotations

import pathlib
import re
import shutil
import subprocess
import sys

import kubernetes_validate
import pytest
import yaml

from tests.netns import Namespace
from userspace_proxy.config import Config, parse

TOP = pathlib.Path(__file__).parent.parent
KUBERNETES = TOP / "deploy" / "kubernetes"
UNIT = TOP / "deploy" / "systemd" / "userspace-proxy.service"
KUBERNETES_VERSION = "1.34"
SERVICE = """\
{apiVersion: v1, kind: Service, metadata: {name: web}, spec: {clusterIP: 10.96.0.10, ports: [{port: 80}]}}
"""


def objects(name: str) -> list[dict]:
    return list(yaml.safe_load_all((KUBERNETES / name).read_text()))


@pytest.fixture
def container() -> dict:
    (daemonset,) = objects("daemonset.yaml")
    (found,) = daemonset["spec"]["template"]["spec"]["containers"]
    return found


def capabilities(container: dict) -> list[str]:
    return container["securityContext"]["capabilities"]["add"]


def test_a_pod_is_ended_only_for_what_that_helps(container):
    """What is not ready waits for the API server or the kernel, and serves what it can meanwhile."""
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    deadly = [container[probe]["httpGet"]["path"] for probe in ("startupProbe", "livenessProbe") if probe in container]
    assert set(deadly) == {"/livez"}


@pytest.mark.filterwarnings("ignore")  # of the validator's own making
def test_a_cluster_would_take_the_objects():
    found = [
        (path.name, item)
        for path in (KUBERNETES / "account.yaml", KUBERNETES / "daemonset.yaml")
        for item in objects(path.name)
    ]
    assert [item["kind"] for _, item in found] == ["ServiceAccount", "ClusterRoleBinding", "DaemonSet"]
    for _, item in found:
        kubernetes_validate.validate(item, KUBERNETES_VERSION, strict=True)


def test_what_is_named_is_there(container):
    kustomization = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())
    (generated,) = kustomization["configMapGenerator"]
    for name in (*kustomization["resources"], *generated["files"]):
        assert (KUBERNETES / name).is_file()
    (daemonset,) = objects("daemonset.yaml")
    spec = daemonset["spec"]["template"]["spec"]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert volumes.keys() == {mount["name"] for mount in container["volumeMounts"]}
    assert volumes["config"]["configMap"]["name"] == generated["name"]
    assert container["image"] == kustomization["images"][0]["name"]
    accounts = {item["metadata"]["name"] for item in objects("account.yaml") if item["kind"] == "ServiceAccount"}
    assert accounts == {spec["serviceAccountName"]}


def test_the_command_line_and_the_config_file_are_taken_without_a_word(container, tmp_path):
    """The file names the kubeconfig by its place in the container, where there is none here."""
    mount = next(m["mountPath"] for m in container["volumeMounts"] if m["name"] == "config")
    kubeconfig = tmp_path / "kubeconfig.yaml"
    shutil.copy(KUBERNETES / "kubeconfig.yaml", kubeconfig)
    (tmp_path / "config.yaml").write_text((KUBERNETES / "config.yaml").read_text().replace(mount, str(tmp_path)))
    arguments = [
        argument.replace(mount, str(tmp_path)).replace("$(NODE_NAME)", "node-1") for argument in container["args"]
    ]
    config = parse(arguments)
    assert isinstance(config, Config)
    assert config.notices == ()
    assert str(config.kubeconfig) == str(kubeconfig)
    assert config.hostname_override == "node-1"
    for probe in ("livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["port"] == config.healthz_bind_address[1]


def test_the_unit_runs_commands_that_there_are():
    lines = dict(line.split("=", 1) for line in UNIT.read_text().splitlines() if "=" in line and line[0] not in "#[")
    _, *arguments = lines["ExecStart"].split()
    assert arguments == ["--manifests", "/etc/userspace-proxy"]
    assert isinstance(parse([f"--manifests={TOP}"]), Config)
    assert lines["ExecStopPost"].endswith("userspace-proxy --cleanup")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_systemd_reads_the_unit(tmp_path):
    """With a program that is there in the place of the one that is installed."""
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/userspace-proxy/bin/userspace-proxy", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.privileged
@pytest.mark.parametrize("capture", ["iptables", "nftables", "local"])
def test_the_capabilities_are_enough(container, capture, tmp_path):
    log = log_of(tmp_path, capabilities(container), capture)
    assert "default/web" in log
    assert not {"WARNING", "ERROR"} & set(log.split())


@pytest.mark.privileged
@pytest.mark.parametrize(
    ("capture", "needed"), [("iptables", "NET_ADMIN"), ("iptables", "NET_RAW"), ("nftables", "NET_ADMIN")]
)
def test_and_none_of_them_is_for_nothing(container, capture, needed, tmp_path):
    log = log_of(tmp_path, [name for name in capabilities(container) if name != needed], capture)
    assert f"is not available: {capture}" in log


@pytest.mark.privileged
def test_low_ports_are_listened_on_with_a_capability_of_their_own(container, tmp_path):
    """What SYS_RESOURCE is for cannot be shown like this: how far a score may fall depends on who started the tests."""
    log = log_of(tmp_path, [name for name in capabilities(container) if name != "NET_BIND_SERVICE"], "local")
    assert re.search(r"WARNING.*10\.96\.0\.10", log), log


def log_of(directory: pathlib.Path, held: list[str], capture: str) -> str:
    """What a proxy with these capabilities says, in the time that it takes to be ready or to end."""
    wanted = ",".join(["-all", *(f"+{name.lower()}" for name in held)])
    (directory / "web.yaml").write_text(SERVICE)
    flags = f"--manifests={directory}/web.yaml --capture={capture} --drain-timeout=0s"
    with Namespace() as namespace:
        namespace.run("ip link set lo up")
        command = f"setpriv --bounding-set={wanted} {sys.executable} -m userspace_proxy {flags}"
        return namespace.run(f"timeout -s INT 2 {command}", check=False)
