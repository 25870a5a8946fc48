"""How long an endpoint is passed over, who probes it, and that one always remains."""

from __future__ import annotations

import random
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from userspace_proxy.ejection import FIRST, PROBE, Ejections
from userspace_proxy.model import Address

ONE, TWO, THREE = (("10.0.0.1", 80), ("10.0.0.2", 80), ("10.0.0.3", 80))
ALL = frozenset((ONE, TWO, THREE))


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Same:
    """Chance that is none."""

    def random(self) -> float:
        return 0.0


def ejections(longest: float = 10.0) -> tuple[Ejections, Clock]:
    clock = Clock()
    return Ejections(clock, Same(), longest), clock


def test_a_failure_ejects_and_its_time_ends_with_a_single_probe() -> None:
    found, clock = ejections()
    assert found.failed(ONE, ALL)
    assert found.passes_over(ONE)
    assert not found.passes_over(TWO)
    clock.now += FIRST
    assert [found.passes_over(ONE) for _ in range(3)] == [False, True, True]


def test_a_probe_is_one_until_it_has_failed() -> None:
    found, clock = ejections()
    assert not found.is_probed(ONE)
    found.failed(ONE, ALL)
    assert not found.is_probed(ONE)
    clock.now += FIRST
    found.passes_over(ONE)
    assert found.is_probed(ONE)
    found.failed(ONE, ALL)
    assert not found.is_probed(ONE)


def test_each_failed_probe_doubles_the_time_up_to_the_bound() -> None:
    found, clock = ejections(longest=10.0)
    found.failed(ONE, ALL)
    times = []
    for _ in range(6):
        since = clock.now
        while found.passes_over(ONE):
            clock.now += 0.25
        times.append(clock.now - since)
        assert found.failed(ONE, ALL)
    assert times == [1, 2, 4, 8, 10, 10]
    assert found.count == 1


def test_dials_that_were_under_way_say_nothing_new() -> None:
    found, clock = ejections()
    found.failed(ONE, ALL)
    assert not any(found.failed(ONE, ALL) for _ in range(50))
    clock.now += FIRST
    assert not found.passes_over(ONE)


def test_a_success_ends_it_and_the_next_failure_begins_anew() -> None:
    found, clock = ejections()
    found.failed(ONE, ALL)
    clock.now += FIRST
    assert not found.passes_over(ONE)
    assert found.succeeded(ONE)
    assert not found.succeeded(ONE)
    assert not found.passes_over(ONE)
    assert found.failed(ONE, ALL)
    clock.now += FIRST
    assert not found.passes_over(ONE)
    assert found.count == 2


def test_a_probe_that_is_never_heard_of_is_followed_by_another() -> None:
    found, clock = ejections()
    found.failed(ONE, ALL)
    clock.now += FIRST
    assert not found.passes_over(ONE)
    clock.now += PROBE - 0.1
    assert found.passes_over(ONE)
    clock.now += 0.1
    assert not found.passes_over(ONE)


def test_a_probe_that_another_sends_is_waited_for_like_ones_own() -> None:
    found, clock = ejections()
    found.probed(ONE)
    assert not found.out
    found.failed(ONE, ALL)
    clock.now += FIRST / 2
    found.probed(ONE)
    clock.now += PROBE - 0.1
    assert found.passes_over(ONE)
    assert found.failed(ONE, ALL), "which is what became of the probe"
    clock.now += 2 * FIRST - 0.1
    assert found.passes_over(ONE)
    found.probed(ONE)
    clock.now += PROBE
    assert not found.passes_over(ONE), "it was never heard of"


def test_the_last_one_stays_whatever_happens() -> None:
    found, _ = ejections()
    assert [found.failed(address, ALL) for address in (ONE, TWO, THREE)] == [True, True, False]
    assert not found.failed(ONE, frozenset([ONE]))
    found.keep(frozenset([ONE, TWO]))
    assert list(found.out) == [TWO]
    found.keep(frozenset([TWO]))
    assert not found.out


def test_it_can_be_turned_off_and_strangers_are_not_noted() -> None:
    off, _ = ejections(longest=0.0)
    assert not off.failed(ONE, ALL)
    on, _ = ejections()
    assert not on.failed(("10.0.0.9", 80), ALL)
    assert not on.out


def test_jitter_shortens_a_period_by_a_part() -> None:
    clock = Clock()
    found = Ejections(clock, random.Random(1), 10.0)
    found.failed(ONE, ALL)
    assert found.passes_over(ONE)
    clock.now += FIRST
    assert not found.passes_over(ONE)


EVENTS = st.lists(
    st.tuples(st.sampled_from(["failed", "succeeded", "passes_over", "wait", "keep"]), st.sampled_from(sorted(ALL))),
    max_size=60,
)


@given(EVENTS)
def test_one_always_remains_and_nobody_is_out_for_ever(events: list[tuple[str, Address]]) -> None:
    found, clock = ejections()
    endpoints = ALL
    for name, address in events:
        match name:
            case "failed":
                found.failed(address, endpoints)
            case "wait":
                clock.now += 0.7
            case "keep":
                endpoints = ALL - {address}
                found.keep(endpoints)
            case _:
                ask: Callable[[Address], bool] = getattr(found, name)
                ask(address)
        assert found.out.keys() < endpoints
    clock.now += 11
    assert not any(found.passes_over(address) for address in endpoints)
