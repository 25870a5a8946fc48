"""Reading and writing the legacy xtables of one family, in a worker process.

There are two ways, and either alone will do. `Programs` runs iptables-legacy-save and -restore: fast for
any number of rules. `Library` is python-iptables: a third faster for a few rules, and all there is where the
programs are not installed; but it is slow with many (5,000 rules take 2 s to make, 3 s to read), takes no lock,
cannot serve both families in one process, and does not work with every version of the C libraries. So each
is tried with real rules in a scratch chain before it is trusted (`Tables.probe`).

Every commit replaces a whole table in the kernel, so a change is in place at once or not at all.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import ipaddress
import os
import pathlib
import shlex
import shutil
import subprocess
import tempfile
import time
import typing
from collections.abc import Iterator

from userspace_proxy.capture import rules
from userspace_proxy.capture.changes import ChainChange, TableChange, compare, count_damage, restore_script
from userspace_proxy.capture.rules import Chains, Ruleset, TableRules
from userspace_proxy.capture.scope import Scope
from userspace_proxy.model import IPFamily

_LOCK_WAIT = 5.0
"""Seconds to wait for other programs that are changing rules; kube-proxy waits as long."""
_PROGRAM_TIMEOUT = 30.0
_RESOURCE_PROBLEM = 4
"""The programs' exit status when it is not for the rules: the lock is taken, permission is missing."""
_FEW = 32
"""Rules up to which the library is faster than a run of iptables-legacy-restore."""
_PROGRAM_PATH = os.pathsep.join(("/usr/sbin", "/sbin", "/usr/local/sbin"))


class XtablesError(Exception):
    """A table could not be read or written; the text says why in the kernel's or the program's words."""


class Refused(XtablesError):
    """The kernel, or the program on its behalf, does not take these rules."""


class Way(typing.Protocol):
    name: str

    def read(self, table: str) -> Chains: ...

    def write(self, table: str, change: TableChange) -> None: ...


class Programs:
    """iptables-legacy-save and iptables-legacy-restore, which takes the lock itself."""

    name = "iptables-legacy-restore"

    def __init__(self, family: IPFamily) -> None:
        """Raises XtablesError if they are not installed."""
        self._save = _find_program(family, "save")
        self._restore = _find_program(family, "restore")

    def read(self, table: str) -> Chains:
        return rules.parse(self._run([self._save, "-t", table]))

    def write(self, table: str, change: TableChange) -> None:
        os.close(_open_lock_file())  # which tells the programs of ours, where the one of all is not for us
        script = restore_script(table, change)
        self._run([self._restore, "--noflush", "--wait", str(int(_LOCK_WAIT))], script)

    def _run(self, command: list[str], text: str = "") -> str:
        try:
            done = subprocess.run(
                command, input=text, capture_output=True, text=True, timeout=_PROGRAM_TIMEOUT, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise XtablesError(f"{command[0]}: {error}") from error
        if done.returncode:
            said = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
            kind = XtablesError if done.returncode == _RESOURCE_PROBLEM else Refused
            raise kind(f"{os.path.basename(command[0])}: {said}")
        return done.stdout


def _find_program(family: IPFamily, verb: str) -> str:
    stem = "ip6tables" if family is IPFamily.IPV6 else "iptables"
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), _PROGRAM_PATH))
    if found := shutil.which(f"{stem}-legacy-{verb}", path=path):
        return found
    # Where legacy tables are the only ones, the plain name is theirs; elsewhere it writes to nf_tables.
    found = shutil.which(f"{stem}-{verb}", path=path)
    if found and os.path.basename(os.path.realpath(found)) in ("xtables-legacy-multi", "xtables-multi"):
        return found
    raise XtablesError(f"{stem}-legacy-{verb} is not installed")


