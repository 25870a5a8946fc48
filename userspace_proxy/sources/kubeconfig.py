"""A kubeconfig file, read and checked: the cluster and the user that its current context chooses.

It may be half written when it is read, and anything may be in it. So it is checked whole each time, at the start as
when it has changed, and what cannot be used is told with what is allowed. What the settings are good for is
`sources.credentials`' business; exec plugins are run in `sources.plugin`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from userspace_proxy.exceptions import ConfigError
from userspace_proxy.files import open_regular
from userspace_proxy.sources.documents import SyntaxProblem, read_yaml
from userspace_proxy.sources.ways import PROXY_SCHEMES, SERVER_SCHEMES, SOCKS, url_problem

_Text = str | None


class Cluster(msgspec.Struct, rename="kebab"):
    server: _Text = None
    certificate_authority: _Text = None
    certificate_authority_data: _Text = None
    insecure_skip_tls_verify: bool | None = None
    tls_server_name: _Text = None
    proxy_url: _Text = None


class Variable(msgspec.Struct):
    name: str
    value: str


class Plugin(msgspec.Struct, rename="camel"):
    """An exec plugin: a command that prints credentials."""

    command: str
    api_version: str
    args: list[str] | None = None
    env: list[Variable] | None = None


class AuthProvider(msgspec.Struct):
    name: _Text = None
    config: dict[str, str] | None = None


class User(msgspec.Struct, rename="kebab"):
    client_certificate: _Text = None
    client_certificate_data: _Text = None
    client_key: _Text = None
    client_key_data: _Text = None
    token: _Text = None
    token_file: _Text = msgspec.field(default=None, name="tokenFile")
    username: _Text = None
    password: _Text = None
    auth_provider: AuthProvider | None = None
    plugin: Plugin | None = msgspec.field(default=None, name="exec")
    impersonated: Any = msgspec.field(default=None, name="as")
    as_uid: Any = None
    as_groups: Any = None
    as_user_extra: Any = None


class _Context(msgspec.Struct):
    cluster: _Text = None
    user: _Text = None


@dataclass(frozen=True, slots=True)
class Kubeconfig:
    path: str
    cluster: Cluster
    user: User

    @property
    def server(self) -> str:
        return (self.cluster.server or "").rstrip("/")

    def beside(self, path: str) -> str:
        """A path as the file means it: relative ones start where it is."""
        return os.path.join(os.path.dirname(os.path.abspath(self.path)), path)

    @property
    def files(self) -> list[str]:
        """The file itself, and what it refers to by path."""
        cluster, user = self.cluster, self.user
        named = (cluster.certificate_authority, user.client_certificate, user.client_key, user.token_file)
        return [self.path, *(self.beside(name) for name in named if name)]


def read(path: str) -> Kubeconfig:
    """Raises ConfigError for everything that is wrong with it."""
    content = _parse(path)
    context = _shaped(path, _chosen(path, content, "contexts", content.get("current-context")), "context", _Context)
    missing = [problem for problem in _unknown(content, context) if problem]
    if missing:
        raise ConfigError([f"--kubeconfig={path}: {problem}" for problem in missing])
    cluster = _shaped(path, _named(content, "clusters")[context.cluster], "cluster", Cluster)
    user = _shaped(path, _named(content, "users").get(context.user, {}), "user", User)
    problems = [*_cluster_problems(cluster), *_user_problems(user)]
    if problems:
        raise ConfigError([f"--kubeconfig={path}: {problem}" for problem in problems])
    return Kubeconfig(path, cluster, user)


def _parse(path: str) -> dict[str, Any]:
    try:
        with open_regular(path) as opened:
            documents = read_yaml(opened.read())
        content = documents[0].value if documents else None
        if isinstance(content, dict):
            return content
        problem = "not a mapping"
    except OSError as error:
        problem = error.strerror or str(error)
    except (SyntaxProblem, ValueError) as error:  # a path with a NUL in it is a ValueError
        problem = str(error)
    raise ConfigError([f"--kubeconfig={path}: {problem}; allowed: a kubeconfig file that can be read"])


def _named(content: Mapping[str, Any], kind: str) -> dict[str | None, dict[str, Any]]:
    items = content.get(kind)
    if not isinstance(items, list):
        return {}
    return {str(item["name"]): item for item in items if isinstance(item, dict) and "name" in item}


def _chosen(path: str, content: Mapping[str, Any], kind: str, name: object) -> dict[str, Any]:
    named = _named(content, kind)
    if not isinstance(name, str) or name not in named:
        known = ", ".join(map(str, named)) or "none"
        raise ConfigError(
            [f"--kubeconfig={path}: current-context: found {name!r}; allowed: one of its contexts ({known})"]
        )
    return named[name]


def _unknown(content: Mapping[str, Any], context: _Context) -> Iterator[str]:
    for key, name, kind in (("cluster", context.cluster, "clusters"), ("user", context.user, "users")):
        named = _named(content, kind)
        if name not in named:
            yield f"{key}: found {name!r}; allowed: one of its {kind} ({', '.join(map(str, named)) or 'none'})"


_Shape = TypeVar("_Shape", Cluster, User, _Context)


def _shaped(path: str, item: Mapping[str, Any], key: str, shape: type[_Shape]) -> _Shape:
    settings = item.get(key)
    try:
        return msgspec.convert({} if settings is None else settings, type=shape)
    except msgspec.ValidationError as error:
        name = item.get("name")
        allowed = "allowed: what kubectl writes there; text that looks like something else needs quotes"
        raise ConfigError([f"--kubeconfig={path}: {key} {name!r}: found {error}; {allowed}"]) from None


def _cluster_problems(cluster: Cluster) -> Iterator[str]:
    server = cluster.server or ""
    if problem := url_problem(server, SERVER_SCHEMES):
        yield f"server: {problem}"
    elif "@" in server.split("/")[2]:
        yield "server: found a user in the URL; allowed: username and password, or another way in, under users"
    if cluster.proxy_url:
        if problem := url_problem(cluster.proxy_url, PROXY_SCHEMES):
            yield f"proxy-url: {problem}"
        elif cluster.proxy_url.startswith(SOCKS) and cluster.tls_server_name:
            yield "tls-server-name: found it beside a proxy-url with socks5; allowed: one of the two"


def _user_problems(user: User) -> Iterator[str]:
    impersonation = (user.impersonated, user.as_uid, user.as_groups, user.as_user_extra)
    for key, value in zip(("as", "as-uid", "as-groups", "as-user-extra"), impersonation, strict=True):
        if value:
            yield (
                f"{key}: found {value!r}; allowed: nothing, for this proxy acts as nobody but itself; "
                "give its own user a ClusterRole instead"
            )
    provider = user.auth_provider
    if provider is not None and provider.name != "oidc":
        yield f"auth-provider: found {provider.name!r}; allowed: oidc; for others use an exec plugin, as with kubectl"
