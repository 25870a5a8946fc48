"""Feature gates that are off."""

from __future__ import annotations

from userspace_proxy.config import Config
from userspace_proxy.config.gates import parse_gates
from userspace_proxy.features import gated, without_sctp
from userspace_proxy.model import Endpoint, Node, Protocol, ServicePort, ServicePortName, Snapshot

WEB, CALLS = ServicePortName("default", "web", "http"), ServicePortName("default", "calls", "sigtran")
SNAPSHOT = Snapshot(
    {WEB: ServicePort(Protocol.TCP, 80, ("10.0.0.1",)), CALLS: ServicePort(Protocol.SCTP, 2905, ("10.0.0.2",))},
    {WEB: (Endpoint("10.1.0.1", 80),), CALLS: (Endpoint("10.1.0.2", 2905),)},
    Node("node-1"),
)


def test_without_sctp_its_service_ports_are_not_there():
    left = without_sctp(SNAPSHOT)
    assert (set(left.services), set(left.endpoints), left.node) == ({WEB}, {WEB}, SNAPSHOT.node)
    assert left.services[WEB] is SNAPSHOT.services[WEB], "what is left is the same"


def test_all_is_published_as_it_is_by_itself_and_less_where_a_gate_is_off():
    published: list[Snapshot] = []
    gated(published.append, Config().is_on)(SNAPSHOT)
    gated(published.append, Config(feature_gates=parse_gates("AllBeta=false")).is_on)(SNAPSHOT)
    assert published == [SNAPSHOT, without_sctp(SNAPSHOT)]
