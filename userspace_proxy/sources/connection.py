"""The way to the API server: connections to it, through proxies where need be, and the rate of requests.

Bytes come out, unread. Requests go over aiohttp, on which kubernetes_asyncio is built. Its models are left alone: they
cost many times the CPU and memory of reading JSON (`sources.answers`). So is its REST client: it knows no SOCKS proxies
and gives no hold of its connections. Who we are to the server is told in `sources.credentials`.

Files with credentials are rotated under us (a service account's token each hour, kubelet's certificates), so each
request looks whether one has changed, and after a 401 all are read anew. Watches that run go on with what they have.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import aiohttp_socks

from userspace_proxy import __version__
from userspace_proxy.exceptions import APIError, UserspaceProxyError
from userspace_proxy.sources import credentials
from userspace_proxy.sources.credentials import Access, Credentials
from userspace_proxy.sources.ways import SOCKS, SOCKS_PORT

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT = 10.0
KEPT = 64
"""Connections that are aborted at the end; there are three at a time, and those before them are long gone."""
_OTHERS = (
    aiohttp_socks.ProxyConnectionError,
    aiohttp_socks.ProxyError,
    aiohttp_socks.ProxyTimeoutError,
    ValueError,  # a URL, a name or a header that shows only with a request to be none
)
"""Raised by a request that comes to nothing, and no ClientError."""


class Throttle:
    """A bucket of `burst` tokens that fills by `qps` a second. No I/O: it says how long to wait."""

    def __init__(self, clock: Callable[[], float], qps: float, burst: int) -> None:
        self._clock = clock
        self._qps, self._burst = qps, max(1, burst)
        self._tokens = float(self._burst)
        self._last = clock()

    def delay(self) -> float:
        """Take a token, on credit if need be; the seconds until it is really there."""
        if self._qps < 0:
            return 0.0
        now = self._clock()
        self._tokens = min(float(self._burst), self._tokens + (now - self._last) * self._qps) - 1
        self._last = now
        return max(0.0, -self._tokens / self._qps)


class _Connector(aiohttp.TCPConnector):
    """Knows its transports, to the last. aiohttp takes leave of TLS peers with a goodbye and forgets them; of one that
    does not answer it, uvloop's closing would wait for ever.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._transports: deque[asyncio.Transport] = deque(maxlen=KEPT)

    async def _wrap_create_connection(self, *args: Any, **settings: Any) -> Any:
        transport, protocol = await super()._wrap_create_connection(*args, **settings)
        self._transports.append(transport)
        return transport, protocol

    def abort(self) -> None:
        for transport in self._transports:
            with suppress(AttributeError):  # of one whose TLS is over already, on Python 3.11.2
                transport.abort()


class _SOCKSConnector(_Connector, aiohttp_socks.ProxyConnector):
    """The same through a proxy of a kind that aiohttp does not know."""


