"""Pages that are made from code are as the code would make them now."""

from __future__ import annotations

import pathlib
import re

from userspace_proxy.manual import markdown

DOCS = pathlib.Path(__file__).parent.parent / "docs"


def test_configuration_is_up_to_date():
    written = (DOCS / "configuration.md").read_text(encoding="utf-8")
    assert written == markdown(), "docs/configuration.md is out of date; run `make docs` and commit it"


def test_the_numbers_of_differences_are_nobody_elses():
    text = (DOCS / "differences.md").read_text(encoding="utf-8")
    numbers = [int(number) for number in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)]
    assert sorted(numbers) == sorted(set(numbers))
    assert {int(number) for number in re.findall(r"row (\d+)", text)} <= set(numbers)
