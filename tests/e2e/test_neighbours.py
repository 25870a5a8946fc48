"""Services beside each other at one port number, and proxies beside each other in one network namespace."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.client import DATAGRAM, answer
from tests.e2e.node import Node, Object, endpoints, port, service
from tests.netns import eventually

pytestmark = pytest.mark.privileged

KINDS = {"TCP": socket.SOCK_STREAM, "UDP": DATAGRAM}
ENDPOINT = Path(__file__).with_name("endpoint.py")
IPS = {"a": ("10.96.0.5", "fd00:96::5"), "b": ("10.96.0.6", "fd00:96::6")}
ENDPOINTS = {"a": ("127.0.0.1:9000", "[::1]:9000"), "b": ("127.0.0.1:9001", "[::1]:9001")}


@pytest.fixture
def node(tmp_path: Path, capture: str) -> Iterator[Node]:
    with Node(tmp_path, capture) as node:
        for name, number in (("a", 9000), ("b", 9001)):
            node.net.spawn(f"{sys.executable} {ENDPOINT} {name} {number}")
        yield node


def objects(name: str, number: int, node_port: int = 0) -> list[Object]:
    """A Service of both families and protocols, and where it is served."""
    ports = [port(number, name=protocol.lower(), protocol=protocol, node_port=node_port) for protocol in KINDS]
    return [
        service(name, list(IPS[name]), ports, ipFamilies=["IPv4", "IPv6"]),
        *(endpoints(name, [at], port_name=p.lower(), protocol=p) for at in ENDPOINTS[name] for p in KINDS),
    ]


@pytest.mark.parametrize(("first", "second"), [("a", "b"), ("b", "a")])
def test_a_node_port_is_at_no_cluster_ip(node: Node, first: str, second: str) -> None:
    """Whichever of the two Services was there first."""
    pod = node.pod("10.1.0.3", "fd01::3")
    both = {"a": objects("a", 80, 30080), "b": objects("b", 30080)}
    node.apply(*both[first], file=first)
    node.start("--iptables-min-sync-period=0s")
    node.apply(*both[second], file=second)
    eventually(lambda: len({row["name"] for row in node.services() if row["state"] == "serving"}) == 2)
    for where in (node.net, pod):
        for kind in KINDS.values():
            places = [(ip, 30080, b"b:hi") for ip in IPS["b"]] + [(ip, 80, b"a:hi") for ip in IPS["a"]]
            for ip, number, name in (*places, ("10.1.0.1", 30080, b"a:hi"), ("fd01::1", 30080, b"a:hi")):
                eventually(lambda: answer(where, ip, number, kind, timeout=1) == name)
            for ip in IPS["a"]:
                assert answer(where, ip, 30080, kind, timeout=0.3) == b"", "there is no such portal"
    assert not any(row["problems"] for row in node.services())


def test_a_second_proxy_is_refused_and_the_first_serves_on(node: Node, capture: str, tmp_path: Path) -> None:
    node.apply(*objects("a", 80))
    node.start()
    assert node.process is not None
    (tmp_path / "others").mkdir()
    with node.net.entered():
        second = subprocess.run(
            [
                *(sys.executable, "-m", "userspace_proxy", f"--manifests={tmp_path / 'others'}"),
                *(f"--capture={capture}", "--healthz-bind-address=", "--metrics-bind-address="),
            ],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert second.returncode == 1
    assert f"another userspace-proxy (pid {node.process.pid}) captures in this network namespace" in second.stderr
    assert answer(node.net, "10.96.0.5", 80) == b"a:hi"
    cleaned = node.cleanup()
    assert cleaned.returncode == 0
    assert f"(pid {node.process.pid}) captures here and will do so again" in cleaned.stderr
    assert node.stop() == 0
    node.start()
    assert answer(node.net, "10.96.0.5", 80) == b"a:hi"
