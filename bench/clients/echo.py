"""Send every datagram back: the endpoint of UDP loads. `python -m bench.clients.echo PORT`"""

from __future__ import annotations

import socket
import sys


def main(port: int) -> None:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    sock.bind(("127.0.0.1", port))
    buffer = bytearray(65536)
    view = memoryview(buffer)
    while True:
        try:
            size, client = sock.recvfrom_into(buffer)
            sock.sendto(view[:size], client)
        except ConnectionRefusedError:
            pass  # about a client that is gone


if __name__ == "__main__":
    main(int(sys.argv[1]))
