"""The file that --config names, looked at again and again: is there another Config in it than the one that runs?

Its text is compared, once a second: that sees what inotify does not, such as a directory above it that a symbolic link
is turned to, as kubelet does with ConfigMaps. What a file means is `config`'s, what then happens `app`'s.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from userspace_proxy.config import Config
from userspace_proxy.exceptions import ConfigError
from userspace_proxy.files import open_regular

logger = logging.getLogger(__name__)

PERIOD = 1.0
"""Seconds between looks. What has changed must stay as it is for so long, lest half a file be read."""


class ConfigFile:
    def __init__(self, path: Path, running: Config, parse: Callable[[], Config], period: float = PERIOD) -> None:
        self._path = path
        self._running = running
        self._parse = parse
        """Reads the command line and the file anew. Raises ConfigError."""
        self._period = period

    async def changed(self) -> Config:
        """Wait for another Config than the one that runs. A file that is gone or cannot be used is none."""
        used = seen = None
        while True:
            found = await asyncio.to_thread(self._read)
            if found == seen and found != used:
                # At first, too: it may have changed since it was read for the Config that runs.
                if another := await asyncio.to_thread(self._another, quietly=used is None):
                    return another
                used = found
            seen = found
            await asyncio.sleep(self._period)

    def _read(self) -> bytes:
        try:
            with open_regular(self._path) as opened:
                return opened.read()
        except OSError:
            return b""

    def _another(self, *, quietly: bool) -> Config | None:
        try:
            config = self._parse()
        except Exception as error:  # noqa: BLE001 - a file that somebody writes must not end what runs, whatever is in it
            for problem in error.problems if isinstance(error, ConfigError) else [repr(error)]:
                logger.error("--config: %s", problem)
            logger.error("--config: %s has changed and cannot be used; going on as before", self._path)
            return None
        if config != self._running:
            return config
        if not quietly:
            logger.info("--config: %s has changed, and says the same", self._path)
        return None
