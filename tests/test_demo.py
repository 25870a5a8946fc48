"""The demo's endpoints: they answer, they tell what is in their way, and they never outlive the proxy."""

from __future__ import annotations

import itertools
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator

import pytest

DEMO = pathlib.Path(__file__).parent.parent / "examples" / "demo.py"
pytestmark = pytest.mark.privileged

PROXY = """
import sys
sys.path.insert(0, {folder!r})
import demo
demo.start_endpoints()
# Becoming another program, as the demo becomes the proxy, keeps the endpoints.
import os
os.execv(sys.executable, [sys.executable, "-c", "print('proxy', flush=True); import time; time.sleep(60)"])
"""


def in_namespace(code: str) -> list[str]:
    """A network namespace of its own: the demo's ports are fixed, and somebody may be using them."""
    return ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", sys.executable, "-c", code]


@pytest.fixture
def proxy() -> Iterator[subprocess.Popen[str]]:
    """What stands for the proxy: any program that the demo's process becomes."""
    code = PROXY.format(folder=str(DEMO.parent))
    with subprocess.Popen(in_namespace(code), stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "proxy\n"
            yield process
        finally:
            process.kill()


def children(pid: int) -> list[int]:
    return [int(child) for child in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_gone(pid: int) -> bool:
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 10
    while not is_gone(pid):
        assert time.monotonic() < deadline, "the endpoints outlived the proxy"
        time.sleep(0.01)


def ask(proxy: subprocess.Popen[str], code: str) -> str:
    enter = ["nsenter", "--net", "--target", str(proxy.pid), sys.executable, "-c", code]
    return subprocess.run(enter, capture_output=True, text=True, check=True, timeout=30).stdout


def test_http_endpoints_tell_who_they_are(proxy):
    code = """
import http.client
for port in (8081, 8082):
    connection = http.client.HTTPConnection("127.0.0.1", port)
    for path in ("/", "/again"):
        connection.request("GET", path)
        print(connection.getresponse().read().decode(), end="")
"""
    assert ask(proxy, code).splitlines() == [
        "hello from endpoint 8081: GET /",
        "hello from endpoint 8081: GET /again",
        "hello from endpoint 8082: GET /",
        "hello from endpoint 8082: GET /again",
    ]


def test_a_client_of_http_1_0_is_not_kept_waiting(proxy):
    code = """
import socket
with socket.create_connection(("127.0.0.1", 8081), timeout=10) as sock:
    sock.sendall(b"HEAD / HTTP/1.0\\r\\n\\r\\n")
    print(sock.makefile().read())
"""
    answer = ask(proxy, code)
    assert answer.startswith("HTTP/1.1 200 OK\n")
    assert "Connection: close\n" in answer
    assert "hello" not in answer


def test_what_is_no_http_is_hung_up_on(proxy):
    code = """
import socket
with socket.create_connection(("127.0.0.1", 8081), timeout=10) as sock:
    sock.sendall(b"nonsense\\r\\n\\r\\n")
    print(sock.recv(100))
"""
    assert ask(proxy, code) == "b''\n"


def test_udp_endpoints_echo(proxy):
    code = """
import socket
for port in (8083, 8084):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(10)
        sock.sendto(b"ping", ("127.0.0.1", port))
        print(sock.recv(100).decode())
"""
    assert ask(proxy, code).splitlines() == ["endpoint 8083: ping", "endpoint 8084: ping"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_endpoints_go_with_the_proxy(proxy, number):
    (endpoints,) = children(proxy.pid)
    proxy.send_signal(number)
    proxy.wait(10)
    wait_until_gone(endpoints)


def test_ctrl_c_does_not_reach_the_endpoints_before_the_proxy_has_drained(proxy):
    (endpoints,) = children(proxy.pid)
    assert os.getsid(endpoints) == os.getpgid(endpoints) == endpoints
    assert os.getpgid(proxy.pid) != endpoints


def test_the_endpoints_hold_nothing_of_the_terminal(proxy):
    (endpoints,) = children(proxy.pid)
    held = {int(link.name): os.readlink(link) for link in pathlib.Path(f"/proc/{endpoints}/fd").iterdir()}
    assert {held[descriptor] for descriptor in (0, 1, 2)} == {"/dev/null"}
    others = {target.partition(":")[0] for descriptor, target in held.items() if descriptor > 2}
    assert others <= {"pipe", "socket", "anon_inode"}
    assert sum(target.startswith("pipe:") for target in held.values()) == 1


@pytest.mark.parametrize(
    ("kind", "port", "words"),
    [
        ("SOCK_STREAM", 8082, "ss -ltnp 'sport = :8082'"),
        ("SOCK_DGRAM", 8083, "ss -lunp 'sport = :8083'"),
    ],
)
def test_a_port_that_is_taken_is_named(kind, port, words):
    code = f"""
import socket, sys
sys.path.insert(0, {str(DEMO.parent)!r})
import demo
taken = socket.socket(socket.AF_INET, socket.{kind})
taken.bind(("127.0.0.1", {port}))
demo.main(["--version"])
"""
    done = subprocess.run(in_namespace(code), capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert f"port {port}/" in done.stderr
    assert "Address already in use" in done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def table(lines: Iterable[str]) -> list[list[str]]:
    """What the table says, but for what is random in it: proxy ports, and whose turn is first."""
    found = [line.strip("\n") for line in lines]
    start = next(number for number, line in enumerate(found) if "SERVICE PORT" in line)
    heading = found[start]
    edges = [heading.index(name) for name in ("SERVICE PORT", "ADDRESS", "NODE PORT", "PROXY PORT", "ENDPOINTS")]
    rows = []
    for line in itertools.takewhile(str.strip, found[start:]):
        name, address, node_port, _, endpoints = (line[i:j].strip() for i, j in itertools.pairwise([*edges, None]))
        rows.append([name, address, node_port, *sorted(endpoints.split(", "))])
    return rows


def test_the_readme_shows_what_is_printed() -> None:
    code = f"import runpy, sys; sys.argv[1:] = ['--capture=local']; runpy.run_path({str(DEMO)!r}, run_name='__main__')"
    with subprocess.Popen(in_namespace(code), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as proxy:
        try:
            assert proxy.stdout is not None
            printed = list(itertools.takewhile(lambda line: "curl" not in line, proxy.stdout))
        finally:
            proxy.terminate()
    assert table((DEMO.parent.parent / "README.md").read_text(encoding="utf-8").splitlines()) == table(printed)
