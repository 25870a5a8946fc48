"""What is counted, and how it is told to Prometheus.

Counts are kept where the packets are: `ServicePortMetrics` is a slotted object of plain numbers that the
data path adds to. They become samples only when somebody asks, in a registry of our own, never the global
one. When a service port vanishes its counts are dropped, so that label sets do not pile up;
connections that outlive it count on unseen. Serving the text over HTTP is `admin`'s.
"""

from __future__ import annotations

import asyncio
import enum
import errno
import os
import resource
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client import platform_collector as _platform
from prometheus_client import process_collector as _process
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from userspace_proxy.model import SocketKey

SLICE = 50
"""Service ports that are told of between two turns of the data path."""

disable_created_metrics()  # type: ignore[no-untyped-call] # when each counter began: a series for each of them


class Outcome(enum.StrEnum):
    """How a connection or flow ended, and who ended it."""

    CLIENT_CLOSED = "client_closed"
    """In order; the client was the first to finish."""
    ENDPOINT_CLOSED = "endpoint_closed"
    """In order; the endpoint was the first to finish."""
    CLIENT_RESET = "client_reset"
    ENDPOINT_RESET = "endpoint_reset"
    CLIENT_LOST = "client_lost"
    """The client answered no more: keep-alive or retransmission timed out, or its network is gone."""
    ENDPOINT_LOST = "endpoint_lost"
    NO_ENDPOINTS = "no_endpoints"
    DIAL_FAILED = "dial_failed"
    """No endpoint could be connected within the ladder."""
    UNDELIVERABLE = "undeliverable"
    """An SCTP message that the other side cannot be given: too long, or on a stream that it does not have."""
    NOT_CAPTURED = "not_captured"
    """It came to the proxy port without going through a portal."""
    NOT_INTRODUCED = "not_introduced"
    """The header of the PROXY protocol that it had to start with was malformed, or did not come in time."""
    HALF_CLOSE_TIMEOUT = "half_close_timeout"
    DRAIN_TIMEOUT = "drain_timeout"
    IDLE = "idle"
    """A UDP flow with no datagram either way for the idle timeout."""
    EVICTED = "evicted"
    """A UDP flow that made room for a new one at the cap."""
    WORKER_DIED = "worker_died"
    """The process that relayed it died."""
    CLOSED = "closed"
    """A UDP flow whose service port went away or lost its endpoints."""


class ServicePortMetrics:
    """The counts of one service port in one family. `to_endpoint` and `to_client` are in bytes."""

    __slots__ = (
        "active",
        "affinity_hits",
        "dial_failures",
        "dials",
        "drops",
        "ejected",
        "ejections",
        "ended",
        "opened",
        "received",
        "replied",
        "to_client",
        "to_endpoint",
    )

    def __init__(self) -> None:
        self.opened = 0
        self.active = 0
        self.ended: defaultdict[Outcome, int] = defaultdict(int)
        self.to_endpoint = 0
        self.to_client = 0
        self.dials = 0
        self.dial_failures: defaultdict[int, int] = defaultdict(int)
        """By errno; a time-out is ETIMEDOUT."""
        self.received = 0
        """Datagrams and SCTP messages from clients."""
        self.replied = 0
        self.drops: defaultdict[str, int] = defaultdict(int)
        """Datagrams and SCTP messages not passed on, by errno name or reason."""
        self.affinity_hits = 0
        """Picks that were decided by affinity."""
        self.ejections = 0
        """How often an endpoint was ejected."""
        self.ejected: Callable[[], int] = int
        """Endpoints passed over now, because dials to them failed."""


def errno_name(number: int) -> str:
    return errno.errorcode.get(number, str(number))


