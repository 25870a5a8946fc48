"""A cluster as small as tests of Services need: a node with two pods, a pod on another node, and a client outside.

The node runs the real command and follows an API server of its own. In each pod and on the node itself an endpoint
(`endpoint.py`) answers on two ports with its name: `one` and `two` are on the node, `far` is on another, `host` is the
node's own network. A test makes a `Service` of its own, with addresses that no other test has.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.apiserver import APIServer
from tests.e2e import programs
from tests.e2e.client import DATAGRAM, connect
from tests.e2e.node import Node, Object, port, service
from tests.netns import Namespace, eventually

ENDPOINT = Path(__file__).with_name("endpoint.py")
STREAM = socket.SOCK_STREAM
KINDS = {"http": STREAM, "udp": DATAGRAM}
"""As the scenarios call them."""
NODE, OTHER_NODE = "node-1", "node-2"
ADDRESSES = {"one": "10.1.0.2", "two": "10.1.0.3", "far": "10.1.9.2", "host": "10.1.0.1"}
ON = {"one": NODE, "two": NODE, "far": OTHER_NODE, "host": NODE}
PORT, OTHER_PORT, API_PORT = 9000, 9001, 6443
REFUSED, SILENT = "refused", "silent"
FLAGS = (
    "--iptables-min-sync-period=0s",
    "--udp-timeout=10s",
    "--cluster-cidr=10.1.0.0/16",
    "--iptables-sync-period=1s",
    "--drain-timeout=500ms",
)


class Cluster:
    def __init__(self, node: Node, api: APIServer) -> None:
        self.node = node
        self.api = api
        self.host = node.net
        self.one, self.two = node.pod(ADDRESSES["one"]), node.pod(ADDRESSES["two"])
        self.far = Namespace()
        node.net.connect(self.far, "10.1.9.1/24", "10.1.9.2/24")
        self.far.run("ip route add default via 10.1.9.1")
        self.outside = node.outside()
        self._numbers = itertools.count(1)
        for name in ADDRESSES:
            for number in (PORT, OTHER_PORT):
                self.place(name).spawn(f"{sys.executable} {ENDPOINT} {name} {number}")
        for name in ADDRESSES:
            for number in (PORT, OTHER_PORT):
                programs.await_listener(self.place(name), number)

    def place(self, name: str) -> Namespace:
        found: Namespace = getattr(self, name)
        return found

    def service(self, **spec: Any) -> Service:
        """A Service that is served by nobody yet; of type LoadBalancer, so that it has every kind of address."""
        made = Service(self, next(self._numbers))
        made.put(**spec)
        return made


@contextlib.contextmanager
def running(directory: Path, capture: str) -> Iterator[Cluster]:
    with Node(directory, capture) as node:
        with node.net.entered():
            api = APIServer(address="0.0.0.0", port=API_PORT)
        node.net.run("sh -c 'echo 0 >/proc/sys/net/ipv4/icmp_ratelimit'")
        node.source = (
            "--master",
            f"http://127.0.0.1:{API_PORT}",
            f"--hostname-override={NODE}",
            f"--state-dir={directory}/state",
        )
        if capture == "local":  # every Service's ingress is an address of the node, and node ports would be on them all
            node.source = (*node.source, "--nodeport-addresses=10.1.0.0/16,127.0.0.0/8")
        with api:
            api.put(node_object())
            cluster = Cluster(node, api)
            try:
                node.start(*FLAGS)
                yield cluster
            finally:
                cluster.far.close()


def node_object(zone: str = "zone-a", **metadata: Any) -> Object:
    labels = {"topology.kubernetes.io/zone": zone}
    return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE, "labels": labels, **metadata}}


def endpoint(
    name: str,
    *,
    ready: bool = True,
    serving: bool | None = None,
    terminating: bool = False,
    zone: str = "",
    hints: Sequence[str] = (),
) -> Object:
    conditions = {"ready": ready, "serving": ready if serving is None else serving, "terminating": terminating}
    found: Object = {"addresses": [ADDRESSES[name]], "conditions": conditions, "nodeName": ON[name]}
    if zone:
        found["zone"] = zone
    if hints:
        found["hints"] = {"forZones": [{"name": hint} for hint in hints]}
    return found


def terminating(name: str) -> Object:
    return endpoint(name, ready=False, serving=True, terminating=True)


class Service:
    def __init__(self, cluster: Cluster, number: int) -> None:
        self.name = f"web-{number}"
        self.ip = f"10.96.1.{number}"
        self.ingress = f"192.0.2.{number}"
        self.external = f"198.51.100.{number}"
        self.node_port = 30000 + number
        self._cluster = cluster
        self._slices: set[str] = set()

    @property
    def ports(self) -> list[Object]:
        return [
            port(80, name="http", node_port=self.node_port),
            port(80, name="udp", protocol="UDP", node_port=self.node_port),
        ]

    def put(
        self, *, ports: Sequence[Object] | None = None, labels: Mapping[str, str] | None = None, **spec: Any
    ) -> None:
        value = service(
            self.name, self.ip, list(self.ports if ports is None else ports), ingress=[self.ingress], **spec
        )
        value["metadata"]["labels"] = dict(labels or {})
        self._cluster.node.own(self.ingress)
        self._cluster.api.put(value)

    def served_by(
        self,
        *endpoints: str | Object,
        target: int = PORT,
        slice_name: str = "",
        ports: Mapping[str, int] | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """Make these the endpoints of a slice, for both ports unless told otherwise."""
        numbers = {"http": target, "udp": target} if ports is None else ports
        self._slices.add(slice_name)
        self._cluster.api.put(
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {
                    "name": f"{self.name}-{slice_name or 'a'}",
                    "namespace": "default",
                    "labels": {"kubernetes.io/service-name": self.name, **(labels or {})},
                },
                "addressType": "IPv4",
                "ports": [
                    {"name": name, "port": number, "protocol": "UDP" if name.startswith("udp") else "TCP"}
                    for name, number in numbers.items()
                ],
                "endpoints": [endpoint(each) if isinstance(each, str) else each for each in endpoints],
            }
        )

    def delete(self) -> None:
        self._cluster.api.delete(service(self.name, self.ip, []))


def met(client: Namespace, ip: str, number: int = 80, kind: int = STREAM, timeout: float = 0.3) -> str:
    """The endpoint that answers a new client, or how it is not answered."""
    try:
        with connect(client, ip, number, kind, timeout) as sock:
            sock.send(b"hi")
            return sock.recv(100).decode().partition(":")[0]
    except ConnectionRefusedError:
        return REFUSED
    except TimeoutError:
        return SILENT
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def reaches(client: Namespace, ip: str, *names: str, number: int = 80, kind: int = STREAM) -> None:
    """Wait until new clients meet these endpoints, all of them and no others."""
    wanted = set(names)
    clients, patience = (
        (1, 0.3) if names == (SILENT,) else (2 * len(wanted), 0.1)
    )  # who comes too early is not answered
    eventually(lambda: {met(client, ip, number, kind, patience) for _ in range(clients)} == wanted, 20)


def lives(client: Namespace, ip: str, number: int = 80, kind: int = STREAM) -> bool:
    return met(client, ip, number, kind) in ADDRESSES
