"""Real TLS and real files: who we are to the API server, and what becomes of that when files change."""

from __future__ import annotations

import base64
import json
import os
import stat
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from tests.e2e.node import port, service
from tests.sources.cluster import Follower, eventually, meant
from tests.sources.ways import Authority, access, filled, reaches, refused, write_kubeconfig
from userspace_proxy.exceptions import ConfigError
from userspace_proxy.sources import credentials
from userspace_proxy.sources.connection import Connection
from userspace_proxy.sources.credentials import Access

Run = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


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
            await eventually(
                lambda: f"cannot be loaded: the exec plugin {sys.executable} ended with status 1" in caplog.text
            )
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


# -- what cannot be used, at the start or for a while


def problem(how: Access) -> str:
    with pytest.raises(ConfigError) as caught:
        credentials.check(how)
    return "\n".join(caught.value.problems)


def test_without_any_source_the_three_ways_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    told = problem(Access(service_account=tmp_path))
    assert "nothing to serve" in told
    for flag in ("--manifests", "--kubeconfig", "--master"):
        assert flag in told


def test_a_service_account_at_no_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").touch()
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "https")
    assert "KUBERNETES_SERVICE_PORT: found 'https'" in problem(Access(service_account=tmp_path))
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "99999")
    assert "Port out of range" in problem(Access(service_account=tmp_path))


def test_a_master_that_is_none() -> None:
    assert "--master: found no URL (Invalid IPv6 URL)" in problem(Access(master="https://[::1"))


def test_each_beginning_of_a_kubeconfig_is_told_and_waited_over(tmp_path: Path, run: Run) -> None:
    """As one that is written in place looks to those who read it meanwhile."""
    data = {"certificate-authority-data": "eA==", "proxy-url": "http://127.0.0.1:2"}
    file = write_kubeconfig(tmp_path / "config", "https://127.0.0.1:1", {"username": "a", "password": "b"}, **data)
    text = yaml.safe_dump(json.loads(file.read_text()), sort_keys=False)

    async def main() -> None:
        for size in range(len(text)):
            file.write_text(text[:size])
            assert "cannot be loaded" in (told := await refused(access(file))) or "no way to" in told, text[:size]

    run(main())


