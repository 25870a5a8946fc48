"""A real proxy socket on a loop of its own thread, so that tests are scripts with plain blocking sockets."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, Self, TypeVar

from userspace_proxy.config import LoggingFormat
from userspace_proxy.exceptions import PortError
from userspace_proxy.loadbalancer import LoadBalancer
from userspace_proxy.metrics import Metrics, Outcome, ServicePortMetrics, open_descriptors
from userspace_proxy.model import Endpoint, IPFamily, Protocol, ServicePortName, SessionAffinity, SocketKey
from userspace_proxy.sockets.base import AF, ProxySocket, ProxySockets, Session
from userspace_proxy.sockets.path import DataPath, RelaySettings
from userspace_proxy.workers.messages import Start
from userspace_proxy.workers.pool import Pool
from userspace_proxy.workers.program import Program

T = TypeVar("T")
NAME = ServicePortName("default", "web", "http")
KINDS = {
    Protocol.TCP: (socket.SOCK_STREAM, 0),
    Protocol.UDP: (socket.SOCK_DGRAM, 0),
    Protocol.SCTP: (socket.SOCK_STREAM, socket.IPPROTO_SCTP),
}
"""Socket kind and protocol number."""


def plain(protocol: Protocol, family: IPFamily) -> socket.socket:
    """A blocking socket as clients and servers have them."""
    kind, number = KINDS[protocol]
    return socket.socket(AF[family], kind, number)


class ProxyThread:
    """One service port, served on loopback. Whatever touches it is done on its own loop, through `call`."""

    def __init__(
        self,
        loop_factory: Callable[[], asyncio.AbstractEventLoop],
        protocol: Protocol,
        family: IPFamily,
        endpoints: Sequence[tuple[str, int]],
        *,
        affinity: SessionAffinity = SessionAffinity.NONE,
        max_ejection: float = 0.0,
        splice: bool = True,
        half_close_timeout: float = 300.0,
        idle_timeout: float = 0.25,
        max_flows: int = 1000,
        descriptors: int = 10000,
        workers: int = 1,
        bind: str = "",
    ) -> None:
        self.family = family
        self._bind = bind or family.loopback
        self.protocol = protocol
        self.metrics = Metrics()
        self._counts = self.metrics.service_port(SocketKey(NAME, family), protocol.value)
        self.workers = workers
        self.balancer = LoadBalancer(
            time.monotonic, random.Random(1), self._counts, affinity, 10800.0, max_ejection=max_ejection
        )
        self.balancer.update([Endpoint(ip, port) for ip, port in endpoints])
        self.loop = loop_factory()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._ready = threading.Event()
        self._thread.start()
        self._ready.wait()

        def start() -> None:
            settings = RelaySettings(descriptors, splice, half_close_timeout, idle_timeout, max_flows)
            self.path: DataPath | Pool
            if workers == 1:
                self.path = DataPath(settings, self.metrics)
            else:
                self.path = Pool(workers, Start(0, settings, max_ejection, 0, LoggingFormat.TEXT), self.metrics)
                self._keeping = self.loop.create_task(self.path.run())
            self.sockets: ProxySockets = self.path.sockets[protocol]
            self.socket = self._open()
            if endpoints:
                self.socket.serve()

        self.call(start)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.call_soon(self._ready.set)
        self.loop.run_forever()

    def _open(self) -> ProxySocket:
        for _ in range(100):
            with contextlib.suppress(PortError):
                return self.sockets.open(
                    SocketKey(NAME, self.family),
                    self._bind,
                    random.randint(20000, 30000),
                    self.balancer,
                    self._counts,
                )
        raise AssertionError("no port in a hundred tries")

    @property
    def pool(self) -> Pool:
        assert isinstance(self.path, Pool)
        return self.path

    @property
    def counts(self) -> ServicePortMetrics:
        """Brought up to this moment where workers have to be asked."""
        if self.workers > 1 and self.loop.is_running():
            self.wait_for(self.path.count())
        return self._counts

    def sessions(self) -> list[Session]:
        return self.wait_for(self.path.sessions())

    def wait_for(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(20)

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """Run a function on the proxy's loop; its result, or what it raised."""
        done = threading.Event()
        outcome: list[Any] = []

        def run() -> None:
            try:
                outcome.append((True, function(*args)))
            except Exception as error:  # noqa: BLE001 - told to the caller, whatever it is
                outcome.append((False, error))
            done.set()

        self.loop.call_soon_threadsafe(run)
        assert done.wait(10), "the proxy's loop is stuck"
        worked, value = outcome[0]
        if not worked:
            raise value
        return value  # type: ignore[no-any-return]

    @property
    def address(self) -> tuple[str, int]:
        return self.family.loopback, self.socket.port

    def update(self, endpoints: Sequence[tuple[str, int]]) -> None:
        def update() -> None:
            self.balancer.update([Endpoint(ip, port) for ip, port in endpoints])
            if endpoints:
                self.socket.serve()
            else:
                self.socket.refuse()

        self.call(update)

    def connect(self, timeout: float = 10.0, source: str | None = None) -> socket.socket:
        client = plain(self.protocol, self.family)
        client.settimeout(timeout)
        try:
            if source:
                client.bind((source, 0))
            client.connect(self.address)
        except OSError:
            client.close()
            raise
        return client

    def ended(self) -> dict[Outcome, int]:
        counts = self.counts
        return dict(self.call(lambda: dict(counts.ended)))

    def stop(self) -> None:
        async def end() -> None:
            if self.workers > 1:
                self._keeping.cancel()
                await asyncio.wait([self._keeping])
            self.sockets.end_all(Outcome.DRAIN_TIMEOUT)
            await self.path.count()
            self.socket.close()
            self.sockets.end_all(Outcome.DRAIN_TIMEOUT)  # of those who were in the queue

        if self.loop.is_closed():
            return
        try:
            self.wait_for(end())
            if self.workers > 1:
                eventually(lambda: not self._kept(), lambda: f"descriptors are left: {self._kept()}")
        finally:
            self.wait_for(self.path.close())
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(10)
            self.loop.close()

    def _kept(self) -> list[str]:
        """The workers that have more open than a new one, or think so."""
        self.wait_for(self.path.count())
        new = descriptors_of_a_new_worker()
        kept = []
        for worker in self.pool.workers:
            opened = opened_by(worker.program.pid) if worker.program is not None else 0
            if opened > new or (opened and worker.descriptors_in_use):
                kept.append(
                    f"worker {worker.index}: {opened}, {new} when it was new; {worker.descriptors_in_use} in use"
                )
        return kept


