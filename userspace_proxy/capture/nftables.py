"""The nftables capture as the proxy sees it: a table of our own in each family, watched for changes by others.

What the kernel tells of other programs' transactions is looked at as it comes, so that damage to a table is repaired
at once; at every sync the tables themselves find out whether anything has been missed. They are in `nft_table`, and
asked in a thread, one after the other, since thousands of elements must not hold up connections.

Nothing here needs the `nft` program. A table with an owner, which nobody else can change, was turned down: it
would be gone the moment the proxy dies, and beyond the reach of an administrator in need.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TypeVar

from userspace_proxy.capture import nft
from userspace_proxy.capture.base import Changes, Difference
from userspace_proxy.capture.netlink import Netlink
from userspace_proxy.capture.nft_table import NETLINK_NETFILTER, FamilyTable, remove
from userspace_proxy.capture.scope import Scope
from userspace_proxy.exceptions import CaptureError, CaptureUnavailable
from userspace_proxy.model import IPFamily, Protocol, Redirect, family_of

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_NFTABLES_GROUP = 7
_MISSING = frozenset(
    {errno.ENOENT, errno.EOPNOTSUPP, errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT, errno.ENOPROTOOPT, errno.EINVAL}
)
"""How a kernel refuses what it has no module for."""
_PAUSE = 0.1
"""Seconds between two repairs, should somebody else insist."""


class NFTables:
    """Capture by maps in nftables: REDIRECT, or DNAT for a specific bind address."""

    name = "nftables"
    rewrites_destination = True
    listens = frozenset[Protocol]()

    def __init__(self, *, bind_address: str, nodeport_cidrs: Sequence[str] = (), inside: Sequence[str] = ()) -> None:
        """A wildcard bind address stands for both families', any other for its own family alone."""
        wildcard = bind_address in (family.wildcard for family in IPFamily)
        self._scopes = [
            Scope(family, family.wildcard if wildcard else bind_address, tuple(nodeport_cidrs), tuple(inside))
            for family in IPFamily
            if wildcard or family is family_of(bind_address)
        ]
        self._tables: dict[IPFamily, FamilyTable] = {}
        # One thread: what was begun is seen through before the next begins, even if who asked is cancelled.
        self._thread = ThreadPoolExecutor(1, "nftables")
        self._monitor: Netlink | None = None
        self._doubted: set[IPFamily] = set()
        self._culprit = ""
        self._repairing = False
        self._closed = False
        self._repaired = 0
        """Since `replace` last told of it."""
        self._said: set[str] = set()

    @property
    def families(self) -> frozenset[IPFamily]:
        """The families that are captured; after start()."""
        return frozenset(self._tables)

    async def start(self) -> None:
        problems = []
        for scope in self._scopes:
            try:
                table = self._tables[scope.family] = FamilyTable(scope)
                await self._in_thread(table.open)
            except (OSError, CaptureError) as error:
                self._tables.pop(scope.family, None)
                why = _advice(error) if isinstance(error, OSError) else error
                problems.append(f"{scope.family.value} is not available: {why}")
        if not self._tables:
            raise CaptureUnavailable("; ".join(problems))
        for problem in problems:
            captured = ", ".join(family.value for family in self._tables)
            logger.warning("capture nftables: %s; only %s is captured", problem, captured)
        self._say_notes()
        self._monitor = Netlink("nftables monitor", NETLINK_NETFILTER)
        self._monitor.follow(_NFTABLES_GROUP)
        asyncio.get_running_loop().add_reader(self._monitor.fileno(), self._hear)

    async def replace(self, redirects: Collection[Redirect], difference: Difference | None = None) -> Changes:
        for family in {r.portal.family for r in (redirects if difference is None else difference.new)}:
            if family not in self._tables:
                self._say_once(f"{family.value} portals exist, but are not captured")
        changes = [
            await self._in_thread(self._meet, family, table, redirects, difference)
            for family, table in self._tables.items()
        ]
        self._say_notes()
        repaired, self._repaired = self._repaired, 0
        return Changes(
            added=sum(change.added for change in changes),
            removed=sum(change.removed for change in changes),
            repaired=repaired + sum(change.repaired for change in changes),
            refused=tuple(line for change in changes for line in change.refused),
        )

    @staticmethod
    def _meet(
        family: IPFamily, table: FamilyTable, redirects: Collection[Redirect], difference: Difference | None
    ) -> Changes:
        repaired = 0
        if difference is None or not (difference.gone or difference.new):
            repaired = table.repair()
        if difference is None:
            changes = table.replace(redirect for redirect in redirects if redirect.portal.family is family)
        else:
            changes = table.change(
                [redirect for redirect in difference.gone if redirect.portal.family is family],
                [redirect for redirect in difference.new if redirect.portal.family is family],
            )
        return replace(changes, repaired=repaired)

    async def withdraw(self) -> None:
        for table in self._tables.values():
            await self._in_thread(table.withdraw)

    async def close(self) -> None:
        if self._monitor is not None:
            asyncio.get_running_loop().remove_reader(self._monitor.fileno())
            self._monitor.close()
            self._monitor = None
        self._closed = True
        problems = [problem for table in self._tables.values() for problem in await self._in_thread(table.close)]
        self._say_notes()
        self._tables.clear()
        self._thread.shutdown()
        if problems:
            raise CaptureError("; ".join(problems))

    # -- others

    def _hear(self) -> None:
        """Somebody's transaction: told message by message, then who made it."""
        assert self._monitor is not None
        ours = {table.port for table in self._tables.values()}
        try:
            for kind, port, body in self._monitor.waiting():
                if port in ours:
                    continue
                if family := nft.concerns(kind, body):
                    self._doubted.add(family)
                elif self._doubted and (culprit := nft.read_culprit(kind, body)):
                    self._culprit = culprit
        except OSError:  # more than could be taken in; our own thousands at the start, as a rule
            self._doubted.update(self._tables)
        self._repair_soon()

    def _repair_soon(self) -> None:
        """Repair what is in doubt, now or, so that a quarrel has an end, when the last time was a moment ago."""
        if not self._doubted or self._repairing or self._closed:
            return
        self._repairing = True
        doubted, self._doubted = self._doubted & self._tables.keys(), set()
        repair = asyncio.get_running_loop().run_in_executor(
            self._thread, lambda: {family: self._tables[family].repair() for family in doubted}
        )
        repair.add_done_callback(self._after_repair)

    def _after_repair(self, repair: asyncio.Future[dict[IPFamily, int]]) -> None:
        try:
            found = repair.result()
        except OSError as error:
            logger.error("capture nftables: %s; tried again at the next sync", _advice(error))
            found = {}
        for family, repaired in found.items():
            if repaired:
                culprit = self._culprit or "another program"
                logger.warning(
                    "capture nftables: our %s table was changed by %s; %d rules and elements are repaired",
                    *(family.value, culprit, repaired),
                )
            self._repaired += repaired
        asyncio.get_running_loop().call_later(_PAUSE, self._listen_again)

    def _listen_again(self) -> None:
        self._repairing = False
        self._repair_soon()

    # -- saying

    def _say_notes(self) -> None:
        for table in self._tables.values():
            for note in table.notes:
                self._say_once(note)
            table.notes.clear()

    def _say_once(self, note: str) -> None:
        if note not in self._said:
            self._said.add(note)
            logger.warning("capture nftables: %s", note)

    async def _in_thread(self, function: Callable[..., Result], *arguments: object) -> Result:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, partial(function, *arguments))
        except OSError as error:
            raise CaptureError(_advice(error)) from error


async def cleanup() -> None:
    """Remove what this proxy left in the kernel, in both families. Raises CaptureError after trying everything."""
    problems = []
    for family in IPFamily:
        try:
            for note in await asyncio.to_thread(remove, family):
                logger.warning("nftables cleanup %s: %s", family.value, note)
        except OSError as error:
            if error.errno not in _MISSING:
                problems.append(_advice(error))
    if problems:
        raise CaptureError("; ".join(problems))


def _advice(error: OSError) -> str:
    """The problem, and what to do about it where that is known."""
    if error.errno in (errno.EPERM, errno.EACCES):
        return f"{error.strerror}: run as root, or with CAP_NET_ADMIN"
    if error.errno in _MISSING:
        return f"{error.strerror}: the kernel needs nf_tables, nft_nat, nft_redir and nft_fib_inet: see modprobe"
    if error.errno == errno.EMSGSIZE:
        return f"{error.strerror}: too many services for one transaction: raise net.core.wmem_max"
    return error.strerror or str(error)
