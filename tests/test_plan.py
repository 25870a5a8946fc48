"""What should be and how to get there: tables, then any two states, watched at every step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from userspace_proxy.model import (
    Endpoint,
    IPFamily,
    Portal,
    PortalKind,
    Protocol,
    ServicePort,
    ServicePortName,
    SocketKey,
    TrafficPolicy,
    changed,
    family_of,
    inside,
)
from userspace_proxy.plan import (
    Claim,
    Close,
    LocalPort,
    Neighbours,
    Open,
    OwnPlaces,
    Problem,
    Replace,
    State,
    Step,
    Unclaim,
    desired,
    plan,
    without,
)

V4, V6 = IPFamily.IPV4, IPFamily.IPV6
TCP, UDP, SCTP = Protocol.TCP, Protocol.UDP, Protocol.SCTP
BOTH = (V4, V6)
SERVED = (TCP, UDP)

Services = Mapping[ServicePortName, ServicePort]


def name(text: str) -> ServicePortName:
    return ServicePortName("default", text, "p")


def key(text: str, family: IPFamily = V4) -> SocketKey:
    return SocketKey(name(text), family)


def service(*ips: str, protocol: Protocol = TCP, port: int = 80, node_port: int = 0) -> ServicePort:
    return ServicePort(protocol, port, ips, node_port)


def cluster_ip(ip: str, protocol: Protocol = TCP, port: int = 80) -> Portal:
    return Portal(V6 if ":" in ip else V4, protocol, ip, port, PortalKind.CLUSTER_IP)


def node_port(port: int, protocol: Protocol = TCP, family: IPFamily = V4) -> Portal:
    return Portal(family, protocol, "", port, PortalKind.NODE_PORT)


def want_of(services: Services, have: State | None = None) -> State:
    return desired(services, BOTH, SERVED, have or State())[0]


class Node:
    """Carries steps out on paper; refuses those that could not be carried out."""

    def __init__(self, state: State) -> None:
        self.sockets = dict(state.sockets)
        self.claims = set(state.claims)
        self.redirects = dict(state.redirects)

    @property
    def state(self) -> State:
        return State(dict(self.sockets), frozenset(self.claims), dict(self.redirects))

    def take(self, step: Step) -> None:
        match step:
            case Open(opened, protocol):
                assert opened not in self.sockets
                self.sockets[opened] = protocol
            case Claim(place):
                assert place not in self.claims
                self.claims.add(place)
            case Replace(redirects):
                assert redirects != self.redirects
                self.redirects = dict(redirects)
            case Unclaim(place):
                self.claims.remove(place)
            case Close(closed):
                del self.sockets[closed]

    def check(self) -> None:
        """No client is sent where nobody listens, or to a socket of another protocol, or through an unheld port."""
        for portal, owner in self.redirects.items():
            for target in (owner, inside(portal, owner)):
                assert self.sockets.get(target) is portal.protocol, portal
                assert target.family is portal.family
            if portal.kind is PortalKind.NODE_PORT:
                assert LocalPort(portal.family, portal.protocol, portal.port) in self.claims, portal


class TestDesired:
    def test_a_socket_for_each_family(self) -> None:
        state, problems = desired({name("a"): service("10.96.0.1", "fd00::1", node_port=30080)}, BOTH, SERVED, State())
        assert problems == []
        assert state == State(
            sockets={key("a"): TCP, key("a", V6): TCP},
            claims={LocalPort(V4, TCP, 30080), LocalPort(V6, TCP, 30080)},
            redirects={
                cluster_ip("10.96.0.1"): key("a"),
                node_port(30080): key("a"),
                cluster_ip("fd00::1"): key("a", V6),
                node_port(30080, family=V6): key("a", V6),
            },
        )

    def test_a_family_that_is_not_served_is_left_out_and_told(self) -> None:
        state, problems = desired({name("a"): service("10.96.0.1", "fd00::1")}, [V4], SERVED, State())
        assert list(state.sockets) == [key("a")]
        assert [problem.key for problem in problems] == [key("a", V6)]

    def test_a_service_port_with_no_family_that_is_served(self) -> None:
        services = {name("a"): service("fd00::1"), name("b"): service("10.96.0.2")}
        state, problems = desired(services, [V4], SERVED, State())
        assert list(state.sockets) == [key("b")]
        (problem,) = problems
        assert problem.key == key("a", V6)
        assert "family IPv6 is not served by this proxy, only IPv4" in problem.message

    def test_a_protocol_that_is_not_served(self) -> None:
        services = {name("a"): service("10.96.0.1", protocol=SCTP), name("b"): service("10.96.0.2")}
        state, problems = desired(services, BOTH, SERVED, State())
        assert list(state.sockets) == [key("b")]
        assert list(state.redirects) == [cluster_ip("10.96.0.2")]
        (problem,) = problems
        assert problem.key == key("a")
        assert "protocol SCTP is not served by this proxy, only TCP and UDP" in problem.message

    def test_a_conflict_is_a_problem_of_the_latecomer(self) -> None:
        services = {
            name("a"): service("10.96.0.1", node_port=30080),
            name("b"): service("10.96.0.2", node_port=30080),
        }
        have = want_of({name("b"): services[name("b")]})
        state, problems = desired(services, BOTH, SERVED, have)
        assert state.redirects[node_port(30080)] == key("b")
        assert cluster_ip("10.96.0.1") in state.redirects
        (problem,) = problems
        assert isinstance(problem, Problem)
        assert problem.key == key("a")
        assert "belongs to default/b:p" in problem.message

    def test_policies_that_differ_have_a_socket_each(self) -> None:
        local = dataclasses.replace(
            service("10.96.0.1", node_port=30080),
            load_balancer_ips=("192.0.2.1",),
            external_policy=TrafficPolicy.LOCAL,
        )
        state, _ = desired({name("a"): local}, BOTH, SERVED, State())
        cluster, outside = key("a"), key("a")._replace(policy=TrafficPolicy.LOCAL)
        balancer = Portal(V4, TCP, "192.0.2.1", 80, PortalKind.LOAD_BALANCER_IP)
        assert state.redirects == {cluster_ip("10.96.0.1"): cluster, balancer: outside, node_port(30080): outside}
        assert state.sockets.keys() == {cluster, outside}
        assert inside(node_port(30080), outside) == cluster

        ranges = dataclasses.replace(local, source_ranges=("198.51.100.0/24",))
        state, _ = desired({name("a"): ranges}, BOTH, SERVED, State())
        assert state.redirects[balancer] == outside._replace(screened=True)
        assert state.redirects[node_port(30080)] == outside
        assert state.sockets.keys() == {
            cluster,
            outside,
            outside._replace(screened=True),
            cluster._replace(screened=True),  # for clients inside, who must be in the ranges too
        }

    def test_policies_that_agree_share_a_socket(self) -> None:
        local = dataclasses.replace(A, internal_policy=TrafficPolicy.LOCAL)
        state, _ = desired({name("a"): local}, BOTH, SERVED, State())
        assert state.sockets.keys() == {key("a")._replace(policy=TrafficPolicy.LOCAL), key("a")}
        only_cluster = dataclasses.replace(service("10.96.0.1"), external_policy=TrafficPolicy.LOCAL)
        assert desired({name("a"): only_cluster}, BOTH, SERVED, State())[0].sockets.keys() == {key("a")}

    def test_a_change_of_policy_does_not_lose_a_contested_place(self) -> None:
        services = {name("a"): service("10.96.0.1", node_port=30080), name("b"): A}
        have = want_of({name("b"): A})
        services[name("b")] = dataclasses.replace(A, external_policy=TrafficPolicy.LOCAL)
        assert want_of(services, have).redirects[node_port(30080)].name == name("b")

    def test_nothing(self) -> None:
        assert desired({}, BOTH, SERVED, State()) == (State(), [])


A = service("10.96.0.1", node_port=30080)
A_V4 = {cluster_ip("10.96.0.1"): key("a"), node_port(30080): key("a")}
PLACE = LocalPort(V4, TCP, 30080)


class TestPlan:
    def test_open(self) -> None:
        assert plan(State(), want_of({name("a"): A})) == (Open(key("a"), TCP), Claim(PLACE), Replace(A_V4))

    def test_close_is_the_reverse(self) -> None:
        assert plan(want_of({name("a"): A}), State()) == (Replace({}), Unclaim(PLACE), Close(key("a")))

    def test_nothing_to_do(self) -> None:
        assert plan(State(), State()) == ()
        assert plan(want_of({name("a"): A}), want_of({name("a"): A})) == ()

    def test_one_replace_for_many_changes(self) -> None:
        have = want_of({name("a"): service("10.96.0.1"), name("b"): service("10.96.0.2")})
        want = want_of({name("b"): service("10.96.0.2"), name("c"): service("10.96.0.3")})
        assert plan(have, want) == (Open(key("c"), TCP), Replace(want.redirects), Close(key("a")))

    def test_another_address_moves_no_socket(self) -> None:
        have, want = want_of({name("a"): service("10.96.0.1")}), want_of({name("a"): service("10.96.0.9")})
        assert plan(have, want) == (Replace({cluster_ip("10.96.0.9"): key("a")}),)

    def test_a_policy_opens_before_it_closes(self) -> None:
        have, local = want_of({name("a"): A}), key("a")._replace(policy=TrafficPolicy.LOCAL)
        want = want_of({name("a"): dataclasses.replace(A, internal_policy=TrafficPolicy.LOCAL)}, have)
        assert plan(have, want) == (Open(local, TCP), Replace(A_V4 | {cluster_ip("10.96.0.1"): local}))
        assert plan(want, have) == (Replace(A_V4), Close(local))

    def test_rename_passes_the_claim_on(self) -> None:
        have = want_of({name("a"): A})
        want = want_of({name("z"): A}, have)
        assert plan(have, want) == (
            Open(key("z"), TCP),
            Replace({cluster_ip("10.96.0.1"): key("z"), node_port(30080): key("z")}),
            Close(key("a")),
        )

    def test_protocol_change_withdraws_first(self) -> None:
        before = {name("a"): service("10.96.0.1", node_port=30080), name("b"): service("10.96.0.2")}
        after = {
            name("a"): service("10.96.0.1", node_port=30080, protocol=UDP),
            name("c"): service("10.96.0.3"),
        }
        have, want = want_of(before), want_of(after)
        c = {cluster_ip("10.96.0.3"): key("c")}
        assert plan(have, want) == (
            Open(key("c"), TCP),
            Claim(LocalPort(V4, UDP, 30080)),
            Replace(c),
            Close(key("a")),
            Open(key("a"), UDP),
            Replace(c | {cluster_ip("10.96.0.1", UDP): key("a"), node_port(30080, UDP): key("a")}),
            Unclaim(PLACE),
            Close(key("b")),
        )

    def test_two_ports_swap_their_protocols(self) -> None:
        have = want_of({name("a"): service("10.96.0.1"), name("b"): service("10.96.0.1", protocol=UDP)})
        want = want_of({name("a"): service("10.96.0.1", protocol=UDP), name("b"): service("10.96.0.1")}, have)
        assert plan(have, want) == (
            Replace({}),
            Close(key("a")),
            Open(key("a"), UDP),
            Close(key("b")),
            Open(key("b"), TCP),
            Replace({cluster_ip("10.96.0.1", UDP): key("a"), cluster_ip("10.96.0.1"): key("b")}),
        )

    def test_protocol_change_of_a_socket_without_portals(self) -> None:
        assert plan(State({key("a"): TCP}), State({key("a"): UDP})) == (Close(key("a")), Open(key("a"), UDP))

    def test_a_socket_that_is_gone_comes_back_with_another_port(self) -> None:
        # The redirects are as wanted by name, but lead to the lost socket's proxy port.
        want = want_of({name("a"): A})
        assert plan(dataclasses.replace(want, sockets={}), want) == (
            Replace({}),
            Open(key("a"), TCP),
            Replace(A_V4),
        )


class TestFailedSteps:
    def test_nothing_failed(self) -> None:
        step = Replace(A_V4)
        assert without(step, ()) is step

    def test_a_socket_that_did_not_open(self) -> None:
        want = want_of({name("a"): A, name("b"): service("10.96.0.2")})
        assert without(Replace(want.redirects), [key("a")]) == Replace({cluster_ip("10.96.0.2"): key("b")})

    def test_a_node_port_that_was_not_claimed(self) -> None:
        udp = service("10.96.0.1", protocol=UDP, node_port=30080)
        want = want_of({name("a"): A, name("u"): udp})
        rest = without(Replace(want.redirects), (), [PLACE]).redirects
        assert want.redirects.keys() - rest.keys() == {node_port(30080)}

    def test_the_next_sync_tries_again(self) -> None:
        want = want_of({name("a"): A, name("b"): service("10.96.0.2")})
        have = State({key("b"): TCP}, frozenset(), {cluster_ip("10.96.0.2"): key("b")})
        assert plan(have, want) == (Open(key("a"), TCP), Claim(PLACE), Replace(want.redirects))


def small_worlds(ips: tuple[str, ...]) -> st.SearchStrategy[Services]:
    """Service ports from a small world full of conflicts."""
    return st.dictionaries(
        st.sampled_from([name(text) for text in "abcd"]),
        st.builds(
            ServicePort,
            protocol=st.sampled_from(Protocol),
            port=st.sampled_from([80, 81]),
            cluster_ips=st.lists(st.sampled_from(ips), min_size=1, max_size=2, unique=True).map(tuple),
            node_port=st.sampled_from([0, 0, 30080, 30081]),
            external_ips=st.lists(st.sampled_from(ips), max_size=2).map(tuple),
            load_balancer_ips=st.lists(st.sampled_from(ips), max_size=2).map(tuple),
            internal_policy=st.sampled_from(TrafficPolicy),
            external_policy=st.sampled_from(TrafficPolicy),
            source_ranges=st.sampled_from([(), ("192.0.2.0/24",)]),
        ),
    )


WORLDS = small_worlds(("10.96.0.1", "10.96.0.2", "192.0.2.1", "fd00::1"))


@st.composite
def states(draw: st.DrawFn) -> State:
    """Any state that a node can be in."""
    return desired(draw(WORLDS), draw(st.sampled_from([BOTH, (V4,)])), SERVED, State())[0]


class TestAnyPlan:
    @given(states(), states())
    def test_leads_from_one_to_the_other_safely(self, have: State, want: State) -> None:
        node = Node(have)
        node.check()
        for step in plan(have, want):
            node.take(step)
            node.check()
        assert node.state == want
        assert plan(node.state, want) == ()

    @given(states(), states())
    def test_sockets_close_last(self, have: State, want: State) -> None:
        steps = plan(have, want)
        for position, step in enumerate(steps):
            if isinstance(step, Close) and step.key not in want.sockets:
                assert all(isinstance(later, Close) for later in steps[position:])
        assert sum(isinstance(step, Replace) for step in steps) <= 2
        # What stays as it is has no step.
        for moved, protocol in have.sockets.items():
            if want.sockets.get(moved) is protocol:
                assert Close(moved) not in steps
                assert Open(moved, protocol) not in steps

    @given(states(), states(), st.data())
    def test_is_safe_whatever_fails(self, have: State, want: State, data: st.DataObject) -> None:
        """Carried out as the module's docstring says, and once more when nothing fails."""
        node = Node(have)
        unopened: set[SocketKey] = set()
        unclaimed: set[LocalPort] = set()
        for step in plan(have, want):
            fails = data.draw(st.booleans())
            if isinstance(step, Replace):
                if fails:
                    break
                step = without(step, unopened, unclaimed)  # noqa: PLW2901
                if step.redirects == node.redirects:
                    continue
            elif isinstance(step, Open) and fails:
                unopened.add(step.key)
                continue
            elif isinstance(step, Claim) and fails:
                unclaimed.add(step.place)
                continue
            node.take(step)
            node.check()
        for step in plan(node.state, want):
            node.take(step)
            node.check()
        assert node.state == want

    @given(states())
    def test_is_empty_when_nothing_changed(self, state: State) -> None:
        assert plan(state, state) == ()


