"""Feature gates that are off, and what they leave."""

from __future__ import annotations

from dataclasses import replace

import pytest

from userspace_proxy.config import Config
from userspace_proxy.config.gates import IN_USE, parse_gates
from userspace_proxy.features import GATES, Filter, gated
from userspace_proxy.model import (
    Endpoint,
    Node,
    Preference,
    Protocol,
    ServicePort,
    ServicePortName,
    Snapshot,
    TrafficPolicy,
)

WEB, CALLS = ServicePortName("default", "web", "http"), ServicePortName("default", "calls", "sigtran")
PORT = ServicePort(
    Protocol.TCP,
    80,
    ("10.0.0.1",),
    load_balancer_ips=("192.0.2.1",),
    proxied_ips=("192.0.2.2", "192.0.2.1"),
    internal_policy=TrafficPolicy.LOCAL,
    preference=Preference.ZONE,
)
SCTP = ServicePort(Protocol.SCTP, 2905, ("10.0.0.2",))
NEAR = Endpoint("10.1.0.1", 80, zone_hints=("a",), node_hints=("node-1",))
LEAVING = Endpoint("10.1.0.2", 80, ready=False, terminating=True)
STILL_READY = Endpoint("10.1.0.3", 80, terminating=True)
SNAPSHOT = Snapshot({WEB: PORT, CALLS: SCTP}, {WEB: (NEAR, LEAVING, STILL_READY), CALLS: (NEAR,)}, Node("node-1"))

WITHOUT = {
    "LoadBalancerIPMode": replace(
        SNAPSHOT,
        services={WEB: replace(PORT, load_balancer_ips=("192.0.2.1", "192.0.2.2"), proxied_ips=()), CALLS: SCTP},
    ),
    "SCTPSupport": replace(SNAPSHOT, services={WEB: PORT}, endpoints={WEB: (NEAR, LEAVING, STILL_READY)}),
    "ServiceInternalTrafficPolicy": replace(
        SNAPSHOT, services={WEB: replace(PORT, internal_policy=TrafficPolicy.CLUSTER), CALLS: SCTP}
    ),
    "ServiceTrafficDistribution": replace(
        SNAPSHOT, services={WEB: replace(PORT, preference=Preference.NONE), CALLS: SCTP}
    ),
    "TopologyAwareHints": replace(
        SNAPSHOT,
        endpoints={WEB: (replace(NEAR, zone_hints=()), LEAVING, STILL_READY), CALLS: (replace(NEAR, zone_hints=()),)},
    ),
    "PreferSameTrafficDistribution": replace(
        SNAPSHOT,
        endpoints={WEB: (replace(NEAR, node_hints=()), LEAVING, STILL_READY), CALLS: (replace(NEAR, node_hints=()),)},
    ),
    "ProxyTerminatingEndpoints": replace(SNAPSHOT, endpoints={WEB: (NEAR, STILL_READY), CALLS: (NEAR,)}),
}


def test_every_gate_in_use_is_here_but_the_one_that_decides_what_is_asked_for():
    assert set(WITHOUT) == GATES == set(IN_USE) - {"EndpointSliceProxying"}


@pytest.mark.parametrize("gate", WITHOUT)
def test_what_is_left_without_a_gate(gate):
    assert Filter({gate})(SNAPSHOT) == WITHOUT[gate]


def test_several_at_once():
    left = Filter({"SCTPSupport", "ServiceInternalTrafficPolicy", "ServiceTrafficDistribution"})(SNAPSHOT)
    assert left.services == {
        WEB: replace(PORT, internal_policy=TrafficPolicy.CLUSTER, preference=Preference.NONE),
    }


def test_what_does_not_change_stays_the_same_value():
    """Comparing Snapshots is comparing identities, mostly."""
    left = Filter({"TopologyAwareHints", "ServiceTrafficDistribution"})
    first = left(SNAPSHOT)
    other = (Endpoint("10.1.0.9", 80),)
    second = left(replace(SNAPSHOT, endpoints={**SNAPSHOT.endpoints, CALLS: other}))
    assert second.services[WEB] is first.services[WEB]
    assert second.endpoints[WEB] is first.endpoints[WEB]
    assert second.endpoints[CALLS] == other
    assert left(Snapshot()) == Snapshot()
    assert left(SNAPSHOT) == first


def test_all_is_published_as_it_is_by_itself_and_less_where_a_gate_is_off():
    published: list[Snapshot] = []
    publish = published.append
    assert gated(publish, Config().is_on) == publish
    gated(publish, Config(feature_gates=parse_gates("SCTPSupport=false")).is_on)(SNAPSHOT)
    assert published == [WITHOUT["SCTPSupport"]]