class Library:
    """python-iptables. Its callers hold the lock."""

    name = "python-iptables"

    def __init__(self, family: IPFamily) -> None:
        """Raises XtablesError if python-iptables, or the C libraries that it loads, are missing."""
        try:
            import iptc
        except Exception as error:
            raise XtablesError(f"python-iptables cannot be loaded: {error}") from error
        self._iptc: typing.Any = iptc
        six = family is IPFamily.IPV6
        self._table_class = self._iptc.Table6 if six else self._iptc.Table
        self._rule_class = self._iptc.Rule6 if six else self._iptc.Rule
        # It looks for the target of a jump in all of these. To look into a table has the kernel register it, and from
        # then on every packet of the host pass its hooks.
        self._table_class.ALL = list(rules.OWNED)
        self._texts: dict[bytes, str] = {}

    def read(self, table: str) -> Chains:
        with self._translated_errors():
            opened = self._opened(table)
            texts, self._texts = self._texts, {}
            return {
                chain.name: self._read_chain(opened, chain, texts if chain.name in rules.OWNED[table] else {})
                for chain in opened.chains
            }

    def write(self, table: str, change: TableChange) -> None:
        with self._translated_errors():
            opened = self._opened(table)
            for changed in change.chains:
                self._write_chain(opened, changed)
            for chain, text in change.dropped:
                self._chain(opened, chain).delete_rule(self._rule(text))
            for jump in change.jumps:
                hook = self._chain(opened, jump.hook)
                (hook.insert_rule if jump.on_top else hook.append_rule)(self._rule(jump.text))
            for chain in change.removed:
                self._chain(opened, chain).flush()
                self._chain(opened, chain).delete()
            opened.commit()

    @contextlib.contextmanager
    def _translated_errors(self) -> Iterator[None]:
        try:
            yield
        # Its own errors, and what its Python makes of surprises in the C libraries.
        except Exception as error:
            raise Refused(f"python-iptables: {type(error).__name__}: {error}") from error

    def _opened(self, table: str) -> typing.Any:
        """The table as it is in the kernel now; changes to it wait for commit()."""
        opened = self._table_class(table, False)
        opened.autocommit = False
        opened.refresh()
        return opened

    def _chain(self, opened: typing.Any, name: str) -> typing.Any:
        return self._iptc.Chain(opened, name)

    def _write_chain(self, opened: typing.Any, changed: ChainChange) -> None:
        if not changed.exists:
            opened.create_chain(changed.chain)
        chain = self._chain(opened, changed.chain)
        if changed.in_steps:
            # What others put in can have options that cannot be made here; then the whole chain is written.
            with contextlib.suppress(Exception):
                for text in changed.deletions:
                    chain.delete_rule(self._rule(text))
                for position, text in changed.insertions:
                    chain.insert_rule(self._rule(text), position)
                return
        chain.flush()
        for text in changed.content:
            chain.append_rule(self._rule(text))

    def _rule(self, text: str) -> typing.Any:
        """A rule made from its text; knows the options that our own rules have."""
        rule = self._rule_class()
        part: typing.Any = rule
        words = iter(shlex.split(text))
        for option in words:
            argument = next(words)
            if option == "-d":
                rule.dst = argument
            elif option == "-s":
                rule.src = argument
            elif option == "-p":
                rule.protocol = argument
            elif option == "-m":
                part = rule.create_match(argument)
            elif option == "-j":
                part = rule.create_target(argument)
            elif option.startswith("--"):
                part.set_parameter(option[2:], argument)
            else:
                raise ValueError(f"cannot make {option} of the rule: {text}")
        return rule

    def _read_chain(self, opened: typing.Any, chain: typing.Any, known: dict[bytes, str]) -> list[str]:
        """Texts of a chain's rules. Making one takes 0.6 ms, so those of rules seen before are kept.

        Only in our own chains: a rule that jumps is told from another by the place of the chain that it
        jumps to, which shifts with every commit.
        """
        found = []
        entry = opened.first_rule(chain.name)
        while entry:
            counters = type(entry).counters
            content = ctypes.string_at(ctypes.addressof(entry), entry.next_offset)
            key = content[: counters.offset] + content[counters.offset + counters.size :]
            text = known.get(key) or self._text(opened.create_rule(entry, chain))
            if chain.name in rules.OWNED[opened.name]:
                self._texts[key] = text
            found.append(text)
            entry = opened.next_rule(entry)
        return found

    def _text(self, rule: typing.Any) -> str:
        """What iptables-save writes for a rule such as ours, and something else for any other."""
        words = []
        for option, address in (("-s", rule.src), ("-d", rule.dst)):
            if (network := ipaddress.ip_network(address.lstrip("!"), strict=False)).prefixlen:
                words.append(f"{'! ' if address.startswith('!') else ''}{option} {network}")
        words += [
            f"{option} {name}" for option, name in (("-i", rule.in_interface), ("-o", rule.out_interface)) if name
        ]
        if rule.protocol != "ip":
            words.append(f"-p {rule.protocol}")
        for match in rule.matches:
            words += [f"-m {match.name}", *_options(match)]
        if rule.target is not None:
            words += [f"-j {rule.target.name}", *_options(rule.target)]
        return " ".join(words)


def _options(part: typing.Any) -> Iterator[str]:
    for option, values in part.get_all_parameters().items():
        value = " ".join(values)
        yield f'--{option} "{value}"' if option == "comment" else f"--{option} {value}"


