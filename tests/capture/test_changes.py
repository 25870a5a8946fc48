from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from userspace_proxy.capture.changes import (
    ChainChange,
    TableChange,
    compare,
    count_changes,
    count_damage,
    restore_script,
)
from userspace_proxy.capture.rules import Jump, TableRules


def apply(actual, change):
    """What the kernel makes of a change, step by step as the library does it."""
    after = {chain: list(texts) for chain, texts in actual.items()}
    for changed in change.chains:
        chain = after.setdefault(changed.chain, [])
        assert changed.exists is (changed.chain in actual)
        if changed.in_steps:
            for text in changed.deletions:
                chain.remove(text)
            for position, text in changed.insertions:
                assert position <= len(chain)
                chain.insert(position, text)
        else:
            chain[:] = changed.content
    for chain, text in change.dropped:
        after[chain].remove(text)
    for jump in change.jumps:
        after[jump.hook].insert(0 if jump.on_top else len(after[jump.hook]), jump.text)
    for chain in change.removed:
        del after[chain]
    return after


JUMP_TOP, JUMP_END = Jump("HOOK", "top -j A", on_top=True), Jump("HOOK", "end -j B", on_top=False)
OWNED = {"A", "B"}
texts = st.lists(st.sampled_from("pqrstuvw"), max_size=8).map(tuple)
wanted_tables = st.one_of(
    st.just(TableRules()),
    st.builds(
        lambda a, b: TableRules({"A": tuple(dict.fromkeys(a)), "B": tuple(dict.fromkeys(b))}, (JUMP_TOP, JUMP_END)),
        texts,
        texts,
    ),
)
foreign = st.sampled_from(["x -j X", "y -j ACCEPT", JUMP_TOP.text, JUMP_END.text, "other -j A"])
actual_tables = st.builds(
    lambda hook, ours: {"HOOK": hook, "X": ["z"], **ours},
    st.lists(foreign, max_size=6),
    st.dictionaries(st.sampled_from("AB"), texts.map(list)),
)


@given(actual_tables, wanted_tables)
def test_a_change_makes_any_table_as_wanted_and_keeps_what_is_not_ours(actual, wanted):
    after = apply(actual, compare(actual, wanted, OWNED))
    assert {chain: tuple(after[chain]) for chain in after.keys() & OWNED} == dict(wanted.chains)
    for jump in wanted.jumps:
        assert after["HOOK"].count(jump.text) == 1
    assert after["X"] == ["z"]
    assert [t for t in after["HOOK"] if t.endswith(("X", "ACCEPT"))] == [
        t for t in actual["HOOK"] if t.endswith(("X", "ACCEPT"))
    ]
    if not wanted.chains:
        assert not [text for text in after["HOOK"] if text.endswith(("A", "B")) and text.split()[-1] in actual]
    assert not compare(after, wanted, OWNED)


def test_a_jump_that_is_present_stays_where_it_is():
    actual = {"HOOK": ["y -j ACCEPT", JUMP_TOP.text], "A": [], "B": []}
    change = compare(actual, TableRules({"A": (), "B": ()}, (JUMP_TOP, JUMP_END)), OWNED)
    assert change == TableChange(jumps=(JUMP_END,))


def test_few_changes_in_order_are_made_in_steps():
    change = compare({"A": list("pqr")}, TableRules({"A": ("q", "s", "r", "t")}), OWNED)
    assert change.chains == (
        ChainChange("A", tuple("qsrt"), exists=True, deletions=("p",), insertions=((1, "s"), (3, "t")), in_steps=True),
    )
    assert change.size == 3


@pytest.mark.parametrize("found", ["qp", "pqp"])
def test_a_chain_in_disorder_is_filled_anew(found):
    (changed,) = compare({"A": list(found)}, TableRules({"A": ("p", "q")}), OWNED).chains
    assert not changed.in_steps
    assert changed.size == 2


@pytest.mark.parametrize(
    ("found", "damage"),
    [
        ({"A": ["p", "q"], "HOOK": [JUMP_TOP.text]}, 0),
        ({"A": ["p", "q"], "HOOK": []}, 1),
        ({"A": ["p"], "HOOK": [JUMP_TOP.text]}, 1),
        ({"A": ["p", "q", "r"], "HOOK": [JUMP_TOP.text]}, 1),
        ({"A": ["r", "p"], "HOOK": [JUMP_TOP.text]}, 2),
        ({"A": ["q", "p"], "HOOK": [JUMP_TOP.text]}, 1),
        ({"A": ["p", "q", "q"], "HOOK": [JUMP_TOP.text]}, 1),
        ({}, 3),
    ],
)
def test_damage_is_counted_by_rule(found, damage):
    assert count_damage(found, TableRules({"A": ("p", "q")}, (JUMP_TOP,))) == damage


def test_changes_of_ours_are_counted_by_rule():
    old, new = TableRules({"A": ("p", "q"), "B": ("r",)}), TableRules({"A": ("q", "s", "t")})
    assert count_changes(old, new) == (2, 2)


def test_the_restore_script_declares_before_it_appends_and_empties_before_it_removes():
    change = TableChange(
        chains=(ChainChange("A", ("p", "q"), exists=False),),
        jumps=(JUMP_TOP, JUMP_END),
        dropped=(("HOOK", "old -j B"),),
        removed=("B",),
    )
    assert restore_script("nat", change).splitlines() == [
        "*nat",
        ":A - [0:0]",
        "-D HOOK old -j B",
        "-A A p",
        "-A A q",
        "-I HOOK 1 top -j A",
        "-A HOOK end -j B",
        "-F B",
        "-X B",
        "COMMIT",
    ]
