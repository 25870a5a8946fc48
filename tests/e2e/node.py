"""A node of its own: a network namespace in which the real command runs, and pods beside it.

    with Node(tmp_path) as node:
        node.apply(service("web", "10.96.0.10", [port(80, node_port=30080)]), endpoints("web", ["10.1.0.2:8080"]))
        node.start()
        pod = node.pod("10.1.0.2")
        pod.run("curl -s http://10.96.0.10/")

The proxy is the command as users run it, a process with flags, signals and an exit status; what it says is read
from its log and its HTTP pages. Cluster IPs exist only inside these namespaces.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.netns import Namespace, eventually

Object = dict[str, Any]


def port(number: int, *, name: str = "", protocol: str = "TCP", node_port: int = 0) -> Object:
    found: Object = {"port": number, "name": name, "protocol": protocol}
    if node_port:
        found["nodePort"] = node_port
    return found


def service(
    name: str, ips: str | list[str], ports: list[Object], *, ingress: Sequence[str] = (), **spec: Any
) -> Object:
    """A Service; `ips` is its cluster IP, or one of each family, and `ingress` are the load balancer's."""
    ips = [ips] if isinstance(ips, str) else ips
    kind = "LoadBalancer" if ingress else "NodePort" if any("nodePort" in p for p in ports) else "ClusterIP"
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"type": kind, "clusterIP": ips[0], "clusterIPs": ips, "ports": ports, **spec},
        "status": {"loadBalancer": {"ingress": [{"ip": ip} for ip in ingress]}},
    }


def endpoints(
    name: str, addresses: list[str], *, port_name: str = "", protocol: str = "TCP", ready: bool = True
) -> Object:
    """An EndpointSlice of `ip:port` addresses, which must agree on port and family; with `[...]` for IPv6."""
    pairs = [address.rpartition(":") for address in addresses]
    ipv6 = bool(pairs) and pairs[0][0].startswith("[")
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": f"{name}-{port_name or 'x'}-{protocol.lower()}-{'v6' if ipv6 else 'v4'}",
            "namespace": "default",
            "labels": {"kubernetes.io/service-name": name},
        },
        "addressType": "IPv6" if ipv6 else "IPv4",
        "endpoints": [{"addresses": [ip.strip("[]")], "conditions": {"ready": ready}} for ip, _, _ in pairs],
        "ports": [
            {"name": port_name, "port": int(number), "protocol": protocol} for number in {p for _, _, p in pairs}
        ],
    }


