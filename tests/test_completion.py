"""Completion, asked of the shells themselves."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from userspace_proxy.completion import SHELLS, Command
from userspace_proxy.config.flag import UNUSED
from userspace_proxy.config.table import KNOWN

COMMANDS = {
    "turn": Command("Turn it, won't you.", {"turn": ("left", "right"), "-o": ("once", "twice"), "--output": ("once",)})
}
FLAGS = sorted(f"--{flag.name}" for name, flag in KNOWN.items() if name == flag.name and flag.group != UNUSED)


@pytest.fixture
def scripts(tmp_path: Path) -> Path:
    for shell, script in SHELLS.items():
        (tmp_path / shell).write_text(script(COMMANDS))
    (tmp_path / "web.yaml").touch()
    return tmp_path


def shell(name: str, script: str, directory: Path) -> list[str]:
    if shutil.which(name) is None:
        pytest.skip(f"no {name} here")
    command = (
        [name, "--norc", "-c", script] if name == "bash" else [name, "-f" if name == "zsh" else "-N", "-c", script]
    )
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(directory), "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split("\n")[:-1]


def bash(words: str, scripts: Path) -> list[str]:
    """Words as bash splits them: '=' is one of its own."""
    script = f"""source ./bash
        COMP_WORDS=(userspace-proxy {words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _userspace_proxy
        printf '%s\\n' "${{COMPREPLY[@]}}" """
    return sorted(filter(None, shell("bash", script, scripts)))


@pytest.mark.parametrize(
    ("words", "proposed"),
    [
        ("--capt", ["--capture"]),
        ("--half-close-timeout 5m --s", ["--splice", "--state-dir"]),
        ("--capture =", ["auto", "iptables", "local", "nftables", "none"]),
        ("--capture = i", ["iptables"]),
        ("--capture n", ["nftables", "none"]),
        ("--manifests = we", ["web.yaml"]),
        ("--config we", ["web.yaml"]),
        ("--workers ''", []),
        ("tu", ["turn"]),
        ("--splice tu", []),
        ("-", FLAGS),
        ("--splice =", ["false", "true"]),
        ("--splice = f", ["false"]),
        ("turn ''", ["left", "right"]),
        ("turn -o ''", ["once", "twice"]),
        ("turn -o t", ["twice"]),
        ("turn --output = ''", ["once"]),
        ("turn --capture l", ["local"]),
        ("turn left -o ''", ["once", "twice"]),
        ("--state-dir turn --spl", ["--splice"]),
    ],
)
def test_bash(scripts: Path, words: str, proposed: list[str]) -> None:
    assert bash(words, scripts) == proposed


@pytest.mark.parametrize(
    ("line", "proposed"),
    [
        ("--capt", ["--capture"]),
        ("--capture=i", ["--capture=iptables"]),
        ("--logging-format ", ["json", "text"]),
        ("--manifests=we", ["--manifests=web.yaml"]),
        ("tu", ["turn"]),
        ("turn ", ["left", "right"]),
        ("turn -o ", ["once", "twice"]),
        ("turn --output=", ["--output=once"]),
        ("--w", ["--workers", "--write-config-to"]),
    ],
)
def test_fish(scripts: Path, line: str, proposed: list[str]) -> None:
    found = shell("fish", f"source ./fish; complete -C 'userspace-proxy {line}'", scripts)
    assert sorted(each.partition("\t")[0].rstrip("=") if line[-1] != "=" else each for each in found) == proposed


def test_zsh_knows_each_flag(scripts: Path) -> None:
    """_arguments needs a terminal to complete on; that it is given well-formed specifications can be had without."""
    script = """_arguments() { print -rl -- "$@" }; source ./zsh"""
    specifications = shell("zsh", script, scripts)
    assert sorted(each.lstrip("*").partition("[")[0].rstrip("=") for each in specifications[:-1]) == FLAGS
    assert specifications[-1] == "1::command:(turn)"
    assert any(
        each.startswith("--capture=[")
        and each.endswith("]:auto|iptables|nftables|local|none:(auto iptables nftables local none)")
        for each in specifications
    )
    assert any(each.startswith("*--manifests=[") and each.endswith("]:PATH:_files") for each in specifications)
