"""What answers mean and what comes next, without any server."""

from __future__ import annotations

import json
import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from userspace_proxy.exceptions import APIError
from userspace_proxy.sources.answers import (
    ENDPOINT_SLICES,
    MAX_LINE,
    SELECTOR,
    SERVICES,
    Course,
    Lines,
    Pace,
    Unreadable,
    list_query,
    node,
    read_event,
    read_object,
    read_page,
    refusal,
    watch_query,
)


class Middle:
    """Chance that takes the middle way: no jitter."""

    def random(self) -> float:
        return 0.5

    def randint(self, a: int, b: int) -> int:
        return (a + b) // 2


def course() -> Course:
    return Course(Pace(), Middle())


def no_answer() -> APIError:
    return APIError("gone")


def line(kind: str, value: object) -> bytes:
    return json.dumps({"type": kind, "object": value}).encode()


# -- requests


def test_where_resources_are():
    assert SERVICES.path == "/api/v1/services"
    assert ENDPOINT_SLICES.path == "/apis/discovery.k8s.io/v1/endpointslices"
    assert node("n1").selector == ("fieldSelector", "metadata.name=n1")


def test_queries():
    assert list_query(SERVICES) == {"labelSelector": SELECTOR, "limit": "500"}
    assert list_query(SERVICES, limit=0, proceed="x") == {"labelSelector": SELECTOR, "continue": "x"}
    assert watch_query(SERVICES, "7", Middle()) == {
        "labelSelector": SELECTOR,
        "watch": "true",
        "allowWatchBookmarks": "true",
        "resourceVersion": "7",
        "timeoutSeconds": "450",
    }


# -- answers


def test_a_page():
    page = read_page(SERVICES, b'{"metadata": {"resourceVersion": "9", "continue": "c"}, "items": [{"a": 1}]}')
    assert (page.version, page.proceed, len(page.items)) == ("9", "c", 1)
    assert read_object(SERVICES, page.items[0]) == {"a": 1, "kind": "Service", "apiVersion": "v1"}
    assert read_page(SERVICES, b'{"metadata": {"resourceVersion": "9"}, "items": null}').items == []


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"metadata": {"resourceVersion": 5}}', b"[" * 9999, b"\xff"])
def test_what_is_no_page(body):
    with pytest.raises(APIError, match=r"list services: found .*; allowed: a list of objects in JSON"):
        read_page(SERVICES, body)


@pytest.mark.parametrize("value", [b"9" * 5000, b'"\xff"'])
def test_an_object_that_cannot_be_taken_over_still_has_its_name(value):
    raw = msgspec.Raw(b'{"metadata": {"namespace": "a", "name": "b"}, "x": ' + value + b"}")
    found = read_object(SERVICES, raw)
    assert isinstance(found, Unreadable)
    assert found[:3] == ("Service", "a", "b")
    assert "Service a/b" in found.problem


def test_an_object_without_bottom():
    found = read_object(SERVICES, msgspec.Raw(b"[" * 100_000 + b"]" * 100_000))
    assert isinstance(found, Unreadable)
    assert found.name == ""


def test_events():
    event = read_event(SERVICES, line("ADDED", {"kind": "Service", "metadata": {"name": "a", "resourceVersion": "3"}}))
    assert (event.type, event.version, event.value["metadata"]["name"]) == ("ADDED", "3", "a")
    assert read_event(SERVICES, line("BOOKMARK", {"metadata": {"resourceVersion": "4"}})) == ("BOOKMARK", "4", None)


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (line("ERROR", {"code": 410, "message": "too old"}), 410),
        (line("ERROR", {}), 500),
        (line("ERROR", "what"), 500),
        (line("MAYBE", {}), 500),
        (b"<html>", 500),
        (b"{}", 500),
    ],
)
def test_events_that_are_errors(text, status):
    with pytest.raises(APIError) as caught:
        read_event(SERVICES, text)
    assert caught.value.status == status


