"""Programs from Debian for tests: the servers people run behind a Service, and the clients they run against them.

Servers run in the foreground of their namespace and end with it; they write nowhere but into the directory they
are given. Clients are told an address and a port and give back what they were answered, or fail with their output.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

from tests.netns import Namespace, eventually

PAGE = "".join(f"line {number} of a page that takes several segments\n" for number in range(4000))
LONG_TEXT = [f"{part}" * 200 for part in range(8)]
"""A TXT record that is too long for a datagram, so that clients ask again over TCP."""
PORTS = {"http": 8080, "dns": 5353, "redis": 6380, "iperf3": 5202}
"""Where the servers listen; no Service has the same number, so that no answer comes past the proxy."""

_NGINX = """
daemon off;
master_process off;
pid {directory}/nginx.pid;
error_log stderr crit;
events {{ worker_connections 512; }}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    server {{
        listen {port};
        listen [::]:{port};
        location / {{ root {directory}; }}
        location = /where {{ return 200 $server_addr; }}
    }}
}}
"""


def start_all(where: Namespace, directory: Path) -> None:
    """All the servers in one namespace, on their PORTS."""
    start_nginx(where, directory)
    start_dnsmasq(where)
    where.spawn(
        f"redis-server --port {PORTS['redis']} --bind '*' -::* --protected-mode no --save '' --loglevel warning"
    )
    where.spawn(f"iperf3 --server --port {PORTS['iperf3']} --logfile /dev/null")
    for port in PORTS.values():
        await_listener(where, port)


def start_nginx(where: Namespace, directory: Path) -> None:
    """Serves PAGE as /page, and tells at /where which of its addresses was called."""
    directory.mkdir(exist_ok=True)
    (directory / "page").write_text(PAGE)
    (directory / "nginx.conf").write_text(_NGINX.format(directory=directory, port=PORTS["http"]))
    where.spawn(f"nginx -e stderr -p {directory} -c {directory}/nginx.conf")


def start_dnsmasq(where: Namespace) -> None:
    """Knows web.test (192.0.2.80, 2001:db8::80) and long.test (TXT), and asks nobody else."""
    where.spawn(
        f"dnsmasq --keep-in-foreground --conf-file=/dev/null --user=root --pid-file= --no-resolv --no-hosts"
        f" --log-facility=- --port={PORTS['dns']} --host-record=web.test,192.0.2.80,2001:db8::80"
        f" --txt-record=long.test,{','.join(LONG_TEXT)}"
    )


def await_listener(where: Namespace, port: int) -> None:
    eventually(lambda: f":{port} " in where.run("ss -Hlnt"), 10)


def url(ip: str, port: int, path: str = "page") -> str:
    return f"http://{f'[{ip}]' if ':' in ip else ip}:{port}/{path}"


def curl(where: Namespace, ip: str, port: int, path: str = "page") -> str:
    return where.run(f"curl --silent --show-error --max-time 10 {url(ip, port, path)}")


def curl_status(where: Namespace, ip: str, port: int) -> int:
    """curl's exit status: 0 for an answer, 7 for a connection that was refused, 28 for silence."""
    with where.entered():
        return subprocess.run(
            ["curl", "--silent", "--max-time", "3", "--output", "/dev/null", url(ip, port)],
            stdin=subprocess.DEVNULL,
            check=False,
            timeout=10,
        ).returncode


def dig(where: Namespace, ip: str, port: int, question: str, *, check: bool = True) -> list[str]:
    """The answers, sorted; `question` may have options of dig."""
    output = where.run(f"dig +short +tries=1 +time=5 @{ip} -p {port} {question}", check=check)
    return sorted(output.splitlines())


def redis(where: Namespace, ip: str, port: int, command: str) -> str:
    return where.run(f"redis-cli -h {ip} -p {port} {command}").strip()


def redis_benchmark(where: Namespace, ip: str, port: int, requests: int) -> dict[str, float]:
    """Requests a second, by command. The program fails if a single request does."""
    output = where.run(f"redis-benchmark -h {ip} -p {port} -n {requests} -c 20 -P 4 -t set,get --csv", timeout=60)
    return {command: float(rate) for command, rate in re.findall(r'^"(\w+)","([\d.]+)"', output, re.MULTILINE)}


def iperf3(server: Namespace, where: Namespace, ip: str, port: int, options: str) -> dict[str, Any]:
    """The `end` of iperf3's report. It takes one client at a time, and between two of them it does not listen."""
    await_listener(server, PORTS["iperf3"])
    output = where.run(f"iperf3 --client {ip} --port {port} --json --connect-timeout 3000 {options}", check=False)
    report = json.loads(output)
    assert "error" not in report, report["error"]
    found: dict[str, Any] = report["end"]
    return found
