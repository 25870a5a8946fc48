"""Two workers, real processes: they act as one, and one that dies takes nobody with it but its own clients."""

from __future__ import annotations

import collections
import contextlib
import errno
import os
import re
import resource
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.netns import Namespace
from tests.proxy import (
    Named,
    ProxyThread,
    Servers,
    address,
    ask,
    closed_port,
    echo,
    eventually,
    listener,
)
from tests.sockets.conftest import Start
from userspace_proxy.metrics import Outcome
from userspace_proxy.model import IPFamily, Protocol, SessionAffinity
from userspace_proxy.workers import pool as pool_module
from userspace_proxy.workers import program
from userspace_proxy.workers.groups import GROUPS
from userspace_proxy.workers.messages import AskCounts

V4 = IPFamily.IPV4


@pytest.fixture(params=GROUPS)
def protocol(request: pytest.FixtureRequest) -> Protocol:
    value: Protocol = request.param
    return value


@pytest.fixture
def _many_addresses() -> Iterator[None]:
    with Namespace() as node:
        for number in range(2, 34):
            node.add_address("lo", f"fd00::{number:x}/128")
        with node.entered():
            yield


def clients(family: IPFamily) -> list[str]:
    return [f"127.0.0.{n}" if family is V4 else f"fd00::{n:x}" for n in range(2, 34)]


def pids(proxy: ProxyThread) -> list[int]:
    """The workers' processes; all of them are there."""
    found: list[int] = []

    def all_there() -> bool:
        found[:] = proxy.call(lambda: [w.program.pid for w in proxy.pool.workers if w.program is not None])
        return len(found) == proxy.workers

    eventually(all_there)
    return found


def kill(proxy: ProxyThread, index: int = 0) -> None:
    """Kill a worker and see its successor start."""
    before = pids(proxy)[index]
    os.kill(before, signal.SIGKILL)
    eventually(lambda: not alive(before))
    eventually(lambda: pids(proxy)[index] != before)


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def owner(proxy: ProxyThread, client: socket.socket) -> int:
    """The index of the worker that has taken this client over TCP and IPv4; -1 while none has."""
    ours, theirs = f":{proxy.socket.port:04X}", f":{address(client)[1]:04X}"
    table = Path("/proc/thread-self/net/tcp").read_text()
    inode = re.search(rf"{ours} \w+{theirs} \w+ \S+ \S+ \S+ +\d+ +\d+ (\d+)", table)
    assert inode is not None, table
    for index, pid in enumerate(pids(proxy)):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                if os.readlink(f"/proc/{pid}/fd/{fd}") == f"socket:[{inode[1]}]":
                    return index
    return -1


def connected(proxy: ProxyThread, count: int) -> list[list[socket.socket]]:
    """Clients of an echo, by the worker that serves them; each has some."""
    sorted_: list[list[socket.socket]] = [[] for _ in range(proxy.workers)]
    for _ in range(count):
        client = proxy.connect()
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        sorted_[owner(proxy, client)].append(client)
    assert all(sorted_)
    return sorted_


@contextlib.contextmanager
def named(protocol: Protocol, family: IPFamily, names: str) -> Iterator[list[Named]]:
    endpoints = [Named(protocol, family, name) for name in names]
    try:
        yield endpoints
    finally:
        for endpoint in endpoints:
            endpoint.stop()


def closing(groups: Sequence[Sequence[socket.socket]]) -> contextlib.ExitStack:
    stack = contextlib.ExitStack()
    for group in groups:
        for sock in group:
            stack.enter_context(sock)
    return stack


# -- choosing


@pytest.mark.privileged
@pytest.mark.usefixtures("_many_addresses")
def test_affinity_is_exact_over_all_workers(start: Start, protocol: Protocol, family: IPFamily) -> None:
    """And a worker's death moves no client of another; its own clients find a new place, and keep it."""
    with named(protocol, family, "abcde") as endpoints:
        proxy = start(protocol, family, [e.address for e in endpoints], affinity=SessionAffinity.CLIENT_IP)

        def placed(order: Sequence[str]) -> dict[str, bytes]:
            found = {client: {ask(proxy, client) for _ in range(3)} for client in order}
            assert all(len(names) == 1 for names in found.values())
            return {client: names.pop() for client, names in found.items()}

        before = placed(clients(family))
        assert len(set(before.values())) == 5
        kill(proxy)
        # In another order, so that whoever is placed anew is placed elsewhere.
        after = placed(clients(family)[::-1])
        assert placed(clients(family)) == after
        moved = {client for client in before if before[client] != after[client]}
        assert 0 < len(moved) < len(before)
        kill(proxy, 1)
        # The other worker's clients, for whom the first death meant nothing, are the only ones to move now.
        assert not {client for client, name in placed(clients(family)).items() if name != after[client]} & moved


