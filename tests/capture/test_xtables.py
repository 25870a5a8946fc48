"""Both ways to the kernel's tables: each alone, and what one writes the other reads."""

from __future__ import annotations

import fcntl
import os
import sys

import pytest

from tests.capture.conversation import (
    CLUSTER_IP,
    WITHOUT_PROGRAMS,
    WORKER,
    ask,
    many,
    node_port,
    opening,
    redirect,
    saved,
)
from tests.netns import eventually
from userspace_proxy.capture import rules, xtables
from userspace_proxy.capture.changes import ChainChange, TableChange, compare
from userspace_proxy.capture.messages import Close, Replace
from userspace_proxy.capture.scope import Scope
from userspace_proxy.model import IPFamily, Protocol

pytestmark = pytest.mark.privileged

WAYS = [
    pytest.param({"module": WORKER}, True, id="both"),
    pytest.param({"module": WORKER}, False, id="programs"),
    pytest.param({"module": WITHOUT_PROGRAMS}, True, id="library"),
]


def mixed(family):
    ip = CLUSTER_IP[family]
    return (
        redirect(ip),
        redirect(ip, 53, 40002, Protocol.UDP, "dns"),
        node_port(30080, 40001, family=family),
        node_port(30053, 40002, Protocol.UDP, family=family),
    )


def rendered(redirects, family, bind="", cidrs=(), inside=()):
    scope = Scope(family, bind or family.wildcard, cidrs, inside)
    tables = rules.render(redirects, scope).values()
    return {chain: list(texts) for table in tables for chain, texts in table.chains.items()}


def chains_of(namespace, family):
    return {chain: texts for chain, texts in rules.parse(saved(namespace, family)).items() if "-" in chain}


@pytest.mark.parametrize(("how", "use_library"), WAYS)
@pytest.mark.parametrize("family", IPFamily)
def test_no_table_is_made_but_those_with_rules_of_ours(node, family, how, use_library):
    """Hooks of each would be on the way of every packet, from then on."""
    names = "ip6_tables_names" if family is IPFamily.IPV6 else "ip_tables_names"
    assert node.run(f"cat /proc/net/{names}") == ""
    ask(node, opening(family, use_library=use_library), Replace(mixed(family)), Replace(()), Close(), **how)
    assert set(node.run(f"cat /proc/net/{names}").split()) == {"filter", "nat"}


@pytest.mark.parametrize(("how", "use_library"), WAYS)
@pytest.mark.parametrize("family", IPFamily)
def test_the_kernel_holds_what_was_rendered_and_it_reads_back_the_same(node, family, how, use_library):
    start = opening(family, use_library=use_library)
    _, first, again, fewer, more, disorderly = ask(
        node,
        start,
        Replace(mixed(family)),
        Replace(mixed(family)),
        Replace(mixed(family)[1:3]),
        Replace(mixed(family)),
        Replace(mixed(family)[:0]),
        **how,
    )
    assert (first.added, first.removed, first.repaired) == (10, 0, 0)
    assert (again.added, again.removed, again.repaired) == (0, 0, 0)
    assert (fewer.added, fewer.removed, fewer.repaired) == (0, 5, 0)
    assert (more.added, more.removed, more.repaired) == (5, 0, 0)
    assert (disorderly.added, disorderly.removed, disorderly.repaired) == (0, 10, 0)
    ask(node, start, Replace(mixed(family)), **how)
    assert chains_of(node, family) == rendered(mixed(family), family)


@pytest.mark.parametrize(("how", "use_library"), WAYS)
@pytest.mark.parametrize(
    ("family", "inside"), [(IPFamily.IPV4, ("10.1.0.0/16", "0.0.0.0/0")), (IPFamily.IPV6, ("fd00:1::/64",))]
)
def test_rules_for_clients_inside_read_back_the_same(node, how, use_library, family, inside):
    start = opening(family, use_library=use_library, inside=inside)
    redirects = tuple(each._replace(inside_port=40009) for each in mixed(family))
    _, _, again = ask(node, start, Replace(redirects), Replace(redirects), **how)
    assert again.repaired == 0
    assert chains_of(node, family) == rendered(redirects, family, inside=inside)


