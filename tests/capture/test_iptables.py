"""The iptables capture from the proxy's side: rules that come, go and are changed, and processes that die."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys

import msgspec
import pytest

from tests.capture.captured import V4, V6, Captured, listening, reach
from tests.capture.conversation import CLUSTER_IP, many, node_port, program, redirect, saved
from tests.conftest import LOOPS
from tests.netns import eventually
from userspace_proxy.capture import iptables
from userspace_proxy.capture.base import Changes
from userspace_proxy.capture.iptables import IPTables, cleanup
from userspace_proxy.exceptions import CaptureError, CaptureUnavailable
from userspace_proxy.model import IPFamily

pytestmark = pytest.mark.privileged

on_each_loop = pytest.mark.parametrize("captured", LOOPS, indirect=True)


@pytest.fixture
def captured(node, request):
    with asyncio.Runner(loop_factory=LOOPS[getattr(request, "param", "uvloop")]) as runner:
        captured = Captured(node, runner, "iptables")
        yield captured
        if captured.capture:
            captured.close()


def workers(captured):
    return [worker._conversation.transport.get_pid() for worker in captured.capture._workers.values()]


def test_node_ports_pass_a_firewall_that_lets_nothing_in(captured, node, client):
    node.run("iptables-legacy -P INPUT DROP")
    node.run("iptables-legacy -A INPUT -m conntrack --ctstate ESTABLISHED -j ACCEPT")
    captured.start().replace(node_port())
    with listening(node, V4) as listener:
        reach(client, ("10.1.0.1", 30080), listener)


def test_the_hold_is_what_keeps_it(captured, node, client):
    """Should this fail, the kernel has changed its ways and the hold is not needed any longer."""
    captured.start().replace(redirect())
    with listening(node, V4) as listener:
        with client.entered():
            there = socket.create_connection(("10.96.0.10", 80), timeout=1)
        here, _ = listener.accept()
        with here, there:
            captured.withdraw()
            node.run("iptables-legacy -F USERSPACE-PROXY-HOLD")
            here.sendall(b"frozen")
            with pytest.raises((TimeoutError, ConnectionError)):
                assert there.recv(100) == b""


# Changes and their counts


@on_each_loop
def test_counts_and_repairs(captured, node):
    captured.start()
    web = redirect()
    assert captured.replace() == Changes()
    assert captured.replace(web, node_port(), redirect(CLUSTER_IP[V6])) == Changes(added=7)
    assert captured.replace(web) == Changes(removed=5)
    assert captured.replace(redirect(proxy_port=40002)) == Changes(added=2, removed=2)
    before = saved(node)
    node.run("iptables-legacy -t nat -F")
    node.run("ip6tables-legacy -F")
    node.run("iptables-legacy -I KUBE-NODEPORT-NON-LOCAL -j DROP")
    # 2 rules and 4 jumps; the hold and a jump; the rule that is too much.
    assert captured.replace(redirect(proxy_port=40002)) == Changes(repaired=2 + 4 + 2 + 1)
    assert saved(node) == before
    assert captured.replace(redirect(proxy_port=40002)) == Changes()


@pytest.mark.parametrize("family", IPFamily)
def test_foreign_rules_are_as_before_after_the_close(captured, node, family):
    node.run(f"{program(family)} -t nat -N FOREIGN")
    node.run(f"{program(family)} -t nat -A PREROUTING -p tcp -m comment --comment 'x \"y\"' -j FOREIGN")
    node.run(f"{program(family)} -t nat -A OUTPUT -p udp --dport 53 -j FOREIGN")
    before = saved(node, family)
    captured.start().replace(redirect(CLUSTER_IP[family]), node_port(family=family))
    captured.close()
    assert saved(node, family) == before


def test_five_thousand_services(captured, node):
    """All of them are in after one call, and a change among them is the change alone."""
    captured.start()
    services = many(5000)
    assert captured.replace(*services) == Changes(added=2 * 5000)
    assert saved(node).count("-A KUBE-PORTALS-HOST") == 5000
    assert captured.replace(*services) == Changes()
    assert captured.replace(*services[1:]) == Changes(removed=2)


def test_what_is_refused_is_told_and_the_rest_is_in(captured, node):
    captured.start()
    changes = captured.replace(redirect("10.96.0.11", proxy_port=0), redirect())
    (refused,) = changes.refused
    assert refused.startswith("default/web:main: ClusterIP 10.96.0.11:80/TCP: proxy port 0: must be 1 to 65535")
    assert changes.added == 2
    assert "10.96.0.10/32" in saved(node)


# Where something is missing


def test_a_family_that_is_missing_does_not_keep_the_other(captured, node, caplog):
    captured.capture = capture = IPTables(bind_address="0.0.0.0")
    capture._openings[V6] = msgspec.structs.replace(capture._openings[V6], bind_address="nowhere")
    captured.run(capture.start())
    assert capture.families == {V4}
    assert len(caplog.messages) == 1
    assert "IPv6 is not available" in caplog.text
    assert "only IPv4 is captured" in caplog.text
    assert captured.replace(redirect(), redirect(CLUSTER_IP[V6])) == Changes(added=2)
    assert captured.replace(redirect(), redirect(CLUSTER_IP[V6])) == Changes()
    assert caplog.messages[1:] == ["capture iptables: IPv6 portals exist, but are not captured"]


def test_with_no_family_it_is_unavailable_and_leaves_nothing_behind(captured, node):
    before = saved(node)
    capture = IPTables(bind_address="10.1.0.1")
    capture._openings[V4] = msgspec.structs.replace(capture._openings[V4], bind_address="nowhere")
    with pytest.raises(CaptureUnavailable, match="IPv4 is not available"):
        captured.run(capture.start())
    captured.run(capture.close())
    assert saved(node) == before


def test_without_permission_it_says_what_to_do(node):
    script = (
        "import asyncio\n"
        "from userspace_proxy.capture.iptables import IPTables\n"
        "asyncio.run(IPTables(bind_address='0.0.0.0').start())"
    )
    said = node.run(f'setpriv --bounding-set=-net_admin,-net_raw {sys.executable} -c "{script}"', check=False)
    assert "CaptureUnavailable" in said
    assert "run as root, or with CAP_NET_ADMIN" in said


@pytest.mark.parametrize(
    ("problem", "advice"),
    [
        ("iptables: Permission denied (you must be root)", "run as root, or with CAP_NET_ADMIN"),
        ("iptables-legacy-save is not installed", "install the package iptables"),
        ("can't initialize iptables table `nat': Table does not exist", "the kernel needs iptable_nat"),
        ("something else", "something else"),
    ],
)
def test_what_is_missing_is_told_with_what_to_do(problem, advice):
    assert advice in iptables._advice(problem)


def test_cleanup_without_permission_is_an_error_not_a_success(node):
    node.run("iptables-legacy -t nat -N KUBE-PORTALS-HOST")
    script = "import asyncio; from userspace_proxy.capture.iptables import cleanup; asyncio.run(cleanup())"
    said = node.run(f'setpriv --bounding-set=-net_admin,-net_raw {sys.executable} -c "{script}"', check=False)
    assert "CaptureError" in said
    assert "run as root" in said


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import os; os.abort()", "ended with status -6"),
        ("raise ImportError('libxtables.so.12')", "done without: python-iptables cannot be loaded: libxtables.so.12"),
        ("class Table: pass\nclass Rule: pass", "done without: python-iptables: TypeError"),
    ],
)
def test_a_python_iptables_that_does_not_work_here_is_done_without(
    captured, node, tmp_path, monkeypatch, caplog, source, said
):
    (tmp_path / "iptc.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    captured.start("10.1.0.1")
    assert captured.replace(redirect(), node_port()) == Changes(added=5)
    assert said in caplog.text


# Processes


@on_each_loop
def test_a_worker_that_died_is_replaced_and_nothing_is_lost(captured, node, caplog):
    captured.start().replace(redirect())
    before = saved(node)
    for pid in workers(captured):
        os.kill(pid, signal.SIGKILL)
    node.run("iptables-legacy -t nat -F KUBE-PORTALS-HOST")
    captured.replace(redirect())
    assert saved(node) == before
    captured.close()
    assert "KUBE" not in saved(node)


@on_each_loop
def test_a_difference_is_told_to_the_family_it_concerns(captured, node):
    """And what others have done is seen with an empty one, in both."""
    one, two, six = redirect(), redirect("10.96.0.11", name="b"), redirect("fd00:96::10", name="c")
    captured.start()
    assert captured.change([one, six], new=[one, six]).added == 4
    assert captured.change([two, six], gone=[one], new=[two]) == Changes(added=2, removed=2)
    assert "10.96.0.11/32" in saved(node)
    assert "10.96.0.10/32" not in saved(node)
    node.run("iptables-legacy -t nat -F KUBE-PORTALS-HOST")
    node.run("ip6tables-legacy -t nat -F KUBE-PORTALS-HOST")
    assert captured.change([two, six]).repaired == 2
    assert saved(node).count("10.96.0.11/32") == 2
    assert saved(node, V6).count("fd00:96::10/128") == 2


def test_a_difference_comes_through_what_others_did_meanwhile(captured, node):
    """Nobody looks before a change; that our chains are gone is put right with the next repair at the latest."""
    many_of_them = many(100)
    captured.start()
    captured.replace(*many_of_them)
    node.run("iptables-legacy -t nat -F")
    node.run("iptables-legacy -t nat -X")
    new = redirect("10.97.0.1", name="new")
    captured.change([*many_of_them, new], new=[new])
    captured.change([*many_of_them, new])
    assert saved(node).count("10.97.0.1/32") == 2
    assert saved(node).count("10.96.0.7/32") == 2
    assert saved(node).count("-j KUBE-PORTALS-HOST") == 1


def test_a_successor_is_told_everything_and_not_the_difference(captured, node, caplog):
    one, two = redirect(), redirect("10.96.0.11", name="b")
    captured.start()
    captured.replace(one)
    for pid in workers(captured):
        os.kill(pid, signal.SIGKILL)
    captured.change([one, two], new=[two])
    assert saved(node).count("10.96.0.10/32") == 2
    assert saved(node).count("10.96.0.11/32") == 2
    captured.change([two], gone=[one])
    assert "10.96.0.10/32" not in saved(node)


def test_a_worker_that_dies_while_it_is_asked_is_replaced(captured, node, caplog):
    captured.start()
    pids = workers(captured)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)

    async def killed_meanwhile():
        asyncio.get_running_loop().call_later(0.2, lambda: [os.kill(pid, signal.SIGKILL) for pid in pids])
        return await captured.capture.replace([redirect()])

    assert captured.run(killed_meanwhile()) == Changes(added=2)
    assert sorted(caplog.messages) == [f"iptables worker {f.value} died, starting another" for f in IPFamily]


@on_each_loop
def test_a_worker_that_dies_of_its_request_is_an_error(captured, node, tmp_path, monkeypatch):
    captured.start()
    for pid in workers(captured):
        os.kill(pid, signal.SIGKILL)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(CaptureError, match="iptables worker IPv4 ended with status 1"):
        captured.replace(redirect())
    monkeypatch.undo()
    assert captured.replace(redirect()) == Changes(added=2)


@on_each_loop
def test_a_worker_that_cannot_be_started_is_an_error(captured, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises(CaptureUnavailable, match="/nonexistent/python cannot be started: No such file"):
        captured.start()


@on_each_loop
def test_a_worker_that_does_not_answer_is_killed(captured, node, monkeypatch):
    captured.start()
    monkeypatch.setattr(iptables, "_ANSWER_TIMEOUT", 0.3)
    for pid in workers(captured):
        os.kill(pid, signal.SIGSTOP)
    with pytest.raises(CaptureError, match="no answer"):
        captured.replace(redirect())
    monkeypatch.setattr(iptables, "_ANSWER_TIMEOUT", 30)
    assert captured.replace(redirect()) == Changes(added=2)


@on_each_loop
def test_a_family_whose_worker_is_slow_is_not_left_out_for_good(captured, node, monkeypatch, tmp_path):
    """Whether it can be had is not known, so the start fails, and with it whatever the other family has got."""
    before = saved(node)
    slow = tmp_path / "python"
    slow.write_text(f'#!/bin/sh\nmkdir {tmp_path}/first 2>/dev/null && exec sleep 300\nexec {sys.executable} "$@"\n')
    slow.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(slow))
    monkeypatch.setattr(iptables, "_FIRST_ANSWER_TIMEOUT", 3)
    with pytest.raises(iptables.WorkerStuck, match="no answer in 3 s, killed; start again"):
        captured.start()
    captured.close()
    assert saved(node) == before
    monkeypatch.undo()
    captured.start()
    assert captured.replace(redirect(), redirect(CLUSTER_IP[V6])) == Changes(added=4)


@on_each_loop
def test_an_asker_that_is_cancelled_does_not_confuse_the_next(captured, node):
    captured.start()

    async def cancelled():
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.001):
                await captured.capture.replace(many(2000))

    captured.run(cancelled())
    captured.replace(redirect())
    assert saved(node).count("-A KUBE-PORTALS-HOST") == 1


def test_close_works_from_any_state(node, loop_factory):
    async def main():
        await IPTables(bind_address="0.0.0.0").close()
        started = IPTables(bind_address="0.0.0.0")
        await started.start()
        await started.close()
        dead = IPTables(bind_address="0.0.0.0")
        await dead.start()
        await dead.replace([redirect()])
        for worker in dead._workers.values():
            worker._conversation.transport.kill()
        await asyncio.sleep(0.1)
        await dead.close()

    before = saved(node)
    with node.entered(), asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(main())
    assert saved(node) == before


PROXY = """
import asyncio, sys
from tests.capture.conversation import redirect
from userspace_proxy.capture.iptables import IPTables

