"""An HTTP server for operators: its listening socket, its life, and the manners all of them share.

Here is what does not depend on the pages: listening (again and again where the address is not free yet),
ending without waiting for idle clients, and answers that browsers do not guess about. The pages are in
`health` (for probes) and `metrics` (for people and monitoring). What they show comes in as callables:
nothing here knows the proxier or a socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable

from aiohttp import web
from aiohttp.typedefs import Handler

from userspace_proxy.exceptions import PortError
from userspace_proxy.model import join_host_port

logger = logging.getLogger(__name__)

BACKLOG = 64
RETRY = 5.0
"""Seconds between two tries to listen, kube-proxy's."""
CONNECTIONS = 64
"""At most, of an application. The address may be everybody's, and descriptors are wanted for the services' clients."""
GRACE = 1.0
"""Seconds that answers on their way have when the server ends."""


class Listener:
    """One address, and whoever connects to it.

    `flag` names the flag that set the address, for messages, which close with `advice`. With `hard_fail` an address
    that cannot be listened on ends `accept`; otherwise `failed` is told and it is tried again every `retry` seconds,
    for as long as `accept` runs.
    """

    def __init__(
        self,
        flag: str,
        address: tuple[str, int],
        *,
        hard_fail: bool,
        retry: float = RETRY,
        advice: str = "",
        failed: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._advice = advice or f"end what has this address, or write another one, or {flag}= for no such server"
        self._failed = failed
        self._flag = flag
        self._ip, self._port = address
        self._hard_fail = hard_fail
        self._retry = retry
        self.port = 0
        """The port listened on, whichever the kernel picked; 0 while there is none."""
        self.listening = asyncio.Event()

    async def accept(self, server: web.Server) -> None:
        """Have `server` answer until cancelled. Raises PortError where the address cannot be had and has to be."""
        try:
            sock = await self._listen()
            accepting = await asyncio.get_running_loop().create_server(_with_room(server), sock=sock)
            self.port = sock.getsockname()[1]
            self.listening.set()
            logger.info("%s: serving on http://%s", self._flag, join_host_port(self._ip, self.port))
            with contextlib.closing(accepting):
                await asyncio.get_running_loop().create_future()
        finally:
            self.listening.clear()
            self.port = 0

    async def _listen(self) -> socket.socket:
        told = ""
        while True:
            try:
                return listen(self._ip, self._port)
            except OSError as error:
                reason = os.strerror(error.errno) if error.errno else str(error)  # create_server adds the address
                where = join_host_port(self._ip, self._port)
                problem = f"{self._flag}: cannot listen on {where}: {reason}; {self._advice}"
                if self._hard_fail:
                    raise PortError(problem) from error
                if problem != told:
                    told = problem
                    logger.warning("%s; trying again every %g s", problem, self._retry)
                    self._failed(problem)
            await asyncio.sleep(self._retry)


class AdminServer(Listener):
    """One address, one application."""

    def __init__(
        self,
        flag: str,
        address: tuple[str, int],
        app: web.Application,
        *,
        hard_fail: bool,
        retry: float = RETRY,
        failed: Callable[[str], None] = lambda _: None,
    ) -> None:
        super().__init__(flag, address, hard_fail=hard_fail, retry=retry, failed=failed)
        self._app = app

    async def run(self) -> None:
        """Serve until cancelled. Raises PortError if the address cannot be had and that is to be an error."""
        async with answering(self._app) as server:
            await self.accept(server)


@contextlib.asynccontextmanager
async def answering(app: web.Application) -> AsyncIterator[web.Server]:
    """What answers for an application, wherever clients are taken. At the end it waits for no idle ones."""
    runner = web.AppRunner(app, access_log=None, keepalive_timeout=30, handle_signals=False, shutdown_timeout=GRACE)
    await runner.setup()
    assert runner.server is not None
    try:
        yield runner.server
    finally:
        await runner.cleanup()


def _with_room(server: web.Server) -> Callable[[], asyncio.Protocol]:
    """Connections of a server that ends the oldest where there would be too many.

    Were it the newest, whoever holds connections open without asking would keep the probes out.
    """

    def connection() -> asyncio.Protocol:
        living = [other for other in server.connections if other.transport is not None]
        for other in living[: max(0, len(living) - CONNECTIONS + 1)]:
            other.force_close()
        return server()

    return connection


def listen(ip: str, port: int) -> socket.socket:
    """A listening socket; on `::` it takes IPv4 too, as Go's servers do and the event loops' own do not."""
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    both = ip == "::" and socket.has_dualstack_ipv6()
    sock = socket.create_server((ip, port), family=family, backlog=BACKLOG, dualstack_ipv6=both)
    sock.setblocking(False)
    return sock


def application() -> web.Application:
    """Without pages yet. Answers carry `nosniff`, and who asks for a page that is not there is told those that are."""

    @web.middleware
    async def tell_the_pages(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except web.HTTPNotFound:
            pages = sorted({resource.canonical for resource in app.router.resources()})
            return web.Response(status=404, text=f"no such page; there are {', '.join(pages)}\n")

    async def no_sniffing(_request: web.Request, response: web.StreamResponse) -> None:
        response.headers["X-Content-Type-Options"] = "nosniff"

    app = web.Application(middlewares=[tell_the_pages])
    app.on_response_prepare.append(no_sniffing)
    return app
