"""An endpoint for tests: answers every message over TCP and UDP with its name and the message, or who asks.

    python endpoint.py NAME PORT [SECONDS]

SECONDS is how long it thinks before it answers a datagram.
"""

import socket
import sys
import threading
import time

WHO = b"who?"


def stream(client: socket.socket, name: bytes) -> None:
    with client:
        while message := client.recv(65536):
            if message == WHO:
                message = client.getpeername()[0].removeprefix("::ffff:").encode()
            client.sendall(name + b":" + message)


def datagrams(family: int, port: int, name: bytes, delay: float) -> None:
    sock = socket.socket(family, socket.SOCK_DGRAM)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    sock.bind(("", port))
    while True:
        message, client = sock.recvfrom(65535)
        time.sleep(delay)
        sock.sendto((name + b":" + message)[:65507], client)


def main() -> None:
    name, port = sys.argv[1].encode(), int(sys.argv[2])
    delay = float(sys.argv[3]) if len(sys.argv) > 3 else 0.0
    for family in (socket.AF_INET, socket.AF_INET6):
        threading.Thread(target=datagrams, args=(family, port, name, delay), daemon=True).start()
    with socket.create_server(("", port), family=socket.AF_INET6, backlog=512, dualstack_ipv6=True) as server:
        while True:
            client, _ = server.accept()
            threading.Thread(target=stream, args=(client, name), daemon=True).start()


main()
