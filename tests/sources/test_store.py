from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from userspace_proxy.model import Endpoint, Protocol, ServicePort, ServicePortName, Snapshot
from userspace_proxy.sources.endpoints import EndpointSet
from userspace_proxy.sources.identity import Identity
from userspace_proxy.sources.services import Service
from userspace_proxy.sources.store import Refused, Store

WEB = ServicePortName("default", "web", "http")


def service(name="web", ip="10.96.0.1", ports=("http",)):
    found = {ServicePortName("default", name, p): ServicePort(Protocol.TCP, 80 + i, (ip,)) for i, p in enumerate(ports)}
    return Service(Identity("Service", "default", name), found)


def endpoints(object_name="web-1", *found, kind="EndpointSlice", of="web", port="http", protocol=Protocol.TCP):
    listed = tuple(e if isinstance(e, Endpoint) else Endpoint("10.1.0.1", e) for e in found)
    key = ServicePortName("default", of, port)
    return EndpointSet(Identity(kind, "default", object_name), ("default", of), {key: listed}, {key: protocol})


def numbers(store, name=WEB):
    return [endpoint.port for endpoint in store.snapshot().endpoints.get(name, ())]


def test_a_file_is_replaced_whole():
    store = Store()
    assert store.snapshot() == Snapshot()
    store.replace("a", [service(), service("db"), endpoints("web-1", 1, 2)])
    assert len(store.snapshot().services) == 2
    assert numbers(store) == [1, 2]
    store.replace("a", [service()])
    assert store.snapshot() == Snapshot(dict(service().ports), {})
    store.forget("a")
    assert store.snapshot() == Snapshot()
    assert store.files == frozenset()


def test_slices_are_merged_and_addresses_told_once():
    store = Store()
    store.replace("a", [endpoints("web-2", 3, 2, 3), endpoints("web-1", 1, 2)])
    assert numbers(store) == [1, 2, 3]


def test_of_equal_addresses_the_ready_one_counts():
    store = Store()
    store.replace("a", [endpoints("web-1", Endpoint("10.1.0.1", 5, ready=False)), endpoints("web-2", 5)])
    assert store.snapshot().endpoints[WEB] == (Endpoint("10.1.0.1", 5),)


def test_endpoints_of_another_protocol_are_another_ports():
    store = Store()
    store.replace("a", [service(), endpoints("web-1", 1), endpoints("web-2", 2, protocol=Protocol.UDP)])
    assert numbers(store) == [1]
    udp = Service(Identity("Service", "default", "web"), {WEB: ServicePort(Protocol.UDP, 80, ("10.96.0.1",))})
    store.replace("a", [udp, endpoints("web-1", 1), endpoints("web-2", 2, protocol=Protocol.UDP)])
    assert numbers(store) == [2]


def test_an_endpoints_object_counts_only_without_slices():
    store = Store()
    store.replace("a", [endpoints("web", 9, kind="Endpoints")])
    assert numbers(store) == [9]
    store.replace("b", [endpoints("web-1", 1)])
    assert numbers(store) == [1]
    store.forget("b")
    assert numbers(store) == [9]


def test_what_did_not_change_is_the_same_value():
    store = Store()
    store.replace("a", [service(), service("db"), endpoints("web-1", 1), endpoints("db-1", 7, of="db")])
    before = store.snapshot()
    store.replace("a", [service(), service("db"), endpoints("web-1", 1), endpoints("db-1", 7, of="db")])
    assert store.snapshot() is before
    store.replace("a", [service(ip="10.96.0.9"), service("db"), endpoints("web-1", 1), endpoints("db-1", 7, of="db")])
    after = store.snapshot()
    assert after.services[WEB].cluster_ips == ("10.96.0.9",)
    assert before.services[WEB].cluster_ips == ("10.96.0.1",)
    for name in after.endpoints:
        assert after.endpoints[name] is before.endpoints[name]
    db = ServicePortName("default", "db", "http")
    assert after.services[db] is before.services[db]


