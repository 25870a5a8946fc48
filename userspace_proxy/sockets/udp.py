"""UDP proxy sockets: datagrams between clients and endpoints, flow by flow.

A flow is a client address and the local address it spoke to; it owns a socket connected to its endpoint. Its
idle clock runs from the last datagram either way. Replies leave from the address the client spoke to, or NAT on the
way back would not know them; they wait for those of the same wake-up to go together (`datagrams`).

`UDPSocket` is one service port; `UDPSockets` is what they share: the flows of all, capped together since
descriptors are, the one idle longest going first. Watching is level-triggered here: most wake-ups bring one
datagram, and a second read only to hear EAGAIN would cost as much as the first.
"""

from __future__ import annotations

import errno
import heapq
import itertools
import logging
import socket
from collections.abc import Callable, Collection, Sequence
from functools import partial
from socket import SocketType

from userspace_proxy.exceptions import NoEndpoints
from userspace_proxy.loadbalancer import LoadBalancer
from userspace_proxy.metrics import Outcome, ServicePortMetrics, errno_name
from userspace_proxy.model import Address, Portal, Protocol, ProxyProtocol, SocketKey, join_host_port
from userspace_proxy.poller import LEVEL_IN, Poller
from userspace_proxy.sockets.base import AF, Descriptors, Session, bind, claim
from userspace_proxy.sockets.datagrams import COUNT, Inbox, Outbox, answering, ask_for_letterheads, sender
from userspace_proxy.sockets.screen import screen

logger = logging.getLogger(__name__)

RECEIVE_BUFFER = 4 * 1024 * 1024
"""Asked for on the socket all clients of a service port share; the kernel caps it at net.core.rmem_max."""
SPARE = 64
"""Ended flows that may wait to be forgotten, beside as many as there are live ones."""
SILENCE = 4.0
"""Seconds without bad news until an endpoint counts as alive; ARP takes three to find that a host is gone."""
SWEEP = 0.05
"""Seconds by which an idle flow may outstay its time-out."""

_DONTWAIT = int(socket.MSG_DONTWAIT)


class Flow:
    """One client's datagrams: a socket connected to the endpoint, watched for its replies."""

    __slots__ = (
        "client",
        "endpoint",
        "generation",
        "head",
        "key",
        "last",
        "owner",
        "received",
        "refused",
        "replied",
        "since",
        "sock",
    )

    def __init__(self, owner: UDPSocket, key: bytes, now: float) -> None:
        """`key`: the letterhead of its datagrams."""
        self.owner = owner
        self.key = key
        self.client = sender(key)
        self.head = answering(key)
        self.since = self.last = now
        self.sock: SocketType | None = None
        self.endpoint: Address = ("", 0)
        self.generation = -1
        self.refused = False
        """The endpoint's host said that nobody listens there; known only after a datagram was lost to it."""
        self.received = 0
        self.replied = 0

    def on_events(self, _events: int) -> None:
        """A reply. One a wake-up: a flow with more fires again."""
        sock = self.sock
        if sock is None:
            return
        owner = self.owner
        outbox = owner.shared.outbox_of(owner)
        try:
            size = sock.recv_into(outbox.rooms[outbox.count], 0, _DONTWAIT)
        except BlockingIOError:
            return
        except OSError as error:
            # ICMP about an earlier datagram, delivered here. The flow lives on: the next datagram decides.
            owner.note_refusal(self, error.errno or 0)
            return
        if owner.balancer.ejected:
            owner.balancer.succeeded(self.endpoint)
        self.last = owner.shared.poller.clock()
        self.replied += 1
        outbox.put(self.head, size)


