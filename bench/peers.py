"""Who is measured: what a peer is, this proxy, and no proxy at all.

A `Peer` is started before services and then tells where to connect, how much it has used and, where it counts,
how much it has relayed: that is the evidence that a load went through it and nowhere else. Other people's
proxies are in `others`, and who is measured under what in `plan`.
"""

from __future__ import annotations

import contextlib
import enum
import importlib.metadata
import json
import pathlib
import re
import shutil
import subprocess
import sys
import typing
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import userspace_proxy
from bench.programs import Address, BenchError, Program, version
from bench.results import OURS
from bench.services import Service

METRICS_PORT = 10249


class Way(enum.StrEnum):
    """Which way clients come to a proxy."""

    STRAIGHT = "straight"
    """To its own port."""
    CLUSTER = "cluster IP"
    """To a cluster IP, by a rule of iptables."""


@dataclass(frozen=True, slots=True)
class Account:
    """What a proxy says it has relayed since it was started."""

    connections: int
    to_endpoint: int
    to_client: int
    """In bytes."""

    def __sub__(self, earlier: Account) -> Account:
        return Account(
            self.connections - earlier.connections,
            self.to_endpoint - earlier.to_endpoint,
            self.to_client - earlier.to_client,
        )


class Running(typing.Protocol):
    """A proxy at work."""

    def program(self, service: str) -> Program | None:
        """What does the work of a service; None where it is nobody but the kernel."""

    def address(self, service: str) -> Address:
        """Where clients of the service connect to."""

    def own_port(self, service: str) -> int | None:
        """The port its own clients connect to or are led to."""

    def account(self) -> Account | None:
        """None if it doesn't count."""


class Peer(typing.Protocol):
    name: str

    def version(self) -> str: ...

    def start(
        self, services: Mapping[str, Service], way: Way, folder: pathlib.Path
    ) -> contextlib.AbstractContextManager[Running]: ...


class Direct:
    """No proxy: what client and endpoint can do on this machine; to a cluster IP, the kernel translates."""

    name = "direct"

    def version(self) -> str:
        return "no proxy"

    @contextlib.contextmanager
    def start(self, services: Mapping[str, Service], way: Way, folder: pathlib.Path) -> Iterator[Running]:
        if way is Way.CLUSTER:
            for service in services.values():
                ip, port = service.endpoints[0]
                redirect(service, "DNAT", "--to-destination", f"{ip}:{port}")
        yield _NoProxy({name: entrance(service, way, service.endpoints[0]) for name, service in services.items()})


class _NoProxy:
    def __init__(self, addresses: Mapping[str, Address]) -> None:
        self._addresses = addresses

    def program(self, service: str) -> None:
        return None

    def address(self, service: str) -> Address:
        return self._addresses[service]

    def own_port(self, service: str) -> None:
        return None

    def account(self) -> None:
        return None


class UserspaceProxy:
    """This proxy, from this tree, on the interpreter that runs this.

    One with other flags has another name, and another port for its pages. Two cannot capture side by side.
    """

    def __init__(
        self,
        place: Sequence[str],
        *,
        name: str = OURS,
        flags: Sequence[str] = (),
        metrics_port: int = METRICS_PORT,
        capture: str = "iptables",
    ) -> None:
        """`capture` is for clients that come by cluster IPs."""
        self.name = name
        self._capture = capture
        self._place = place
        self._flags = flags
        self._metrics_port = metrics_port

    def version(self) -> str:
        python, uvloop = sys.version.split()[0], importlib.metadata.version("uvloop")
        return f"{userspace_proxy.__version__} ({_commit()}), Python {python}, uvloop {uvloop}"

    @contextlib.contextmanager
    def start(self, services: Mapping[str, Service], way: Way, folder: pathlib.Path) -> Iterator[Running]:
        manifest = folder / "services.json"
        write_manifest(manifest, [item for service in services.values() for item in objects(service)])
        with self.serve(manifest, way, folder) as program:
            program.wait_until(self.is_ready, "ready")
            yield _RunningUserspaceProxy(program, services, way, self._metrics_port)

    def serve(self, manifests: pathlib.Path, way: Way, folder: pathlib.Path) -> Program:
        """The command, started and not waited for."""
        # A proxy port that only loopback has cannot be captured, one that nobody captures need not be seen.
        capture, bind = (self._capture, "0.0.0.0") if way is Way.CLUSTER else ("none", "127.0.0.1")
        flags = {
            "--manifests": manifests,
            "--capture": capture,
            "--bind-address": bind,
            "--metrics-bind-address": f"127.0.0.1:{self._metrics_port}",
            "--healthz-bind-address": f"127.0.0.1:{self._metrics_port + 1}",
        }
        words = (*(f"{flag}={value}" for flag, value in flags.items()), *self._flags)
        return Program([*self._place, sys.executable, "-m", "userspace_proxy", *words], folder)

    def is_ready(self) -> bool:
        return _get(self._metrics_port + 1, "/readyz") is not None