def heard(proxy: ProxyThread) -> None:
    """Wait until each worker has heard what it was told last: it answers after it."""
    eventually(lambda: len(proxy.wait_for(proxy.pool._ask(AskCounts))) == proxy.workers)


@pytest.mark.privileged
@pytest.mark.usefixtures("_many_addresses")
def test_affinity_can_be_switched_while_clients_come(start: Start, protocol: Protocol) -> None:
    with named(protocol, V4, "abcde") as endpoints:
        proxy = start(protocol, V4, [e.address for e in endpoints])

        def switch(affinity: SessionAffinity) -> None:
            proxy.call(proxy.balancer.configure, affinity, 100.0)
            heard(proxy)
            # A client that happens to be given the port of a flow of before goes on with that flow.
            eventually(lambda: proxy.counts.active == 0)

        for _ in range(2):
            assert len({ask(proxy, "127.0.0.9") for _ in range(20)}) == 5
            switch(SessionAffinity.CLIENT_IP)
            for client in clients(V4):
                assert len({ask(proxy, client) for _ in range(3)}) == 1
            switch(SessionAffinity.NONE)


def test_turns_are_fair_over_all_workers(start: Start, protocol: Protocol, family: IPFamily) -> None:
    with named(protocol, family, "abcd") as endpoints:
        proxy = start(protocol, family, [e.address for e in endpoints])
        # From one client address, whom no worker may have for itself.
        met = collections.Counter(ask(proxy) for _ in range(42))
        assert all(abs(count - 42 / 4) < proxy.workers for count in met.values())
        assert len(met) == 4


def test_workers_begin_their_turns_at_different_endpoints(start: Start) -> None:
    with named(Protocol.TCP, V4, "abcd") as endpoints:
        proxy = start(Protocol.TCP, V4, [e.address for e in endpoints])
        orders = [proxy.socket.account.balance(worker).endpoints for worker in proxy.pool.workers]  # type: ignore[attr-defined]
        assert orders[0] == proxy.balancer.endpoints
        assert orders[1] == proxy.balancer.endpoints[2:] + proxy.balancer.endpoints[:2]


def test_what_one_learns_of_a_dead_endpoint_all_know(start: Start) -> None:
    with Servers(echo) as endpoint:
        dead = closed_port()
        proxy = start(Protocol.TCP, V4, [endpoint.address, dead], max_ejection=600.0)
        eventually(lambda: ask_echo(proxy) and proxy.call(lambda: set(proxy.balancer.ejected)) == {dead})
        # The first ejection lasts for 0.8 s at least. Sooner or later sixteen clients are served within that.
        for _ in range(20):
            before = proxy.counts.dial_failures[errno.ECONNREFUSED]
            began = time.monotonic()
            assert all(ask_echo(proxy) for _ in range(16))
            again = proxy.counts.dial_failures[errno.ECONNREFUSED]
            if time.monotonic() - began < 0.5 and again == before:
                break
        else:
            raise AssertionError("a worker goes on to dial what another has found dead")
        kill(proxy)
        assert proxy.call(lambda: set(proxy.balancer.ejected)) == {dead}
        with Named(Protocol.TCP, V4, "b", dead[1]):
            eventually(lambda: ask_anything(proxy) and not proxy.call(lambda: set(proxy.balancer.ejected)), patience=60)


def ask_echo(proxy: ProxyThread, place: tuple[str, int] | None = None) -> bool:
    with socket.create_connection(place or proxy.address, 10) as client:
        client.sendall(b"x")
        return client.recv(1) == b"x"


def ask_anything(proxy: ProxyThread) -> bool:
    with proxy.connect() as client:
        client.sendall(b"x")
        return bool(client.recv(1))


# -- several sockets of one service port


