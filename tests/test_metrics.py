from __future__ import annotations

import errno

from prometheus_client.parser import text_string_to_metric_families

from userspace_proxy.metrics import Metrics, Outcome, descriptor_limit, errno_name, open_descriptors
from userspace_proxy.model import IPFamily, ServicePortName, SocketKey

KEY = SocketKey(ServicePortName("prod", "web", "http"), IPFamily.IPV4)


def samples(metrics: Metrics) -> dict[tuple[str, frozenset[str]], float]:
    """(name, label values) -> value of everything that is told."""
    body, content_type = metrics.exposition()
    assert content_type.startswith("text/plain")
    return {
        (sample.name, frozenset(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


def test_counts_of_a_service_port_carry_its_labels() -> None:
    metrics = Metrics()
    counts = metrics.service_port(KEY, "TCP")
    counts.opened, counts.active, counts.to_client = 3, 1, 1000
    counts.ended[Outcome.CLIENT_RESET] += 2
    counts.dial_failures[errno.ECONNREFUSED] += 4
    counts.affinity_hits = lambda: 5
    found = samples(metrics)
    labels = {"prod", "web", "http", "TCP", "IPv4"}
    assert found["userspace_proxy_sessions_opened_total", frozenset(labels)] == 3
    assert found["userspace_proxy_sessions_active", frozenset(labels)] == 1
    assert found["userspace_proxy_sessions_ended_total", frozenset(labels | {"client_reset"})] == 2
    assert found["userspace_proxy_bytes_total", frozenset(labels | {"to_client"})] == 1000
    assert found["userspace_proxy_dial_failures_total", frozenset(labels | {"ECONNREFUSED"})] == 4
    assert found["userspace_proxy_affinity_hits_total", frozenset(labels)] == 5
    assert not [name for name, _ in found if "datagrams" in name]


def test_udp_has_datagrams_and_drops() -> None:
    metrics = Metrics()
    counts = metrics.service_port(KEY, "UDP")
    counts.received, counts.replied = 7, 6
    counts.drops["EAGAIN"] += 1
    found = samples(metrics)
    labels = {"prod", "web", "http", "UDP", "IPv4"}
    assert found["userspace_proxy_datagrams_total", frozenset(labels | {"to_endpoint"})] == 7
    assert found["userspace_proxy_datagrams_dropped_total", frozenset(labels | {"EAGAIN"})] == 1


def test_one_object_a_service_port_until_it_is_dropped() -> None:
    metrics = Metrics()
    counts = metrics.service_port(KEY, "TCP")
    assert metrics.service_port(KEY, "TCP") is counts
    assert metrics.service_port(KEY, "UDP") is not counts, "another protocol is another service port"
    metrics.drop(KEY)
    metrics.drop(KEY)
    assert not [labels for _, labels in samples(metrics) if "web" in labels]


def test_two_registries_know_nothing_of_each_other() -> None:
    one, other = Metrics(), Metrics()
    one.capture_info.labels("iptables").set(1)
    assert ("userspace_proxy_capture_info", frozenset({"iptables"})) in samples(one)
    assert ("userspace_proxy_capture_info", frozenset({"iptables"})) not in samples(other)


def test_names_of_errors_and_descriptors() -> None:
    assert errno_name(errno.ETIMEDOUT) == "ETIMEDOUT"
    assert errno_name(99999) == "99999"
    before = open_descriptors()
    with open("/dev/null"):
        assert open_descriptors() == before + 1
    assert descriptor_limit() > before
