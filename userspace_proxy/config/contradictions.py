"""What cannot be set together, and what is wrong with it."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterator, Sequence

from userspace_proxy.config.own import CaptureWay
from userspace_proxy.config.table import Config
from userspace_proxy.config.unused import LocalMode
from userspace_proxy.config.values import Address, format_duration


def contradictions(config: Config, called: Callable[[str], str]) -> Iterator[tuple[Sequence[str], str]]:
    """The names of flags, and what is wrong with them; `called` is how whoever set one calls it."""
    yield from _sources(config, called)
    yield from _capture(config, called)
    yield from _periods(config, called)
    yield from _servers(config, called)
    yield from _interfaces(config, called)


def _sources(config: Config, called: Callable[[str], str]) -> Iterator[tuple[Sequence[str], str]]:
    for name, value in (("kubeconfig", config.kubeconfig), ("master", config.master)):
        if config.manifests and value:
            problem = f"{called(name)}={value!r}: --manifests is given too; allowed: one source of Services; remove one"
            yield ("manifests", name), problem


def _capture(config: Config, called: Callable[[str], str]) -> Iterator[tuple[Sequence[str], str]]:
    bind = config.bind_address
    redirects = config.capture not in (CaptureWay.LOCAL, CaptureWay.NONE)
    if ipaddress.ip_address(bind).is_loopback and redirects and not config.cleanup:
        name = called("bind-address")
        problem = (
            f"{name}={bind!r}: traffic of other hosts and pods cannot be captured to a loopback address; "
            f"allowed: loopback with --capture=local or none only; write --capture=none or {name}=0.0.0.0"
        )
        yield ("bind-address", "capture"), problem


def _periods(config: Config, called: Callable[[str], str]) -> Iterator[tuple[Sequence[str], str]]:
    if config.iptables_min_sync_period > config.iptables_sync_period:
        least = format_duration(config.iptables_min_sync_period)
        most = format_duration(config.iptables_sync_period)
        name = called("iptables-min-sync-period")
        problem = (
            f"{name}={least!r}: longer than {called('iptables-sync-period')} ({most}); "
            f"allowed: {most} at most; write for example {name}={most}"
        )
        yield ("iptables-min-sync-period", "iptables-sync-period"), problem


def _servers(config: Config, called: Callable[[str], str]) -> Iterator[tuple[Sequence[str], str]]:
    health, metrics = config.healthz_bind_address, config.metrics_bind_address
    if health and metrics and health.port and health.port == metrics.port and _overlap(health.ip, metrics.ip):
        other = Address(metrics.ip, 10256 if metrics.port == 10249 else 10249)
        name = called("metrics-bind-address")
        problem = (
            f"{name}={str(metrics)!r}: {called('healthz-bind-address')}={health} has this port; "
            f"allowed: another port or address; write for example {name}={other}"
        )
        yield ("healthz-bind-address", "metrics-bind-address"), problem


def _interfaces(config: Config, called: Callable[[str], str]) -> Iterator[tuple[Sequence[str], str]]:
    """Without effect, but a mistake in them would show with kube-proxy."""
    for mode, name, value in (
        (LocalMode.BRIDGE_INTERFACE, "pod-bridge-interface", config.pod_bridge_interface),
        (LocalMode.INTERFACE_NAME_PREFIX, "pod-interface-name-prefix", config.pod_interface_name_prefix),
    ):
        if config.detect_local_mode is mode and not value:
            problem = f"{called('detect-local-mode')}={str(mode)!r}: needs {called(name)}, which is empty; set it"
            yield ("detect-local-mode", name), problem


def _overlap(one: str, other: str) -> bool:
    """Whether two servers on one port get into each other's way; `::` listens on IPv4 too."""
    if "::" in (one, other) or one == other:
        return True
    return "0.0.0.0" in (one, other) and (":" in one) == (":" in other)
