"""The command: arguments in, exit code out.

    0   ended in order, by a signal; or did what was asked (--help, --cleanup, a command)
    1   something failed while running, or could not be started; the log says what
    2   the flags cannot be used as they are; every problem is on stderr, one a line

A first argument that is in COMMANDS is a command of its own and gets the arguments after it. uvloop is started here;
everything else is `config`'s (flags) or `app`'s (running).
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import uvloop

from userspace_proxy import __version__, check, completion, host, logs
from userspace_proxy.app import Successor, serve
from userspace_proxy.capture.choose import cleanup
from userspace_proxy.config import Config, Show, parse
from userspace_proxy.early import answer_signals
from userspace_proxy.environment import exports
from userspace_proxy.exceptions import ConfigError, UserspaceProxyError
from userspace_proxy.manual import help_text
from userspace_proxy.model import Snapshot
from userspace_proxy.sockets.base import LEAST_DESCRIPTORS
from userspace_proxy.sources.base import first
from userspace_proxy.sources.choose import choose

logger = logging.getLogger("userspace_proxy")

FIRST_STATE = 15.0
"""Seconds that `env` waits for what the API server tells."""


def main(arguments: Sequence[str]) -> int:
    _have_standard_streams()
    if arguments and arguments[0] in COMMANDS:
        return COMMANDS[arguments[0]].run(arguments[1:])
    try:
        config = parse(arguments)
        if config is Show.HELP:
            return _show(help_text({f"{name} {each.arguments}": each.help for name, each in COMMANDS.items()}))
        if config is Show.VERSION:
            return _show(f"userspace-proxy {__version__}\n")
        assert isinstance(config, Config)
        return _write(config, config.write_config_to) if config.write_config_to else _run(config, arguments)
    except ConfigError as error:
        _complain([*error.notices, *error.problems])
        return 2


def _run(config: Config, arguments: Sequence[str]) -> int:
    """Serve, once for each time that the config file changes; or clean up."""
    following: Successor | None = Successor(config)
    while following:
        config = following.config
        logs.set_up(config.verbosity, config.logging_format)
        if (most := host.raise_descriptor_limit()) < LEAST_DESCRIPTORS and not config.cleanup:
            needed = f"at least {LEAST_DESCRIPTORS}, and two for each connection"
            logger.error("%d open files allowed; needed: %s; raise the limit (ulimit -n, LimitNOFILE)", most, needed)
            return 1
        for notice in config.notices:
            logger.warning("%s", notice)
        if config.cleanup:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # half of it is no end in order
            signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                following = runner.run(
                    cleanup() if config.cleanup else serve(following, lambda: _parse_again(arguments))
                )
        except ExceptionGroup as group:
            return _explain(group)
        except UserspaceProxyError as error:
            return _explain(ExceptionGroup("", [error]))
        answer_signals()
        # The one that has ended is in what was frozen once it had started.
        gc.unfreeze()
        gc.collect()
    return 0


def _parse_again(arguments: Sequence[str]) -> Config:
    """Raises ConfigError also for what would show only at the start: until then the present settings do."""
    config = parse(arguments)
    assert isinstance(config, Config)
    choose(config)
    return config


def _write(config: Config, path: Path) -> int:
    from userspace_proxy.config.document import not_kept, only_flags, render  # here: YAML takes long to load

    try:
        path.write_text(render(config), encoding="utf-8")
    except OSError as error:
        _complain([f"--write-config-to={str(path)!r}: {error.strerror}"])
        return 1
    rest = [f"--{name}" for name in only_flags(config) if name not in ("config", "write-config-to")]
    left_out = [f"{', '.join(rest)}: without a place in the file; to be given beside --config"] if rest else []
    for notice in (*config.notices, *not_kept(config), *left_out):
        sys.stderr.write(f"userspace-proxy: {notice}\n")
    return 0


def _completion(arguments: Sequence[str]) -> int:
    if len(arguments) != 1 or arguments[0] not in completion.SHELLS:
        _complain([f"completion: {' '.join(arguments)!r}; allowed: {', '.join(completion.SHELLS)}, one of them"])
        return 2
    return _show(
        completion.SHELLS[arguments[0]](
            {name: completion.Command(each.help, each.words) for name, each in COMMANDS.items()}
        )
    )


def _env(arguments: Sequence[str]) -> int:
    namespace, flags = "default", arguments
    if arguments and not arguments[0].startswith("-"):
        namespace, *flags = arguments
    try:
        config = parse(flags)
        if not isinstance(config, Config):
            return main(flags)
        logs.set_up(config.verbosity, config.logging_format)
        return _show(exports(asyncio.run(_first_state(config)).services, namespace))
    except ConfigError as error:
        _complain([*error.notices, *error.problems])
        return 2
    except ExceptionGroup as group:
        return _explain(group)
    except TimeoutError:
        _complain([f"env: no state of the cluster within {FIRST_STATE:g} s; the log above says why"])
        return 1


async def _first_state(config: Config) -> Snapshot:
    async with asyncio.timeout(FIRST_STATE):
        return await first(choose(config))


def _check(arguments: Sequence[str]) -> int:
    form, flags = check.split(arguments)
    if form not in check.FORMATS:
        _complain([f"check: --output={form!r}: allowed: {', '.join(check.FORMATS)}"])
        return 2
    try:
        config = parse(flags)
    except ConfigError as error:
        _complain([*error.notices, *error.problems])
        return 2
    if not isinstance(config, Config):
        return main(flags)
    found = check.report(config)
    return _show(check.FORMATS[form](found)) or (0 if found.capture else 1)


class Command(NamedTuple):
    """Something else than serving."""

    arguments: str
    """What stands for them in the help text."""
    help: str
    run: Callable[[Sequence[str]], int]
    """Gets the arguments after the command's name, and returns an exit code."""
    words: Mapping[str, Sequence[str]] = {}
    """For completion: what may follow upon its name, or upon an option of its own."""


COMMANDS: Mapping[str, Command] = {
    "check": Command(
        "[-o table|json] [flags]",
        "Tell what this host offers, which capture would be used, and what to do about each gap.",
        _check,
        {"-o": tuple(check.FORMATS), "--output": tuple(check.FORMATS)},
    ),
    "completion": Command(
        "SHELL",
        "Print what makes a shell complete flags: bash, zsh or fish.",
        _completion,
        {"completion": tuple(completion.SHELLS)},
    ),
    "env": Command(
        "[NAMESPACE] [flags]",
        "Print the variables that a pod of the namespace (default: default) finds its Services by, for a shell's eval.",
        _env,
    ),
}
"""By the first argument."""


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
        logs.show(text)
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
            _complain([*error.notices, *error.problems])
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
