"""A worker's half of an account: its copy of a load balancer, and what it counts with it.

All sockets that share a balancer in the control process share the copy here. It picks by itself, in the order it is
given; what it learns of endpoints it tells, and it hears what others have learnt. The other half is `accounts`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from userspace_proxy.loadbalancer import LoadBalancer
from userspace_proxy.metrics import ServicePortMetrics
from userspace_proxy.model import Address, Endpoint
from userspace_proxy.workers.counting import Tally
from userspace_proxy.workers.messages import Balance, Dialled, Probing


class InOrder:
    """Leaves endpoints in the order the control process gave them; chance otherwise."""

    def __init__(self) -> None:
        self.random = random.Random().random

    def shuffle(self, x: list[Address], /) -> None:
        pass


class CopiedBalancer(LoadBalancer):
    """Tells what it learns of endpoints, and is told what others have learnt."""

    __slots__ = ("_number", "_tell")

    def __init__(
        self, account: int, metrics: ServicePortMetrics, max_ejection: float, tell: Callable[[Dialled | Probing], None]
    ) -> None:
        super().__init__(time.monotonic, InOrder(), metrics, max_ejection=max_ejection)
        self._number = account
        self._tell = tell

    def failed(self, address: Address) -> bool:
        news = super().failed(address)
        if news:
            self._tell(Dialled(self._number, address, worked=False))
        return news

    def succeeded(self, address: Address) -> bool:
        news = super().succeeded(address)
        if news:
            self._tell(Dialled(self._number, address, worked=True))
        return news

    def _passes_over(self, address: Address) -> bool:
        out = super()._passes_over(address)
        if not out and address in self.ejected:
            self._tell(Probing(self._number, address))
        return out

    def hear(self, news: Dialled | Probing) -> None:
        match news:
            case Probing(address=address):
                self.probed(address)
            case Dialled(address=address, worked=True):
                super().succeeded(address)
            case Dialled(address=address):
                super().failed(address)


class Copy:
    """`sockets`: how many share it that are open."""

    def __init__(self, account: int, max_ejection: float, tell: Callable[[Dialled | Probing], None]) -> None:
        self.sockets = 0
        self.metrics = ServicePortMetrics()
        self.balancer = CopiedBalancer(account, self.metrics, max_ejection, tell)
        self.tally = Tally(account, self.metrics)

    @property
    def has_sessions(self) -> bool:
        return self.metrics.active > 0

    def balance(self, order: Balance) -> None:
        self.balancer.configure(order.affinity, order.affinity_timeout)
        self.balancer.update([Endpoint(ip, port) for ip, port in order.endpoints])
        for address in order.ejected:
            if address not in self.balancer.ejected:
                self.balancer.hear(Dialled(order.account, address, worked=False))
