"""The command as a process: what it prints, where, and how it exits."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

import pytest

from tests.netns import Namespace, eventually
from userspace_proxy import __version__, cli
from userspace_proxy.app import Successor
from userspace_proxy.config import Config
from userspace_proxy.config.document import render
from userspace_proxy.exceptions import CaptureError, ConfigError
from userspace_proxy.sockets.base import LEAST_DESCRIPTORS


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "userspace_proxy", *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_help_and_version_are_on_stdout_and_fine() -> None:
    shown = command("--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "--manifests PATH" in shown.stdout
    shown = command("--version")
    assert (shown.returncode, shown.stdout) == (0, f"userspace-proxy {__version__}\n")


def test_every_mistake_is_told_at_once() -> None:
    shown = command("--capture=magic", "--udp-timeout=0", "--prox-port-range=1", "stray")
    assert shown.returncode == 2
    assert shown.stdout == ""
    lines = shown.stderr.splitlines()
    assert sum(line.startswith("userspace-proxy: ") for line in lines) >= 4
    assert "--proxy-port-range" in shown.stderr, "the nearest name is proposed"
    assert "Traceback" not in shown.stderr


def test_a_command_gets_the_arguments_after_its_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "COMMANDS", {"count": cli.Command("ARG...", "Count.", len)})
    assert cli.main(["count", "--help", "x"]) == 2
    assert cli.main(["--help", "count"]) == 0
    assert "userspace-proxy count ARG..." in capsys.readouterr().out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    shown = command("completion", shell)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "--metrics-bind-address"[2:] in shown.stdout
    assert "completion" in shown.stdout


def test_completion_for_a_shell_that_is_not_there() -> None:
    shown = command("completion", "tcsh")
    assert (shown.returncode, shown.stdout) == (2, "")
    assert shown.stderr.startswith("userspace-proxy: completion: 'tcsh'; allowed: bash, zsh, fish, one of them")


WEB = """\
{apiVersion: v1, kind: Service, metadata: {name: web-1, namespace: shop},
 spec: {clusterIP: 127.96.0.10, ports: [{name: http, port: 80}]}}
