"""The command: arguments in, exit code out.

    0   ended in order, by a signal; or did what was asked (--help, --version, --cleanup)
    1   something failed while running, or could not be started; the log says what
    2   the flags cannot be used as they are; every problem is on stderr, one a line

A first argument that is in COMMANDS is a command of its own and gets the arguments after it. uvloop is started here;
everything else is `config`'s (flags) or `app`'s (running).
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence

import uvloop

from userspace_proxy import __version__, logs
from userspace_proxy.app import serve
from userspace_proxy.capture.choose import cleanup
from userspace_proxy.config import Config, Show, parse
from userspace_proxy.exceptions import ConfigError, UserspaceProxyError
from userspace_proxy.manual import help_text

logger = logging.getLogger("userspace_proxy")

COMMANDS: Mapping[str, Callable[[Sequence[str]], int]] = {}
"""What else this program does, by the first argument. Each is given the arguments after it and returns an exit code."""


def main(arguments: Sequence[str]) -> int:
    _have_standard_streams()
    if arguments and arguments[0] in COMMANDS:
        return COMMANDS[arguments[0]](arguments[1:])
    try:
        config = parse(arguments)
    except ConfigError as error:
        _complain(error.problems)
        return 2
    if config is Show.HELP:
        return _show(help_text())
    if config is Show.VERSION:
        return _show(f"userspace-proxy {__version__}\n")
    assert isinstance(config, Config)
    logs.set_up(config.verbosity, config.logging_format)
    if config.cleanup:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # half of it is not done in order
        signal.signal(signal.SIGINT, signal.default_int_handler)
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
