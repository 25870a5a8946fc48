"""What the proxy tells over HTTP, read by curl, and that it agrees with what has just happened."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.e2e import programs
from tests.e2e.client import connect
from tests.e2e.node import Node, endpoints, port, service
from tests.netns import Namespace, eventually

pytestmark = pytest.mark.privileged

WEB = service("web", ["10.96.0.10", "fd00:96::10"], [port(80, name="http", node_port=30080)])
DNS = service("dns", "10.96.0.11", [port(53, protocol="UDP")])
EMPTY = service("empty", "10.96.0.12", [port(80)], externalIPs=["198.51.100.7"], sessionAffinity="ClientIP")
HTTP = [endpoints("web", [f"{ip}:{programs.PORTS['http']}"], port_name="http") for ip in ("10.1.0.2", "[fd01::2]")]
CONNECTION_REFUSED = 7
"""curl's exit status."""
ANSWERS = endpoints("dns", [f"10.1.0.2:{programs.PORTS['dns']}"], protocol="UDP")


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory, capture: str) -> Iterator[Node]:
    directory = tmp_path_factory.mktemp("site")
    with Node(directory, capture) as made:
        server = made.pod("10.1.0.2", "fd01::2")
        programs.start_nginx(server, directory / "nginx")
        programs.start_dnsmasq(server)
        for name in ("http", "dns"):
            programs.await_listener(server, programs.PORTS[name])
        made.own("198.51.100.7")
        made.apply(WEB, DNS, EMPTY, *HTTP, ANSWERS)
        made.start("--iptables-min-sync-period=50ms", "--udp-timeout=150ms")
        yield made


@pytest.fixture(scope="module")
def pod(node: Node) -> Namespace:
    return node.pod("10.1.0.3", "fd01::3")


def samples(node: Node, service: str, family: str = "IPv4") -> Counter[str]:
    """Of one service: the metric's name, and the label that is its own, to the number."""
    common = {"family", "namespace", "port", "protocol", "service"}
    found: Counter[str] = Counter()
    for name, text, value in re.findall(r"^userspace_proxy_(\w+){(.*)} (.*)$", node.get("/metrics"), re.MULTILINE):
        labels = dict(re.findall(r'(\w+)="(.*?)"', text))
        if labels.get("service") == service and labels["family"] == family:
            found[" ".join([name, *(value for key, value in labels.items() if key not in common)])] = int(float(value))
    return found


def test_what_went_through_is_counted(node: Node, pod: Namespace) -> None:
    before, before6 = samples(node, "web"), samples(node, "web", "IPv6")
    for client, ip, number in ((pod, "10.96.0.10", 80), (node.net, "10.96.0.10", 80), (pod, "10.1.0.1", 30080)):
        assert programs.curl(client, ip, number) == programs.PAGE
    eventually(lambda: samples(node, "web")["sessions_active"] == 0)
    found = samples(node, "web") - before
    assert found["sessions_opened_total"] == found["dials_total"] == 3
    assert found["sessions_ended_total client_closed"] + found["sessions_ended_total endpoint_closed"] == 3
    assert 3 * len(programs.PAGE) < found["bytes_total to_client"] < 3 * (len(programs.PAGE) + 1000)
    assert 3 * 50 < found["bytes_total to_endpoint"] < 3 * 500
    assert samples(node, "web", "IPv6") == before6


def test_flows_are_counted(node: Node, pod: Namespace) -> None:
    before = samples(node, "dns")
    for _ in range(4):
        assert programs.dig(pod, "10.96.0.11", 53, "web.test") == ["192.0.2.80"]
    eventually(lambda: samples(node, "dns")["sessions_active"] == 0)
    found = samples(node, "dns") - before
    assert found["sessions_opened_total"] == found["sessions_ended_total idle"] == 4
    assert found["datagrams_total to_endpoint"] == found["datagrams_total to_client"] == 4
    assert found["bytes_total to_endpoint"] < found["bytes_total to_client"]


