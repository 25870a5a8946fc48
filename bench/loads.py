"""What is done to a proxy: loads, and the endpoints they are for.

A `Load` runs one client program against an address for a bounded time and returns a `Work`: what was done, as
counted by the client. All endpoints listen on every address of 127.0.0.0/8, so that each run can have
one of its own and meets no connection of an earlier one in TIME_WAIT. Another load is another class with
`run`, and its endpoint a line in `ENDPOINT_PORTS` and `endpoints`.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import shlex
import subprocess
import typing
from collections.abc import Iterator
from dataclasses import dataclass

from bench.programs import BenchError, Program, is_listening, version

CONNECTIONS = 64

ENDPOINT_PORTS = {"http": 8080, "stream": 5201}
"""What the endpoints serve, and where."""

# One process for one core; no connection ends because of how many requests it has seen. The user is there for
# namespaces that know no other.
_NGINX = """
user root; daemon off; master_process off; pid nginx.pid; error_log stderr;
events { worker_connections 8192; }
http {
    access_log off; keepalive_requests 1000000000; default_type text/plain;
    client_body_temp_path t; proxy_temp_path t; fastcgi_temp_path t; uwsgi_temp_path t; scgi_temp_path t;
    server { listen 8080 backlog=4096; location / { return 200 "ok\n"; } }
}
"""


@dataclass(frozen=True, slots=True)
class Work:
    """What a client got done. Bytes are payload, as they must have gone through the proxy."""

    command: str
    seconds: float
    connections: int
    """At least so many."""
    requests: int
    to_endpoint: int
    to_client: int
    details: dict[str, float]


class Load(typing.Protocol):
    name: str
    serves: str
    """Which of ENDPOINT_PORTS it talks to."""
    title: str

    def run(self, ip: str, port: int, seconds: int) -> Work: ...


class Http:
    """wrk on 64 connections, each with one request under way at any time."""

    serves = "http"

    def __init__(self, name: str, title: str, *, keep_alive: bool) -> None:
        self.name = name
        self.title = title
        self._keep_alive = keep_alive

    def run(self, ip: str, port: int, seconds: int) -> Work:
        script = pathlib.Path(__file__).with_name("wrk.lua").relative_to(pathlib.Path.cwd())
        command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", "-s", str(script)]
        if not self._keep_alive:
            command += ["-H", "Connection: close"]
        command.append(f"http://{ip}:{port}/")
        result = json.loads(_output(command, seconds).splitlines()[-1])
        requests = int(result["requests"])
        if result["errors"] or not requests:
            raise BenchError(f"{' '.join(command)}: {requests} requests, {result['errors']} errors")
        return Work(
            command=shlex.join(command),
            seconds=result["microseconds"] / 1e6,
            connections=CONNECTIONS if self._keep_alive else requests,
            requests=requests,
            to_endpoint=0,  # wrk doesn't count them
            to_client=int(result["bytes"]),
            details={"latency_p50_us": result["p50"], "latency_p99_us": result["p99"]},
        )


class Bulk:
    """iperf3: one connection, one way, as fast as it goes."""

    name = "bulk"
    title = "bulk, 1 stream"
    serves = "stream"

    def run(self, ip: str, port: int, seconds: int) -> Work:
        command = ["iperf3", "-c", ip, "-p", str(port), "-t", str(seconds), "-J"]
        end = json.loads(_output(command, seconds))["end"]
        return Work(
            command=shlex.join(command),
            seconds=end["sum_received"]["seconds"],
            connections=2,
            requests=0,
            to_endpoint=int(end["sum_received"]["bytes"]),
            to_client=0,
            details={},
        )


LOADS: tuple[Load, ...] = (
    Http("keep-alive", f"{CONNECTIONS} keep-alive connections", keep_alive=True),
    Http("connections", "a connection for each request", keep_alive=False),
    Bulk(),
)


@contextlib.contextmanager
def endpoints(folder: pathlib.Path) -> Iterator[None]:
    """The endpoints of all loads, while the context lasts."""
    (folder / "nginx.conf").write_text(_NGINX)
    nginx = ["nginx", "-p", str(folder), "-e", "stderr", "-c", "nginx.conf"]
    with Program(nginx, folder) as web, Program(["iperf3", "-s"], folder) as stream:
        web.wait_until(lambda: is_listening("127.0.0.1", ENDPOINT_PORTS["http"]), "listening")
        stream.wait_until(lambda: is_listening("127.0.0.1", ENDPOINT_PORTS["stream"]), "listening")
        yield


def versions() -> dict[str, str]:
    return {"wrk": version("wrk", "-v"), "nginx": version("nginx", "-v"), "iperf3": version("iperf3", "--version")}


def _output(command: list[str], seconds: int) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 20, check=False)
    except subprocess.TimeoutExpired:
        raise BenchError(f"{' '.join(command)}: not over after {seconds + 20} s") from None
    if done.returncode:
        raise BenchError(f"{' '.join(command)}: exit status {done.returncode}\n{done.stdout[-2000:]}{done.stderr}")
    return done.stdout