def opened_by(pid: int) -> int:
    """Descriptors of another process; none of one that has ended, or stands still and closes nothing."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return 0 if stat.read().rpartition(")")[2].split()[0] in "TZ" else len(os.listdir(f"/proc/{pid}/fd"))
    except (FileNotFoundError, ProcessLookupError):
        return 0


@functools.cache
def descriptors_of_a_new_worker() -> int:

    async def count() -> int:
        is_up = asyncio.Event()
        settings = RelaySettings(10, True, 1.0, 1.0, 1)
        worker = Program(Start(0, settings, 0.0, 0, LoggingFormat.TEXT), lambda _: is_up.set())
        await is_up.wait()
        try:
            return opened_by(worker.pid)
        finally:
            await worker.end()

    return asyncio.run(count())


@contextlib.contextmanager
def no_descriptor_left() -> Iterator[None]:
    """Descriptors are as many after as before, within the time the kernel takes for the last of them."""
    before = open_descriptors()
    yield
    eventually(lambda: open_descriptors() <= before, lambda: f"{open_descriptors()} descriptors, {before} before")


def eventually(holds: Callable[[], bool], message: Callable[[], str] = lambda: "", patience: float = 10.0) -> None:
    """Wait for something that another thread or the kernel brings about."""
    end = time.monotonic() + patience
    while not holds():
        assert time.monotonic() < end, message()
        time.sleep(0.01)


def listener(family: IPFamily = IPFamily.IPV4, protocol: Protocol = Protocol.TCP, port: int = 0) -> socket.socket:
    sock = plain(protocol, family)
    sock.bind((family.loopback, port))
    sock.settimeout(10)
    if protocol is not Protocol.UDP:
        sock.listen(512)
    return sock


def address(sock: socket.socket) -> tuple[str, int]:
    ip, port = sock.getsockname()[:2]
    return ip, port


def closed_port(family: IPFamily = IPFamily.IPV4) -> tuple[str, int]:
    """An address where nobody listens: connections are refused."""
    with socket.socket(AF[family]) as sock:
        sock.bind((family.loopback, 0))
        return address(sock)


@contextlib.contextmanager
def black_hole(family: IPFamily = IPFamily.IPV4) -> Iterator[tuple[str, int]]:
    """An address that neither answers nor refuses: a listener whose queue is full drops every SYN."""
    with contextlib.ExitStack() as stack:
        hole = stack.enter_context(socket.socket(AF[family]))
        hole.bind((family.loopback, 0))
        hole.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket(AF[family]))
            filler.setblocking(False)
            filler.connect_ex(address(hole))
        time.sleep(0.05)
        yield address(hole)


class Servers:
    """Endpoints that answer each connection by a function, each in a thread of its own."""

    def __init__(
        self,
        answer: Callable[[socket.socket], None],
        family: IPFamily = IPFamily.IPV4,
        port: int = 0,
        protocol: Protocol = Protocol.TCP,
    ) -> None:
        self._listener = listener(family, protocol, port)
        self._listener.settimeout(None)
        self._answer = answer
        self.address = address(self._listener)
        self.accepted = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.accepted += 1
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            sock.settimeout(20)
            self._answer(sock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)


def echo(sock: socket.socket) -> None:
    while chunk := sock.recv(65536):
        sock.sendall(chunk)


def read_all(sock: socket.socket) -> bytes:
    parts = []
    while chunk := sock.recv(1 << 20):
        parts.append(chunk)
    return b"".join(parts)


class Named:
    """An endpoint that answers whatever it is sent with its own name and the message."""

    def __init__(self, protocol: Protocol, family: IPFamily, name: str, port: int = 0) -> None:
        self._sock = listener(family, protocol, port)
        self._sock.settimeout(0.1)
        self.address = address(self._sock)
        self._name = name.encode()
        self._stop = False
        self._thread = threading.Thread(target=self._datagrams if protocol is Protocol.UDP else self._stream)
        self._thread.start()

    def _stream(self) -> None:
        while not self._stop:
            with contextlib.suppress(TimeoutError):
                client, _ = self._sock.accept()
                with client, contextlib.suppress(OSError):
                    client.settimeout(10)
                    client.sendall(self._name + b":" + client.recv(100))

    def _datagrams(self) -> None:
        while not self._stop:
            with contextlib.suppress(TimeoutError):
                message, client = self._sock.recvfrom(65535)
                self._sock.sendto(self._name + b":" + message, client)

    def stop(self) -> None:
        self._stop = True
        self._thread.join(10)
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def ask(
    proxy: ProxyThread, source: str | None = None, place: tuple[str, int] | None = None, message: bytes = b"hi"
) -> bytes:
    """One new client, one question; the name of the endpoint that answered. `place`: another socket of the proxy's."""
    with plain(proxy.protocol, proxy.family) as client:
        client.settimeout(5)
        if source:
            client.bind((source, 0))
        client.connect(place or proxy.address)
        client.send(message)
        name, _, echoed = client.recv(65535).partition(b":")
        assert echoed == message
        return name
