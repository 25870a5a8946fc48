"""What the kubelet would set, worked out by hand from its documentation and from what it does."""

from __future__ import annotations

import subprocess

from hypothesis import given
from hypothesis import strategies as st

from userspace_proxy.environment import exports, variables
from userspace_proxy.model import Protocol, ServicePort, ServicePortName

REDIS = {ServicePortName("default", "redis-master", ""): ServicePort(Protocol.TCP, 6379, ("10.0.0.11",))}
DNS = {
    ServicePortName("default", "kube-dns", "dns"): ServicePort(Protocol.UDP, 53, ("fd00::a", "10.0.0.10")),
    ServicePortName("default", "kube-dns", "dns-tcp"): ServicePort(Protocol.TCP, 53, ("fd00::a", "10.0.0.10")),
}
API = {ServicePortName("default", "kubernetes", "https"): ServicePort(Protocol.TCP, 443, ("10.0.0.1",))}


def test_the_example_of_the_services_page() -> None:
    assert variables(REDIS, "default") == {
        "REDIS_MASTER_SERVICE_HOST": "10.0.0.11",
        "REDIS_MASTER_SERVICE_PORT": "6379",
        "REDIS_MASTER_PORT": "tcp://10.0.0.11:6379",
        "REDIS_MASTER_PORT_6379_TCP": "tcp://10.0.0.11:6379",
        "REDIS_MASTER_PORT_6379_TCP_PROTO": "tcp",
        "REDIS_MASTER_PORT_6379_TCP_PORT": "6379",
        "REDIS_MASTER_PORT_6379_TCP_ADDR": "10.0.0.11",
    }


def test_named_ports_and_ipv6() -> None:
    assert variables(DNS, "default") == {
        "KUBE_DNS_SERVICE_HOST": "fd00::a",
        "KUBE_DNS_SERVICE_PORT": "53",
        "KUBE_DNS_SERVICE_PORT_DNS": "53",
        "KUBE_DNS_SERVICE_PORT_DNS_TCP": "53",
        "KUBE_DNS_PORT": "udp://[fd00::a]:53",
        "KUBE_DNS_PORT_53_UDP": "udp://[fd00::a]:53",
        "KUBE_DNS_PORT_53_UDP_PROTO": "udp",
        "KUBE_DNS_PORT_53_UDP_PORT": "53",
        "KUBE_DNS_PORT_53_UDP_ADDR": "fd00::a",
        "KUBE_DNS_PORT_53_TCP": "tcp://[fd00::a]:53",
        "KUBE_DNS_PORT_53_TCP_PROTO": "tcp",
        "KUBE_DNS_PORT_53_TCP_PORT": "53",
        "KUBE_DNS_PORT_53_TCP_ADDR": "fd00::a",
    }


def test_a_namespace_sees_its_own_and_the_api_server() -> None:
    shop = {ServicePortName("shop", "web", ""): ServicePort(Protocol.TCP, 80, ("10.0.0.2",))}
    found = variables(REDIS | API | shop, "shop")
    assert {name.partition("_")[0] for name in found} == {"WEB", "KUBERNETES"}
    own = {ServicePortName("shop", "kubernetes", ""): ServicePort(Protocol.TCP, 80, ("10.0.0.3",))}
    assert variables(API | own, "shop")["KUBERNETES_SERVICE_HOST"] == "10.0.0.3"


def test_names_that_no_shell_takes_are_left_out() -> None:
    assert not variables({ServicePortName("a", "3com", ""): ServicePort(Protocol.TCP, 80, ("10.0.0.2",))}, "a")


NAMES = st.from_regex(r"[a-z]([-a-z0-9]{0,10}[a-z0-9])?", fullmatch=True)


@given(
    st.dictionaries(
        st.builds(ServicePortName, st.just("a"), NAMES, NAMES),
        st.builds(
            ServicePort,
            st.sampled_from(Protocol),
            st.integers(1, 65535),
            st.tuples(st.ip_addresses().map(str)),
        ),
        max_size=5,
    )
)
def test_a_shell_reads_what_was_meant(services: dict[ServicePortName, ServicePort]) -> None:
    wanted = variables(services, "a")
    script = exports(services, "a") + "".join(f'printf "%s\\n" "${name}"\n' for name in wanted)
    done = subprocess.run(["sh", "-eu"], input=script, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == list(wanted.values())
