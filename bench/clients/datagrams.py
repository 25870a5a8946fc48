"""Datagrams to something that sends them back: `python -m bench.clients.datagrams --help`.

With `--rate`, so many a second, whatever comes back; without, a new one for each answer, `--window` under way.
With `--new-flows` each goes from a port of its own, else the flows take turns. What was done is printed as
one line of JSON; latencies are in microseconds.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import select
import socket
import struct
import time

LOST = 0.5
"""Seconds after which nothing is waited for."""


class Flows:
    """Sockets connected to the address, and what is under way on them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.address = (options.ip, options.port)
        self.size = options.size
        self.poller = select.epoll()
        self.sockets: dict[int, socket.socket] = {}
        self.sent_at: dict[int, float] = {}
        self.sent = self.answered = self.lost = 0
        self.latencies: list[float] = []
        self.began = 0.0
        self._padding = bytes(self.size - 8)

    def open(self) -> int:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        sock.connect(self.address)
        self.poller.register(sock, select.EPOLLIN)
        self.sockets[sock.fileno()] = sock
        return sock.fileno()

    def close(self, flow: int) -> None:
        self.sockets.pop(flow).close()

    def send(self, flow: int) -> None:
        now = time.perf_counter()
        self.sent_at[flow] = now
        self.sent += 1
        with contextlib.suppress(OSError):  # refused, no room, conntrack full: it will be missed
            self.sockets[flow].send(struct.pack("d", now) + self._padding)

    def receive(self, flow: int) -> bool:
        """An answer to what was sent last; one to anything before it is too late."""
        try:
            answer = self.sockets[flow].recv(self.size + 1)
        except (BlockingIOError, ConnectionRefusedError):
            return False
        (at,) = struct.unpack_from("d", answer)
        if len(answer) != self.size or self.sent_at.get(flow) != at:
            return False
        del self.sent_at[flow]
        self.answered += 1
        self.latencies.append(time.perf_counter() - at)
        return True

    def give_up(self, before: float) -> list[int]:
        late = [flow for flow, at in self.sent_at.items() if at < before]
        for flow in late:
            del self.sent_at[flow]
        self.lost += len(late)
        return late


def ping_pong(flows: Flows, options: argparse.Namespace) -> None:
    """Each flow in its turn, a datagram for each answer."""
    idle = collections.deque(flows.open() for _ in range(options.flows))
    flows.began = time.perf_counter()
    end = flows.began + options.seconds
    for _ in range(min(options.window, options.flows)):
        flows.send(idle.popleft())
    next_look = 0.0
    while (now := time.perf_counter()) < end:
        for flow, _ in flows.poller.poll(LOST / 10, 64):
            if flows.receive(flow):
                idle.append(flow)
                flows.send(idle.popleft())
        if now > next_look:
            next_look = now + LOST / 2
            for flow in flows.give_up(now - LOST):
                idle.append(flow)
                flows.send(idle.popleft())


def new_flows(flows: Flows, options: argparse.Namespace) -> None:
    """Each datagram from a port of its own, which is closed with the answer."""
    flows.began = time.perf_counter()
    end = flows.began + options.seconds
    for _ in range(options.window):
        flows.send(flows.open())
    next_look = 0.0
    while (now := time.perf_counter()) < end:
        done = [flow for flow, _ in flows.poller.poll(LOST / 10, 64) if flows.receive(flow)]
        if now > next_look:
            next_look = now + LOST / 2
            done += flows.give_up(now - LOST)
        for flow in done:
            flows.close(flow)
            flows.send(flows.open())


def steadily(flows: Flows, options: argparse.Namespace) -> None:
    """At a fixed rate, over the flows in turn, without waiting; what is missing at the end is lost."""
    turn = collections.deque(flows.open() for _ in range(options.flows))
    sockets, payload = flows.sockets, bytes(flows.size)
    flows.began = time.perf_counter()
    while (elapsed := time.perf_counter() - flows.began) < options.seconds + LOST:
        due = int(min(elapsed, options.seconds) * options.rate)
        while flows.sent < due:
            sockets[turn[0]].send(payload)
            flows.sent += 1
            turn.rotate(-1)
        for flow, _ in flows.poller.poll(0.001, 64):
            try:
                while sockets[flow].recv(flows.size + 1):
                    flows.answered += 1
            except BlockingIOError:
                pass
        if flows.answered == int(options.seconds * options.rate):
            break
    flows.lost = flows.sent - flows.answered


def main() -> None:
    parser = argparse.ArgumentParser(description="Send datagrams to something that sends them back.")
    parser.add_argument("ip")
    parser.add_argument("port", type=int)
    parser.add_argument("--size", type=int, default=64, help="bytes, at least 8")
    parser.add_argument("--flows", type=int, default=16)
    parser.add_argument("--window", type=int, default=64, help="datagrams under way at most")
    parser.add_argument("--seconds", type=float, default=1)
    parser.add_argument("--new-flows", action="store_true")
    parser.add_argument("--rate", type=int, help="datagrams a second")
    options = parser.parse_args()
    flows = Flows(options)
    run = steadily if options.rate else new_flows if options.new_flows else ping_pong
    run(flows, options)
    seconds = time.perf_counter() - flows.began
    ordered = sorted(flows.latencies) or [0.0]
    told = {f"p{percent:g}": ordered[int(len(ordered) * percent / 100)] * 1e6 for percent in (50, 99, 99.9)}
    print(json.dumps({"seconds": seconds, "sent": flows.sent, "answered": flows.answered, "lost": flows.lost, **told}))


if __name__ == "__main__":
    main()