@contextlib.contextmanager
def another(proxy: ProxyThread) -> Iterator[tuple[str, int]]:
    """A second socket with the same balancer and counts, as a service port has one at each of its portals."""
    opened = proxy.call(proxy._open)
    proxy.call(opened.serve)
    try:
        yield proxy.family.loopback, opened.port
    finally:
        proxy.call(opened.close)


@pytest.mark.privileged
@pytest.mark.usefixtures("_many_addresses")
def test_affinity_is_exact_over_all_sockets_of_a_service_port(
    start: Start, protocol: Protocol, family: IPFamily
) -> None:
    with named(protocol, family, "abcde") as endpoints:
        proxy = start(protocol, family, [e.address for e in endpoints], affinity=SessionAffinity.CLIENT_IP)
        with another(proxy) as second:
            places = [proxy.address, second]
            # Each client begins at one of them, so that turns taken at each on its own would differ.
            first = {client: ask(proxy, client, places[n % 3 == 0]) for n, client in enumerate(clients(family))}
            assert len(set(first.values())) == 5
            for place in places * 2:
                assert {client: ask(proxy, client, place) for client in clients(family)} == first


def test_what_is_learnt_of_an_endpoint_at_one_socket_is_known_at_all(start: Start) -> None:
    with Servers(echo) as endpoint:
        proxy = start(Protocol.TCP, V4, [endpoint.address], max_ejection=600.0)
        with another(proxy) as second:
            # The first ejection lasts for 0.8 s at least. Sooner or later sixteen clients are served within that.
            for _ in range(20):
                dead = closed_port()
                proxy.update([endpoint.address, dead])
                eventually(
                    lambda dead=dead: ask_echo(proxy) and proxy.call(lambda: set(proxy.balancer.ejected)) == {dead}
                )
                heard(proxy)
                before = proxy.counts.dial_failures[errno.ECONNREFUSED]
                assert all(ask_echo(proxy, second) for _ in range(16))
                if proxy.counts.dial_failures[errno.ECONNREFUSED] == before:
                    break
            else:
                raise AssertionError(
                    "an endpoint is dialled for clients of one socket that those of another found dead"
                )


def test_sessions_of_a_socket_that_is_closed_are_counted_to_their_end(start: Start) -> None:
    """While others of the service port stay, and after the last of them."""
    with Servers(echo) as endpoint:
        proxy = start(Protocol.TCP, V4, [endpoint.address])
        with another(proxy) as second:
            early = [socket.create_connection(second, 10) for _ in range(10)]
            late = [proxy.connect() for _ in range(10)]
            for client in (*early, *late):
                client.sendall(b"x")
                assert client.recv(1) == b"x"
            assert proxy.counts.active == 20
        with closing([early]):
            for client in early:
                client.sendall(b"x" * 100)
                assert client.recv(100)
        eventually(lambda: proxy.counts.active == 10)
        assert proxy.counts.to_endpoint == 20 + 1000
        proxy.call(proxy.socket.close)
        with closing([late]):
            for client in late:
                client.sendall(b"x" * 100)
                assert client.recv(100)
            assert proxy.counts.active == 10
            assert len(proxy.pool.accounts) == 1
        eventually(lambda: proxy.counts.active == 0)
        assert sum(proxy.ended().values()) == 20
        assert proxy.counts.to_endpoint == 20 + 2000
        assert len(proxy.pool.accounts) == 0, "nothing is kept of what is over"


def test_sessions_of_a_socket_that_is_closed_end_with_their_worker(start: Start) -> None:
    with Servers(echo) as endpoint:
        proxy = start(Protocol.TCP, V4, [endpoint.address])
        theirs = connected(proxy, 20)
        assert proxy.counts.active == 20
        proxy.call(proxy.socket.close)
        kill(proxy)
        with closing(theirs):
            assert proxy.counts.active == len(theirs[1])
            assert proxy.ended() == {Outcome.WORKER_DIED: len(theirs[0])}
        eventually(lambda: proxy.counts.active == 0)
        assert len(proxy.pool.accounts) == 0


# -- dying


