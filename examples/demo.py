"""The proxy on the example manifests, with a few endpoints beside it: what `make run` runs.

The endpoints are one process: HTTP on 127.0.0.1:8081 and 8082, UDP echo on 8083 and 8084. This process then
*becomes* the proxy (exec), so that Ctrl-C, exit status and terminal are the proxy's own. Arguments are passed
on to it.

The endpoints live exactly as long as the proxy, however that ends: they read a pipe whose other end only the
proxy holds, and the kernel closes it. They have a session of their own, so that Ctrl-C reaches the proxy alone
and connections can drain.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import cast

HOST = "127.0.0.1"
HTTP_PORTS = (8081, 8082)
UDP_PORTS = (8083, 8084)
MANIFESTS = pathlib.Path(__file__).resolve().parent / "manifests"
PATIENCE = 60
"""Seconds a client of the HTTP endpoints may take for its next request."""


def main(arguments: Sequence[str]) -> None:
    start_endpoints()
    command = [sys.executable, "-m", "userspace_proxy", "--manifests", str(MANIFESTS), *arguments]
    os.execv(sys.executable, command)


def start_endpoints() -> None:
    """Start them and wait until they listen. Leaves the pipe that they live by open in this process."""
    alive, ours = os.pipe()
    os.set_inheritable(ours, True)  # through exec, into the proxy
    endpoints = subprocess.Popen(
        [sys.executable, "-I", __file__, "--endpoints", str(alive)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        pass_fds=[alive],
        start_new_session=True,
        text=True,
    )
    os.close(alive)
    assert endpoints.stdout is not None
    with endpoints.stdout as report:
        problem = report.readline().strip()
    if problem != "listening":
        endpoints.wait()
        sys.exit(problem or "demo: the endpoints did not start; the reason stands above")


async def serve_endpoints(alive: int) -> None:
    """Serve until nobody holds the other end of the pipe `alive`."""
    loop = asyncio.get_running_loop()
    gone = asyncio.Event()
    loop.add_reader(alive, gone.set)
    for port in HTTP_PORTS:
        with naming(port, "TCP"):
            await asyncio.start_server(answer_http, HOST, port)
    for port in UDP_PORTS:
        with naming(port, "UDP"):
            await loop.create_datagram_endpoint(UdpEcho, (HOST, port))
    report("listening")
    await gone.wait()


@contextlib.contextmanager
def naming(port: int, protocol: str) -> Iterator[None]:
    """Say which port it was that could not be had."""
    try:
        yield
    except OSError as error:
        option = "-ltnp" if protocol == "TCP" else "-lunp"
        report(
            f"demo: port {port}/{protocol} on {HOST} is needed for a demo endpoint but cannot be had "
            f"({os.strerror(error.errno or 0)}); find out who has it with: ss {option} 'sport = :{port}'"
        )
        sys.exit(1)


def report(line: str) -> None:
    """Tell the parent, once; from then on nothing is held that is the parent's or the terminal's."""
    print(line, flush=True)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)
    os.close(nowhere)


async def answer_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer requests without a body, one after the other."""
    port = writer.get_extra_info("sockname")[1]
    last = False
    try:
        while not last:
            async with asyncio.timeout(PATIENCE):
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            method, target, version = head.partition("\r\n")[0].split(" ")
            last = version != "HTTP/1.1" or "\r\nconnection: close\r\n" in head.lower()
            body = f"hello from endpoint {port}: {method} {target}\n".encode()
            lines = ["HTTP/1.1 200 OK", "Content-Type: text/plain; charset=utf-8", f"Content-Length: {len(body)}"]
            if last:
                lines.append("Connection: close")
            writer.write("\r\n".join([*lines, "", ""]).encode() + (b"" if method == "HEAD" else body))
            await writer.drain()
    except (TimeoutError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
        pass  # it has had enough, speaks no HTTP, or is gone
    finally:
        writer.close()


class UdpEcho(asyncio.DatagramProtocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.DatagramTransport", transport)
        self.greeting = b"endpoint %d: " % transport.get_extra_info("sockname")[1]

    def datagram_received(self, data: bytes, address: tuple[str, int]) -> None:
        self.transport.sendto((self.greeting + data)[:65507], address)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--endpoints"]:
        asyncio.run(serve_endpoints(int(sys.argv[2])))
    else:
        main(sys.argv[1:])
