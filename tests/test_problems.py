from __future__ import annotations

import logging

import pytest

from userspace_proxy.model import IPFamily, ServicePortName, SocketKey
from userspace_proxy.problems import Problems

NAME = ServicePortName("default", "web", "http")
KEY = SocketKey(NAME, IPFamily.IPV4)


def test_trouble_is_logged_when_it_is_new_and_kept_while_it_lasts(caplog: pytest.LogCaptureFixture) -> None:
    problems = Problems()
    for _ in range(3):
        problems.begin([NAME])
        problems.note(KEY, "no port")
        problems.note(KEY, "no port")
        assert problems.of(KEY) == ["no port"]
    problems.begin([])
    assert problems.of(KEY) == ["no port"], "another's round"
    problems.begin([NAME])
    assert not problems.of(KEY)
    assert not len(problems)
    problems.begin([NAME])
    problems.note(KEY, "no port")
    assert [r.levelno for r in caplog.records] == [logging.WARNING] * 2, "once at first, once after it had passed"


def test_what_concerns_both_families_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    problems = Problems()
    keys = [SocketKey(NAME, family) for family in IPFamily]
    for _ in range(2):
        problems.begin([NAME])
        for key in keys:
            problems.note(key, "no such protocol")
        assert [problems.of(key) for key in keys] == [["no such protocol"]] * 2
    problems.note(keys[1], "no port")
    assert [r.getMessage() for r in caplog.records] == [f"{NAME}: no such protocol", f"{NAME}: no port"]


def test_what_has_passed_is_forgotten(caplog: pytest.LogCaptureFixture) -> None:
    problems = Problems()
    problems.forget(KEY, "never noted")
    for message in ("no port", "no address"):
        problems.note(KEY, message)
    problems.forget(KEY, "no port")
    assert problems.of(KEY) == ["no address"]
    problems.forget(KEY, "no address")
    assert not len(problems)
