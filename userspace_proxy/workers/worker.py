"""A process that relays: an ordinary data path, on sockets that the control process made and sees to.

Run as `python -m userspace_proxy.workers.worker DESCRIPTOR` by `pool`, whose messages it follows until the channel
behind the descriptor ends. That is how it learns that the control process is gone, however it went: nobody could
withdraw what was captured for it then, so it ends as well, and its sessions with a reset.

It decides nothing about service ports. It never makes a socket listen, or stop: that state is shared by all who hold
the socket. What it finds out about endpoints and has counted, it tells.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
import uvloop

from userspace_proxy import logs
from userspace_proxy.metrics import Metrics, Outcome
from userspace_proxy.model import Protocol, ProxyProtocol
from userspace_proxy.sockets.base import AF, ProxySocket
from userspace_proxy.sockets.path import DataPath
from userspace_proxy.sockets.tcp import TCPSocket
from userspace_proxy.workers.channel import Channel
from userspace_proxy.workers.copies import Copy
from userspace_proxy.workers.messages import (
    Admit,
    AskCounts,
    AskSessions,
    Balance,
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
    ToWorker,
)

REPORT = 5.0
"""Seconds between reports nobody asked for: what is not reported is not counted when this process dies."""


class ServedHere:
    """A proxy socket, in this worker."""

    def __init__(self, opening: Open, copy: Copy) -> None:
        self.key = opening.key
        self.protocol = opening.protocol
        self.account = opening.account
        self.copy = copy
        self.portals: Admit | None = None
        self.proxy_protocol = ProxyProtocol()
        self.socket: ProxySocket | None = None

    def let_go(self) -> None:
        if self.socket is not None:
            self.socket.close()
            self.socket = None


class Worker:
    def __init__(self, sock: socket.socket, start: Start) -> None:
        self.over = asyncio.Event()
        self._channel: Channel[ToWorker] = Channel(sock, ToWorker, self._on_message, self.over.set)
        self._metrics = Metrics()
        self._path = DataPath(start.settings, self._metrics)
        self._max_ejection = start.max_ejection
        self._served: dict[int, ServedHere] = {}
        self._copies: dict[int, Copy] = {}
        """By account."""
        self._leaving: set[int] = set()
        """Accounts whose last socket is closed; some have sessions still."""
        self._sockets_held = 0
        self._pauses_told = 0
        self._steps: dict[type, Callable[[Any], None]] = {
            Open: self._open,
            Balance: self._balance,
            Admit: self._admit,
            Speak: self._speak,
            Refuse: self._refuse,
            Close: self._close,
            Drain: self._drain,
            EndAll: self._end_all,
            AskCounts: lambda ask: self._report(ask.number),
            AskSessions: self._tell_sessions,
            Dialled: self._hear,
            Probing: self._hear,
        }
        self._keep_house()

    def _on_message(self, message: ToWorker, descriptor: int | None) -> None:
        match message, descriptor:
            case Serve(), int():
                self._serve(message, descriptor)
            case Take(), int():
                self._take(message, descriptor)
            case _:
                self._steps[type(message)](message)

    async def end(self) -> None:
        for sockets in self._path.sockets.values():
            sockets.end_all(Outcome.DRAIN_TIMEOUT)
        await self._path.close()
        self._channel.close()

    # -- service ports

    def _balance(self, order: Balance) -> None:
        copy = self._copies.get(order.account)
        if copy is None:
            copy = self._copies[order.account] = Copy(order.account, self._max_ejection, self._channel.send)
        copy.balance(order)

    def _open(self, opening: Open) -> None:
        copy = self._copies[opening.account]
        copy.sockets += 1
        self._served[opening.id] = ServedHere(opening, copy)

    def _admit(self, admit: Admit) -> None:
        served = self._served[admit.id]
        served.portals = admit
        if served.socket is not None:
            served.socket.admit(admit.portals)

    def _speak(self, speak: Speak) -> None:
        served = self._served[speak.id]
        served.proxy_protocol = speak.proxy_protocol
        if served.socket is not None:
            served.socket.speak(served.proxy_protocol)

    def _serve(self, serve: Serve, descriptor: int) -> None:
        if descriptor < 0:
            self._channel.send(Missed(serve.id))
            return
        served = self._served[serve.id]
        if served.socket is not None:  # it was offered again, and came through meanwhile
            os.close(descriptor)
            return
        kind = socket.SOCK_STREAM if served.protocol is Protocol.TCP else socket.SOCK_DGRAM
        sock = socket.socket(AF[served.key.family], kind, 0, descriptor)
        adopt = self._path.tcp.adopt if served.protocol is Protocol.TCP else self._path.udp.adopt
        served.socket = adopt(served.key, sock, served.copy.balancer, served.copy.metrics)
        if served.portals is not None:
            served.socket.admit(served.portals.portals)
        served.socket.speak(served.proxy_protocol)
        self._hold(1)

    def _take(self, take: Take, descriptor: int) -> None:
        if descriptor < 0:
            return  # the client has its reset already
        served = self._served[take.id]
        client = socket.socket(AF[served.key.family], socket.SOCK_STREAM, 0, descriptor)
        if isinstance(served.socket, TCPSocket) and self._path.descriptors.take(2):
            try:
                served.socket.receive(client, client.getpeername()[0])
            except OSError:  # it has left
                self._path.descriptors.give(2)
                client.close()
        else:
            client.close()

    def _refuse(self, refuse: Refuse) -> None:
        self._let_go(self._served[refuse.id])

    def _close(self, close: Close) -> None:
        served = self._served.pop(close.id)
        self._let_go(served)
        served.copy.sockets -= 1
        if not served.copy.sockets:
            self._leaving.add(served.account)

    def _let_go(self, served: ServedHere) -> None:
        if served.socket is not None:
            served.let_go()
            self._hold(-1)

    def _hold(self, more: int) -> None:
        self._sockets_held += more
        self._path.fit(self._sockets_held)

    def _hear(self, news: Dialled | Probing) -> None:
        copy = self._copies.get(news.account)
        if copy is not None:
            copy.balancer.hear(news)

    # -- sessions

    def _drain(self, drain: Drain) -> None:
        self._path.sockets[drain.protocol].drain(partial(self._tell_idle, drain.protocol))

    def _tell_idle(self, protocol: Protocol) -> None:
        self._channel.send(Idle(protocol))

    def _end_all(self, end: EndAll) -> None:
        self._path.sockets[end.protocol].end_all(end.outcome)

    # -- what is told

    def _keep_house(self) -> None:
        self._report(0)
        for copy in self._copies.values():
            copy.balancer.purge()
        asyncio.get_running_loop().call_later(REPORT, self._keep_house)

    def _report(self, number: int) -> None:
        pauses, self._pauses_told = self._metrics.accept_pauses - self._pauses_told, self._metrics.accept_pauses
        self._path.tcp.count()
        growth = [copy.tally.growth() for copy in self._copies.values()]
        over = tuple(account for account in self._leaving if not self._copies[account].has_sessions)
        self._leaving.difference_update(over)
        for account in over:
            del self._copies[account]
        self._channel.send(
            Report(
                number=number,
                counts=tuple(counts for counts in growth if counts is not None),
                over=over,
                active={protocol: sockets.active for protocol, sockets in self._path.sockets.items()},
                accept_pauses=pauses,
                descriptors_in_use=self._path.descriptors.used,
            )
        )

    def _tell_sessions(self, ask: AskSessions) -> None:
        self._channel.send(Sessions(ask.number, (*self._path.tcp.sessions(), *self._path.udp.sessions())))


async def work(sock: socket.socket, start: Start) -> None:
    worker = Worker(sock, start)
    await worker.over.wait()
    await worker.end()


def main() -> None:
    # Who stops the proxy may well signal all its processes; sessions are drained at the control process's word.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sock = socket.socket(fileno=int(sys.argv[1]))
    start = msgspec.json.decode(sys.argv[2], type=Start)
    logs.set_up(start.verbosity, start.logging_format, f"worker {start.index}")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work(sock, start))


if __name__ == "__main__":
    main()