@pytest.mark.parametrize(("how", "use_library"), WAYS)
@pytest.mark.parametrize(
    ("family", "bind", "cidrs"),
    [(IPFamily.IPV4, "10.1.0.1", ("127.0.0.0/8", "10.0.0.0/8")), (IPFamily.IPV6, "fd01::1", ("fd00::/8", "::1/128"))],
)
def test_destination_rules_and_node_port_addresses(node, how, use_library, family, bind, cidrs):
    start = opening(family, use_library=use_library, bind_address=bind, nodeport_cidrs=cidrs)
    _, _, again = ask(node, start, Replace(mixed(family)), Replace(mixed(family)), **how)
    assert again.repaired == 0
    assert chains_of(node, family) == rendered(mixed(family), family, bind, cidrs)


@pytest.mark.parametrize(("how", "use_library"), WAYS)
def test_nothing_is_left_behind_and_foreign_rules_stay(node, how, use_library):
    node.run("iptables-legacy -t nat -N MINE")
    node.run("iptables-legacy -t nat -A MINE -p tcp --dport 80 -m comment --comment 'it is mine' -j RETURN")
    node.run("iptables-legacy -t nat -A PREROUTING -j MINE")
    node.run("iptables-legacy -P FORWARD DROP")
    node.run("iptables-legacy -A INPUT -s 10.0.0.0/8 -i eth0 -j ACCEPT")
    before = saved(node)
    ask(node, opening(use_library=use_library), Replace(mixed(IPFamily.IPV4)), Close(), **how)
    assert saved(node) == before


@pytest.mark.parametrize(("how", "use_library"), WAYS)
@pytest.mark.parametrize(
    "damage",
    [
        "-F",
        "-F KUBE-PORTALS-HOST",
        "-D KUBE-PORTALS-HOST 1",
        "-I KUBE-PORTALS-HOST 1 -d 10.96.0.10/32 -j ACCEPT",
        "-A KUBE-PORTALS-HOST -s 10.0.0.0/8 -i eth0 -o eth1 ! -d 10.0.0.1 -p tcp -m tcp --sport 1:2 -j ACCEPT",
        "-R KUBE-NODEPORT-HOST 1 -p tcp -m tcp --dport 30080 -j REDIRECT --to-ports 1",
        "-D PREROUTING 1",
        "-A KUBE-PORTALS-HOST -j KUBE-NODEPORT-HOST",
        "-X",
    ],
)
def test_what_others_did_to_our_rules_is_undone(node, how, use_library, damage):
    wanted = Replace(mixed(IPFamily.IPV4))
    start = opening(use_library=use_library)
    ask(node, start, wanted, **how)
    good = saved(node)
    node.run("iptables-legacy -t nat -F" if damage == "-X" else f"iptables-legacy -t nat {damage}")
    if damage == "-X":
        node.run("iptables-legacy -t nat -X")
    assert saved(node) != good
    _, repair = ask(node, opening(use_library=use_library, take_over=False), wanted, **how)
    assert repair.error == ""
    assert saved(node) == good


def test_many_rules_are_loaded(node):
    node.run("ip route add default dev lo")
    _, loaded, changed = ask(node, opening(), Replace(tuple(many(5000))), Replace(tuple(many(4999))))
    assert (loaded.added, changed.removed) == (10000, 2)
    assert len(chains_of(node, IPFamily.IPV4)["KUBE-PORTALS-HOST"]) == 4999


def test_the_library_loads_many_rules_too(node):
    node.run("ip route add default dev lo")
    _, loaded, again = ask(
        node, opening(), Replace(tuple(many(1000))), Replace(tuple(many(1000))), module=WITHOUT_PROGRAMS
    )
    assert loaded.added == 2000
    assert again == type(again)(number=2)


