"""The iptables capture as the proxy sees it: one worker process a family, asked and watched from here.

This side decides which families are served, keeps a worker alive for each, and turns answers into log
lines and errors. What the rules are is in `rules`; how they get into the kernel, in `worker` and `xtables`.

A worker that dies is replaced at the next request. Its successor needs no memory: rules are compared with
what the kernel holds, not with what was written last.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import pathlib
import sys
import typing
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial

import msgspec

import userspace_proxy
from userspace_proxy.capture.base import Changes, Difference
from userspace_proxy.capture.messages import Ask, Change, Cleanup, Close, Open, Replace, Reply, Request, Withdraw
from userspace_proxy.exceptions import CaptureError, CaptureUnavailable
from userspace_proxy.model import IPFamily, Protocol, Redirect, family_of

logger = logging.getLogger(__name__)

_ANSWER_TIMEOUT = 20.0
"""Seconds for one request. The longest measured, 5,000 services read back without iptables-legacy-save, took 7."""
_FIRST_ANSWER_TIMEOUT = 60.0
"""Seconds for a new process to answer: it has to start and to find its libraries, on a node that may be very busy."""
_EXIT_TIMEOUT = 5.0


class WorkerDied(CaptureError):
    """The process ended before it answered; the next request starts another."""


class WorkerStuck(CaptureError):
    """The process did not answer in time and was killed; the next request starts another."""


class _Conversation(asyncio.SubprocessProtocol):
    """One life of a worker process: answers by number, its stderr into our log."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._awaited: dict[int, asyncio.Future[Reply]] = {}
        self._partial = {1: b"", 2: b""}
        self._decoder = msgspec.json.Decoder(Reply)
        self.transport: asyncio.SubprocessTransport
        self.gone = asyncio.Event()
        """Set when the process has been waited for and its pipes are closed."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are none of asyncio's classes, only like them.
        self.transport = typing.cast(asyncio.SubprocessTransport, transport)

    def ask(self, ask: Ask) -> asyncio.Future[Reply]:
        answer = asyncio.get_running_loop().create_future()
        self._awaited[ask.number] = answer
        stdin = typing.cast(asyncio.WriteTransport, self.transport.get_pipe_transport(0))
        # Once the process has closed its end, uvloop raises and asyncio does not; connection_lost follows either way.
        with contextlib.suppress(RuntimeError):
            stdin.write(msgspec.json.encode(ask) + b"\n")
        return answer

    async def kill(self) -> None:
        """Come back when it is gone; it may be already."""
        with contextlib.suppress(ProcessLookupError):
            self.transport.kill()
        await self.gone.wait()

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        *lines, self._partial[fd] = (self._partial[fd] + data).split(b"\n")
        for line in lines:
            if fd == 2:
                logger.warning("%s: %s", self._name, line.decode(errors="replace"))
                continue
            reply = self._decoder.decode(line)
            answer = self._awaited.pop(reply.number, None)
            # Who asked may have been cancelled meanwhile.
            if answer and not answer.done():
                answer.set_result(reply)

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone.set()
        self.transport.close()
        how = f"{self._name} ended with status {self.transport.get_returncode()}; what it printed is in the log"
        for answer in self._awaited.values():
            if not answer.done():
                answer.set_exception(WorkerDied(how))
        self._awaited.clear()


class Worker:
    """The process for one family, started when it is first asked, and again when it has died."""

    def __init__(self, name: str, opening: Open | None) -> None:
        """`opening` is what a successor is told first, if anything."""
        self.name = name
        self._opening = opening
        self._conversation: _Conversation | None = None
        self._numbers = itertools.count(1)
        self._turn = asyncio.Lock()

    async def ask(self, request: Request, *, afresh: Callable[[], Request] | None = None) -> Reply:
        """Raises CaptureError with the worker's words if the request was not met, or for a worker that fails.

        Every request can be repeated, so one that died, perhaps long ago, is replaced at once. Where a request
        builds on earlier ones, `afresh` makes the one for a successor, who knows nothing of them.
        """
        async with self._turn:
            try:
                return await self._ask_once(request, afresh)
            except WorkerDied:
                if self._opening is None or isinstance(request, Open):
                    raise
                logger.warning("%s died, starting another", self.name)
                if self._conversation:
                    await self._conversation.kill()
                return await self._ask_once(request, afresh)

    async def _ask_once(self, request: Request, afresh: Callable[[], Request] | None) -> Reply:
        conversation = self._conversation
        if conversation is None or conversation.gone.is_set():
            conversation = self._conversation = await self._start()
            if self._opening and not isinstance(request, Open):
                await self._await_reply(conversation, msgspec.structs.replace(self._opening, take_over=False))
            if afresh:
                request = afresh()
        return await self._await_reply(conversation, request)

    async def _await_reply(self, conversation: _Conversation, request: Request) -> Reply:
        patience = _FIRST_ANSWER_TIMEOUT if isinstance(request, Open | Cleanup) else _ANSWER_TIMEOUT
        try:
            async with asyncio.timeout(patience):
                reply = await conversation.ask(Ask(next(self._numbers), request))
        except TimeoutError:
            await conversation.kill()
            raise WorkerStuck(f"{self.name}: no answer in {patience:g} s, killed") from None
        if reply.error:
            raise CaptureError(f"{self.name}: {reply.error}")
        return reply

    async def _start(self) -> _Conversation:
        root = str(pathlib.Path(userspace_proxy.__file__).parents[1])
        search = os.pathsep.join(path for path in (root, os.environ.get("PYTHONPATH", "")) if path)
        # A session of its own keeps the terminal's Ctrl-C away: it is needed to clean up afterwards.
        try:
            _, conversation = await asyncio.get_running_loop().subprocess_exec(
                lambda: _Conversation(self.name),
                sys.executable,
                *("-W", "ignore", "-m", "userspace_proxy.capture.worker"),
                env=os.environ | {"PYTHONPATH": search},
                start_new_session=True,
            )
        except OSError as error:
            raise CaptureError(f"{self.name}: {sys.executable} cannot be started: {error.strerror}") from error
        return conversation

    async def end(self) -> None:
        """Let the process go: the end of its input is its sign to leave."""
        if (conversation := self._conversation) is None:
            return
        self._conversation = None
        if (stdin := conversation.transport.get_pipe_transport(0)) is not None:
            stdin.close()
        try:
            async with asyncio.timeout(_EXIT_TIMEOUT):
                await conversation.gone.wait()
        except TimeoutError:
            await conversation.kill()


class IPTables:
    """Capture by rules in the legacy nat table: REDIRECT, or DNAT for a specific bind address."""

    name = "iptables"
    rewrites_destination = True
    listens = frozenset[Protocol]()

    def __init__(self, *, bind_address: str, nodeport_cidrs: Sequence[str] = (), inside: Sequence[str] = ()) -> None:
        """A wildcard bind address stands for both families', any other for its own family alone."""
        wildcard = bind_address in (family.wildcard for family in IPFamily)
        self._openings = {
            family: Open(
                family=family,
                bind_address=family.wildcard if wildcard else bind_address,
                nodeport_cidrs=tuple(nodeport_cidrs),
                inside=tuple(inside),
                use_library=True,
                take_over=True,
            )
            for family in IPFamily
            if wildcard or family is family_of(bind_address)
        }
        self._workers: dict[IPFamily, Worker] = {}
        self._said: set[str] = set()

    @property
    def families(self) -> frozenset[IPFamily]:
        """The families that are captured; after start()."""
        return frozenset(self._workers)

    async def start(self) -> None:
        opening = asyncio.gather(*map(self._open, self._openings), return_exceptions=True)
        try:
            answers = await asyncio.shield(opening)
        except asyncio.CancelledError:
            # A worker that has begun to make rules is seen through, so that close() finds it in a known state.
            await opening
            raise
        found = []
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
            if answer:
                found.append(answer)
        if not self._workers:
            raise CaptureUnavailable("; ".join(found))
        for problem in found:
            logger.warning("capture iptables: %s; only %s is captured", problem, _names(self.families))

    async def _open(self, family: IPFamily) -> str:
        """Take a family over; the answer is empty, or says why that cannot be had.

        Raises WorkerStuck: whether it can is not known then, and to go without it for good would be wrong.
        """
        opening = self._openings[family]
        problems: list[str] = []
        for use_library in (True, False):
            opening = msgspec.structs.replace(opening, use_library=use_library)
            worker = Worker(f"iptables worker {family.value}", opening)
            try:
                reply = await worker.ask(opening)
            except WorkerDied as error:
                # python-iptables can crash with C libraries that it was not made for.
                problems.append(str(error))
                await worker.end()
            except WorkerStuck as error:
                raise WorkerStuck(f"{error}; start again once this machine is less busy") from None
            except CaptureError as error:
                await worker.end()
                return f"{family.value} is not available: {_advice(str(error))}"
            else:
                self._workers[family] = worker
                self._say_once(worker, [f"done without python-iptables: {problem}" for problem in problems])
                self._say_once(worker, reply.notes)
                return ""
        return f"{family.value} is not available: {'; '.join(problems)}"

    async def replace(self, redirects: Collection[Redirect], difference: Difference | None = None) -> Changes:
        for family in {r.portal.family for r in (redirects if difference is None else difference.new)}:
            if family not in self._workers:
                self._say_once(None, (f"{family.value} portals exist, but are not captured",))
        requests = {family: self._request(family, redirects, difference) for family in self._workers}
        families = [family for family, request in requests.items() if request is not None]
        answers = await asyncio.gather(
            *(
                self._workers[family].ask(request, afresh=partial(_whole, family, redirects))
                for family, request in requests.items()
                if request is not None
            ),
            return_exceptions=True,
        )
        replies: list[Reply] = []
        problems: list[str] = []
        for family, answer in zip(families, answers, strict=True):
            match answer:
                case Reply():
                    replies.append(answer)
                    self._say_once(self._workers[family], answer.notes)
                case CaptureError():
                    problems.append(str(answer))
                case BaseException():
                    raise answer
        if problems:
            raise CaptureError("; ".join(problems))
        return Changes(
            added=sum(reply.added for reply in replies),
            removed=sum(reply.removed for reply in replies),
            repaired=sum(reply.repaired for reply in replies),
            refused=tuple(line for reply in replies for line in reply.refused),
        )

    def _request(
        self, family: IPFamily, redirects: Collection[Redirect], difference: Difference | None
    ) -> Request | None:
        """What is asked of the worker of a family; None where the difference is the other family's alone."""
        if difference is None:
            return _whole(family, redirects)
        change = Change(_of(family, difference.gone), _of(family, difference.new))
        if (change.gone or change.new) or not (difference.gone or difference.new):
            return change
        return None

    async def withdraw(self) -> None:
        await self._ask_all(Withdraw())

    async def close(self) -> None:
        workers, self._workers = self._workers, {}
        try:
            await self._ask_all(Close(), workers)
        finally:
            for worker in workers.values():
                await worker.end()

    async def _ask_all(self, request: Withdraw | Close, workers: dict[IPFamily, Worker] | None = None) -> None:
        asked = list((self._workers if workers is None else workers).values())
        answers = await asyncio.gather(*(worker.ask(request) for worker in asked), return_exceptions=True)
        for worker, answer in zip(asked, answers, strict=True):
            if isinstance(answer, Reply):
                self._say_once(worker, answer.notes)
        if problems := [answer for answer in answers if isinstance(answer, BaseException)]:
            raise CaptureError("; ".join(map(str, problems)))

    def _say_once(self, worker: Worker | None, notes: Sequence[str]) -> None:
        for note in notes:
            line = f"{worker.name}: {note}" if worker else f"capture iptables: {note}"
            if line not in self._said:
                self._said.add(line)
                logger.warning("%s", line)


