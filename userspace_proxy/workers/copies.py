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
from userspace_proxy.workers.messages import Balance, Dialled


class InOrder:
    """Leaves endpoints in the order the control process gave them; chance otherwise."""

    def __init__(self) -> None:
        self.random = random.Random().random

    def shuffle(self, x: list[Address], /) -> None:
        pass


class CopiedBalancer(LoadBalancer):
    """Tells what it learns of endpoints, and is told what others have learnt."""

    __slots__ = ("_tell",)

    def __init__(self, metrics: ServicePortMetrics, max_ejection: float, tell: Callable[[Address, bool], None]) -> None:
        super().__init__(time.monotonic, InOrder(), metrics, max_ejection=max_ejection)
        self._tell = tell

    def failed(self, address: Address) -> bool:
        news = super().failed(address)
        if news:
            self._tell(address, False)
        return news

    def succeeded(self, address: Address) -> bool:
        news = super().succeeded(address)
        if news:
            self._tell(address, True)
        return news

    def hear(self, address: Address, worked: bool) -> None:
        if worked:
            super().succeeded(address)
        else:
            super().failed(address)


class Copy:
    """`sockets`: how many share it that are open."""

    def __init__(self, account: int, max_ejection: float, tell: Callable[[Dialled], None]) -> None:
        self.sockets = 0
        self.metrics = ServicePortMetrics()
        self.balancer = CopiedBalancer(
            self.metrics, max_ejection, lambda address, worked: tell(Dialled(account, address, worked))
        )
        self.tally = Tally(account, self.metrics)

    @property
    def has_sessions(self) -> bool:
        return self.metrics.active > 0

    def balance(self, order: Balance) -> None:
        self.balancer.configure(order.affinity, order.affinity_timeout)
        self.balancer.update([Endpoint(ip, port) for ip, port in order.endpoints])
        for address in order.ejected:
            if address not in self.balancer.ejected:
                self.balancer.hear(address, False)