async def main():
    capture = IPTables(bind_address="0.0.0.0")
    await capture.start()
    await capture.replace([redirect(proxy_port=int(sys.argv[1]))])
    print(*(worker._conversation.transport.get_pid() for worker in capture._workers.values()), flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def test_kill_9_takes_the_workers_along_and_a_restart_leaves_one_generation(captured, node, tmp_path):
    script = tmp_path / "proxy.py"
    script.write_text(PROXY)
    generations = []
    for proxy_port in (41001, 41002):
        proxy = node.spawn(f"{sys.executable} {script} {proxy_port}", env=os.environ | {"PYTHONPATH": os.getcwd()})
        workers = [int(pid) for pid in proxy.stdout.readline().split()]
        assert len(workers) == 2
        assert all(os.getsid(pid) != os.getsid(proxy.pid) for pid in workers)
        proxy.send_signal(signal.SIGKILL)
        eventually(lambda workers=workers: not any(is_alive(pid) for pid in workers))
        generations.append(saved(node))
    first, second = generations
    assert second == first.replace("41001", "41002")
    captured.start()
    assert "KUBE" not in saved(node)


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("times", [1, 2])
def test_cleanup_works_without_a_proxy_and_again(node, loop_factory, times):
    before = {family: saved(node, family) for family in IPFamily}

    async def leave_behind():
        capture = IPTables(bind_address="0.0.0.0")
        await capture.start()
        await capture.replace([redirect(), redirect(CLUSTER_IP[V6]), node_port()])
        for worker in capture._workers.values():
            await worker.end()

    with node.entered(), asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(leave_behind())
        assert "KUBE" in saved(node)
        for _ in range(times):
            runner.run(cleanup())
    assert {family: saved(node, family) for family in IPFamily} == before
    assert node.run("ip route show table all proto 117") == ""


@on_each_loop
def test_what_a_worker_prints_is_in_the_log(captured, node, caplog):
    captured.start()
    caplog.set_level(logging.WARNING)
    conversation = captured.capture._workers[V4]._conversation
    conversation.pipe_data_received(2, b"Segmentation")
    conversation.pipe_data_received(2, b" fault\nand")
    assert caplog.messages == ["iptables worker IPv4: Segmentation fault"]