class TestNeighbours:
    def test_who_shares_no_place_is_alone(self) -> None:
        neighbours = Neighbours()
        services = {name(str(n)): service(f"10.96.0.{n}") for n in range(1, 100)}
        neighbours.update(services, services)
        services[name("7")] = service("10.96.0.7", port=81)
        part = neighbours.update([name("7")], services)
        assert part.names == {name("7")}
        assert part.places == {(V4, TCP, "10.96.0.7", 80), (V4, TCP, "10.96.0.7", 81)}

    def test_a_chain_of_neighbours(self) -> None:
        neighbours = Neighbours()
        services = {name(text): A for text in "ab"} | {
            name("c"): service("10.96.0.3", node_port=30080),
            name("d"): service("10.96.0.3"),
            name("e"): service("10.96.0.5"),
        }
        assert neighbours.update(services, services).names == services.keys()
        assert neighbours.update([name("a")], services).names == {name(text) for text in "abcd"}

    def test_who_may_get_a_place_that_becomes_free(self) -> None:
        neighbours = Neighbours()
        neighbours.update([name("a"), name("b")], {name("a"): A, name("b"): A})
        assert neighbours.update([name("a")], {name("b"): A}).names == {name("a"), name("b")}
        assert neighbours.update([name("b")], {name("b"): A}).names == {name("b")}

    @given(st.lists(WORLDS, min_size=1, max_size=5))
    def test_planning_a_part_is_planning_the_whole(self, history: list[Services]) -> None:
        """From change to change only those concerned are planned; the node ends as if all were, each time."""
        neighbours = Neighbours()
        whole, node = State(), Node(State())
        before: Services = {}
        for services in history:
            whole = want_of(services, whole)
            part = neighbours.update(changed(before, services), services)
            have = State(
                {k: v for k, v in node.sockets.items() if k.name in part.names},
                {claim for claim in node.claims if claim.portal.place in part.places},
                {portal: k for portal, k in node.redirects.items() if portal.place in part.places},
            )
            assert {k.name for k in have.redirects.values()} <= part.names
            want = want_of({n: services[n] for n in sorted(part.names) if n in services}, have)
            rest = {portal: k for portal, k in node.redirects.items() if portal not in have.redirects}
            for step in plan(have, want):
                node.take(Replace(rest | dict(step.redirects)) if isinstance(step, Replace) else step)
                node.check()
            assert node.state == whole
            before = services


