"""A worker process on its own: told what to do, and what it does when nobody tells it any more."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from tests.proxy import Servers, echo, eventually
from userspace_proxy.config import LoggingFormat
from userspace_proxy.metrics import Outcome
from userspace_proxy.model import (
    DEFAULT_AFFINITY_TIMEOUT,
    IPFamily,
    Portal,
    PortalKind,
    Protocol,
    ServicePortName,
    SessionAffinity,
    SocketKey,
)
from userspace_proxy.sockets import listening
from userspace_proxy.sockets.base import bind
from userspace_proxy.sockets.path import RelaySettings
from userspace_proxy.workers import worker as worker_module
from userspace_proxy.workers.channel import Channel
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
    Open,
    Refuse,
    Report,
    Serve,
    Sessions,
    Start,
    ToControl,
    ToWorker,
)

KEY = SocketKey(ServicePortName("default", "web"), IPFamily.IPV4)
START = Start(0, RelaySettings(1000, True, 300.0, 30.0, 100), 600.0, 0, LoggingFormat.TEXT)


class Control:
    """The control process's end of one worker, and a listener to give it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.program = subprocess.Popen(
                [
                    *(sys.executable, "-m", "userspace_proxy.workers.worker", str(theirs.fileno())),
                    msgspec.json.encode(START).decode(),
                ],
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        self.listener = bind(IPFamily.IPV4, socket.SOCK_STREAM, "127.0.0.1", 21000 + os.getpid() % 8000)
        listening.prepare(self.listener)
        listening.listen(self.listener)
        self.told: list[ToControl] = []
        self._numbers = itertools.count(1)
        self._runner = asyncio.Runner()
        self._loop = self._runner.get_loop()
        self.channel: Channel[ToControl] = self._runner.run(self._connect(ours))

    async def _connect(self, sock: socket.socket) -> Channel[ToControl]:
        return Channel(sock, ToControl, lambda message, _: self.told.append(message), lambda: None)

    def tell(self, *messages: ToWorker) -> None:
        for message in messages:
            self.channel.send(message, self.listener.fileno() if isinstance(message, Serve) else None)
        self.pass_time()

    def pass_time(self) -> None:
        self._runner.run(asyncio.sleep(0.01))

    def hear(self, holds: Callable[[Any], bool]) -> Any:
        """The first message that fulfils this, once it has come."""

        def come() -> bool:
            self.pass_time()
            return any(map(holds, self.told))

        eventually(come)
        return next(message for message in self.told if holds(message))

    def report(self) -> Report:
        number = next(self._numbers)
        self.tell(AskCounts(number))
        report: Report = self.hear(lambda m: isinstance(m, Report) and m.number == number)
        return report

    def connect(self) -> socket.socket:
        return socket.create_connection(self.listener.getsockname(), 5)

    def end(self) -> None:
        self.channel.close()
        self.listener.close()
        try:
            assert self.program.wait(10) == 0
        finally:
            self.program.kill()
            self.program.wait()
            self._runner.close()


@pytest.fixture
def control() -> Iterator[Control]:
    made = Control()
    yield made
    made.end()


@pytest.fixture
def endpoint() -> Iterator[Servers]:
    with Servers(echo) as server:
        yield server


def served(endpoint: Servers, *others: tuple[str, int], portals: tuple[Portal, ...] | None = None) -> list[ToWorker]:
    return [
        Balance(7, (*others, endpoint.address), (), SessionAffinity.NONE, DEFAULT_AFFINITY_TIMEOUT),
        Open(1, 7, KEY, Protocol.TCP),
        Admit(1, portals),
        Serve(1),
    ]


def answered(client: socket.socket) -> bool:
    client.sendall(b"x")
    return client.recv(1) == b"x"


def test_it_serves_what_it_is_given_and_tells_what_it_did(control: Control, endpoint: Servers) -> None:
    control.tell(*served(endpoint))
    with control.connect() as client:
        assert answered(client)
        report = control.report()
        [counts] = report.counts
        assert (counts.account, counts.opened, counts.active, counts.to_client) == (7, 1, 1, 1)
        assert (report.active[Protocol.TCP], report.descriptors_in_use) == (1, 2)
        control.tell(AskSessions(6))
        [session] = control.hear(lambda m: isinstance(m, Sessions)).sessions
        assert session["client"] == "{}:{}".format(*client.getsockname())
    eventually(lambda: control.report().active[Protocol.TCP] == 0)


def test_portals_hold_from_the_first_client_on(control: Control, endpoint: Servers) -> None:
    portal = Portal(IPFamily.IPV4, Protocol.TCP, "10.96.0.1", 80, PortalKind.CLUSTER_IP)
    waiting = control.connect()
    control.tell(*served(endpoint, portals=(portal,)))
    with waiting, pytest.raises(ConnectionResetError):
        waiting.recv(1)
    control.tell(Admit(1, None))
    with control.connect() as client:
        assert answered(client)


