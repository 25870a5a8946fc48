"""How a flag is spelled, and what it says of a value that it cannot have."""

from __future__ import annotations

import pytest

from tests.config.test_kinds import KINDS
from userspace_proxy.config.flag import Flag

KNOWN = {name: Flag(name, kind, "Group", "Help.") for name, kind in KINDS.items()}


def test_a_problem_tells_found_allowed_and_what_to_write():
    assert KNOWN["count"].problem("99", "too large") == (
        "--count='99': too large; allowed: a whole number from -1 to 10; write for example --count=3"
    )
    assert KNOWN["colour"].problem(None, "has no value") == (
        "--colour: has no value; allowed: red, green or blue, in lower case; write for example --colour=red"
    )
    assert "\n" not in KNOWN["colour"].problem("a\nb", "no such choice")


@pytest.mark.parametrize(
    ("name", "spelled"),
    [("wait", "--wait DURATION"), ("fast", "--fast"), ("v", "-v, --v N"), ("listen", "--listen IP[:PORT]")],
)
def test_spelled(name, spelled):
    assert KNOWN[name].spelled == spelled