def test_counts_of_a_service_go_with_it(node: Node, pod: Namespace) -> None:
    assert programs.curl(pod, "10.96.0.10", 80)
    assert samples(node, "web")["sessions_opened_total"]
    node.apply(DNS, EMPTY, ANSWERS)
    eventually(lambda: 'service="web"' not in node.get("/metrics"))
    node.apply(WEB, DNS, EMPTY, *HTTP, ANSWERS)
    eventually(lambda: samples(node, "web") and node.captures("10.96.0.10"))
    assert samples(node, "web")["sessions_opened_total"] == 0


def test_general_metrics(node: Node) -> None:
    page = node.get("/metrics")
    for sample in (
        'userspace_proxy_capture_info{capture="' + node.capture + '"} 1.0',
        "userspace_proxy_service_port_errors 0.0",
        'userspace_proxy_protocol_available{protocol="TCP"} 1.0',
        'userspace_proxy_protocol_available{protocol="UDP"} 1.0',
        "userspace_proxy_refused_objects 0.0",
        "userspace_proxy_sync_failures_total 0.0",
        'userspace_proxy_capture_changes_total{change="added"}',
        "kubeproxy_sync_proxy_rules_duration_seconds_bucket",
        "process_open_fds",
    ):
        assert f"\n{sample}" in page
    headers = node.net.run("curl -s -o /dev/null -D - http://127.0.0.1:10249/metrics")
    assert "Content-Type: text/plain" in headers


def test_services_tell_what_is_served(node: Node) -> None:
    rows = {(row["name"], row["family"]): row for row in json.loads(node.get("/services"))}
    assert set(rows) == {("web", "IPv4"), ("web", "IPv6"), ("dns", "IPv4"), ("empty", "IPv4")}
    web = rows["web", "IPv6"]
    assert web["clusterIPs"] == ["[fd00:96::10]:80"]
    assert web["nodePort"] == 30080
    assert web["endpoints"] == ["[fd01::2]:8080"]
    assert web["state"] == "serving"
    if node.capture == "local":
        assert f"[::1]:{web['proxyPort']} " in node.net.run("ss -Hlnt")
    else:
        assert re.search(rf"(--to-ports|:) {web['proxyPort']}\b", node.captured())
    empty = rows["empty", "IPv4"]
    assert (empty["state"], empty["endpoints"], empty["affinity"]) == ("refusing", [], "ClientIP")
    assert empty["externalIPs"] == ["198.51.100.7:80"]
    assert not any(row["problems"] for row in rows.values())


def test_connections_tell_who_talks_to_whom(node: Node, pod: Namespace) -> None:
    assert json.loads(node.get("/connections")) == []
    with connect(pod, "10.96.0.10", 80) as client:
        client.send(b"GET /where HTTP/1.1\r\nHost: web\r\n\r\n")
        assert client.recv(1000).endswith(b"10.1.0.2")
        [row] = json.loads(node.get("/connections"))
        assert row["service_port"] == "default/web:http"
        assert row["client"] == f"10.1.0.3:{client.getsockname()[1]}"
        assert row["endpoint"] == "10.1.0.2:8080"
        assert row["to_endpoint"] == len(b"GET /where HTTP/1.1\r\nHost: web\r\n\r\n")
        assert row["to_client"] > 0
        assert row["seconds"] >= 0
    eventually(lambda: json.loads(node.get("/connections")) == [])


def test_settings_and_mode(node: Node) -> None:
    assert node.get("/proxyMode") == "userspace"
    settings = json.loads(node.get("/configz"))
    assert settings["kubeproxy.config.k8s.io"]["udpIdleTimeout"] == "150ms"
    ours = settings["userspaceproxy.config"]
    assert (ours["drainTimeout"], ours["manifests"]) == ("5s", [str(node.manifests)])
    assert "/metrics" in node.get("/nothing-here")


def test_health_is_told_to_everybody_and_the_rest_to_the_node(node: Node, pod: Namespace) -> None:
    for client, ip in ((pod, "10.1.0.1"), (node.net, "127.0.0.1"), (node.net, "10.1.0.1")):
        assert json.loads(programs.curl(client, ip, 10256, "healthz"))["nodeEligible"] is True
        assert json.loads(programs.curl(client, ip, 10256, "livez"))["lastUpdated"]
        assert programs.curl(client, ip, 10256, "readyz") == "ok"
    for ip in ("10.1.0.1", "fd01::1"):
        assert programs.curl_status(pod, ip, 10249) == CONNECTION_REFUSED
