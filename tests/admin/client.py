"""A server run on loopback, and questions asked of it over real HTTP."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

import aiohttp
from aiohttp import web

from userspace_proxy.admin.servers import AdminServer


@dataclass(frozen=True)
class Answer:
    status: int
    text: str
    headers: dict[str, str]


class Client:
    def __init__(self, session: aiohttp.ClientSession, port: int) -> None:
        self.session = session
        self.port = port

    async def __call__(self, path: str, method: str = "GET") -> Answer:
        async with self.session.request(method, f"http://127.0.0.1:{self.port}{path}") as response:
            return Answer(response.status, await response.text(), dict(response.headers))


@contextlib.asynccontextmanager
async def running(server: AdminServer) -> AsyncIterator[None]:
    """Run it in the background; leaving ends it and sees it ended."""
    task = asyncio.create_task(server.run())
    listening = asyncio.create_task(server.listening.wait())
    try:
        await asyncio.wait({task, listening}, timeout=10, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task
        assert server.listening.is_set()
        yield
    finally:
        listening.cancel()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@contextlib.asynccontextmanager
async def asking(app: web.Application) -> AsyncIterator[Client]:
    server = AdminServer("--test-bind-address", ("127.0.0.1", 0), app, hard_fail=True)
    async with running(server), aiohttp.ClientSession() as session:
        yield Client(session, server.port)
