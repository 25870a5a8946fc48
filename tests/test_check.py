"""What `check` tells, on hosts that lack this and that, and that it leaves no trace."""

from __future__ import annotations

import json
import sys

import pytest

from tests.netns import Namespace
from userspace_proxy import check, cli
from userspace_proxy.check import Finding, Report

pytestmark = pytest.mark.privileged

CHECK = f"{sys.executable} -m userspace_proxy check"


@pytest.fixture
def node():
    with Namespace() as namespace:
        yield namespace


def found(node, *words, on="", check=True):
    answer = json.loads(node.run(" ".join((on, CHECK, "--output=json", *words)), check=check))
    return answer["capture"], {each["name"]: each for each in answer["findings"]}


def test_a_host_that_has_everything_and_a_proxy_that_runs(node):
    """It is looked at without a trace: whose rules are there stays, and no others come."""
    node.run("iptables-legacy -t nat -N KUBE-PORTALS-HOST")
    node.run("nft -f -", text="table ip userspace-proxy { chain outside {\n}\n}")
    node.run("ip route add local 10.96.0.10 dev lo table local proto 117")

    def state():
        commands = ("iptables-legacy-save -t nat", "nft list ruleset", "ip route show table all proto 117")
        return [line for each in commands for line in node.run(each).splitlines() if not line.startswith(("#", ":"))]

    before = state()
    capture, findings = found(node)
    assert capture == "iptables"
    for name in ("iptables", "nftables", "local", "none"):
        assert findings[f"capture {name}"]["state"] == "ok", findings
    assert {findings[name]["state"] for name in ("IPv4", "IPv6", "splice", "conntrack", "CAP_NET_ADMIN")} == {"ok"}
    assert state() == before
    assert "userspace-proxy" in "".join(before)


def test_what_is_asked_for_is_what_is_told(node):
    assert found(node, "--capture=nftables")[0] == "nftables"
    capture, findings = found(node, "--capture", "local", "--bind-address=127.0.0.1")
    assert capture == "local"
    assert findings["capture local"]["state"] == "ok"


def test_without_permission_it_says_what_to_do(node):
    unprivileged = "setpriv --bounding-set=-all --inh-caps=-all"
    capture, findings = found(node, on=unprivileged)
    assert capture == "local"
    assert findings["capture iptables"]["todo"] == "run as root, or with CAP_NET_ADMIN and CAP_NET_RAW"
    assert findings["capture nftables"]["todo"] == "run as root, or with CAP_NET_ADMIN"
    for way in ("iptables", "nftables"):
        assert "IPv6 is not available" in findings[f"capture {way}"]["found"]
        assert "run as root" not in findings[f"capture {way}"]["found"]
    assert findings["conntrack"]["todo"].startswith("for UDP Services: run as root;")
    assert findings["capture local"]["state"] == "limited"
    assert "only addresses that this host has" in findings["capture local"]["found"]
    assert "unshare -Urn" in findings["CAP_NET_ADMIN"]["todo"]
    assert found(node, "--capture=nftables", on=unprivileged, check=False)[0] == ""
    node.run(f"sh -c '{unprivileged} {CHECK} --capture=nftables; test $? = 1'")


def test_where_rules_could_be_changed_but_nothing_tried_aside_nothing_is_tried(node):
    capture, findings = found(node, on="setpriv --bounding-set=-sys_admin")
    assert capture == "iptables"
    assert findings["capture iptables"]["found"] == "not tried"
    assert "CAP_SYS_ADMIN" in findings["capture nftables"]["todo"]


def test_a_namespace_without_lo_and_without_descriptors(node):
    node.run("ip link set lo down")
    node.run("ip addr flush dev lo")
    node.spawn("true")
    capture, findings = found(node, on="prlimit --nofile=500:500")
    assert findings["IPv6"]["state"] == "missing"
    assert findings["descriptors"]["state"] == "limited"
    assert findings["descriptors"]["found"].startswith("500 ")


def test_who_would_answer_at_service_addresses_is_told(node):
    program = "import socket, time; s = socket.create_server((str(), 8088)); print(flush=True); time.sleep(60)"
    node.spawn(f"{sys.executable} -c '{program}'").stdout.readline()
    assert found(node)[1]["capture local"]["found"].endswith("would answer at service addresses too: ports 8088")


def test_the_table(node):
    lines = node.run(CHECK).splitlines()
    assert lines[0].split() == ["STATE", "FOUND"]
    assert lines[-1] == "capture iptables will be used"
    report = Report("", (Finding("much", check.OK, "so"), Finding("a", check.MISSING, "nothing", "get it")))
    assert report.as_table().splitlines() == [
        "      STATE    FOUND",
        "much  ok       so",
        "a     missing  nothing",
        "               -> get it",
        "",
        "what was asked for does not work here",
    ]


def test_each_familys_problem_has_its_own_advice():
    both = "IPv4 is not available: no table nat: load it; then go on; IPv6 is not available: no program: install it"
    wrong = "IPv4 is not available: no table nat; IPv6 is not available: no program"
    assert check._split(both) == (wrong, "load it; then go on; install it")
    assert check._split("nothing works") == ("nothing works", "")


def test_a_kernel_without_splice(monkeypatch):
    def refused(*_):
        raise OSError

    assert check._splices()
    monkeypatch.setattr(check.os, "splice", refused)
    assert not check._splices()


@pytest.mark.parametrize(
    ("arguments", "form", "rest"),
    [
        ([], "table", []),
        (["-o", "json", "--v=2"], "json", ["--v=2"]),
        (["--bind-address", "::", "--output=yaml"], "yaml", ["--bind-address", "::"]),
        (["-o"], "", []),
    ],
)
def test_the_output_is_told_from_the_flags(arguments, form, rest):
    assert check.split(arguments) == (form, rest)


def test_what_cannot_be_used_is_told_as_everywhere(capsys):
    assert cli.main(["check", "-o", "yaml"]) == 2
    assert "--output='yaml': allowed: table, json" in capsys.readouterr().err
    assert cli.main(["check", "--capture=magic"]) == 2
    assert cli.main(["check", "--version"]) == 0
