"""Each kind: what it reads, what it refuses, and what it says is allowed."""

from __future__ import annotations

import enum

import pytest

from userspace_proxy.config.kinds import (
    CIDRS,
    GATES,
    PATH,
    PATHS,
    PORTS,
    PROXY_MODE,
    SWITCH,
    choice,
    decimal,
    duration,
    number,
    server,
)


class Colour(enum.StrEnum):
    RED = "red"
    GREEN = "green"
    BLUE = "blue"


KINDS = {
    "wait": duration("1s", least="1ms"),
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
        ("wait", "1ms", 0.001),
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
        ("wait", "1ns", "too short"),
        ("wait", "999us", "too short"),
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
    assert KINDS["wait"].allowed == "a duration such as 300ms, 1.5s or 2h45m, 1ms or longer"
    assert KINDS["pause"].allowed == "a duration such as 300ms, 1.5s or 2h45m, 0s or longer"
    assert KINDS["count"].allowed == "a whole number from -1 to 10"
    assert KINDS["colour"].allowed == "red, green or blue, in this very case"
    assert "port 80" in KINDS["listen"].allowed


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_example_is_allowed_and_reads_back(kind):
    value = kind.parse(kind.example)
    assert kind.parse(kind.show(value)) == value


class Weather(enum.StrEnum):
    UNKNOWN = ""
    FINE = "fine"
    FOUL = "foul"


def test_a_choice_may_be_nothing():
    kind = choice(Weather)
    assert kind.parse("") is Weather.UNKNOWN
    assert kind.allowed == "fine or foul, in this very case, or nothing"
    assert (kind.placeholder, kind.choices) == ("fine|foul", ("fine", "foul"))


@pytest.mark.parametrize(
    ("name", "text", "zero"),
    [
        ("wait", "0", True),
        ("wait", "0h0m", True),
        ("wait", "1s", False),
        ("count", "0", True),
        ("count", "1", False),
        ("listen", "", True),
        ("listen", "::", False),
        ("nets", "", True),
    ],
)
def test_what_go_takes_for_not_set(name, text, zero):
    assert KINDS[name].is_zero(text) is zero


@pytest.mark.parametrize(
    ("kind", "text", "json"),
    [
        (duration("1s", least="0s"), "90s", "1m30s"),
        (number(0, 9, 1), "7", 7),
        (decimal(5), "5", 5),
        (decimal(5), "2.5", 2.5),
        (SWITCH, "f", False),
        (CIDRS, "::/0", ["::/0"]),
        (CIDRS, "", None),
        (GATES, "SCTPSupport=true,SCTPSupport=false", {"SCTPSupport": False}),
        (server(80, ""), "::", "[::]:80"),
        (server(80, ""), "", ""),
        (PATHS, "/a", ["/a"]),
        (PORTS, "1+2", "1-3"),
        (PATH, "", ""),
    ],
)
def test_in_json(kind, text, json):
    shown = kind.as_json(kind.parse(text))
    assert (shown, type(shown)) == (json, type(json))


@pytest.mark.parametrize("text", ["", "userspace"])
def test_the_mode_there_is(text):
    assert PROXY_MODE.parse(text) == text
