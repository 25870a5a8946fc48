"""What is logged, and how a line looks: text for people or JSON for machines, on stderr. What was asked for, on stdout.

The proxy's processes all write to the same stderr; those that relay beside the first one begin with their name.
"""

from __future__ import annotations

import json
import logging
import os
import sys

from userspace_proxy.config import LoggingFormat

_DEBUG_AT = 2
_CONNECTIONS_AT = 4


def set_up(verbosity: int, logging_format: LoggingFormat, name: str = "") -> None:
    """Connections are told of from -v=4 on, one line each."""
    stream = logging.StreamHandler()
    stream.setFormatter(_JSONLines(name) if logging_format is LoggingFormat.JSON else _Lines(name))
    logging.basicConfig(handlers=[stream], level=logging.WARNING, force=True)
    set_verbosity(verbosity)


def set_verbosity(verbosity: int) -> None:
    logging.getLogger("userspace_proxy").setLevel(logging.DEBUG if verbosity >= _DEBUG_AT else logging.INFO)
    sessions = logging.getLogger("userspace_proxy.sockets")
    sessions.setLevel(logging.DEBUG if verbosity >= _CONNECTIONS_AT else logging.INFO)


def printable(text: str) -> str:
    """On one line, and nothing in it that a terminal would obey: names come from files and from the network."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class _Lines(logging.Formatter):
    def __init__(self, name: str) -> None:
        super().__init__(f"%(asctime)s.%(msecs)03d %(levelname)-7s {name and f'{name}: '}%(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's
        return printable(super().formatMessage(record))


class _JSONLines(logging.Formatter):
    def __init__(self, name: str) -> None:
        super().__init__()
        self._origin = {"process": name} if name else {}

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": f"{self.formatTime(record, '%Y-%m-%dT%H:%M:%S%z')}",
            "level": record.levelname.lower(),
            "logger": record.name,
            **self._origin,
            "message": printable(record.getMessage()),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def show(text: str) -> None:
    """Write to standard output, for people or programs that asked. Raises OSError, once: then it all goes nowhere.

    What was buffered would else be tried again at the end, and fail again, which Python makes its exit status 120.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        raise
