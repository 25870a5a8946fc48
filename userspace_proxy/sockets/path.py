"""The data path of one process: a poller, a budget of descriptors, and the proxy sockets of each protocol.

The whole proxy has one, or each of its workers does. What it takes to relay is put together here and nowhere else; what
is relayed where is said by whoever opens sockets.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from userspace_proxy.metrics import Metrics
from userspace_proxy.model import Protocol
from userspace_proxy.poller import Poller
from userspace_proxy.sockets.base import Descriptors, ProxySockets, Session
from userspace_proxy.sockets.sctp import SCTPSockets
from userspace_proxy.sockets.tcp import TCPSockets
from userspace_proxy.sockets.udp import UDPSockets


@dataclass(frozen=True, slots=True)
class RelaySettings:
    """Times are seconds."""

    descriptors: int
    """For sessions, and the proxy sockets that `fit` is told of."""
    splice: bool
    half_close_timeout: float
    udp_timeout: float
    max_udp_flows: int


class DataPath:
    """All of it is for the thread of the running loop. What can be asked of it is what a `Pool` of workers can be."""

    def __init__(self, settings: RelaySettings, metrics: Metrics) -> None:
        self._budget = settings.descriptors
        self._poller = Poller(asyncio.get_running_loop())
        self.descriptors = Descriptors(settings.descriptors)
        metrics.descriptors_in_use = lambda: self.descriptors.used
        self.tcp = TCPSockets(
            self._poller,
            self.descriptors,
            metrics,
            splice=settings.splice,
            half_close_timeout=settings.half_close_timeout,
        )
        self.udp = UDPSockets(
            self._poller, self.descriptors, idle_timeout=settings.udp_timeout, max_flows=settings.max_udp_flows
        )
        self.sctp = SCTPSockets(self._poller, self.descriptors, metrics, half_close_timeout=settings.half_close_timeout)
        kinds = self.tcp, self.udp, self.sctp
        self.sockets: Mapping[Protocol, ProxySockets] = {kind.protocol: kind for kind in kinds}

    def fit(self, held: int) -> None:
        """Sessions may have what proxy sockets leave."""
        self.descriptors.allow(max(2, self._budget - held))

    async def count(self) -> None:
        """Bring the metrics up to this moment: live sessions are counted as they go, not as they end."""
        self.tcp.count()
        self.sctp.count()

    async def sessions(self) -> list[Session]:
        """Every live session, for people."""
        return self.tcp.sessions() + self.udp.sessions() + self.sctp.sessions()

    async def close(self) -> None:
        self._poller.close()
