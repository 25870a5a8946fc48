"""The command on a node of a cluster: what the API server says is served, and goes on without it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.apiserver import APIServer
from tests.e2e import programs
from tests.e2e.node import Node, Object, endpoints, port, service
from tests.netns import Namespace, eventually

pytestmark = pytest.mark.privileged

IP, OTHER_IP = "10.96.0.10", "10.96.0.11"


def web(name: str = "web", ip: str = IP) -> Object:
    return service(name, ip, [port(80, name="http")])


def at(*ips: str, name: str = "web") -> Object:
    return endpoints(name, [f"{ip}:{programs.PORTS['http']}" for ip in ips], port_name="http")


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with Node(tmp_path) as made:
        for limit in ("ipv4/icmp_ratelimit", "ipv6/icmp/ratelimit"):
            made.net.run(f"sh -c 'echo 0 >/proc/sys/net/{limit}'")
        yield made


@pytest.fixture
def api(node: Node, tmp_path: Path) -> Iterator[APIServer]:
    with node.net.entered():
        made = APIServer(port=6443)
    node.source = ("--master", made.url, "--hostname-override=node-1", f"--state-dir={tmp_path}/state")
    with made:
        yield made


@pytest.fixture
def pod(node: Node, tmp_path: Path) -> Namespace:
    server = node.pod("10.1.0.2")
    programs.start_nginx(server, tmp_path / "nginx")
    programs.await_listener(server, programs.PORTS["http"])
    return node.pod("10.1.0.3")


def is_served(client: Namespace, ip: str) -> bool:
    return programs.curl_status(client, ip, 80) == 0


def test_services_come_change_and_go_as_the_api_server_says(node: Node, api: APIServer, pod: Namespace) -> None:
    api.put(web(), at("10.1.0.2"))
    node.start("--iptables-min-sync-period=0s")
    assert is_served(pod, IP)
    assert is_served(node.net, IP)
    api.put(web("other", OTHER_IP), at("10.1.0.2", name="other"))
    eventually(lambda: is_served(pod, OTHER_IP), 20)
    api.put(at())
    eventually(lambda: not is_served(pod, IP), 20)
    api.put(at("10.1.0.2"))
    eventually(lambda: is_served(pod, IP), 20)
    api.delete(web("other"))
    eventually(lambda: set(node.rows()) == {"web:http"}, 20)
    assert node.stop() == 0
    assert "KUBE" not in node.rules()


def test_it_serves_on_without_the_api_server_even_after_its_own_restart(
    node: Node, api: APIServer, pod: Namespace
) -> None:
    api.put(web(), at("10.1.0.2"))
    node.start("--iptables-min-sync-period=0s")
    assert is_served(pod, IP)
    api.away()
    eventually(lambda: "no way to the API server" in node.log(), 20)
    assert is_served(pod, IP)
    assert node.stop() == 0
    node.start("--iptables-min-sync-period=0s")
    assert "is served until the API server has told its own" in node.log()
    assert is_served(pod, IP)
    api.put(web("other", OTHER_IP), at("10.1.0.2", name="other"))
    with node.net.entered():
        api.back()
    eventually(lambda: is_served(pod, OTHER_IP), 60)
    assert is_served(pod, IP)
    assert "Traceback" not in node.log()


def test_without_a_saved_state_it_is_not_ready_before_the_api_server_is_there(
    node: Node, api: APIServer, pod: Namespace
) -> None:
    api.put(web(), at("10.1.0.2"))
    api.away()
    node.start(wait=False)
    eventually(lambda: "no way to the API server" in node.log(), 20)
    assert node.get("/readyz", 10256) != "ok"
    with node.net.entered():
        api.back()
    eventually(node.is_ready, 60)
    assert is_served(pod, IP)
