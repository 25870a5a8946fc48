"""What runs come to, and how that is told."""

from __future__ import annotations

import pytest

from bench.measure import Run
from bench.report import sections
from bench.results import CLUSTER, OURS, STRAIGHT, TARGETS, Cell, Results, Target, of_samples, short

COST = "CPU us/request"
CELL = Cell("keep-alive", "64 connections", COST)


def run(number: int, peer: str, cost: float, *, way: str = STRAIGHT) -> Run:
    return Run(number, "keep-alive", way, peer, "64 connections", {COST: cost}, [f"{peer} --flag", "wrk url"])


def rounds(ours: list[float], theirs: list[float]) -> list[Run]:
    return [
        run(number, peer, cost)
        for peer, costs in ((OURS, ours), ("haproxy", theirs))
        for number, cost in enumerate(costs, 1)
    ]


def test_a_spread_is_the_median_and_the_rounds_at_both_ends():
    assert Results(rounds([3, 1, 8], [])).spread(CELL) == (3, 1, 8)


def test_a_ratio_is_that_of_the_medians_and_its_spread_that_of_single_rounds():
    results = Results(rounds([10, 20, 30], [10, 40, 10]))
    assert results.ratio(CELL, CELL._replace(peer="haproxy")) == (2.0, 0.5, 3.0)


def test_a_round_that_only_one_of_them_has_is_in_no_ratio_of_rounds():
    results = Results([*rounds([10, 20], [10]), run(3, "haproxy", 5)])
    assert results.ratio(CELL, CELL._replace(peer="haproxy")) == (2.0, 1.0, 1.0)


def test_a_quantile_is_that_of_all_rounds_samples_and_its_spread_that_of_single_rounds():
    """Here a p99 of each round is its slowest, and only one of all the 200 is so slow."""
    what = "ms to a change"
    cell = CELL._replace(figure=f"p99 {what}")
    samples = {number: [1.0] * 99 + [last] for number, last in ((1, 50.0), (2, 7.0))}
    runs = [
        Run(
            number,
            cell.group,
            STRAIGHT,
            OURS,
            cell.load,
            of_samples(what, of_it, "p99", "slowest"),
            [],
            samples={what: of_it},
        )
        for number, of_it in samples.items()
    ]
    assert Results(runs).spread(cell._replace(figure=f"slowest {what}")) == (50.0, 7.0, 50.0)
    assert Results(runs).spread(cell) == (1.0, 1.0, 1.0)
    runs[0].samples[what][:3] = [3.0] * 3
    assert Results(runs).spread(cell) == (3.0, 1.0, 1.0)


def test_there_is_no_ratio_to_nothing():
    to = CELL._replace(peer="haproxy")
    assert Results(rounds([1, 1, 1], [0, 0, 5])).ratio(CELL, to) is None
    assert Results(rounds([1], [0])).ratio(CELL, to) is None


def test_what_was_not_measured_has_neither():
    results = Results(rounds([1], []))
    assert results.spread(CELL, CLUSTER) is None
    assert results.ratio(CELL, CELL._replace(peer="haproxy")) is None


@pytest.mark.parametrize(("bounds", "met", "missed"), [({"at_most": 0.9}, 0.9, 0.91), ({"at_least": 1.4}, 1.4, 1.39)])
def test_a_bound_itself_is_met(bounds: dict[str, float], met: float, missed: float):
    target = Target("", CELL, **bounds)
    assert target.is_met(met)
    assert not target.is_met(missed)


@pytest.mark.parametrize(("theirs", "verdict"), [(20.0, "met"), (10.0, "MISSED")])
def test_the_table_of_targets_has_what_was_measured_and_says_how_it_went(theirs: float, verdict: str):
    runs = rounds([9.5], [theirs])
    first, second = sections(Results(runs), runs)
    assert first.title == "Targets"
    assert [row[-1] for row in first.rows[1:]] == [verdict]
    assert second.rows[0][2:] == [OURS, "haproxy", f"{OURS} / haproxy"]
    assert f"{OURS}: {OURS} --flag" in second.notes


def test_targets_are_for_figures_of_ours():
    assert all(target.cell.peer == OURS for target in TARGETS)


@pytest.mark.parametrize(
    ("value", "text"), [(12345.6, "12,346"), (99.96, "100.0"), (12.34, "12.3"), (1.234, "1.23"), (0.01234, "0.0123")]
)
def test_numbers_are_as_long_as_they_say_something(value: float, text: str):
    assert short(value) == text