class UDPSockets:
    """All UDP proxy sockets, and their flows."""

    protocol = Protocol.UDP

    def __init__(self, poller: Poller, descriptors: Descriptors, *, idle_timeout: float, max_flows: int) -> None:
        self.poller = poller
        self.inbox = Inbox()
        self.draining = False
        self._outbox = Outbox()
        self._replying: UDPSocket | None = None
        """Whose replies are in the outbox."""
        poller.at_end_of_batch(self._send_replies)
        self._on_idle: Callable[[], None] | None = None
        self._descriptors = descriptors
        self._idle_timeout = idle_timeout
        self._max_flows = max_flows
        self._count = 0
        self._sequence = itertools.count()
        self._idle: list[tuple[float, int, Flow]] = []
        """A heap by when to look at a flow again, which is never later than its true deadline."""
        self._sweeping = False
        self._sockets: set[UDPSocket] = set()

    def open(
        self, key: SocketKey, ip: str, port: int, balancer: LoadBalancer, metrics: ServicePortMetrics
    ) -> UDPSocket:
        udp_socket = UDPSocket(self, key, ip, port, balancer, metrics)
        # Bound on its own first, the claim has made sure that nobody shares the port; from here on its successors do,
        # each beside the one whose place it takes.
        udp_socket.hold(claim(key.family, socket.SOCK_DGRAM, ip, port))
        self._sockets.add(udp_socket)
        return udp_socket

    def adopt(self, key: SocketKey, sock: SocketType, balancer: LoadBalancer, metrics: ServicePortMetrics) -> UDPSocket:
        """Hear the clients of a socket that another process made and sees to, until it is closed here."""
        ip, port = sock.getsockname()[:2]
        udp_socket = UDPSocket(self, key, ip, port, balancer, metrics)
        udp_socket.adopted = True
        udp_socket.hear(sock)
        self._sockets.add(udp_socket)
        return udp_socket

    @property
    def active(self) -> int:
        return self._count

    def sessions(self) -> list[Session]:
        now = self.poller.clock()
        return [_describe(flow, now) for udp_socket in self._sockets for flow in udp_socket.flows.values()]

    def drain(self, on_idle: Callable[[], None]) -> None:
        self.draining = True
        self._on_idle = on_idle
        if not self.active:
            on_idle()

    def end_all(self, outcome: Outcome) -> None:
        for udp_socket in list(self._sockets):
            udp_socket.end_flows(outcome)

    def forget(self, udp_socket: UDPSocket) -> None:
        self._sockets.discard(udp_socket)

    # -- replies

    def outbox_of(self, udp_socket: UDPSocket) -> Outbox:
        """Where to put one more reply to this one's clients."""
        outbox = self._outbox
        if outbox.count and (outbox.count == COUNT or self._replying is not udp_socket):
            self._send_replies()
        self._replying = udp_socket
        return outbox

    def _send_replies(self) -> None:
        if self._outbox.count and self._replying is not None:
            self._replying.reply(self._outbox)

    # -- flows

    def room(self) -> bool:
        """Room for one more flow, if need be by ending the one that has been idle longest."""
        while self._count >= self._max_flows or not self._descriptors.take(1):
            flow = self._pop_due(float("inf"))
            if flow is None:
                return False
            self.end(flow, Outcome.EVICTED)
        return True

    def add(self, flow: Flow) -> None:
        """A flow whose place was given by `room`."""
        self._count += 1
        flow.owner.flows[flow.key] = flow
        flow.owner.metrics.opened += 1
        flow.owner.metrics.active += 1
        if len(self._idle) > 2 * self._count + SPARE:
            # Flows that ended before their time wait here for it, and there may be any number of them.
            self._idle = [entry for entry in self._idle if entry[2].sock is not None]
            heapq.heapify(self._idle)
        heapq.heappush(self._idle, (flow.last + self._idle_timeout, next(self._sequence), flow))
        if not self._sweeping:
            self._sweep_at(flow.last + self._idle_timeout)

    def end(self, flow: Flow, outcome: Outcome) -> None:
        if flow.owner.flows.pop(flow.key, None) is None:
            return
        self._count -= 1
        if flow.sock is not None:
            self.poller.discard(flow.sock)
            flow.sock = None
        metrics = flow.owner.metrics
        metrics.active -= 1
        metrics.ended[outcome] += 1
        self._descriptors.give(1)
        if self._on_idle is not None and not self._count:
            self._on_idle()

    def _pop_due(self, now: float) -> Flow | None:
        """The flow idle longest, if its time is over at `now`."""
        idle = self._idle
        while idle and idle[0][0] <= now:
            when, _, flow = idle[0]
            if flow.sock is None:  # ended meanwhile
                heapq.heappop(idle)
                continue
            deadline = flow.last + self._idle_timeout
            if deadline > when:
                heapq.heapreplace(idle, (deadline, next(self._sequence), flow))
                continue
            heapq.heappop(idle)
            return flow
        return None

    def _sweep_at(self, when: float) -> None:
        self._sweeping = True
        self.poller.call_at(max(when, self.poller.clock() + SWEEP), self._sweep)

    def _sweep(self) -> None:
        now = self.poller.clock()
        while (flow := self._pop_due(now)) is not None:
            self.end(flow, Outcome.IDLE)
        if self._idle:
            self._sweep_at(self._idle[0][0])
        else:
            self._sweeping = False


