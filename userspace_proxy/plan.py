"""What to do, in which order, so that no client is ever sent where nobody listens.

`desired` says what should be, from a Snapshot's service ports; `plan` says how to get there from what is.
Both only compute, and both can be asked about the part of a change alone, which `Neighbours` tells. The proxier
carries the steps out, one by one, and keeps what is (its `have`) true to what worked. Endpoints are not in here:
they go to the load balancers at once and move no socket or rule.

The safe order. A load balancer knows its endpoints before its socket opens; the socket listens and the
node port is claimed before the capture sends traffic there. Closing is the same reversed: first the
capture is withdrawn, then the node port is given up, and sockets close last of all. A service port whose
protocol changes has to close before it can open, and goes through both halves in one plan.

When a step fails, the proxier notes it, leaves `have` without it, and goes on:

- `Open` or `Claim`: what depends on it is left out of every `Replace` that follows, see `without`.
- `Replace`: the rest of the plan is dropped, because the old redirects may still be in force, and a proxy
  port that is closed under its redirect can be taken by another service port, which would get the traffic.

The next sync plans anew from what is by then, so what failed is tried again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import NamedTuple

from userspace_proxy import ports
from userspace_proxy.model import (
    Endpoint,
    IPFamily,
    Place,
    Portal,
    PortalKind,
    Protocol,
    ServicePort,
    ServicePortName,
    SocketKey,
    inside,
)


class LocalPort(NamedTuple):
    """A port on all addresses of this node: a node port, or a proxy port."""

    family: IPFamily
    protocol: Protocol
    port: int

    @classmethod
    def of(cls, place: Place) -> LocalPort | None:
        """Not of a place that is an address."""
        family, protocol, ip, port = place
        return None if ip else cls(family, protocol, port)

    @property
    def portal(self) -> Portal:
        return Portal(self.family, self.protocol, "", self.port, PortalKind.NODE_PORT)

    def __str__(self) -> str:
        return f"*:{self.port}/{self.protocol} ({self.family.value})"


@dataclass(frozen=True, slots=True)
class State:
    """What is, or what should be. Mappings may be views of something live, as long as nothing moves while planning."""

    sockets: Mapping[SocketKey, Protocol] = field(default_factory=dict)
    """Proxy sockets that are open, serving or refusing."""
    claims: AbstractSet[LocalPort] = frozenset()
    """Node ports held by a bound socket."""
    redirects: Mapping[Portal, SocketKey] = field(default_factory=dict)
    """What the capture sends where; each place once. It implies which socket is for clients `inside`."""


@dataclass(frozen=True, slots=True)
class Open:
    key: SocketKey
    protocol: Protocol


@dataclass(frozen=True, slots=True)
class Claim:
    """Hold a node port. Claims have no owner, so that one passes from service port to service port unreleased."""

    place: LocalPort


@dataclass(frozen=True, slots=True)
class Replace:
    """Make these the redirects of all whom the plan is about."""

    redirects: Mapping[Portal, SocketKey]


@dataclass(frozen=True, slots=True)
class Unclaim:
    place: LocalPort


@dataclass(frozen=True, slots=True)
class Close:
    key: SocketKey


Step = Open | Claim | Replace | Unclaim | Close


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a service port is not served, or not everywhere it should be."""

    key: SocketKey
    message: str


def desired(
    services: Mapping[ServicePortName, ServicePort],
    families: Collection[IPFamily],
    protocols: Collection[Protocol],
    have: State,
) -> tuple[State, list[Problem]]:
    """What should be: a socket for each service port in each served family, with the portals that it can have.

    `have` decides conflicts only: who has a portal keeps it.
    """
    sockets: dict[SocketKey, Protocol] = {}
    asked: dict[SocketKey, tuple[Portal, ...]] = {}
    """By the service port in its family: who owns a place does not lose it by a change of scope."""
    problems: list[Problem] = []
    for name, service in services.items():
        for family in service.families:
            key = SocketKey(name, family)
            if family not in families:
                problems.append(Problem(key, _not_served("family", family.value, [f.value for f in families])))
            elif service.protocol not in protocols:
                problems.append(Problem(key, _not_served("protocol", service.protocol, protocols)))
            else:
                portals = asked[key] = service.portals(family)
                for portal in portals:
                    scoped = service.key(name, portal)
                    sockets[scoped] = sockets[inside(portal, scoped)] = service.protocol
    owned = {portal: key.base for portal, key in have.redirects.items()}
    owners, conflicts = ports.assign(asked, owned)
    redirects = {portal: services[owner.name].key(owner.name, portal) for portal, owner in owners.items()}
    problems += (Problem(conflict.wanted_by, str(conflict)) for conflict in conflicts)
    claims = frozenset(_claim(portal) for portal in redirects if portal.kind is PortalKind.NODE_PORT)
    return State(sockets, claims, redirects), problems


def _not_served(what: str, found: str, allowed: Iterable[str]) -> str:
    return f"{what} {found} is not served by this proxy, only {' and '.join(sorted(allowed))}: leave it to another one"


