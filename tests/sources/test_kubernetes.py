"""The whole source against a real API server, good-mannered and otherwise, on both loops."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from tests.apiserver import GOOD, APIServer, Manner, Object, Request
from tests.e2e.node import endpoints, port, service
from tests.sources.cluster import (
    NODE,
    NODE_OBJECT,
    PACE,
    WEB,
    WEB_SLICE,
    eventually,
    follow,
    meant,
    node_object,
    only,
)
from userspace_proxy.model import Node
from userspace_proxy.sources.answers import SELECTOR

Run = Callable[[Coroutine[Any, Any, Any]], Any]


def old_endpoints(name: str, *ips: str) -> Object:
    addresses = [{"ip": ip} for ip in ips]
    return {
        "apiVersion": "v1",
        "kind": "Endpoints",
        "metadata": {"name": name, "namespace": "default"},
        "subsets": [{"addresses": addresses, "ports": [{"port": 8080}]}],
    }


def test_lists_then_follows(api: APIServer, run: Run) -> None:
    async def main() -> None:
        async with follow(api).running() as follower:
            await eventually(lambda: follower.published)
            assert follower.published[0] == meant(api)
            assert follower.last.node == Node(NODE, "zone-a")
            api.put(service("dns", "10.96.0.11", [port(53, protocol="UDP")]))
            await eventually(lambda: follower.services == ["dns", "web"])
            api.put(endpoints("web", ["10.1.0.2:8080", "10.1.0.3:8080"]))
            await eventually(lambda: follower.addresses("web") == ["10.1.0.2:8080", "10.1.0.3:8080"])
            api.delete(WEB)
            await eventually(lambda: follower.services == ["dns"])
            api.put(node_object("zone-b"))
            await eventually(lambda: follower.last.node == Node(NODE, "zone-b"))
            for value in (
                node_object(taint="ToBeDeletedByClusterAutoscaler"),
                node_object(deletionTimestamp="2026-11-21T11:00:00Z"),
            ):
                api.put(value)
                await eventually(lambda: follower.last.node == Node(NODE, "zone-a", leaving=True))
                api.put(node_object(taint="node.kubernetes.io/unschedulable"))
                await eventually(lambda: follower.last.node == Node(NODE, "zone-a"))
            assert follower.last == meant(api)
            assert {len(follower.source.problems)} == {0}

    run(main())
    lists = [request for request in api.requests if request.verb == "list"]
    assert sorted(request.kind for request in lists) == ["EndpointSlice", "Node", "Service"], "no list but the first"
    for request in api.requests:
        assert "resourceVersion" not in request.query or request.verb == "watch"
        assert request.query.get("allowWatchBookmarks", "true") == "true"
        if request.kind == "Node":
            assert request.query["fieldSelector"] == f"metadata.name={NODE}"
        else:
            assert request.query["labelSelector"] == SELECTOR


def test_what_did_not_change_stays_the_same_value(api: APIServer, run: Run) -> None:
    api.put(service("dns", "10.96.0.11", [port(53)]), endpoints("dns", ["10.1.0.9:53"]))

    async def main() -> None:
        async with follow(api).running() as follower:
            await eventually(lambda: follower.published)
            before = follower.last
            api.put(endpoints("web", ["10.1.0.7:8080"]))
            await eventually(lambda: follower.addresses("web") == ["10.1.0.7:8080"])
            for name, value in before.services.items():
                assert follower.last.services[name] is value
            assert [n.name for n, v in before.endpoints.items() if follower.last.endpoints[n] is v] == ["dns"]

    run(main())


def test_lists_come_in_pages(api: APIServer, run: Run) -> None:
    api.put(*(service(f"s{i}", f"10.96.{1 + i // 250}.{1 + i % 250}", [port(80)]) for i in range(1201)))

    async def main() -> None:
        async with follow(api).running() as follower:
            await eventually(lambda: follower.published)
            assert follower.published == [meant(api)], "published once and whole"

    run(main())
    pages = [request for request in api.requests if (request.kind, request.verb) == ("Service", "list")]
    assert [request.query["limit"] for request in pages] == ["500", "500", "500"]
    assert ["continue" in request.query for request in pages] == [False, True, True]


def test_services_for_other_proxies_are_neither_sent_nor_kept(api: APIServer, run: Run) -> None:
    async def main() -> None:
        async with follow(api).running() as follower:
            await eventually(lambda: follower.services == ["web"])
            ours = service("web", "10.96.0.10", [port(80)])
            ours["metadata"]["labels"] = {"service.kubernetes.io/service-proxy-name": "other"}
            api.put(ours)
            await eventually(lambda: follower.services == [])
            api.put(WEB)
            await eventually(lambda: follower.services == ["web"])

    run(main())


def test_nothing_is_published_before_everything_is_listed(api: APIServer, run: Run) -> None:
    api.manner = only("EndpointSlice", "list", Manner(status=503))

    async def main() -> None:
        async with follow(api).running() as follower:
            await eventually(lambda: api.watches("Service") and api.watches("Node"))
            api.put(service("dns", "10.96.0.11", [port(53)]))
            await eventually(lambda: sum(r.kind == "EndpointSlice" for r in api.requests) > 2)
            assert follower.published == []
            api.manner = lambda request: GOOD
            await eventually(lambda: follower.published)
            assert follower.published == [meant(api)]

    run(main())


def test_the_node_is_waited_for_only_while_it_may_come(api: APIServer, run: Run) -> None:
    api.manner = only("Node", "list", Manner(status=403, message="no"))

    async def main() -> None:
        async with follow(api).running() as follower:
            await eventually(lambda: follower.services == ["web"])
            assert follower.last.node == Node(NODE)
            api.manner = lambda request: GOOD
            await eventually(lambda: follower.last.node == Node(NODE, "zone-a"))

    run(main())


def test_an_unknown_node_is_told_of(api: APIServer, run: Run, caplog: pytest.LogCaptureFixture) -> None:
    api.delete(NODE_OBJECT)

    async def main() -> None:
        async with follow(api).running() as follower:
            await eventually(lambda: follower.services == ["web"])
            assert follower.last.node == Node(NODE)

    run(main())
    assert "--hostname-override" in caplog.text


def test_a_node_that_is_gone_is_what_it_was_last(api: APIServer, run: Run, caplog: pytest.LogCaptureFixture) -> None:
    """The machine may run on for a while, and load balancers must not send it clients again."""
    leaving = Node(NODE, "zone-a", leaving=True)

    def listed() -> int:
        return sum((request.kind, request.verb) == ("Node", "list") for request in api.requests)

    async def main() -> None:
        async with follow(api).running() as follower:
            await eventually(lambda: follower.published)
            api.put(node_object(taint="ToBeDeletedByClusterAutoscaler"))
            await eventually(lambda: follower.last.node == leaving)
            told = len(follower.published)
            api.delete(NODE_OBJECT)
            await eventually(lambda: follower.source._reflectors[2]._course.version == str(api.version))
            follower.source.reload()
            await eventually(lambda: listed() == 2 and sum(r.verb == "watch" for r in api.requests) == 6)
            assert {snapshot.node for snapshot in follower.published[told - 1 :]} == {leaving}
            api.put(node_object("zone-b"))
            await eventually(lambda: follower.last.node == Node(NODE, "zone-b"))

    run(main())
    assert "--hostname-override" not in caplog.text


def test_bad_objects_are_refused_alone(api: APIServer, run: Run, caplog: pytest.LogCaptureFixture) -> None:
    api.put(service("bad", "not an address", [port(80)]), endpoints("loop", ["127.0.0.1:80"]))
    nameless = service("nameless", "10.96.0.12", [port(80)])

    async def main() -> None:
        async with follow(api).running() as follower:
            await eventually(lambda: follower.services == ["web"])
            assert [problem.split(":")[1] for problem in follower.source.problems] == [
                " Service default/bad",
                " EndpointSlice default/loop-x-tcp-v4",
            ]
            api.put(service("web", "10.96.0.10", [port(80), port(81)]), nameless)
            await eventually(lambda: "nameless" in follower.services)
            assert follower.services == ["nameless", "web"], "a mistake takes nothing away"
            assert len(follower.last.services) == 2
            assert any("Service default/web" in problem for problem in follower.source.problems)
            api.put(service("bad", "10.96.0.13", [port(80)]), WEB)
            api.delete(endpoints("loop", []))
            await eventually(lambda: not follower.source.problems)
            assert follower.services == ["bad", "nameless", "web"]

    run(main())
    assert "127.0.0.1 (loopback)" in caplog.text
    assert caplog.text.count("Service default/bad") == 1


@pytest.mark.parametrize("by_status", [False, True])
def test_a_version_that_is_too_old_leads_to_a_new_list_that_replaces(api: APIServer, run: Run, by_status: bool) -> None:
    api.gone_by_status = by_status

    async def main() -> None:
        async with follow(api).running() as follower:
            await eventually(lambda: api.watches("Service") and api.watches("EndpointSlice"))
            api.away()
            api.delete(WEB, WEB_SLICE)
            api.put(service("dns", "10.96.0.11", [port(53)]))
            api.forget()
            api.back()
            await eventually(lambda: follower.services == ["dns"])
            await eventually(lambda: follower.last == meant(api))

    run(main())


def test_bookmarks_move_the_version_on(api: APIServer, run: Run) -> None:
    def versions() -> list[int]:
        watches = [r for r in api.requests if (r.kind, r.verb) == ("EndpointSlice", "watch")]
        return [int(r.query["resourceVersion"]) for r in watches]

    async def main() -> None:
        async with follow(api).running() as follower:
            await eventually(lambda: len(versions()) == 1)
            api.put(service("dns", "10.96.0.11", [port(53)]))

            def seen() -> int:
                return int(follower.source._reflectors[1]._course.version)

            def has_moved() -> bool:
                api.bookmark()  # again, for a watch that had only just arrived
                return seen() > versions()[0]

            await eventually(has_moved)
            await eventually(lambda: seen() == api.version)
            api.away()
            api.forget()
            api.back()
            await eventually(lambda: len(versions()) == 2)
            assert versions()[1] == api.version > versions()[0]

    run(main())
    assert sum((r.kind, r.verb) == ("EndpointSlice", "list") for r in api.requests) == 1


def test_a_list_whose_pages_are_forgotten_is_asked_for_whole(api: APIServer, run: Run) -> None:
    api.put(*(service(f"s{i}", f"10.96.{1 + i // 250}.{1 + i % 250}", [port(80)]) for i in range(600)))

    def forgetful(request: Request) -> Manner:
        if "continue" in request.query:
            api.forget()
        return GOOD

    api.manner = forgetful

    async def main() -> None:
        async with follow(api).running() as follower:
            await eventually(lambda: follower.published)
            assert follower.last == meant(api)

    run(main())
    lists = [r for r in api.requests if (r.kind, r.verb) == ("Service", "list")]
    assert [r.query.get("limit") for r in lists] == ["500", "500", None]


def test_endpoints_where_slices_are_not_served(api: APIServer, run: Run, caplog: pytest.LogCaptureFixture) -> None:
    api.not_served.add("EndpointSlice")
    api.put(old_endpoints("web", "10.1.0.5"))

    async def main() -> None:
        async with follow(api).running() as follower:
            await eventually(lambda: follower.addresses("web") == ["10.1.0.5:8080"])
            api.put(old_endpoints("web", "10.1.0.6"))
            await eventually(lambda: follower.addresses("web") == ["10.1.0.6:8080"])
            # The API server is upgraded: slices come, and with the end of the watch Endpoints are no longer looked at.
            api.away()
            api.not_served.clear()
            api.manner = only("Endpoints", "watch", Manner(events=0))
            api.back()
            await eventually(lambda: follower.addresses("web") == ["10.1.0.2:8080"])
            assert all(identity.kind != "Endpoints" for identity in follower.source._store._served)

    run(main())
    assert "endpointslices are not served; endpoints are followed instead" in caplog.text


def test_slices_are_looked_for_again_though_no_watch_ends_well(api: APIServer, run: Run) -> None:
    """A quiet cluster whose watches all break off would else be followed by Endpoints for ever."""
    api.put(old_endpoints("web", "10.1.0.5"))
    api.not_served.add("EndpointSlice")
    api.manner = only("Endpoints", "watch", Manner(silent=0))

    async def main() -> None:
        async with follow(api, pace=dataclasses.replace(PACE, stall=0.1)).running() as follower:
            await eventually(lambda: follower.addresses("web") == ["10.1.0.5:8080"])
            api.not_served.clear()
            await eventually(lambda: follower.addresses("web") == ["10.1.0.2:8080"])

    run(main())


def test_endpoints_where_slices_are_not_wanted(api: APIServer, run: Run) -> None:
    api.put(old_endpoints("web", "10.1.0.5"))

    async def main() -> None:
        async with follow(api, slices=False).running() as follower:
            await eventually(lambda: follower.addresses("web") == ["10.1.0.5:8080"])

    run(main())
    assert "EndpointSlice" not in {request.kind for request in api.requests}


def test_what_stalls_is_begun_again(api: APIServer, run: Run) -> None:
    api.manner = lambda request: Manner(silent=300) if len(api.requests) < 8 else GOOD

    async def main() -> None:
        async with follow(api, pace=dataclasses.replace(PACE, stall=0.2)).running() as follower:
            await eventually(lambda: follower.published)
            api.put(service("dns", "10.96.0.11", [port(53)]))
            await eventually(lambda: follower.last == meant(api))

    run(main())


@pytest.mark.parametrize(
    ("manner", "said"),
    [
        (
            Manner(status=403, message='User "proxy" cannot'),
            'rule {apiGroups: ["discovery.k8s.io"], resources: ["endpointslices"], verbs: ["list", "watch"]}',
        ),
        (Manner(status=401), "does not accept these credentials"),
        (Manner(status=429, headers={"Retry-After": "0"}), "too much to do"),
        (Manner(status=500), "it failed"),
        (Manner(status=400), "does not understand"),
        (Manner(body=b"<html>a portal of a hotel</html>"), "allowed: a list of objects in JSON"),
        (Manner(body=b'{"metadata": {}, "items": []}'), "found no resourceVersion"),
        (Manner(cut=0), "no way to the API server"),
        (Manner(cut=200), "no way to the API server"),
    ],
)
def test_refusals_are_told_once_and_then_that_they_are_over(
    api: APIServer, run: Run, caplog: pytest.LogCaptureFixture, manner: Manner, said: str
) -> None:
    api.manner = only("EndpointSlice", "list", manner, 4)
    caplog.set_level(logging.INFO, "userspace_proxy")

    async def main() -> None:
        async with follow(api).running() as follower:
            await eventually(lambda: follower.published)
            assert follower.last == meant(api)

    run(main())
    told = caplog.text.count(said)
    assert told == 1 or (told and said.startswith("no way")), "a connection can break in different words"
    assert caplog.text.count("endpointslices are followed again") == 1


@pytest.mark.parametrize(
    "error",
    [
        {"kind": "Status", "code": 410, "reason": "Gone"},
        {"kind": "Status", "code": 500, "message": "etcd event received with PrevKv=nil"},
        {"kind": "Status", "code": 504, "reason": "Timeout", "message": "Too large resource version"},
        {"kind": "Status"},
        {},
    ],
)
def test_watches_that_end_by_an_error_are_begun_again(api: APIServer, run: Run, error: Object) -> None:
    error = error or {"kind": "?"}
    api.manner = only("Service", "watch", Manner(error=error), 7)

    async def main() -> None:
        async with follow(api).running() as follower:
            await eventually(lambda: api.watches("Service") > 6)
            api.put(service("dns", "10.96.0.11", [port(53)]))
            await eventually(lambda: follower.last == meant(api))

    run(main())
    assert sum(r.verb == "list" and r.kind == "Service" for r in api.requests) > 1, "the version was doubted at last"


def test_a_reload_lists_anew(api: APIServer, run: Run) -> None:
    async def main() -> None:
        async with follow(api).running() as follower:
            await eventually(lambda: sum(r.verb == "watch" for r in api.requests) == 3)
            follower.source.reload()
            await eventually(lambda: sum(r.verb == "watch" for r in api.requests) == 6)
            assert sum(r.verb == "list" for r in api.requests) == 6
            assert follower.last == meant(api)
            assert len(follower.published) == 1

    run(main())


def test_all_is_published_again_now_and_then(api: APIServer, run: Run) -> None:
    async def main() -> None:
        async with follow(api, pace=dataclasses.replace(PACE, resync=0.1)).running() as follower:
            await eventually(lambda: len(follower.published) > 2)
            assert follower.published[0] is follower.published[1]

    run(main())


def test_several_requests_to_list_anew_are_one(api: APIServer, run: Run) -> None:
    async def main() -> None:
        async with follow(api).running() as follower:
            await eventually(lambda: follower.published)
            first = len(api.requests)
            for _ in range(3):
                follower.source.reload()
                await asyncio.sleep(0)
            api.put(endpoints("web", ["10.1.0.7:8080"]))
            await eventually(lambda: follower.addresses("web") == ["10.1.0.7:8080"])
            listed = {"EndpointSlice", "Node", "Service"}
            await eventually(lambda: {r.kind for r in api.requests[first:] if r.verb == "list"} == listed)

    run(main())
