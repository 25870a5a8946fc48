"""The command's life: becoming ready, being told to read again, refusing while it drains, and leaving no trace."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.client import DATAGRAM, answer, ask, connect
from tests.e2e.node import Node, endpoints, port, service
from tests.netns import Namespace, eventually

pytestmark = pytest.mark.privileged

ENDPOINT = Path(__file__).with_name("endpoint.py")
WEB = service("web", ["10.96.0.10", "fd00:96::10"], [port(80, node_port=30080)])
DNS = service("dns", "10.96.0.11", [port(53, protocol="UDP", node_port=30053)])
WEB_ENDPOINTS = (endpoints("web", ["10.1.0.2:8080"]), endpoints("web", ["[fd01::2]:8080"]))
DNS_ENDPOINTS = endpoints("dns", ["10.1.0.2:8080"], protocol="UDP")
ALL = (WEB, *WEB_ENDPOINTS, DNS, DNS_ENDPOINTS)

# Without what has coverage measured: nobody may not write there.
NOBODY = "env -u COVERAGE_PROCESS_CONFIG setpriv --reuid=65534 --regid=65534 --clear-groups"
# May read, wherever the tests and their manifests are kept, and nothing else.
NOBODY += "".join(f" --{caps}=-all,+dac_read_search" for caps in ("inh-caps", "ambient-caps", "bounding-set"))


either_signal = pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.captures("iptables", why="both signals are heard by one ear")),
    ],
)
nobody = pytest.mark.captures("iptables", why="it says what becomes of those who may not have iptables")


@pytest.fixture
def node(tmp_path: Path, capture: str) -> Iterator[Node]:
    with Node(tmp_path, capture) as made:
        made.pod("10.1.0.2", "fd01::2").spawn(f"{sys.executable} {ENDPOINT} a 8080")
        made.apply(*ALL)
        yield made


@pytest.fixture
def pod(node: Node) -> Namespace:
    return node.pod("10.1.0.3", "fd01::3")


def status(node: Node, path: str) -> int:
    """The HTTP status of a health page; 0 while nobody listens."""
    return int(node.net.run(f"curl -s -m 5 -o /dev/null -w %{{http_code}} http://127.0.0.1:10256{path}", check=False))


def traces(node: Node) -> dict[str, object]:
    """All that a proxy may leave in its namespace: rules and chains, routes, sockets, processes, conntrack entries."""
    net = node.net
    saved = "".join(
        net.run(f"{tool}-legacy-save -t {table}")
        for tool in ("iptables", "ip6tables")
        for table in ("raw", "mangle", "nat", "filter")
    )
    with net.entered():
        inside = os.stat("/proc/thread-self/ns/net").st_ino
    return {
        "tables": re.sub(r"^#.*$|\[\d+:\d+\]", "", saved, flags=re.MULTILINE),
        "table": net.run("nft list ruleset"),
        "routes": net.run("ip -4 route show table all") + str("proto 117" in net.run("ip -6 route show table all")),
        "rules of routing": net.run("ip rule") + net.run("ip -6 rule"),
        "addresses": net.run("ip -brief addr"),
        "sockets": net.run("ss -Hlntuw"),
        "processes": sorted(found for found in os.listdir("/proc") if found.isdigit() and is_inside(found, inside)),
        "conntrack": re.findall(r".*(?:10\.96\.|fd00:96|dport=300[58]).*", node.conntrack()),
    }


def is_inside(pid: str, namespace: int) -> bool:
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino == namespace
    except OSError:
        return False


@pytest.mark.captures("iptables", why="the others write as many at once, and are ready with the first look")
def test_ready_means_that_everything_is_served(node: Node) -> None:
    """With so many Services, the first sync takes a while after the server is up; then each of them is captured."""
    many = [service(f"s{n}", f"10.97.{n // 250}.{n % 250 + 1}", [port(80)]) for n in range(1500)]
    node.apply(*many, file="many")
    node.start(wait=False)
    seen: list[int] = []

    def is_ready() -> bool:
        seen.append(status(node, "/readyz"))
        return seen[-1] == 200

    eventually(lambda: status(node, "/livez") == 200, 20)
    eventually(is_ready, 20)
    assert seen[0] == 503
    assert set(seen) == {503, 200}
    assert node.rules().count("-A KUBE-PORTALS-HOST -d 10.97.") == 1500
    assert status(node, "/healthz") == 200


def test_health_while_it_drains(node: Node, pod: Namespace) -> None:
    node.start("--drain-timeout=30s")
    assert status(node, "/readyz") == 200
    with connect(pod, "10.96.0.10", 80) as client:
        assert ask(client) == b"a:hi"
        assert node.process is not None
        node.process.send_signal(signal.SIGTERM)
        eventually(lambda: status(node, "/readyz") == 503)
        assert status(node, "/healthz") == 503
        assert status(node, "/livez") == 200
        [session] = json.loads(node.get("/connections"))
        assert session["service_port"] == "default/web"
        assert ask(client) == b"a:hi"
    assert node.process.wait(10) == 0


def test_new_connections_are_refused_at_once_while_it_drains(node: Node, pod: Namespace) -> None:
    # As on most nodes, what is not captured has a way out, and nobody at its end who answers.
    node.net.run("ip route add default via 10.1.0.2")
    node.start("--drain-timeout=30s")
    with connect(pod, "10.96.0.10", 80) as client:
        assert ask(client) == b"a:hi"
        assert node.process is not None
        node.process.send_signal(signal.SIGTERM)
        eventually(lambda: not answer(pod, "10.1.0.1", 30080, timeout=1))
        for where in (pod, node.net):
            for place in (("10.96.0.10", 80), ("fd00:96::10", 80), ("10.1.0.1", 30080), ("fd01::1", 30080)):
                with pytest.raises(ConnectionRefusedError):
                    connect(where, *place, timeout=2)
        assert ask(client) == b"a:hi"


@pytest.mark.captures("iptables", why="test_lifetime shows resets at the end over all captures")
def test_without_a_drain_timeout_it_ends_at_once(node: Node, pod: Namespace) -> None:
    node.start("--drain-timeout=0s")
    with connect(pod, "10.96.0.10", 80) as client:
        assert ask(client) == b"a:hi"
        assert node.stop(timeout=10) == 0
        with pytest.raises(ConnectionResetError):
            client.recv(1)


@pytest.mark.captures("iptables", why="the pages are the same over all captures")
def test_the_admin_servers_can_be_left_out(node: Node) -> None:
    node.start("--healthz-bind-address=", "--metrics-bind-address=", wait=False)
    eventually(lambda: answer(node.net, "10.96.0.10", 80, timeout=1) == b"a:hi", 20)
    assert not re.search(r":102(49|56)\b", node.net.run("ss -Hlnt"))
    assert node.stop() == 0


@pytest.mark.captures("iptables", why="the pages are the same over all captures")
def test_a_taken_admin_port_ends_it_only_where_that_is_asked_for(node: Node) -> None:
    holder = node.net.spawn(f"{sys.executable} -m http.server 10256")
    eventually(lambda: ":10256" in node.net.run("ss -Hlnt"))
    before = traces(node)
    node.start("--bind-address-hard-fail", wait=False)
    assert node.process is not None
    assert node.process.wait(20) == 1, "as systemd's unit has it, 2 would be for ever"
    assert "--healthz-bind-address: cannot listen on 0.0.0.0:10256: Address already in use" in node.log()
    assert "Traceback" not in node.log()
    assert traces(node) == before
    node.start(wait=False)
    eventually(lambda: answer(node.net, "10.96.0.10", 80, timeout=1) == b"a:hi", 20)
    assert "trying again" in node.log()
    assert node.stop() == 0
    assert holder.poll() is None


@either_signal
def test_no_trace_is_left_in_the_namespace(node: Node, pod: Namespace, number: int) -> None:
    eventually(lambda: answer(pod, "10.1.0.2", 8080) == b"a:hi")
    before = traces(node)
    node.start()
    for ip in ("10.96.0.10", "fd00:96::10"):
        assert answer(pod, ip, 80) == b"a:hi"
        assert answer(node.net, ip, 80) == b"a:hi"
    for where, ip in ((pod, "10.1.0.1"), (node.net, "127.0.0.1")):
        assert answer(where, ip, 30080) == b"a:hi"
        assert answer(where, ip, 30053, DATAGRAM) == b"a:hi"
    assert answer(pod, "10.96.0.11", 53, DATAGRAM) == b"a:hi"
    during = traces(node)
    kinds = ["routes", "sockets", "processes", *{"iptables": ["tables"], "nftables": ["table"]}.get(node.capture, [])]
    assert all(during[kind] != before[kind] for kind in kinds)
    assert during["conntrack"] or node.capture == "local"
    assert node.stop(number) == 0
    assert traces(node) == before


@either_signal
def test_a_signal_in_the_middle_of_the_start_leaves_no_trace(node: Node, number: int) -> None:
    before, captured = traces(node), node.captured()
    node.start(wait=False)
    eventually(lambda: node.captured() != captured, 20)  # the first rules are there, the first sync is not done
    assert node.stop(number) == 0
    assert traces(node) == before


def test_the_last_bytes_of_what_has_ended_are_delivered_before_the_end(node: Node) -> None:
    """The connection is over for the proxy, while the kernel still has most of the answer for a slow client."""
    node.start("--drain-timeout=20s")
    assert node.process is not None
    size = 500_000
    with connect(node.net, "10.96.0.10", 80, timeout=20) as client:
        client.sendall(bytes(size))
        client.shutdown(socket.SHUT_WR)
        eventually(lambda: not json.loads(node.get("/connections")))
        node.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert node.process.poll() is None
        received = 0
        while chunk := client.recv(65536):
            received += len(chunk)
    assert received >= size  # each message is answered with the endpoint's name before it
    assert node.process.wait(10) == 0


@pytest.mark.captures("iptables", why="the others have no process that could be stuck")
def test_a_capture_that_is_stuck_delays_no_refusal_and_no_second_signal(node: Node, pod: Namespace) -> None:
    node.start("--iptables-min-sync-period=50ms", "--drain-timeout=60s")
    assert node.process is not None
    workers = [int(pid) for pid in node.net.run(f"pgrep -P {node.process.pid}").split()]
    try:
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)
        node.apply(*ALL, service("new", "10.96.0.12", [port(80)]))
        eventually(lambda: "default/new" in node.log())
        with connect(pod, "10.96.0.10", 80) as client:
            assert ask(client) == b"a:hi"
            node.process.send_signal(signal.SIGTERM)
            eventually(lambda: not answer(pod, "10.96.0.10", 80))
            assert ask(client) == b"a:hi"
            node.process.send_signal(signal.SIGTERM)
            eventually(lambda: "still open and are reset" in node.log())
    finally:
        for worker in workers:
            os.kill(worker, signal.SIGCONT)
    assert node.process.wait(30) == 0


@pytest.mark.captures("iptables", why="what is read anew is manifests")
def test_sighup_finds_a_change_that_nobody_told_of(node: Node, tmp_path: Path) -> None:
    """The file is changed through another name of it, a hard link elsewhere, of which no watcher is told."""
    elsewhere = tmp_path / "aside" / "all.json"  # not right beside the manifests: that directory is watched too
    elsewhere.parent.mkdir()
    os.link(node.manifests / "all.json", elsewhere)
    node.start("--iptables-min-sync-period=50ms")
    time.sleep(0.5)  # the log lies beside the manifests, too: its lines from the start are changes, read anew after
    objects = [service("later", "10.96.0.20", [port(80)])]
    elsewhere.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))
    assert set(node.rows()) == {"web", "dns"}
    assert node.process is not None
    node.process.send_signal(signal.SIGHUP)
    eventually(lambda: set(node.rows()) == {"later"})
    node.apply(*ALL)
    eventually(lambda: set(node.rows()) == {"web", "dns"})
    eventually(lambda: answer(node.net, "10.96.0.10", 80, timeout=1) == b"a:hi")


@pytest.mark.captures("iptables", why="the others have no process of their own")
def test_a_process_of_the_capture_that_is_killed_is_replaced(node: Node) -> None:
    """Told by the processes themselves: each family's is another one after the next sync, and dies with the proxy."""
    node.start("--iptables-sync-period=300ms", "--iptables-min-sync-period=100ms")
    assert node.process is not None
    children = Path(f"/proc/{node.process.pid}/task/{node.process.pid}/children")
    first, rules = {int(pid) for pid in children.read_text().split()}, node.rules()
    assert len(first) == 2
    for pid in first:
        os.kill(pid, signal.SIGKILL)
    node.net.run("iptables-legacy -t nat -F")
    eventually(lambda: node.rules() == rules, 10)
    eventually(lambda: len(now := set(map(int, children.read_text().split()))) == 2 and not now & first)
    second = children.read_text().split()
    assert status(node, "/readyz") == 200
    node.process.kill()
    node.process.wait()
    eventually(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in second))


