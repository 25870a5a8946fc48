"""Other people's proxies: HAProxy, nginx, and any command that listens at a port.

What they all share is `Configured`: ports of their own, counted up, and rules like ours where clients come by
cluster IPs. Defaults are theirs, except for what a fair comparison needs: room for the connections, and a
time-out after which they give up an endpoint that says nothing.
"""

from __future__ import annotations

import contextlib
import csv
import os
import pathlib
import re
import shlex
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence

from bench.peers import Account, Running, Way, entrance, redirect
from bench.programs import Address, BenchError, Program, is_answering, is_listening, version
from bench.services import Service

COMMAND_PREFIX = "BENCH_PEER_"
"""Environment variables of this beginning are peers: commands in which `FILLED` are replaced, in braces."""
FILLED = ("ip", "port", "endpoint_ip", "endpoint_port")
_BRACES = re.compile(r"(?<!\$)\{(\w+)\}")
"""Not a shell's ${variable}, and not the braces of other languages."""


class Ports:
    """Who listens where, and where that leads clients: most of a `Running`."""

    def __init__(self, services: Mapping[str, Service], way: Way, first_port: int) -> None:
        self.services = services
        self._ports = {name: port for port, name in enumerate(services, first_port)}
        self._way = way
        if way is Way.CLUSTER:
            for name, service in services.items():
                redirect(service, "REDIRECT", "--to-ports", str(self._ports[name]))

    def own_port(self, service: str) -> int:
        return self._ports[service]

    def address(self, service: str) -> Address:
        return entrance(self.services[service], self._way, ("127.0.0.1", self._ports[service]))

    def is_up(self) -> bool:
        """Whether each TCP port is listened on, and each UDP service answered."""
        return all(
            (is_listening if service.protocol == "tcp" else is_answering)(("127.0.0.1", self._ports[name]))
            for name, service in self.services.items()
        )


class HAProxy:
    """Debian's HAProxy, relaying TCP as we do; `splice` lets it use splice(2) as well."""

    _CONFIG = """
global
    nbthread {threads}
    maxconn 9000
    maxpipes 256
    stats socket {stats} mode 600
defaults
    mode tcp
    timeout connect 250ms
    timeout client 10m
    timeout server 10m
    retries 3
    option redispatch 1
{options}
"""
    _LISTEN = """
listen {name}
    bind 127.0.0.1:{port}
    balance roundrobin
"""

    def __init__(self, name: str, place: Sequence[str], first_port: int, *, threads: int = 1, splice: bool = False):
        self.name = name
        self._place = place
        self._first_port = first_port
        self._threads = threads
        self._options = "    option splice-auto" if splice else ""

    def version(self) -> str:
        return version("haproxy", "-v")

    @contextlib.contextmanager
    def start(self, services: Mapping[str, Service], way: Way, folder: pathlib.Path) -> Iterator[Running]:
        services = {name: service for name, service in services.items() if service.protocol == "tcp"}
        ports = Ports(services, way, self._first_port)
        stats, config = folder / "haproxy.sock", folder / "haproxy.cfg"
        text = self._CONFIG.format(threads=self._threads, stats=stats, options=self._options)
        config.write_text(text + "".join(self._listen(service, ports) for service in services.values()))
        with Program([*self._place, "haproxy", "-db", "-f", str(config)], folder) as program:
            program.wait_until(lambda: stats.exists() and ports.is_up(), "listening")
            yield _RunningHAProxy(program, ports, stats)

    def _listen(self, service: Service, ports: Ports) -> str:
        # With health checks where there is somewhere else to go, as one would: it ejects no endpoint otherwise.
        check = " check inter 500ms fall 2" if len(service.endpoints) > 1 else ""
        servers = (f"    server s{n} {ip}:{port}{check}\n" for n, (ip, port) in enumerate(service.endpoints))
        return self._LISTEN.format(name=service.name, port=ports.own_port(service.name)) + "".join(servers)


