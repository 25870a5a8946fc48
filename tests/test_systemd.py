"""What a supervisor hears: real datagrams on a real socket, of the module and of the whole command."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from userspace_proxy.systemd import Supervisor


class Listener:
    def __init__(self, address: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.settimeout(20)
        self.sock.bind(address)

    def hear(self) -> dict[str, str]:
        return dict(line.split("=", 1) for line in self.sock.recv(4096).decode().splitlines())

    def hear_until(self, name: str) -> dict[str, str]:
        while name not in (heard := self.hear()):
            pass
        return heard

    def hears_nothing(self) -> bool:
        self.sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            return not self.sock.recv(4096)
        return True


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[Listener]:
    made = Listener(str(tmp_path / "notify"))
    with made.sock:
        yield made


def supervisor(listener: Listener, **environment: str) -> Supervisor:
    return Supervisor({"NOTIFY_SOCKET": listener.sock.getsockname(), **environment}, 42)


def test_each_state_is_told_in_the_words_of_sd_notify(listener: Listener) -> None:
    told = supervisor(listener)
    told.ready()
    assert listener.hear() == {"READY": "1"}
    before = time.monotonic_ns() // 1000
    told.reloading()
    heard = listener.hear()
    assert heard["RELOADING"] == "1"
    assert before <= int(heard["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
    told.reloaded()
    assert listener.hear() == {"READY": "1"}
    told.status("serving")
    assert listener.hear() == {"STATUS": "serving"}
    told.status("serving")
    told.stopping()
    assert listener.hear() == {"STOPPING": "1"}, "a status that is the same is not told again"


def test_what_is_not_ready_is_not_made_so_by_a_reload(listener: Listener) -> None:
    told = supervisor(listener)
    told.reloading()
    told.reloaded()
    assert listener.hears_nothing()


def test_abstract_addresses() -> None:
    name = f"userspace-proxy-test-{os.getpid()}"
    listener = Listener(f"\0{name}")
    with listener.sock:
        Supervisor({"NOTIFY_SOCKET": f"@{name}"}, 42).ready()
        assert listener.hear() == {"READY": "1"}


@pytest.mark.parametrize("live", [True, False])
def test_the_heart_beats_while_the_control_loop_lives(listener: Listener, live: bool) -> None:
    told = supervisor(listener, WATCHDOG_USEC="20000", WATCHDOG_PID="42")

    async def beat() -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.2):
                await told.run(lambda: "fine", lambda: live)

    asyncio.run(beat())
    assert listener.hear() == {"STATUS": "fine"}
    if live:
        assert listener.hear() == {"WATCHDOG": "1"}
        assert listener.hear() == {"WATCHDOG": "1"}
    else:
        assert listener.hears_nothing()


@pytest.mark.parametrize(
    "environment", [{}, {"WATCHDOG_USEC": "20000", "WATCHDOG_PID": "41"}, {"WATCHDOG_USEC": "soon"}]
)
def test_no_watchdog_where_none_is_meant_for_us(environment: dict[str, str]) -> None:
    assert Supervisor(environment, 42).watchdog == 0.0


def test_nobody_there_is_told_once_and_ends_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    told = Supervisor({"NOTIFY_SOCKET": str(tmp_path / "nobody")}, 42)
    told.ready()
    told.stopping()
    [record] = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "nobody cannot be told READY=1: No such file or directory" in record.getMessage()


def test_without_a_supervisor_nothing_runs() -> None:
    asyncio.run(Supervisor({}, 42).run(lambda: "", lambda: True))


def supervised(listener: Listener, flags: list[str]) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "NOTIFY_SOCKET": listener.sock.getsockname(), "WATCHDOG_USEC": "400000"}
    return subprocess.Popen(
        [sys.executable, "-m", "userspace_proxy", *flags],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def test_the_life_of_the_command(tmp_path: Path, listener: Listener) -> None:
    """From the first sync over SIGHUP and a new config file to SIGTERM."""
    (tmp_path / "manifests").mkdir()
    file = tmp_path / "config.yaml"
    text = (
        "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nbindAddress: 127.0.0.1\n"
        "healthzBindAddress: 127.0.0.1:0\nmetricsBindAddress: 127.0.0.1:0\nudpIdleTimeout: 1s\n"
    )
    file.write_text(text)
    flags = [f"--config={file}", f"--manifests={tmp_path / 'manifests'}", "--capture=none"]
    process = supervised(listener, flags)
    try:
        listener.hear_until("READY")
        assert listener.hear_until("STATUS") == {"STATUS": "serving 0 service ports, capture none"}
        listener.hear_until("WATCHDOG")
        process.send_signal(signal.SIGHUP)
        assert "MONOTONIC_USEC" in listener.hear_until("RELOADING")
        listener.hear_until("READY")
        file.write_text(text.replace("udpIdleTimeout: 1s", "udpIdleTimeout: 2s"))
        listener.hear_until("RELOADING")
        listener.hear_until("READY")
        process.send_signal(signal.SIGTERM)
        listener.hear_until("STOPPING")
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()


def test_the_heart_beats_before_there_is_anything_to_serve(listener: Listener) -> None:
    """No API server is there: to be ended for that would bring it no nearer."""
    flags = ["--master=http://127.0.0.1:1", "--capture=none", "--healthz-bind-address=", "--metrics-bind-address="]
    process = supervised(listener, flags)
    try:
        assert listener.hear() == {"STATUS": "waiting for the first state to be served"}
        for _ in range(3):
            assert listener.hear() == {"WATCHDOG": "1"}
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
