"""Ways to a test's API server: certificates of an authority of its own, kubeconfigs, and a source that goes by them."""

from __future__ import annotations

import json
import ssl
import time
from pathlib import Path
from typing import Any

import pytest
import trustme

from tests.apiserver import APIServer
from tests.e2e.node import endpoints, port, service
from tests.sources.cluster import Follower, eventually, meant, node_object
from userspace_proxy.exceptions import APIError
from userspace_proxy.sources.connection import Connection
from userspace_proxy.sources.credentials import Access

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


async def refused(how: Access) -> str:
    """What is said of a way that leads nowhere."""
    connection = Connection(how, time.monotonic, stall=1)
    with pytest.raises(APIError) as caught:
        async with connection.request("/", {}):
            pass
    await connection.close()
    return str(caught.value)
