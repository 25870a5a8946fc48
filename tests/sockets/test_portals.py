"""Sockets at portals: they come and go with what is admitted, share one balancer, and say what is in the way."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import socket

import pytest

from tests.netns import Namespace, eventually
from userspace_proxy.config import LoggingFormat
from userspace_proxy.exceptions import PortError
from userspace_proxy.loadbalancer import LoadBalancer
from userspace_proxy.metrics import Metrics, Outcome, ServicePortMetrics
from userspace_proxy.model import (
    Endpoint,
    IPFamily,
    Portal,
    PortalKind,
    Protocol,
    ProxyProtocol,
    ServicePortName,
    SessionAffinity,
    SocketKey,
)
from userspace_proxy.sockets.path import DataPath, RelaySettings
from userspace_proxy.sockets.portals import PortalSockets
from userspace_proxy.workers.messages import Start
from userspace_proxy.workers.pool import Pool

pytestmark = pytest.mark.privileged

V4, V6 = IPFamily.IPV4, IPFamily.IPV6
KIND = {Protocol.TCP: socket.SOCK_STREAM, Protocol.UDP: socket.SOCK_DGRAM}
SETTINGS = RelaySettings(descriptors=100, splice=False, half_close_timeout=60, udp_timeout=5, max_udp_flows=10)


def portal(ip, port=8080, kind=PortalKind.CLUSTER_IP, protocol=Protocol.TCP):
    return Portal(V6 if ":" in ip else V4, protocol, ip, port, kind)


def node_port(number=30080, family=V4, protocol=Protocol.TCP):
    return Portal(family, protocol, "", number, PortalKind.NODE_PORT)


ROOM = 5
"""Listeners at portals that there may be."""


class Bench:
    """Portal sockets in a namespace, with two endpoints that say which one they are."""

    def __init__(self, node, protocol, bind="0.0.0.0", networks=(), workers=1):
        self.node = node
        self.protocol = protocol
        self.metrics = Metrics()
        if workers == 1:
            self.path = DataPath(SETTINGS, self.metrics)
        else:
            self.path = Pool(workers, Start(0, SETTINGS, 0.0, 0, LoggingFormat.TEXT), self.metrics)
            self._keeping = asyncio.get_running_loop().create_task(self.path.run())
        self.shared = PortalSockets(self.path.sockets[protocol], bind, networks, lambda: self.shared.listeners < ROOM)
        self.account = ServicePortMetrics()
        self.balancer = LoadBalancer(asyncio.get_running_loop().time, random.Random(1), self.account)

    def open(self, family=V4, port=40001):
        key = SocketKey(ServicePortName("default", "web"), family)
        return self.shared.open(key, family.wildcard, port, self.balancer, self.account)

    async def close(self):
        self.shared.end_all(Outcome.CLOSED)
        if isinstance(self.path, Pool):
            self._keeping.cancel()
            await asyncio.wait([self._keeping])
        await self.path.close()

    def endpoints(self, *ports, family=V4):
        self.balancer.update([Endpoint(family.loopback, port) for port in ports])

    async def ask(self, ip, port, timeout=5, source=None):
        def ask():
            kind = socket.AF_INET6 if ":" in ip else socket.AF_INET
            with self.node.entered(), socket.socket(kind, KIND[self.protocol]) as client:
                client.settimeout(timeout)
                if source:
                    client.bind((source, 0))
                client.connect((ip, port))
                client.send(b"hi")
                return client.recv(100)

        try:
            return await asyncio.to_thread(ask)
        except OSError as error:
            return type(error)


@pytest.fixture(params=[Protocol.TCP, Protocol.UDP])
def protocol(request):
    return request.param


@pytest.fixture(params=[1, 2], ids=["alone", "2 workers"])
def workers(request):
    return request.param


@pytest.fixture
def node():
    with Namespace() as namespace:
        for number in (1, 2):
            namespace.spawn(f"python3 {os.path.dirname(__file__)}/../e2e/endpoint.py {number} 808{number}")
        for number in (1, 2):
            eventually(lambda number=number: f":808{number}" in namespace.run("ss -Hltn"))
        yield namespace


def in_loop(node, main, *arguments, **options):
    async def run():
        bench = Bench(node, *arguments, **options)
        try:
            await main(bench)
        finally:
            await bench.close()

    with node.entered(), asyncio.Runner() as runner:
        runner.run(run())


@pytest.mark.parametrize("family", IPFamily)
def test_portals_share_the_turn_and_go_with_what_is_admitted(node, protocol, family, workers):
    first, second = ("127.96.0.10", "127.96.0.11") if family is V4 else ("fd00:96::10", "fd00:96::11")
    if family is V6:
        for ip in (first, second):
            node.run(f"ip route add local {ip} dev lo src ::1")

    async def main(bench):
        bench.endpoints(8081, 8082, family=family)
        opened = bench.open(family)
        opened.serve()
        opened.admit({portal(first, protocol=protocol), portal(second, protocol=protocol)})
        answers = [await bench.ask(ip, 8080) for ip in (first, second, first, second)]
        if workers == 1 or protocol is Protocol.UDP:  # else it is as many turns at a time
            assert sorted(answers) == [b"1:hi", b"1:hi", b"2:hi", b"2:hi"]
            assert answers[0] != answers[1] != answers[2]
        assert (await bench.ask(family.loopback, opened.port)).endswith(b":hi")
        opened.refuse()
        assert await bench.ask(first, 8080) is ConnectionRefusedError
        opened.serve()
        opened.admit({portal(second, protocol=protocol)})
        assert bench.shared.listeners == 1
        assert await bench.ask(first, 8080) is ConnectionRefusedError
        assert (await bench.ask(second, 8080)).endswith(b":hi")
        opened.close()
        assert bench.shared.listeners == 0
        assert await bench.ask(second, 8080) is ConnectionRefusedError

    in_loop(node, main, protocol, workers=workers)


def test_a_client_meets_the_same_endpoint_at_every_portal(node, protocol, workers):
    portals = [("127.96.0.10", 8080), ("127.96.0.11", 8080), ("127.96.0.11", 8088)]

    async def main(bench):
        bench.balancer.configure(SessionAffinity.CLIENT_IP, 100.0)
        bench.endpoints(8081, 8082)
        opened = bench.open()
        opened.serve()
        opened.admit({portal(*place, protocol=protocol) for place in portals})
        met = {}
        for turn in range(3):
            for number in range(2, 14):
                source = f"127.0.0.{number}"
                met.setdefault(source, set()).add(await bench.ask(*portals[(number + turn) % 3], source=source))
        assert all(len(names) == 1 for names in met.values()), met
        assert set.union(*met.values()) == {b"1:hi", b"2:hi"}
        await bench.path.count()
        assert bench.account.affinity_hits == 24
        opened.close()

    in_loop(node, main, protocol, workers=workers)


def test_sessions_that_outlive_their_portal_are_counted_to_their_end(node, workers):
    async def main(bench):
        bench.endpoints(8081)
        opened = bench.open()
        opened.serve()
        opened.admit({portal("127.96.0.10"), portal("127.96.0.11")})
        reader, writer = await asyncio.open_connection("127.96.0.10", 8080)
        for portals in ({portal("127.96.0.10"), portal("127.96.0.11")}, {portal("127.96.0.11")}):
            opened.admit(portals)
            writer.write(b"hi")
            assert await reader.readexactly(4) == b"1:hi"
            await bench.path.count()
            assert bench.account.active == 1
        writer.close()
        await writer.wait_closed()
        async with asyncio.timeout(10):
            while bench.account.active:
                await asyncio.sleep(0.01)
                await bench.path.count()
        assert (sum(bench.account.ended.values()), bench.account.to_endpoint, bench.account.to_client) == (1, 4, 8)
        opened.close()

    in_loop(node, main, Protocol.TCP, workers=workers)


def test_the_proxy_port_is_for_this_host_alone(node, protocol):
    node.add_address("lo", "10.1.0.1/32")

    async def main(bench):
        bench.endpoints(8081)
        opened = bench.open()
        opened.serve()
        assert await bench.ask("127.0.0.1", opened.port) == b"1:hi"
        assert await bench.ask("10.1.0.1", opened.port) is ConnectionRefusedError
        opened.close()

    in_loop(node, main, protocol)


@pytest.mark.parametrize(
    ("bind", "networks", "served"),
    [
        ("0.0.0.0", (), {"10.1.0.1", "10.2.0.1", "127.0.0.1"}),
        ("0.0.0.0", ("10.1.0.0/16",), {"10.1.0.1"}),
        ("10.2.0.1", (), {"10.2.0.1"}),
    ],
)
def test_node_ports_are_on_the_addresses_asked_for(node, protocol, bind, networks, served):
    for ip in ("10.1.0.1", "10.2.0.1"):
        node.add_address("lo", f"{ip}/32")

    async def main(bench):
        bench.endpoints(8081)
        opened = bench.open()
        opened.serve()
        opened.admit({node_port(protocol=protocol)})
        answered = {ip for ip in ("10.1.0.1", "10.2.0.1", "127.0.0.1") if await bench.ask(ip, 30080) == b"1:hi"}
        assert answered == served
        opened.close()

    in_loop(node, main, protocol, bind, networks)


def test_descriptors_are_left_for_connections(node, protocol):
    async def main(bench):
        bench.endpoints(8081)
        opened = bench.open()
        opened.serve()
        wanted = [portal("127.96.0.10", number, protocol=protocol) for number in range(8000, 8000 + ROOM + 1)]
        with pytest.raises(PortError, match=r"^127.96.0.10:\d+ cannot be had: what descriptors .* \(ulimit -n\)"):
            opened.admit(wanted)
        assert bench.shared.listeners == ROOM
        opened.admit(wanted[1:])
        assert await bench.ask("127.96.0.10", 8000 + ROOM) == b"1:hi"
        opened.close()
        assert bench.shared.listeners == 0

    in_loop(node, main, protocol)


def test_who_is_in_the_way_is_named_and_left_alone_and_the_rest_is_open(node, protocol):
    async def main(bench):
        bench.endpoints(8081)
        opened = bench.open()
        opened.serve()
        with socket.socket(socket.AF_INET, KIND[protocol]) as theirs:
            theirs.bind(("0.0.0.0", 8080))
            if protocol is Protocol.TCP:
                theirs.listen()
            with pytest.raises(PortError, match=r"127.96.0.10:8080 cannot be had: Address already in use, by .* \(pid"):
                opened.admit({portal("127.96.0.10", protocol=protocol), portal("127.96.0.10", 8088, protocol=protocol)})
            assert await bench.ask("127.96.0.10", 8088) == b"1:hi"
        opened.serve()  # which tries again
        assert await bench.ask("127.96.0.10", 8080) == b"1:hi"
        opened.close()

    in_loop(node, main, protocol)


def test_an_address_that_is_not_this_hosts(node):
    async def main(bench):
        opened = bench.open()
        for ip in ("10.96.0.10", "10.96.0.11"):
            with pytest.raises(
                PortError, match=r"not an address of this host.* clients on this host can use 127.0.0.1:"
            ):
                opened.admit({portal(ip)})
        bench.endpoints(8081)
        somebodys = portal("198.51.100.1", kind=PortalKind.EXTERNAL_IP)
        with pytest.raises(PortError, match=r"ExternalIP 198\.51\.100\.1:8080/TCP: not an address of this host"):
            opened.admit({somebodys, portal("127.96.0.10")})
        assert bench.shared.listeners == 1
        node.add_address("lo", "198.51.100.1/32")
        opened.serve()
        assert [await bench.ask(ip, 8080) for ip in ("127.96.0.10", "198.51.100.1")] == [b"1:hi"] * 2
        opened.close()

    in_loop(node, main, Protocol.TCP)


def test_who_is_heard_is_the_same_at_every_portal(node, protocol, workers):
    async def main(bench):
        bench.endpoints(8081)
        opened = bench.open()
        opened.serve()
        opened.admit({portal("127.96.0.10", protocol=protocol)})
        opened.screen(())
        opened.admit({portal(ip, protocol=protocol) for ip in ("127.96.0.10", "127.96.0.11")})
        assert await bench.ask("127.96.0.10", 8080, 0.2) is TimeoutError
        assert await bench.ask("127.96.0.11", 8080, 0.2) is TimeoutError
        opened.screen(None)
        assert await bench.ask("127.96.0.11", 8080) == b"1:hi"
        opened.close()

    in_loop(node, main, protocol, workers=workers)


def test_clients_are_introduced_with_the_portal_they_came_to(node, workers):
    async def main(bench):
        bench.endpoints(8081)
        opened = bench.open()
        opened.serve()
        opened.speak(ProxyProtocol(version=1))
        opened.admit({portal("127.96.0.10"), portal("127.96.0.11")})
        opened.speak(ProxyProtocol(version=1))
        for ip in ("127.96.0.10", "127.96.0.11"):
            answer = await bench.ask(ip, 8080)
            assert answer.startswith(b"1:PROXY TCP4 ")
            assert f" {ip} ".encode() in answer
            assert b" 8080\r\n" in answer
        opened.close()

    in_loop(node, main, Protocol.TCP, workers=workers)


def test_draining_is_the_data_paths(node):
    async def main(bench):
        idle = []
        assert bench.shared.active == 0
        bench.shared.drain(lambda: idle.append(True))
        assert idle == [True]

    in_loop(node, main, Protocol.TCP)


def test_a_portal_whose_screen_is_refused_is_had_later(node):
    async def main(bench):
        bench.endpoints(8081)
        opened = bench.open()
        opened.serve()
        with pytest.raises(PortError, match="source ranges"):
            opened.screen([f"10.{n // 256}.{n % 256}.0/25" for n in range(2000)])
        with pytest.raises(PortError, match="source ranges"):
            opened.admit({portal("127.96.0.10")})
        opened.screen(None)
        opened.admit({portal("127.96.0.10")})
        assert await bench.ask("127.96.0.10", 8080) == b"1:hi"
        opened.close()
        assert bench.shared.listeners == 0

    in_loop(node, main, Protocol.TCP)


@pytest.mark.parametrize(
    ("ip", "advice"),
    [
        ("127.96.0.10", "or sysctl net.ipv4.ip_unprivileged_port_start=80; meanwhile"),
        ("0.0.0.0", "or sysctl net.ipv4.ip_unprivileged_port_start=80; meanwhile"),
        ("fd00:96::10", "not an address of this host, and to make it one takes CAP_NET_ADMIN; meanwhile"),
    ],
)
def test_a_port_that_is_not_ours_is_no_matter_where_the_address_is_not_either(node, ip, advice):
    """The kernel looks at the port first."""

    async def main(bench):
        opened = bench.open()
        bind = f"import socket; socket.create_server(({ip!r}, 80), family=socket.AF_INET{'6' if ':' in ip else ''})"
        said = node.run(f'setpriv --bounding-set=-all --inh-caps=-all python3 -c "{bind}"', check=False)
        assert "Permission denied" in said
        assert advice in opened._explain(PermissionError(errno.EACCES, "Permission denied"), (ip, 80))
        opened.close()

    in_loop(node, main, Protocol.TCP)
