"""The way to the API server: who we are to it, TLS, proxies, the rate of requests. Bytes come out, unread.

Credentials are loaded by kubernetes_asyncio from a kubeconfig (contexts, client certificates, tokens, exec plugins,
basic auth, OIDC), or in a pod from its service account; requests go over aiohttp, on which it is built. Its models are
left alone: they cost many times the CPU and memory of reading JSON (`sources.answers`). So is its REST client: it knows
no SOCKS proxies and gives no hold of its connections.

Files with credentials are rotated under us (a service account's token each hour, kubelet's certificates), so each
request looks whether one has changed, and after a 401 all are read anew. Watches that run go on with what they have.
"""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import aiohttp_socks
from kubernetes_asyncio.client import Configuration
from kubernetes_asyncio.config import ConfigException
from kubernetes_asyncio.config.incluster_config import InClusterConfigLoader
from kubernetes_asyncio.config.kube_config import load_kube_config

from userspace_proxy import __version__
from userspace_proxy.exceptions import APIError, ConfigError
from userspace_proxy.files import open_regular
from userspace_proxy.model import join_host_port
from userspace_proxy.sources.documents import SyntaxProblem, read_yaml

logger = logging.getLogger(__name__)

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
CONNECT_TIMEOUT = 10.0
EXEC_TIMEOUT = 60.0
"""Seconds that loading credentials may take; exec plugins ask servers of their own."""
KEPT = 64
"""Connections that are aborted at the end; there are three at a time, and those before them are long gone."""
SOCKS = ("socks5", "socks5h")
_NAMING_FILES = ("tokenFile", "client-certificate", "client-key", "certificate-authority")

_Stamp = tuple[int, int, int] | None


@dataclass(frozen=True, slots=True)
class Access:
    """How to get to the API server. Without kubeconfig and master: as a pod's service account."""

    kubeconfig: str = ""
    master: str = ""
    """Replaces the URL that the kubeconfig has; without one, there are no credentials."""
    qps: float = 5.0
    """Below 0: no limit."""
    burst: int = 10
    service_account: Path = SERVICE_ACCOUNT


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
            transport.abort()


class _SOCKSConnector(_Connector, aiohttp_socks.ProxyConnector):
    """The same through a proxy of a kind that aiohttp does not know."""


