"""What can be set: `Config`, one validated value, and the flags that make it.

Each field of `Config` carries its flag: name, kind, help. Parsing, /configz, and the help text and
docs/configuration.md that `manual` writes are all drawn from there, so that they cannot disagree. How Go
programs write flags, and values that are not our own, is in `flags`.

Nothing is looked at on the host: whether a path exists or an address can be bound shows when it is used.
"""

from __future__ import annotations

import enum
import ipaddress
import pathlib
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

from userspace_proxy.exceptions import ConfigError
from userspace_proxy.flags import (
    CIDRS,
    SWITCH,
    Address,
    Flag,
    Kind,
    choice,
    decimal,
    duration,
    format_duration,
    number,
    parse_ip,
    read,
    server,
)


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


class Show(enum.Enum):
    """What a command line asks for instead of a running proxy."""

    HELP = enum.auto()
    VERSION = enum.auto()


@dataclass(frozen=True, slots=True)
class PortRange:
    """Port numbers, both ends included."""

    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"


def _bind_address(text: str) -> str:
    return parse_ip(text) if text else "0.0.0.0"


def _port_range(text: str) -> PortRange | None:
    parts = re.fullmatch(r"([0-9]+)(?:([-+])([0-9]+))?", text.strip() or "0")
    if parts is None:
        raise ValueError("not a range of ports")
    first = last = int(parts[1])
    if parts[2]:
        last = int(parts[3]) if parts[2] == "-" else first + int(parts[3])
    if last > 65535 or first > 65535:
        raise ValueError(f"{max(first, last)} is no port")
    if last < first:
        raise ValueError("ends before it begins")
    return PortRange(first, last) if first else None


def _node_name(text: str) -> str:
    name = text.strip().lower()
    if text and not name:
        raise ValueError("only blanks")
    return name


def _trimmed(text: str) -> str:
    if text != text.strip():
        raise ValueError("blanks around it")
    return text


def _url(text: str) -> str:
    scheme, separator, _ = _trimmed(text).partition("://")
    if separator and scheme not in ("http", "https"):
        raise ValueError(f"{scheme} is not spoken by API servers")
    return text


def _path(text: str) -> tuple[pathlib.Path, ...]:
    if not text:
        raise ValueError("an empty path")
    return (pathlib.Path(text),)


_PATHS = Kind(
    "PATH",
    "a file or a directory",
    _path,
    lambda paths: ",".join(map(str, paths)),
    "/etc/userspace-proxy/manifests",
    repeats=True,
    in_json=lambda paths: [str(path) for path in paths],
)
_FILE = Kind("PATH", "a path, or nothing", _trimmed, str, "/etc/kubernetes/kube-proxy.conf")
_DIRECTORY = Kind(
    "PATH",
    "a directory, or nothing",
    lambda text: pathlib.Path(text) if _trimmed(text) else None,
    lambda path: str(path or ""),
    "/var/lib/userspace-proxy",
)
_URL = Kind("URL", "a URL with http:// or https://, HOST:PORT, or nothing", _url, str, "https://192.0.2.1:6443")
_NODE_NAME = Kind("NAME", "the name of a node, or nothing", _node_name, str, "node-1")
_IP = Kind("IP", "an IPv4 or IPv6 address", _bind_address, str, "0.0.0.0")
_PORTS = Kind(
    "RANGE",
    "A, A-B or A+N (N more ports than A), without blanks inside, up to 65535; nothing or 0 for any",
    _port_range,
    lambda ports: str(ports or ""),
    "30000-32000",
)


def _flag(name: str, kind: Kind[typing.Any], group: str, text: str) -> Mapping[str, Flag[typing.Any]]:
    return {"flag": Flag(name, kind, group, text)}


_SERVICES = "What to serve"
_CLUSTER = "The API server"
_CAPTURE = "Addresses and capture"
_RELAY = "Connections and flows"
_SYNC = "Syncing"
_ADMIN = "Health and metrics"
_LOGGING = "Logging"
_INSTEAD = "Instead of serving"


