"""All objects that are known now, by the file they came from, and the Snapshot that they make together.

Two rules. Everything that decides what is served is told here through `replace`, one file at a time and whole, so that
what a file no longer holds is gone. And what did not change is the very same value in the next Snapshot, so that one
change costs as much as its own service and the copying of two dicts.

A mistake never takes anything away: an object that is refused leaves its former version from the same file in place.
How files are found and read is in `sources.manifests`, how objects are read in `sources.objects`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from userspace_proxy.model import Endpoint, Node, ServicePort, ServicePortName, Snapshot
from userspace_proxy.sources.endpoints import EndpointSet
from userspace_proxy.sources.identity import Identity
from userspace_proxy.sources.services import Service

Object = Service | EndpointSet
_ServiceKey = tuple[str, str]
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Refused:
    """An object that cannot be used; `identity` is None where it does not even tell whom it is about."""

    identity: Identity | None
    problem: str


@dataclass(slots=True)
class _File:
    objects: dict[Identity, Object] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


class Store:
    """Not thread-safe: one caller at a time."""

    def __init__(self, node: Node | None = None) -> None:
        """`node` is the one that this is, where no list tells."""
        self._files: dict[str, _File] = {}
        self._troubled: set[str] = set()
        """The files that have problems."""
        self._holders: dict[Identity, set[str]] = {}
        """The files that have an object of this identity; the first by name is served."""
        self._contested: set[Identity] = set()
        self._served: dict[Identity, Object] = {}
        self._endpoint_sets: dict[_ServiceKey, set[Identity]] = {}
        self._changed: dict[_ServiceKey, None] = {}
        """A set that keeps its order, so that Snapshots have theirs."""
        self._snapshot = Snapshot(node=node)
        self._names: dict[_ServiceKey, tuple[list[ServicePortName], list[ServicePortName]]] = {}
        """What of a service is in `_snapshot`: its service ports, and those that have endpoints."""

    @property
    def files(self) -> frozenset[str]:
        return frozenset(self._files)

    @property
    def problems(self) -> tuple[str, ...]:
        """Everything that is refused at present."""
        found = [problem for name in sorted(self._troubled) for problem in self._files[name].problems]
        for identity in sorted(self._contested):
            first, *others = sorted(self._holders[identity])
            found += [
                f"{other}: {identity}: found in {first} as well, which comes first and is served; "
                "allowed: one file for each object; remove one of them"
                for other in others
            ]
        return tuple(found)

    def replace(self, file: str, found: Iterable[Object | Refused]) -> None:
        """Take over what a file holds now, all of it.

        One identity twice in a file: the first is served. A refused object without an identity may be a later
        version of any that is missing, and so nothing of the file is deleted while it is there.
        """
        old = self._files.get(file, _File()).objects
        new = _File()
        keep: set[Identity] = set()
        for item in found:
            if isinstance(item, Refused):
                new.problems.append(item.problem)
                keep |= old.keys() if item.identity is None else {item.identity}
            elif item.identity in new.objects:
                new.problems.append(
                    f"{file}: {item.identity}: found twice, the first is served; allowed: once; remove one of them"
                )
            else:
                before = old.get(item.identity)
                new.objects[item.identity] = before if before is item or before == item else item
        for identity in keep & old.keys():
            new.objects.setdefault(identity, old[identity])
        self._files[file] = new
        self._note(file)
        for identity in [*new.objects, *(old.keys() - new.objects.keys())]:
            if old.get(identity) is not new.objects.get(identity):
                self._settle(identity, file)

    def refuse(self, file: str, problem: str) -> None:
        """A file that cannot be read at all: what it held stays."""
        self._files.setdefault(file, _File()).problems = [problem]
        self._note(file)

    def _note(self, file: str) -> None:
        if self._files[file].problems:
            self._troubled.add(file)
        else:
            self._troubled.discard(file)

    def forget(self, file: str) -> None:
        """A file that is gone, and its objects with it."""
        self.replace(file, ())
        del self._files[file]

    def _settle(self, identity: Identity, file: str) -> None:
        """See who holds this identity now that `file` has changed, and mark the services that are concerned."""
        holders = self._holders.setdefault(identity, set())
        if identity in self._files[file].objects:
            holders.add(file)
        else:
            holders.discard(file)
        if len(holders) > 1:
            self._contested.add(identity)
        else:
            self._contested.discard(identity)
        before = self._served.pop(identity, None)
        if before is not None:
            self._unlink(before)
        if not holders:
            del self._holders[identity]
            return
        now = self._served[identity] = self._files[min(holders)].objects[identity]
        self._changed[_service_of(now)] = None
        if isinstance(now, EndpointSet):
            self._endpoint_sets.setdefault(now.service, set()).add(identity)

    def _unlink(self, gone: Object) -> None:
        self._changed[_service_of(gone)] = None
        if isinstance(gone, EndpointSet):
            sets = self._endpoint_sets[gone.service]
            sets.discard(gone.identity)
            if not sets:
                del self._endpoint_sets[gone.service]

    def snapshot(self) -> Snapshot:
        """What all objects together mean now; the same Snapshot as before if that has not changed."""
        if not self._changed:
            return self._snapshot
        services, endpoints = dict(self._snapshot.services), dict(self._snapshot.endpoints)
        differs = False
        for key in self._changed:
            old_ports, old_endpoints = self._names.get(key, ((), ()))
            service = self._served.get(Identity("Service", *key))
            ports: Mapping[ServicePortName, ServicePort] = service.ports if isinstance(service, Service) else {}
            merged = self._merge(key, ports)
            differs |= _exchange(services, old_ports, ports)
            differs |= _exchange(endpoints, old_endpoints, merged)
            if ports or merged:
                self._names[key] = list(ports), list(merged)
            else:
                self._names.pop(key, None)
        self._changed.clear()
        if differs:
            self._snapshot = Snapshot(services, endpoints, self._snapshot.node)
        return self._snapshot

    def _merge(
        self, key: _ServiceKey, ports: Mapping[ServicePortName, ServicePort]
    ) -> dict[ServicePortName, tuple[Endpoint, ...]]:
        """The endpoints of a service from all its slices; an Endpoints object counts only where there are none."""
        identities = self._endpoint_sets.get(key, ())
        chosen = [identity for identity in identities if identity.kind == "EndpointSlice"] or identities
        merged: dict[ServicePortName, dict[tuple[str, int], Endpoint]] = {}
        for identity in sorted(chosen):
            found = self._served[identity]
            assert isinstance(found, EndpointSet)
            for name, endpoints in found.endpoints.items():
                if name in ports and found.protocols[name] is not ports[name].protocol:
                    continue
                by_address = merged.setdefault(name, {})
                for endpoint in endpoints:
                    known = by_address.setdefault(endpoint.address, endpoint)
                    # An endpoint on its way from one slice to another is in both for a while.
                    if _usability(endpoint) > _usability(known):
                        by_address[endpoint.address] = endpoint
        return {name: tuple(by_address.values()) for name, by_address in merged.items()}


def _usability(endpoint: Endpoint) -> tuple[bool, bool]:
    return endpoint.ready, endpoint.serving


def _service_of(value: Object) -> _ServiceKey:
    return value.service if isinstance(value, EndpointSet) else (value.identity.namespace, value.identity.name)


def _exchange(
    values: dict[ServicePortName, _Value], old: Sequence[ServicePortName], new: Mapping[ServicePortName, _Value]
) -> bool:
    """Put `new` in the place of `old`, keeping each value that is equal; say whether there was a difference."""
    differs = False
    for name in old:
        if name not in new:
            del values[name]
            differs = True
    for name, value in new.items():
        if name not in values or values[name] != value:
            values[name] = value
            differs = True
    return differs