def test_the_lock_is_waited_for(node, tmp_path, monkeypatch):
    path = tmp_path / "xtables.lock"
    monkeypatch.setenv("XTABLES_LOCKFILE", str(path))
    with node.entered(), path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        tables = xtables.Tables(IPFamily.IPV4, use_library=False)
        monkeypatch.setattr(xtables, "_LOCK_WAIT", 0.05)
        with pytest.raises(xtables.XtablesError, match="has held the xtables lock"):
            tables.make("nat", rules.HOLD_ONLY, rules.TableRules())
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert tables.make("filter", rules.HOLD_ONLY, rules.TableRules()) == 0
    assert chains_of(node, IPFamily.IPV4) == {rules.HOLD: list(rules.HOLD_ONLY["filter"].chains[rules.HOLD])}


def test_a_lock_that_the_programs_cannot_get_is_not_blamed_on_the_rules(node, tmp_path, monkeypatch):
    path = tmp_path / "xtables.lock"
    monkeypatch.setenv("XTABLES_LOCKFILE", str(path))
    monkeypatch.setattr(xtables, "_LOCK_WAIT", 1)
    change = compare({}, rules.HOLD_ONLY["filter"], rules.OWNED["filter"])
    with node.entered(), path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(xtables.XtablesError) as caught:
            xtables.Programs(IPFamily.IPV4).write("filter", change)
    assert not isinstance(caught.value, xtables.Refused)


def test_rules_that_are_refused_change_nothing(node):
    bad = TableChange(chains=(ChainChange("KUBE-PORTALS-HOST", ("-d 10.0.0.300 -j ACCEPT",), exists=False),))
    with node.entered(), pytest.raises(xtables.Refused, match=r"10\.0\.0\.300"):
        xtables.Programs(IPFamily.IPV4).write("nat", bad)
    assert chains_of(node, IPFamily.IPV4) == {}


def test_a_table_that_nobody_uses_is_not_loaded_by_looking(node):
    with node.entered():
        tables = xtables.Tables(IPFamily.IPV4, use_library=False)
        assert tables.read("nat") == {}
        assert tables.make("nat", rules.NOTHING, rules.TableRules()) == 0
    assert node.run("cat /proc/net/ip_tables_names") == ""


def test_without_any_way_it_says_what_is_missing(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(xtables, "_PROGRAM_PATH", "/nonexistent")
    with pytest.raises(xtables.XtablesError, match="ip6tables-legacy-save is not installed"):
        xtables.Tables(IPFamily.IPV6, use_library=False)


@pytest.mark.parametrize(("target", "found"), [("xtables-legacy-multi", True), ("xtables-nft-multi", False)])
def test_the_plain_name_is_taken_only_where_it_means_legacy(tmp_path, monkeypatch, target, found):
    (tmp_path / target).write_text("#!/bin/sh\n")
    (tmp_path / target).chmod(0o755)
    for name in ("iptables-save", "iptables-restore"):
        (tmp_path / name).symlink_to(target)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(xtables, "_PROGRAM_PATH", "/nonexistent")
    if found:
        assert xtables.Programs(IPFamily.IPV4)._save == str(tmp_path / "iptables-save")
    else:
        with pytest.raises(xtables.XtablesError, match="not installed"):
            xtables.Programs(IPFamily.IPV4)


def test_where_the_lock_file_is_another_users_an_own_one_is_taken(node, tmp_path):
    """As in a user namespace: root there, but not for the machine's files."""
    run_directory = tmp_path / "run"
    run_directory.mkdir(mode=0o777)
    own = os.path.join(run_directory, f"xtables-{os.getuid()}.lock")
    program = (
        "import os; os.environ.update(XTABLES_LOCKFILE='/proc/nowhere/lock', XDG_RUNTIME_DIR='%s'); "
        "from userspace_proxy.capture import xtables, rules; from userspace_proxy.model import IPFamily; "
        "t = xtables.Tables(IPFamily.IPV4, use_library=False); "
        "t.make('filter', rules.HOLD_ONLY, rules.TableRules()); print(os.environ['XTABLES_LOCKFILE'])"
    )
    assert node.run(f'{sys.executable} -c "{program % run_directory}"').strip() == own
    eventually(lambda: os.path.exists(own))
