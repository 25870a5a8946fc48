"""The wiring: everything meets, over real HTTP and real signals, with no capture and no root."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path

import pytest

from tests.apiserver import APIServer
from tests.e2e.node import endpoints, port, service
from tests.netns import eventually
from tests.proxy import Servers, echo
from tests.sources.cluster import NODE, node_object
from userspace_proxy.app import Signals


@pytest.mark.parametrize("stdout", [">/dev/full", ">&-", "| head -1"])
def test_a_standard_output_that_takes_nothing_ends_nobody(tmp_path: Path, stdout: str) -> None:
    (tmp_path / "m").mkdir()
    flags = f"--manifests={tmp_path}/m --capture=none --healthz-bind-address= --metrics-bind-address="
    command = f"exec 2>{tmp_path}/log; {sys.executable} -m userspace_proxy {flags} {stdout} & sleep 3; kill $!; wait $!"
    if "|" in stdout:
        command = (
            f"exec 2>{tmp_path}/log; (timeout 3 {sys.executable} -m userspace_proxy {flags}; echo $? >&2) {stdout}"
        )
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(["bash", "-c", command], timeout=30, check=False, env=buffered)
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log
    assert "SIGTERM: draining" in log
    assert done.returncode == 0
    for written in (["--help"], ["--version"]):
        with open("/dev/full", "w") as full:
            shown = subprocess.run(
                [sys.executable, "-m", "userspace_proxy", *written],
                stdout=full,
                stderr=subprocess.PIPE,
                check=False,
                env=buffered,
            )
        assert shown.stderr.startswith(b"userspace-proxy: standard output: No space left on device")


def test_sighup_before_there_is_a_source_is_no_end(run: Callable[[Coroutine[object, object, None]], None]) -> None:
    async def main() -> None:
        signals = Signals()
        signals.watch()
        os.kill(os.getpid(), signal.SIGHUP)
        await asyncio.sleep(0.05)
        asked = asyncio.Event()
        signals.reload = asked.set
        os.kill(os.getpid(), signal.SIGHUP)
        async with asyncio.timeout(5):
            await asked.wait()
        assert not signals.stop.is_set()
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().remove_signal_handler(number)

    run(main())


class Running:
    """The command on loopback, with admin ports that the kernel picks."""

    def __init__(self, directory: Path) -> None:
        self.manifest = directory / "all.json"
        self.source: tuple[str, ...] = ("--manifests", str(directory))
        self._log = directory.parent / "log"
        self.process: subprocess.Popen[bytes] | None = None

    def apply(self, *objects: object) -> None:
        new = self.manifest.with_name(".new")
        new.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))
        new.rename(self.manifest)

    def start(self, *flags: str, limit: int | None = None) -> None:
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *(("prlimit", f"--nofile={limit}:{limit}") if limit else ()),
                    *(sys.executable, "-m", "userspace_proxy", *self.source),
                    *("--capture=none", "--bind-address=127.0.0.1"),
                    *("--healthz-bind-address=127.0.0.1:0", "--metrics-bind-address=127.0.0.1:0", *flags),
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        eventually(lambda: self.log().count("bind-address: serving on http") == 2 and "SERVICE PORT" in self.log(), 20)

    def log(self) -> str:
        return self._log.read_text()

    def get(self, server: str, path: str) -> str:
        url = re.findall(rf"--{server}-bind-address: serving on (http://\S+)", self.log())[-1]
        try:
            with urllib.request.urlopen(url + path, timeout=5) as answer:
                return str(answer.read().decode())
        except urllib.error.HTTPError as error:
            with error:
                return error.read().decode()


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    directory = tmp_path / "manifests"
    directory.mkdir()
    made = Running(directory)
    yield made
    if made.process is not None and made.process.poll() is None:
        made.process.kill()
        made.process.wait()


def is_refused(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 5).close()
    except ConnectionRefusedError:
        return True
    return False


def test_everything_meets(running: Running) -> None:
    with Servers(echo) as endpoint:
        running.apply(service("web", "127.96.0.10", [port(80)]), endpoints("web", [f"127.0.0.1:{endpoint.address[1]}"]))
        running.start("--drain-timeout=20s")
        assert running.get("healthz", "/readyz") == "ok"
        assert "nodeEligible" in running.get("healthz", "/healthz")
        [row] = json.loads(running.get("metrics", "/services"))
        assert f"curl http://127.0.0.1:{row['proxyPort']}/" in running.log()
        with socket.create_connection(("127.0.0.1", row["proxyPort"]), 5) as client:
            client.sendall(b"hello")
            assert client.recv(5) == b"hello"
            [session] = json.loads(running.get("metrics", "/connections"))
            assert session["to_client"] == 5
            metrics = running.get("metrics", "/metrics")
            assert re.search(r'sessions_active\{.*service="web".*\} 1\.0', metrics)
            assert re.search(r'bytes_total\{direction="to_client".*\} 5\.0', metrics), "live bytes are counted"
            assert json.loads(running.get("metrics", "/configz"))["userspaceproxy.config"]["drainTimeout"] == "20s"
            assert running.process is not None
            running.process.send_signal(signal.SIGTERM)
            eventually(lambda: "draining" in running.get("healthz", "/readyz"))
            eventually(lambda: is_refused(row["proxyPort"]))  # load balancers hear first that no more are wanted
            client.sendall(b"still")
            assert client.recv(5) == b"still"
        assert running.process.wait(10) == 0


def test_refused_objects_are_counted_and_the_rest_is_served(running: Running) -> None:
    running.apply(
        service("good", "127.96.0.10", [port(80)]), service("bad", "not an address", [port(80)]), {"kind": "Service"}
    )
    running.start()
    assert [row["name"] for row in json.loads(running.get("metrics", "/services"))] == ["good"]
    assert "userspace_proxy_refused_objects 2.0" in running.get("metrics", "/metrics")


def test_a_change_of_a_manifest_is_served(running: Running) -> None:
    running.apply(service("one", "127.96.0.10", [port(80)]))
    running.start("--iptables-min-sync-period=0s")
    running.apply(service("two", "127.96.0.10", [port(80)]))
    eventually(lambda: [r["name"] for r in json.loads(running.get("metrics", "/services"))] == ["two"])


CONFIG = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
CONFIG += "healthzBindAddress: 127.0.0.1:0\nmetricsBindAddress: 127.0.0.1:0\nbindAddress: 127.0.0.1\noomScoreAdj: 0\n"


def test_a_change_of_the_config_file_starts_it_anew(running: Running, tmp_path: Path) -> None:
    config = tmp_path / "config.conf"
    config.write_text(CONFIG)
    with Servers(echo) as endpoint:
        running.apply(service("web", "127.96.0.10", [port(80)]), endpoints("web", [f"127.0.0.1:{endpoint.address[1]}"]))
        running.start(f"--config={config}", "--profiling", "--drain-timeout=20s")
        assert "--profiling is not looked at, as --config is given; write enableProfiling in" in running.log()
        assert "no such page" in running.get("metrics", "/debug/stacks")
        [before] = json.loads(running.get("metrics", "/services"))
        with socket.create_connection(("127.0.0.1", before["proxyPort"]), 5) as client:
            client.sendall(b"one")
            assert client.recv(3) == b"one"
            config.write_text(CONFIG + "portRange: x\n")
            eventually(lambda: "going on as before" in running.log())
            config.write_text(CONFIG + "enableProfiling: true\n")
            eventually(lambda: "has changed: draining, then starting anew" in running.log())
            client.sendall(b"two")
            assert client.recv(3) == b"two", "the end is an orderly one"
        eventually(lambda: running.log().count("serving on http") == 4 and running.log().count("SERVICE PORT") == 2, 20)
        assert running.process is not None
        assert running.process.poll() is None
        assert "in _end_on_change" in running.get("metrics", "/debug/stacks")
        [after] = json.loads(running.get("metrics", "/services"))
        with socket.create_connection(("127.0.0.1", after["proxyPort"]), 5) as client:
            client.sendall(b"three")
            assert client.recv(5) == b"three"
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(10) == 0


def test_a_change_of_the_config_file_while_the_api_server_is_away(running: Running, tmp_path: Path) -> None:
    """What it told last is served on."""
    config, kubeconfig = tmp_path / "config.conf", tmp_path / "kubeconfig"
    with APIServer() as api:
        api.put(service("web", "10.96.0.10", [port(80)]), endpoints("web", ["10.1.0.2:8080"]), node_object())
        kubeconfig.write_text(
            "{apiVersion: v1, kind: Config, users: [{name: u, user: {}}], current-context: c, "
            "contexts: [{name: c, context: {cluster: c, user: u}}], "
            f"clusters: [{{name: c, cluster: {{server: '{api.url}'}}}}]}}"
        )
        text = f"{CONFIG}clientConnection: {{kubeconfig: {kubeconfig}}}\n"
        config.write_text(text)
        running.source = (f"--hostname-override={NODE}",)
        running.start(f"--config={config}")
        api.away()
        for n in (1, 2):
            config.write_text(f"{text}udpIdleTimeout: {n}s\n")
            eventually(lambda n=n: running.log().count("SERVICE PORT") == n + 1, 60)
            [row] = json.loads(running.get("metrics", "/services"))
            assert row["endpoints"] == ["10.1.0.2:8080"]
            assert running.get("healthz", "/readyz") == "ok"


def test_a_signal_while_it_drains_for_a_change_is_the_end(running: Running, tmp_path: Path) -> None:
    config = tmp_path / "config.conf"
    config.write_text(CONFIG)
    with Servers(echo) as endpoint:
        running.apply(service("web", "127.96.0.10", [port(80)]), endpoints("web", [f"127.0.0.1:{endpoint.address[1]}"]))
        running.start(f"--config={config}", "--drain-timeout=60s")
        [row] = json.loads(running.get("metrics", "/services"))
        with socket.create_connection(("127.0.0.1", row["proxyPort"]), 5) as client:
            client.sendall(b"one")
            assert client.recv(3) == b"one"
            config.write_text(CONFIG + "enableProfiling: true\n")
            eventually(lambda: "draining" in running.log())
            assert running.process is not None
            running.process.send_signal(signal.SIGTERM)
            assert running.process.wait(20) == 0
    assert running.log().count("serving on http") == 2


def balanced(number: int) -> dict[str, object]:
    """A Service whose load balancer asks whether there are endpoints here."""
    made = service(f"web{number}", f"127.96.1.{number}", [port(80)])
    made["spec"] |= {"type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 31000 + number}
    return made


def test_health_checks_leave_descriptors_for_sessions(running: Running) -> None:
    with Servers(echo) as endpoint:
        found = endpoints("web1", [f"127.0.0.1:{endpoint.address[1]}"])
        running.apply(*(balanced(number) for number in range(1, 161)), found)
        running.start("--nodeport-addresses=127.0.0.1/32", limit=520)
        # 264 descriptors for all that listens, 64 of them for who asks: no room for 160 of the one and of the other.
        eventually(lambda: "no descriptors are left to listen on port 31" in running.log(), 20)
        assert running.process is not None
        assert len(os.listdir(f"/proc/{running.process.pid}/fd")) < 300
        rows = json.loads(running.get("metrics", "/services"))
        [proxy_port] = [row["proxyPort"] for row in rows if row["name"] == "web1" and row["state"] == "serving"]
        with socket.create_connection(("127.0.0.1", proxy_port), 5) as client:
            client.sendall(b"hello")
            assert client.recv(5) == b"hello"
