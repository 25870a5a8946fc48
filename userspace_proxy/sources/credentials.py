"""Who we are to the API server, and how we know it: from a kubeconfig, or in a pod from its service account.

kubernetes_asyncio makes the token out of what a user has (basic auth, OIDC, a service account). Certificates and keys
go to OpenSSL from here and from memory: it would keep them in files below /tmp, for good, which is no place for a key,
and which others tidy up. Its models and its REST client are left alone, as told in `sources.connection`.

All of it is text that somebody else writes, maybe this very moment: whatever is raised here is told, and tried again.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit
from urllib.request import getproxies

import msgspec
from kubernetes_asyncio.client import Configuration
from kubernetes_asyncio.config.incluster_config import InClusterConfigLoader
from kubernetes_asyncio.config.kube_config import KubeConfigLoader

from userspace_proxy.exceptions import ConfigError, CredentialsError
from userspace_proxy.files import open_regular
from userspace_proxy.model import join_host_port
from userspace_proxy.sources import kubeconfig, plugin
from userspace_proxy.sources.kubeconfig import Kubeconfig
from userspace_proxy.sources.ways import PROXY_SCHEMES, SERVER_SCHEMES, SOCKS, proxy_for, url_problem

logging.getLogger("kubernetes_asyncio").setLevel(
    logging.CRITICAL
)  # it raises what it logs, which is told with more words

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
TIMEOUT = 60.0
"""Seconds that an OIDC provider may take."""

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


@dataclass(frozen=True, slots=True)
class Credentials:
    url: str
    authorization: str
    """A header's value, or nothing."""
    tls: ssl.SSLContext
    server_name: str | None
    """Whom the certificate has to be for, where that is not the URL's host."""
    proxy: str
    files: Mapping[str, _Stamp]
    """What they came from, as it was before it was read."""

    @property
    def is_outdated(self) -> bool:
        return any(_stamp(file) != stamp for file, stamp in self.files.items())


def check(access: Access) -> str:
    """The URL of the API server, as it is configured now. Raises ConfigError for what no waiting will mend."""
    found = kubeconfig.read(access.kubeconfig).server if access.kubeconfig else ""
    if access.master:
        if problem := url_problem(_with_scheme(access.master, secure=False), SERVER_SCHEMES):
            raise ConfigError([f"--master: {problem}"])
        return access.master
    return found or _check_service_account(access.service_account)


async def load(access: Access) -> Credentials:
    if access.kubeconfig:
        return await _from_kubeconfig(access.kubeconfig, access.master)
    if access.master:
        url = _with_scheme(access.master, secure=False)
        return Credentials(url, "", _tls(b""), None, _proxy(url, "", None), {})
    return _from_service_account(access.service_account)


async def _from_kubeconfig(path: str, master: str) -> Credentials:
    files = {path: _stamp(path)}
    config = kubeconfig.read(path)
    files |= {file: _stamp(file) for file in config.files[1:]}
    cluster, user = config.cluster, config.user
    token = user.token or ""
    certificate = _content(config, "client-certificate", user.client_certificate, user.client_certificate_data)
    key = _content(config, "client-key", user.client_key, user.client_key_data)
    if user.plugin is not None:
        command = user.plugin.command
        given = await plugin.ask(user.plugin, config.beside(command) if "/" in command else command)
        token = given.token or ""
        if given.client_certificate_data and given.client_key_data:
            certificate, key = given.client_certificate_data.encode(), given.client_key_data.encode()
    elif user.token_file:  # goes before a token, as with kubectl: it is the one that is renewed
        token = _content(config, "tokenFile", user.token_file).decode()
    named = cluster.certificate_authority
    authority = _content(config, "certificate-authority", named, cluster.certificate_authority_data)
    url = config.server
    if master:
        url = _with_scheme(master, secure=bool(authority or certificate))
    tls = _tls(authority, certificate, key, verify=not cluster.insecure_skip_tls_verify)
    proxy = _proxy(url, cluster.proxy_url or "", cluster.tls_server_name)
    authorization = await _authorization(config, token)
    return Credentials(url, authorization, tls, cluster.tls_server_name or None, proxy, files)


def _from_service_account(folder: Path) -> Credentials:
    token, authority = (str(folder / name) for name in ("token", "ca.crt"))
    files = {file: _stamp(file) for file in (token, authority)}
    configuration = Configuration()
    InClusterConfigLoader(token, authority, try_refresh_token=False).load_and_set(configuration)
    url = str(configuration.host)
    tls = _tls(Path(authority).read_bytes())
    return Credentials(url, _header(configuration), tls, None, _proxy(url, "", None), files)


