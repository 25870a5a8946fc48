"""Choosing an endpoint: round robin and ClientIP affinity for one service port in one family.

What affects the choice is in here and nothing else is: the usable endpoints in their order, whose turn it
is, and which client is pinned to which endpoint. Which endpoints a Service has is decided in `sources`,
which of them would lead back to us in `plan`, how long one that cannot be dialled is passed over in `ejection`,
and how a failed dial is met in `sockets`, which asks again with what it has tried.

No lock: everything runs on the event loop's thread. `pick` is called for every connection and flow, so
it costs the same however many endpoints and clients there are.
"""

from __future__ import annotations

import typing
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence

from userspace_proxy.ejection import Ejections
from userspace_proxy.exceptions import NoEndpoints
from userspace_proxy.model import DEFAULT_AFFINITY_TIMEOUT, Address, Endpoint, SessionAffinity

MAX_CLIENTS = 65_536
"""Clients remembered by one service port: some 15 MB at worst, whoever sends the traffic."""


class Randomness(typing.Protocol):
    """What is wanted of a `random.Random`."""

    def shuffle(self, x: list[Address], /) -> None: ...
    def random(self) -> float: ...


class Counters(typing.Protocol):
    """Where choices are counted: one for all scopes of a service port, which come and go while its counts only grow."""

    affinity_hits: int
    """Picks that were decided by affinity."""
    ejections: int
    """How often an endpoint was ejected."""


class _Pin:
    """Where a client was sent, and when it last came."""

    __slots__ = ("address", "used")

    def __init__(self, address: Address, used: float) -> None:
        self.address = address
        self.used = used


