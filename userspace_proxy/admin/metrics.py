"""What people and monitoring ask: /metrics, /services, /connections, /configz, /proxyMode.

The pages show what they are given and decide nothing. Who has which rights is decided by where the server
listens: there are no passwords, and /connections tells who talks to whom.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from userspace_proxy.admin.servers import application

Rows = Sequence[Mapping[str, object]]


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
        app.router.add_get("/services", _json(self.services))
        app.router.add_get("/connections", self._connections)
        app.router.add_get("/configz", _json(self.configz))
        app.router.add_get("/proxyMode", _text("userspace"))
        app.router.add_route("*", "/healthz", _text("ok"))
        return app

    async def _metrics(self, _request: web.Request) -> web.Response:
        body, content_type = await self.metrics()
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def _connections(self, _request: web.Request) -> web.Response:
        return _as_json(await self.connections())


def _json(view: Callable[[], object]) -> Handler:
    async def answer(_request: web.Request) -> web.Response:
        return _as_json(view())

    return answer


def _as_json(content: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(content) + b"\n", content_type="application/json")


def _text(text: str) -> Handler:
    async def answer(_request: web.Request) -> web.Response:
        return web.Response(text=text)

    return answer