def _claim(portal: Portal) -> LocalPort:
    return LocalPort(portal.family, portal.protocol, portal.port)


def targets(redirects: Mapping[Portal, SocketKey]) -> set[SocketKey]:
    """All sockets that clients are sent to, those for clients inside included."""
    return {*redirects.values(), *(inside(portal, key) for portal, key in redirects.items())}


def plan(have: State, want: State) -> tuple[Step, ...]:
    """The steps from one state to another, in the safe order; none if they are equal."""
    opened = [key for key, protocol in want.sockets.items() if have.sockets.get(key) is not protocol]
    # A key that is redirected to must not be opened under its redirect: it will have another proxy port.
    redirected = targets(have.redirects) if opened else set()
    renewed = {key for key in opened if key in have.sockets or key in redirected}
    redirects = have.redirects

    # Everything new comes up first, so that sockets that are renewed are away as briefly as can be.
    steps: list[Step] = [Open(key, want.sockets[key]) for key in opened if key not in renewed]
    steps += (Claim(place) for place in want.claims if place not in have.claims)
    if not renewed.isdisjoint(redirected):
        redirects = {
            portal: key for portal, key in want.redirects.items() if renewed.isdisjoint((key, inside(portal, key)))
        }
        steps.append(Replace(redirects))
    for key in opened:
        if key in renewed:
            if key in have.sockets:
                steps.append(Close(key))
            steps.append(Open(key, want.sockets[key]))
    if redirects != want.redirects:
        steps.append(Replace(want.redirects))
    steps += (Unclaim(place) for place in have.claims if place not in want.claims)
    steps += (Close(key) for key in have.sockets if key not in want.sockets)
    return tuple(steps)


def without(step: Replace, unopened: Collection[SocketKey], unclaimed: Collection[LocalPort] = ()) -> Replace:
    """The step as far as it is safe after some `Open` or `Claim` failed.

    A node port that could not be claimed is not redirected either: whoever holds it keeps its traffic.
    """
    if not unopened and not unclaimed:
        return step
    return Replace(
        {
            portal: key
            for portal, key in step.redirects.items()
            if key not in unopened
            and inside(portal, key) not in unopened
            and not (portal.kind is PortalKind.NODE_PORT and _claim(portal) in unclaimed)
        }
    )


@dataclass(frozen=True, slots=True)
class Part:
    """Service ports, and all places that they ask for or asked for before."""

    names: AbstractSet[ServicePortName]
    places: AbstractSet[Place]


class Neighbours:
    """Who asks for which place, so that a change is planned with everybody whom it can concern, and nobody else.

    Whoever asks for a place in common with another may get it or lose it by the other's change, and is a neighbour.
    Service ports that are not connected by any chain of neighbours can be planned apart, and the steps are the same.
    """

    __slots__ = ("_askers", "_places")

    def __init__(self) -> None:
        self._places: dict[ServicePortName, tuple[Place, ...]] = {}
        self._askers: dict[Place, tuple[ServicePortName, ...]] = {}

    def update(self, names: Iterable[ServicePortName], services: Mapping[ServicePortName, ServicePort]) -> Part:
        """Take over what these ask for now, and say who is concerned; who is not in `services` is gone."""
        concerned, places = set(names), set[Place]()
        unseen: set[Place] = set()
        for name in concerned:
            unseen.update(self._places.get(name, ()))
            self._ask(name, services.get(name))
            unseen.update(self._places.get(name, ()))
        while unseen:
            places |= unseen
            neighbours = {asker for place in unseen for asker in self._askers.get(place, ())} - concerned
            concerned |= neighbours
            unseen = {place for name in neighbours for place in self._places[name]} - places
        return Part(concerned, places)

    def _ask(self, name: ServicePortName, service: ServicePort | None) -> None:
        for place in self._places.pop(name, ()):
            askers = tuple(asker for asker in self._askers.pop(place) if asker != name)
            if askers:
                self._askers[place] = askers
        if service is not None:
            portals = (portal for family in service.families for portal in service.portals(family))
            places = self._places[name] = tuple(dict.fromkeys(portal.place for portal in portals))
            for place in places:
                self._askers[place] = (*self._askers.get(place, ()), name)


class OwnPlaces:
    """Which endpoints are places of our own: dialled, they would come back to us and be dialled again, for ever.

    `places` are those of the redirects and, as ports on every local address, of the proxy sockets.
    """

    __slots__ = ("_is_local", "places")

    def __init__(self, is_local: Callable[[str], bool]) -> None:
        self.places: set[Place] = set()
        self._is_local = is_local

    def among(self, key: SocketKey, protocol: Protocol, endpoints: Iterable[Endpoint]) -> tuple[Endpoint, ...]:
        """Those of the endpoints, all of the key's family, that must not be dialled."""
        places, family = self.places, key.family
        return tuple(
            endpoint
            for endpoint in endpoints
            if (family, protocol, endpoint.ip, endpoint.port) in places
            # In this order: few ports are ours, and which addresses are local has to be looked up.
            or ((family, protocol, "", endpoint.port) in places and self._is_local(endpoint.ip))
        )
