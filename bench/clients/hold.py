"""Open connections and keep them: `python -m bench.clients.hold IP PORT`, told on stdin how many.

For each number on stdin so many connections are there once the answer, a line of JSON, is printed: each has
had one small HTTP request answered, so that it is known to go all the way, and has been idle since. `seconds` is
how long that took. They are closed at the end of stdin.
"""

from __future__ import annotations

import json
import select
import socket
import sys
import time

WINDOW = 128
"""On their way at a time."""
REQUEST = b"GET / HTTP/1.1\r\nHost: bench\r\n\r\n"
PATIENCE = 10.0


def main(ip: str, port: int) -> None:
    held: list[socket.socket] = []
    for line in sys.stdin:
        started = time.monotonic()
        _open(held, (ip, port), int(line))
        print(json.dumps({"seconds": time.monotonic() - started, "connections": len(held)}), flush=True)


def _open(held: list[socket.socket], address: tuple[str, int], count: int) -> None:
    poller = select.epoll()
    waiting: dict[int, socket.socket] = {}
    while len(held) < count:
        while len(waiting) < min(WINDOW, count - len(held)):
            sock = socket.create_connection(address, timeout=PATIENCE)
            sock.sendall(REQUEST)
            poller.register(sock, select.EPOLLIN)
            waiting[sock.fileno()] = sock
        events = poller.poll(PATIENCE)
        if not events:
            sys.exit(f"{len(waiting)} connections were not answered within {PATIENCE:g} s, {len(held)} were")
        for number, _ in events:
            sock = waiting.pop(number)
            if not sock.recv(4096):
                sys.exit(f"connection {len(held) + 1} was closed")
            poller.unregister(sock)
            held.append(sock)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