class UDPSocket:
    """The proxy socket of one UDP service port."""

    def __init__(
        self,
        shared: UDPSockets,
        key: SocketKey,
        ip: str,
        port: int,
        balancer: LoadBalancer,
        metrics: ServicePortMetrics,
    ) -> None:
        self.key = key
        self.port = port
        self.balancer = balancer
        self.metrics = metrics
        self.shared = shared
        self.flows: dict[bytes, Flow] = {}
        """By the letterhead of their datagrams."""
        self.adopted = False
        """Whether other processes hold the socket as well."""
        self._awaited: set[Address] = set()
        """Ejected endpoints that a client was sent to."""
        self._ip = ip
        self._networks: Sequence[str] | None = None
        self._sock: SocketType | None = None
        """Where clients are heard, while serving."""
        self._claim: SocketType | None = None
        """What holds the port, while refusing."""

    def hold(self, sock: SocketType) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._claim = sock

    def hear(self, sock: SocketType) -> None:
        self._sock = sock
        self.shared.poller.register(sock, self, LEVEL_IN)

    def serve(self) -> None:
        if self._sock is not None:
            return
        family, prepare = self.key.family, self._prepare
        self.hear(bind(family, socket.SOCK_DGRAM, self._ip, self.port, beside_ours=True, prepare=prepare))
        if self._claim is not None:
            self._claim.close()
            self._claim = None

    def _prepare(self, sock: SocketType) -> None:
        prepare(sock)
        screen(sock, self.key.family, self._networks)

    def screen(self, networks: Sequence[str] | None) -> None:
        self._networks = networks
        if self._sock is not None:
            screen(self._sock, self.key.family, networks)

    def speak(self, proxy_protocol: ProxyProtocol) -> None:
        """Nothing: the PROXY protocol has connections in mind."""

    def refuse(self) -> None:
        if self._sock is None:
            return
        self._claim = claim(self.key.family, socket.SOCK_DGRAM, self._ip, self.port, beside_ours=True)
        self._stop_hearing()

    def _stop_hearing(self) -> None:
        sock, self._sock = self._sock, None
        if sock is not None:
            self.end_flows(Outcome.CLOSED)
            if self.adopted:
                self.shared.poller.unregister(sock)
            self.shared.poller.discard(sock)

    def admit(self, portals: Collection[Portal] | None) -> None:
        """Datagrams carry no original destination that could be asked for; whoever sends here is served."""

    def close(self) -> None:
        self._stop_hearing()
        if self._claim is not None:
            self._claim.close()
        self.shared.forget(self)

    def end_flows(self, outcome: Outcome) -> None:
        for flow in list(self.flows.values()):
            self.shared.end(flow, outcome)

    # -- datagrams

    def on_events(self, _events: int) -> None:
        """Datagrams from clients."""
        sock = self._sock
        if sock is None:
            return
        try:
            datagrams = self.shared.inbox.receive(sock)
        except BlockingIOError:
            return
        except OSError as error:
            # ICMP about a reply to some client that is gone, or no memory: it concerns no other client.
            self._drop(error)
            return
        now = self.shared.poller.clock()
        for head, payload in datagrams:
            flow = self.flows.get(head) or self._new_flow(head, now)
            if flow is not None:
                flow.last = now
                self._forward(flow, payload)

    def reply(self, outbox: Outbox) -> None:
        """Send what was put into the outbox to our clients."""
        if self._sock is None:
            outbox.count = 0
            return
        count, size = outbox.send(self._sock, self._drop)
        self.metrics.replied += count
        self.metrics.to_client += size

    def _new_flow(self, head: bytes, now: float) -> Flow | None:
        if self.shared.draining:
            return None
        if not self.shared.room():
            self.metrics.drops["no room for a flow"] += 1
            return None
        flow = Flow(self, head, now)
        self.shared.add(flow)
        return flow

    def _forward(self, flow: Flow, payload: memoryview) -> None:
        """Send a datagram to the flow's endpoint, connecting it first where it has none (left)."""
        balancer = self.balancer
        if (flow.refused or flow.generation != balancer.generation) and not self._settle(flow):
            return
        for _ in range(2):
            sock = flow.sock
            if sock is None:
                return
            try:
                sock.send(payload, _DONTWAIT)
            except ConnectionRefusedError:
                # Old news: the kernel tells of an earlier datagram and has not sent this one. It goes to another
                # endpoint if there is one, else to the same once more.
                self.note_refusal(flow, errno.ECONNREFUSED)
                if not self._settle(flow):
                    return
            except OSError as error:
                self._drop(error)
                return
            else:
                flow.received += 1
                self.metrics.received += 1
                self.metrics.to_endpoint += len(payload)
                return
        self.metrics.drops["ECONNREFUSED"] += 1

    def note_refusal(self, flow: Flow, number: int) -> None:
        """The flow's endpoint is not there: this flow looks for another, and new ones pass it over for a while."""
        flow.refused = True
        self.metrics.dial_failures[number] += 1
        self.balancer.failed(flow.endpoint)

    def _settle(self, flow: Flow) -> bool:
        """Give the flow an endpoint that exists, and is not known to refuse while there are others."""
        balancer = self.balancer
        if flow.sock is not None and not flow.refused and balancer.has(flow.endpoint):
            flow.generation = balancer.generation
            return True
        tried = (flow.endpoint,) if flow.refused else ()
        flow.refused = False
        try:
            endpoint = balancer.pick(flow.client[0], tried)
        except NoEndpoints:
            self.shared.end(flow, Outcome.NO_ENDPOINTS)
            return False
        flow.generation = balancer.generation
        if flow.sock is not None and endpoint == flow.endpoint:
            return True
        return self._connect(flow, endpoint)

    def _connect(self, flow: Flow, endpoint: Address) -> bool:
        self.metrics.dials += 1
        try:
            sock = SocketType(AF[self.key.family], socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            try:
                sock.connect(endpoint)
                self.shared.poller.register(sock, flow, LEVEL_IN)
            except OSError:
                sock.close()
                raise
        except OSError as error:
            self.metrics.dial_failures[error.errno or 0] += 1
            self._drop(error)
            self.shared.end(flow, Outcome.DIAL_FAILED)
            return False
        old, flow.sock, flow.endpoint = flow.sock, sock, endpoint
        if old is not None:
            self.shared.poller.discard(old)
        if endpoint in self.balancer.ejected:
            self._await_refusal(endpoint)
        return True

    def _await_refusal(self, endpoint: Address) -> None:
        """Have an ejected endpoint back if there is none: many never answer, and a dead one is told of by ICMP."""
        if endpoint not in self._awaited:
            self._awaited.add(endpoint)
            poller = self.shared.poller
            poller.call_at(poller.clock() + SILENCE, partial(self._unrefused, endpoint))

    def _unrefused(self, endpoint: Address) -> None:
        self._awaited.discard(endpoint)
        self.balancer.unrefused(endpoint)

    def _drop(self, error: OSError) -> None:
        self.metrics.drops[errno_name(error.errno or 0)] += 1


def prepare(sock: SocketType) -> None:
    """Have the kernel tell which address a datagram was sent to, and keep many."""
    ask_for_letterheads(sock)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)


def _describe(flow: Flow, now: float) -> Session:
    return Session(
        service_port=str(flow.owner.key.name),
        protocol=Protocol.UDP.value,
        client=join_host_port(*flow.client),
        endpoint=join_host_port(*flow.endpoint),
        state="open",
        seconds=round(now - flow.since, 3),
        to_endpoint=flow.received,
        to_client=flow.replied,
    )
