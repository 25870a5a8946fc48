"""The control process's side of several workers: proxy sockets whose clients others take.

`Pool.sockets` are `ProxySockets` like those of a single process. Opening, listening and refusing happen here, in
`groups`; each worker is told what to do with its sockets, and told all of it again when it replaces one that died.

SCTP is the exception: its associations are relayed by the control process, whatever the number of workers.

Endpoints are balanced by each worker for itself, in the same order begun at another place, so that the whole is fair.
What one learns of dead endpoints, and what all have counted, comes together in `accounts`.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import signal
import time
from collections.abc import Callable, Collection, Mapping, Sequence

import msgspec

from userspace_proxy.loadbalancer import LoadBalancer
from userspace_proxy.metrics import Metrics, Outcome, ServicePortMetrics
from userspace_proxy.model import Portal, Protocol, ProxyProtocol, SessionAffinity, SocketKey
from userspace_proxy.sockets.base import ProxySockets, Session
from userspace_proxy.sockets.path import DataPath
from userspace_proxy.workers.accounts import Account, Accounts
from userspace_proxy.workers.backoff import Backoff
from userspace_proxy.workers.groups import GROUPS, Group
from userspace_proxy.workers.messages import (
    Admit,
    AskCounts,
    AskSessions,
    Close,
    Dialled,
    Drain,
    EndAll,
    Idle,
    Missed,
    Open,
    Probing,
    Refuse,
    Report,
    Serve,
    Sessions,
    Speak,
    Start,
    Take,
    ToControl,
    ToWorker,
)
from userspace_proxy.workers.program import Program

logger = logging.getLogger(__name__)

PATIENCE = 2.0
"""Seconds that an answer is waited for; what a worker does not tell in time is left out."""
AGAIN = 1.0
"""Seconds until a socket that a worker had no descriptor for is offered again."""


class WorkerSocket:
    """The proxy socket of one service port in one family, served by all workers."""

    def __init__(self, pool: Pool, opening: Open, account: Account, group: Group, port: int) -> None:
        self.key = opening.key
        self.port = port
        self.account = account
        self.opening = opening
        self.serving = False
        self._pool = pool
        self._group = group
        self._admitted: Admit | None = None
        self._speaking = Speak(opening.id, ProxyProtocol())
        self._steered = False
        # Before workers are told: steering precedes what they remember of clients.
        account.balancer.on_change.insert(0, self._steer)

    def serve(self) -> None:
        if self.serving:
            return
        self._steered = self._wants_steering
        self._group.serve(steered=self._steered)
        self.serving = True
        for worker in self._pool.workers:
            self.offer(worker)

    def refuse(self) -> None:
        if not self.serving:
            return
        self._hand_over_waiting()
        self._group.refuse()
        self.serving = False
        self._pool.tell(Refuse(self.opening.id))

    def screen(self, networks: Sequence[str] | None) -> None:
        self._group.screen(networks)

    def admit(self, portals: Collection[Portal] | None) -> None:
        self._admitted = Admit(self.opening.id, None if portals is None else tuple(portals))
        self._pool.tell(self._admitted)

    def speak(self, proxy_protocol: ProxyProtocol) -> None:
        if proxy_protocol != self._speaking.proxy_protocol:
            self._speaking = Speak(self.opening.id, proxy_protocol)
            self._pool.tell(self._speaking)

    def close(self) -> None:
        self._hand_over_waiting()
        self.serving = False
        if self._steer in self.account.balancer.on_change:
            self.account.balancer.on_change.remove(self._steer)
        self._group.close()
        self._pool.forget(self)

    def _hand_over_waiting(self) -> None:
        """Clients that got as far as the queue are served, even if their worker has been too busy to take them."""
        for index, client in self._group.waiting() if self.serving else ():
            with client:
                self._pool.workers[index].send(Take(self.opening.id), client.fileno())

    def introduce(self, worker: Worker) -> None:
        """Tell a new worker all that the others know."""
        worker.send(self.opening)
        if self._admitted is not None:
            worker.send(self._admitted)
        worker.send(self._speaking)
        if self.serving:
            self.offer(worker)

    def offer(self, worker: Worker) -> None:
        worker.send(Serve(self.opening.id), self._group.sockets[worker.index].fileno())

    @property
    def _wants_steering(self) -> bool:
        return self.account.balancer.affinity is SessionAffinity.CLIENT_IP

    def _steer(self) -> None:
        """The balancer has changed."""
        if self.serving and self._steered is not self._wants_steering:
            self._steered = self._wants_steering
            try:
                self._group.steer(self._steered)
            except OSError as error:
                logger.error("%s: clients cannot be kept to one worker each: %s", self.key.name, error.strerror)


class WorkerSockets:
    """Those of one protocol."""

    def __init__(self, pool: Pool, protocol: Protocol) -> None:
        self.protocol = protocol
        self._pool = pool
        self._on_idle: Callable[[], None] | None = None

    def open(
        self, key: SocketKey, ip: str, port: int, balancer: LoadBalancer, metrics: ServicePortMetrics
    ) -> WorkerSocket:
        group = GROUPS[self.protocol](key.family, ip, port, len(self._pool.workers))
        return self._pool.add(key, self.protocol, group, port, self._pool.accounts.open(balancer, metrics))

    @property
    def active(self) -> int:
        """As last reported."""
        return sum(worker.active.get(self.protocol, 0) for worker in self._pool.workers)

    def drain(self, on_idle: Callable[[], None]) -> None:
        self._pool.draining = True
        self._on_idle = on_idle
        for worker in self._pool.workers:
            if worker.is_up:
                worker.busy.add(self.protocol)
                worker.send(Drain(self.protocol))
        self.tell_if_idle()

    def tell_if_idle(self) -> None:
        if self._on_idle is not None and not any(self.protocol in worker.busy for worker in self._pool.workers):
            on_idle, self._on_idle = self._on_idle, None
            on_idle()

    def end_all(self, outcome: Outcome) -> None:
        self._pool.tell(EndAll(self.protocol, outcome))


class Worker:
    """One place among the workers, and the process that fills it for now."""

    def __init__(self, pool: Pool, index: int) -> None:
        self.index = index
        self.busy: set[Protocol] = set()
        """Told to drain, and has not said that it is idle."""
        self.active: dict[Protocol, int] = {}
        self.descriptors_in_use = 0
        self.program: Program | None = None
        self._pool = pool
        self._backoff = Backoff()
        self._asked: dict[int, asyncio.Future[Report | Sessions]] = {}
        self._numbers = itertools.count(1)

    @property
    def is_up(self) -> bool:
        return self.program is not None

    def send(self, message: ToWorker, descriptor: int | None = None) -> None:
        """To a worker that is not there nothing needs to be said: its successor is told all."""
        if self.program is not None:
            self.program.send(message, descriptor)

    def ask(self, question: Callable[[int], AskCounts | AskSessions]) -> asyncio.Future[Report | Sessions]:
        """The answer, cancelled if the worker dies before."""
        number = next(self._numbers)
        answer = self._asked[number] = asyncio.get_running_loop().create_future()
        answer.add_done_callback(lambda _: self._asked.pop(number, None))
        self.send(question(number))
        return answer

    async def keep(self) -> None:
        """Have a process in this place, one after the other, until the pool drains."""
        while not self._pool.draining:
            began = time.monotonic()
            try:
                await self._live()
            except OSError as error:
                logger.error("worker %d cannot be started: %s", self.index, error)
            if self._pool.draining:
                return
            pause = self._backoff.after(time.monotonic() - began)
            self._pool.metrics.worker_deaths.inc()
            logger.warning("worker %d: starting another%s", self.index, f" in {pause:g} s" if pause else "")
            await asyncio.sleep(pause)

    async def _live(self) -> None:
        """One process's life. Cancelled, it leaves the process alive; `end` ends it."""
        program = self.program = Program(self._pool.start_of(self.index), self._on_message)
        self._pool.accounts.introduce(self)
        for proxy_socket in self._pool.opened.values():
            proxy_socket.introduce(self)
        self._pool.tell_how_many()
        status = await program.ended()
        self.program = None
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        # Not how many: its last report may be some seconds old.
        logger.error("worker %d %s; its connections are reset", self.index, how)
        for answer in list(self._asked.values()):
            answer.cancel()
        self._pool.take_back(self)
        self._pool.tell_how_many()

    async def end(self) -> None:
        program, self.program = self.program, None
        if program is not None:
            await program.end()

    def _on_message(self, message: ToControl) -> None:
        match message:
            case Report():
                self._pool.add_up(self, message)
                self._answer(message.number, message)
            case Sessions():
                self._answer(message.number, message)
            case Dialled() | Probing():
                self._pool.accounts.spread(self, message)
            case Idle(protocol):
                self.busy.discard(protocol)
                self._pool.relaying[protocol].tell_if_idle()
            case Missed(id):
                self._pool.offer_again(self, id)

    def _answer(self, number: int, message: Report | Sessions) -> None:
        answer = self._asked.get(number)
        if answer is not None and not answer.done():
            answer.set_result(message)