@dataclass(frozen=True, slots=True)
class Config:
    """Everything that can be set, as `parse` validated it. Times are seconds."""

    manifests: tuple[pathlib.Path, ...] = field(
        default=(),
        metadata=_flag(
            "manifests",
            _PATHS,
            _SERVICES,
            "A file or a directory of Services, EndpointSlices and Endpoints to serve, in YAML or JSON. May be "
            "given more than once. Changes to the files are served as they happen. Without it, an API server is "
            "asked: that of --kubeconfig or --master, or in a pod that of its cluster.",
        ),
    )
    kubeconfig: str = field(
        default="",
        metadata=_flag(
            "kubeconfig",
            _FILE,
            _CLUSTER,
            "A file that tells where the API server is and who we are to it: its current context, with client "
            "certificates, tokens, exec plugins and proxy-url (http, https or socks5). When it or a file it names "
            "changes, it is read anew. Empty, and no --master: the service account of the pod this runs in.",
        ),
    )
    master: str = field(
        default="",
        metadata=_flag(
            "master",
            _URL,
            _CLUSTER,
            "Where the API server is, in the place of what --kubeconfig tells. Without --kubeconfig, no credentials "
            "are sent.",
        ),
    )
    hostname_override: str = field(
        default="",
        metadata=_flag(
            "hostname-override",
            _NODE_NAME,
            _CLUSTER,
            "The name of the node this runs on. Empty: the name of this host, in lower case.",
        ),
    )
    state_dir: pathlib.Path | None = field(
        default=None,
        metadata=_flag(
            "state-dir",
            _DIRECTORY,
            _CLUSTER,
            "A directory in which to keep what the API server told last. A proxy that starts while the API server "
            "is away serves that until it is back. Empty: nothing is kept, and nothing served until then.",
        ),
    )
    config_sync_period: float = field(
        default=900.0,
        metadata=_flag(
            "config-sync-period",
            duration("15m0s"),
            _CLUSTER,
            "How often all that is known is gone through again, even though the API server tells of no change.",
        ),
    )
    kube_api_qps: float = field(
        default=5.0,
        metadata=_flag(
            "kube-api-qps",
            decimal(5),
            _CLUSTER,
            "How many requests a second are sent to the API server in the long run. 0: 5. Below 0: no limit.",
        ),
    )
    kube_api_burst: int = field(
        default=10,
        metadata=_flag(
            "kube-api-burst",
            number(0, 2_147_483_647, 10),
            _CLUSTER,
            "How many requests may be sent at once, faster than --kube-api-qps. 0: 10.",
        ),
    )
    kube_api_content_type: ContentType = field(
        default=ContentType.JSON,
        metadata=_flag(
            "kube-api-content-type",
            replace(choice(ContentType), placeholder="TYPE"),
            _CLUSTER,
            "Taken as kube-proxy takes it, and of no effect: JSON is spoken, which every API server does.",
        ),
    )
    capture: CaptureWay = field(
        default=CaptureWay.AUTO,
        metadata=_flag(
            "capture",
            choice(CaptureWay),
            _CAPTURE,
            "How the traffic of service addresses is made to reach the proxy ports. iptables: rules in the nat "
            "table, which needs root. none: not at all; clients connect to the proxy ports, which the log and "
            "/services tell. auto: iptables where that works, else none.",
        ),
    )
    bind_address: str = field(
        default="0.0.0.0",
        metadata=_flag(
            "bind-address",
            _IP,
            _CAPTURE,
            "The address that proxy ports listen on. 0.0.0.0 and :: both stand for all addresses, of the family "
            "that each Service has. A loopback address can be reached by no capture and is allowed with "
            "--capture=none only.",
        ),
    )
    proxy_port_range: PortRange | None = field(
        default=None,
        metadata=_flag(
            "proxy-port-range",
            _PORTS,
            _CAPTURE,
            "The ports to take proxy ports from: one port (A), a range (A-B), or A and the N ports after it "
            "(A+N). Each service port takes one for each of its address families. Empty or 0: whichever are free.",
        ),
    )
    nodeport_addresses: tuple[str, ...] = field(
        default=(),
        metadata=_flag(
            "nodeport-addresses",
            CIDRS,
            _CAPTURE,
            "The networks whose addresses, where this host has them, serve node ports. May be given more than "
            "once. Empty: all addresses of this host.",
        ),
    )
    workers: int = field(
        default=1,
        metadata=_flag(
            "workers",
            number(1, 64, 2),
            _RELAY,
            "How many processes relay. With 1 it is the proxy's own. With more, each takes clients of every service "
            "port, and a process of its own sees to everything else; round robin is each worker's own, affinity "
            "holds over all of them. As many as there are CPUs to spare is the most that helps.",
        ),
    )
    udp_timeout: float = field(
        default=0.25,
        metadata=_flag(
            "udp-timeout",
            duration("250ms"),
            _RELAY,
            "How long a UDP flow (a client's address and port) is kept without a datagram either way. An answer "
            "that takes longer is lost, so raise it for slow servers.",
        ),
    )
    max_udp_flows: int = field(
        default=4096,
        metadata=_flag(
            "max-udp-flows",
            number(1, 1_000_000, 4096),
            _RELAY,
            "How many UDP flows there may be at a time. One more ends the one that has been idle for longest. Several "
            "workers share the number out evenly.",
        ),
    )
    half_close_timeout: float = field(
        default=300.0,
        metadata=_flag(
            "half-close-timeout",
            duration("5m0s"),
            _RELAY,
            "How long a TCP connection that one side has finished may stay without a byte from the other side. "
            "Then both are reset.",
        ),
    )
    max_ejection_time: float = field(
        default=10.0,
        metadata=_flag(
            "max-ejection-time",
            duration("10s", least="0s"),
            _RELAY,
            "How long an endpoint that could not be dialled is passed over at most: one second at first, then twice "
            "as long each time a single client's attempt shows that it is still dead. 0 passes over none: strict "
            "round robin over all endpoints, whether they answer or not.",
        ),
    )
    splice: bool = field(
        default=True,
        metadata=_flag(
            "splice",
            SWITCH,
            _RELAY,
            "Move bulk TCP data within the kernel, by splice(2). Small messages are copied in any case, which is "
            "faster for them.",
        ),
    )
    drain_timeout: float = field(
        default=5.0,
        metadata=_flag(
            "drain-timeout",
            duration("5s", least="0s"),
            _RELAY,
            "How long established connections may go on after SIGTERM or SIGINT. Those that are left are reset; a "
            "second signal does so at once.",
        ),
    )
    iptables_sync_period: float = field(
        default=30.0,
        metadata=_flag(
            "iptables-sync-period",
            duration("30s"),
            _SYNC,
            "The longest time between two syncs, however little changes: what others did to our rules is repaired "
            "and what failed is tried again. /healthz fails once a change has waited for twice as long.",
        ),
    )
    iptables_min_sync_period: float = field(
        default=1.0,
        metadata=_flag(
            "iptables-min-sync-period",
            duration("1s", least="0s"),
            _SYNC,
            "The shortest time between two syncs, so that many changes of Services become one. Changes of "
            "endpoints take effect at once and do not wait for it. 0s: no limit. At most --iptables-sync-period.",
        ),
    )
    healthz_bind_address: Address | None = field(
        default=Address("0.0.0.0", 10256),
        metadata=_flag(
            "healthz-bind-address",
            server(10256, "0.0.0.0:10256"),
            _ADMIN,
            "Where /healthz, /livez and /readyz are served. An IP alone gets port 10256; port 0 is one that the "
            "kernel picks, told in the log. Empty: no such server.",
        ),
    )
    metrics_bind_address: Address | None = field(
        default=Address("127.0.0.1", 10249),
        metadata=_flag(
            "metrics-bind-address",
            server(10249, "127.0.0.1:10249"),
            _ADMIN,
            "Where /metrics, /services, /connections, /configz, /proxyMode and a /healthz of its own are served. "
            "They show who talks to whom and ask for no password, so think before leaving loopback. An IP alone "
            "gets port 10249; port 0 is one that the kernel picks, told in the log. Empty: no such server.",
        ),
    )
    bind_address_hard_fail: bool = field(
        default=False,
        metadata=_flag(
            "bind-address-hard-fail",
            SWITCH,
            _ADMIN,
            "End with an error when one of these two servers cannot listen. Otherwise it is tried again every 5 "
            "seconds.",
        ),
    )
    verbosity: int = field(
        default=0,
        metadata=_flag(
            "v",
            number(0, 10, 2),
            _LOGGING,
            "How much is logged. 0 and 1: service ports and rules that change, and what goes wrong. From 2: what "
            "each sync does. From 4: the start and the end of each connection as well.",
        ),
    )
    logging_format: LoggingFormat = field(
        default=LoggingFormat.TEXT,
        metadata=_flag(
            "logging-format",
            choice(LoggingFormat),
            _LOGGING,
            "text: lines for people. json: one object a line, for machines.",
        ),
    )
    cleanup: bool = field(
        default=False,
        metadata=_flag(
            "cleanup",
            SWITCH,
            _INSTEAD,
            "Remove every rule, route and other trace that a run left in the kernel, and exit. Rules of others stay.",
        ),
    )

    def configz(self) -> dict[str, object]:
        """As /configz shows it: flag names in lowerCamelCase, durations and addresses as text."""
        return {"userspaceproxy.config": {_camel(flag.name): _in_json(flag, value) for flag, value in settings(self)}}