def test_a_death_costs_only_the_workers_own_connections(start: Start) -> None:
    """Clients come all the time: none that comes after the death is refused or reset, nor any of the other worker."""
    with Servers(echo) as endpoint:
        proxy = start(Protocol.TCP, V4, [endpoint.address])
        theirs = connected(proxy, 30)
        dead = threading.Event()
        stop = threading.Event()
        problems: list[str] = []
        served = [0, 0]

        def come() -> None:
            while not stop.is_set():
                after = dead.is_set()
                try:
                    with proxy.connect() as client:
                        for _ in range(3):
                            client.sendall(b"x")
                            assert client.recv(1) == b"x"
                    served[after] += 1
                except (OSError, AssertionError) as error:
                    if after:
                        problems.append(repr(error))

        threads = [threading.Thread(target=come) for _ in range(4)]
        for thread in threads:
            thread.start()
        for index in (0, 1, 0):
            victim = pids(proxy)[index]
            eventually(lambda: served[0] > 50)
            os.kill(victim, signal.SIGKILL)
            eventually(lambda victim=victim: not alive(victim))
            dead.set()
            mark = served[1]
            eventually(lambda mark=mark: served[1] > mark + 100, patience=30)
            if index == 0 and theirs[0]:
                with closing(theirs[:1]):
                    for client in theirs[0]:
                        with pytest.raises(ConnectionResetError):
                            client.recv(1)
                theirs[0] = []
                for client in theirs[1]:
                    client.sendall(b"y")
                    assert client.recv(1) == b"y"
            # A client that set out before the next death may be its own victim.
            dead.clear()
            served[0] = 0
        stop.set()
        for thread in threads:
            thread.join(20)
        with closing(theirs):
            pass
        assert not problems
        assert served[1] > 300


@contextlib.contextmanager
def flows(start: Start) -> Iterator[tuple[ProxyThread, Callable[[], list[int]]]]:
    """Clients of many addresses, and a way to ask where each one's datagrams come from, as their endpoint sees it."""
    endpoint = listener(V4, Protocol.UDP)
    proxy = start(Protocol.UDP, V4, [address(endpoint)], idle_timeout=60)
    socks = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in clients(V4)]

    def sources() -> list[int]:
        found = []
        for number, sock in enumerate(socks):
            sock.send(b"%d" % number)
            datagram, source = endpoint.recvfrom(100)
            assert datagram == b"%d" % number
            endpoint.sendto(datagram, source)
            assert sock.recv(100) == datagram
            found.append(source[1])
        return found

    with closing([socks]), endpoint:
        for client, sock in zip(clients(V4), socks, strict=True):
            sock.bind((client, 0))
            sock.settimeout(10)
            sock.connect(proxy.address)
        yield proxy, sources


def test_flows_of_others_are_not_disturbed_and_those_of_the_dead_go_on(start: Start) -> None:
    with flows(start) as (proxy, sources):
        before = sources()
        assert sources() == before
        assert proxy.counts.active == len(before)
        # To a worker that is dead and not replaced yet, datagrams wait.
        victim = pids(proxy)[0]
        os.kill(victim, signal.SIGKILL)
        eventually(lambda: not alive(victim))
        after = sources()
        kept = sum(one == other for one, other in zip(before, after, strict=True))
        assert 0 < kept < len(before)
        assert proxy.ended() == {Outcome.WORKER_DIED: len(before) - kept}
        assert proxy.counts.active == len(before)
        assert sources() == after


def test_flows_stay_where_they_are_as_affinity_is_switched(start: Start) -> None:
    with flows(start) as (proxy, sources):
        before = sources()
        for affinity in (SessionAffinity.CLIENT_IP, SessionAffinity.NONE, SessionAffinity.CLIENT_IP):
            proxy.call(proxy.balancer.configure, affinity, 100.0)
            heard(proxy)
            assert sources() == before


def test_counts_are_summed_and_do_not_fall_when_a_worker_dies(start: Start) -> None:
    with Servers(echo) as endpoint:
        proxy = start(Protocol.TCP, V4, [endpoint.address])
        theirs = connected(proxy, 20)
        counts = proxy.counts
        assert (counts.opened, counts.active, counts.to_endpoint, counts.to_client, counts.dials) == (20,) * 5
        assert len(proxy.sessions()) == 20
        kill(proxy)
        counts = proxy.counts
        assert (counts.opened, counts.to_endpoint, counts.dials) == (20,) * 3
        assert counts.active == len(theirs[1])
        assert proxy.ended() == {Outcome.WORKER_DIED: len(theirs[0])}
        [*sessions] = proxy.sessions()
        assert {session["client"] for session in sessions} == {"{}:{}".format(*address(c)) for c in theirs[1]}
        assert proxy.metrics.descriptors_in_use() == 2 * len(theirs[1])
        with closing(theirs):
            pass
        eventually(lambda: proxy.counts.active == 0)
        assert sum(proxy.ended().values()) == 20