class _Client:
    """One set of credentials in use; it closes when it is retired and its last request has ended."""

    def __init__(self, configuration: Configuration, files: Mapping[str, _Stamp]) -> None:
        self.url = configuration.host or ""
        self._configuration = configuration
        self._files = files
        self._requests = 0
        self._retired = False
        tls, proxy = _tls(configuration), urlsplit(configuration.proxy or "")
        self._over_socks = proxy.scheme in SOCKS
        connector: Any
        if self._over_socks:
            # The proxy resolves names, as with Go: it may be that nobody else can.
            url = proxy._replace(scheme="socks5").geturl()
            connector = _SOCKSConnector.from_url(url, ssl=tls, rdns=True)
        else:
            connector = _Connector(ssl=tls)
        self._connector: _Connector = connector
        self._session = aiohttp.ClientSession(
            connector=connector,
            trust_env=not self._over_socks,  # HTTPS_PROXY and NO_PROXY
            read_bufsize=2**21,
        )

    @property
    def is_outdated(self) -> bool:
        return any(_stamp(file) != stamp for file, stamp in self._files.items())

    @asynccontextmanager
    async def ask(
        self, path: str, query: Mapping[str, str], content: object, timeout: aiohttp.ClientTimeout
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        self._requests += 1
        try:
            response = await self._session.request(
                "GET" if content is None else "POST",
                self.url + path,
                params=query,
                json=content,
                headers=await self._headers(),
                proxy=None if self._over_socks else self._configuration.proxy,
                server_hostname=self._configuration.tls_server_name,
                timeout=timeout,
            )
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

    async def _headers(self) -> dict[str, str]:
        key = (await self._configuration.get_api_key_with_prefix("BearerToken") or "").strip()
        if not key.isprintable():
            raise ConfigException("found a token with line breaks inside; allowed: one line")
        headers = {"Accept": "application/json", "User-Agent": f"userspace-proxy/{__version__}"}
        return {**headers, "Authorization": key} if key else headers


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
        access = self._access
        found = _check_kubeconfig(access.kubeconfig) if access.kubeconfig else ""
        return access.master or found or _check_service_account(access.service_account)

    @asynccontextmanager
    async def request(
        self, path: str, query: Mapping[str, str], content: object = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer to a GET, or to a POST of `content`; its body is not yet read.

        Raises APIError where none comes or it breaks off.
        """
        url = self._access.master or self._access.kubeconfig or "the cluster"
        try:
            client = await self._load()
            url = client.url
            await asyncio.sleep(self._throttle.delay())
            async with client.ask(path, query, content, self._timeout) as response:
                if response.status == 401:
                    self._rejected = client
                yield response
        except ConfigException as error:
            raise APIError(f"the credentials for {url} cannot be loaded: {error}") from None
        except TimeoutError as error:
            raise APIError(f"no byte from the API server at {url} for too long: {_words(error)}") from None
        except (aiohttp.ClientError, aiohttp_socks.ProxyError, OSError) as error:
            if isinstance(error, ssl.SSLError | aiohttp.ClientSSLError):
                self._rejected = self._client  # a certificate that was replaced, maybe
            raise APIError(f"no way to the API server at {url}: {_words(error)}") from None

    async def close(self) -> None:
        for client in self._clients:
            await client.end()

    async def _load(self) -> _Client:
        async with self._loading:
            client = self._client
            if client is None or client is self._rejected or client.is_outdated:
                async with asyncio.timeout(EXEC_TIMEOUT):
                    configuration, files = await _configuration(self._access)
                self._client = _Client(configuration, files)
                self._clients.add(self._client)
                if client is not None:
                    logger.info("the credentials for the API server were read anew")
                    await client.retire()
            assert self._client is not None
            return self._client


async def _configuration(access: Access) -> tuple[Configuration, Mapping[str, _Stamp]]:
    """Everything that a client needs, and the files that it came from as they were before they were read."""
    configuration = Configuration()
    before: dict[str, _Stamp] = {}
    if access.kubeconfig:
        before = {file: _stamp(file) for file in _files(access.kubeconfig)}
        try:
            await load_kube_config(access.kubeconfig, client_configuration=configuration, persist_config=False)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
            raise ConfigException(f"{access.kubeconfig}: {_words(error)}") from error
    elif not access.master:
        token, authority = (str(access.service_account / name) for name in ("token", "ca.crt"))
        before = {file: _stamp(file) for file in (token, authority)}
        InClusterConfigLoader(token, authority, try_refresh_token=False).load_and_set(configuration)
    if access.master:
        secure = configuration.ssl_ca_cert or configuration.cert_file
        scheme = "" if "://" in access.master else "https://" if secure else "http://"
        configuration.host = scheme + access.master.rstrip("/")
    return configuration, before


def _files(kubeconfig: str) -> list[str]:
    """A kubeconfig and what it refers to by path."""
    found = [kubeconfig]
    folder = os.path.dirname(os.path.abspath(kubeconfig))
    content = _parse(kubeconfig)
    for kind, key in (("users", "user"), ("clusters", "cluster")):
        for each in content.get(kind) or []:
            settings = each.get(key) or {} if isinstance(each, dict) else {}
            named = (settings.get(name) for name in _NAMING_FILES)
            found += [os.path.join(folder, path) for path in named if isinstance(path, str)]
    return found


def _parse(kubeconfig: str) -> dict[str, Any]:
    try:
        with open_regular(kubeconfig) as opened:
            documents = read_yaml(opened.read())
    except OSError as error:
        raise ConfigException(error.strerror) from None
    except SyntaxProblem as problem:
        raise ConfigException(str(problem)) from None
    content = documents[0].value if documents else None
    if not isinstance(content, dict):
        raise ConfigException("not a mapping")
    return content


def _check_kubeconfig(path: str) -> str:
    """What is always wrong, in words that help; the rest is told when it is loaded."""
    try:
        content = _parse(path)
    except ConfigException as error:
        allowed = "allowed: a kubeconfig file that can be read"
        raise ConfigError([f"--kubeconfig={path}: {error}; {allowed}"]) from None
    named = {kind: _named(content, kind) for kind in ("contexts", "clusters", "users")}
    problems = []
    context = named["contexts"].get(content.get("current-context"))
    if context is None:
        known = ", ".join(map(str, named["contexts"])) or "none"
        problem = f"current-context: found {content.get('current-context')!r}; allowed: one of its contexts ({known})"
        raise ConfigError([f"--kubeconfig={path}: {problem}"])
    chosen = context.get("context") or {}
    for key, kind in (("cluster", "clusters"), ("user", "users")):
        if chosen.get(key) not in named[kind]:
            known = ", ".join(map(str, named[kind])) or "none"
            problems.append(f"{key}: found {chosen.get(key)!r}; allowed: one of its {kind} ({known})")
    cluster = (named["clusters"].get(chosen.get("cluster")) or {}).get("cluster") or {}
    if urlsplit(str(cluster.get("server"))).scheme not in ("http", "https"):
        problems.append(f"server: found {cluster.get('server')!r}; allowed: an URL with http:// or https://")
    scheme = urlsplit(str(cluster.get("proxy-url") or "http:")).scheme
    if scheme not in ("http", "https", *SOCKS):
        problems.append(f"proxy-url: found {cluster.get('proxy-url')!r}; allowed: http, https or socks5")
    elif scheme in SOCKS and cluster.get("tls-server-name"):
        problems.append("tls-server-name: found it beside a proxy-url with socks5; allowed: one of the two")
    if problems:
        raise ConfigError([f"--kubeconfig={path}: {problem}" for problem in problems])
    return str(cluster.get("server"))


def _named(content: Mapping[str, Any], kind: str) -> dict[Any, dict[str, Any]]:
    items = content.get(kind)
    if not isinstance(items, list):
        return {}
    return {str(item["name"]): item for item in items if isinstance(item, dict) and "name" in item}


def _check_service_account(folder: Path) -> str:
    ip, port = (os.environ.get(f"KUBERNETES_SERVICE_{name}", "") for name in ("HOST", "PORT"))
    if ip and port and (folder / "token").exists():
        return f"https://{join_host_port(ip, int(port))}"
    problem = (
        "nothing to serve: found no --manifests, no --kubeconfig or --master, and this is no pod with a service account"
        f" (KUBERNETES_SERVICE_HOST, {folder}/token); allowed: one of them; write for example "
        "--manifests=/etc/userspace-proxy/manifests or --kubeconfig=/etc/kubernetes/kube-proxy.conf"
    )
    raise ConfigError([problem])


def _tls(configuration: Configuration) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=configuration.ssl_ca_cert)
    # Go, and so every other client of the cluster, asks no key identifiers of an authority; Python 3.13 would.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    if configuration.cert_file:
        context.load_cert_chain(configuration.cert_file, configuration.key_file)
    if not configuration.verify_ssl:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _stamp(file: str) -> _Stamp:
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _words(error: BaseException) -> str:
    return str(error) or type(error).__name__
