"""Which way leads to the API server: as Go's clients find it."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest

from userspace_proxy.sources.ways import PROXY_SCHEMES, SERVER_SCHEMES, bypasses, proxy_for, url_problem


@pytest.mark.parametrize(
    "url",
    ["https://10.0.0.1", "http://api.example:6443/cluster/a", "https://[fd00::1]:6443", "https://[fe80::1%25eth0]"],
)
def test_urls_of_servers(url: str) -> None:
    assert not url_problem(url, SERVER_SCHEMES)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "192.0.2.1",
        "192.0.2.1:6443",
        "ftp://x",
        "socks5://x",
        "https://",
        "https://:6443",
        "https://[::1",
        "https://x:99999",
        "https://x:port",
        "https://x?a=b",
        "https://x#a",
        "https://x y",
        "https://x\n",
        f"https://{'a' * 70}.example",
        "https://a..b",
    ],
)
def test_what_is_no_url_of_a_server(url: str) -> None:
    assert "allowed: http or https, then ://, a host" in url_problem(url, SERVER_SCHEMES)


def test_passwords_are_not_repeated() -> None:
    told = url_problem("ftp://me:secret@proxy:1", PROXY_SCHEMES)
    assert "found 'ftp://…@proxy:1'" in told
    assert "secret" not in told


@pytest.mark.parametrize(
    ("no_proxy", "host"),
    [
        ("*", "api.example"),
        ("a, api.example ,b", "api.example"),
        ("example", "api.example"),
        (".example", "api.example"),
        ("*.example", "api.example"),
        ("API.Example", "api.example."),
        ("api.example:443", "api.example"),
        ("10.0.0.1", "10.0.0.1"),
        ("10.0.0.1:443", "10.0.0.1"),
        ("192.168.0.0/16,10.96.0.0/12", "10.96.0.1"),
        ("10.96.0.1/12", "10.97.0.1"),
        ("fd00::/8", "[fd00::1]"),
        ("fd00::1", "[fd00::1]"),
        ("[fd00::1]", "[fd00::1]"),
        ("[fd00::1]:443", "[fd00::1]"),
        ("", "localhost"),
        ("", "127.0.0.1"),
        ("", "[::1]"),
    ],
)
def test_what_is_asked_for_directly(no_proxy: str, host: str) -> None:
    assert bypasses(urlsplit(f"https://{host}"), no_proxy)
    assert not proxy_for(f"https://{host}", {"https": "http://proxy", "no": no_proxy})


@pytest.mark.parametrize(
    ("no_proxy", "host"),
    [
        ("", "api.example"),
        (",, .", "api.example"),
        (".api.example", "api.example"),
        ("pi.example", "api.example"),
        ("api.example:6443", "api.example"),
        ("10.0.0.0/8", "api.example"),
        ("10.0.0.0/8", "11.0.0.1"),
        ("10.0.0.0/8:6443", "10.0.0.1"),
        ("10.0.0.0/99", "10.0.0.1"),
        ("0.0.1", "10.0.0.1"),
        ("0.0.0.0/0", "[fd00::1]"),
        ("fd00::1:443", "[fd00::1]"),
    ],
)
def test_what_is_not(no_proxy: str, host: str) -> None:
    assert not bypasses(urlsplit(f"https://{host}"), no_proxy)


def test_the_proxy_is_the_one_for_the_scheme() -> None:
    proxies = {"http": "http://one:1", "https": "two:2"}
    assert proxy_for("http://api.example", proxies) == "http://one:1"
    assert proxy_for("https://api.example", proxies) == "http://two:2"
    assert not proxy_for("https://api.example", {"http": "http://one:1", "all": "http://three:3"})