class TestOwnPlaces:
    LOCAL = ("192.0.2.10", "127.0.0.1", "2001:db8::10")

    def own(self, protocol: Protocol, *endpoints: Endpoint) -> list[str]:
        asked: list[str] = []

        def is_local(ip: str) -> bool:
            asked.append(ip)
            return ip in self.LOCAL

        own = OwnPlaces(is_local)
        own.places.update(p.place for p in want_of({name("a"): A, name("b"): service("fd00::1", port=443)}).redirects)
        own.places.update([(V4, TCP, "", 40000), (V6, UDP, "", 40001)])
        found = [
            endpoint
            for family in BOTH
            for endpoint in own.among(key("c", family), protocol, [e for e in endpoints if family_of(e.ip) is family])
        ]
        assert set(asked) <= {e.ip for e in endpoints if e.port in (30080, 40000, 40001)}, "asked without need"
        return [str(endpoint) for endpoint in found]

    @pytest.mark.parametrize(
        ("protocol", "ip", "port"),
        [
            (TCP, "10.96.0.1", 80),
            (TCP, "fd00::1", 443),
            (TCP, "192.0.2.10", 30080),
            (TCP, "127.0.0.1", 30080),
            (TCP, "192.0.2.10", 40000),
            (UDP, "2001:db8::10", 40001),
        ],
    )
    def test_ours(self, protocol: Protocol, ip: str, port: int) -> None:
        endpoint = Endpoint(ip, port)
        assert self.own(protocol, Endpoint("10.0.0.1", 80), endpoint) == [str(endpoint)]

    @pytest.mark.parametrize(
        ("protocol", "ip", "port"),
        [
            (UDP, "10.96.0.1", 80),  # another protocol
            (TCP, "10.96.0.1", 81),  # another port
            (TCP, "10.0.0.1", 80),
            (TCP, "10.0.0.1", 30080),  # another node's node port
            (TCP, "10.0.0.1", 40000),
            (UDP, "192.0.2.10", 40000),  # a local server on a number that is ours in TCP
            (TCP, "2001:db8::10", 30080),  # a family without that node port
        ],
    )
    def test_not_ours(self, protocol: Protocol, ip: str, port: int) -> None:
        assert self.own(protocol, Endpoint(ip, port)) == []


def test_local_port_as_the_log_shows_it() -> None:
    assert str(LocalPort(V4, TCP, 30080)) == "*:30080/TCP (IPv4)"
