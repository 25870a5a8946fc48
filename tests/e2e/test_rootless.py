"""Without root: in a user namespace that owns its network namespace every capture works; outside of one, `local`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.node import endpoints, port, service
from tests.netns import Namespace, eventually

pytestmark = pytest.mark.privileged

NOBODY = "setpriv --reuid=65534 --regid=65534 --clear-groups env -u COVERAGE_PROCESS_CONFIG"
ENDPOINT = Path(__file__).parent / "endpoint.py"
WHAT_IS_OURS = "nft list tables; ip route show table all proto 117; ip -6 route show table all proto 117"
SCRIPT = """
set -u
ip link set lo up
for number in 1 2; do
    unshare -n sleep 60 & other=$!
    others="${{others-}} $other"
    until [ "$(readlink /proc/$other/ns/net)" != "$(readlink /proc/$$/ns/net)" ]; do sleep 0.01; done
    ip link add to$number type veth peer name eth0 netns $other
    ip addr add 10.$number.0.1/24 dev to$number
    ip addr add fd0$number::1/64 dev to$number nodad
    ip link set to$number up
    nsenter --net --target $other sh -c "ip link set eth0 up
        ip addr add 10.$number.0.2/24 dev eth0; ip addr add fd0$number::2/64 dev eth0 nodad
        ip route add default via 10.$number.0.1; ip -6 route add default via fd0$number::1"
done
{python} {endpoint} one 9000 & endpoint=$!
cd {root}
{python} -m userspace_proxy --manifests {manifests} --capture={way} --workers={workers} --udp-timeout=1s & proxy=$!
until [ "$(curl -s http://127.0.0.1:10256/readyz)" = ok ]; do sleep 0.05; kill -0 $proxy || exit 1; done
curl -s http://127.0.0.1:10249/metrics | grep -o 'capture_info{{capture="[a-z]*"}}'
ask='
import socket, sys
for place in sys.argv[2:]:
    ip, _, port = place.rpartition(":")
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET, kind) as client:
            client.settimeout(5)
            client.connect((ip, int(port)))
            client.send(b"hi")
            print("answer to", sys.argv[1], ip, port, client.recv(100).decode(), flush=True)
'
portals="10.96.0.10:80 fd00:96::10:80"
{python} -c "$ask" node $portals 127.0.0.1:30080 ::1:30080 127.96.0.10:80
number=0
for other in $others; do
    number=$((number + 1))
    nsenter --net --target $other {python} -c "$ask" other$number $portals 10.$number.0.1:30080 fd0$number::1:30080
done
kill $proxy; wait $proxy; echo "exit $?"
echo "left: $({ours})"
kill $endpoint $others
"""


@pytest.fixture
def manifests() -> Iterator[Path]:
    """Where nobody may read; pytest's directories are its user's alone."""
    with tempfile.TemporaryDirectory() as directory, Namespace() as namespace:
        Path(directory).chmod(0o755)
        if namespace.run(f"{NOBODY} {sys.executable} -c 'import aiohttp, ifaddr'", check=False):
            pytest.skip(f"nobody may not run {sys.executable}")
        ports = [port(80, name="tcp", node_port=30080), port(80, name="udp", protocol="UDP", node_port=30080)]
        objects = []
        for name, ips in (("web", ["10.96.0.10", "fd00:96::10"]), ("lo", ["127.96.0.10"])):
            own = [{key: value for key, value in each.items() if name == "web" or key != "nodePort"} for each in ports]
            objects += [service(name, ips, own)] + [
                endpoints(name, [f"{ip}:9000"], port_name=each["name"], protocol=each["protocol"])
                for ip in ("127.0.0.1", "[::1]")
                for each in own
            ]
        file = Path(directory) / "all.json"
        file.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))
        yield file


@pytest.mark.parametrize(("way", "workers"), [("iptables", 1), ("nftables", 1), ("local", 1), ("auto", 2)])
def test_in_a_user_namespace_of_its_own(manifests: Path, way: str, workers: int) -> None:
    """From the node and from two networks beside it, as a pod and a client outside have them."""
    script = SCRIPT.format(
        python=sys.executable,
        endpoint=ENDPOINT,
        root=Path.cwd(),
        manifests=manifests,
        way=way,
        workers=workers,
        ours=WHAT_IS_OURS,
    )
    with tempfile.TemporaryDirectory() as home:
        os.chmod(home, 0o777)
        done = subprocess.run(
            [*NOBODY.split(), f"TMPDIR={home}", "unshare", "-Urn", "sh", "-c", script],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    said = done.stdout.splitlines()
    assert f'capture_info{{capture="{"iptables" if way == "auto" else way}"}}' in said, done.stdout + done.stderr
    answers = [line.split()[2] for line in said if line.startswith("answer ") and line.endswith(" one:hi")]
    assert Counter(answers) == {"node": 10, "other1": 8, "other2": 8}, done
    assert "exit 0" in said, done.stderr
    assert "left: " in said, done.stderr
    assert "done without" not in done.stderr


def test_with_no_privileges_at_all_the_hosts_own_addresses_are_served(manifests: Path, tmp_path: Path) -> None:
    """Ports below 1024 aside, unless the host lets everybody have them. What cannot be had says what to do."""
    with Namespace() as net, contextlib.ExitStack() as stack:
        net.run("sysctl -w net.ipv4.ip_unprivileged_port_start=79")
        net.spawn(f"{sys.executable} {ENDPOINT} one 9000")
        log = stack.enter_context((tmp_path / "log").open("w"))
        with net.entered():
            proxy = subprocess.Popen(
                [*NOBODY.split(), sys.executable, "-m", "userspace_proxy", "--manifests", str(manifests)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
            )
        try:
            eventually(lambda: net.run("curl -s http://127.0.0.1:10256/readyz", check=False) == "ok", 20)
            rows = json.loads(net.run("curl -s http://127.0.0.1:10249/services"))
            problems = {(row["name"], row["family"], row["protocol"]): row["problems"] for row in rows}
            assert problems["lo", "IPv4", "TCP"] == problems["lo", "IPv4", "UDP"] == []
            [problem] = problems["web", "IPv6", "TCP"]
            assert "[fd00:96::10]:80 cannot be had" in problem
            assert "CAP_NET_ADMIN; meanwhile its clients on this host can use [::1]:" in problem
            ask = (
                "import socket\n"
                "for where in (('127.96.0.10', 80), ('127.0.0.1', 30080)):\n"
                "    client = socket.create_connection(where, timeout=5)\n"
                "    client.send(b'hi'); print(client.recv(100).decode()); client.close()"
            )
            assert net.run(f'{sys.executable} -c "{ask}"').split() == ["one:hi", "one:hi"]
        finally:
            proxy.send_signal(signal.SIGTERM)
            assert proxy.wait(20) == 0
        said = (tmp_path / "log").read_text()
        for way in ("iptables", "nftables"):
            assert f"capture {way} does not work here, trying the next way" in said
