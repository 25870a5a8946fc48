"""What can be set as with kube-proxy and changes nothing here: read, checked, written back, and said to have no effect.

Where a flag has no meaning for a proxy that relays by itself, a cluster's manifests should not have to know.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from userspace_proxy.config.flag import unused
from userspace_proxy.config.kinds import (
    CIDRS,
    LINE,
    PATTERNS,
    SEVERITY,
    SWITCH,
    TEXT,
    VERSION_BEFORE,
    choice,
    duration,
    number,
)


class LocalMode(enum.StrEnum):
    NONE = ""
    CLUSTER_CIDR = "ClusterCIDR"
    NODE_CIDR = "NodeCIDR"
    BRIDGE_INTERFACE = "BridgeInterface"
    INTERFACE_NAME_PREFIX = "InterfaceNamePrefix"


_MASQUERADE = "a relayed connection comes from this host in any case, so nothing has to be masqueraded"
_LOCAL = "which clients are inside is told by --cluster-cidr alone"
_IPVS = "it is for kube-proxy's mode ipvs"
_WINDOWS = "it is for kube-proxy on Windows"
_JSON = "JSON is spoken, which every API server does"
_STDERR = "all that is logged goes to standard error, with a time and a level, and -v is for all of it"
_ELSEWHERE = "it came with a library of kube-proxy's that has no part in proxying"
_METRICS = "no metric is hidden"
_ANY = duration("30s", least="0s")


@dataclass(frozen=True)
class UnusedSettings:
    kube_api_content_type: str = unused(
        "application/vnd.kubernetes.protobuf", "kube-api-content-type", TEXT, _JSON, "clientConnection.contentType"
    )
    accept_content_types: str = unused("", "clientConnection.acceptContentTypes", TEXT, _JSON)
    detect_local_mode: LocalMode = unused(
        LocalMode.NONE, "detect-local-mode", choice(LocalMode), _LOCAL, "detectLocalMode"
    )
    pod_bridge_interface: str = unused("", "pod-bridge-interface", TEXT, _LOCAL, "detectLocal.bridgeInterface")
    pod_interface_name_prefix: str = unused(
        "", "pod-interface-name-prefix", TEXT, _LOCAL, "detectLocal.interfaceNamePrefix"
    )
    masquerade_all: bool = unused(False, "masquerade-all", SWITCH, _MASQUERADE, "iptables.masqueradeAll")
    iptables_masquerade_bit: int = unused(
        14, "iptables-masquerade-bit", number(0, 31, 14), _MASQUERADE, "iptables.masqueradeBit", keeps_zero=True
    )
    ipvs_exclude_cidrs: tuple[str, ...] = unused((), "ipvs-exclude-cidrs", CIDRS, _IPVS, "ipvs.excludeCIDRs")
    ipvs_min_sync_period: float = unused(0.0, "ipvs-min-sync-period", _ANY, _IPVS, "ipvs.minSyncPeriod")
    ipvs_scheduler: str = unused("", "ipvs-scheduler", TEXT, _IPVS, "ipvs.scheduler")
    ipvs_strict_arp: bool = unused(False, "ipvs-strict-arp", SWITCH, _IPVS, "ipvs.strictARP")
    ipvs_sync_period: float = unused(30.0, "ipvs-sync-period", _ANY, _IPVS, "ipvs.syncPeriod")
    ipvs_tcp_timeout: float = unused(0.0, "ipvs-tcp-timeout", _ANY, _IPVS, "ipvs.tcpTimeout")
    ipvs_tcpfin_timeout: float = unused(0.0, "ipvs-tcpfin-timeout", _ANY, _IPVS, "ipvs.tcpFinTimeout")
    ipvs_udp_timeout: float = unused(0.0, "ipvs-udp-timeout", _ANY, _IPVS, "ipvs.udpTimeout")
    enable_dsr: bool = unused(False, "winkernel.enableDSR", SWITCH, _WINDOWS)
    forward_healthcheck_vip: bool = unused(False, "winkernel.forwardHealthCheckVip", SWITCH, _WINDOWS)
    network_name: str = unused("", "winkernel.networkName", TEXT, _WINDOWS)
    root_hns_endpoint_name: str = unused("", "winkernel.rootHnsEndpointName", TEXT, _WINDOWS)
    source_vip: str = unused("", "winkernel.sourceVip", TEXT, _WINDOWS)
    show_hidden_metrics_for_version: str = unused(
        "", "show-hidden-metrics-for-version", VERSION_BEFORE, _METRICS, "showHiddenMetricsForVersion"
    )
    vmodule: str = unused("", "vmodule", PATTERNS, _STDERR)
    log_flush_frequency: float = unused(5.0, "log-flush-frequency", _ANY, _STDERR)
    logtostderr: bool = unused(True, "logtostderr", SWITCH, _STDERR)
    alsologtostderr: bool = unused(False, "alsologtostderr", SWITCH, _STDERR)
    log_dir: str = unused("", "log-dir", TEXT, _STDERR)
    log_file: str = unused("", "log-file", TEXT, _STDERR)
    log_file_max_size: int = unused(1800, "log-file-max-size", number(0, 2**63 - 1, 1800), _STDERR)
    stderrthreshold: str = unused("2", "stderrthreshold", SEVERITY, _STDERR)
    one_output: bool = unused(False, "one-output", SWITCH, _STDERR)
    skip_headers: bool = unused(False, "skip-headers", SWITCH, _STDERR)
    skip_log_headers: bool = unused(False, "skip-log-headers", SWITCH, _STDERR)
    add_dir_header: bool = unused(False, "add-dir-header", SWITCH, _STDERR)
    log_backtrace_at: str = unused(":0", "log-backtrace-at", LINE, _STDERR)
    boot_id_file: str = unused("/proc/sys/kernel/random/boot_id", "boot-id-file", TEXT, _ELSEWHERE)
    machine_id_file: str = unused("/etc/machine-id,/var/lib/dbus/machine-id", "machine-id-file", TEXT, _ELSEWHERE)
    azure_container_registry_config: str = unused("", "azure-container-registry-config", TEXT, _ELSEWHERE)