def test_a_kept_connection_outlives_its_endpoint_and_its_service(node: Node, pod: Namespace) -> None:
    node.start("--iptables-min-sync-period=50ms")
    places = [
        (pod, "10.96.0.10", 80),
        (pod, "fd00:96::10", 80),
        (node.net, "127.0.0.1", 30080),
        (pod, "fd01::1", 30080),
    ]
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(*place)) for place in places]
        for objects, state in (
            (ALL, "serving"),
            ((WEB, DNS, DNS_ENDPOINTS), "refusing"),
            ((DNS, DNS_ENDPOINTS), "gone"),
            ((), "gone"),
            (ALL, "serving"),
        ):
            node.apply(*objects)
            eventually(lambda: node.rows().get("web", {"state": "gone"})["state"] == state)
            # Where nothing is redirected, the address stays the node's as long as it is spoken on.
            eventually(lambda: node.capture == "local" or node.captures("10.96.0.10") == (WEB in objects))
            for client in clients:
                assert ask(client) == b"a:hi"


@nobody
def test_nobody_is_served_without_rules_and_routes(node: Node) -> None:
    """Not being root, `auto` says what is missing, and that proxy ports answer on this host, as they do."""
    before = traces(node)
    proxy = as_nobody(node, f"--manifests {node.manifests}")
    try:
        eventually(lambda: status(node, "/readyz") == 200, 20)
        ports = {(row["name"], row["family"]): row["proxyPort"] for row in json.loads(node.get("/services"))}
        assert answer(node.net, "127.0.0.1", ports["web", "IPv4"]) == b"a:hi"
        assert answer(node.net, "::1", ports["web", "IPv6"]) == b"a:hi"
        assert answer(node.net, "127.0.0.1", ports["dns", "IPv4"], DATAGRAM) == b"a:hi"
        assert answer(node.net, "10.1.0.1", ports["web", "IPv4"]) == b""
    finally:
        proxy.send_signal(signal.SIGINT)
        said, _ = proxy.communicate(timeout=10)
    assert proxy.returncode == 0
    assert "capture iptables does not work here" in said
    assert "run as root" in said
    assert "capture nftables does not work here" in said
    for (name, _), proxy_port in ports.items():
        assert re.search(rf"^default/{name} .* {proxy_port} ", said, re.MULTILINE)
        assert re.search(rf"^    default/{name}: .* can use \S+:{proxy_port}$", said, re.MULTILINE)
    assert traces(node) == before


@nobody
def test_nobody_is_told_why_iptables_cannot_be_had(node: Node) -> None:
    proxy = as_nobody(node, f"--capture=iptables --manifests {node.manifests}")
    said, _ = proxy.communicate(timeout=20)
    assert proxy.returncode == 1
    assert "run as root, or with CAP_NET_ADMIN and CAP_NET_RAW" in said
    assert "Traceback" not in said


@nobody
def test_nobody_cannot_clean_up_and_is_told(node: Node) -> None:
    node.start()
    assert node.process is not None
    node.process.kill()
    node.process.wait()
    proxy = as_nobody(node, "--cleanup")
    said, _ = proxy.communicate(timeout=20)
    assert "KUBE-PORTALS-HOST" in node.rules()
    assert proxy.returncode == 1
    assert "run as root" in said


def as_nobody(node: Node, flags: str) -> subprocess.Popen[str]:
    with node.net.entered():
        return subprocess.Popen(
            [*shlex.split(NOBODY), sys.executable, "-m", "userspace_proxy", *shlex.split(flags)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