"""


def test_env_is_what_a_shell_takes(tmp_path: Path) -> None:
    (tmp_path / "web.yaml").write_text(WEB)
    done = command("env", "shop", f"--manifests={tmp_path}")
    assert (done.returncode, done.stderr) == (0, "")
    shell = subprocess.run(
        ["sh", "-euc", f'{done.stdout}echo "$WEB_1_SERVICE_HOST $WEB_1_SERVICE_PORT_HTTP $WEB_1_PORT_80_TCP"'],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shell.stdout == "127.96.0.10 80 tcp://127.96.0.10:80\n"
    assert command("env", f"--manifests={tmp_path}").stdout == "", "another namespace"


def test_env_without_an_api_server_that_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "FIRST_STATE", 0.2)
        assert cli.main(["env", f"--master=http://127.0.0.1:{silent.getsockname()[1]}"]) == 1
    assert "env: no state of the cluster within 0.2 s" in capsys.readouterr().err
    assert cli.main(["env", "shop", "--manifests=/not/there"]) == 2


def test_the_config_file_is_written_with_what_was_set(tmp_path: Path) -> None:
    file = tmp_path / "config.conf"
    shown = command("--write-config-to", str(file))
    assert (shown.returncode, shown.stdout, shown.stderr) == (0, "", "")
    assert file.read_text() == render(Config())
    shown = command(f"--write-config-to={file}", "--udp-timeout=2s", "--capture=none", "--masquerade-all")
    assert shown.returncode == 0
    assert file.read_text() == render(Config()).replace("250ms", "2s").replace(
        "masqueradeAll: false", "masqueradeAll: true"
    )
    assert "--masquerade-all: without effect" in shown.stderr
    assert "--capture: without a place in the file; to be given beside --config" in shown.stderr
    again = tmp_path / "again.conf"
    shown = command(f"--write-config-to={again}", f"--config={file}")
    assert again.read_text() == file.read_text(), "and what a file sets"
    shown = command(f"--write-config-to={again}", "--healthz-bind-address=")
    assert "--healthz-bind-address='': the file cannot say so; there it stands for the default" in shown.stderr
    shown = command(f"--write-config-to={tmp_path}/missing/file")
    assert shown.returncode == 1
    assert f"--write-config-to='{tmp_path}/missing/file': No such file or directory" in shown.stderr


def test_what_is_passed_over_in_a_file_is_told_beside_what_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "config.conf"
    file.write_text(render(Config()).replace("enableProfiling: false", "enableProfilin: true\noomScoreAdj: 1001"))
    shown = command(f"--config={file}", "--write-config-to=/dev/null", "--masquerade-all", "--log-dir=/tmp")
    assert shown.returncode == 2
    assert "no field 'enableProfilin' is known; did you mean enableProfiling?" in shown.stderr
    assert "oomScoreAdj: '1001': too large" in shown.stderr
    assert "--masquerade-all is not looked at" in shown.stderr
    assert "--log-dir: without effect" in shown.stderr


def test_a_config_file_that_is_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    shown = command(f"--config={tmp_path}/fifo")
    assert (shown.returncode, shown.stdout) == (2, "")
    assert f"--config='{tmp_path}/fifo': not a regular file; name a file that can be read" in shown.stderr


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    shown = command("--manifests", str(missing), "--capture=none", "--workers=0")
    assert shown.returncode == 2
    assert f"--manifests='{missing}': No such file or directory" in shown.stderr
    assert "--workers='0': too small" in shown.stderr, "with all else that is wrong"
    assert "serving on" not in shown.stderr
    assert "Traceback" not in shown.stderr


@pytest.mark.privileged
def test_an_admin_address_in_use_ends_it_where_that_is_asked_for(tmp_path: Path) -> None:
    flags = f"--manifests {tmp_path} --capture=none --metrics-bind-address= --healthz-bind-address=127.0.0.1:10256"
    with Namespace() as node:
        node.spawn(f"{sys.executable} -m http.server -b 127.0.0.1 10256")
        eventually(lambda: "10256" in node.run("ss -ltn"))
        said = node.run(f"{sys.executable} -m userspace_proxy {flags} --bind-address-hard-fail", check=False)
        assert "cannot listen on 127.0.0.1:10256" in said
        assert "--help" not in said, "no flag is mistaken"
        assert "Traceback" not in said


@pytest.mark.privileged
def test_without_root_auto_settles_for_local_and_iptables_says_what_is_missing() -> None:
    # Nobody cannot write to where coverage is measured either.
    nobody = "env -u COVERAGE_PROCESS_CONFIG setpriv --reuid=65534 --regid=65534 --clear-groups"
    # pytest's directories are its user's alone.
    with tempfile.TemporaryDirectory() as directory, Namespace() as node:
        Path(directory).chmod(0o755)
        flags = f"-m userspace_proxy --manifests {directory}"
        if node.run(f"{nobody} {sys.executable} -c 'import userspace_proxy.cli'", check=False):
            pytest.skip(f"nobody may not run {sys.executable}")
        said = node.run(f"sh -c '{nobody} {sys.executable} {flags} --capture=iptables; echo exit $?'")
        assert "run as root" in said
        assert "exit 1" in said
        said = node.run(f"sh -c '{nobody} timeout -s INT 3 {sys.executable} {flags}; echo exit $?'", check=False)
        assert "capture iptables does not work here" in said
        assert "capture nftables does not work here" in said
        assert "only addresses that this host has are served" in said
        assert "no service ports yet" in said


def test_faults_of_the_world_are_a_line_and_our_own_a_traceback(caplog: pytest.LogCaptureFixture) -> None:
    nested = ExceptionGroup("", [CaptureError("the table is gone"), ExceptionGroup("", [ZeroDivisionError("ours")])])
    assert cli._explain(nested) == 1
    expected, ours = caplog.records
    assert (expected.getMessage(), expected.exc_info) == ("the table is gone", None)
    assert ours.exc_info


def test_unusable_flags_found_late_are_exit_status_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli._explain(ExceptionGroup("", [ConfigError(["--manifests: gone"])])) == 2
    assert "userspace-proxy: --manifests: gone\n" in capsys.readouterr().err


def test_a_signal_while_it_starts_ends_it_in_order(tmp_path: Path) -> None:
    """The health server is up before anything is served."""
    flags = ["--manifests", str(tmp_path), "--capture=none", "--healthz-bind-address=127.0.0.1:0"]
    flags.append("--metrics-bind-address=")
    process = subprocess.Popen(
        [sys.executable, "-m", "userspace_proxy", *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        assert "serving on" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0


def test_nothing_of_a_former_proxy_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it has started it freezes what there is, and would so keep itself for ever."""

    class Proxy:
        def __init__(self) -> None:
            self.itself = self

    former: list[weakref.ref[Proxy]] = []
    alive: list[int] = []

    async def serve(this: Successor, _parse: object) -> Successor | None:
        alive.append(sum(each() is not None for each in former))
        former.append(weakref.ref(Proxy()))
        gc.freeze()
        return this if len(alive) < 3 else None

    monkeypatch.setattr(cli, "serve", serve)
    monkeypatch.setattr(cli.logs, "set_up", lambda *_: None)
    monkeypatch.setattr(cli, "answer_signals", lambda: None)
    assert cli._run(Config(), []) == 0
    assert alive == [0, 0, 0]


def test_a_change_that_could_not_be_started_with_is_no_change(tmp_path: Path) -> None:
    (tmp_path / "config").write_text(
        "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
        "clientConnection: {kubeconfig: /not/there}\n"
    )
    with pytest.raises(ConfigError, match="/not/there"):
        cli._parse_again([f"--config={tmp_path}/config"])


@pytest.mark.parametrize("most", [8, 16, LEAST_DESCRIPTORS - 1])
def test_with_too_few_descriptors_it_does_not_begin(tmp_path: Path, most: int) -> None:
    command = f"ulimit -n {most}; exec {sys.executable} -m userspace_proxy --capture none --manifests {tmp_path}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.endswith(
        f"ERROR   {most} open files allowed; needed: at least {LEAST_DESCRIPTORS}, and two for each connection; "
        "raise the limit (ulimit -n, LimitNOFILE)"
    )
