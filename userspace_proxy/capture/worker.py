"""The process that owns the kernel state of the iptables capture for one family.

Run as `python -m userspace_proxy.capture.worker` by `iptables`, it answers requests (see `messages`) from
standard input on standard output, until its input ends: that is how it learns that its parent is gone,
however it went. It then leaves everything as it is; the next run takes over.

A process of its own, because python-iptables cannot serve two families in one, because seconds of building
rules must not hold up connections, and so that a fault in C code takes no connection with it.
"""

from __future__ import annotations

import os
import signal
import sys
import typing
from collections.abc import Sequence

import msgspec

from userspace_proxy.capture import rules
from userspace_proxy.capture.changes import count_changes
from userspace_proxy.capture.conntrack import Place
from userspace_proxy.capture.messages import Ask, Change, Cleanup, Close, Open, Replace, Reply, Request, Withdraw
from userspace_proxy.capture.routes import Routes
from userspace_proxy.capture.rules import Ruleset, TableRules
from userspace_proxy.capture.scope import Scope
from userspace_proxy.capture.upkeep import Upkeep, flush
from userspace_proxy.capture.xtables import Refused, Tables, XtablesError
from userspace_proxy.model import IPFamily, Redirect

_TABLES = ("filter", "nat")
_SIFTING_TRIES = 100
"""Commits spent on finding redirects that the kernel refuses: enough for some four among thousands."""


class FamilyCapture:
    """Rules, routes and conntrack entries of one family, from `open` to `close`."""

    def __init__(self, request: Open) -> None:
        self._scope = Scope(request.family, request.bind_address, request.nodeport_cidrs, request.inside)
        self._tables = Tables(request.family, use_library=request.use_library)
        self._upkeep = Upkeep(request.family)
        self._left: dict[str, TableRules] = dict(rules.NOTHING)
        self._asked: dict[Redirect, None] = {}
        """What the proxy wants, in its order."""
        self._captured: frozenset[Redirect] = frozenset()
        """What it has got of that."""

    def open(self, *, take_over: bool) -> Reply:
        """Find out whether this works here; raises XtablesError, with nothing left behind, if it does not."""
        notes = self._tables.probe(self._scope)
        # Of an earlier run, or of a predecessor in this one, who took what it knew with it.
        self._upkeep.doubt(Place(*place) for place in rules.places(self._tables.read("nat")))
        if not take_over:
            self._left = dict(rules.HOLD_ONLY)
        else:
            try:
                self._make(rules.HOLD_ONLY)
            except XtablesError:
                self._make(rules.NOTHING)
                raise
            notes += self._upkeep.take_over()
        return Reply(notes=tuple(notes))

    def replace(self, redirects: Sequence[Redirect]) -> Reply:
        self._asked = dict.fromkeys(redirects)
        return self._meet(thoroughly=True)

    def change(self, gone: Sequence[Redirect], new: Sequence[Redirect]) -> Reply:
        for redirect in gone:
            self._asked.pop(redirect, None)
        self._asked.update(dict.fromkeys(new))
        return self._meet(thoroughly=not (gone or new))

    def _meet(self, *, thoroughly: bool) -> Reply:
        """Make the kernel hold what is asked for. `thoroughly`: and see what others have done to it."""
        refused = {
            redirect: why
            for redirect in self._asked
            if redirect not in self._captured and (why := rules.objection(redirect, self._scope.family))
        }
        wanted = frozenset(self._asked) - refused.keys()
        before = dict(self._left)
        try:
            repaired = self._make(rules.render(wanted, self._scope), trusting=not thoroughly)
        except Refused as error:
            wanted, left_out = self._sift(wanted, error)
            refused |= dict.fromkeys(left_out, str(error))
            repaired = 0
        gone, new = self._captured - wanted, wanted - self._captured
        self._captured = wanted
        # Unchanged redirects are what the periodic sync brings: time to look at every address again.
        notes = self._upkeep.follow(gone, new, thoroughly=not (gone or new))
        counts = [count_changes(before[table], self._left[table]) for table in _TABLES]
        return Reply(
            added=sum(added for added, _ in counts),
            removed=sum(removed for _, removed in counts),
            repaired=repaired,
            refused=tuple(f"{r.owner}: {r.portal}: {why}" for r, why in refused.items()),
            notes=tuple(notes),
        )

    def withdraw(self) -> Reply:
        """Redirect nothing new. Routes stay: connections that are established still look theirs up."""
        self._make(rules.HOLD_ONLY)
        return Reply()

    def close(self) -> Reply:
        """Remove everything; what cannot be removed does not keep the rest."""
        problems = []
        for table in _TABLES:
            try:
                self._make(rules.NOTHING, only=table)
            except XtablesError as error:
                problems.append(str(error))
        unremoved, notes = self._upkeep.end()
        return Reply(notes=tuple(notes), error="; ".join(problems + unremoved))

    def _make(self, wanted: Ruleset, only: str = "", *, trusting: bool = False) -> int:
        damage = 0
        for table in (only,) if only else _TABLES:
            damage += self._tables.make(table, wanted, self._left[table], trusting=trusting)
            self._left[table] = wanted[table]
        return damage

    def _sift(self, wanted: frozenset[Redirect], error: Refused) -> tuple[frozenset[Redirect], tuple[Redirect, ...]]:
        """Get in what can be had; raises the error if not even what we had before is taken any more."""

        def accepts(redirects: frozenset[Redirect]) -> bool:
            try:
                self._make(rules.render(redirects, self._scope))
            except Refused:
                return False
            return True

        good = wanted & self._captured
        if not accepts(good):
            raise error
        taken, left_out = rules.sift(good, sorted(wanted - good, key=rules.order), accepts, _SIFTING_TRIES)
        # A try that was refused for the second table has left its mark in the first.
        self._make(rules.render(taken, self._scope))
        return taken, left_out