def test_it_lets_go_and_takes_again(control: Control, endpoint: Servers) -> None:
    """The listener listens all the time, for another sees to it; who comes meanwhile waits for whoever serves."""
    control.tell(*served(endpoint))
    with control.connect() as before:
        assert answered(before)
        for _ in range(3):
            control.tell(Refuse(1))
            control.report()
            with control.connect() as client:
                client.sendall(b"x")
                client.settimeout(0.1)
                with pytest.raises(TimeoutError):
                    client.recv(1)
                client.settimeout(5)
                control.tell(Serve(1), Serve(1))
                assert client.recv(1) == b"x"
            assert answered(before), "what is established goes on"
        control.tell(Close(1))
        control.report()
        assert answered(before)


def test_a_listener_that_is_shut_down_meanwhile_is_no_trouble(control: Control, endpoint: Servers) -> None:
    control.tell(*served(endpoint))
    with control.connect() as client:
        assert answered(client)
        listening.stop_listening(control.listener)
        assert answered(client)
        listening.listen(control.listener)
        with control.connect() as other:
            assert answered(other)


def test_it_tells_of_dead_endpoints_and_heeds_what_others_tell(control: Control, endpoint: Servers) -> None:
    with Servers(echo) as other, Servers(echo) as third:
        dead = ("127.0.0.1", 9)
        control.tell(*served(endpoint, other.address, third.address, dead))
        for _ in range(4):
            with control.connect() as client:
                assert answered(client)
        news = control.hear(lambda m: isinstance(m, Dialled))
        assert (news.account, news.address, news.worked) == (7, dead, False)
        control.tell(Dialled(7, other.address, False))
        before = other.accepted
        for _ in range(9):
            with control.connect() as client:
                assert answered(client)
        assert other.accepted <= before + 1, "nobody but a probe, if the time is over"
        control.tell(Dialled(7, other.address, True), Dialled(99, dead, True))
        before = other.accepted
        for _ in range(9):
            with control.connect() as client:
                assert answered(client)
        assert other.accepted >= before + 3
        assert len([m for m in control.told if isinstance(m, Dialled) and m.address == other.address]) <= 1


def test_sockets_of_an_account_count_together_and_it_is_let_go_after_the_last_session(
    control: Control, endpoint: Servers
) -> None:
    control.tell(*served(endpoint), Open(2, 7, KEY, Protocol.TCP), Close(1))
    assert control.report().over == ()
    control.tell(Serve(2))
    with control.connect() as client:
        assert answered(client)
        control.tell(Close(2))
        report = control.report()
        assert (report.counts[0].opened, report.over) == (1, ())
        assert answered(client)
    eventually(lambda: 7 in control.report().over)
    told = [counts for m in control.told if isinstance(m, Report) for counts in m.counts]
    assert (sum(c.active for c in told), sum(c.to_client for c in told)) == (0, 2)
    assert [m.over for m in control.told if isinstance(m, Report) and m.over] == [(7,)], "told once"


def test_clients_whose_affinity_has_expired_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "REPORT", 0.001)

    async def main() -> None:
        ours, theirs = socket.socketpair()
        made = worker_module.Worker(theirs, START)
        made._balance(Balance(7, (("127.0.0.1", 9),), (), SessionAffinity.CLIENT_IP, 0.0))
        balancer = made._copies[7].balancer
        balancer.pick("192.0.2.1")
        assert balancer.clients == 1
        for _ in range(1000):
            await asyncio.sleep(0.01 if balancer.clients else 0)
        assert balancer.clients == 0
        await made.end()
        ours.close()

    asyncio.run(main())


def test_draining_is_told_when_it_is_done(control: Control, endpoint: Servers) -> None:
    control.tell(*served(endpoint))
    with control.connect() as client:
        assert answered(client)
        control.tell(Drain(Protocol.UDP), Drain(Protocol.TCP))
        control.hear(lambda m: m == Idle(Protocol.UDP))
        assert Idle(Protocol.TCP) not in control.told
        control.tell(EndAll(Protocol.TCP, Outcome.DRAIN_TIMEOUT))
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    control.hear(lambda m: m == Idle(Protocol.TCP))


def test_signals_are_for_the_control_process_to_understand(control: Control, endpoint: Servers) -> None:
    control.tell(*served(endpoint))
    with control.connect() as client:
        assert answered(client)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            control.program.send_signal(number)
        assert answered(client)
        with control.connect() as other:
            assert answered(other)


def test_when_nobody_is_there_any_more_it_ends_and_resets_its_clients(endpoint: Servers) -> None:
    control = Control()
    control.tell(*served(endpoint))
    with control.connect() as client:
        assert answered(client)
        control.end()
        with pytest.raises(ConnectionResetError):
            client.recv(1)


def test_killed_it_resets_its_clients_and_who_waits_is_not_its_own(endpoint: Servers) -> None:
    control = Control()
    control.tell(*served(endpoint))
    with control.connect() as client:
        assert answered(client)
        control.program.send_signal(signal.SIGSTOP)
        with control.connect() as waiting:
            control.program.kill()
            with pytest.raises(ConnectionResetError):
                client.recv(1)
            waiting.settimeout(0.2)
            with pytest.raises(TimeoutError):
                waiting.recv(1)
    control.channel.close()
    control.listener.close()
    control.program.wait()
    control._runner.close()