def test_dying_again_and_again_is_counted_and_slowed_down(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    with Servers(echo) as endpoint:
        proxy = start(Protocol.TCP, V4, [endpoint.address])
        for _ in range(4):
            kill(proxy)
        text = proxy.wait_for(proxy.metrics.exposition())[0].decode()
        assert "userspace_proxy_worker_deaths_total 4.0" in text
        assert "userspace_proxy_workers 2.0" in text
        assert caplog.messages.count("worker 0 was killed by SIGKILL; its connections are reset") == 4
        assert re.findall(r"starting another( in \S+ s)?", caplog.text) == ["", " in 0.1 s", " in 0.2 s", " in 0.4 s"]
        assert all(ask_echo(proxy) for _ in range(16))


def test_a_worker_that_cannot_be_started_is_tried_again(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    with Servers(echo) as endpoint:
        proxy = start(Protocol.TCP, V4, [endpoint.address])
        assert ask_echo(proxy)
        with monkeypatch.context() as patched:
            patched.setattr(sys, "executable", "/nowhere/python")
            os.kill(pids(proxy)[0], signal.SIGKILL)
            eventually(lambda: proxy.metrics.worker_deaths._value.get() >= 3)
        assert all(ask_echo(proxy) for _ in range(16))


# -- wants and stalls


def test_clients_beyond_the_limit_wait_and_are_served_when_others_leave(start: Start) -> None:
    with Servers(echo) as endpoint:
        proxy = start(Protocol.TCP, V4, [endpoint.address], descriptors=21)
        clients = [proxy.connect(timeout=20) for _ in range(60)]
        for client in clients:
            client.sendall(b"x")
        eventually(lambda: proxy.counts.active == 20 and proxy.metrics.accept_pauses > 0)
        waiting = set(clients)
        while waiting:
            readable = select.select(waiting, (), (), 20)[0]
            assert readable, f"{len(waiting)} clients are never served"
            for client in readable:
                assert client.recv(1) == b"x"
                client.close()
            waiting -= set(readable)
        eventually(lambda: proxy.counts.active == 0)
        assert proxy.counts.opened == 60


def test_a_worker_without_a_descriptor_for_a_service_port_gets_it_later(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    with Servers(echo) as endpoint:
        proxy = start(Protocol.TCP, V4, [endpoint.address])
        with closing(connected(proxy, 20)):
            proxy.update([])
        pid = pids(proxy)[0]
        eventually(lambda: ask_is_refused(proxy))
        limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (4, limits[1]))
        proxy.update([endpoint.address])
        eventually(lambda: "no descriptor left for another service port" in caplog.text)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
        with closing(connected(proxy, 20)):
            pass


def ask_is_refused(proxy: ProxyThread) -> bool:
    try:
        return not ask_echo(proxy)
    except ConnectionRefusedError:
        return True


def test_a_worker_that_stands_still_holds_up_nobody_else(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "PATIENCE", 0.2)
    monkeypatch.setattr(program, "EXIT_TIMEOUT", 0.2)
    with Servers(echo) as endpoint:
        proxy = start(Protocol.TCP, V4, [endpoint.address])
        theirs = connected(proxy, 20)
        os.kill(pids(proxy)[0], signal.SIGSTOP)
        for client in theirs[1]:
            client.sendall(b"y")
            assert client.recv(1) == b"y"
        assert len(proxy.sessions()) == len(theirs[1])
        # What its clients told so far is still known, and the other's bytes are counted.
        assert proxy.counts.opened <= 20
        assert proxy.counts.to_client >= 2 * len(theirs[1])
        with closing(theirs):
            proxy.stop()
            for client in theirs[0]:
                with pytest.raises(ConnectionResetError):
                    client.recv(1)


def test_a_worker_that_stays_stuck_is_replaced(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pool_module, "PATIENCE", 0.2)
    monkeypatch.setattr(program, "LOOK", 0.1)
    with Servers(echo) as endpoint:
        proxy = start(Protocol.TCP, V4, [endpoint.address])
        theirs = connected(proxy, 20)
        assert proxy.counts.active == 20
        victim = pids(proxy)[0]
        os.kill(victim, signal.SIGSTOP)
        # Who is well says so whenever it is asked: by itself that is not as often as is looked here.
        eventually(lambda: proxy.ended() == {Outcome.WORKER_DIED: len(theirs[0])})
        eventually(lambda: pids(proxy)[0] != victim)
        monkeypatch.undo()  # nobody need be asked any more to be left alive
        assert "worker 0 has said nothing" in caplog.text
        for client in theirs[1]:
            client.sendall(b"y")
            assert client.recv(1) == b"y"
        with closing(theirs):
            pass
        assert all(ask_echo(proxy) for _ in range(16))


# -- the end


def test_drained_means_all_of_them(start: Start) -> None:
    with Servers(echo) as endpoint:
        proxy = start(Protocol.TCP, V4, [endpoint.address])
        theirs = connected(proxy, 20)
        idle: list[bool] = []
        proxy.call(proxy.sockets.drain, lambda: idle.append(True))
        with closing(theirs[:1]):
            pass
        assert len(proxy.sessions()) <= 20
        eventually(lambda: len(proxy.sessions()) == len(theirs[1]))
        assert not idle
        with closing(theirs[1:]):
            pass
        eventually(lambda: idle == [True])


@pytest.mark.parametrize("step", ["refuse", "close"])
def test_clients_in_the_queues_are_still_served_when_these_end(start: Start, step: str) -> None:
    """Those of workers that are busy: here they stand still for a moment, and answer later."""
    with Servers(echo) as endpoint:
        proxy = start(Protocol.TCP, V4, [endpoint.address])
        with closing(connected(proxy, 20)):
            pass
        running = pids(proxy)
        for pid in running:
            os.kill(pid, signal.SIGSTOP)
        clients = [proxy.connect() for _ in range(20)]
        with closing([clients]):
            proxy.call(getattr(proxy.socket, step))
            with pytest.raises(ConnectionRefusedError):
                proxy.connect()
            for pid in running:
                os.kill(pid, signal.SIGCONT)
            for client in clients:
                client.sendall(b"x")
                assert client.recv(1) == b"x"


def test_a_worker_that_dies_while_draining_is_drained_and_not_replaced(start: Start) -> None:
    with Servers(echo) as endpoint:
        proxy = start(Protocol.TCP, V4, [endpoint.address])
        theirs = connected(proxy, 20)
        idle: list[bool] = []
        proxy.call(proxy.sockets.drain, lambda: idle.append(True))
        with closing(theirs[:1]):
            pass
        os.kill(pids(proxy)[1], signal.SIGKILL)
        eventually(lambda: idle == [True])
        eventually(lambda: proxy.call(lambda: sum(w.is_up for w in proxy.pool.workers)) == 1)
        with closing(theirs):
            pass


def test_nothing_is_left_running(start: Start) -> None:
    proxy = start(Protocol.TCP, V4, [("127.0.0.1", 9)])
    running = pids(proxy)
    proxy.stop()
    assert not any(alive(pid) for pid in running)


def test_a_socket_of_its_family_and_protocol_is_open_to_all(start: Start, protocol: Protocol, family: IPFamily) -> None:
    """Each worker holds the descriptor of its own socket and no other's."""
    with named(protocol, family, "a") as endpoints:
        proxy = start(protocol, family, [e.address for e in endpoints])
        assert ask(proxy) == b"a"
        inodes = [os.fstat(sock.fileno()).st_ino for sock in proxy.socket._group.sockets]  # type: ignore[attr-defined]
        for pid, inode in zip(pids(proxy), inodes, strict=True):
            eventually(lambda pid=pid, inode=inode: held(pid) & set(inodes) == {inode})


def held(pid: int) -> set[int]:
    found = set()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            kind, _, number = os.readlink(f"/proc/{pid}/fd/{fd}").partition(":[")
            if kind == "socket":
                found.add(int(number.rstrip("]")))
    return found