def test_an_object_that_moves_to_another_file_unchanged_changes_nothing():
    store = Store()
    store.replace("a", [service()])
    before = store.snapshot()
    store.replace("b", [service()])
    store.forget("a")
    assert store.snapshot() is before


def test_the_same_object_in_two_files():
    store = Store()
    store.replace("b", [service(ip="10.96.0.2")])
    store.replace("a", [service(ip="10.96.0.1")])
    assert store.snapshot().services[WEB].cluster_ips == ("10.96.0.1",)
    (problem,) = store.problems
    assert problem.startswith("b: Service default/web: found in a as well")
    store.forget("a")
    assert store.snapshot().services[WEB].cluster_ips == ("10.96.0.2",)
    assert store.problems == ()


def test_the_same_object_twice_in_a_file():
    store = Store()
    store.replace("a", [service(ip="10.96.0.1"), service(ip="10.96.0.2")])
    assert store.snapshot().services[WEB].cluster_ips == ("10.96.0.1",)
    assert "found twice" in store.problems[0]


def test_a_refused_object_leaves_its_former_version():
    store = Store()
    store.replace("a", [service(), service("db"), endpoints("web-1", 1)])
    store.replace("a", [Refused(Identity("Service", "default", "web"), "bad"), service("db", ip="10.96.0.9")])
    assert {str(name): port.cluster_ips[0] for name, port in store.snapshot().services.items()} == {
        "default/web:http": "10.96.0.1",
        "default/db:http": "10.96.0.9",
    }
    assert store.snapshot().endpoints == {}
    assert store.problems == ("bad",)
    store.replace("a", [])
    assert store.snapshot() == Snapshot()


def test_a_refused_object_of_unknown_name_may_be_any():
    store = Store()
    store.replace("a", [service(), service("db")])
    store.replace("a", [Refused(None, "no name")])
    assert len(store.snapshot().services) == 2


def test_a_refused_object_takes_nothing_from_another_file():
    store = Store()
    store.replace("a", [service()])
    store.replace("b", [Refused(Identity("Service", "default", "web"), "bad")])
    store.forget("a")
    assert store.snapshot() == Snapshot()


def test_an_unreadable_file_keeps_all():
    store = Store()
    store.replace("a", [service(), Refused(None, "old problem")])
    before = store.snapshot()
    store.refuse("a", "syntax")
    store.refuse("new", "syntax too")
    assert store.snapshot() is before
    assert store.problems == ("syntax", "syntax too")
    store.replace("a", [service()])
    store.forget("new")
    assert store.problems == ()


objects = st.one_of(
    st.builds(
        service, st.sampled_from("wx"), st.sampled_from(["10.96.0.1", "10.96.0.2"]), st.sampled_from(["a", "ab", ""])
    ),
    st.builds(
        lambda name, kind, of, found: endpoints(
            of if kind == "Endpoints" else name, *found, kind=kind, of=of, port="a"
        ),
        st.sampled_from(["s1", "s2"]),
        st.sampled_from(["EndpointSlice", "Endpoints"]),
        st.sampled_from("wx"),
        st.lists(st.integers(1, 3), max_size=3),
    ),
)
contents = st.lists(objects, max_size=4, unique_by=lambda item: item.identity)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.none() | contents), max_size=12), st.booleans())
def test_any_history_ends_in_what_the_files_hold(history, look_between):
    """However it came to this, the Snapshot is the one of a Store that is told the present state alone."""
    store, present = Store(), {}
    for file, found in history:
        if found is not None:
            store.replace(file, found)
            present[file] = found
        elif file in present:
            store.forget(file)
            del present[file]
        if look_between:
            before = store.snapshot()
            assert store.snapshot() is before
    fresh = Store()
    for file, found in sorted(present.items()):
        fresh.replace(file, found)
    assert store.snapshot() == fresh.snapshot()
    assert store.problems == fresh.problems
