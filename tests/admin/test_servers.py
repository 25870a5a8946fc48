"""The life of a server: listening, trying again, ending; and what all pages have in common."""

from __future__ import annotations

import asyncio
import logging
import socket

import aiohttp
import pytest
from aiohttp import web

from tests.admin.client import Client, asking, running
from userspace_proxy.admin.servers import CONNECTIONS, AdminServer, application
from userspace_proxy.exceptions import PortError


def taken_port() -> tuple[socket.socket, int]:
    sock = socket.create_server(("127.0.0.1", 0))
    return sock, sock.getsockname()[1]


async def page(_request: web.Request) -> web.Response:
    return web.Response(text="here")


def server(ip: str = "127.0.0.1", port: int = 0, *, hard_fail: bool = False, retry: float = 0.05) -> AdminServer:
    app = application()
    app.router.add_get("/page", page)
    return AdminServer("--healthz-bind-address", (ip, port), app, hard_fail=hard_fail, retry=retry)


def test_it_tells_the_port_the_kernel_picked_and_gives_it_back(run):
    async def main():
        it = server()
        assert it.port == 0
        async with running(it):
            port = it.port
            assert port
            with pytest.raises(OSError, match="in use"):
                socket.create_server(("127.0.0.1", port))
        assert it.port == 0
        assert not it.listening.is_set()
        socket.create_server(("127.0.0.1", port)).close()

    run(main())


def test_hard_fail_names_flag_address_and_ways_out(run):
    async def main():
        sock, port = taken_port()
        with sock, pytest.raises(PortError) as caught:
            await server(port=port, hard_fail=True).run()
        return port, str(caught.value)

    port, problem = run(main())
    assert problem == (
        f"--healthz-bind-address: cannot listen on 127.0.0.1:{port}: Address already in use; end what has this "
        "address, or write another one, or --healthz-bind-address= for no such server"
    )


def test_hard_fail_on_an_address_that_is_not_ours(run):
    async def main():
        with pytest.raises(PortError, match=r"cannot listen on 192\.0\.2\.1:1: Cannot assign requested address"):
            await server("192.0.2.1", 1, hard_fail=True).run()

    run(main())


class Warnings(logging.Handler):
    """Log lines, to be waited for."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.queue: asyncio.Queue[str] = asyncio.Queue()

    def emit(self, record: logging.LogRecord) -> None:
        self.queue.put_nowait(record.getMessage())


def test_a_taken_address_is_tried_again_until_it_is_free(run):
    async def main():
        warnings = Warnings()
        logging.getLogger("userspace_proxy.admin.servers").addHandler(warnings)
        try:
            sock, port = taken_port()
            it = server(port=port)
            with sock:
                task = asyncio.create_task(it.run())
                lines = [await asyncio.wait_for(warnings.queue.get(), 10)]
                await asyncio.sleep(0.2)
                assert warnings.queue.empty(), "told at every try"
                assert not it.listening.is_set()
            await asyncio.wait_for(it.listening.wait(), 10)
            assert it.port == port
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        finally:
            logging.getLogger("userspace_proxy.admin.servers").removeHandler(warnings)
        return lines

    for line in run(main()):
        assert line.endswith("for no such server; trying again every 0.05 s")


def test_cancelled_while_it_waits_to_try_again(run):
    async def main():
        sock, port = taken_port()
        with sock:
            task = asyncio.create_task(server(port=port, retry=3600).run())
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    run(main())


def test_ending_does_not_wait_for_clients_that_keep_their_connection(run):
    async def main():
        it = server()
        async with running(it):
            reader, writer = await asyncio.open_connection("127.0.0.1", it.port)
            writer.write(b"GET /page HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"200 OK" in await reader.readline()
            silent, silent_writer = await asyncio.open_connection("127.0.0.1", it.port)
        # Both find the end of the connection, whether they had asked for something or not.
        assert (await asyncio.wait_for(reader.read(), 10)).endswith(b"here")
        assert await asyncio.wait_for(silent.read(), 10) == b""
        for each in (writer, silent_writer):
            each.close()
            await each.wait_closed()

    run(main())


@pytest.mark.parametrize(
    ("bind", "dial"), [("::", "127.0.0.1"), ("::", "::1"), ("::1", "::1"), ("0.0.0.0", "127.0.0.1")]
)
def test_addresses_of_both_families(run, bind, dial):
    async def main():
        it = server(bind)
        async with running(it), aiohttp.ClientSession() as session:
            host = f"[{dial}]" if ":" in dial else dial
            async with session.get(f"http://{host}:{it.port}/page") as response:
                assert await response.text() == "here"

    run(main())


def test_an_unknown_page_tells_the_known_ones(run):
    async def main():
        app = application()
        for path in ("/b", "/a"):
            app.router.add_get(path, page)
        async with asking(app) as ask:
            return await ask("/nothing")

    answer = run(main())
    assert answer.status == 404
    assert answer.text == "no such page; there are /a, /b\n"
    assert answer.headers["Content-Type"].startswith("text/plain")


def test_every_answer_forbids_sniffing(run, caplog):
    async def fail(_request: web.Request) -> web.Response:
        raise RuntimeError("a view that breaks")

    async def main():
        app = application()
        app.router.add_get("/broken", fail)
        async with asking(app) as ask:
            return [await ask("/nothing"), await ask("/broken", "POST"), await ask("/broken")]

    answers = run(main())
    assert [answer.status for answer in answers] == [404, 405, 500]
    assert {answer.headers["X-Content-Type-Options"] for answer in answers} == {"nosniff"}
    assert "a view that breaks" in caplog.text
    assert "a view that breaks" not in answers[2].text


def test_idle_connections_neither_pile_up_nor_keep_others_out(run):
    async def main():
        it = server()
        async with running(it), aiohttp.ClientSession() as session:
            crowd = [await asyncio.open_connection("127.0.0.1", it.port) for _ in range(CONNECTIONS + 20)]
            assert (await Client(session, it.port)("/page")).text == "here"
            # 20 made room for the others of the crowd, and one for who asked.
            ended = await asyncio.gather(*(reader.read() for reader, _ in crowd[:21]))
            assert ended == [b""] * 21
            waiting = asyncio.gather(*(reader.read() for reader, _ in crowd[21:]))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.shield(waiting), 0.1)
        assert await waiting == [b""] * (CONNECTIONS - 1)
        for _, writer in crowd:
            writer.close()
            await writer.wait_closed()

    run(main())