class LoadBalancer:
    """Proxy sockets hold on to one and call `pick`; everything else is for the proxier."""

    __slots__ = (
        "_clock",
        "_counters",
        "_ejections",
        "_index",
        "_known",
        "_max_clients",
        "_pins",
        "_rng",
        "affinity",
        "affinity_timeout",
        "ejected",
        "endpoints",
        "generation",
        "on_change",
    )

    def __init__(
        self,
        clock: Callable[[], float],
        rng: Randomness,
        counters: Counters,
        affinity: SessionAffinity = SessionAffinity.NONE,
        affinity_timeout: float = DEFAULT_AFFINITY_TIMEOUT,
        *,
        max_ejection: float = 0.0,
        max_clients: int = MAX_CLIENTS,
    ) -> None:
        """`affinity_timeout` and `max_ejection` are in seconds; without the latter nothing is ejected."""
        self._clock = clock
        self._rng = rng
        self._counters = counters
        self._max_clients = max_clients
        self.endpoints: tuple[Address, ...] = ()
        """Those that clients are sent to, in the order of their turns."""
        self._known: frozenset[Address] = frozenset()
        self._index = 0
        self.generation = 0
        """Counts the changes of the set of endpoints: while it is the same, no endpoint has left."""
        self._ejections = Ejections(clock, rng, max_ejection)
        self.ejected: Collection[Address] = self._ejections.out
        """Endpoints passed over for now; always the same object, and empty while all is well."""
        self.on_change: list[Callable[[], None]] = []
        """Called after each change of the endpoints or of affinity, for who picks by a copy elsewhere."""
        # None without affinity. The least recently used comes first, and as all pins live equally long,
        # so does the next to expire. A plain dict keeps that order too, but finding its first key gets
        # slow once many before it were deleted, which is what a full table does all the time.
        self._pins: OrderedDict[str, _Pin] | None = None
        self.configure(affinity, affinity_timeout)

    @property
    def clients(self) -> int:
        """Clients that are remembered now; some may have expired since the last `purge`."""
        return len(self._pins) if self._pins is not None else 0

    def has(self, address: Address) -> bool:
        """Whether clients are still sent to this endpoint."""
        return address in self._known

    def pick(self, client_ip: str, tried: Collection[Address] = ()) -> Address:
        """Choose the endpoint for a client, the next one in turn unless affinity says otherwise.

        A retry names what it has `tried`: these are passed over while others remain, and affinity is
        overridden, because it may be what led to the dead endpoint; the client is pinned anew.

        Ejected endpoints are passed over as well, but still come before those that were tried. A client that is
        pinned to one goes there all the same: only its own dial can tell that it has to move.

        Raises NoEndpoints.
        """
        pins = self._pins
        if pins is None:
            return self._next(tried)
        now = self._clock()
        pin = pins.get(client_ip)
        if pin is None:
            address = self._next(tried)
            pins[client_ip] = _Pin(address, now)
            if len(pins) > self._max_clients:
                pins.popitem(last=False)
            return address
        if not tried and now - pin.used < self.affinity_timeout:
            self._counters.affinity_hits += 1
        else:
            pin.address = self._next(tried)
        pin.used = now
        pins.move_to_end(client_ip)
        return pin.address

    def _next(self, tried: Collection[Address]) -> Address:
        endpoints = self.endpoints
        if not endpoints:
            raise NoEndpoints("no endpoint is ready, and none is serving while it terminates; wait for one, or add one")
        index = self._choose(tried) if tried or self.ejected else self._index
        self._index = index + 1 if index + 1 < len(endpoints) else 0
        return endpoints[index]

    def _choose(self, tried: Collection[Address]) -> int:
        """Whose turn it is once some are passed over: the best kind there is, and the first in turn among those."""
        endpoints = self.endpoints
        count = len(endpoints)
        untried = None
        for turn in range(self._index, self._index + count):
            index = turn % count
            if endpoints[index] in tried:
                continue
            if not self._passes_over(endpoints[index]):
                return index
            if untried is None:
                untried = index
        return self._index if untried is None else untried

    def _passes_over(self, address: Address) -> bool:
        return self._ejections.passes_over(address)

    def probed(self, address: Address) -> None:
        """Somebody who picks by a copy sends a client to this ejected endpoint, to find out."""
        self._ejections.probed(address)

    def failed(self, address: Address) -> bool:
        """A dial to this endpoint failed: it may be ejected. Whether that is news."""
        before = self._ejections.count
        news = self._ejections.failed(address, self._known)
        self._counters.ejections += self._ejections.count - before
        return news

    def succeeded(self, address: Address) -> bool:
        """A dial to this endpoint succeeded: it is not ejected any more. Whether that is news."""
        return self._ejections.succeeded(address)

    def unrefused(self, address: Address) -> None:
        """Nothing bad was heard of a client sent here, where endpoints need not answer: a probe succeeds so."""
        if self._ejections.is_probed(address):
            self.succeeded(address)

    def update(self, endpoints: Sequence[Endpoint]) -> bool:
        """Take over the service port's endpoints, all of them; say whether the usable set changed.

        Usable are the ready ones; if there is none, those that still serve while they terminate. An equal
        set changes nothing, in whatever order it is told. Another one is shuffled, so that nodes do not
        all begin with the same endpoint, and clients pinned to endpoints that left are forgotten.
        """
        usable = [endpoint.address for endpoint in endpoints if endpoint.ready]
        if not usable:
            usable = [endpoint.address for endpoint in endpoints if endpoint.serving and endpoint.terminating]
        known = frozenset(usable)
        if known == self._known:
            return False
        order = list(dict.fromkeys(usable))
        self._rng.shuffle(order)
        self.endpoints = tuple(order)
        self._known = known
        self._ejections.keep(known)
        self._index = 0
        self.generation += 1
        if self._pins:
            for client_ip in [ip for ip, pin in self._pins.items() if pin.address not in known]:
                del self._pins[client_ip]
        for tell in self.on_change:
            tell()
        return True

    def configure(self, affinity: SessionAffinity, timeout: float) -> None:
        """Change affinity at once. Without it all clients are forgotten; a timeout holds for old pins too."""
        self.affinity = affinity
        self.affinity_timeout = timeout
        if affinity is SessionAffinity.NONE:
            self._pins = None
        elif self._pins is None:
            self._pins = OrderedDict()
        for tell in self.on_change:
            tell()

    def purge(self) -> None:
        """Forget clients whose affinity has expired. `pick` does not need it; the memory does."""
        pins = self._pins
        if not pins:
            return
        now = self._clock()
        while pins and now - next(iter(pins.values())).used >= self.affinity_timeout:
            pins.popitem(last=False)
