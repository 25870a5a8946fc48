"""The process of a worker: started, waited for, ended, and nothing left of it."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from tests.proxy import no_descriptor_left
from userspace_proxy.config import LoggingFormat
from userspace_proxy.sockets.path import RelaySettings
from userspace_proxy.workers import program
from userspace_proxy.workers.messages import AskCounts, Report, Start, ToControl
from userspace_proxy.workers.program import Program

Run = Callable[[Coroutine[Any, Any, Any]], Any]
START = Start(3, RelaySettings(100, True, 300.0, 0.25, 100), 10.0, 0, LoggingFormat.TEXT)


async def started() -> tuple[Program, asyncio.Queue[ToControl]]:
    """One that has said its first word: it is up, and minds no signal."""
    said: asyncio.Queue[ToControl] = asyncio.Queue()
    made = Program(START, said.put_nowait)
    await said.get()
    return made, said


def test_it_is_asked_and_let_go(run: Run) -> None:
    async def main() -> int:
        made, said = await started()
        made.send(AskCounts(9))
        async with asyncio.timeout(10):
            report = await said.get()
        assert isinstance(report, Report)
        assert report.number == 9
        await made.end()
        made.send(AskCounts(10))  # to nobody
        return made.pid

    with no_descriptor_left():
        pid = run(main())
        assert not Path(f"/proc/{pid}").exists()


def test_its_death_is_noticed_with_its_status(run: Run) -> None:
    async def main() -> int:
        made, _ = await started()
        waiting = asyncio.ensure_future(made.ended())
        await asyncio.sleep(0)
        os.kill(made.pid, signal.SIGKILL)
        async with asyncio.timeout(10):
            return await waiting

    with no_descriptor_left():
        assert run(main()) == -signal.SIGKILL


def test_who_gives_up_waiting_may_end_it(run: Run) -> None:
    async def main() -> None:
        made, _ = await started()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await made.ended()
        await made.end()

    with no_descriptor_left():
        run(main())


def test_one_that_stands_still_is_killed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "EXIT_TIMEOUT", 0.1)

    async def main() -> int:
        made, _ = await started()
        os.kill(made.pid, signal.SIGSTOP)
        await made.end()
        return made.pid

    with no_descriptor_left():
        pid = run(main())
        assert not Path(f"/proc/{pid}").exists()


def test_one_that_takes_no_messages_is_killed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> int:
        made, _ = await started()
        os.kill(made.pid, signal.SIGSTOP)
        monkeypatch.setattr("userspace_proxy.workers.channel.BACKLOG", 100_000)
        for number in range(100_000):
            made.send(AskCounts(number))
        async with asyncio.timeout(10):
            return await made.ended()

    with no_descriptor_left():
        assert run(main()) == -signal.SIGKILL


def test_one_that_says_nothing_is_killed(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> int:
        made, _ = await started()
        monkeypatch.setattr(program, "LOOK", 0.02)
        os.kill(made.pid, signal.SIGSTOP)
        async with asyncio.timeout(10):
            return await made.ended()

    with no_descriptor_left():
        assert run(main()) == -signal.SIGKILL
    assert caplog.messages == ["worker 3 has said nothing for 0.4 s: it is stuck, and killed"]


def test_one_that_is_not_heard_because_nobody_listened_lives(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here it stands still as well, as if the whole machine did, for more than twice the time that it may be silent."""

    async def main() -> None:
        made, said = await started()
        monkeypatch.setattr(program, "LOOK", 0.05)
        os.kill(made.pid, signal.SIGSTOP)
        time.sleep(2.2)  # noqa: ASYNC251 - nothing else runs in this process meanwhile, and nothing is to
        os.kill(made.pid, signal.SIGCONT)
        made.send(AskCounts(9))
        async with asyncio.timeout(10):
            report = await said.get()
        assert isinstance(report, Report)
        await made.end()

    with no_descriptor_left():
        run(main())


def test_one_that_cannot_be_started_leaves_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/nowhere/python")

    async def main() -> None:
        with pytest.raises(FileNotFoundError):
            Program(START, lambda _: None)

    with no_descriptor_left():
        run(main())
