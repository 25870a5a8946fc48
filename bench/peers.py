"""Who is measured: this proxy, HAProxy, and no proxy at all.

A `Peer` is started toward endpoints and then tells where to connect, how much it has used and, by its own
account, how much it has relayed: that is the evidence that a load went through it and nowhere else. Another
peer is another class here and a line in `PEERS`.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.metadata
import json
import pathlib
import re
import shutil
import socket
import sys
import typing
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import userspace_proxy
from bench.programs import Program, version

Address = tuple[str, int]

HEALTH_PORT = 10256
METRICS_PORT = 10249


@dataclass(frozen=True, slots=True)
class Account:
    """What a proxy says it has relayed since it was started."""

    connections: int
    to_endpoint: int
    to_client: int

    def __sub__(self, earlier: Account) -> Account:
        return Account(
            self.connections - earlier.connections,
            self.to_endpoint - earlier.to_endpoint,
            self.to_client - earlier.to_client,
        )


class Running(typing.Protocol):
    """A proxy at work."""

    program: Program

    def address(self, name: str) -> Address:
        """Where clients of the endpoint of this name connect to."""

    def account(self) -> Account: ...


class Peer(typing.Protocol):
    name: str
    version: str

    def start(
        self, endpoints: Mapping[str, Address], folder: pathlib.Path
    ) -> contextlib.AbstractContextManager[Running | None]:
        """A running one, toward these endpoints by name; None where there is no proxy to speak of."""


class Direct:
    """No proxy: what the load generator and the endpoints can do on this machine."""

    name = "direct"
    version = "no proxy"

    @contextlib.contextmanager
    def start(self, endpoints: Mapping[str, Address], folder: pathlib.Path) -> Iterator[None]:
        yield None


class UserspaceProxy:
    """This proxy, from this tree, on the interpreter that runs this."""

    name = "userspace-proxy"

    def __init__(self, place: Sequence[str]) -> None:
        self._place = place
        python, uvloop = sys.version.split()[0], importlib.metadata.version("uvloop")
        self.version = f"{userspace_proxy.__version__} ({_commit()}), Python {python}, uvloop {uvloop}"

    @contextlib.contextmanager
    def start(self, endpoints: Mapping[str, Address], folder: pathlib.Path) -> Iterator[Running]:
        manifest = folder / "services.json"
        items = [item for name, address in endpoints.items() for item in _manifest(name, address)]
        manifest.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
        flags = {
            "--manifests": manifest,
            "--capture": "none",
            "--bind-address": "127.0.0.1",
            "--metrics-bind-address": f"127.0.0.1:{METRICS_PORT}",
            "--healthz-bind-address": f"127.0.0.1:{HEALTH_PORT}",
        }
        command = [*self._place, sys.executable, "-m", "userspace_proxy", *(f"{k}={v}" for k, v in flags.items())]
        with Program(command, folder) as program:
            program.wait_until(lambda: _get(HEALTH_PORT, "/readyz") is not None, "ready")
            yield _RunningUserspaceProxy(program)


class _RunningUserspaceProxy:
    def __init__(self, program: Program) -> None:
        self.program = program
        rows = json.loads(_get(METRICS_PORT, "/services") or "[]")
        self._addresses = {row["name"]: ("127.0.0.1", int(row["proxyPort"])) for row in rows}

    def address(self, name: str) -> Address:
        return self._addresses[name]

    def account(self) -> Account:
        text = _get(METRICS_PORT, "/metrics") or ""

        def total(sample: str) -> int:
            values = re.findall(rf"^userspace_proxy_{sample}.*\}} (\S+)$", text, re.MULTILINE)
            return int(sum(map(float, values)))

        return Account(
            total("sessions_opened_total"),
            total('bytes_total{direction="to_endpoint"'),
            total('bytes_total{direction="to_client"'),
        )


class HAProxy:
    """Debian's HAProxy with one thread, relaying TCP as we do; `splice` lets it use splice(2) as well."""

    _CONFIG = """
global
    nbthread 1
    maxconn 4096
    stats socket {stats} mode 600
defaults
    mode tcp
    timeout connect 5s
    timeout client 60s
    timeout server 60s
{options}
"""
    _LISTEN = """
listen {name}
    bind 127.0.0.1:{port}
    server endpoint {ip}:{endpoint_port}
"""

    def __init__(self, place: Sequence[str], *, splice: bool) -> None:
        self._place = place
        self.name = "haproxy-splice" if splice else "haproxy"
        self.version = version("haproxy", "-v")
        self._options = "    option splice-auto" if splice else ""
        self._first_port = 9180 if splice else 9080

    @contextlib.contextmanager
    def start(self, endpoints: Mapping[str, Address], folder: pathlib.Path) -> Iterator[Running]:
        stats = folder / "haproxy.sock"
        addresses = {name: ("127.0.0.1", port) for port, name in enumerate(endpoints, self._first_port)}
        config = folder / "haproxy.cfg"
        config.write_text(
            self._CONFIG.format(stats=stats, options=self._options)
            + "".join(
                self._LISTEN.format(name=name, port=addresses[name][1], ip=ip, endpoint_port=port)
                for name, (ip, port) in endpoints.items()
            )
        )
        with Program([*self._place, "haproxy", "-db", "-f", str(config)], folder) as program:
            running = _RunningHAProxy(program, stats, addresses)
            program.wait_until(running.is_up, "ready")
            yield running


class _RunningHAProxy:
    def __init__(self, program: Program, stats: pathlib.Path, addresses: Mapping[str, Address]) -> None:
        self.program = program
        self._stats = stats
        self._addresses = addresses

    def is_up(self) -> bool:
        try:
            return bool(self._rows())
        except OSError:
            return False

    def address(self, name: str) -> Address:
        return self._addresses[name]

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


PEERS: Mapping[str, Callable[[Sequence[str]], Peer]] = {
    "userspace-proxy": UserspaceProxy,
    "haproxy": lambda place: HAProxy(place, splice=False),
    "haproxy-splice": lambda place: HAProxy(place, splice=True),
    "direct": lambda _place: Direct(),
}
"""By name. Made of the words that a command begins with to be run where proxies are, and not before they are asked
for, so that nobody needs what is not measured."""


def _manifest(name: str, address: Address) -> list[dict[str, object]]:
    """A Service that nothing captures, and its one endpoint."""
    ip, port = address
    about = {"name": name, "namespace": "bench", "labels": {"kubernetes.io/service-name": name}}
    service = {"clusterIP": f"127.96.0.{port % 250 + 1}", "ports": [{"port": port, "protocol": "TCP"}]}
    return [
        {"apiVersion": "v1", "kind": "Service", "metadata": about, "spec": service},
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": about,
            "addressType": "IPv4",
            "ports": [{"name": "", "port": port, "protocol": "TCP"}],
            "endpoints": [{"addresses": [ip], "conditions": {"ready": True}}],
        },
    ]


def _commit() -> str:
    told = version("git", "describe", "--always", "--dirty") if shutil.which("git") else ""
    return f"commit {told}" if told and not told.startswith("fatal") else "commit unknown"


def _get(port: int, path: str) -> str | None:
    """A page of this proxy, or None while it has none."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return bytes(answer.read()).decode()
    except OSError:  # URLError and HTTPError are among them
        return None