class Metrics:
    """All metrics in a registry of their own, and the only place that knows their names."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self._service_ports: dict[SocketKey, tuple[str, ServicePortMetrics]] = {}
        self.accept_pauses = 0
        self.descriptors_in_use: Callable[[], int] = lambda: 0
        _process.ProcessCollector(registry=registry)
        _platform.PlatformCollector(registry=registry)
        self.sync_duration = Histogram(
            "kubeproxy_sync_proxy_rules_duration_seconds",
            "How long one sync took.",
            buckets=[0.001 * 2**n for n in range(15)],
            registry=registry,
        )
        self.last_sync = Gauge(
            "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
            "When the last sync that succeeded ended.",
            registry=registry,
        )
        self.last_queued = Gauge(
            "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds",
            "When a sync was last asked for.",
            registry=registry,
        )
        self.sync_failures = Counter(
            "userspace_proxy_sync_failures", "Syncs that left something undone.", registry=registry
        )
        self.service_port_errors = Gauge(
            "userspace_proxy_service_port_errors",
            "Service ports that are not served as they should be; /services says why.",
            registry=registry,
        )
        self.protocol_available = Gauge(
            "userspace_proxy_protocol_available",
            "Whether this kernel has a protocol that Services ask for, as last tried; told of those alone.",
            ["protocol"],
            registry=registry,
        )
        self.refused_objects = Gauge(
            "userspace_proxy_refused_objects", "Objects the source refused as invalid.", registry=registry
        )
        self.capture_info = Gauge(
            "userspace_proxy_capture_info", "1 for the way of capturing in use.", ["capture"], registry=registry
        )
        self.capture_changes = Counter(
            "userspace_proxy_capture_changes",
            "Rules put in or out: because something changed, or repaired because somebody else changed ours.",
            ["change"],
            registry=registry,
        )
        self.workers = Gauge("userspace_proxy_workers", "Processes that relay now.", registry=registry)
        self.worker_deaths = Counter(
            "userspace_proxy_worker_deaths", "Processes that relayed and died, and were replaced.", registry=registry
        )
        self.capture_failures = Counter(
            "userspace_proxy_capture_failures", "Times the kernel refused what was asked of it.", registry=registry
        )

    def service_port(self, key: SocketKey, protocol: str) -> ServicePortMetrics:
        """The counts of a service port, made at first asking."""
        known = self._service_ports.get(key)
        if known is None or known[0] != protocol:
            known = self._service_ports[key] = (protocol, ServicePortMetrics())
        return known[1]

    def drop(self, key: SocketKey) -> None:
        self._service_ports.pop(key, None)

    async def exposition(self) -> tuple[bytes, str]:
        """(body, content type) for /metrics. Counts are read on the loop, as it changes them, and in turns with it."""
        text = {
            name: [f"# HELP {_PREFIX}{name} {told}", f"# TYPE {_PREFIX}{name} {kind}"]
            for name, (kind, told) in _FAMILIES.items()
        }
        for number, (key, (protocol, counts)) in enumerate(list(self._service_ports.items()), 1):
            labels = _labels(key, protocol)
            for name, own, count in _samples(protocol, counts):
                text[name].append(f"{_PREFIX}{name}{{{own}{labels}}} {float(count)}")
            if number % SLICE == 0:
                await asyncio.sleep(0)
        text["accept_pauses_total"].append(f"{_PREFIX}accept_pauses_total {float(self.accept_pauses)}")
        text["relay_descriptors"].append(f"{_PREFIX}relay_descriptors {float(self.descriptors_in_use())}")
        return await asyncio.to_thread(self._joined, text.values()), CONTENT_TYPE_LATEST

    def _joined(self, families: Iterable[Sequence[str]]) -> bytes:
        """With those that are counted once, whose objects have locks; some ask the kernel."""
        return generate_latest(self._registry) + "".join(f"{line}\n" for family in families for line in family).encode()


def _labels(key: SocketKey, protocol: str) -> str:
    namespace, service, port = map(_escaped, (key.name.namespace, key.name.name, key.name.port))
    return (
        f'family="{key.family.value}",namespace="{namespace}",port="{port}",protocol="{protocol}",service="{service}"'
    )


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _samples(protocol: str, counts: ServicePortMetrics) -> Iterator[tuple[str, str, int]]:
    """Names of families, labels beside those of the service port, and counts."""
    yield "sessions_opened_total", "", counts.opened
    yield "sessions_active", "", counts.active
    yield "bytes_total", 'direction="to_endpoint",', counts.to_endpoint
    yield "bytes_total", 'direction="to_client",', counts.to_client
    yield "dials_total", "", counts.dials
    yield "affinity_hits_total", "", counts.affinity_hits
    yield "endpoints_ejected", "", counts.ejected()
    yield "ejections_total", "", counts.ejections
    for outcome, count in counts.ended.items():
        yield "sessions_ended_total", f'outcome="{outcome.value}",', count
    for number, count in counts.dial_failures.items():
        yield "dial_failures_total", f'errno="{errno_name(number)}",', count
    if protocol != "TCP":
        yield "datagrams_total", 'direction="to_endpoint",', counts.received
        yield "datagrams_total", 'direction="to_client",', counts.replied
    for reason, count in counts.drops.items():
        yield "datagrams_dropped_total", f'reason="{reason}",', count


_PREFIX = "userspace_proxy_"
_FAMILIES = {
    "sessions_opened_total": ("counter", "Connections and UDP flows taken."),
    "sessions_active": ("gauge", "Connections and UDP flows now."),
    "sessions_ended_total": ("counter", "Connections and UDP flows ended, by outcome."),
    "bytes_total": ("counter", "Payload relayed."),
    "dials_total": ("counter", "Attempts to connect an endpoint."),
    "dial_failures_total": ("counter", "Attempts that failed, by errno."),
    "datagrams_total": ("counter", "Datagrams and SCTP messages relayed."),
    "datagrams_dropped_total": ("counter", "Datagrams and SCTP messages not passed on, by reason."),
    "endpoints_ejected": ("gauge", "Endpoints passed over now, as dials to them failed."),
    "ejections_total": ("counter", "Times an endpoint was ejected."),
    "affinity_hits_total": ("counter", "Picks that followed a client's affinity."),
    "accept_pauses_total": ("counter", "Times accepting stopped for want of descriptors."),
    "relay_descriptors": ("gauge", "Descriptors held by connections and flows."),
}
"""Of what is counted for each service port, and of what is a plain number here: the kind, and what it tells.

Their text is made here, in a tenth of the time that prometheus_client takes for as many samples.
"""


def open_descriptors() -> int:
    """Descriptors of this process; for tests and the start-up log, not for the data path."""
    return len(os.listdir("/proc/self/fd")) - 1


def descriptor_limit() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