def clean_up(family: IPFamily) -> Reply:
    """Remove what an earlier run left. A family that does not exist here has nothing to remove."""
    try:
        tables = Tables(family, use_library=True)
    except XtablesError as error:
        return Reply(notes=(f"rules cannot be looked at: {error}",))
    problems = []
    places: set[Place] = set()
    for table in _TABLES:
        try:
            places |= {Place(*place) for place in rules.places(tables.read(table))}
            tables.make(table, rules.NOTHING, TableRules())
        except XtablesError as error:
            problems.append(str(error))
    routes = Routes(family)
    problems += routes.serve(()).values()
    routes.close()
    return Reply(notes=tuple(flush(family, dict.fromkeys(places, 0))), error="; ".join(problems))


class Worker:
    """Answers requests, one after the other."""

    def __init__(self) -> None:
        self._capture: FamilyCapture | None = None

    def answer(self, request: Request) -> Reply:
        try:
            match request:
                case Open():
                    self._capture = FamilyCapture(request)
                    return self._capture.open(take_over=request.take_over)
                case Cleanup():
                    return clean_up(request.family)
            assert self._capture, "the first request must be Open"
            match request:
                case Replace():
                    return self._capture.replace(request.redirects)
                case Change():
                    return self._capture.change(request.gone, request.new)
                case Withdraw():
                    return self._capture.withdraw()
                case Close():
                    return self._capture.close()
            typing.assert_never(request)
        except (XtablesError, OSError) as error:
            return Reply(error=str(error))


def main() -> None:
    # Who stops the proxy may well signal its whole group; the proxy still needs this process to clean up.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # Libraries that print must not print into the conversation; python-iptables even redirects descriptor 1.
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    worker = Worker()
    decoder, encoder = msgspec.json.Decoder(Ask), msgspec.json.Encoder()
    for line in sys.stdin.buffer:
        ask = decoder.decode(line)
        reply = msgspec.structs.replace(worker.answer(ask.request), number=ask.number)
        try:
            answers.write(encoder.encode(reply) + b"\n")
        except BrokenPipeError:
            return


if __name__ == "__main__":
    main()
