"""Where results go."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

import pytest

from bench import control, plan
from bench.__main__ import _folder, _groups

DAY = datetime.datetime(2026, 11, 21, tzinfo=datetime.UTC)
PEERS = [*plan.peers([])]


@pytest.mark.parametrize(
    ("rounds", "groups", "peers", "sizes", "name"),
    [
        (5, _groups(), PEERS, control.SIZES, "2026-11-21"),
        (9, _groups(), PEERS, (*control.SIZES, 20000), "2026-11-21"),
        (4, _groups(), PEERS, control.SIZES, "2026-11-21-partial"),
        (5, _groups()[1:], PEERS, control.SIZES, "2026-11-21-partial"),
        (5, _groups(), PEERS[:-1], control.SIZES, "2026-11-21-partial"),
        (5, _groups(), PEERS, control.SIZES[1:], "2026-11-21-partial"),
        (5, _groups(), PEERS, (), "2026-11-21-partial"),
    ],
)
def test_results_of_a_part_leave_those_of_the_whole_alone(
    rounds: int, groups: Sequence[str], peers: Sequence[str], sizes: Sequence[int], name: str
):
    assert _folder(DAY, rounds, plan.stages(groups, peers), sizes, PEERS) == name