async def _authorization(config: Kubeconfig, token: str) -> str:
    """What a user has, made into a header. Certificates and plugins are dealt with by then."""
    user = msgspec.to_builtins(config.user)
    known = {key: user[key] for key in ("username", "password") if user[key]}
    if token.strip():
        known = {"token": token.strip()}
    elif config.user.auth_provider is not None and config.user.plugin is None:
        known = {"auth-provider": user["auth-provider"]}
    content = {
        "current-context": "this",
        "contexts": [{"name": "this", "context": {"cluster": "this", "user": "this"}}],
        "clusters": [{"name": "this", "cluster": {"server": config.server}}],
        "users": [{"name": "this", "user": known}],
    }
    configuration = Configuration()
    try:
        async with asyncio.timeout(TIMEOUT):
            await KubeConfigLoader(content, config_base_path="").load_and_set(configuration)
    except TimeoutError:
        raise CredentialsError(f"the OIDC provider took longer than {TIMEOUT:g} s") from None
    return _header(configuration)


def _header(configuration: Configuration) -> str:
    header = str(configuration.api_key.get("BearerToken") or "").strip()
    if not header.isprintable() or not header.isascii():
        raise CredentialsError("found a token with line breaks or no ASCII inside; allowed: one line of ASCII")
    return header


def _content(config: Kubeconfig, key: str, path: str | None, data: str | None = None) -> bytes:
    """What is in the file, or inline; as with kubectl, the latter goes first. Empty only where neither is named."""
    if not (data or path):
        return b""
    if data:
        key = f"{key}-data"
        try:
            content = base64.b64decode("".join(data.split()), validate=True)
        except ValueError as error:
            raise CredentialsError(f"{key}: found no base64 ({error}); allowed: PEM in base64") from None
    else:
        with open_regular(config.beside(path or "")) as opened:
            content = opened.read()
    if not content:
        raise CredentialsError(f"{key}: found nothing in it")
    return content


def _tls(authority: bytes, certificate: bytes = b"", key: bytes = b"", *, verify: bool = True) -> ssl.SSLContext:
    # What is no ASCII is a comment between certificates, and nothing to OpenSSL. Nothing at all would be everybody.
    trusted = authority.decode("ascii", "ignore") + "\n" if authority else None
    with _told("certificate-authority: found no certificate in PEM"):
        context = ssl.create_default_context(cadata=trusted)
    # Go, and so every other client of the cluster, asks no key identifiers of an authority; Python 3.13 would.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    if certificate:
        with (
            _told("client-certificate, client-key: found no certificate and key in PEM that belong together"),
            _in_memory(certificate) as chain,
            _in_memory(key or certificate) as private,
        ):
            context.load_cert_chain(chain, private, password=_no_password)
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


@contextmanager
def _told(problem: str) -> Iterator[None]:
    try:
        yield
    except (ssl.SSLError, ValueError) as error:
        raise CredentialsError(f"{problem} ({error})") from None


@contextmanager
def _in_memory(content: bytes) -> Iterator[str]:
    """OpenSSL reads from files alone; nobody else gets to see this one."""
    with open(os.memfd_create("credentials"), "wb") as file:
        file.write(content)
        file.flush()
        yield f"/proc/self/fd/{file.fileno()}"


def _no_password() -> NoReturn:
    """Called for a key that is encrypted. OpenSSL would ask at the terminal, and wait."""
    raise CredentialsError("client-key: found an encrypted key; allowed: one without a passphrase")


def _proxy(url: str, configured: str, server_name: str | None) -> str:
    proxy = configured or proxy_for(url, getproxies())
    if proxy and not configured:
        scheme = urlsplit(url).scheme.upper()
        if problem := url_problem(proxy, PROXY_SCHEMES):
            raise CredentialsError(f"{scheme}_PROXY: {problem}")
        if server_name and proxy.startswith(SOCKS):
            raise CredentialsError(f"{scheme}_PROXY: found socks5 beside tls-server-name; allowed: one of the two")
    return proxy


def _with_scheme(master: str, *, secure: bool) -> str:
    scheme = "" if "://" in master else "https://" if secure else "http://"
    return scheme + master.rstrip("/")


def _check_service_account(folder: Path) -> str:
    ip, port = (os.environ.get(f"KUBERNETES_SERVICE_{name}", "") for name in ("HOST", "PORT"))
    if ip and port and (folder / "token").exists():
        if not (port.isascii() and port.isdigit()):
            raise ConfigError([f"KUBERNETES_SERVICE_PORT: found {port!r}; allowed: a number from 1 to 65535"])
        url = f"https://{join_host_port(ip, int(port))}"
        if problem := url_problem(url, SERVER_SCHEMES):
            raise ConfigError([f"KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT: {problem}"])
        return url
    problem = (
        "nothing to serve: found no --manifests, no --kubeconfig or --master, and this is no pod with a service account"
        f" (KUBERNETES_SERVICE_HOST, {folder}/token); allowed: one of them; write for example "
        "--manifests=/etc/userspace-proxy/manifests or --kubeconfig=/etc/kubernetes/kube-proxy.conf"
    )
    raise ConfigError([problem])


def _stamp(file: str) -> _Stamp:
    try:
        status = os.stat(file)
    except (OSError, ValueError):  # a NUL in its name is a ValueError
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
