"""What can be set as with kube-proxy, and does here what it does there."""

from __future__ import annotations

import pathlib
from dataclasses import dataclass

from userspace_proxy.config.flag import ADDRESSES, ADMIN, HOST, INSTEAD, MODE, SERVER, SYNC, setting
from userspace_proxy.config.gates import Gates
from userspace_proxy.config.kinds import (
    CIDRS,
    CLUSTER_CIDR,
    FILE,
    GATES,
    IP,
    NODE_NAME,
    PATH,
    PORTS,
    PROXY_MODE,
    SWITCH,
    URL,
    decimal,
    duration,
    number,
    server,
)
from userspace_proxy.config.values import Address, PortRange


@dataclass(frozen=True)
class KubeProxySettings:
    config: pathlib.Path | None = setting(
        None,
        "config",
        PATH,
        MODE,
        "A file with a KubeProxyConfiguration (kubeproxy.config.k8s.io/v1alpha1) in YAML or JSON. It takes the place "
        "of all flags that it has fields for, --hostname-override excepted; those are then not looked at. When it "
        "changes, and can be used, the proxy ends in order and starts anew with it.",
    )
    kubeconfig: str = setting(
        "",
        "kubeconfig",
        FILE,
        SERVER,
        "A file that tells where the API server is and who we are to it: its current context, with client "
        "certificates, tokens, exec plugins and proxy-url (http, https or socks5). When it or a file it names "
        "changes, it is read anew. Empty, and no --master: the service account of the pod this runs in.",
        place="clientConnection.kubeconfig",
    )
    master: str = setting(
        "",
        "master",
        URL,
        SERVER,
        "Where the API server is, in the place of what --kubeconfig tells. Without --kubeconfig, no credentials "
        "are sent.",
    )
    hostname_override: str = setting(
        "",
        "hostname-override",
        NODE_NAME,
        SERVER,
        "The name of the node this runs on. Empty: the name of this host, in lower case.",
        place="hostnameOverride",
    )
    config_sync_period: float = setting(
        900.0,
        "config-sync-period",
        duration("15m0s", least="1s"),
        SERVER,
        "How often all that is known is gone through again, even though the API server tells of no change.",
        place="configSyncPeriod",
    )
    kube_api_qps: float = setting(
        5.0,
        "kube-api-qps",
        decimal(5, zero=5.0),
        SERVER,
        "How many requests a second are sent to the API server in the long run. 0: 5. Below 0: no limit.",
        place="clientConnection.qps",
    )
    kube_api_burst: int = setting(
        10,
        "kube-api-burst",
        number(0, 2_147_483_647, 10, zero=10),
        SERVER,
        "How many requests may be sent at once, faster than --kube-api-qps. 0: 10.",
        place="clientConnection.burst",
    )
    bind_address: str = setting(
        "0.0.0.0",
        "bind-address",
        IP,
        ADDRESSES,
        "The address that proxy ports listen on. 0.0.0.0 and :: both stand for all addresses, of the family "
        "that each Service has. A loopback address can be reached by no redirect and is allowed with "
        "--capture=local and none only.",
        place="bindAddress",
    )
    proxy_port_range: PortRange | None = setting(
        None,
        "proxy-port-range",
        PORTS,
        ADDRESSES,
        "The ports to take proxy ports from: one port (A), a range (A-B), or A and the N ports after it "
        "(A+N). Each service port takes one for each of its address families. Empty or 0: whichever are free.",
        place="portRange",
    )
    nodeport_addresses: tuple[str, ...] = setting(
        (),
        "nodeport-addresses",
        CIDRS,
        ADDRESSES,
        "The networks whose addresses, where this host has them, serve node ports. May be given more than "
        "once. Empty: all addresses of this host.",
        place="nodePortAddresses",
    )
    cluster_cidr: tuple[str, ...] = setting(
        (),
        "cluster-cidr",
        CLUSTER_CIDR,
        ADDRESSES,
        "The pods' network, or one of each family. Clients in it are inside, as is this node: by an external "
        "address of a Service with externalTrafficPolicy Local they reach the endpoints of all nodes.",
        place="clusterCIDR",
    )
    udp_timeout: float = setting(
        0.25,
        "udp-timeout",
        duration("250ms", least="1ms"),
        ADDRESSES,
        "How long a UDP flow (a client's address and port) is kept without a datagram either way. An answer "
        "that takes longer is lost, so raise it for slow servers.",
        place="udpIdleTimeout",
    )
    iptables_sync_period: float = setting(
        30.0,
        "iptables-sync-period",
        duration("30s", least="100ms"),
        SYNC,
        "The longest time between two syncs, however little changes: what others did to our rules is repaired "
        "and what failed is tried again. /healthz fails once a change has waited for twice as long.",
        place="iptables.syncPeriod",
    )
    iptables_min_sync_period: float = setting(
        1.0,
        "iptables-min-sync-period",
        duration("1s", least="0s"),
        SYNC,
        "The shortest time between two syncs, so that many changes of Services become one. Changes of "
        "endpoints take effect at once and do not wait for it. 0s: no limit. At most --iptables-sync-period.",
        place="iptables.minSyncPeriod",
    )
    healthz_bind_address: Address | None = setting(
        Address("0.0.0.0", 10256),
        "healthz-bind-address",
        server(10256, "0.0.0.0:10256"),
        ADMIN,
        "Where /healthz, /livez and /readyz are served. An IP alone gets port 10256; port 0 is one that the "
        "kernel picks, told in the log. Empty: no such server.",
        place="healthzBindAddress",
    )
    metrics_bind_address: Address | None = setting(
        Address("127.0.0.1", 10249),
        "metrics-bind-address",
        server(10249, "127.0.0.1:10249"),
        ADMIN,
        "Where /metrics, /services, /connections, /configz, /proxyMode and a /healthz of its own are served. "
        "They show who talks to whom and ask for no password, so think before leaving loopback. An IP alone "
        "gets port 10249; port 0 is one that the kernel picks, told in the log. Empty: no such server.",
        place="metricsBindAddress",
    )
    bind_address_hard_fail: bool = setting(
        False,
        "bind-address-hard-fail",
        SWITCH,
        ADMIN,
        "End with an error when one of these two servers cannot listen. Otherwise it is tried again every 5 seconds.",
        place="bindAddressHardFail",
    )
    profiling: bool = setting(
        False,
        "profiling",
        SWITCH,
        ADMIN,
        "Serve /debug/stacks, where each thread and task is at this moment, beside /metrics, and /debug/flags/v, to "
        "which a new -v can be PUT. There are no profiles as of Go programs.",
        place="enableProfiling",
    )
    verbosity: int = setting(
        0,
        "v",
        number(0, 2_147_483_647, 2),
        ADMIN,
        "How much is logged. 0 and 1: service ports and rules that change, and what goes wrong. From 2: what "
        "each sync does. From 4: the start and the end of each connection as well.",
    )
    conntrack_max_per_core: int = setting(
        32768,
        "conntrack-max-per-core",
        number(0, 2_147_483_647, 32768),
        HOST,
        "How many connections conntrack has to have room for, for each CPU. The kernel's limit is raised to that if "
        "it is lower and can be set, and never lowered. 0: left as it is, whatever --conntrack-min.",
        place="conntrack.maxPerCore",
        keeps_zero=True,
    )
    conntrack_min: int = setting(
        131072,
        "conntrack-min",
        number(0, 2_147_483_647, 131072),
        HOST,
        "How many connections conntrack has to have room for at the least, however few CPUs there are.",
        place="conntrack.min",
        keeps_zero=True,
    )
    conntrack_tcp_timeout_established: float = setting(
        86400.0,
        "conntrack-tcp-timeout-established",
        duration("24h0m0s", least="0s"),
        HOST,
        "How long conntrack has to remember an idle TCP connection. Raised if it is shorter, never lowered; 0: left "
        "as it is. A connection that conntrack has forgotten is cut.",
        place="conntrack.tcpEstablishedTimeout",
        keeps_zero=True,
    )
    conntrack_tcp_timeout_close_wait: float = setting(
        3600.0,
        "conntrack-tcp-timeout-close-wait",
        duration("1h0m0s", least="0s"),
        HOST,
        "The same for a connection that one side has finished.",
        place="conntrack.tcpCloseWaitTimeout",
        keeps_zero=True,
    )
    oom_score_adj: int = setting(
        -999,
        "oom-score-adj",
        number(-1000, 1000, -999),
        HOST,
        "How willingly the kernel ends this process and its workers when memory is short, from -1000 (never) to 1000. "
        "To go below what it is takes CAP_SYS_RESOURCE; without, it is left as it is.",
        place="oomScoreAdj",
        keeps_zero=True,
    )
    proxy_mode: str = setting(
        "",
        "proxy-mode",
        PROXY_MODE,
        MODE,
        "userspace, which is the same as nothing here: there is one mode. kube-proxy's others are refused.",
        place="mode",
    )
    feature_gates: Gates = setting(
        (),
        "feature-gates",
        GATES,
        MODE,
        "Gates of Kubernetes, as GATE=true,GATE=false; AllAlpha and AllBeta set all of a stage. May be given more "
        "than once. Those that change nothing here are taken all the same, and told in the log.",
        place="featureGates",
    )
    write_config_to: pathlib.Path | None = setting(
        None,
        "write-config-to",
        PATH,
        INSTEAD,
        "Write what is set, by flags or by --config, to this file as a KubeProxyConfiguration, and exit. Without "
        "other flags, these are the defaults.",
    )
    cleanup: bool = setting(
        False,
        "cleanup",
        SWITCH,
        INSTEAD,
        "Remove every rule, route and other trace that a run left in the kernel, and exit. Rules of others stay.",
    )
