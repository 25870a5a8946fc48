"""The help text and the page are whole, fit their width, and speak the truth."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest

from userspace_proxy.config import Config, parse, settings
from userspace_proxy.config.gates import STAGES
from userspace_proxy.manual import WIDTH, help_text, markdown

COMMANDS = {"turn WHAT": "Turn it.", "wait": "Wait until it has been turned. " * 4}


def test_the_help_text_fits_a_terminal():
    text = help_text(COMMANDS)
    assert max(map(len, text.splitlines())) <= WIDTH
    assert text.endswith("\n")
    assert "\n\n\n" not in text


@pytest.mark.parametrize("text", [help_text(COMMANDS), markdown()], ids=["help", "page"])
def test_every_flag_is_there_with_its_words(text):
    plain = " ".join(text.split())
    for flag, _ in settings(Config()):
        assert flag.in_file_only or plain.count(f"--{flag.name}") >= 1
        assert flag.in_file_only or " ".join(flag.help.split()) in plain
    assert "--version" in plain
    assert "--help" in plain


def test_defaults_are_told_where_there_is_something_to_tell():
    assert "--udp-timeout DURATION   (default 250ms)\n" in help_text(COMMANDS)
    assert "--splice   (default true)\n" in help_text(COMMANDS)
    assert "--cleanup\n" in help_text(COMMANDS)
    assert "--proxy-port-range RANGE\n" in help_text(COMMANDS)
    assert "### `--proxy-port-range RANGE`" in markdown()
    assert "Default: `250ms`." in markdown()


def test_the_examples_are_accepted():
    lines = [
        line.split(maxsplit=1)[1]
        for line in help_text(COMMANDS).splitlines()
        if line.startswith("    userspace-proxy ")
    ]
    assert len(lines) >= 4
    for line in lines:
        parse(shlex.split(line), look=False)


def test_the_page_is_what_the_module_writes():
    done = subprocess.run([sys.executable, "-m", "userspace_proxy.manual"], capture_output=True, text=True, check=True)
    assert done.stdout == markdown()


def test_commands_are_told():
    assert "  userspace-proxy turn WHAT\n        Turn it.\n" in help_text(COMMANDS)


def test_the_page_has_every_gate_and_every_field_of_the_file():
    page = markdown()
    assert all(f"`{gate}`" in page for gate in STAGES)
    fields = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(fields) == len([flag for flag, _ in settings(Config()) if flag.place])
    assert "| `conntrack.min` | `--conntrack-min` | `131072`; 0 is kept |" in fields
    assert '| `winkernel.sourceVip` | none | `""` |' in fields