def test_refusals_say_what_to_do():
    error = refusal(ENDPOINT_SLICES, "watch", 403, b'{"message": "User \\"x\\" cannot"}')
    assert str(error) == (
        'watch endpointslices: the API server says 403 (User "x" cannot): give the user a ClusterRole with the rule '
        '{apiGroups: ["discovery.k8s.io"], resources: ["endpointslices"], verbs: ["list", "watch"]}'
    )
    assert 'apiGroups: [""]' in str(refusal(SERVICES, "list", 403, b"no json"))
    assert refusal(SERVICES, "list", 429, b"", "17").retry_after == 17
    assert refusal(SERVICES, "list", 429, b'{"details": {"retryAfterSeconds": 3}}', "a date").retry_after == 3


# -- lines


@given(st.lists(st.binary(max_size=20).map(lambda part: part.replace(b"\n", b"")), max_size=9), st.randoms())
def test_lines_however_they_are_cut(lines, rng):
    text = b"".join(each + b"\n" for each in lines) + b"not whole"
    cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(9)))
    splitter = Lines()
    found = [each for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True) for each in splitter.feed(text[a:b])]
    assert found == lines


def test_a_line_without_end_is_given_up():
    lines = Lines()
    with pytest.raises(APIError, match="more than 64 MiB"):
        for _ in range(MAX_LINE // (1 << 20) + 1):
            assert list(lines.feed(b"x" * (1 << 20))) == []


# -- the course


def test_delays_double_up_to_a_bound_and_never_less_than_asked_for():
    ours = course()
    delays = [ours.failed(no_answer(), 0) for _ in range(8)]
    assert delays == pytest.approx([0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30, 30])
    assert ours.failed(APIError("busy", status=429, retry_after=60), 0) == pytest.approx(75)
    assert ours.failed(APIError("busy", status=429, retry_after=9e9), 0) == pytest.approx(375)


def test_jitter_spreads_what_fails_together():
    delays = {Course(Pace(), random.Random(seed)).failed(no_answer(), 0) for seed in range(50)}
    assert len(delays) == 50
    assert all(0.4 <= delay <= 1.2 for delay in delays)


def test_progress_forgets_failures_and_a_list_alone_does_not():
    ours = course()
    ours.failed(no_answer(), 0)
    ours.listed("5")
    assert ours.failed(no_answer(), 0) == pytest.approx(1.6), "a list that no watch follows must not spin"
    ours.progressed("6")
    assert ours.version == "6"
    assert ours.failed(no_answer(), 0) == pytest.approx(0.8)
    assert not ours.is_failing
    assert ours.failed(no_answer(), 60) == pytest.approx(0.8), "it was well for a minute"


def test_a_watch_that_ends_is_begun_again_at_once_unless_it_was_none():
    ours = course()
    ours.listed("5")
    assert ours.watched(300, progress=False) == 0
    assert ours.watched(0.1, progress=True) == 0
    assert [ours.watched(0.1, progress=False) for _ in range(2)] == pytest.approx([0.8, 1.6])


def test_the_version_is_kept_while_nothing_is_said_against_it():
    ours = course()
    ours.listed("5")
    for error in [no_answer()] * 9 + [APIError("", status=status) for status in (401, 403, 429, 502, 503) * 4]:
        ours.failed(error, 0)
        assert ours.version == "5"


@pytest.mark.parametrize("status", [400, 404, 410])
def test_a_version_that_is_refused_is_given_up(status):
    ours = course()
    ours.listed("5")
    ours.failed(APIError("", status=status), 0)
    assert ours.version == ""


def test_a_version_is_doubted_after_three_errors():
    ours = course()
    ours.listed("5")
    versions = []
    for _ in range(3):
        ours.failed(APIError("too large resource version", status=504), 0)
        versions.append(ours.version)
    assert versions == ["5", "5", ""]


def test_pages_that_come_too_slowly_are_one():
    ours = course()
    ours.failed(APIError("", status=410), 0)
    assert ours.limit == 0
    ours.listed("5")
    assert ours.limit == 500
