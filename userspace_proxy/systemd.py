"""What systemd, or whoever else started this program, is told of its life: sd_notify's datagrams.

READY once the first sync is done, RELOADING while something is read anew, STOPPING when it drains, a line for
`systemctl status`, and heart beats for as long as the control loop is alive. Where $NOTIFY_SOCKET is not set nobody is
told anything; where the socket takes nothing, that is no reason to stop serving. When what is the case is `app`'s to
know.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping

logger = logging.getLogger(__name__)

STATUS_PERIOD = 10.0
"""Seconds between two looks at the status line, which is told when it has changed."""


class Supervisor:
    def __init__(self, environment: Mapping[str, str], pid: int) -> None:
        address = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        watched = environment.get("WATCHDOG_USEC", "")
        # Both are inherited: what this program was started by may be what is meant.
        meant = environment.get("WATCHDOG_PID", str(pid)) == str(pid)
        self.watchdog = int(watched) / 1_000_000 if watched.isdecimal() and meant else 0.0
        """Seconds after which a program without a heart beat is ended; 0: never."""
        self._is_ready = False
        self._status = ""
        self._complained = False

    def ready(self) -> None:
        self._is_ready = True
        self._tell("READY=1")

    def reloading(self) -> None:
        """READY is owed after this. Before the first READY there is nothing that could be read anew."""
        if self._is_ready:
            # systemd tells by the clock whether this answers its own request or an earlier one.
            self._tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def reloaded(self) -> None:
        if self._is_ready:
            self._tell("READY=1")

    def stopping(self) -> None:
        self._tell("STOPPING=1")

    def status(self, text: str) -> None:
        if text != self._status:
            self._status = text
            self._tell(f"STATUS={text}")

    async def run(self, status: Callable[[], str], is_live: Callable[[], bool]) -> None:
        """Beat, and keep the status line true, until cancelled."""
        if not self._address:
            return
        # Half of it is what sd_watchdog_enabled(3) advises.
        period = min(self.watchdog / 2, STATUS_PERIOD) if self.watchdog else STATUS_PERIOD
        while True:
            self.status(status())
            if self.watchdog and is_live():
                self._tell("WATCHDOG=1")
            await asyncio.sleep(period)

    def _tell(self, *assignments: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
                sock.sendto("\n".join(assignments).encode(), self._address)
        except OSError as error:
            level = logging.DEBUG if self._complained else logging.WARNING
            self._complained = True
            reason = os.strerror(error.errno) if error.errno else str(error)
            logger.log(level, "NOTIFY_SOCKET: %s cannot be told %s: %s", self._address, assignments[0], reason)
