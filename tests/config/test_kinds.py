"""Each kind: what it reads, what it refuses, and what it says is allowed."""

from __future__ import annotations

import enum

import pytest

from userspace_proxy.config.kinds import CIDRS, SWITCH, choice, duration, number, server


class Colour(enum.StrEnum):
    RED = "red"
    GREEN = "green"
    BLUE = "blue"


KINDS = {
    "wait": duration("1s"),
    "pause": duration("1s", least="0s"),
    "count": number(-1, 10, 3),
    "colour": choice(Colour),
    "fast": SWITCH,
    "nets": CIDRS,
    "listen": server(80, "0.0.0.0:80"),
    "v": number(0, 10, 2),
}


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("wait", "1ns", 1e-9),
        ("pause", "0", 0.0),
        ("count", "-1", -1),
        ("count", "+10", 10),
        ("count", "007", 7),
        ("colour", "green", Colour.GREEN),
        ("listen", "", None),
        ("listen", "::1", ("::1", 80)),
    ],
)
def test_kinds(name, text, value):
    assert KINDS[name].parse(text) == value


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("wait", "0s", "too short"),
        ("wait", "-1s", "too short"),
        ("pause", "-1ns", "too short"),
        ("count", "-2", "too small"),
        ("count", "11", "too large"),
        ("count", "1.0", "not a whole number"),
        ("count", "1_0", "not a whole number"),
        ("count", "٣", "not a whole number"),
        ("count", "9" * 5000, "not a whole number"),
        ("count", "", "not a whole number"),
        ("colour", "Red", "no such choice"),
        ("colour", "", "no such choice"),
        ("listen", ":80", "not an IP address"),
    ],
)
def test_what_kinds_refuse(name, text, why):
    with pytest.raises(ValueError) as caught:
        KINDS[name].parse(text)
    assert str(caught.value) == why


def test_what_is_allowed_is_told():
    assert KINDS["wait"].allowed == "a duration such as 300ms, 1.5s or 2h45m, above 0"
    assert KINDS["pause"].allowed == "a duration such as 300ms, 1.5s or 2h45m, 0s or longer"
    assert KINDS["count"].allowed == "a whole number from -1 to 10"
    assert KINDS["colour"].allowed == "red, green or blue, in lower case"
    assert "port 80" in KINDS["listen"].allowed


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_example_is_allowed_and_reads_back(kind):
    value = kind.parse(kind.example)
    assert kind.parse(kind.show(value)) == value