class _RunningUserspaceProxy:
    def __init__(self, program: Program, services: Mapping[str, Service], way: Way, metrics_port: int) -> None:
        self._program = program
        self._metrics_port = metrics_port
        rows = json.loads(_get(metrics_port, "/services") or "[]")
        self._ports = {row["name"].rpartition("/")[2]: int(row["proxyPort"]) for row in rows}
        self._addresses = {
            name: entrance(service, way, ("127.0.0.1", self._ports[name])) for name, service in services.items()
        }

    def program(self, service: str) -> Program:
        return self._program

    def address(self, service: str) -> Address:
        return self._addresses[service]

    def own_port(self, service: str) -> int:
        return self._ports[service]

    def account(self) -> Account:
        text = _get(self._metrics_port, "/metrics") or ""

        def total(sample: str) -> int:
            values = re.findall(rf"^userspace_proxy_{sample}.*\}} (\S+)$", text, re.MULTILINE)
            return int(sum(map(float, values)))

        return Account(
            total("sessions_opened_total"),
            total('bytes_total{direction="to_endpoint"'),
            total('bytes_total{direction="to_client"'),
        )


def _get(port: int, path: str) -> str | None:
    """A page of this proxy, or None while it has none."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return bytes(answer.read()).decode()
    except OSError:  # URLError and HTTPError are among them
        return None


def entrance(service: Service, way: Way, own: Address) -> Address:
    return service.cluster if way is Way.CLUSTER else own


def redirect(service: Service, *target: str) -> None:
    """Lead clients of the cluster IP to a target of the nat table. The rule goes with the namespace."""
    ip, port = service.cluster
    rule = ["-d", ip, "-p", service.protocol, "--dport", str(port), "-j", *target]
    command = ["iptables-legacy", "-w", "-t", "nat", "-A", "OUTPUT", *rule]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"{' '.join(command)}: {done.stderr}")


def objects(service: Service) -> Iterator[Mapping[str, object]]:
    """A Service and its EndpointSlices, one for each port number that its endpoints have."""
    ip, port = service.cluster
    about = {"name": service.name, "namespace": "bench", "labels": {"kubernetes.io/service-name": service.name}}
    protocol = service.protocol.upper()
    yield {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": about,
        "spec": {"clusterIP": ip, "ports": [{"port": port, "protocol": protocol}]},
    }
    for number in sorted({endpoint[1] for endpoint in service.endpoints}):
        yield {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": about | {"name": f"{service.name}-{number}"},
            "addressType": "IPv4",
            "ports": [{"name": "", "port": number, "protocol": protocol}],
            "endpoints": [
                {"addresses": [address], "conditions": {"ready": True}}
                for address, its_port in service.endpoints
                if its_port == number
            ],
        }


def write_manifest(path: pathlib.Path, items: Sequence[Mapping[str, object]]) -> None:
    """In one rename, as editors and tools do."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
    new.rename(path)


def _commit() -> str:
    told = version("git", "describe", "--always", "--dirty") if shutil.which("git") else ""
    return f"commit {told}" if told and not told.startswith("fatal") else "commit unknown"
