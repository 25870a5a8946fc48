from __future__ import annotations

import asyncio
import errno

from prometheus_client.parser import text_string_to_metric_families

from userspace_proxy.metrics import SLICE, Metrics, Outcome, descriptor_limit, errno_name, open_descriptors
from userspace_proxy.model import IPFamily, ServicePortName, SocketKey

KEY = SocketKey(ServicePortName("prod", "web", "http"), IPFamily.IPV4)


def samples(metrics: Metrics) -> dict[tuple[str, frozenset[str]], float]:
    """(name, label values) -> value of everything that is told."""
    body, content_type = asyncio.run(metrics.exposition())
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
    counts.affinity_hits = 5
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


def test_label_values_are_escaped_and_there_are_no_series_of_moments() -> None:
    metrics = Metrics()
    odd = 'a"b\\c\nd'
    metrics.service_port(SocketKey(ServicePortName("prod", odd, ""), IPFamily.IPV6), "TCP").dials = 2
    found = samples(metrics)
    assert found["userspace_proxy_dials_total", frozenset({"prod", odd, "", "TCP", "IPv6"})] == 2
    assert not [name for name, _ in found if name.endswith("_created")]


def test_the_loop_gets_its_turns_and_may_change_counts_meanwhile() -> None:
    metrics = Metrics()
    keys = [SocketKey(ServicePortName("a", str(n), ""), IPFamily.IPV4) for n in range(500)]
    every = [metrics.service_port(key, "TCP") for key in keys]
    turns = 0

    async def change() -> None:
        nonlocal turns
        while True:
            turns += 1
            for each in every:
                each.drops[str(turns)] += 1
            metrics.drop(keys[turns])
            metrics.service_port(SocketKey(ServicePortName("b", str(turns), ""), IPFamily.IPV4), "TCP")
            await asyncio.sleep(0)

    async def main() -> bytes:
        changing = asyncio.create_task(change())
        await asyncio.sleep(0)
        try:
            return (await metrics.exposition())[0]
        finally:
            changing.cancel()

    body = asyncio.run(main())
    assert turns >= 500 / SLICE
    opened = [line for line in body.decode().splitlines() if line.startswith("userspace_proxy_sessions_opened_total{")]
    assert len(opened) == len(set(opened)) >= 500


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
