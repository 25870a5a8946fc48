"""The three questions of probes, over real HTTP."""

from __future__ import annotations

import datetime
import json

import pytest

from tests.admin.client import asking
from userspace_proxy.admin.health import Health, HealthPages, is_live, why_not_ready

PATIENCE = 60.0
NOW = 1000.0
FINE = Health(last_sync=NOW - 5)
STUCK = Health(last_sync=NOW - 90, waiting_since=NOW - 61)
STALE = Health(last_sync=NOW - 90, trouble="no rules", troubled_since=NOW - 61)
LEAVING = Health(last_sync=NOW, leaving=True)


def ask(run, path, health, method="GET"):
    async def main():
        async with asking(HealthPages(lambda: health, lambda: NOW, PATIENCE).app()) as client:
            return await client(path, method)

    return run(main())


@pytest.mark.parametrize(
    ("health", "live"),
    [
        (Health(), True),
        (FINE, True),
        (Health(last_sync=0.0), True),  # nothing has changed for long: nothing is wrong
        (Health(waiting_since=NOW - 60), True),
        (Health(waiting_since=NOW - 60.001), False),
        (STUCK, False),
        (Health(last_sync=NOW - 1, draining=True), True),
        (Health(last_sync=NOW - 1, trouble="no rules"), True),
    ],
)
def test_live_unless_a_change_has_waited_for_too_long(health, live):
    assert is_live(health, NOW, PATIENCE) is live


@pytest.mark.parametrize(
    ("health", "reason"),
    [
        (FINE, ""),
        (STUCK, ""),
        (Health(), "the first sync is not done yet"),
        (Health(trouble="no rules"), "no rules"),
        (Health(last_sync=1.0, trouble="no rules"), "no rules"),
        (Health(last_sync=1.0, trouble="no rules", draining=True), "draining: no new connections are taken"),
    ],
)
def test_ready_once_synced_and_until_drained(health, reason):
    assert why_not_ready(health) == reason


def test_readyz(run):
    fine = ask(run, "/readyz", FINE)
    assert (fine.status, fine.text) == (200, "ok")
    unready = ask(run, "/readyz", Health())
    assert (unready.status, unready.text) == (503, "the first sync is not done yet")


@pytest.mark.parametrize(
    ("path", "health", "status"),
    [
        ("/healthz", Health(), 200),
        ("/healthz", FINE, 200),
        ("/healthz", STUCK, 503),
        ("/healthz", Health(last_sync=NOW, draining=True), 503),
        ("/healthz", LEAVING, 503),
        ("/healthz", Health(last_sync=NOW - 61, troubled_since=NOW - 60), 200),
        ("/healthz", STALE, 503),
        ("/livez", LEAVING, 200),
        ("/livez", STALE, 200),
        ("/livez", FINE, 200),
        ("/livez", STUCK, 503),
        ("/livez", Health(last_sync=NOW, draining=True), 200),
    ],
)
def test_status(run, path, health, status):
    answer = ask(run, path, health)
    assert answer.status == status
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def parse_time(text):
    return datetime.datetime.strptime(text.removesuffix(" UTC"), "%Y-%m-%d %H:%M:%S.%f %z")


def test_while_well_both_times_are_now(run):
    before = datetime.datetime.now(datetime.UTC)
    body = json.loads(ask(run, "/healthz", FINE).text)
    assert list(body) == ["lastUpdated", "currentTime", "nodeEligible"]
    assert body["lastUpdated"] == body["currentTime"]
    assert before <= parse_time(body["currentTime"]) <= datetime.datetime.now(datetime.UTC)
    assert body["nodeEligible"] is True


def test_while_stuck_the_last_sync_is_told_in_wall_time(run):
    body = json.loads(ask(run, "/livez", STUCK).text)
    assert list(body) == ["lastUpdated", "currentTime"]
    assert parse_time(body["currentTime"]) - parse_time(body["lastUpdated"]) == datetime.timedelta(seconds=90)


def test_stuck_before_the_first_sync_there_is_no_time_to_tell(run):
    body = json.loads(ask(run, "/healthz", Health(waiting_since=0.0)).text)
    assert body["lastUpdated"] == "0001-01-01 00:00:00 +0000 UTC"


def test_a_node_that_leaves_is_ineligible_and_nothing_is_wrong_with_its_rules(run):
    body = json.loads(ask(run, "/healthz", LEAVING).text)
    assert body["nodeEligible"] is False
    assert body["lastUpdated"] == body["currentTime"]
    body = json.loads(ask(run, "/healthz", STALE).text)
    assert body["nodeEligible"] is True
    assert body["lastUpdated"] < body["currentTime"]


def test_draining_makes_the_node_ineligible(run):
    assert json.loads(ask(run, "/healthz", Health(last_sync=NOW, draining=True)).text)["nodeEligible"] is False


@pytest.mark.parametrize("path", ["/healthz", "/livez", "/readyz"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_any_method_answers(run, path, method):
    assert ask(run, path, FINE, method).status == 200


def test_other_pages(run):
    answer = ask(run, "/metrics", FINE)
    assert (answer.status, answer.text) == (404, "no such page; there are /healthz, /livez, /readyz\n")