class _Client:
    """One set of credentials in use; it closes when it is retired and its last request has ended."""

    def __init__(self, known: Credentials) -> None:
        self.known = known
        self._requests = 0
        self._retired = False
        self._over_socks = known.proxy.startswith(SOCKS)
        connector: Any
        if self._over_socks:
            # The proxy resolves names, as with Go: it may be that nobody else can.
            url = urlsplit(known.proxy)
            netloc = url.netloc if url.port else f"{url.netloc.rstrip(':')}:{SOCKS_PORT}"
            url = url._replace(scheme="socks5", netloc=netloc)
            connector = _SOCKSConnector.from_url(url.geturl(), ssl=known.tls, rdns=True)
        else:
            connector = _Connector(ssl=known.tls)
        self._connector: _Connector = connector
        # What aiohttp makes of the environment is not asked for: it would add what ~/.netrc has for the host.
        self._session = aiohttp.ClientSession(connector=connector, trust_env=False, read_bufsize=2**21)

    @asynccontextmanager
    async def ask(
        self, path: str, query: Mapping[str, str], content: object, timeout: aiohttp.ClientTimeout
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        self._requests += 1
        try:
            response = await self._begin(path, query, content, timeout)
            try:
                yield response
            finally:
                if response.connection is not None and response.connection.transport is not None:
                    response.connection.transport.abort()  # it is not at its end
                response.close()
        finally:
            self._requests -= 1
            if self._retired and not self._requests:
                await self._session.close()

    async def retire(self) -> None:
        """No request will come after those that are under way."""
        self._retired = True
        if not self._requests:
            await self._session.close()

    async def end(self) -> None:
        """Break off what is under way."""
        self._connector.abort()
        await self._session.close()

    async def _begin(
        self, path: str, query: Mapping[str, str], content: object, timeout: aiohttp.ClientTimeout
    ) -> aiohttp.ClientResponse:
        known = self.known
        headers = {"Accept": "application/json", "User-Agent": f"userspace-proxy/{__version__}"}
        if known.authorization:
            headers["Authorization"] = known.authorization
        try:
            return await self._session.request(
                "GET" if content is None else "POST",
                known.url + path,
                params=query,
                json=content,
                headers=headers,
                proxy=known.proxy if known.proxy and not self._over_socks else None,
                server_hostname=known.server_name,
                timeout=timeout,
            )
        except _OTHERS as error:
            raise aiohttp.ClientError(str(error)) from error


class Connection:
    """Requests to one API server. `stall` is how long it may send nothing at all, in seconds."""

    def __init__(self, access: Access, clock: Callable[[], float], *, stall: float) -> None:
        self._access = access
        self._throttle = Throttle(clock, access.qps, access.burst)
        self._timeout = aiohttp.ClientTimeout(connect=CONNECT_TIMEOUT, sock_connect=CONNECT_TIMEOUT, sock_read=stall)
        self._client: _Client | None = None
        self._clients: weakref.WeakSet[_Client] = weakref.WeakSet()
        """Those that are retired, too, while they are still in use."""
        self._loading = asyncio.Lock()
        self._rejected: _Client | None = None

    def check(self) -> str:
        """The URL of the API server, as it is configured now. Raises ConfigError for what no waiting will mend."""
        return credentials.check(self._access)

    @asynccontextmanager
    async def request(
        self, path: str, query: Mapping[str, str], content: object = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer to a GET, or to a POST of `content`; its body is not yet read.

        Raises APIError where none comes or it breaks off.
        """
        client = await self._load()
        url = client.known.url
        await asyncio.sleep(self._throttle.delay())
        try:
            async with client.ask(path, query, content, self._timeout) as response:
                if response.status == 401:
                    self._rejected = client
                yield response
        except TimeoutError as error:
            raise APIError(f"no byte from the API server at {url} for too long: {_words(error)}") from None
        except (aiohttp.ClientError, OSError) as error:
            if isinstance(error, ssl.SSLError | aiohttp.ClientSSLError):
                self._rejected = client  # a certificate that was replaced, maybe
            raise APIError(f"no way to the API server at {url}: {_words(error)}") from None

    async def close(self) -> None:
        for client in self._clients:
            await client.end()

    async def _load(self) -> _Client:
        async with self._loading:
            client = self._client
            if client is None or client is self._rejected or client.known.is_outdated:
                self._client = client = await self._renew(client)
                self._clients.add(client)
            return client

    async def _renew(self, client: _Client | None) -> _Client:
        try:
            renewed = _Client(await credentials.load(self._access))
        except Exception as error:  # made of text that somebody may have half written, and no text may end us
            whose = self._access.kubeconfig or "this pod's service account"
            raise APIError(f"the credentials of {whose} cannot be loaded: {_words(error)}") from error
        if client is not None:
            logger.info("the credentials for the API server were read anew")
            await client.retire()
        return renewed


def _words(error: Exception) -> str:
    words = "; ".join(line for line in map(str.strip, str(error).splitlines()) if line)
    if words and isinstance(error, UserspaceProxyError | OSError | aiohttp.ClientError):
        return words
    return f"{type(error).__name__}{words and f': {words}'}"
