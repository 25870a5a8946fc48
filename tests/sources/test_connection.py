"""Real TLS, real proxies, real files: who we are to the API server, and which way we get to it."""

from __future__ import annotations

import base64
import json
import os
import ssl
import stat
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import trustme

from tests.apiserver import APIServer, Manner
from tests.e2e.node import endpoints, port, service
from tests.sources.cluster import Follower, eventually, meant, node_object
from tests.sources.forwarders import Forwarder, HTTPForwarder, SOCKSForwarder
from userspace_proxy.exceptions import ConfigError
from userspace_proxy.sources.connection import Access, Connection, Throttle

Run = Callable[[Coroutine[Any, Any, Any]], Any]

WEB = service("web", "10.96.0.10", [port(80)])


class Authority:
    """A cluster's own, with the files that it has issued."""

    def __init__(self, folder: Path) -> None:
        self._ca = trustme.CA()
        self._folder = folder
        self.certificate = folder / "ca.crt"
        self._ca.cert_pem.write_to_path(self.certificate)

    def server(self, *, ask: bool = False, name: str = "127.0.0.1") -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._ca.issue_cert(name).configure_cert(context)
        if ask:
            context.verify_mode = ssl.CERT_REQUIRED
            self._ca.configure_trust(context)
        return context

    def client(self, name: str) -> tuple[Path, Path]:
        """Certificate and key of a user; issued again, they are others."""
        leaf = self._ca.issue_cert(common_name=name)
        certificate, key = self._folder / f"{name}.crt", self._folder / f"{name}.key"
        certificate.write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
        leaf.private_key_pem.write_to_path(key)
        return certificate, key


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


def filled(tls: ssl.SSLContext | None = None) -> APIServer:
    api = APIServer(tls=tls)
    api.put(WEB, endpoints("web", ["10.1.0.2:80"]), node_object())
    return api


def write_kubeconfig(file: Path, server: str, user: dict[str, Any], **cluster: Any) -> Path:
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "contexts": [
            {"name": "elsewhere", "context": {"cluster": "other", "user": "nobody"}},
            {"name": "here", "context": {"cluster": "this", "user": "me"}},
        ],
        "clusters": [
            {"name": "other", "cluster": {"server": "https://192.0.2.1:6443"}},
            {"name": "this", "cluster": {"server": server, **cluster}},
        ],
        "users": [{"name": "nobody", "user": {}}, {"name": "me", "user": user}],
    }
    new = file.with_suffix(".new")
    new.write_text(json.dumps(content))
    new.rename(file)
    return file


def access(kubeconfig: Path) -> Access:
    return Access(str(kubeconfig), qps=-1)


async def reaches(api: APIServer, how: Access) -> Follower:
    follower = Follower(how)
    async with follower.running():
        await eventually(lambda: follower.last == meant(api))
    return follower


# -- credentials


@pytest.mark.parametrize("inline", [False, True])
def test_client_certificates(authority: Authority, tmp_path: Path, run: Run, inline: bool) -> None:
    certificate, key = authority.client("node-proxy")
    files = {"client-certificate": certificate, "client-key": key, "certificate-authority": authority.certificate}
    named: dict[str, str] = {name: os.path.relpath(path, tmp_path) for name, path in files.items()}
    if inline:
        named = {f"{name}-data": base64.b64encode(path.read_bytes()).decode() for name, path in files.items()}
    cluster = {name: value for name, value in named.items() if "authority" in name}
    user = {name: value for name, value in named.items() if "client" in name}
    with filled(authority.server(ask=True)) as api:
        run(reaches(api, access(write_kubeconfig(tmp_path / "config", api.url, user, **cluster))))
        assert set(api.users) == {"node-proxy"}


def test_a_server_of_another_authority_is_not_believed(
    authority: Authority, tmp_path: Path, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "other").mkdir()
    other = Authority(tmp_path / "other")

    async def main() -> None:
        config = write_kubeconfig(
            tmp_path / "config", api.url, {"token": "t"}, **{"certificate-authority": str(authority.certificate)}
        )
        follower = Follower(access(config))
        async with follower.running():
            await eventually(lambda: "CERTIFICATE_VERIFY_FAILED" in caplog.text)
            assert not follower.published
            # The authority is renewed, and the file with it.
            write_kubeconfig(config, api.url, {"token": "t"}, **{"certificate-authority": str(other.certificate)})
            await eventually(lambda: follower.published)

    with filled(other.server()) as api:
        run(main())