class Tables:
    """The tables of one family: made equal to what they should hold, by the way that fits."""

    def __init__(self, family: IPFamily, *, use_library: bool) -> None:
        """Raises XtablesError if there is no way at all."""
        self._names = pathlib.Path(
            "/proc/self/net/ip6_tables_names" if family is IPFamily.IPV6 else "/proc/thread-self/net/ip_tables_names"
        )
        self._missing: list[str] = []
        self._programs: Programs | None = None
        self._library: Library | None = None
        try:
            self._programs = Programs(family)
        except XtablesError as error:
            self._missing.append(str(error))
        if use_library:
            try:
                self._library = Library(family)
            except XtablesError as error:
                self._missing.append(str(error))
        if not (self._programs or self._library):
            raise XtablesError("; ".join(self._missing))

    @property
    def ways(self) -> list[Way]:
        return [way for way in (self._programs, self._library) if way]

    def read(self, table: str) -> Chains:
        """All chains of a table; a table that nothing in this namespace has used yet stays so."""
        return self.ways[0].read(table) if self._is_loaded(table) else {}

    def _is_loaded(self, table: str) -> bool:
        try:
            return table in self._names.read_text().split()
        except FileNotFoundError:
            return False
        except PermissionError:
            return True

    def probe(self, scope: Scope) -> list[str]:
        """Try each way with real rules, and drop the ways that do not work; raises XtablesError if none does.

        The answer is what a human should know about those that cannot be used.
        """
        for way in self.ways:
            try:
                self._try(way, rules.probe(scope))
            except XtablesError as error:
                self._missing.append(str(error))
                if way is self._programs:
                    self._programs = None
                else:
                    self._library = None
        if not self.ways:
            raise XtablesError("; ".join(self._missing))
        return [f"done without: {reason}" for reason in self._missing]

    def _try(self, way: Way, wanted: TableRules) -> None:
        owned = {rules.PROBE}
        with _locked() if way is self._library else contextlib.nullcontext():
            way.write("nat", compare(way.read("nat"), wanted, owned))
            found = way.read("nat")
            way.write("nat", compare(found, TableRules(), owned))
        # Had it written something else than it was told, every sync would write it again.
        for written, read in zip(wanted.chains[rules.PROBE], found.get(rules.PROBE, ()), strict=True):
            if written != read:
                raise XtablesError(f"{way.name}: wrote the rule `{written}`, and read it back as `{read}`")

    def make(self, table: str, wanted: Ruleset, left: TableRules, *, trusting: bool = False) -> int:
        """Make our part of a table as wanted; say by how much it differed from what we had `left` there.

        `trusting`: without reading what is there, as if nobody else had changed anything since.
        Raises Refused if a rule is not taken, and XtablesError if nothing works; the table is then as it was.
        """
        owned = rules.OWNED[table]
        if trusting and wanted[table] == left:
            return 0
        with _locked():
            if trusting:
                actual = rules.as_read(left)
            else:
                actual = self.ways[0].read(table) if wanted[table].chains else self.read(table)
            damage = count_damage(actual, left)
            change = compare(actual, wanted[table], owned)
            if not change:
                return damage
            if self._library and (change.size <= _FEW or not self._programs):
                try:
                    self._library.write(table, change)
                except Refused:
                    if not self._programs:
                        raise
                else:
                    return damage
        assert self._programs
        self._programs.write(table, change)
        return damage


# The lock


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """Hold the lock that all users of xtables share; raises XtablesError if it cannot be had in time."""
    descriptor = _open_lock_file()
    try:
        deadline = time.monotonic() + _LOCK_WAIT
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise XtablesError(
                        f"another program has held the xtables lock for {_LOCK_WAIT:g} s: see `fuser {_lock_path()}`"
                    ) from None
                time.sleep(0.01)
        yield
    finally:
        os.close(descriptor)


def _lock_path() -> str:
    return os.environ.get("XTABLES_LOCKFILE", "/run/xtables.lock")


def _open_lock_file() -> int:
    flags = os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC
    try:
        return os.open(_lock_path(), flags, 0o600)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT):
            raise XtablesError(f"xtables lock {_lock_path()}: {error.strerror}") from error
    # In a user namespace the file is root's. The programs must then be told of ours.
    with open("/proc/self/uid_map") as users:
        user = users.read().split()[1]  # of the host, as everybody is user 0 in a namespace of his own
    own = os.path.join(os.environ.get("XDG_RUNTIME_DIR", tempfile.gettempdir()), f"xtables-{user}.lock")
    try:
        descriptor = os.open(own, flags | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise XtablesError(f"neither {_lock_path()} nor {own} can be opened: set XTABLES_LOCKFILE: {error}") from error
    os.environ["XTABLES_LOCKFILE"] = own
    return descriptor
