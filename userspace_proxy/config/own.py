"""What can be set that kube-proxy has no flag for."""

from __future__ import annotations

import enum
import pathlib
from dataclasses import dataclass

from userspace_proxy.config.flag import OWN, setting
from userspace_proxy.config.kinds import DIRECTORY, PATHS, SWITCH, choice, duration, number


class CaptureWay(enum.StrEnum):
    AUTO = "auto"
    IPTABLES = "iptables"
    NFTABLES = "nftables"
    LOCAL = "local"
    NONE = "none"


class LoggingFormat(enum.StrEnum):
    TEXT = "text"
    JSON = "json"


@dataclass(frozen=True)
class OwnSettings:
    manifests: tuple[pathlib.Path, ...] = setting(
        (),
        "manifests",
        PATHS,
        OWN,
        "A file or a directory of Services, EndpointSlices and Endpoints to serve, in YAML or JSON. May be "
        "given more than once. Changes to the files are served as they happen. Without it, an API server is "
        "asked: that of --kubeconfig or --master, or in a pod that of its cluster.",
    )
    capture: CaptureWay = setting(
        CaptureWay.AUTO,
        "capture",
        choice(CaptureWay),
        OWN,
        "How the traffic of service addresses is made to reach the proxy ports. iptables: rules in the "
        "legacy nat table. nftables: a table of its own. Both need root. local: without netfilter; the addresses "
        "become this host's own, which needs root except for loopback addresses, and are listened on. none: not at "
        "all; clients connect to the proxy ports, which the log and /services tell. auto: the first of these that "
        "works here.",
    )
    state_dir: pathlib.Path | None = setting(
        None,
        "state-dir",
        DIRECTORY,
        OWN,
        "A directory in which to keep what the API server told last. A proxy that starts while the API server "
        "is away serves that until it is back. Empty: nothing is kept, and nothing served until then.",
    )
    workers: int = setting(
        1,
        "workers",
        number(1, 64, 2),
        OWN,
        "How many processes relay. With 1 it is the proxy's own. With more, each takes clients of every service "
        "port of TCP and UDP, and a process of its own sees to everything else, SCTP included; round robin is each "
        "worker's own, affinity holds over all of them (of clients behind a load balancer that speaks the PROXY "
        "protocol: in each). UDP flows of one client address are all one worker's. As many as there are CPUs to spare "
        "is the most that helps.",
    )
    max_udp_flows: int = setting(
        4096,
        "max-udp-flows",
        number(1, 1_000_000, 4096),
        OWN,
        "How many UDP flows there may be at a time. One more ends the one that has been idle for longest. Several "
        "workers share the number out evenly.",
    )
    half_close_timeout: float = setting(
        300.0,
        "half-close-timeout",
        duration("5m0s", least="100ms"),
        OWN,
        "How long a TCP connection that one side has finished may stay without a byte from the other side. "
        "Then both are reset.",
    )
    max_ejection_time: float = setting(
        10.0,
        "max-ejection-time",
        duration("10s", least="0s"),
        OWN,
        "How long an endpoint that could not be dialled is passed over at most: one second at first, then twice "
        "as long each time a single client's attempt shows that it is still dead. 0 passes over none: strict "
        "round robin over all endpoints, whether they answer or not.",
    )
    splice: bool = setting(
        True,
        "splice",
        SWITCH,
        OWN,
        "Move bulk TCP data within the kernel, by splice(2). Small messages are copied in any case, which is "
        "faster for them.",
    )
    drain_timeout: float = setting(
        5.0,
        "drain-timeout",
        duration("5s", least="0s"),
        OWN,
        "How long established connections may go on after SIGTERM or SIGINT. Those that are left are reset; a "
        "second signal does so at once.",
    )
    logging_format: LoggingFormat = setting(
        LoggingFormat.TEXT,
        "logging-format",
        choice(LoggingFormat),
        OWN,
        "text: lines for people. json: one object a line, for machines.",
    )
