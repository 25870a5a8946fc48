"""Talking to a worker the way its parent does, for tests of what is in the kernel afterwards."""

from __future__ import annotations

import sys

import msgspec

from tests.netns import Namespace
from userspace_proxy.capture.messages import Ask, Cleanup, Close, Open, Replace, Reply, Withdraw
from userspace_proxy.model import IPFamily, Portal, PortalKind, Protocol, Redirect, ServicePortName

WORKER = "userspace_proxy.capture.worker"
WITHOUT_PROGRAMS = "tests.capture.worker_without_programs"

CLUSTER_IP = {IPFamily.IPV4: "10.96.0.10", IPFamily.IPV6: "fd00:96::10"}


def ask(
    namespace: Namespace, *requests: Open | Replace | Withdraw | Close | Cleanup, module: str = WORKER
) -> list[Reply]:
    """One worker's life: started, asked all this, and left by its parent."""
    lines = "".join(
        msgspec.json.encode(Ask(number, request)).decode() + "\n" for number, request in enumerate(requests)
    )
    output = namespace.run(f"{sys.executable} -m {module}", text=lines)
    replies = [msgspec.json.decode(line, type=Reply) for line in output.splitlines() if line.startswith("{")]
    assert [reply.number for reply in replies] == list(range(len(requests))), output
    return replies


def opening(family: IPFamily = IPFamily.IPV4, **fields: object) -> Open:
    ordinary = Open(family, family.wildcard, (), (), use_library=True, take_over=True)
    return msgspec.structs.replace(ordinary, **fields)


def redirect(
    ip: str = "10.96.0.10",
    port: int = 80,
    proxy_port: int = 40001,
    protocol: Protocol = Protocol.TCP,
    name: str = "web",
    kind: PortalKind = PortalKind.CLUSTER_IP,
) -> Redirect:
    family = IPFamily.IPV6 if ":" in ip else IPFamily.IPV4
    return Redirect(Portal(family, protocol, ip, port, kind), proxy_port, ServicePortName("default", name, "main"))


def node_port(
    port: int = 30080, proxy_port: int = 40001, protocol: Protocol = Protocol.TCP, family: IPFamily = IPFamily.IPV4
) -> Redirect:
    portal = Portal(family, protocol, "", port, PortalKind.NODE_PORT)
    return Redirect(portal, proxy_port, ServicePortName("default", "web", "main"))


def many(count: int) -> list[Redirect]:
    """Redirects of as many services, every other one UDP."""
    return [
        redirect(
            f"10.96.{number // 250}.{number % 250}",
            proxy_port=20000 + number,
            protocol=Protocol.UDP if number % 2 else Protocol.TCP,
            name=f"svc-{number:05}",
        )
        for number in range(count)
    ]


def program(family: IPFamily) -> str:
    return "ip6tables-legacy" if family is IPFamily.IPV6 else "iptables-legacy"


def saved(namespace: Namespace, family: IPFamily = IPFamily.IPV4) -> str:
    """The filter and nat tables, without what changes by itself."""
    text = "".join(namespace.run(f"{program(family)}-save -t {table}") for table in ("filter", "nat"))
    lines = (line.split(" [")[0] if line.startswith(":") else line for line in text.splitlines())
    return "\n".join(line for line in lines if not line.startswith("#"))
