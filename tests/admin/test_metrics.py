"""The pages for people and monitoring, over real HTTP."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.admin.client import asking
from userspace_proxy.admin.metrics import SLICE, Views
from userspace_proxy.config import Config
from userspace_proxy.model import Endpoint, IPFamily, Portal, PortalKind, Protocol

TEXT = '# HELP x An example.\nx{a="ü"} 1.0\n'
PORTAL = Portal(IPFamily.IPV6, Protocol.TCP, "fd00::1", 80, PortalKind.CLUSTER_IP)


async def exposition():
    return TEXT.encode(), "text/plain; version=1.0.0; charset=utf-8"


async def no_connections():
    return []


VIEWS = Views(
    metrics=exposition,
    configz=Config().configz,
    services=lambda: [
        {"servicePort": "default/web:http", "portals": [str(PORTAL)], "endpoints": [Endpoint("127.0.0.1", 8081)]}
    ],
    connections=no_connections,
)


def ask(run, path, method="GET"):
    async def main():
        async with asking(VIEWS.app()) as client:
            return await client(path, method)

    return run(main())


def test_metrics_keep_their_content_type(run):
    answer = ask(run, "/metrics")
    assert (answer.status, answer.text) == (200, TEXT)
    assert answer.headers["Content-Type"] == "text/plain; version=1.0.0; charset=utf-8"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_proxy_mode_has_no_newline(run):
    answer = ask(run, "/proxyMode")
    assert (answer.status, answer.text) == (200, "userspace")
    assert answer.headers["Content-Type"].startswith("text/plain")


def test_configz(run):
    answer = ask(run, "/configz")
    assert answer.headers["Content-Type"] == "application/json"
    assert json.loads(answer.text) == Config().configz()


def test_services_may_hold_the_nouns_of_the_model(run):
    (service,) = json.loads(ask(run, "/services").text)
    assert service["portals"] == ["ClusterIP [fd00::1]:80/TCP"]
    [endpoint] = service["endpoints"]
    assert endpoint.items() >= {"ip": "127.0.0.1", "port": 8081, "ready": True, "terminating": False}.items()


def test_many_rows_leave_the_loop_its_turns(run):
    made = []
    seen = set()

    def rows():
        for number in range(10 * SLICE):
            made.append(number)
            yield {"number": number}

    async def look():
        while True:
            seen.add(len(made))
            await asyncio.sleep(0)

    async def main():
        views = Views(VIEWS.metrics, VIEWS.configz, rows, VIEWS.connections)
        async with asking(views.app()) as client:
            looking = asyncio.create_task(look())
            answer = await client("/services", "GET")
            looking.cancel()
            return answer

    assert json.loads(run(main()).text) == [{"number": number} for number in range(10 * SLICE)]
    assert seen >= {n * SLICE for n in range(10)}


def test_connections(run):
    answer = ask(run, "/connections")
    assert (answer.status, answer.text) == (200, "[]\n")


def test_views_are_asked_each_time(run):
    count = iter(range(10))

    async def connections():
        return [{"n": next(count)}]

    async def main():
        views = Views(VIEWS.metrics, VIEWS.configz, VIEWS.services, connections)
        async with asking(views.app()) as client:
            return [json.loads((await client("/connections")).text) for _ in range(2)]

    assert run(main()) == [[{"n": 0}], [{"n": 1}]]


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT"])
def test_healthz_of_its_own_answers_any_method(run, method):
    assert ask(run, "/healthz/ping", method).status == 200
    answer = ask(run, "/healthz", method)
    assert (answer.status, answer.text) == (200, "" if method == "HEAD" else "ok")


@pytest.mark.parametrize("path", ["/metrics", "/services", "/connections", "/configz", "/proxyMode"])
def test_the_other_pages_are_read_only(run, path):
    assert ask(run, path, "HEAD").status == 200
    answer = ask(run, path, "POST")
    assert (answer.status, answer.headers["Allow"]) == (405, "GET,HEAD")


def test_other_pages(run):
    answer = ask(run, "/readyz")
    assert answer.status == 404
    assert answer.text == (
        "no such page; there are /configz, /connections, /healthz, /healthz/ping, /metrics, /proxyMode, /services\n"
    )
