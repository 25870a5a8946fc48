"""The reference manual: `--help` and docs/configuration.md, both made from the fields of `Config`.

What the flags are and mean is in `config`; here is only how it is laid out, once for a terminal and once
for a page. `python -m userspace_proxy.manual` writes the page.
"""

from __future__ import annotations

import json
import sys
import textwrap
import typing
from collections.abc import Iterator, Mapping

from userspace_proxy.config import Config, Flag, settings
from userspace_proxy.config.flag import GROUPS, UNUSED
from userspace_proxy.config.gates import IN_USE, STAGES, is_on
from userspace_proxy.config.table import API_VERSION, KIND, SPECIAL

WIDTH = 100
"""Columns of the help text."""

_HEAD = """\
userspace-proxy serves Kubernetes Services without kernel load balancing: it opens a proxy port for each
service port, has the kernel send it the traffic of the service's addresses, and relays each connection
to an endpoint chosen by round robin or client address."""

_EXAMPLES = (
    (
        "Serve what a directory holds, through iptables rules where this host has them:",
        "--manifests /etc/userspace-proxy",
    ),
    (
        "On a node of a cluster, going on with the last state while the API server is away:",
        "--kubeconfig /etc/kubernetes/kube-proxy.conf --state-dir /var/lib/kube-proxy",
    ),
    (
        "Without root: nothing is captured, the proxy ports are told in the log:",
        "--manifests web.yaml --capture=none --bind-address=127.0.0.1",
    ),
    (
        "Proxy ports that a firewall can be told of, and slow UDP servers:",
        "--manifests web.yaml --proxy-port-range=30000-32000 --udp-timeout=2s",
    ),
    (
        "With the file that kube-proxy had in the cluster:",
        "--config /var/lib/kube-proxy/config.conf",
    ),
    ("Remove what a killed run left in the kernel:", "--cleanup"),
)

_WRITING = """\
Every flag may have one dash or two, and `_` for `-`. A value follows after `=` or as the next argument; a
switch takes one with `=` only (--splice=false). A flag given twice counts as given last, unless it is a
list or a map. Durations are written as in Go: 300ms, 1.5s, 2h45m."""

_ORIGIN = """\
The flags are those of kube-proxy 1.20 and 1.25, with what they mean there, but for the first group, which
kube-proxy has not."""

_FILE = f"""\
With --config=FILE, a {KIND} of {API_VERSION} says what flags would. A field that
nobody knows is passed over, and of one that is there twice the last counts; both are told in the log, with
their lines. 0, null and an empty text stand for the default, except where 0 is said to be kept; so only
flags can do without the servers of health and metrics. `--write-config-to=FILE` writes such a file. When it
has changed, the proxy checks it; if it can be used and says something else than before, the proxy ends in
order, as on SIGTERM, and starts anew, in the same process; if not, it goes on as it is and says why."""


def help_text(commands: Mapping[str, str]) -> str:
    """`commands` are the other things that the program does, and what each is for."""
    lines = [
        _fill(_HEAD),
        "",
        "Usage:",
        "  userspace-proxy [--manifests PATH | --kubeconfig PATH | --master URL] [flags]",
        *(f"  userspace-proxy {usage}\n{_fill(what, '        ')}" for usage, what in commands.items()),
        "",
        "Examples:",
    ]
    for what, arguments in _EXAMPLES:
        lines += [f"  {what}", f"    userspace-proxy {arguments}"]
    lines += ["", _fill(_ORIGIN)]
    for group, flags in _groups():
        lines += ["", f"{group}:"]
        for flag, default in flags:
            lines += [f"  {flag.spelled}" + (f"   (default {default})" if default not in ("", "false") else "")]
            lines += [_fill(flag.help, "        ")]
    lines += ["", f"{UNUSED}:"]
    for reason, unused in _unused():
        lines += [_fill(", ".join(f"--{flag.name}" for flag in unused), "  "), _fill(f"{reason}.", "        ")]
    return "\n".join([*lines, "", _fill(_WRITING), ""])


def markdown() -> str:
    """The page docs/configuration.md."""
    lines = [
        "# Configuration",
        "",
        "<!-- Made from the tables in userspace_proxy/config/ by `make docs`; edit it there. -->",
        "",
        _page(_ORIGIN + " `userspace-proxy --help` prints the same."),
        "All mistakes in a command line are told at once, one a line, and the exit status is then 2.",
        "",
        _page(_WRITING.replace("--splice=false", "`--splice=false`")),
    ]
    for group, flags in _groups():
        lines += ["", f"## {group}"]
        for flag, default in flags:
            lines += ["", f"### `{flag.spelled}`", "", _terms(flag, default), "", _page(flag.help)]
    lines += ["", f"## {UNUSED}", "", "They are checked, and that they were given is told once."]
    for reason, unused in _unused():
        lines += ["", _page(f"{', '.join(f'`{flag.spelled}`' for flag in unused)}: {reason}.")]
    lines += ["", "## Feature gates", "", *_gates(), "", "## The config file", "", _page(_FILE), "", *_fields()]
    shown = json.dumps(Config().configz(), indent=2)
    lines += ["", "## As /configz shows it", "", "With nothing set:", "", "```json", shown, "```", ""]
    return "\n".join(lines)


def _fields() -> Iterator[str]:
    """A table of the fields of the config file."""
    yield "| field | flag | default |"
    yield "|---|---|---|"
    for flag, value in sorted(settings(Config()), key=lambda each: each[0].place):
        if flag.place:
            name = "none" if flag.in_file_only else f"`--{flag.name}`"
            kept = "; 0 is kept" if flag.keeps_zero else ""
            yield f"| `{flag.place}` | {name} | `{json.dumps(flag.kind.as_json(value))}`{kept} |"


def _gates() -> Iterator[str]:
    yield from ("These change something. They are beta, and on by themselves.", "")
    yield from (f"- `{name}`: {what}" for name, what in IN_USE.items())
    yield from ("", "Known, and taken without effect, with what they are by themselves:")
    for stage in sorted({*STAGES.values()}):
        for on in (True, False):
            names = [
                f"`{name}`"
                for name, of in STAGES.items()
                if name not in IN_USE and of is stage and is_on((), name) is on
            ]
            if names:
                yield from ("", _page(f"{stage}, {'on' if on else 'off'}: {', '.join(sorted(names))}"))


def _page(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 110, break_on_hyphens=False, break_long_words=False)


def _terms(flag: Flag[typing.Any], default: str) -> str:
    allowed = flag.kind.allowed
    return f"Allowed: {allowed}. Default: {f'`{default}`' if default else 'empty'}."


def _groups() -> Iterator[tuple[str, list[tuple[Flag[typing.Any], str]]]]:
    """Each group of flags that do something, and their defaults as one would write them."""
    flags = [(flag, flag.kind.show(value)) for flag, value in settings(Config())]
    flags += [(flag, "") for flag in SPECIAL]
    for group in GROUPS:
        if group != UNUSED:
            yield group, [(flag, default) for flag, default in flags if flag.group == group]


def _unused() -> Iterator[tuple[str, list[Flag[typing.Any]]]]:
    """Flags that change nothing, by the reason."""
    by_reason: dict[str, list[Flag[typing.Any]]] = {}
    for flag, _ in settings(Config()):
        if flag.group == UNUSED and not flag.in_file_only:
            by_reason.setdefault(flag.help, []).append(flag)
    yield from by_reason.items()


def _fill(text: str, indent: str = "") -> str:
    words = " ".join(text.split())
    return textwrap.fill(
        words, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )


if __name__ == "__main__":
    sys.stdout.write(markdown())
