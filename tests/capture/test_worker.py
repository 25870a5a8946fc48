"""What a worker does besides rules: taking over, routes, conntrack, refusals, and its own end."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys

import msgspec
import pytest

from tests.capture.conversation import CLUSTER_IP, WORKER, ask, many, node_port, opening, program, redirect, saved
from tests.netns import eventually
from userspace_proxy.capture import rules, worker, xtables
from userspace_proxy.capture.messages import Ask, Cleanup, Close, Replace, Reply, Withdraw
from userspace_proxy.model import IPFamily, Portal, PortalKind, Protocol, Redirect, ServicePortName

pytestmark = pytest.mark.privileged

V4, V6 = IPFamily.IPV4, IPFamily.IPV6


def routes(namespace, family=V4):
    option = "-6" if family is V6 else "-4"
    return [line.split()[0] for line in namespace.run(f"ip {option} route show proto 117").splitlines()]


def udp_entries(namespace):
    return sorted(
        (match[1], int(match[2]))
        for line in namespace.run("conntrack -L -p udp").splitlines()
        if (match := re.search(r" dst=(\S+) sport=\d+ dport=(\d+)", line))
    )


def send(namespace, *addresses):
    with namespace.entered(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for address in addresses:
            sender.sendto(b"x", address)


# Taking over and leaving


@pytest.mark.parametrize("family", IPFamily)
def test_an_earlier_run_is_replaced_by_exactly_one_generation(node, family):
    ip = CLUSTER_IP[family]
    ask(node, opening(family), Replace((redirect(ip, proxy_port=40001), redirect(ip, 81, 40002, name="gone"))))
    assert routes(node, family) == [ip]
    # Its parent was killed, so all is still there.
    ask(node, opening(family), Replace((redirect(ip, proxy_port=50001),)))
    text = saved(node, family)
    assert text.count("default/web") == 2
    assert "40001" not in text
    assert "gone" not in text
    assert text.count("-j KUBE-PORTALS-HOST") == 1


def test_from_the_start_until_the_close_one_rule_holds_conntrack(node):
    def held():
        return "-A USERSPACE-PROXY-HOLD -m conntrack" in saved(node)

    ask(node, opening())
    assert held()
    ask(node, opening(), Replace((redirect(),)), Withdraw())
    assert held()
    assert "KUBE" not in saved(node)
    ask(node, opening(), Replace((redirect(),)), Withdraw(), Close())
    assert not held()


def test_routes_stay_while_connections_drain(node):
    ask(node, opening(), Replace((redirect(),)), Withdraw())
    assert routes(node) == ["10.96.0.10"]
    ask(node, opening(), Replace((redirect(),)), Withdraw(), Close())
    assert routes(node) == []


def test_routes_follow_the_redirects(node):
    first, second = redirect("10.96.0.10"), redirect("10.96.0.11")
    external = redirect("198.51.100.1", kind=PortalKind.EXTERNAL_IP)
    ask(node, opening(), Replace((first, second, external, node_port(), redirect("127.96.0.10"))))
    assert routes(node) == ["10.96.0.10", "10.96.0.11", "198.51.100.1"]
    ask(node, opening(take_over=False), Replace((second,)))
    assert routes(node) == ["10.96.0.11"]


@pytest.mark.parametrize("family", IPFamily)
def test_cleanup_leaves_the_tables_as_they_were_found(node, family):
    node.run(f"{program(family)} -t nat -A PREROUTING -p tcp --dport 81 -j ACCEPT")
    node.run(f"{program(family)} -N FOREIGN")
    before = saved(node, family)
    ask(node, opening(family), Replace((redirect(CLUSTER_IP[family]), node_port(family=family))))
    assert saved(node, family) != before
    for _ in range(2):
        assert ask(node, Cleanup(family)) == [Reply()]
        assert saved(node, family) == before
        assert routes(node, family) == []


def test_cleanup_removes_the_remains_of_the_original_userspace_mode(node):
    before = saved(node)
    node.run("iptables-legacy -t nat -N KUBE-PORTALS-HOST")
    node.run(
        "iptables-legacy -t nat -I OUTPUT -m comment "
        "--comment 'handle ClusterIPs; NOTE: this must be before the NodePort rules' -j KUBE-PORTALS-HOST"
    )
    node.run("iptables-legacy -t nat -A OUTPUT -p tcp -j KUBE-PORTALS-HOST")
    node.run("iptables-legacy -t nat -A KUBE-PORTALS-HOST -d 10.0.0.1 -p tcp --dport 80 -j DNAT --to 192.0.2.1:40000")
    assert ask(node, Cleanup(V4)) == [Reply()]
    assert saved(node) == before


def test_cleanup_of_a_clean_machine_touches_nothing(node):
    assert ask(node, Cleanup(V4)) == [Reply()]
    assert node.run("cat /proc/net/ip_tables_names") == ""


# Conntrack


def test_udp_clients_are_sent_anew_when_a_redirect_comes_changes_and_goes(node):
    dns = redirect("127.96.0.10", 53, 40002, Protocol.UDP)
    by_node_port = node_port(30053, 40002, Protocol.UDP)
    other = ("127.96.0.99", 53)
    everywhere = [("127.96.0.10", 53), ("127.0.0.1", 30053), other]
    ask(node, opening())

    def flushed_by(*requests):
        send(node, *everywhere)
        ask(node, opening(take_over=False), *requests)
        gone = set(everywhere) - set(udp_entries(node))
        assert other not in gone
        return gone

    both = {("127.96.0.10", 53), ("127.0.0.1", 30053)}
    assert flushed_by(Replace((dns, by_node_port))) == both
    moved = redirect("127.96.0.10", 53, 40003, Protocol.UDP)
    # The successor of a worker finds in the rules where its predecessor has sent clients.
    assert flushed_by(Replace((moved,))) == both
    # It cannot know which are new, so what follows needs one that lives on.
    with Life(node) as life:
        life.ask(opening())
        life.ask(Replace((dns, by_node_port)))
        send(node, *everywhere)
        life.ask(Replace((dns, by_node_port)))
        assert set(everywhere) <= set(udp_entries(node))
        life.ask(Replace((moved, by_node_port)))
        assert set(everywhere) - set(udp_entries(node)) == {("127.96.0.10", 53)}
        life.ask(Replace((moved,)))
        assert set(everywhere) - set(udp_entries(node)) == both


def test_at_the_start_and_at_cleanup_portals_of_the_last_run_are_flushed(node):
    dns = redirect("127.96.0.10", 53, 40002, Protocol.UDP)
    ask(node, opening(), Replace((dns,)))
    for next_request in (opening(), Cleanup(V4)):
        ask(node, opening(take_over=False), Replace((dns,)))
        node.run("iptables-legacy -A INPUT -m conntrack --ctstate INVALID -j DROP")
        send(node, ("127.96.0.10", 53))
        assert udp_entries(node)
        ask(node, next_request)
        assert udp_entries(node) == []


def test_tcp_entries_live_until_the_close(node):
    web, moved = redirect("127.96.0.10"), redirect("127.96.0.10", proxy_port=40009)
    with Life(node) as life, node.entered(), socket.create_server(("127.0.0.1", 40001)):
        life.ask(opening())
        life.ask(Replace((web,)))
        with socket.create_connection(("127.96.0.10", 80), timeout=5):
            life.ask(Replace((moved,)))
            life.ask(Replace(()))
            life.ask(Replace((web,)))
            life.ask(Withdraw())
            assert "dport=80" in node.run("conntrack -L -p tcp")
            life.ask(Close())
            assert "dport=80" not in node.run("conntrack -L -p tcp")


# Refusals


def test_what_cannot_be_had_is_told_and_the_rest_is_in_place(node):
    bad = Redirect(Portal(V4, Protocol.TCP, "10.96.0.12", 0, PortalKind.CLUSTER_IP), 40001, ServicePortName("a", "bad"))
    _, reply = ask(node, opening(), Replace((redirect(), bad, redirect("fd00::1"))))
    assert reply.error == ""
    assert sorted(line.split(":")[0] for line in reply.refused) == ["a/bad", "default/web"]
    assert "port 0: must be 1 to 65535" in "".join(reply.refused)
    assert saved(node).count("-d 10.96.0.10/32") == 2


def test_a_rule_that_the_kernel_refuses_does_not_keep_the_others_out(node, monkeypatch):
    """No real redirect is refused by this kernel, so one is rendered with an address that no program takes."""
    rendered = rules.render

    def render(redirects, scope):
        tables = rendered(redirects, scope)
        for name, table in tables.items():
            chains = {
                c: tuple(t.replace("10.96.3.0/32", "10.96.300.0/32") for t in ts) for c, ts in table.chains.items()
            }
            tables = tables | {name: rules.TableRules(chains, table.jumps)}
        return tables

    monkeypatch.setattr(rules, "render", render)
    redirects = many(1000)
    with node.entered():
        capture = worker.FamilyCapture(opening(use_library=False))
        capture.open(take_over=True)
        reply = capture.replace(redirects)
        assert [line.split(":")[0] for line in reply.refused] == ["default/svc-00750"]
        assert "10.96.300.0" in reply.refused[0]
        assert reply.added == 2 * 999
        assert saved(node).count("-A KUBE-PORTALS-HOST") == 999
        # Once more: what is in stays in, and nothing is repaired.
        again = capture.replace(redirects)
        assert (len(again.refused), again.added, again.repaired) == (1, 0, 0)
        capture.close()


def test_trouble_that_is_not_of_the_rules_is_an_error_and_changes_nothing(node, tmp_path, monkeypatch):
    monkeypatch.setattr(xtables, "_LOCK_WAIT", 0)
    with node.entered():
        capture = worker.FamilyCapture(opening(use_library=False))
        capture.open(take_over=True)
        before = saved(node)
        monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path))
        with pytest.raises(xtables.XtablesError, match=str(tmp_path)):
            capture.replace([redirect()])
        assert saved(node) == before
        monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "lock"))
        capture.replace([redirect()])
        assert capture.close() == Reply()


# The process


class Life:
    """A worker that is asked one thing at a time."""

    def __init__(self, namespace):
        with namespace.entered():
            self.process = subprocess.Popen(
                [sys.executable, "-m", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        assert self.process.wait(10) == 0
        self.process.stdout.close()

    def ask(self, request):
        print(msgspec.json.encode(Ask(1, request)).decode(), file=self.process.stdin, flush=True)
        reply = msgspec.json.decode(self.process.stdout.readline(), type=Reply)
        assert reply.error == ""
        return reply


def test_signals_that_stop_a_proxy_do_not_stop_its_worker(node):
    with Life(node) as life:
        life.ask(opening())
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            life.process.send_signal(number)
        assert life.ask(Close()) == Reply(1)


def test_the_end_of_its_input_is_its_own_end_and_the_rules_stay(node):
    with Life(node) as life:
        life.ask(opening())
        life.ask(Replace((redirect(),)))
    assert "default/web" in saved(node)


def test_it_holds_nothing_of_its_parents(node):
    with node.entered(), socket.create_server(("127.0.0.1", 0)), Life(node) as life:
        life.ask(opening())
        descriptors = f"/proc/{life.process.pid}/fd"
        sockets = [link for fd in os.listdir(descriptors) if "socket:" in (link := os.readlink(f"{descriptors}/{fd}"))]
        inode = {link[8:-1] for link in sockets}
        tcp = node.run("cat /proc/net/tcp")
        assert not [number for number in inode if number in tcp]
    eventually(lambda: life.process.returncode is not None)


def test_an_error_is_an_answer_not_an_end(node):
    replies = ask(node, opening(family=V4, bind_address="nonsense"), opening(), Close())
    assert "nonsense" in replies[0].error
    assert [reply.error for reply in replies[1:]] == ["", ""]
