"""A command line, in the manner of Go programs, taken apart into flags and their texts.

Here is what kube-proxy's users take for granted and argparse does not do: `-name` and `--name`, `_` for
`-`, switches that take a value only with `=`, and every mistake told at once. What the texts mean is for `reading`.
"""

from __future__ import annotations

import difflib
import typing
from collections import deque
from collections.abc import Mapping, Sequence

from userspace_proxy.config.flag import Flag
from userspace_proxy.config.values import FALSE, TRUE


class Given(typing.NamedTuple):
    """One flag as it stands on the command line; a switch without a value has `true`."""

    flag: Flag[typing.Any]
    value: str


def read(argv: Sequence[str], known: Mapping[str, Flag[typing.Any]]) -> tuple[list[Given], list[str]]:
    """Split a command line (without the program's name) into flags and their values, and problems."""
    given: list[Given] = []
    problems: list[str] = []
    args = deque(argv)
    while args:
        arg = args.popleft()
        if arg == "--":
            problems += [_stray(arg, given) for arg in args if arg]
            break
        if arg == "-" or not arg.startswith("-"):
            if arg:
                problems.append(_stray(arg, given))
            continue
        name, equals, value = _split(arg, known)
        flag = known.get(name)
        follows = bool(args) and not _names_a_flag(args[0], known)
        if flag is None:
            problems.append(_unknown(arg.partition("=")[0], known))
            if not equals and follows and not args[0].startswith("-"):
                args.popleft()  # most probably its value, and no second mistake
        elif equals:
            given.append(Given(flag, value))
        elif flag.is_switch:
            given.append(Given(flag, "true"))
        elif follows:
            given.append(Given(flag, args.popleft()))
        else:
            problems.append(flag.problem(None, "has no value"))
    return given, problems


def _split(arg: str, known: Mapping[str, Flag[typing.Any]]) -> tuple[str, str, str]:
    spelled, equals, value = arg.partition("=")
    name = spelled[2 if spelled.startswith("--") else 1 :].replace("_", "-")
    if not equals and not arg.startswith("--") and name not in known and name[:1] in known and name[1:].isdigit():
        return name[0], "=", name[1:]  # -v4
    return name, equals, value


def _names_a_flag(arg: str, known: Mapping[str, Flag[typing.Any]]) -> bool:
    return arg.startswith("--") and _split(arg, known)[0] in known


def _unknown(spelled: str, known: Mapping[str, Flag[typing.Any]]) -> str:
    near = difflib.get_close_matches(spelled.lstrip("-").replace("_", "-").lower(), known, n=1)
    proposal = f"did you mean --{near[0]}?" if near else "--help lists those there are"
    return f"{spelled}: unknown flag; {proposal}"


def _stray(arg: str, given: Sequence[Given]) -> str:
    if given and given[-1].flag.is_switch and (arg in TRUE or arg in FALSE):
        return f"{arg!r}: a switch takes its value with '='; write --{given[-1].flag.name}={arg}"
    return f"{arg!r}: unexpected argument; --help lists flags, and the commands that may come first"
