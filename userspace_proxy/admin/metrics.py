"""What people and monitoring ask: /metrics, /services, /connections, /configz, /proxyMode.

The pages show what they are given and decide nothing. Who has which rights is decided by where the server
listens: there are no passwords, and /connections tells who talks to whom.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from userspace_proxy.admin.servers import application

Rows = Iterable[Mapping[str, object]]
SLICE = 50
"""Rows that are made and written between two turns of the data path."""


@dataclass(frozen=True, slots=True)
class Views:
    """Where the pages come from, each called once an answer, on the event loop. Some have to ask other processes."""

    metrics: Callable[[], Awaitable[tuple[bytes, str]]]
    """The text for Prometheus, and its content type."""
    configz: Callable[[], Mapping[str, object]]
    services: Callable[[], Rows]
    """Each service port: its portals, proxy ports, endpoints, state and error."""
    connections: Callable[[], Awaitable[Rows]]
    """Each connection and flow that is open."""

    def app(self) -> web.Application:
        app = application()
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/services", self._services)
        app.router.add_get("/connections", self._connections)
        app.router.add_get("/configz", self._configz)
        app.router.add_get("/proxyMode", _text("userspace"))
        app.router.add_route("*", "/healthz", _text("ok"))
        app.router.add_route("*", "/healthz/ping", _text("ok"))
        return app

    async def _metrics(self, _request: web.Request) -> web.Response:
        body, content_type = await self.metrics()
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def _services(self, _request: web.Request) -> web.Response:
        return await _as_json(self.services())

    async def _connections(self, _request: web.Request) -> web.Response:
        return await _as_json(await self.connections())

    async def _configz(self, _request: web.Request) -> web.Response:
        return web.Response(body=msgspec.json.encode(self.configz()) + b"\n", content_type="application/json")


async def _as_json(rows: Rows) -> web.Response:
    """In turns with the data path: there may be thousands."""
    written = []
    for number, row in enumerate(rows, 1):
        written.append(msgspec.json.encode(row))
        if number % SLICE == 0:
            await asyncio.sleep(0)
    return web.Response(body=b"[" + b",".join(written) + b"]\n", content_type="application/json")


def _text(text: str) -> Handler:
    async def answer(_request: web.Request) -> web.Response:
        return web.Response(text=text)

    return answer
