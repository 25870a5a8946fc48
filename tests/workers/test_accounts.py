"""What workers are told of the balancers that sockets share, and when they are done with one."""

from __future__ import annotations

import random
import time
from typing import Any

from userspace_proxy.loadbalancer import LoadBalancer
from userspace_proxy.metrics import Outcome, ServicePortMetrics
from userspace_proxy.model import Endpoint, SessionAffinity
from userspace_proxy.workers.accounts import Account, Accounts
from userspace_proxy.workers.counting import Tally
from userspace_proxy.workers.messages import Balance, Counts, Dialled, Probing

ONE, TWO, THREE = (("127.0.0.1", number) for number in (1, 2, 3))


class Worker:
    """What it was told, and a way to make it tell of so many sessions more."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.is_up = True
        self.told: list[Balance | Dialled | Probing] = []
        self.metrics = ServicePortMetrics()

    def send(self, message: Balance | Dialled | Probing) -> None:
        if self.is_up:
            self.told.append(message)


class Bench:
    def __init__(self) -> None:
        self.workers = [Worker(0), Worker(1)]
        self.accounts = Accounts(self.workers)
        self.metrics = ServicePortMetrics()
        self.balancer = LoadBalancer(time.monotonic, random.Random(1), self.metrics, max_ejection=600.0)
        self.balancer.update([Endpoint(*address) for address in (ONE, TWO, THREE)])

    def open(self) -> Account:
        return self.accounts.open(self.balancer, self.metrics)


def sessions(account: Account, more: int) -> list[Counts]:
    counted = ServicePortMetrics()
    counted.active = more
    growth = Tally(account.id, counted).growth()
    assert growth is not None
    return [growth]


def test_sockets_with_one_balancer_share_an_account() -> None:
    bench = Bench()
    account = bench.open()
    assert bench.open() is account
    assert account.sockets == 2
    for worker in bench.workers:
        assert [type(message) for message in worker.told] == [Balance], "told once"
    other = bench.accounts.open(LoadBalancer(time.monotonic, random.Random(1), bench.metrics), bench.metrics)
    assert other is not account
    assert other.id != account.id


def test_changes_are_told_once_while_a_socket_is_open() -> None:
    bench = Bench()
    account = bench.open()
    bench.open()
    told: list[Any] = bench.workers[1].told
    bench.balancer.configure(SessionAffinity.CLIENT_IP, 10.0)
    assert [message.affinity for message in told] == [SessionAffinity.NONE, SessionAffinity.CLIENT_IP]
    bench.accounts.close(account)
    bench.balancer.update([])
    assert len(told) == 3
    bench.accounts.close(account)
    bench.balancer.update([Endpoint(*ONE)])
    assert len(told) == 3
    assert not bench.balancer.on_change


def test_it_ends_when_no_worker_has_sessions_of_it() -> None:
    bench = Bench()
    first, second = bench.workers
    account = bench.open()
    bench.accounts.add_up(first, sessions(account, 3), ())
    bench.accounts.close(account)
    assert bench.open().id != account.id, "workers have let go of it, or are about to"
    bench.accounts.add_up(second, (), (account.id,))
    bench.accounts.add_up(first, sessions(account, -2), ())
    assert bench.metrics.active == 1
    assert len(bench.accounts) == 2
    bench.accounts.add_up(first, sessions(account, -1), (account.id,))
    assert (bench.metrics.active, dict(bench.metrics.ended)) == (0, {})
    assert len(bench.accounts) == 1


def test_a_dead_worker_tells_nothing_more() -> None:
    bench = Bench()
    first, second = bench.workers
    account = bench.open()
    bench.accounts.add_up(first, sessions(account, 3), ())
    bench.accounts.add_up(second, sessions(account, 2), ())
    bench.accounts.take_back(first)
    assert (bench.metrics.active, dict(bench.metrics.ended)) == (2, {Outcome.WORKER_DIED: 3})
    bench.accounts.introduce(first)
    bench.accounts.close(account)
    bench.accounts.take_back(second)
    assert len(bench.accounts) == 1
    bench.accounts.take_back(first)
    assert (bench.metrics.active, dict(bench.metrics.ended)) == (0, {Outcome.WORKER_DIED: 5})
    assert len(bench.accounts) == 0


def test_a_worker_that_is_not_there_is_not_waited_for() -> None:
    bench = Bench()
    for worker in bench.workers:
        worker.is_up = False
    bench.accounts.close(bench.open())
    assert len(bench.accounts) == 0


def test_a_new_worker_is_told_of_what_is_open() -> None:
    bench = Bench()
    bench.accounts.close(bench.open())
    account = bench.open()
    assert bench.balancer.failed(TWO)
    newcomer = Worker(1)
    bench.accounts.introduce(newcomer)
    assert newcomer.told == [account.balance(newcomer)]
    assert account.balance(newcomer).ejected == (TWO,)


def test_news_of_endpoints_go_to_all_others() -> None:
    bench = Bench()
    first, second = bench.workers
    account = bench.open()
    for news in (Dialled(account.id, ONE, worked=False), Dialled(account.id, ONE, worked=True)):
        bench.accounts.spread(first, news)
        assert second.told[-1] == news
        assert set(bench.balancer.ejected) == (set() if news.worked else {ONE})
    bench.accounts.spread(first, Probing(account.id, ONE))
    assert second.told[-1] == Probing(account.id, ONE)
    assert len(first.told) == 1
    bench.accounts.spread(first, Dialled(99, ONE, worked=False))  # of one that is over
    assert not bench.balancer.ejected
