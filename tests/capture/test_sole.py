"""Who captures in a network namespace, and that it is one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from tests.netns import Namespace
from userspace_proxy.capture import sole
from userspace_proxy.exceptions import CaptureError

pytestmark = pytest.mark.privileged

HOLD = (
    "import sys; from userspace_proxy.capture import sole; s = sole.hold(); print('held', flush=True); sys.stdin.read()"
)


def test_one_captures_and_another_is_told_who() -> None:
    with Namespace() as net, Namespace() as other, net.entered():
        assert not sole.holder()
        with sole.hold():
            assert sole.holder() == f"another userspace-proxy (pid {os.getpid()})"
            with pytest.raises(CaptureError, match=rf"userspace-proxy \(pid {os.getpid()}\) captures in this network"):
                sole.hold()
            with other.entered(), sole.hold():
                assert sole.holder()
        assert not sole.holder()
        sole.hold().close()


def test_a_killed_one_holds_nothing() -> None:
    with Namespace() as net, net.entered():
        with subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            assert sole.holder() == f"another userspace-proxy (pid {holder.pid})"
            holder.kill()
        sole.hold().close()


def test_nobody_else_can_keep_a_proxy_from_starting(caplog: pytest.LogCaptureFixture) -> None:
    with Namespace() as net, net.entered():
        if not (child := os.fork()):
            os.setuid(65534)
            taken = socket.socket(socket.AF_UNIX)
            taken.bind("\0userspace-proxy")
            taken.listen()
            os.kill(os.getpid(), 19)
            os._exit(0)
        try:
            os.waitpid(child, os.WUNTRACED)
            assert not sole.holder()
            sole.hold().close()
            assert "no right to keep a proxy from starting" in caplog.text
        finally:
            os.kill(child, 9)
            os.waitpid(child, 0)
