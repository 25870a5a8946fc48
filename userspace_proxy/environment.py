"""The environment variables that a container finds the Services in force by, as the kubelet sets them for a pod.

Each Service gives its cluster IP and ports twice: as `{NAME}_SERVICE_HOST` and `{NAME}_SERVICE_PORT`, and as the links
of Docker did. A pod sees the Services of its own namespace, and the API server's. Where Services come from is in
`sources`; how the text gets to a shell is in `cli`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping

from userspace_proxy.model import ServicePort, ServicePortName, join_host_port

_API_SERVER = ("default", "kubernetes")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def exports(services: Mapping[ServicePortName, ServicePort], namespace: str) -> str:
    """Lines for a shell's `eval`, in the order of the Services' names and their ports."""
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables(services, namespace).items())


def variables(services: Mapping[ServicePortName, ServicePort], namespace: str) -> dict[str, str]:
    """By name. Names that no shell takes, as of a Service that begins with a digit, are left out."""
    ports: dict[str, list[tuple[str, ServicePort]]] = {}
    for name, port in services.items():
        if name.namespace == namespace and port.cluster_ips:
            ports.setdefault(name.name, []).append((name.port, port))
    if _API_SERVER[1] not in ports:
        everywhere = [(n.port, port) for n, port in services.items() if (n.namespace, n.name) == _API_SERVER]
        ports.update({_API_SERVER[1]: everywhere} if everywhere else {})
    found = {key: value for name in sorted(ports) for key, value in _of_service(name, ports[name])}
    return {key: value for key, value in found.items() if _VARIABLE.fullmatch(key)}


def _of_service(name: str, ports: list[tuple[str, ServicePort]]) -> Iterator[tuple[str, str]]:
    prefix = _spelled(name)
    _, first = ports[0]
    yield f"{prefix}_SERVICE_HOST", first.cluster_ips[0]
    yield f"{prefix}_SERVICE_PORT", str(first.port)
    for port_name, port in ports:
        if port_name:
            yield f"{prefix}_SERVICE_PORT_{_spelled(port_name)}", str(port.port)
    yield f"{prefix}_PORT", _url(first)
    for _, port in ports:
        link = f"{prefix}_PORT_{port.port}_{port.protocol}"
        yield link, _url(port)
        yield f"{link}_PROTO", port.protocol.lower()
        yield f"{link}_PORT", str(port.port)
        yield f"{link}_ADDR", port.cluster_ips[0]


def _url(port: ServicePort) -> str:
    return f"{port.protocol.lower()}://{join_host_port(port.cluster_ips[0], port.port)}"


def _spelled(name: str) -> str:
    return name.replace("-", "_").upper()
