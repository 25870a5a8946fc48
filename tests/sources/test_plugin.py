"""Exec plugins as they are: slow, talkative, wrong, and with children of their own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from tests.sources.cluster import eventually
from userspace_proxy.exceptions import CredentialsError
from userspace_proxy.sources import plugin
from userspace_proxy.sources.kubeconfig import Plugin, Variable

Run = Callable[[Coroutine[Any, Any, Any]], Any]

V1 = "client.authentication.k8s.io/v1"


def shell(script: str) -> Plugin:
    return Plugin("/bin/sh", V1, ["-c", script])


def answer(status: object, kind: str = "ExecCredential", version: str = V1) -> str:
    return f"echo '{json.dumps({'apiVersion': version, 'kind': kind, 'status': status})}'"


async def ask(asked: Plugin, **settings: float) -> plugin.Status:
    return await plugin.ask(asked, asked.command, **settings)


def test_it_is_told_who_asks_and_its_answer_is_taken(run: Run) -> None:
    script = 'test "$A" = b && test -n "$PATH" && echo "$KUBERNETES_EXEC_INFO" | grep -q ExecCredential && '
    asked = shell(script + answer({"token": "t", "expirationTimestamp": "2030-01-01T00:00:00Z"}))
    asked.env = [Variable("A", "b")]
    assert run(ask(asked)) == plugin.Status("t")


def test_it_may_complain_at_length(run: Run) -> None:
    flood = "head -c 300000 /dev/zero | tr '\\0' x >&2; "
    assert run(ask(shell(flood + answer({"token": "t"})))).token == "t"
    with pytest.raises(CredentialsError, match=r"ended with status 3: x{500}$"):
        run(ask(shell(flood + "exit 3")))


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("true", "in its output; allowed: an ExecCredential in JSON"),
        ("printf '\\377'", "in its output; allowed: an ExecCredential in JSON"),
        ("echo '[]'", "in its output; allowed: an ExecCredential in JSON"),
        (answer(5), "in its output; allowed: an ExecCredential in JSON"),
        (answer({}, kind="Other"), "found Other of client.authentication.k8s.io/v1; allowed: ExecCredential of"),
        (answer({"token": "t"}, version="v0"), "found ExecCredential of v0; allowed: ExecCredential of client"),
        (answer({}), "found neither token nor clientCertificateData"),
        (answer({"clientCertificateData": "x"}), "found one of clientCertificateData and clientKeyData"),
        ("kill -9 $$", "ended with status -9"),
    ],
)
def test_what_it_says_is_checked(run: Run, script: str, told: str) -> None:
    with pytest.raises(CredentialsError, match=r"^the exec plugin /bin/sh") as caught:
        run(ask(shell(script)))
    assert told in str(caught.value)


@pytest.mark.parametrize("command", ["/nowhere/plugin", "/", "a\0b"])
def test_one_that_is_none(run: Run, command: str) -> None:
    with pytest.raises(CredentialsError, match="cannot be run"):
        run(ask(Plugin(command, V1)))


def _runs(file: Path) -> bool:
    """Whether one of the processes is there that wrote their numbers; zombies are not."""
    for number in file.read_text().split():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                return True
    return False


def hanging(file: Path) -> Plugin:
    """Itself, and a child that keeps its output open."""
    return shell(f"echo $$ >> {file}; sleep 300 & echo $! >> {file}; wait")


def test_one_that_hangs_is_killed_with_its_children(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(CredentialsError, match=r"the exec plugin /bin/sh took longer than 0\.5 s, and was killed"):
            await ask(hanging(tmp_path / "pids"), timeout=0.5)
        await eventually(lambda: not _runs(tmp_path / "pids"))

    run(main())


def test_a_child_that_stays_is_no_reason_to_wait(run: Run, tmp_path: Path) -> None:
    async def main() -> None:
        script = f"sleep 300 & echo $! >> {tmp_path / 'pids'}; {answer({'token': 't'})}"
        with pytest.raises(CredentialsError, match="took longer"):
            await ask(shell(script), timeout=0.5)
        await eventually(lambda: not _runs(tmp_path / "pids"))

    run(main())


def test_one_that_nobody_waits_for_any_more_is_killed(run: Run, tmp_path: Path) -> None:
    pids = tmp_path / "pids"

    async def main() -> None:
        task = asyncio.create_task(ask(hanging(pids)))
        await eventually(lambda: pids.exists() and len(pids.read_text().split()) == 2)
        assert _runs(pids)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await eventually(lambda: not _runs(pids))

    run(main())
    assert all(int(number) != os.getpid() for number in pids.read_text().split())


def test_nor_does_one_stay_that_was_given_up_while_it_started(run: Run, tmp_path: Path) -> None:
    pids = tmp_path / "pids"

    def has_started() -> bool:
        return pids.exists() and len(pids.read_text().split()) == 2

    async def main() -> None:
        task = asyncio.create_task(ask(hanging(pids)))
        deadline = time.monotonic() + 15
        while not has_started():
            assert time.monotonic() < deadline
            await asyncio.sleep(0)
            time.sleep(0.05)  # noqa: ASYNC251 - the loop is to be slower than the plugin
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await eventually(lambda: not _runs(pids))

    run(main())
