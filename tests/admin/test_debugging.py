"""The pages that --profiling adds."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import aiohttp
from aiohttp import web

from userspace_proxy.admin.debugging import add_debugging

Run = Callable[[Coroutine[Any, Any, Any]], Any]


async def ask(verbosities: list[int], method: str, path: str, body: str = "") -> tuple[int, str]:
    app = web.Application()
    add_debugging(app, verbosities.append)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}{path}"
        async with aiohttp.ClientSession() as session, session.request(method, url, data=body) as answer:
            return answer.status, await answer.text()
    finally:
        await runner.cleanup()


def test_the_stacks_of_threads_and_tasks(run: Run) -> None:
    ended = threading.Event()

    async def sleeps_soundly() -> None:
        await asyncio.sleep(60)

    async def main() -> None:
        async with asyncio.TaskGroup() as tasks:
            sleeper = tasks.create_task(sleeps_soundly(), name="sleeper")
            status, page = await ask([], "GET", "/debug/stacks")
            sleeper.cancel()
        assert status == 200
        assert "thread MainThread\n" in page
        assert "thread waits-for-long\n" in page
        assert "name='sleeper'" in page
        assert "in sleeps_soundly" in page

    thread = threading.Thread(target=ended.wait, name="waits-for-long")
    thread.start()
    try:
        run(main())
    finally:
        ended.set()
        thread.join()


def test_verbosity_is_put(run: Run) -> None:
    verbosities: list[int] = []
    assert run(ask(verbosities, "PUT", "/debug/flags/v", "4\n")) == (200, "-v is 4 now\n")
    for wrong in ("", "-1", "loud", "9" * 10):
        status, told = run(ask(verbosities, "PUT", "/debug/flags/v", wrong))
        assert status == 400
        assert "not a whole number" in told
    assert run(ask(verbosities, "GET", "/debug/flags/v"))[0] == 405
    assert verbosities == [4]


def test_profiles_of_go_are_told_to_be_elsewhere(run: Run) -> None:
    status, told = run(ask([], "GET", "/debug/pprof/goroutine?debug=2"))
    assert (status, "see /debug/stacks" in told) == (404, True)