class Node:
    """The node's namespace is `net`; `start` may be called again after the proxy has ended."""

    def __init__(
        self,
        directory: Path,
        capture: str = "auto",
        *,
        address: str = "10.1.0.1/24",
        address6: str = "fd01::1/64",
    ) -> None:
        self.net = Namespace()
        self.capture = capture
        self.manifests = directory / "manifests"
        self.manifests.mkdir(exist_ok=True)
        self.source: Sequence[str] = ("--manifests", str(self.manifests))
        """The flags that tell where Services come from."""
        self._directory = directory
        self._pods: list[Namespace] = []
        self._outside: list[Namespace] = []
        self._runs = 0
        self.process: subprocess.Popen[str] | None = None
        self.log_file = directory / "log"
        self._addresses = (address, address6)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if value is not None and self.log_file.exists():
            sys.stderr.write(self.log_file.read_text())
        for other in (*self._pods, *self._outside):
            other.close()
        self.net.close()

    # -- what is around the proxy

    def pod(self, *addresses: str) -> Namespace:
        """A namespace behind the node's bridge, whose way out is the node; addresses without masks."""
        if not self._pods:
            self.net.run("ip link add br0 type bridge")
            for address in self._addresses:
                self.net.add_address("br0", address)
            self.net.run("ip link set br0 up")
            for setting in ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"):
                self.net.run(f"sh -c 'echo 1 > /proc/sys/{setting}'")
        pod = Namespace()
        self._pods.append(pod)
        here, there = self.net.connect(pod)
        self.net.run(f"ip link set {here} master br0")
        for address in addresses:
            family, gateway = (6, self._addresses[1]) if ":" in address else (4, self._addresses[0])
            ip, _, mask = gateway.partition("/")
            pod.add_address(there, f"{address}/{mask}")
            pod.run(f"ip -{family} route add default via {ip}")
        return pod

    def outside(self) -> Namespace:
        """A host of another network, behind a veth pair of its own, that sends everything to the node."""
        host = Namespace()
        self._outside.append(host)
        number = len(self._outside)
        network, network6 = f"10.{number + 1}.0", f"fd{number + 1:02}:"
        self.net.connect(host, f"{network}.1/24", f"{network}.2/24", f"{network6}:1/64", f"{network6}:2/64")
        host.run(f"ip route add default via {network}.1")
        host.run(f"ip -6 route add default via {network6}:1")
        return host

    def own(self, *ips: str) -> None:
        """Have these external IPs: where nothing is redirected, none are taken that are not the node's."""
        for ip in ips if self.capture == "local" else ():
            self.net.run(f"ip addr replace {ip}/{'128' if ':' in ip else '32'} dev lo")

    def apply(self, *objects: Object, file: str = "all") -> None:
        """Make these the content of one manifest file, in one rename."""
        new = self.manifests / f".{file}.new"
        new.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)}))
        new.rename(self.manifests / f"{file}.json")

    # -- the proxy

    def start(self, *flags: str, wait: bool = True, limit: int = 0) -> None:
        """Start the command and wait until it is ready; `limit` is for its descriptors."""
        self._runs += 1
        self.log_file = self._directory / f"log{self._runs}"
        command = [sys.executable, "-m", "userspace_proxy", *self.source, f"--capture={self.capture}", *flags]
        if limit:
            command = ["prlimit", f"--nofile={limit}:{limit}", *command]
        with self.net.entered(), self.log_file.open("w") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, "PYTHONWARNINGS": "error"},
            )
        if wait:
            eventually(self.is_ready, 90)

    def is_ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"{self.process.returncode}: {self.log()}"
        return self.get("/readyz", 10256) == "ok"

    def get(self, path: str, number: int = 10249) -> str:
        """Without a program of its own for each look: those take what a guest with one slow CPU needs to get ready."""
        connection = http.client.HTTPConnection("127.0.0.1", number, timeout=5)
        with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
            with self.net.entered():
                connection.request("GET", path)
            return connection.getresponse().read().decode()
        return ""

    def rows(self) -> dict[str, Object]:
        """The service ports by `name` or `name:port`, as /services tells; of both families the last."""
        return {row["name"] + (row["port"] and f":{row['port']}"): row for row in self.services()}

    def services(self) -> list[Object]:
        found: list[Object] = json.loads(self.get("/services"))
        return found

    def log(self) -> str:
        return self.log_file.read_text()

    def stop(self, number: int = signal.SIGTERM, timeout: float = 20) -> int:
        """Signal the proxy and wait for its end; its exit status."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(timeout)

    def cleanup(self) -> subprocess.CompletedProcess[str]:
        with self.net.entered():
            return subprocess.run(
                [sys.executable, "-m", "userspace_proxy", "--cleanup"],
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )

    # -- what the kernel holds

    def rules(self) -> str:
        """All legacy rules of both families, without counters."""
        tables = [
            self.net.run(f"{tool} -t {table}")
            for tool in ("iptables-legacy-save", "ip6tables-legacy-save")
            for table in ("nat", "filter")
        ]
        return "\n".join(line for text in tables for line in text.splitlines() if not line.startswith(("#", ":")))

    def captured(self) -> str:
        """All that the capture has put there, in the words of the programs that list it."""
        match self.capture:
            case "nftables":
                return self.net.run("nft list ruleset")
            case "local":
                return "".join(self.net.run(f"ip -{family} route show table all proto 117") for family in "46")
        return self.rules()

    def captures(self, ip: str, number: int = 0, protocol: str = "tcp") -> bool:
        """Whether clients of this address are captured now, or those of one port there."""
        ip = re.escape(ip)
        patterns = {
            "iptables": rf"-d {ip}/\d+ " + (rf"-p {protocol} .*--dport {number} " if number else ""),
            "nftables": rf"\b{ip} \. " + (rf"{protocol} \. {number} " if number else ""),
            "local": rf"^{protocol} .* \[?{ip}\]?(%\w+)?:{number} " if number else rf"^local {ip} ",
        }
        listed = self.net.run("ss -Hlntu") if self.capture == "local" and number else self.captured()
        return re.search(patterns[self.capture], listed, re.MULTILINE) is not None

    def descriptors(self) -> int:
        assert self.process is not None
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def conntrack(self) -> str:
        with contextlib.suppress(AssertionError):
            return self.net.run("conntrack -L")
        return ""