def test_insecure_and_another_name_are_as_the_kubeconfig_says(authority: Authority, tmp_path: Path, run: Run) -> None:
    with filled(authority.server(name="api.example")) as api:
        ca = {"certificate-authority": str(authority.certificate)}
        named = write_kubeconfig(
            tmp_path / "named", api.url, {"token": "t"}, **ca, **{"tls-server-name": "api.example"}
        )
        run(reaches(api, access(named)))
        insecure = {"insecure-skip-tls-verify": True}
        run(reaches(api, access(write_kubeconfig(tmp_path / "insecure", api.url, {"token": "t"}, **insecure))))


@pytest.mark.parametrize("secure", [False, True])
def test_a_token_in_a_file_is_read_anew_when_it_changes(
    authority: Authority, tmp_path: Path, run: Run, secure: bool
) -> None:
    token = tmp_path / "token"
    token.write_text("first\n")

    async def main() -> None:
        ca = {"certificate-authority": str(authority.certificate)} if secure else {}
        config = write_kubeconfig(tmp_path / "config", api.url, {"tokenFile": "token"}, **ca)
        follower = Follower(access(config))
        async with follower.running():
            await eventually(lambda: sum(r.verb == "watch" for r in api.requests) == 3)
            token.write_text("second")
            api.tokens = {"second"}
            api.away()
            api.put(service("dns", "10.96.0.11", [port(53)]))
            refused = len(api.requests)
            api.back()
            await eventually(lambda: follower.last == meant(api))
            assert {r.headers["Authorization"] for r in api.requests[refused:]} == {"Bearer second"}

    with filled(authority.server() if secure else None) as api:
        api.tokens = {"first"}
        run(main())


def plugin(tmp_path: Path, status: str) -> dict[str, Any]:
    """An exec plugin whose answer is an expression of how often it ran."""
    script = tmp_path / "plugin.py"
    script.write_text(f"""\
import json, os, pathlib
assert json.loads(os.environ["KUBERNETES_EXEC_INFO"])["kind"] == "ExecCredential"
assert os.environ["CLUSTER"] == "blue"
runs = pathlib.Path({str(tmp_path / "runs")!r})
n = len(runs.read_text()) + 1 if runs.exists() else 1
runs.write_text("x" * n)
version = "client.authentication.k8s.io/v1"
print(json.dumps({{"apiVersion": version, "kind": "ExecCredential", "status": {status}}}))
""")
    return {
        "exec": {
            "apiVersion": "client.authentication.k8s.io/v1",
            "command": sys.executable,
            "args": [str(script)],
            "env": [{"name": "CLUSTER", "value": "blue"}],
        }
    }


def test_an_exec_plugin_is_asked_again_when_its_token_is_refused(tmp_path: Path, run: Run) -> None:
    async def main() -> None:
        config = write_kubeconfig(tmp_path / "config", api.url, plugin(tmp_path, '{"token": f"token-{n}"}'))
        follower = Follower(access(config))
        async with follower.running():
            await eventually(lambda: sum(r.verb == "watch" for r in api.requests) == 3)
            assert (tmp_path / "runs").read_text() == "x", "once for all requests"
            api.tokens = {"token-2"}
            api.away()
            api.put(service("dns", "10.96.0.11", [port(53)]))
            api.back()
            await eventually(lambda: follower.last == meant(api))
        (tmp_path / "runs").unlink()

    with filled() as api:
        api.tokens = {"token-1"}
        run(main())


def test_an_exec_plugin_may_give_a_certificate(authority: Authority, tmp_path: Path, run: Run) -> None:
    certificate, key = authority.client("from-plugin")
    given = {"clientCertificateData": certificate.read_text(), "clientKeyData": key.read_text()}
    with filled(authority.server(ask=True)) as api:
        ca = {"certificate-authority": str(authority.certificate)}
        config = write_kubeconfig(tmp_path / "config", api.url, plugin(tmp_path, repr(given)), **ca)
        run(reaches(api, access(config)))
        assert set(api.users) == {"from-plugin"}


