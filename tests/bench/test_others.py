"""Commands from the environment: what is replaced in them, and which are refused before anything is measured."""

from __future__ import annotations

import contextlib
import pathlib

import pytest

from bench.others import Command
from bench.peers import Way
from bench.programs import BenchError
from bench.services import Service

SERVICE = Service("http", "tcp", ("127.96.0.1", 80), (("127.1.1.1", 8080),))


def words(command: str) -> list[str]:
    return Command("mine", command, ["taskset"], 9900)._words(SERVICE, 9901)


def test_the_four_known_names_are_replaced_and_other_braces_left_alone():
    command = "proxy '{ip}:{port}' --to={endpoint_ip}:{endpoint_port} '{x: 1}' '${port}' {}"
    expected = ["taskset", "proxy", "127.0.0.1:9901", "--to=127.1.1.1:8080", "{x: 1}", "${port}", "{}"]
    assert words(command) == expected


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("proxy {ip}:{prot}", r"{prot} in its command is not known; what is replaced is {ip}, {port}, {endpoint_ip}, "),
        ("proxy 'a", "No closing quotation"),
        (" ", "is empty"),
    ],
)
def test_what_is_no_command_is_refused_at_once(command: str, why: str):
    with pytest.raises(BenchError, match="^mine: .*" + why):
        Command("mine", command, [], 9900)


@pytest.mark.parametrize("program", ["true", "/nowhere/proxy"])
def test_one_that_does_not_start_says_so(tmp_path: pathlib.Path, program: str):
    starting = Command("mine", program, [], 9900).start({"http": SERVICE}, Way.STRAIGHT, tmp_path)
    with pytest.raises(BenchError, match=program), contextlib.ExitStack() as stack:
        stack.enter_context(starting)


def test_one_that_does_not_tell_its_version_goes_by_its_name():
    assert Command("mine", "/nowhere/proxy {port}", [], 9900).version() == "/nowhere/proxy"
