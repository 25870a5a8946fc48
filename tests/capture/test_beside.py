"""Which of the two is told what, and what becomes of their answers."""

from __future__ import annotations

import asyncio

import pytest

from tests.capture.conversation import redirect
from userspace_proxy.capture.base import Changes, Difference
from userspace_proxy.capture.beside import Beside
from userspace_proxy.exceptions import CaptureError
from userspace_proxy.model import Protocol, Redirect

TCP, CALLS = redirect(), redirect(port=81, protocol=Protocol.SCTP)


class Told:
    name = "told"
    rewrites_destination = True
    listens = frozenset[Protocol]()

    def __init__(self) -> None:
        self.told: list[tuple[tuple[Redirect, ...], Difference | None]] = []
        self.fails = False
        self.refused: tuple[str, ...] = ()
        self.closed = False

    async def start(self) -> None: ...

    async def replace(self, redirects, difference=None) -> Changes:
        self.told.append((tuple(redirects), difference))
        return Changes(1, 2, 3, self.refused)

    async def withdraw(self) -> None: ...

    async def close(self) -> None:
        self.closed = True
        if self.fails:
            raise CaptureError("something is left")


@pytest.fixture
def both() -> tuple[Beside, Told, Told]:
    capture, listening = Told(), Told()
    return Beside(capture, listening, [Protocol.SCTP]), capture, listening


def test_each_hears_of_its_own_protocols(both):
    beside, capture, listening = both
    assert beside.listens == {Protocol.SCTP}
    assert asyncio.run(beside.replace([TCP, CALLS])) == Changes(2, 4, 6)
    assert (capture.told, listening.told) == ([((TCP,), None)], [((CALLS,), None)])


def test_a_change_of_one_is_no_look_at_the_other(both):
    beside, capture, listening = both
    asyncio.run(beside.replace([TCP]))
    listening.refused = ("no such address",)
    found = asyncio.run(beside.replace([TCP, CALLS], Difference(new=(CALLS,))))
    assert found == Changes(1, 2, 3, ("no such address",))
    assert len(capture.told) == 1
    assert listening.told[-1] == ((CALLS,), Difference(new=(CALLS,)))
    # What is refused stays refused, whoever is asked next.
    assert asyncio.run(beside.replace([CALLS], Difference(gone=(TCP,)))).refused == ("no such address",)
    assert len(listening.told) == 2
    asyncio.run(beside.replace([CALLS], Difference()))
    assert capture.told[-1] == ((), Difference())
    assert listening.told[-1] == ((CALLS,), Difference())


def test_both_are_closed_whatever_happens(both):
    beside, capture, listening = both
    capture.fails = listening.fails = True
    with pytest.raises(CaptureError, match="something is left; something is left"):
        asyncio.run(beside.close())
    assert capture.closed
    assert listening.closed
