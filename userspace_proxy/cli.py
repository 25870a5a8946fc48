"""The command: arguments in, exit code out.

    0   ended in order, by a signal; or did what was asked (--help, --version, --cleanup)
    1   something failed while running, or could not be started; the log says what
    2   the flags cannot be used as they are; every problem is on stderr, one a line

Logging is set up here, and uvloop started; everything else is `config`'s (flags) or `app`'s (running).
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from collections.abc import Sequence

import uvloop

from userspace_proxy import __version__
from userspace_proxy.app import serve
from userspace_proxy.capture.choose import cleanup
from userspace_proxy.config import Config, LoggingFormat, Show, parse
from userspace_proxy.exceptions import ConfigError, UserspaceProxyError
from userspace_proxy.manual import help_text

logger = logging.getLogger("userspace_proxy")

_DEBUG_AT = 2
_CONNECTIONS_AT = 4


def main(arguments: Sequence[str] | None = None) -> int:
    _have_standard_streams()
    try:
        config = parse(sys.argv[1:] if arguments is None else arguments)
    except ConfigError as error:
        _complain(error.problems)
        return 2
    if config is Show.HELP:
        return _show(help_text())
    if config is Show.VERSION:
        return _show(f"userspace-proxy {__version__}\n")
    assert isinstance(config, Config)
    set_up_logging(config)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(cleanup() if config.cleanup else serve(config))
    except ExceptionGroup as group:
        return _explain(group)
    except UserspaceProxyError as error:
        return _explain(ExceptionGroup("", [error]))
    return 0


def _have_standard_streams() -> None:
    """Who starts us may have closed some: then the first descriptors opened would be taken for them."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - for as long as we run
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115


def _show(text: str) -> int:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        _complain([f"standard output: {error.strerror}"])
        return 1
    return 0


def _complain(problems: Sequence[str]) -> None:
    sys.stderr.write("".join(f"userspace-proxy: {problem}\n" for problem in problems))
    sys.stderr.write("userspace-proxy --help tells of every flag.\n")


def _explain(group: ExceptionGroup[Exception]) -> int:
    """Say in a line each what ended us; a traceback is for our own faults only."""
    expected, ours = group.split(UserspaceProxyError)
    code = 1
    for error in _leaves(expected):
        if isinstance(error, ConfigError):
            _complain(error.problems)
            code = 2
        else:
            logger.error("%s", error)
    for error in _leaves(ours):
        logger.critical("a fault of this program", exc_info=error)
        code = 1
    return code


def _leaves(group: ExceptionGroup[Exception] | None) -> list[Exception]:
    if group is None:
        return []
    return [leaf for e in group.exceptions for leaf in (_leaves(e) if isinstance(e, ExceptionGroup) else [e])]


def set_up_logging(config: Config) -> None:
    """Everything goes to stderr; connections are told of from -v=4 on, one line each."""
    stream = logging.StreamHandler()
    stream.setFormatter(_JSONLines() if config.logging_format is LoggingFormat.JSON else _Lines())
    logging.basicConfig(handlers=[stream], level=logging.WARNING, force=True)
    logger.setLevel(logging.DEBUG if config.verbosity >= _DEBUG_AT else logging.INFO)
    sessions = logging.getLogger("userspace_proxy.sockets")
    sessions.setLevel(logging.DEBUG if config.verbosity >= _CONNECTIONS_AT else logging.INFO)


class _Lines(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s.%(msecs)03d %(levelname)-7s %(message)s", "%H:%M:%S")


class _JSONLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": f"{self.formatTime(record, '%Y-%m-%dT%H:%M:%S%z')}",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)
