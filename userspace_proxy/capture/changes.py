"""What is amiss in the chains of the iptables capture, and what puts it right.

Rules are compared as the text that they are in (`rules`), so that one comparison finds every kind of change: a flush, a
rule taken out, put in or moved, a jump or a chain deleted. What follows from it is counted, and written as a script;
how the kernel is read and written is in `xtables`; when, in `worker`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from userspace_proxy.capture.rules import Chains, Jump, TableRules


@dataclass(frozen=True, slots=True)
class ChainChange:
    """One chain of ours that must be made, or holds something else than it should."""

    chain: str
    content: tuple[str, ...]
    """All its rules, as they must be."""
    exists: bool
    deletions: tuple[str, ...] = ()
    insertions: tuple[tuple[int, str], ...] = ()
    """After the deletions, in this order: position (from 0) and rule."""
    in_steps: bool = False
    """Whether deletions and insertions lead to `content`; if not, it must be filled anew."""

    @property
    def size(self) -> int:
        return len(self.deletions) + len(self.insertions) if self.in_steps else len(self.content)


@dataclass(frozen=True, slots=True)
class TableChange:
    """What makes a table hold what it should; applied all at once or not at all."""

    chains: tuple[ChainChange, ...] = ()
    jumps: tuple[Jump, ...] = ()
    """Missing ones, in the order in which to put them in."""
    dropped: tuple[tuple[str, str], ...] = ()
    """Chain and text of rules to delete from chains that are not ours: surplus jumps."""
    removed: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.chains or self.jumps or self.dropped or self.removed)

    @property
    def size(self) -> int:
        """How many rules it writes or deletes."""
        return sum(change.size for change in self.chains) + len(self.jumps) + len(self.dropped)


def compare(actual: Chains, wanted: TableRules, owned: Collection[str]) -> TableChange:
    """What to change so that the chains `owned` in a table, and the jumps to them, are as wanted."""
    surplus = {chain for chain in actual if chain in owned and chain not in wanted.chains}
    dropped = [
        (chain, text)
        for chain, texts in actual.items()
        if chain not in owned
        for text in texts
        if surplus and text.rsplit(" ", 1)[-1] in surplus
    ]
    missing = []
    for jump in wanted.jumps:
        present = list(actual.get(jump.hook, ())).count(jump.text)
        if not present:
            missing.append(jump)
        dropped += [(jump.hook, jump.text)] * (present - 1)
    changed = (_compare_chain(chain, actual.get(chain), content) for chain, content in wanted.chains.items())
    return TableChange(
        chains=tuple(change for change in changed if change),
        jumps=tuple(missing),
        dropped=tuple(dropped),
        removed=tuple(sorted(surplus)),
    )


def _compare_chain(chain: str, actual: Sequence[str] | None, content: tuple[str, ...]) -> ChainChange | None:
    if actual is None:
        return ChainChange(chain, content, exists=False)
    if tuple(actual) == content:
        return None
    have, want = set(actual), set(content)
    kept = [text for text in content if text in have]
    if len(have) != len(actual) or kept != [text for text in actual if text in want]:
        return ChainChange(chain, content, exists=True)
    return ChainChange(
        chain,
        content,
        exists=True,
        deletions=tuple(text for text in actual if text not in want),
        insertions=tuple((position, text) for position, text in enumerate(content) if text not in have),
        in_steps=True,
    )


def count_changes(old: TableRules, new: TableRules) -> tuple[int, int]:
    """How many rules, jumps not counted, are new, and how many are gone."""
    added = removed = 0
    for chain in old.chains.keys() | new.chains.keys():
        before, after = set(old.chains.get(chain, ())), set(new.chains.get(chain, ()))
        added += len(after - before)
        removed += len(before - after)
    return added, removed


def count_damage(actual: Chains, left: TableRules) -> int:
    """How many rules and jumps others have taken out of, or put into, what we left in a table."""
    damage = 0
    for chain, content in left.chains.items():
        found = tuple(actual.get(chain, ()))
        if found == content:
            continue
        taken, put = Counter(content), Counter(found)
        # A chain that is only in disorder is damaged too.
        damage += (taken - put).total() + (put - taken).total() or 1
    return damage + sum(jump.text not in actual.get(jump.hook, ()) for jump in left.jumps)


def restore_script(table: str, change: TableChange) -> str:
    """The change as input of `iptables-restore --noflush`.

    Changed chains are written whole: it takes no longer than finding single rules in them does, and
    what somebody else did to them since they were read is undone with it.
    """
    lines = [f"*{table}"]
    # A chain's declaration empties it if it exists.
    lines += [f":{changed.chain} - [0:0]" for changed in change.chains]
    lines += [f"-D {chain} {text}" for chain, text in change.dropped]
    for changed in change.chains:
        start = f"-A {changed.chain} "
        lines += [start + text for text in changed.content]
    lines += [
        f"-I {jump.hook} 1 {jump.text}" if jump.on_top else f"-A {jump.hook} {jump.text}" for jump in change.jumps
    ]
    for chain in change.removed:
        lines += [f"-F {chain}", f"-X {chain}"]
    lines += ["COMMIT", ""]
    return "\n".join(lines)
