"""From a command line to a Config, or to every reason why there is none.

Nothing is looked at on the host: whether a path exists or an address can be bound shows when it is used.
"""

from __future__ import annotations

import enum
import ipaddress
import typing
from collections.abc import Iterator, Sequence

from userspace_proxy.config.commandline import read
from userspace_proxy.config.table import FIELDS, KNOWN, CaptureWay, Config
from userspace_proxy.config.values import Address, format_duration
from userspace_proxy.exceptions import ConfigError


class Show(enum.Enum):
    """What a command line asks for instead of a running proxy."""

    HELP = enum.auto()
    VERSION = enum.auto()


def parse(argv: Sequence[str]) -> Config | Show:
    """Read a command line, without the program's name. Raises ConfigError that tells every problem there is."""
    given, problems = read(argv, KNOWN)
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
    config = Config(**{FIELDS[name]: value for name, value in values.items()})
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
