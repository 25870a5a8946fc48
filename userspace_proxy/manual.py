"""The reference manual: `--help` and docs/configuration.md, both made from the fields of `Config`.

What the flags are and mean is in `config`; here is only how it is laid out, once for a terminal and once
for a page. `python -m userspace_proxy.manual` writes the page.
"""

from __future__ import annotations

import json
import sys
import textwrap
import typing
from collections.abc import Iterator

from userspace_proxy.config import HELP, VERSION, Config, Flag, settings

WIDTH = 100
"""Columns of the help text."""

_HEAD = """\
userspace-proxy serves Kubernetes Services without kernel load balancing: it opens a proxy port for each
service port, has the kernel send it the traffic of the service's addresses, and relays each connection
to an endpoint chosen by round robin or client address."""

_SOURCES = "[--manifests PATH | --kubeconfig PATH]"

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
    ("Remove what a killed run left in the kernel:", "--cleanup"),
)

_WRITING = """\
Every flag may have one dash or two, and `_` for `-`. A value follows after `=` or as the next argument; a
switch takes one with `=` only (--splice=false). A flag given twice counts as given last, unless it is a
list. Durations are written as in Go: 300ms, 1.5s, 2h45m."""


def help_text() -> str:
    lines = [
        _fill(_HEAD),
        "",
        "Usage:",
        "  userspace-proxy [--manifests PATH | --kubeconfig PATH | --master URL] [flags]",
        "",
        "Examples:",
    ]
    for what, arguments in _EXAMPLES:
        lines += [f"  {what}", f"    userspace-proxy {arguments}"]
    for group, flags in _groups():
        lines += ["", f"{group}:"]
        for flag, default in flags:
            lines += [f"  {flag.spelled}" + (f"   (default {default})" if default not in ("", "false") else "")]
            lines += [_fill(flag.help, "        ")]
    return "\n".join([*lines, "", _fill(_WRITING), ""])


def markdown() -> str:
    """The page docs/configuration.md."""
    lines = [
        "# Configuration",
        "",
        "<!-- Made from userspace_proxy/config/table.py by `make docs`; edit it there. -->",
        "",
        "Everything is set by flags, named and written as kube-proxy's. `userspace-proxy --help` prints the same.",
        "All mistakes in a command line are told at once, one a line, and the exit status is then 2.",
        "",
        textwrap.fill(" ".join(_WRITING.replace("--splice=false", "`--splice=false`").split()), 110),
    ]
    for group, flags in _groups():
        lines += ["", f"## {group}"]
        for flag, default in flags:
            lines += ["", f"### `{flag.spelled}`", "", _terms(flag, default), "", textwrap.fill(flag.help, 110)]
    shown = json.dumps(Config().configz(), indent=2)
    lines += ["", "## As /configz shows it", "", "With nothing set:", "", "```json", shown, "```", ""]
    return "\n".join(lines)


def _terms(flag: Flag[typing.Any], default: str) -> str:
    allowed = flag.kind.allowed
    return f"Allowed: {allowed}. Default: {f'`{default}`' if default else 'empty'}."


def _groups() -> Iterator[tuple[str, list[tuple[Flag[typing.Any], str]]]]:
    """Each group of flags, and their defaults as one would write them."""
    groups: dict[str, list[tuple[Flag[typing.Any], str]]] = {}
    for flag, value in settings(Config()):
        default = flag.kind.show(value)
        groups.setdefault(flag.group, []).append((flag, default))
    for flag in (VERSION, HELP):
        groups[flag.group].append((flag, "false"))
    yield from groups.items()


def _fill(text: str, indent: str = "") -> str:
    words = " ".join(text.split())
    return textwrap.fill(
        words, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )


if __name__ == "__main__":
    sys.stdout.write(markdown())
