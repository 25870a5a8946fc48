"""Real TLS and real proxies: which way we get to the API server, and how often we ask."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from tests.apiserver import Manner
from tests.sources.cluster import Follower, eventually
from tests.sources.forwarders import Forwarder, HTTPForwarder, SOCKSForwarder
from tests.sources.ways import Authority, access, filled, reaches, refused, write_kubeconfig
from userspace_proxy.sources.connection import Throttle
from userspace_proxy.sources.credentials import Access

Run = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


# -- ways


@pytest.mark.parametrize("user", ["", "me"])
@pytest.mark.parametrize("kind", [HTTPForwarder, SOCKSForwarder])
def test_through_a_proxy(authority: Authority, tmp_path: Path, run: Run, kind: type[Forwarder], user: str) -> None:
    with filled(authority.server()) as api, kind(user, "secret") as proxy:
        api.tokens = {"t"}
        ca = {"certificate-authority": str(authority.certificate), "proxy-url": proxy.url}
        run(reaches(api, access(write_kubeconfig(tmp_path / "config", api.url, {"token": "t"}, **ca))))
        assert set(proxy.asked) == {api.url.removeprefix("https://")}


def test_a_socks_proxy_resolves_the_name(authority: Authority, tmp_path: Path, run: Run) -> None:
    """As for Go: it may be that only the proxy knows it."""
    with filled(authority.server(name="localhost")) as api, SOCKSForwarder() as proxy:
        ca = {"certificate-authority": str(authority.certificate), "proxy-url": proxy.url}
        url = api.url.replace("127.0.0.1", "localhost")
        run(reaches(api, access(write_kubeconfig(tmp_path / "config", url, {"token": "t"}, **ca))))
        assert set(proxy.asked) == {url.removeprefix("https://")}


@pytest.mark.parametrize("kind", [HTTPForwarder, SOCKSForwarder])
def test_a_proxy_that_refuses_is_told(
    tmp_path: Path, run: Run, kind: type[Forwarder], caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with Follower(access(config)).running():
            await eventually(lambda: "no way to the API server at https://192.0.2.1:6443" in caplog.text)

    with kind("me", "secret") as proxy:
        url = proxy.url.replace("secret", "wrong")
        config = write_kubeconfig(tmp_path / "config", "https://192.0.2.1:6443", {"token": "t"}, **{"proxy-url": url})
        run(main())


@pytest.mark.parametrize("kind", [HTTPForwarder, SOCKSForwarder])
def test_the_environment_may_name_a_proxy(
    authority: Authority, tmp_path: Path, run: Run, kind: type[Forwarder], monkeypatch: pytest.MonkeyPatch
) -> None:
    with filled(authority.server(name="api.example")) as api, kind() as proxy:
        proxy.hosts["api.example"] = "127.0.0.1"
        url = api.url.replace("127.0.0.1", "api.example")
        config = write_kubeconfig(
            tmp_path / "config", url, {"token": "t"}, **{"certificate-authority": str(authority.certificate)}
        )
        monkeypatch.setenv("HTTPS_PROXY", proxy.url.removeprefix("http://"))
        monkeypatch.setenv("NO_PROXY", "192.0.2.0/24,api.example:1")
        run(reaches(api, access(config)))
        assert set(proxy.asked) == {url.removeprefix("https://")}


@pytest.mark.parametrize(("proxy", "told"), [("http://[::1", "HTTP_PROXY: found no URL"), ("ftp://x", "'ftp://x'")])
def test_a_proxy_of_the_environment_that_is_none_is_told(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, proxy: str, told: str
) -> None:
    monkeypatch.setenv("HTTP_PROXY", proxy)
    assert told in run(refused(Access(master="http://192.0.2.1", qps=-1)))


@pytest.mark.parametrize("host", ["127.53.7.1", "[::1]", "me:secret@127.53.7.1"])
def test_a_socks_proxy_has_a_port_of_its_own(tmp_path: Path, run: Run, host: str) -> None:
    cluster = {"proxy-url": f"socks5://{host}"}
    config = write_kubeconfig(tmp_path / "config", "https://192.0.2.1", {"token": "t"}, **cluster)
    assert ":1080" in run(refused(access(config)))


def test_master_replaces_the_server_of_the_kubeconfig(authority: Authority, tmp_path: Path, run: Run) -> None:
    with filled(authority.server()) as api:
        api.tokens = {"t"}
        ca = {"certificate-authority": str(authority.certificate)}
        config = write_kubeconfig(tmp_path / "config", "https://192.0.2.1:6443", {"token": "t"}, **ca)
        run(reaches(api, Access(str(config), api.url + "/", qps=-1)))
        run(reaches(api, Access(str(config), api.url.removeprefix("https://"), qps=-1)))
    with filled() as api:
        run(reaches(api, Access(master=api.url.removeprefix("http://"), qps=-1)))
        assert all("Authorization" not in request.headers for request in api.requests)


@pytest.mark.parametrize("silent", [0, 100, 10_000])
def test_a_server_that_says_no_goodbye_does_not_hold_up_the_end(
    authority: Authority, tmp_path: Path, run: Run, silent: int
) -> None:
    """Closing uvloop waits for TLS connections that have not been told to vanish."""

    async def main() -> None:
        async with Follower(access(config)).running():
            await eventually(lambda: len(api.requests) == 3)

    with filled(authority.server()) as api:
        api.manner = lambda request: Manner(silent=silent)
        ca = {"certificate-authority": str(authority.certificate)}
        config = write_kubeconfig(tmp_path / "config", api.url, {"token": "t"}, **ca)
        run(main())


# -- the rate of requests


def test_requests_wait_for_their_token() -> None:
    now = [100.0]
    throttle = Throttle(lambda: now[0], qps=5, burst=3)
    assert [throttle.delay() for _ in range(5)] == pytest.approx([0, 0, 0, 0.2, 0.4])
    now[0] += 0.4
    assert throttle.delay() == pytest.approx(0.2)
    now[0] += 1000
    assert [throttle.delay() for _ in range(4)] == pytest.approx([0, 0, 0, 0.2]), "no more than the burst is saved up"
    unlimited = Throttle(lambda: now[0], qps=-1, burst=1)
    assert [unlimited.delay() for _ in range(100)] == [0] * 100
