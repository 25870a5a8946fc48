"""A worker's copy of a balancer: as it is told, and telling what it finds out."""

from __future__ import annotations

import pytest

from userspace_proxy import ejection
from userspace_proxy.model import SessionAffinity
from userspace_proxy.workers.copies import Copy
from userspace_proxy.workers.messages import Balance, Dialled, Probing

ONE, TWO, THREE = (("127.0.0.1", number) for number in (1, 2, 3))


@pytest.fixture
def told() -> list[Dialled | Probing]:
    return []


@pytest.fixture
def copy(told: list[Dialled | Probing]) -> Copy:
    made = Copy(7, 600.0, told.append)
    made.balance(Balance(7, (TWO, THREE, ONE), (), SessionAffinity.NONE, 10.0))
    return made


def test_it_follows_orders(copy: Copy) -> None:
    assert [copy.balancer.pick("192.0.2.1") for _ in range(4)] == [TWO, THREE, ONE, TWO]
    copy.balance(Balance(7, (ONE, THREE, TWO), (ONE,), SessionAffinity.CLIENT_IP, 10.0))
    assert {copy.balancer.pick("192.0.2.1") for _ in range(9)} == {THREE}
    assert copy.metrics.affinity_hits == 8


def test_it_tells_what_is_new_and_not_what_it_was_told(copy: Copy, told: list[Dialled | Probing]) -> None:
    copy.balancer.hear(Dialled(7, ONE, worked=False))
    copy.balancer.failed(TWO)
    copy.balancer.failed(TWO)
    assert set(copy.balancer.ejected) == {ONE, TWO}
    copy.balancer.hear(Dialled(7, TWO, worked=True))
    copy.balancer.succeeded(TWO)
    copy.balancer.succeeded(ONE)
    assert told == [Dialled(7, TWO, worked=False), Dialled(7, ONE, worked=True)]
    copy.balance(Balance(7, (ONE, TWO), (ONE,), SessionAffinity.NONE, 10.0))
    copy.balance(Balance(7, (ONE, TWO), (ONE,), SessionAffinity.NONE, 10.0))
    assert len(told) == 2


def test_one_probe_is_enough_for_all(
    copy: Copy, told: list[Dialled | Probing], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ejection, "FIRST", 0.0)  # the first ejection is over at once, and a probe is due

    def picked() -> list[tuple[str, int]]:
        return [copy.balancer.pick("192.0.2.1") for _ in range(6)]

    copy.balancer.hear(Dialled(7, ONE, worked=False))
    assert picked().count(ONE) == 1
    assert told == [Probing(7, ONE)]
    copy.balancer.hear(Dialled(7, ONE, worked=True))
    copy.balancer.hear(Dialled(7, ONE, worked=False))
    copy.balancer.hear(Probing(7, ONE))
    assert ONE not in picked()
    copy.balancer.hear(Dialled(7, ONE, worked=False))
    assert picked().count(ONE) == 1, "that probe has failed, and its time is over as well"
    assert told == [Probing(7, ONE)] * 2


def test_it_knows_whether_there_is_something_left_to_tell(copy: Copy) -> None:
    assert not copy.has_sessions
    copy.metrics.active += 1
    assert copy.has_sessions
