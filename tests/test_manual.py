"""The help text and the page are whole, fit their width, and speak the truth."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest

from userspace_proxy.config import Config, parse, settings
from userspace_proxy.manual import WIDTH, help_text, markdown


def test_the_help_text_fits_a_terminal():
    text = help_text()
    assert max(map(len, text.splitlines())) <= WIDTH
    assert text.endswith("\n")
    assert "\n\n\n" not in text


@pytest.mark.parametrize("text", [help_text(), markdown()], ids=["help", "page"])
def test_every_flag_is_there_with_its_words(text):
    plain = " ".join(text.split())
    for flag, _ in settings(Config()):
        assert plain.count(flag.spelled) >= 1
        assert " ".join(flag.help.split()) in plain
    assert "--version" in plain
    assert "--help" in plain


def test_defaults_are_told_where_there_is_something_to_tell():
    assert "--udp-timeout DURATION   (default 250ms)\n" in help_text()
    assert "--splice   (default true)\n" in help_text()
    assert "--cleanup\n" in help_text()
    assert "--proxy-port-range RANGE\n" in help_text()
    assert "### `--proxy-port-range RANGE`" in markdown()
    assert "Default: `250ms`." in markdown()


def test_the_examples_are_accepted():
    lines = [line.split(maxsplit=1)[1] for line in help_text().splitlines() if line.startswith("    userspace-proxy ")]
    assert len(lines) >= 4
    for line in lines:
        parse(shlex.split(line))


def test_the_page_is_what_the_module_writes():
    done = subprocess.run([sys.executable, "-m", "userspace_proxy.manual"], capture_output=True, text=True, check=True)
    assert done.stdout == markdown()
