"""What --profiling adds beside the metrics: where everything is at this moment, and how much is logged.

Go's profiles cannot be had of a Python program; what they are mostly asked for, where it hangs, /debug/stacks tells.
"""

from __future__ import annotations

import asyncio
import io
import sys
import threading
import traceback
from collections.abc import Callable

from aiohttp import web


def add_debugging(app: web.Application, set_verbosity: Callable[[int], None]) -> None:
    async def put_verbosity(request: web.Request) -> web.Response:
        text = (await request.text()).strip()
        if not text.isdecimal() or len(text) > 9:
            return web.Response(status=400, text=f"{text[:20]!r}: not a whole number; allowed: that, as with -v\n")
        set_verbosity(int(text))
        return web.Response(text=f"-v is {int(text)} now\n")

    app.router.add_get("/debug/stacks", _stacks)
    app.router.add_get("/debug/pprof/{profile:.*}", _no_profiles)
    app.router.add_put("/debug/flags/v", put_verbosity)


async def _stacks(_request: web.Request) -> web.Response:
    """Each thread of this process, and each task of its loop."""
    page = io.StringIO()
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for number, frame in sys._current_frames().items():
        page.write(f"thread {names.get(number, number)}\n")
        traceback.print_stack(frame, file=page)
        page.write("\n")
    for task in sorted(asyncio.all_tasks(), key=lambda task: task.get_name()):
        task.print_stack(file=page)
        page.write("\n")
    return web.Response(text=page.getvalue())


async def _no_profiles(_request: web.Request) -> web.Response:
    return web.Response(status=404, text="There are no profiles as of Go programs; see /debug/stacks.\n")
