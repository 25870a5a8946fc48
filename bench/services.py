"""What the proxies are put before: services by name, and their endpoints at work.

Each service has a cluster IP at which nobody listens, so that an answer from there has come through a proxy.
Endpoints that speak TCP listen on all of 127.0.0.0/8, so that each peer can have addresses of its own. Two
endpoints are dead: one refuses, one says nothing at all, because its listen queue is full. Another
service is another line in `services`, and what serves it one in `endpoints`.
"""

from __future__ import annotations

import contextlib
import pathlib
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from bench.programs import Address, Program, is_answering, is_listening, version

HTTP, STREAM, ECHO, DNS = 8080, 5201, 7007, 5300
REFUSING: Address = ("127.0.0.2", 8081)
SILENT: Address = ("127.0.0.3", 8082)
BODIES = (64, 1024, 16 * 1024, 128 * 1024)
"""Sizes of answers that the HTTP endpoint has under /<size>; / is three bytes."""


@dataclass(frozen=True, slots=True)
class Service:
    name: str
    protocol: str
    """tcp or udp"""
    cluster: Address
    """Its cluster IP and port."""
    endpoints: tuple[Address, ...]


def services(place: int) -> Mapping[str, Service]:
    """The services as the peer at this place of the list has them."""
    web = [(f"127.1.{place}.{number}", HTTP) for number in range(1, 5)]
    found: dict[str, tuple[str, list[Address]]] = {
        "http": ("tcp", web[:1]),
        "four": ("tcp", web),
        "refusing": ("tcp", [*web[:3], REFUSING]),
        "silent": ("tcp", [*web[:3], SILENT]),
        "stream": ("tcp", [(f"127.1.{place}.1", STREAM)]),
        "echo": ("udp", [("127.0.0.1", ECHO)]),
        "dns": ("udp", [("127.0.0.1", DNS)]),
    }
    return {
        name: Service(name, protocol, (f"127.96.{place}.{number}", 80), tuple(endpoints))
        for number, (name, (protocol, endpoints)) in enumerate(found.items(), 1)
    }


# One process for one core; no connection ends because of how many requests it has seen, or how long it waits. The
# user is there for namespaces that know no other.
_NGINX = f"""
user root; daemon off; master_process off; pid nginx.pid; error_log stderr crit;
events {{ worker_connections 18000; }}
http {{
    access_log off; keepalive_requests 1000000000; keepalive_timeout 1h; default_type text/plain;
    sendfile on; tcp_nopush off; open_file_cache max=16;
    client_body_temp_path t; proxy_temp_path t; fastcgi_temp_path t; uwsgi_temp_path t; scgi_temp_path t;
    server {{
        listen {HTTP} backlog=4096;
        location = / {{ return 200 "ok\\n"; }}
        location = /where {{ return 200 "$server_addr\\n"; }}
        location / {{ root .; }}
    }}
}}
"""
_NSD = f"""
server:
    ip-address: 127.0.0.1@{DNS}
    username: ""
    zonesdir: "{{folder}}"
    pidfile: ""
    database: ""
    xfrdfile: "{{folder}}/xfrd.state"
    zonelistfile: "{{folder}}/zone.list"
    rrl-ratelimit: 0
    server-count: 1
remote-control:
    control-enable: no
zone:
    name: bench
    zonefile: bench.zone
"""
_ZONE = """$ORIGIN bench.
$TTL 60
@ IN SOA ns hostmaster 1 3600 600 86400 60
@ IN NS ns
@ IN TXT "ok"
ns IN A 192.0.2.1
www IN A 192.0.2.80
"""


@contextlib.contextmanager
def endpoints(folder: pathlib.Path) -> Iterator[None]:
    """The endpoints of all services, while the context lasts."""
    for size in BODIES:
        (folder / str(size)).write_bytes(b"x" * size)
    (folder / "nginx.conf").write_text(_NGINX)
    (folder / "nsd.conf").write_text(_NSD.format(folder=folder))
    (folder / "bench.zone").write_text(_ZONE)
    with contextlib.ExitStack() as stack:
        web, stream, echo, dns = (
            stack.enter_context(Program(command, folder))
            for command in (
                ["nginx", "-p", str(folder), "-e", "stderr", "-c", "nginx.conf"],
                ["iperf3", "-s"],
                [sys.executable, "-m", "bench.clients.echo", str(ECHO)],
                ["nsd", "-d", "-c", str(folder / "nsd.conf")],
            )
        )
        stack.enter_context(_silent_endpoint())
        web.wait_until(lambda: is_listening(("127.0.0.1", HTTP)), "listening")
        stream.wait_until(lambda: is_listening(("127.0.0.1", STREAM)), "listening")
        echo.wait_until(lambda: is_answering(("127.0.0.1", ECHO)), "answering")
        dns.wait_until(lambda: is_answering(("127.0.0.1", DNS)), "answering")
        yield


@contextlib.contextmanager
def _silent_endpoint() -> Iterator[None]:
    """A black hole without a rule: Linux drops a SYN, and every repetition, while the listen queue is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(SILENT)
        listener.listen(0)
        for _ in range(8):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(SILENT)
        yield


def versions() -> dict[str, str]:
    return {
        "nginx": version("nginx", "-v"),
        "iperf3": version("iperf3", "--version"),
        "nsd": version("nsd", "-v"),
    }
