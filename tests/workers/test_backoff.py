"""When a worker that died is replaced."""

from __future__ import annotations

from userspace_proxy.workers.backoff import HEALTHY, LONGEST, Backoff


def test_the_first_death_is_made_good_at_once() -> None:
    assert Backoff().after(0.0) == 0.0
    assert Backoff().after(HEALTHY) == 0.0


def test_dying_again_and_again_is_met_with_growing_pauses_up_to_a_bound() -> None:
    backoff = Backoff()
    pauses = [backoff.after(0.5) for _ in range(12)]
    assert pauses[:5] == [0.0, 0.1, 0.2, 0.4, 0.8]
    assert pauses == sorted(pauses)
    assert pauses[-1] == LONGEST


def test_a_healthy_life_makes_good_what_was_before() -> None:
    backoff = Backoff()
    for _ in range(5):
        backoff.after(0.5)
    assert [backoff.after(HEALTHY), backoff.after(0.5)] == [0.0, 0.0]
