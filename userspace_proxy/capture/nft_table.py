"""The nftables table of one family in the kernel, with the routes and the conntrack entries that go with it.

It is written whole, in one transaction, at the start and when somebody has changed it; in between a change adds and
deletes elements, at a cost that does not depend on how many there are. Whether others can have changed it since is
told by the number of the kernel's last transaction, of all tables: only where that is not ours is the table read.

What is in the table is in `nft`. Everything here blocks, for milliseconds at thousands of elements.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Iterable, Mapping, Sequence

from userspace_proxy.capture import nft, rules
from userspace_proxy.capture.base import Changes
from userspace_proxy.capture.conntrack import Place
from userspace_proxy.capture.netlink import Netlink
from userspace_proxy.capture.nft import Key, Value
from userspace_proxy.capture.scope import Scope
from userspace_proxy.capture.upkeep import Upkeep, flush
from userspace_proxy.model import IPFamily, Redirect

logger = logging.getLogger(__name__)

NETLINK_NETFILTER = 12


class FamilyTable:
    """Methods raise OSError for what the kernel refuses."""

    def __init__(self, scope: Scope) -> None:
        self.notes: list[str] = []
        """What a human should know, since it was last emptied."""
        self._scope = scope
        self._netlink = Netlink("nftables", NETLINK_NETFILTER)
        self._upkeep: Upkeep | None = None
        self._elements: dict[Key, Value] = {}
        self._captured: set[Redirect] = set()
        self._refused: dict[Redirect, str] = {}
        self._frame: list[bytes] = []
        """Our chains and rules as the kernel tells of them."""
        self._generation = 0
        """Of our last transaction, while nobody else can have touched the table since; else 0."""

    @property
    def port(self) -> int:
        return self._netlink.port

    def open(self) -> None:
        """Take over, and so find out whether this works here; leaves nothing behind if it does not."""
        try:
            left = _places(_read_elements(self._netlink, self._scope.family))
            self._write({})
            self._frame = _read_frame(self._netlink, self._scope.family)
            self._upkeep = Upkeep(self._scope.family)
            self._upkeep.doubt(left)
            self.notes += self._upkeep.take_over()
        except OSError:
            self.close()
            raise

    def replace(self, redirects: Iterable[Redirect]) -> Changes:
        redirects = set(redirects)
        asked = self._captured | self._refused.keys()
        return self.change(asked - redirects, redirects - asked)

    def change(self, gone: Iterable[Redirect], new: Iterable[Redirect]) -> Changes:
        """The difference to what was asked for before."""
        assert self._upkeep is not None
        new = dict.fromkeys(new)
        refused = {redirect: why for redirect in new if (why := rules.objection(redirect, self._scope.family))}
        for redirect in gone:
            self._refused.pop(redirect, None)
        self._refused |= refused
        gone = [redirect for redirect in gone if redirect in self._captured]
        new = [redirect for redirect in new if redirect not in refused]
        before = nft.elements(gone)
        after = nft.elements(new)
        self._exchange(before, after)
        self._captured.difference_update(gone)
        self._captured.update(new)
        self.notes += self._upkeep.follow(gone, new, thoroughly=not (gone or new))
        return Changes(
            added=sum(before.get(key) != value for key, value in after.items()),
            removed=sum(after.get(key) != value for key, value in before.items()),
            refused=tuple(f"{r.owner}: {r.portal}: {why}" for r, why in self._refused.items()),
        )

    def _exchange(self, before: dict[Key, Value], after: dict[Key, Value]) -> None:
        family = self._scope.family
        try:
            self._transact([*nft.deletions(family, before), *nft.additions(family, after)])
        except OSError as error:
            # Others have changed the table, and what they have done is not heard of yet.
            logger.debug("elements cannot be changed, writing the whole table: %s", error)
            self._write({key: value for key, value in self._elements.items() if key not in before} | after)
        for key in before:
            self._elements.pop(key, None)
        self._elements.update(after)

    def repair(self) -> int:
        """Undo what others have done to the table since the last time; how many rules and elements that were."""
        generation = self._read_generation()
        if generation == self._generation:
            return 0
        damage = self._damage()
        if damage:
            self._write(self._elements)
        else:
            self._generation = generation
        return damage

    def withdraw(self) -> None:
        """Redirect nothing new. The chains stay, and with them conntrack, for connections that are established."""
        self._write({})
        self._elements.clear()

    def close(self) -> list[str]:
        """Remove everything; what could not be."""
        problems = []
        try:
            self._netlink.transact(nft.batch(nft.removal(self._scope.family)))
        except OSError as error:
            problems.append(str(error))
        self._netlink.close()
        if self._upkeep is not None:
            unremoved, notes = self._upkeep.end()
            problems += unremoved
            self.notes += notes
        return problems

    # -- the kernel

    def _write(self, elements: Mapping[Key, Value]) -> None:
        self._transact(nft.whole(self._scope, elements), afresh=True)

    def _transact(self, messages: Sequence[bytes], *, afresh: bool = False) -> None:
        """`afresh`: the table is made anew, so that it does not matter who has changed it before."""
        if not messages:
            return
        before = self._read_generation()
        known, self._generation = afresh or before == self._generation, 0
        self._netlink.transact(nft.batch(messages))
        generation = self._read_generation()
        # More than one further: somebody else's transaction was in between, or has followed.
        if known and generation == before + 1:
            self._generation = generation

    def _damage(self) -> int:
        frame = _read_frame(self._netlink, self._scope.family)
        found = dict(_read_elements(self._netlink, self._scope.family))
        elements = sum(found.get(key) != value for key, value in self._elements.items())
        differing = len(set(frame) ^ set(self._frame)) or int(frame != self._frame)  # else in their order
        return elements + len(found.keys() - self._elements.keys()) + differing

    def _read_generation(self) -> int:
        return nft.read_generation(self._netlink.ask(*nft.ask_for_generation()))


def _read_elements(netlink: Netlink, family: IPFamily) -> list[tuple[Key, Value]]:
    """None where there is no such table, or where its maps are of another kind."""
    found: list[tuple[Key, Value]] = []
    for name in nft.MAPS:
        try:
            for _, body in netlink.dump(*nft.ask_for_elements(family, name)):
                found += nft.read_elements(body, name)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
    return found


def _places(elements: Iterable[tuple[Key, Value]]) -> list[Place]:
    return [Place(*place) for key, _ in elements if (place := nft.place(key))]


def _read_frame(netlink: Netlink, family: IPFamily) -> list[bytes]:
    """Our table, its chains and rules, and what is in its sets of addresses; nothing where there is no such table."""
    frame = [
        found
        for question in (nft.ask_for_tables(family), nft.ask_for_chains(family), nft.ask_for_rules(family))
        for kind, body in netlink.dump(*question)
        if (found := nft.read_frame(kind, body))
    ]
    for name in nft.NETWORKS if frame else ():
        try:
            listed = [body for _, body in netlink.dump(*nft.ask_for_elements(family, name))]
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
        else:
            frame += sorted(found for body in listed for found in nft.read_listed(body))
    return frame


def remove(family: IPFamily) -> list[str]:
    """Take out what an earlier run has left, if it has; what a human should know. Raises OSError."""
    with contextlib.closing(Netlink("nftables", NETLINK_NETFILTER)) as netlink:
        if not _read_frame(netlink, family):
            return []
        left = _places(_read_elements(netlink, family))
        netlink.transact(nft.batch(nft.removal(family)))
    return flush(family, dict.fromkeys(left, 0))
