"""Endpoints that are passed over for a while because a dial to them failed.

The first failure ejects an endpoint for about a second, each further one for twice as long, up to a bound.
When its time is over one client is sent there as a probe, and nobody else until it is known how that went:
if it is dead still, one client more has met it, not a crowd. A success ends it at once, whoever had it; where endpoints
need not answer, so does a probe that nothing bad was heard of.

At least one endpoint always remains, so that a fault of our own, or of all of them, takes none out of reach.
Who is sent where meanwhile is `loadbalancer`'s to choose; what counts as a failure, `sockets`'.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Collection

from userspace_proxy.model import Address

FIRST = 1.0
"""Seconds of the first ejection."""
JITTER = 0.2
"""The part of a period that is left to chance, so that not all who found out at once probe at once."""
PROBE = 5.0
"""Seconds after which a probe that was not heard of is given up: longer than any attempt of the dial ladder."""


class Chance(typing.Protocol):
    """What is wanted of a `random.Random`."""

    def random(self) -> float: ...


class _Ejection:
    __slots__ = ("failures", "probing", "until")

    def __init__(self) -> None:
        self.failures = 0
        self.probing = False
        self.until = 0.0


class Ejections:
    """Those of one service port in one family. `longest` is in seconds; 0 ejects nothing ever."""

    __slots__ = ("_clock", "_longest", "_rng", "count", "out")

    def __init__(self, clock: Callable[[], float], rng: Chance, longest: float) -> None:
        self._clock = clock
        self._rng = rng
        self._longest = longest
        self.count = 0
        """Endpoints ejected so far; one that stays out is counted once."""
        self.out: dict[Address, _Ejection] = {}
        """Those ejected now. Empty nearly always, which is all the data path has to look at then."""

    def failed(self, address: Address, endpoints: Collection[Address]) -> bool:
        """A dial to one of these `endpoints` failed. Whether that changed anything."""
        ejection = self.out.get(address)
        now = self._clock()
        if ejection is None:
            if not self._longest or address not in endpoints or len(self.out) + 1 >= len(endpoints):
                return False
            ejection = self.out[address] = _Ejection()
            self.count += 1
        elif now < ejection.until and not ejection.probing:
            return False  # on its way before the ejection: no news
        period = min(self._longest, FIRST * 2.0**ejection.failures)
        ejection.failures += 1
        ejection.probing = False
        ejection.until = now + period * (1 - JITTER * self._rng.random())
        return True

    def succeeded(self, address: Address) -> bool:
        """A dial succeeded. Whether that changed anything."""
        return self.out.pop(address, None) is not None

    def is_probed(self, address: Address) -> bool:
        """Whether a probe was sent here that has not failed yet."""
        ejection = self.out.get(address)
        return ejection is not None and ejection.probing

    def passes_over(self, address: Address) -> bool:
        """Whether a client is not to be sent here. The first one after the time is over is: the probe."""
        ejection = self.out.get(address)
        if ejection is None:
            return False
        if self._clock() < ejection.until:
            return True
        self.probed(address)
        return False

    def probed(self, address: Address) -> None:
        """A probe is on its way, whoever has sent it: another one is not needed before it is given up."""
        ejection = self.out.get(address)
        if ejection is not None:
            ejection.probing = True
            ejection.until = self._clock() + PROBE

    def keep(self, endpoints: Collection[Address]) -> None:
        """Only these endpoints exist now. If all of them are out, the one ejected first comes back."""
        for address in [address for address in self.out if address not in endpoints]:
            del self.out[address]
        if self.out and len(self.out) >= len(endpoints):
            del self.out[next(iter(self.out))]