HELP = Flag("help", SWITCH, _INSTEAD, "Print this text and exit; -h does too.")
VERSION = Flag("version", SWITCH, _INSTEAD, "Print the version and exit.")
_FIELDS: Mapping[str, str] = {each.metadata["flag"].name: each.name for each in fields(Config)}
_KNOWN: Mapping[str, Flag[typing.Any]] = {
    flag.name: flag for flag in (*(each.metadata["flag"] for each in fields(Config)), HELP, VERSION)
} | {"h": HELP}


def settings(config: Config) -> Iterator[tuple[Flag[typing.Any], typing.Any]]:
    """Every flag and its value, in the order of the help text."""
    for each in fields(config):
        yield each.metadata["flag"], getattr(config, each.name)


def parse(argv: Sequence[str]) -> Config | Show:
    """Read a command line, without the program's name. Raises ConfigError that tells every problem there is."""
    given, problems = read(argv, _KNOWN)
    values: dict[str, typing.Any] = {}
    unusable = set()
    for flag, text in given:
        try:
            value = flag.kind.parse(text)
        except ValueError as why:
            problems.append(flag.problem(text, why))
            unusable.add(flag.name)
            continue
        values[flag.name] = values.get(flag.name, ()) + value if flag.kind.repeats else value
    if values.pop("help", False):
        return Show.HELP
    show_version = values.pop("version", False)
    config = Config(**{_FIELDS[name]: value for name, value in values.items()})
    if not show_version:
        # A flag that could not be read has its default here, which would be blamed for nothing.
        problems += [problem for names, problem in _contradictions(config) if unusable.isdisjoint(names)]
    if problems:
        raise ConfigError(problems)
    return Show.VERSION if show_version else config


