"""How a flag is spelled, and what it says of a value that it cannot have."""

from __future__ import annotations

import dataclasses

import pytest

from tests.config.test_kinds import KINDS
from userspace_proxy.config.flag import UNUSED, Flag, setting, unused

KNOWN = {name: Flag(name, kind, "Group", "Help.") for name, kind in KINDS.items()}


def test_a_problem_tells_found_allowed_and_what_to_write():
    assert KNOWN["count"].problem("99", "too large") == (
        "--count='99': too large; allowed: a whole number from -1 to 10; write for example --count=3"
    )
    assert KNOWN["colour"].problem(None, "has no value") == (
        "--colour: has no value; allowed: red, green or blue, in this very case; write for example --colour=red"
    )
    assert "\n" not in KNOWN["colour"].problem("a\nb", "no such choice")


@pytest.mark.parametrize(
    ("name", "spelled"),
    [("wait", "--wait DURATION"), ("fast", "--fast"), ("v", "-v, --v N"), ("listen", "--listen IP[:PORT]")],
)
def test_spelled(name, spelled):
    assert KNOWN[name].spelled == spelled


def test_a_name_with_a_dot_is_a_place_in_the_file_alone():
    @dataclasses.dataclass
    class Settings:
        depth: int = unused(1, "pool.depth", KINDS["count"], "it is dry")
        width: int = setting(2, "width", KINDS["count"], "Group", "Help.", place="pool.width", keeps_zero=True)

    depth, width = (each.metadata["flag"] for each in dataclasses.fields(Settings))
    assert (depth.in_file_only, depth.place, depth.group, depth.keeps_zero) == (True, "pool.depth", UNUSED, False)
    assert (width.in_file_only, width.place, width.group, width.keeps_zero) == (False, "pool.width", "Group", True)
    assert Settings() == Settings(1, 2)