def test_a_plugin_that_fails_is_told_and_tried_again(
    tmp_path: Path, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    user = plugin(tmp_path, '{"token": "t"} if (pathlib.Path(os.environ["HOME"]) / "on").exists() else 1 / 0')
    user["exec"]["env"].append({"name": "HOME", "value": str(tmp_path)})

    async def main() -> None:
        follower = Follower(access(write_kubeconfig(tmp_path / "config", api.url, user)))
        async with follower.running():
            await eventually(lambda: "cannot be loaded: exec: process returned 1" in caplog.text)
            (tmp_path / "on").touch()
            await eventually(lambda: follower.published)
        (tmp_path / "on").unlink()

    with filled() as api:
        run(main())
    assert "ZeroDivisionError" in caplog.text


def test_in_a_pod_the_service_account_and_its_rotated_token(
    authority: Authority, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ca.crt").write_bytes(authority.certificate.read_bytes())
    # As kubelet does it: a link to a folder that is exchanged.
    for name, token in (("one", "first"), ("two", "second")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "token").write_text(token)
    (tmp_path / "..data").symlink_to("one")
    (tmp_path / "token").symlink_to("..data/token")

    async def main() -> None:
        follower = Follower(Access(qps=-1, service_account=tmp_path))
        async with follower.running():
            await eventually(lambda: sum(r.verb == "watch" for r in api.requests) == 3)
            (tmp_path / "..new").symlink_to("two")
            (tmp_path / "..new").rename(tmp_path / "..data")
            api.tokens = {"second"}
            api.away()
            api.put(service("dns", "10.96.0.11", [port(53)]))
            api.back()
            await eventually(lambda: follower.last == meant(api))
        assert {r.headers["Authorization"] for r in api.requests} == {"Bearer first", "Bearer second"}

    with filled(authority.server()) as api:
        api.tokens = {"first"}
        ip, number = api.url.removeprefix("https://").split(":")
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", ip)
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", number)
        assert Connection(Access(service_account=tmp_path), time.monotonic, stall=1).check() == api.url
        run(main())


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


def test_private_keys_are_left_to_nobody_else(authority: Authority, tmp_path: Path, run: Run) -> None:
    certificate, key = authority.client("private")
    user = {
        "client-certificate-data": base64.b64encode(certificate.read_bytes()).decode(),
        "client-key-data": base64.b64encode(key.read_bytes()).decode(),
    }
    made = tmp_path / "made"
    made.mkdir()
    with filled(authority.server()) as api, pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(made))
        config = write_kubeconfig(
            tmp_path / "config", api.url, user, **{"certificate-authority": str(authority.certificate)}
        )
        run(reaches(api, access(config)))
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in made.iterdir())


# -- what cannot be used


def problem(how: Access) -> str:
    with pytest.raises(ConfigError) as caught:
        Connection(how, time.monotonic, stall=1).check()
    return "\n".join(caught.value.problems)


def test_without_any_source_the_three_ways_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    told = problem(Access(service_account=tmp_path))
    assert "nothing to serve" in told
    for flag in ("--manifests", "--kubeconfig", "--master"):
        assert flag in told


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"current-context": "nowhere"}, "found 'nowhere'; allowed: one of its contexts (elsewhere, here)"),
        ({"current-context": None, "contexts": None}, "one of its contexts (none)"),
        ({"clusters": []}, "cluster: found 'this'; allowed: one of its clusters (none)"),
        ({"users": []}, "user: found 'me'; allowed: one of its users (none)"),
        ({"clusters": [{"name": "this", "cluster": {"server": "192.0.2.1"}}]}, "server: found '192.0.2.1'"),
        (
            {"clusters": [{"name": "this", "cluster": {"server": "http://x", "proxy-url": "ftp://x"}}]},
            "proxy-url: found 'ftp://x'; allowed: http, https or socks5",
        ),
        (
            {
                "clusters": [
                    {
                        "name": "this",
                        "cluster": {"server": "https://x", "proxy-url": "socks5://x:1", "tls-server-name": "y"},
                    }
                ]
            },
            "tls-server-name",
        ),
    ],
)
def test_a_kubeconfig_that_leads_nowhere(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    file = write_kubeconfig(tmp_path / "config", "https://192.0.2.1:6443", {"token": "t"})
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert told in problem(access(file))


@pytest.mark.parametrize(("text", "told"), [("[1]", "not a mapping"), ("a: [}", "line 1"), ("", "not a mapping")])
def test_a_kubeconfig_that_is_none(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "config"
    file.write_text(text)
    assert told in problem(access(file))
    assert "No such file" in problem(access(tmp_path / "missing"))
    os.mkfifo(tmp_path / "fifo")
    assert "not a regular file" in problem(access(tmp_path / "fifo"))


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
