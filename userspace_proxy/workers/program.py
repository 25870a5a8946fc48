"""One life of a worker process, as the control process sees it: started, spoken to, waited for, ended.

Who is to be there for how long, and what is said, is `pool`'s to know.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Callable

import msgspec

import userspace_proxy
from userspace_proxy.workers.channel import Channel
from userspace_proxy.workers.messages import Start, ToControl, ToWorker

logger = logging.getLogger(__name__)

EXIT_TIMEOUT = 5.0
LOOK = 1.0
SILENCE = 20
"""Looks in a row that find that a worker, which reports every five seconds, has said nothing: it is stuck. Three times
as many while it starts. Looks, not time: while this process or the whole machine stands still there are none.
"""

_root = str(pathlib.Path(userspace_proxy.__file__).parents[1])


class Program:
    """Alive as long as its process; one that goes on living but takes no messages, or sends none, is killed."""

    def __init__(self, start: Start, on_message: Callable[[ToControl], None]) -> None:
        """Raises OSError if it cannot be started."""
        self.index = start.index
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._process = _spawn(start, theirs.fileno())
        except BaseException:
            ours.close()
            raise
        self.pid = self._process.pid
        self._ending = os.pidfd_open(self.pid)
        self._channel: Channel[ToControl] = Channel(ours, ToControl, self._hear, self._process.kill)
        self._on_message = on_message
        self._silent = -2 * SILENCE
        self._next_look = asyncio.get_running_loop().call_later(LOOK, self._look)

    def send(self, message: ToWorker, descriptor: int | None = None) -> None:
        self._channel.send(message, descriptor)

    async def ended(self) -> int:
        """Wait for its end and hear its last words; its status. Cancelled, this may be called again."""
        loop = asyncio.get_running_loop()
        gone = asyncio.Event()
        # On any loop and in any thread, which asyncio's own way of waiting for processes is not made for.
        loop.add_reader(self._ending, gone.set)
        try:
            await gone.wait()
        finally:
            loop.remove_reader(self._ending)
        self._next_look.cancel()
        self._channel.read()
        self._channel.close()
        os.close(self._ending)
        return self._process.wait()

    async def end(self) -> None:
        """Let it go: the end of its channel is its sign to leave."""
        self._next_look.cancel()
        self._channel.close()
        try:
            async with asyncio.timeout(EXIT_TIMEOUT):
                await self.ended()
        except TimeoutError:
            logger.error("worker %d does not leave, and is killed", self.index)
            self._process.kill()
            await self.ended()

    def _hear(self, message: ToControl, _: int | None) -> None:
        self._silent = 0
        self._on_message(message)

    def _look(self) -> None:
        self._silent += 1
        if self._silent < SILENCE:
            self._next_look = asyncio.get_running_loop().call_later(LOOK, self._look)
        else:
            logger.error("worker %d has said nothing for %g s: it is stuck, and killed", self.index, SILENCE * LOOK)
            self._process.kill()


def _spawn(start: Start, descriptor: int) -> subprocess.Popen[bytes]:
    search = os.pathsep.join(path for path in (_root, os.environ.get("PYTHONPATH", "")) if path)
    told = msgspec.json.encode(start).decode()
    # A session of its own keeps the terminal's Ctrl-C away: it is the control process that says when to stop.
    return subprocess.Popen(
        [sys.executable, "-m", "userspace_proxy.workers.worker", str(descriptor), told],
        stdin=subprocess.DEVNULL,
        pass_fds=(descriptor,),
        env=os.environ | {"PYTHONPATH": search},
        start_new_session=True,
    )