def _contradictions(config: Config) -> Iterator[tuple[Sequence[str], str]]:
    """Flags that cannot be used together, and what is wrong with them."""
    for name, value in (("kubeconfig", config.kubeconfig), ("master", config.master)):
        if config.manifests and value:
            problem = f"--{name}={value!r}: --manifests is given too; allowed: one source of Services; remove one"
            yield ("manifests", name), problem
    bind = config.bind_address
    if ipaddress.ip_address(bind).is_loopback and config.capture is not CaptureWay.NONE and not config.cleanup:
        problem = (
            f"--bind-address={bind!r}: traffic of other hosts and pods cannot be captured to a loopback address; "
            "allowed: loopback with --capture=none only; write --capture=none or --bind-address=0.0.0.0"
        )
        yield ("bind-address", "capture"), problem
    if config.iptables_min_sync_period > config.iptables_sync_period:
        least = format_duration(config.iptables_min_sync_period)
        most = format_duration(config.iptables_sync_period)
        problem = (
            f"--iptables-min-sync-period={least!r}: longer than --iptables-sync-period ({most}); "
            f"allowed: {most} at most; write for example --iptables-min-sync-period={most}"
        )
        yield ("iptables-min-sync-period", "iptables-sync-period"), problem
    health, metrics = config.healthz_bind_address, config.metrics_bind_address
    if health and metrics and health.port and health.port == metrics.port and _overlap(health.ip, metrics.ip):
        other = Address(metrics.ip, 10256 if metrics.port == 10249 else 10249)
        problem = (
            f"--metrics-bind-address={str(metrics)!r}: --healthz-bind-address={health} has this port; "
            f"allowed: another port or address; write for example --metrics-bind-address={other}"
        )
        yield ("healthz-bind-address", "metrics-bind-address"), problem


def _overlap(one: str, other: str) -> bool:
    """Whether two servers on one port get into each other's way; `::` listens on IPv4 too."""
    if "::" in (one, other) or one == other:
        return True
    return "0.0.0.0" in (one, other) and (":" in one) == (":" in other)


def _in_json(flag: Flag[typing.Any], value: typing.Any) -> object:
    return flag.kind.in_json(value) if flag.kind.in_json else flag.kind.show(value)


def _camel(name: str) -> str:
    first, *others = name.split("-")
    return first + "".join(word.capitalize() for word in others)
