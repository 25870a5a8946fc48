"""Which way leads to the API server: what its URL may be, and a proxy's, and whether the environment names a proxy.

HTTP_PROXY, HTTPS_PROXY and NO_PROXY mean what they mean to Go, and so to all other clients in a cluster: NO_PROXY knows
networks, which Python's standard library does not, and nothing on this host is ever asked for by a proxy. Here it is
decided; going there is `sources.connection`'s.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from urllib.parse import SplitResult, urlsplit

SERVER_SCHEMES = ("http", "https")
SOCKS = ("socks5", "socks5h")
PROXY_SCHEMES = ("http", "https", *SOCKS)
SOCKS_PORT = 1080
_PORTS = {"http": 80, "https": 443}


def url_problem(url: str, schemes: Sequence[str]) -> str:
    """What is wrong with a URL, or nothing. A password in it is not repeated."""
    allowed = f"allowed: {', '.join(schemes[:-1])} or {schemes[-1]}, then ://, a host and maybe a port"
    try:
        parts = urlsplit(url)
        shown = (
            url if parts.username is None else parts._replace(netloc="…@" + parts.netloc.rpartition("@")[2]).geturl()
        )
        if parts.scheme not in schemes:
            return f"found {shown!r}; {allowed}"
        if not parts.hostname or parts.query or parts.fragment or not url.isprintable() or " " in url:
            return f"found {shown!r}; {allowed}"
        parts.hostname.encode("idna")
        _ = parts.port
    except ValueError as error:  # UnicodeError is one
        return f"found no URL ({error}); {allowed}"
    return ""


def proxy_for(url: str, proxies: Mapping[str, str]) -> str:
    """The proxy's URL, or nothing. `proxies` are those of `urllib.request.getproxies`: by scheme, and `no`."""
    parts = urlsplit(url)
    proxy = proxies.get(parts.scheme, "").strip()
    if not proxy or bypasses(parts, proxies.get("no", "")):
        return ""
    return proxy if "://" in proxy else f"http://{proxy}"


def bypasses(url: SplitResult, no_proxy: str) -> bool:
    """Whether `no_proxy` has it asked directly: by `*`, host, domain, address or network, with port or without."""
    host = (url.hostname or "").rstrip(".")
    port = url.port or _PORTS.get(url.scheme, 0)
    address = _address(host)
    if host == "localhost" or (address is not None and address.is_loopback):
        return True
    return any(_matches(entry, wanted, host, address, port) for entry, wanted in _entries(no_proxy))


_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def _entries(no_proxy: str) -> Iterator[tuple[str, str]]:
    """Each with its port, which is empty where any will do."""
    for entry in no_proxy.lower().replace(",", " ").split():
        host, colon, port = entry.rpartition(":")
        if colon and port.isdigit() and (":" not in host or host.endswith("]")):
            yield host.strip("[]"), port
        else:
            yield entry.strip("[]"), ""


def _matches(entry: str, wanted: str, host: str, address: _Address | None, port: int) -> bool:
    if wanted and wanted != str(port):
        return False
    if entry == "*":
        return True
    if address is not None:
        try:
            return address in ipaddress.ip_network(entry, strict=False)
        except ValueError:
            return False
    entry = entry.removeprefix("*")
    return bool(entry.strip(".")) and (host == entry or host.endswith("." + entry.removeprefix(".")))


def _address(host: str) -> _Address | None:
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
