"""Each flag that changes nothing: its default, good values and bad, and that it is said to change nothing."""

from __future__ import annotations

import pytest

from tests.config.flags import M, accepted, by_default, cases, declared, refused
from userspace_proxy.config import parse
from userspace_proxy.config.table import FIELDS, FLAGS
from userspace_proxy.config.unused import LocalMode, UnusedSettings


def test_defaults():
    assert by_default(UnusedSettings) == {
        "kube_api_content_type": "application/vnd.kubernetes.protobuf",
        "accept_content_types": "",
        "detect_local_mode": LocalMode.NONE,
        "pod_bridge_interface": "",
        "pod_interface_name_prefix": "",
        "masquerade_all": False,
        "iptables_masquerade_bit": 14,
        "ipvs_exclude_cidrs": (),
        "ipvs_min_sync_period": 0.0,
        "ipvs_scheduler": "",
        "ipvs_strict_arp": False,
        "ipvs_sync_period": 30.0,
        "ipvs_tcp_timeout": 0.0,
        "ipvs_tcpfin_timeout": 0.0,
        "ipvs_udp_timeout": 0.0,
        "enable_dsr": False,
        "forward_healthcheck_vip": False,
        "network_name": "",
        "root_hns_endpoint_name": "",
        "source_vip": "",
        "show_hidden_metrics_for_version": "",
        "vmodule": "",
        "log_flush_frequency": 5.0,
        "logtostderr": True,
        "alsologtostderr": False,
        "log_dir": "",
        "log_file": "",
        "log_file_max_size": 1800,
        "stderrthreshold": "2",
        "one_output": False,
        "skip_headers": False,
        "skip_log_headers": False,
        "add_dir_header": False,
        "log_backtrace_at": ":0",
        "boot_id_file": "/proc/sys/kernel/random/boot_id",
        "machine_id_file": "/etc/machine-id,/var/lib/dbus/machine-id",
        "azure_container_registry_config": "",
    }


GOOD = {
    "kube-api-content-type": {"application/json": "application/json", "": ""},
    "detect-local-mode": {"": LocalMode.NONE, "NodeCIDR": LocalMode.NODE_CIDR, "ClusterCIDR": LocalMode.CLUSTER_CIDR},
    "pod-bridge-interface": {"cni0": "cni0"},
    "pod-interface-name-prefix": {"veth": "veth"},
    "masquerade-all": {"true": True},
    "iptables-masquerade-bit": {"0": 0, "31": 31},
    "ipvs-exclude-cidrs": {"10.0.0.0/8,::/0": ("10.0.0.0/8", "::/0"), "": ()},
    "ipvs-min-sync-period": {"0s": 0.0, "1s": 1.0},
    "ipvs-scheduler": {"rr": "rr"},
    "ipvs-strict-arp": {"t": True},
    "ipvs-sync-period": {"1m": 60.0},
    "ipvs-tcp-timeout": {"1h": 3600.0},
    "ipvs-tcpfin-timeout": {"1h": 3600.0},
    "ipvs-udp-timeout": {"1h": 3600.0},
    "show-hidden-metrics-for-version": {"": "", "1.24": "1.24", "1.19": "1.19"},
    "vmodule": {"": "", "proxier=4": "proxier=4", "a*=1,b=2,": "a*=1,b=2,"},
    "log-flush-frequency": {"0": 0.0},
    "logtostderr": {"false": False},
    "alsologtostderr": {"true": True},
    "log-dir": {"/var/log": "/var/log"},
    "log-file": {"/var/log/x": "/var/log/x"},
    "log-file-max-size": {"0": 0, "1800": 1800},
    "stderrthreshold": {"INFO": "INFO", "0": "0", "error": "error"},
    "one-output": {"true": True},
    "skip-headers": {"true": True},
    "skip-log-headers": {"true": True},
    "add-dir-header": {"true": True},
    "log-backtrace-at": {":0": ":0", "proxier.go:12": "proxier.go:12"},
    "boot-id-file": {"/x": "/x"},
    "machine-id-file": {"/x,/y": "/x,/y"},
    "azure-container-registry-config": {"/etc/azure.json": "/etc/azure.json"},
}
BAD = {
    "detect-local-mode": {"clustercidr": "no such choice"},
    "masquerade-all": {"on": "neither true nor false"},
    "iptables-masquerade-bit": {"-1": "too small", "32": "too large"},
    "ipvs-exclude-cidrs": {"10.0.0.1": "'10.0.0.1': a bare address; write 10.0.0.1/32"},
    "ipvs-min-sync-period": {"-1s": "too short"},
    "ipvs-strict-arp": {"2": "neither true nor false"},
    "ipvs-sync-period": {"1": "1 has no unit"},
    "ipvs-tcp-timeout": {"x": "not a duration"},
    "ipvs-tcpfin-timeout": {"x": "not a duration"},
    "ipvs-udp-timeout": {"x": "not a duration"},
    "show-hidden-metrics-for-version": {
        "1": "not MAJOR.MINOR",
        "v1.24": "not MAJOR.MINOR",
        "1.24.1": "not MAJOR.MINOR",
    },
    "vmodule": {"proxier": "not a list of PATTERN=N", "a=b": "not a list of PATTERN=N"},
    "log-flush-frequency": {"5": "5 has no unit"},
    "logtostderr": {"": "neither true nor false"},
    "alsologtostderr": {"": "neither true nor false"},
    "log-file-max-size": {"-1": "too small"},
    "stderrthreshold": {"4": "no such severity", "loud": "no such severity"},
    "one-output": {"": "neither true nor false"},
    "skip-headers": {"": "neither true nor false"},
    "skip-log-headers": {"": "neither true nor false"},
    "add-dir-header": {"": "neither true nor false"},
    "log-backtrace-at": {"12": "not FILE:N"},
}


@pytest.mark.parametrize(("name", "text", "value"), cases(GOOD))
def test_good_values_are_kept_and_said_to_be_without_effect(name, text, value):
    accepted([f"--{name}={text}"], FIELDS[name], value)
    (notice,) = parse([M, f"--{name.replace('-', '_')}={text}"]).notices
    assert notice == f"--{name}: without effect; {FLAGS[name].help}"


@pytest.mark.parametrize(("name", "text", "why"), cases(BAD))
def test_bad_values(name, text, why):
    refused(name, text, why)


def test_every_flag_has_been_given_well_and_badly():
    assert set(GOOD) == declared(UnusedSettings)
    any_text = {name for name in declared(UnusedSettings) if FLAGS[name].kind.placeholder == "TEXT"}
    assert set(BAD) == declared(UnusedSettings) - any_text
