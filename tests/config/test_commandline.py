"""Command lines in the manner of Go programs, and the mistakes in them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.config.test_flag import KNOWN
from tests.config.test_kinds import KINDS
from userspace_proxy.config.commandline import read
from userspace_proxy.config.flag import Flag


def read_plainly(*argv):
    given, problems = read(argv, KNOWN)
    return [(flag.name, value) for flag, value in given], problems


@pytest.mark.parametrize(
    ("argv", "given"),
    [
        ([], []),
        (["--wait=1s"], [("wait", "1s")]),
        (["--wait", "1s"], [("wait", "1s")]),
        (["-wait", "1s", "-colour=red"], [("wait", "1s"), ("colour", "red")]),
        (["--wait="], [("wait", "")]),
        (["--wait", ""], [("wait", "")]),
        (["--wait", "-1s"], [("wait", "-1s")]),
        (["--wait=a=b"], [("wait", "a=b")]),
        (["--fast"], [("fast", "true")]),
        (["--fast=false", "-fast=1"], [("fast", "false"), ("fast", "1")]),
        (["--fast", "--count", "1"], [("fast", "true"), ("count", "1")]),
        (["-v", "4"], [("v", "4")]),
        (["-v=4", "--v=5", "-v6"], [("v", "4"), ("v", "5"), ("v", "6")]),
        (["", "--fast", ""], [("fast", "true")]),
        (["--fast", "--"], [("fast", "true")]),
        (["--fast", "--", ""], [("fast", "true")]),
    ],
)
def test_reading(argv, given):
    assert read_plainly(*argv) == (given, [])


def test_underscores_and_dashes_are_the_same():
    known = {"max-flows": Flag("max-flows", KINDS["count"], "Group", "Help.")}
    given, problems = read(["--max_flows=1", "--max-flows", "2", "-max_flows=3"], known)
    assert ([value for _, value in given], problems) == (["1", "2", "3"], [])


NO_WAIT = KNOWN["wait"].problem(None, "has no value")


@pytest.mark.parametrize(
    ("argv", "given", "problems"),
    [
        (["--wait"], [], [NO_WAIT]),
        (["--wait", "--fast"], [("fast", "true")], [NO_WAIT]),
        (["--wait", "--count=1"], [("count", "1")], [NO_WAIT]),
        (["--wiat", "1s"], [], ["--wiat: unknown flag; did you mean --wait?"]),
        (["--wiat=1s"], [], ["--wiat: unknown flag; did you mean --wait?"]),
        (["--WAIT=1s"], [], ["--WAIT: unknown flag; did you mean --wait?"]),
        (["--proxy-mode", "--fast"], [("fast", "true")], ["--proxy-mode: unknown flag; --help lists those there are"]),
        (["--proxy-mode", "-v4"], [("v", "4")], ["--proxy-mode: unknown flag; --help lists those there are"]),
        (["---fast"], [], ["---fast: unknown flag; did you mean --fast?"]),
        (["-x4"], [], ["-x4: unknown flag; --help lists those there are"]),
        (["--v4"], [], ["--v4: unknown flag; did you mean --v?"]),
        (
            ["web.yaml"],
            [],
            ["'web.yaml': unexpected argument; --help lists flags, and the commands that may come first"],
        ),
        (["-"], [], ["'-': unexpected argument; --help lists flags, and the commands that may come first"]),
        (
            ["--", "--fast"],
            [],
            ["'--fast': unexpected argument; --help lists flags, and the commands that may come first"],
        ),
        (
            ["--fast", "false"],
            [("fast", "true")],
            ["'false': a switch takes its value with '='; write --fast=false"],
        ),
        (
            ["--fast", "no"],
            [("fast", "true")],
            ["'no': unexpected argument; --help lists flags, and the commands that may come first"],
        ),
        (
            ["x", "--oops", "1", "--count=1", "y"],
            [("count", "1")],
            [
                "'x': unexpected argument; --help lists flags, and the commands that may come first",
                "--oops: unknown flag; --help lists those there are",
                "'y': unexpected argument; --help lists flags, and the commands that may come first",
            ],
        ),
    ],
)
def test_mistakes(argv, given, problems):
    assert read_plainly(*argv) == (given, problems)


@given(st.lists(st.text(alphabet="-=_vwait1 sfx", max_size=8)))
def test_no_command_line_breaks_the_reader(argv):
    given, problems = read(argv, KNOWN)
    assert len(given) + len(problems) <= len(argv)
    assert all("\n" not in problem for problem in problems)
