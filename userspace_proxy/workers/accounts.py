"""What sockets with the same load balancer have in common, whichever worker takes their clients: an account.

A service port has one socket, or several where nothing redirects, one at each of its portals. All of them pick by one
balancer, of which every worker has one copy, so that affinity and ejections hold for all of them; and they count
together. Sessions outlive their sockets, so an account ends when no worker has anything to tell of it any more.

The other half, in the workers, is `copies`.
"""

from __future__ import annotations

import itertools
import typing
from collections.abc import Sequence

from userspace_proxy.loadbalancer import LoadBalancer
from userspace_proxy.metrics import Outcome, ServicePortMetrics
from userspace_proxy.workers import counting
from userspace_proxy.workers.messages import Balance, Counts, Dialled, Probing


class Peer(typing.Protocol):
    """A worker, as far as accounts are concerned."""

    index: int

    @property
    def is_up(self) -> bool: ...

    def send(self, message: Balance | Dialled | Probing) -> None: ...


class Account:
    """`id` is never used twice."""

    def __init__(
        self,
        id: int,  # noqa: A002
        balancer: LoadBalancer,
        metrics: ServicePortMetrics,
        workers: Sequence[Peer],
    ) -> None:
        self.id = id
        self.balancer = balancer
        self.metrics = metrics
        self.sockets = 0
        """Those that are open."""
        self._workers = workers
        self._active: dict[int, int] = {}
        """Sessions, by the index of the worker; of each that knows the account and has not let it go."""

    @property
    def is_over(self) -> bool:
        return not self.sockets and not self._active

    def introduce(self, worker: Peer) -> None:
        if worker.is_up:
            self._active[worker.index] = 0
            worker.send(self.balance(worker))

    def follow(self) -> None:
        """The balancer has changed."""
        for worker in self._workers:
            worker.send(self.balance(worker))

    def balance(self, worker: Peer) -> Balance:
        balancer = self.balancer
        first = len(balancer.endpoints) * worker.index // len(self._workers)
        return Balance(
            account=self.id,
            endpoints=balancer.endpoints[first:] + balancer.endpoints[:first],
            ejected=tuple(balancer.ejected),
            affinity=balancer.affinity,
            affinity_timeout=balancer.affinity_timeout,
        )

    def add(self, worker: Peer, counts: Counts) -> None:
        counting.add(counts, self.metrics)
        self._active[worker.index] += counts.active

    def spread(self, source: Peer, news: Dialled | Probing) -> None:
        match news:
            case Probing(address=address):
                self.balancer.probed(address)
            case Dialled(address=address, worked=True):
                self.balancer.succeeded(address)
            case Dialled(address=address):
                self.balancer.failed(address)
        for worker in self._workers:
            if worker is not source:
                worker.send(news)

    def take_back(self, worker: Peer) -> None:
        """What sessions a worker has are no more, if it has any: it has let the account go, or died."""
        active = self._active.pop(worker.index, 0)
        if active:
            self.metrics.active -= active
            self.metrics.ended[Outcome.WORKER_DIED] += active


class Accounts:
    def __init__(self, workers: Sequence[Peer]) -> None:
        self._workers = workers
        self._by_id: dict[int, Account] = {}
        self._open: dict[LoadBalancer, Account] = {}
        """Those that have sockets."""
        self._ids = itertools.count(1)

    def __len__(self) -> int:
        return len(self._by_id)

    def open(self, balancer: LoadBalancer, metrics: ServicePortMetrics) -> Account:
        """The account for one socket more."""
        account = self._open.get(balancer)
        if account is None:
            account = Account(next(self._ids), balancer, metrics, self._workers)
            self._open[balancer] = self._by_id[account.id] = account
            balancer.on_change.append(account.follow)
            for worker in self._workers:
                account.introduce(worker)
        account.sockets += 1
        return account

    def close(self, account: Account) -> None:
        """For one socket less. With the last one, workers let the account go as soon as its sessions have ended."""
        account.sockets -= 1
        if not account.sockets:
            del self._open[account.balancer]
            account.balancer.on_change.remove(account.follow)
            self._drop_if_over(account)

    def introduce(self, worker: Peer) -> None:
        """Tell a new worker of all that it may have clients of."""
        for account in self._open.values():
            account.introduce(worker)

    def take_back(self, worker: Peer) -> None:
        """A worker has died."""
        for account in list(self._by_id.values()):
            account.take_back(worker)
            self._drop_if_over(account)

    def add_up(self, worker: Peer, counts: Sequence[Counts], over: Sequence[int]) -> None:
        """What a worker has counted, and which accounts it has let go."""
        for each in counts:
            self._by_id[each.account].add(worker, each)
        for number in over:
            account = self._by_id[number]
            account.take_back(worker)
            self._drop_if_over(account)

    def spread(self, source: Peer, news: Dialled | Probing) -> None:
        """What a worker has found out about an endpoint is told the others."""
        account = self._by_id.get(news.account)
        if account is not None:
            account.spread(source, news)

    def _drop_if_over(self, account: Account) -> None:
        if account.is_over:
            del self._by_id[account.id]