def test_a_kubeconfig_half_written_while_we_run(tmp_path: Path, run: Run, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        config = write_kubeconfig(tmp_path / "config", api.url, {"token": "t"})
        text = config.read_text()
        follower = Follower(access(config))
        async with follower.running():
            await eventually(lambda: follower.published)
            config.write_text("clusters:\n- name: c\n  cluster:\n    s")
            api.away()
            api.back()
            api.put(service("dns", "10.96.0.11", [port(53)]))
            await eventually(lambda: "cannot be loaded" in caplog.text)
            config.write_text(text)
            await eventually(lambda: follower.last == meant(api))

    with filled() as api:
        run(main())


def test_a_token_that_is_no_text(
    authority: Authority, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_bytes(b"\xff\xfe")
    (tmp_path / "ca.crt").write_bytes(authority.certificate.read_bytes())
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "1")
    assert "cannot be loaded: UnicodeDecodeError" in run(refused(Access(service_account=tmp_path)))
    config = write_kubeconfig(tmp_path / "config", "https://127.0.0.1:1", {"tokenFile": "token"})
    assert "cannot be loaded: UnicodeDecodeError" in run(refused(access(config)))


@pytest.mark.parametrize(
    ("user", "told"),
    [
        ({"token": "one\ntwo"}, "found a token with line breaks"),
        ({"tokenFile": "empty"}, "tokenFile: found nothing in it"),
        ({"tokenFile": "missing"}, "No such file or directory"),
        ({"client-certificate-data": "%"}, "client-certificate-data: found no base64"),
        ({"client-certificate-data": "eA==", "client-key-data": "eA=="}, "client-certificate, client-key: found no"),
        ({"auth-provider": {"name": "oidc"}}, "Expected key config"),
        ({"auth-provider": {"name": "oidc", "config": {"id-token": "x"}}}, "JWT tokens should contain 3"),
        ({"auth-provider": {"name": "oidc", "config": {"id-token": "x.y.z"}}}, "cannot be loaded: "),
    ],
)
def test_credentials_that_are_none(tmp_path: Path, run: Run, user: dict[str, Any], told: str) -> None:
    (tmp_path / "empty").touch()
    config = write_kubeconfig(tmp_path / "config", "https://127.0.0.1:1", user)
    assert told in run(refused(access(config)))


@pytest.mark.parametrize("data", ["%", "eA==", " ", "AAAA", "w7w="])
def test_an_authority_that_is_none_is_not_everybody(tmp_path: Path, run: Run, data: str) -> None:
    """The system's own authorities are taken where none is named, and only there."""
    cluster = {"certificate-authority-data": data}
    config = write_kubeconfig(tmp_path / "config", "https://127.0.0.1:1", {"token": "t"}, **cluster)
    assert "cannot be loaded: certificate-authority" in run(refused(access(config)))


def test_an_encrypted_key_is_told_and_nobody_is_asked(authority: Authority, tmp_path: Path, run: Run) -> None:
    certificate, key = authority.client("encrypted")
    private = load_pem_private_key(key.read_bytes(), None)
    key.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")))
    user = {"client-certificate": str(certificate), "client-key": str(key)}
    config = write_kubeconfig(tmp_path / "config", "https://127.0.0.1:1", user)
    told = "client-key: found an encrypted key; allowed: one without a passphrase"
    assert told in run(refused(access(config)))


def test_a_token_in_a_file_goes_before_one_beside_it(tmp_path: Path, run: Run) -> None:
    (tmp_path / "token").write_text("new")
    with filled() as api:
        api.tokens = {"new"}
        run(reaches(api, access(write_kubeconfig(tmp_path / "c", api.url, {"tokenFile": "token", "token": "old"}))))


def test_basic_auth(tmp_path: Path, run: Run) -> None:
    with filled() as api:
        run(reaches(api, access(write_kubeconfig(tmp_path / "c", api.url, {"username": "a", "password": "b"}))))
        assert {request.headers["Authorization"] for request in api.requests} == {"Basic YTpi"}


def test_what_netrc_has_for_the_host_is_not_ours(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login a password b\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    with filled() as api:
        api.tokens = {"t"}
        run(reaches(api, access(write_kubeconfig(tmp_path / "config", api.url, {"token": "t"}))))
        api.tokens = set()
        run(reaches(api, Access(master=api.url, qps=-1)))
        assert {request.headers.get("Authorization") for request in api.requests} == {"Bearer t", None}


def test_no_proxy_may_name_a_network(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "proxy.example:3128")
    config = access(write_kubeconfig(tmp_path / "config", "https://10.96.0.1", {"token": "t"}))
    assert run(credentials.load(config)).proxy == "http://proxy.example:3128"
    monkeypatch.setenv("NO_PROXY", "192.168.0.0/16,10.96.0.0/12")
    assert run(credentials.load(config)).proxy == ""


def test_renewed_credentials_need_no_files_and_leave_nothing_open(
    authority: Authority, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file for temporary ones is to be had at all: others tidy up there, or it is read-only."""
    tls = authority.server(ask=True)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    ca = {"certificate-authority-data": base64.b64encode(authority.certificate.read_bytes()).decode()}
    certificate, key = authority.client("renewed")
    given = f'{{"clientCertificateData": open({str(certificate)!r}).read() + f"# {{n}}\\n"'
    given += f', "clientKeyData": open({str(key)!r}).read()}}'

    async def main() -> None:
        config = write_kubeconfig(tmp_path / "config", api.url, plugin(tmp_path, given), **ca)
        connection = Connection(access(config), time.monotonic, stall=5)
        opened = set()
        for _ in range(4):
            os.utime(config)
            async with connection.request("/api/v1/services", {}) as response:
                assert response.status == 200
                opened.add(len([fd for fd in os.listdir("/proc/self/fd") if _is_file(fd)]))
        await connection.close()
        assert (tmp_path / "runs").read_text() == "xxxx"
        assert len(opened) == 1
        (tmp_path / "runs").unlink()

    with filled(tls) as api:
        run(main())
        assert set(api.users) == {"renewed"}


def _is_file(fd: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(f"/proc/self/fd/{fd}").st_mode)
    except FileNotFoundError:  # the listing's own
        return False
