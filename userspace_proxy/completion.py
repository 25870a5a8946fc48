"""Completion for bash, zsh and fish, made from the table of flags: `userspace-proxy completion bash`.

Completed are names of flags, values where all there are can be told, and paths. The shells differ in how they say so,
and in nothing else.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator, Mapping, Sequence

from userspace_proxy.config import Flag
from userspace_proxy.config.flag import UNUSED
from userspace_proxy.config.table import KNOWN

AnyFlag = Flag[typing.Any]


class Command(typing.NamedTuple):
    help: str
    words: Mapping[str, Sequence[str]] = {}
    """What may follow upon its own name, or upon an option of its own."""


Commands = Mapping[str, Command]


def bash(commands: Commands) -> str:
    own = "\n".join(
        f"        {name}:{after}) {_bash_words(words)} ;;"
        for name, command in commands.items()
        for option, words in command.words.items()
        for after in (option, f"{option}=")
    )
    values = "\n".join(
        f"        {_bash_flag(flag)}) {_bash_words(flag.kind.choices)} ;;" for flag in _flags() if flag.kind.choices
    )
    paths = "|".join(_bash_flag(flag) for flag in _flags() if flag.kind.placeholder == "PATH")
    others = "|".join(_bash_flag(flag) for flag in _flags() if flag.kind.placeholder not in ("", "PATH"))
    return f"""\
# bash completion for userspace-proxy: source this, or put it where bash-completion looks.
_userspace_proxy() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} flag=${{COMP_WORDS[COMP_CWORD - 1]}}
    # Bash makes "=" a word of its own.
    if [[ $word == "=" ]]; then word=; flag+="="
    elif [[ $flag == "=" ]]; then flag=${{COMP_WORDS[COMP_CWORD - 2]}}=; fi
    COMPREPLY=()
    case ${{COMP_WORDS[1]}}:$flag in
{own}
        *) false ;;
    esac && return
    case $flag in
{values}
        {paths}) compopt -o filenames 2>/dev/null; COMPREPLY=($(compgen -f -- "$word")) ;;
        {others}) ;;
        *) COMPREPLY=($(compgen -W "{" ".join(f"--{flag.name}" for flag in _flags())}" -- "$word"))
            if ((COMP_CWORD == 1)); then COMPREPLY+=($(compgen -W "{" ".join(commands)}" -- "$word")); fi ;;
    esac
}}
complete -F _userspace_proxy userspace-proxy
"""


def _bash_flag(flag: AnyFlag) -> str:
    """As a pattern. The value of a switch comes after "=" alone."""
    return f"--{flag.name}=" if flag.is_switch else f"--{flag.name}|--{flag.name}="


def _bash_words(words: Sequence[str]) -> str:
    return f'COMPREPLY=($(compgen -W "{" ".join(words)}" -- "$word"))'


def zsh(commands: Commands) -> str:
    lines = [f"    '{_zsh_flag(flag)}' \\" for flag in _flags()]
    return "\n".join(
        (
            "#compdef userspace-proxy",
            "# zsh completion for userspace-proxy: put this into a directory of $fpath, as _userspace-proxy.",
            "_arguments \\",
            *lines,
            f"    '1::command:({' '.join(commands)})'",
            "",
        )
    )


def _zsh_flag(flag: AnyFlag) -> str:
    repeats = "*" if flag.kind.repeats else ""
    head = f"{repeats}--{flag.name}{'' if flag.is_switch else '='}[{_brief(flag)}]"
    if flag.is_switch:
        return head
    action = f"({' '.join(flag.kind.choices)})" if flag.kind.choices else ""
    if flag.kind.placeholder == "PATH":
        action = "_files"
    return f"{head}:{flag.kind.placeholder.replace(':', ' ')}:{action}"


def fish(commands: Commands) -> str:
    lines = ["# fish completion for userspace-proxy: put this into ~/.config/fish/completions/userspace-proxy.fish"]
    lines.append("complete -c userspace-proxy -f")
    for name, command in commands.items():
        lines.append(f"complete -c userspace-proxy -n __fish_use_subcommand -a {name} -d '{_plain(command.help)}'")
        for after, words in command.words.items():
            option = "" if after == name else f" -x -{'s' if len(after) == 2 else 'l'} {after.lstrip('-')}"
            seen = f"-n '__fish_seen_subcommand_from {name}'"
            lines.append(f"complete -c userspace-proxy {seen}{option} -a '{' '.join(words)}'")
    for flag in _flags():
        line = f"complete -c userspace-proxy {'-s' if len(flag.name) == 1 else '-l'} {flag.name} -d '{_brief(flag)}'"
        if flag.kind.placeholder == "PATH":
            line += " -r -F"
        elif not flag.is_switch:
            line += f" -x -a '{' '.join(flag.kind.choices)}'"
        lines.append(line)
    return "\n".join([*lines, ""])


SHELLS: Mapping[str, Callable[[Commands], str]] = {"bash": bash, "zsh": zsh, "fish": fish}


def _flags() -> Iterator[AnyFlag]:
    """Each flag once; those that change nothing are left to who knows them."""
    for name, flag in KNOWN.items():
        if name == flag.name and flag.group != UNUSED:
            yield flag


def _brief(flag: AnyFlag) -> str:
    """The first sentence of its help."""
    return _plain(flag.help.partition(". ")[0].removesuffix("."))


def _plain(text: str) -> str:
    """Without what means something to a shell."""
    return text.replace("'", "").replace("[", "(").replace("]", ")").replace(":", ",")