class _RunningHAProxy:
    def __init__(self, program: Program, ports: Ports, stats: pathlib.Path) -> None:
        self._program = program
        self._stats = stats
        self.address = ports.address
        self.own_port = ports.own_port

    def program(self, service: str) -> Program:
        return self._program

    def account(self) -> Account:
        rows = self._rows()
        return Account(*(sum(int(row[column]) for row in rows) for column in ("stot", "bin", "bout")))

    def _rows(self) -> list[dict[str, str]]:
        """What its frontends count."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(5)
            sock.connect(str(self._stats))
            sock.sendall(b"show stat -1 1 -1\n")
            with sock.makefile() as answer:
                return list(csv.DictReader(answer.read().removeprefix("# ").splitlines()))


class Nginx:
    """Debian's nginx and its stream module, one process, TCP and UDP."""

    name = "nginx"
    _CONFIG = """
load_module /usr/lib/nginx/modules/ngx_stream_module.so;
user root; daemon off; master_process off; pid nginx-stream.pid; error_log stderr crit;
events {{ worker_connections 40000; }}
stream {{
    proxy_connect_timeout 250ms;
{servers}
}}
"""
    _SERVER = """
    upstream {name} {{ {endpoints} }}
    server {{ listen 127.0.0.1:{port} {listen}; proxy_pass {name}; {options} }}
"""

    def __init__(self, place: Sequence[str], first_port: int) -> None:
        self._place = place
        self._first_port = first_port

    def version(self) -> str:
        return version("nginx", "-v")

    @contextlib.contextmanager
    def start(self, services: Mapping[str, Service], way: Way, folder: pathlib.Path) -> Iterator[Running]:
        ports = Ports(services, way, self._first_port)
        config = folder / "nginx-stream.conf"
        servers = "".join(self._server(service, ports) for service in services.values())
        config.write_text(self._CONFIG.format(servers=servers))
        command = [*self._place, "nginx", "-p", str(folder), "-e", "stderr", "-c", str(config)]
        with Program(command, folder) as program:
            program.wait_until(ports.is_up, "listening")
            yield _RunningCommand(dict.fromkeys(services, program), ports)

    def _server(self, service: Service, ports: Ports) -> str:
        # By default each flow is kept for ten minutes. Timers are up to 300 ms off: less would end flows in use.
        options = {
            "tcp": ("backlog=4096", "proxy_timeout 10m;"),
            "udp": ("udp", "proxy_timeout 500ms;"),
        }
        listen, more = options[service.protocol]
        endpoints = " ".join(f"server {ip}:{port};" for ip, port in service.endpoints)
        port = ports.own_port(service.name)
        return self._SERVER.format(name=service.name, endpoints=endpoints, port=port, listen=listen, options=more)


class Command:
    """Any command that listens on a port and relays to one endpoint; one for each TCP service that has one."""

    def __init__(self, name: str, command: str, place: Sequence[str], first_port: int) -> None:
        """Raises BenchError for what is no command."""
        self.name = name
        self._command = _split(name, command)
        self._place = place
        self._first_port = first_port

    def version(self) -> str:
        program = self._command[0]
        for flag in ("-V", "--version"):
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                told = version(program, flag)
                if any(map(str.isdigit, told)):
                    return told
        return program

    @contextlib.contextmanager
    def start(self, services: Mapping[str, Service], way: Way, folder: pathlib.Path) -> Iterator[Running]:
        services = {n: s for n, s in services.items() if s.protocol == "tcp" and len(s.endpoints) == 1}
        ports = Ports(services, way, self._first_port)
        with contextlib.ExitStack() as stack:
            programs = {
                name: stack.enter_context(Program(self._words(service, ports.own_port(name)), folder))
                for name, service in services.items()
            }
            for program in programs.values():
                program.wait_until(ports.is_up, "listening")
            yield _RunningCommand(programs, ports)

    def _words(self, service: Service, port: int) -> list[str]:
        values = dict(zip(FILLED, ("127.0.0.1", port, *service.endpoints[0]), strict=True))
        return [*self._place, *(_BRACES.sub(lambda found: str(values[found[1]]), word) for word in self._command)]


def _split(name: str, command: str) -> list[str]:
    allowed = ", ".join(f"{{{each}}}" for each in FILLED)
    unknown = sorted({found[0] for found in _BRACES.finditer(command) if found[1] not in FILLED})
    if unknown:
        raise BenchError(f"{name}: {', '.join(unknown)} in its command is not known; what is replaced is {allowed}")
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise BenchError(f"{name}: its command cannot be split into words: {error}") from None
    if not words:
        raise BenchError(f"{name}: its command is empty; give one that listens on a port, with {allowed}")
    return words


class _RunningCommand:
    """What counts nothing: that the port is its own must do."""

    def __init__(self, programs: Mapping[str, Program], ports: Ports) -> None:
        self._programs = programs
        self.address = ports.address
        self.own_port = ports.own_port

    def program(self, service: str) -> Program:
        return self._programs[service]

    def account(self) -> None:
        return None


SOCAT = "socat TCP-LISTEN:{port},bind={ip},fork,backlog=4096,nodelay TCP:{endpoint_ip}:{endpoint_port},nodelay"


def from_environment() -> dict[str, str]:
    """Commands by the names of their variables, in lower case with dashes."""
    return {
        variable.removeprefix(COMMAND_PREFIX).lower().replace("_", "-"): command
        for variable, command in os.environ.items()
        if variable.startswith(COMMAND_PREFIX)
    }
