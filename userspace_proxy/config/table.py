"""What can be set: `Config`, one validated value, and the flags that make it.

Each field of `Config` carries its flag: name, kind, help. Parsing, /configz, and the help text and
docs/configuration.md that `manual` writes are all drawn from there, so that they cannot disagree.
"""

from __future__ import annotations

import enum
import pathlib
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace

from userspace_proxy.config.flag import ADMIN, CAPTURE, CLUSTER, INSTEAD, LOGGING, RELAY, SERVICES, SYNC, Flag, setting
from userspace_proxy.config.kinds import (
    CIDRS,
    DIRECTORY,
    FILE,
    IP,
    NODE_NAME,
    PATHS,
    PORTS,
    SWITCH,
    URL,
    choice,
    decimal,
    duration,
    number,
    server,
)
from userspace_proxy.config.values import Address, PortRange


class CaptureWay(enum.StrEnum):
    AUTO = "auto"
    IPTABLES = "iptables"
    NONE = "none"


class LoggingFormat(enum.StrEnum):
    TEXT = "text"
    JSON = "json"


class ContentType(enum.StrEnum):
    JSON = "application/json"
    PROTOBUF = "application/vnd.kubernetes.protobuf"


@dataclass(frozen=True, slots=True)
class Config:
    """Everything that can be set, as `parse` validated it. Times are seconds."""

    manifests: tuple[pathlib.Path, ...] = setting(
        (),
        "manifests",
        PATHS,
        SERVICES,
        "A file or a directory of Services, EndpointSlices and Endpoints to serve, in YAML or JSON. May be "
        "given more than once. Changes to the files are served as they happen. Without it, an API server is "
        "asked: that of --kubeconfig or --master, or in a pod that of its cluster.",
    )
    kubeconfig: str = setting(
        "",
        "kubeconfig",
        FILE,
        CLUSTER,
        "A file that tells where the API server is and who we are to it: its current context, with client "
        "certificates, tokens, exec plugins and proxy-url (http, https or socks5). When it or a file it names "
        "changes, it is read anew. Empty, and no --master: the service account of the pod this runs in.",
    )
    master: str = setting(
        "",
        "master",
        URL,
        CLUSTER,
        "Where the API server is, in the place of what --kubeconfig tells. Without --kubeconfig, no credentials "
        "are sent.",
    )
    hostname_override: str = setting(
        "",
        "hostname-override",
        NODE_NAME,
        CLUSTER,
        "The name of the node this runs on. Empty: the name of this host, in lower case.",
    )
    state_dir: pathlib.Path | None = setting(
        None,
        "state-dir",
        DIRECTORY,
        CLUSTER,
        "A directory in which to keep what the API server told last. A proxy that starts while the API server "
        "is away serves that until it is back. Empty: nothing is kept, and nothing served until then.",
    )
    config_sync_period: float = setting(
        900.0,
        "config-sync-period",
        duration("15m0s"),
        CLUSTER,
        "How often all that is known is gone through again, even though the API server tells of no change.",
    )
    kube_api_qps: float = setting(
        5.0,
        "kube-api-qps",
        decimal(5),
        CLUSTER,
        "How many requests a second are sent to the API server in the long run. 0: 5. Below 0: no limit.",
    )
    kube_api_burst: int = setting(
        10,
        "kube-api-burst",
        number(0, 2_147_483_647, 10),
        CLUSTER,
        "How many requests may be sent at once, faster than --kube-api-qps. 0: 10.",
    )
    kube_api_content_type: ContentType = setting(
        ContentType.JSON,
        "kube-api-content-type",
        replace(choice(ContentType), placeholder="TYPE"),
        CLUSTER,
        "Taken as kube-proxy takes it, and of no effect: JSON is spoken, which every API server does.",
    )
    capture: CaptureWay = setting(
        CaptureWay.AUTO,
        "capture",
        choice(CaptureWay),
        CAPTURE,
        "How the traffic of service addresses is made to reach the proxy ports. iptables: rules in the nat "
        "table, which needs root. none: not at all; clients connect to the proxy ports, which the log and "
        "/services tell. auto: iptables where that works, else none.",
    )
    bind_address: str = setting(
        "0.0.0.0",
        "bind-address",
        IP,
        CAPTURE,
        "The address that proxy ports listen on. 0.0.0.0 and :: both stand for all addresses, of the family "
        "that each Service has. A loopback address can be reached by no capture and is allowed with "
        "--capture=none only.",
    )
    proxy_port_range: PortRange | None = setting(
        None,
        "proxy-port-range",
        PORTS,
        CAPTURE,
        "The ports to take proxy ports from: one port (A), a range (A-B), or A and the N ports after it "
        "(A+N). Each service port takes one for each of its address families. Empty or 0: whichever are free.",
    )
    nodeport_addresses: tuple[str, ...] = setting(
        (),
        "nodeport-addresses",
        CIDRS,
        CAPTURE,
        "The networks whose addresses, where this host has them, serve node ports. May be given more than "
        "once. Empty: all addresses of this host.",
    )
    workers: int = setting(
        1,
        "workers",
        number(1, 64, 2),
        RELAY,
        "How many processes relay. With 1 it is the proxy's own. With more, each takes clients of every service "
        "port, and a process of its own sees to everything else; round robin is each worker's own, affinity "
        "holds over all of them. As many as there are CPUs to spare is the most that helps.",
    )
    udp_timeout: float = setting(
        0.25,
        "udp-timeout",
        duration("250ms"),
        RELAY,
        "How long a UDP flow (a client's address and port) is kept without a datagram either way. An answer "
        "that takes longer is lost, so raise it for slow servers.",
    )
    max_udp_flows: int = setting(
        4096,
        "max-udp-flows",
        number(1, 1_000_000, 4096),
        RELAY,
        "How many UDP flows there may be at a time. One more ends the one that has been idle for longest. Several "
        "workers share the number out evenly.",
    )
    half_close_timeout: float = setting(
        300.0,
        "half-close-timeout",
        duration("5m0s"),
        RELAY,
        "How long a TCP connection that one side has finished may stay without a byte from the other side. "
        "Then both are reset.",
    )
    max_ejection_time: float = setting(
        10.0,
        "max-ejection-time",
        duration("10s", least="0s"),
        RELAY,
        "How long an endpoint that could not be dialled is passed over at most: one second at first, then twice "
        "as long each time a single client's attempt shows that it is still dead. 0 passes over none: strict "
        "round robin over all endpoints, whether they answer or not.",
    )
    splice: bool = setting(
        True,
        "splice",
        SWITCH,
        RELAY,
        "Move bulk TCP data within the kernel, by splice(2). Small messages are copied in any case, which is "
        "faster for them.",
    )
    drain_timeout: float = setting(
        5.0,
        "drain-timeout",
        duration("5s", least="0s"),
        RELAY,
        "How long established connections may go on after SIGTERM or SIGINT. Those that are left are reset; a "
        "second signal does so at once.",
    )
    iptables_sync_period: float = setting(
        30.0,
        "iptables-sync-period",
        duration("30s"),
        SYNC,
        "The longest time between two syncs, however little changes: what others did to our rules is repaired "
        "and what failed is tried again. /healthz fails once a change has waited for twice as long.",
    )
    iptables_min_sync_period: float = setting(
        1.0,
        "iptables-min-sync-period",
        duration("1s", least="0s"),
        SYNC,
        "The shortest time between two syncs, so that many changes of Services become one. Changes of "
        "endpoints take effect at once and do not wait for it. 0s: no limit. At most --iptables-sync-period.",
    )
    healthz_bind_address: Address | None = setting(
        Address("0.0.0.0", 10256),
        "healthz-bind-address",
        server(10256, "0.0.0.0:10256"),
        ADMIN,
        "Where /healthz, /livez and /readyz are served. An IP alone gets port 10256; port 0 is one that the "
        "kernel picks, told in the log. Empty: no such server.",
    )
    metrics_bind_address: Address | None = setting(
        Address("127.0.0.1", 10249),
        "metrics-bind-address",
        server(10249, "127.0.0.1:10249"),
        ADMIN,
        "Where /metrics, /services, /connections, /configz, /proxyMode and a /healthz of its own are served. "
        "They show who talks to whom and ask for no password, so think before leaving loopback. An IP alone "
        "gets port 10249; port 0 is one that the kernel picks, told in the log. Empty: no such server.",
    )
    bind_address_hard_fail: bool = setting(
        False,
        "bind-address-hard-fail",
        SWITCH,
        ADMIN,
        "End with an error when one of these two servers cannot listen. Otherwise it is tried again every 5 seconds.",
    )
    verbosity: int = setting(
        0,
        "v",
        number(0, 10, 2),
        LOGGING,
        "How much is logged. 0 and 1: service ports and rules that change, and what goes wrong. From 2: what "
        "each sync does. From 4: the start and the end of each connection as well.",
    )
    logging_format: LoggingFormat = setting(
        LoggingFormat.TEXT,
        "logging-format",
        choice(LoggingFormat),
        LOGGING,
        "text: lines for people. json: one object a line, for machines.",
    )
    cleanup: bool = setting(
        False,
        "cleanup",
        SWITCH,
        INSTEAD,
        "Remove every rule, route and other trace that a run left in the kernel, and exit. Rules of others stay.",
    )

    def configz(self) -> dict[str, object]:
        """As /configz shows it: flag names in lowerCamelCase, durations and addresses as text."""
        return {"userspaceproxy.config": {_camel(flag.name): _in_json(flag, value) for flag, value in settings(self)}}


HELP = Flag("help", SWITCH, INSTEAD, "Print this text and exit; -h does too.")
VERSION = Flag("version", SWITCH, INSTEAD, "Print the version and exit.")
FIELDS: Mapping[str, str] = {each.metadata["flag"].name: each.name for each in fields(Config)}
KNOWN: Mapping[str, Flag[typing.Any]] = {
    flag.name: flag for flag in (*(each.metadata["flag"] for each in fields(Config)), HELP, VERSION)
} | {"h": HELP}


def settings(config: Config) -> Iterator[tuple[Flag[typing.Any], typing.Any]]:
    """Every flag and its value, in the order of the help text."""
    for each in fields(config):
        yield each.metadata["flag"], getattr(config, each.name)


def _in_json(flag: Flag[typing.Any], value: typing.Any) -> object:
    return flag.kind.in_json(value) if flag.kind.in_json else flag.kind.show(value)


def _camel(name: str) -> str:
    first, *others = name.split("-")
    return first + "".join(word.capitalize() for word in others)