async def cleanup() -> None:
    """Remove what this proxy, or kube-proxy's userspace mode, left in the kernel, in both families.

    Needs no running proxy; finding nothing is fine. Raises CaptureError after trying everything.
    """
    problems = []
    for family in IPFamily:
        worker = Worker(f"iptables cleanup {family.value}", None)
        try:
            for note in (await worker.ask(Cleanup(family))).notes:
                logger.warning("%s: %s", worker.name, note)
        except CaptureError as error:
            problems.append(_advice(str(error)))
        finally:
            await worker.end()
    if problems:
        raise CaptureError("; ".join(problems))


def _of(family: IPFamily, redirects: Iterable[Redirect]) -> tuple[Redirect, ...]:
    return tuple(redirect for redirect in redirects if redirect.portal.family is family)


def _whole(family: IPFamily, redirects: Iterable[Redirect]) -> Replace:
    return Replace(_of(family, redirects))


def _names(families: Collection[IPFamily]) -> str:
    return ", ".join(family.value for family in IPFamily if family in families)


def _advice(problem: str) -> str:
    """The problem, and what to do about it where that is known."""
    if "Permission denied" in problem or "Operation not permitted" in problem or os.geteuid() != 0:
        return f"{problem}: run as root, or with CAP_NET_ADMIN and CAP_NET_RAW"
    if "not installed" in problem:
        return f"{problem}: install the package iptables (iptables-legacy on Fedora and RHEL)"
    if "does not exist" in problem.lower():
        return (
            f"{problem}: the kernel needs iptable_nat and iptable_filter (ip6table_nat, ip6table_filter): see modprobe"
        )
    return problem