class Pool:
    """`start` is what every worker is told at its start, but for its index."""

    def __init__(self, count: int, start: Start, metrics: Metrics) -> None:
        self.workers = [Worker(self, index) for index in range(count)]
        self.relaying = {protocol: WorkerSockets(self, protocol) for protocol in GROUPS}
        self._own = DataPath(start.settings, metrics)
        """For SCTP alone."""
        self.sockets: Mapping[Protocol, ProxySockets] = {**self.relaying, Protocol.SCTP: self._own.sctp}
        self.accounts = Accounts(self.workers)
        self.opened: dict[int, WorkerSocket] = {}
        self.draining = False
        self.metrics = metrics
        metrics.descriptors_in_use = lambda: (
            self._own.descriptors.used + sum(worker.descriptors_in_use for worker in self.workers)
        )
        self._start = start
        self._ids = itertools.count(1)

    async def run(self) -> None:
        """Keep the workers alive until cancelled; sessions go on then, until `close`."""
        async with asyncio.TaskGroup() as tasks:
            for worker in self.workers:
                tasks.create_task(worker.keep(), name=f"worker {worker.index}")

    async def close(self) -> None:
        """End the workers, and with them every session that is left."""
        self.draining = True
        await asyncio.gather(*(worker.end() for worker in self.workers))
        await self._own.close()

    def fit(self, held: int) -> None:
        """Sockets held here cost the workers' sessions nothing: those have descriptors of their own."""
        self._own.fit(held)

    async def count(self) -> None:
        """Bring the metrics up to this moment, as far as the workers answer."""
        await self._own.count()
        await self._ask(AskCounts)

    async def sessions(self) -> list[Session]:
        answers = await self._ask(AskSessions)
        told = [session for answer in answers if isinstance(answer, Sessions) for session in answer.sessions]
        return told + await self._own.sessions()

    async def _ask(self, question: Callable[[int], AskCounts | AskSessions]) -> list[Report | Sessions]:
        asked = [worker.ask(question) for worker in self.workers if worker.is_up]
        if not asked:
            return []
        done, late = await asyncio.wait(asked, timeout=PATIENCE)
        for answer in late:
            answer.cancel()
        return [answer.result() for answer in done if not answer.cancelled()]

    # -- for the proxy sockets

    def add(self, key: SocketKey, protocol: Protocol, group: Group, port: int, account: Account) -> WorkerSocket:
        opening = Open(next(self._ids), account.id, key, protocol)
        made = self.opened[opening.id] = WorkerSocket(self, opening, account, group, port)
        for worker in self.workers:
            made.introduce(worker)
        return made

    def forget(self, proxy_socket: WorkerSocket) -> None:
        number = proxy_socket.opening.id
        if self.opened.pop(number, None) is not None:
            self.tell(Close(number))
            self.accounts.close(proxy_socket.account)

    def tell(self, message: ToWorker) -> None:
        for worker in self.workers:
            worker.send(message)

    # -- for the workers

    def start_of(self, index: int) -> Start:
        return msgspec.structs.replace(self._start, index=index)

    def add_up(self, worker: Worker, report: Report) -> None:
        self.accounts.add_up(worker, report.counts, report.over)
        worker.active = dict(report.active)
        worker.descriptors_in_use = report.descriptors_in_use
        self.metrics.accept_pauses += report.accept_pauses

    def take_back(self, worker: Worker) -> None:
        """A dead worker's sessions have ended, and it has none to drain."""
        self.accounts.take_back(worker)
        worker.active.clear()
        worker.descriptors_in_use = 0
        worker.busy.clear()
        for sockets in self.relaying.values():
            sockets.tell_if_idle()

    def offer_again(self, worker: Worker, number: int) -> None:
        logger.error("worker %d has no descriptor left for another service port; trying again", worker.index)

        def offer() -> None:
            proxy_socket = self.opened.get(number)
            if proxy_socket is not None and proxy_socket.serving:
                proxy_socket.offer(worker)

        asyncio.get_running_loop().call_later(AGAIN, offer)

    def tell_how_many(self) -> None:
        self.metrics.workers.set(sum(worker.is_up for worker in self.workers))
