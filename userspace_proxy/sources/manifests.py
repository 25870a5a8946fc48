"""Manifest files: found, read, and watched, so that a change to one is served a moment later.

Files are untrusted and people edit them in place, so nothing in one can stop the others: a file that cannot be parsed
keeps what it last held, and so does a path that has gone away altogether.

A change costs the reading of the files it touched; only what cannot be told from one name (a link, a directory) makes
all be looked at. How changes are noticed is in `sources.inotify`, how a file is read in `sources.reading`, and what the
objects of all files are together in `sources.store`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from userspace_proxy.exceptions import ConfigError
from userspace_proxy.files import open_regular
from userspace_proxy.model import Node, Snapshot
from userspace_proxy.sources.base import Event, Publish
from userspace_proxy.sources.documents import SyntaxProblem
from userspace_proxy.sources.inotify import Changes
from userspace_proxy.sources.reading import Known, read
from userspace_proxy.sources.store import Store

logger = logging.getLogger(__name__)

SUFFIXES = (".yaml", ".yml", ".json")
MAX_SIZE = 64 << 20
RETRY = 1.0
"""Seconds between two looks where the kernel does not tell of changes."""

_Stamp = tuple[int, int, int, int]
_Watched = tuple[tuple[str, int, int], ...]


class ManifestSource:
    """Serves the objects in `paths`: files, and directories of `*.yaml`, `*.yml` and `*.json`."""

    def __init__(self, paths: Sequence[Path], node: Node | None = None) -> None:
        """`node` is the one that this is: endpoints that name it are local."""
        self._paths = tuple(dict.fromkeys(Path(os.path.abspath(path)) for path in paths))
        self._store = Store(node)
        self._stamps: dict[str, _Stamp] = {}
        self._missing: tuple[str, ...] = ()
        self._known: dict[str, Known] = {}
        self._wake = asyncio.Event()
        self._reload = False
        self._touched: set[str] = set()
        self._everywhere = True
        """Not only what was touched can have changed: all is to be looked at."""
        self._is_indirect = False
        self._warned: frozenset[str] = frozenset()
        self.problems: tuple[str, ...] = ()
        """What is refused at present, one line each."""
        self.told = None
        """The files are there to be read."""

    async def run(self, publish: Publish) -> None:
        """Publish what the manifests hold, and again whenever that changes. Raises ConfigError for a missing path."""
        self._require_paths()
        published: Snapshot | None = None
        watched: _Watched | None = None
        with contextlib.ExitStack() as watches:
            while True:
                self._wake.clear()
                if self._everywhere:
                    now, self._is_indirect = await asyncio.to_thread(self._directories)
                    if now != watched:
                        watches.close()
                        watched = now if self._watch(now, watches) else None
                touched, self._touched = self._touched, set()
                everywhere, self._everywhere = self._everywhere, False
                again, self._reload = self._reload, False
                snapshot = await asyncio.to_thread(self._read, touched, everywhere=everywhere, again=again)
                self._tell_problems()
                if snapshot is not published or again:
                    published = snapshot
                    publish(snapshot)
                if everywhere and watched and (await asyncio.to_thread(self._directories))[0] != watched:
                    self._everywhere = True  # something may have changed while nobody was looking
                else:
                    await self._wake.wait()

    def tell(self, event: Event) -> None:
        """There is nobody to tell; the log has it."""

    def reload(self) -> None:
        self._reload = True
        self._look_everywhere()

    def _look_everywhere(self) -> None:
        self._everywhere = True
        self._wake.set()

    def _require_paths(self) -> None:
        problems = []
        for path in self._paths:
            try:
                mode = path.stat().st_mode
            except OSError as error:
                problems.append(
                    f"--manifests={path}: {error.strerror}; allowed: a file or a directory that can be read"
                )
            else:
                if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
                    problems.append(f"--manifests={path}: neither; allowed: a regular file or a directory")
        if problems:
            raise ConfigError(problems)

    def _tell_problems(self) -> None:
        problems = (*self._missing, *self._store.problems)
        if problems == self.problems:
            return
        self.problems = problems
        for problem in self.problems:
            if problem not in self._warned:
                logger.warning("%s", problem)
        self._warned = frozenset(self.problems)

    def _watch(self, watched: _Watched, watches: contextlib.ExitStack) -> bool:
        """Let every change wake the reading, until `watches` are closed. False: the kernel will not tell of any."""
        loop = asyncio.get_running_loop()
        try:
            changes = Changes(path for path, _, _ in watched)
        except OSError as error:  # there is a limit for each user
            logger.warning("cannot watch the manifests: %s; looking again in a second", error)
            watches.callback(loop.call_later(RETRY, self._look_everywhere).cancel)
            return False
        watches.callback(changes.close)
        loop.add_reader(changes.fileno(), self._notice, changes)
        watches.callback(loop.remove_reader, changes.fileno())
        return True

    def _notice(self, changes: Changes) -> None:
        for change in changes.read():
            self._touched.add(change.path)
            if change.is_plain and self._is_manifest(change.path):
                self._wake.set()
            elif not change.is_plain or self._is_indirect:
                self._look_everywhere()

    def _is_manifest(self, file: str) -> bool:
        directory, name = os.path.split(file)
        return Path(file) in self._paths or (Path(directory) in self._paths and _counts(name))

    def _directories(self) -> tuple[_Watched, bool]:
        """The directories in which a change can matter, with what tells them from others of the same name.

        And whether manifests are reached through links, or missing: then they can change without being touched.

        The one that holds a path, for renames and for its return; the path's own; and those that hold what symbolic
        links lead to. Of what does not exist, the nearest that does.
        """
        wanted: set[str] = set()
        is_indirect = False
        for path in self._paths:
            wanted.update((os.path.dirname(path), os.path.dirname(os.path.realpath(path))))
            is_indirect |= os.path.realpath(path) != str(path) or not os.path.exists(path)
            if os.path.isdir(path):
                wanted.add(str(path))
                with suppress(OSError):
                    links = [file for name in _listing(path) if os.path.islink(file := path / name)]
                    wanted.update(os.path.dirname(os.path.realpath(link)) for link in links)
                    is_indirect |= bool(links)
        found = set()
        for directory in wanted:
            existing = directory
            while not os.path.isdir(existing):
                existing = os.path.dirname(existing)
            with suppress(OSError):
                status = os.stat(existing)
                found.add((existing, status.st_dev, status.st_ino))
        return tuple(sorted(found)), is_indirect

    def _read(self, touched: set[str], *, everywhere: bool, again: bool) -> Snapshot:
        """Read the files that changed, or everything `again`; runs in a thread, never twice at a time."""
        # A path of ours that has gone away is not an empty directory: what it held stays.
        if everywhere or any(Path(file) in self._paths and not os.path.lexists(file) for file in touched):
            self._look(touched, again=again)
        else:
            for file in filter(self._is_manifest, sorted(touched)):
                self._read_file(file, changed=True)
        return self._store.snapshot()

    def _look(self, touched: set[str], *, again: bool) -> None:
        """Look at every file, and read those that were touched or look different."""
        present: set[str] = set()
        missing = []
        for path in self._paths:
            try:
                names = [path / name for name in _listing(path)] if os.path.isdir(path) else [path]
                path.stat()
            except OSError as error:
                missing.append(f"{path}: {error.strerror}; what was read from it is served until it is back")
                present.update(file for file in self._store.files if _is_of(file, path))
                continue
            for name in names:
                file = str(name)
                if file not in present:
                    present.add(file)
                    changed = again or file in touched or (self._is_indirect and os.path.realpath(file) in touched)
                    self._read_file(file, changed=changed)
        self._missing = tuple(missing)
        for file in self._store.files - present:
            self._forget(file)

    def _forget(self, file: str) -> None:
        self._stamps.pop(file, None)
        self._known.pop(file, None)
        if file in self._store.files:
            self._store.forget(file)

    def _read_file(self, file: str, *, changed: bool) -> None:
        try:
            text, stamp = _slurp(file, None if changed else self._stamps.get(file))
            if text is None:
                return
            self._stamps[file] = stamp
            found, self._known[file] = read(file, text, self._known.get(file, {}))
            self._store.replace(file, found)
        except FileNotFoundError:  # gone since it was listed, or a link that leads nowhere
            self._forget(file)
        except (OSError, SyntaxProblem) as error:
            if isinstance(error, OSError):
                self._stamps.pop(file, None)
            reason = error.strerror if isinstance(error, OSError) else error
            self._store.refuse(file, f"{file}: {reason}; what was read from it before is served")


def _listing(directory: Path) -> list[str]:
    """The manifests in a directory. Editors keep their own files beside them, hidden or with other endings."""
    with os.scandir(directory) as entries:
        return sorted(entry.name for entry in entries if _counts(entry.name) and not _is_directory(entry))


def _is_directory(entry: os.DirEntry[str]) -> bool:
    """Also at the end of a link; a system call for links alone."""
    return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry))


def _counts(name: str) -> bool:
    return name.endswith(SUFFIXES) and not name.startswith((".", "#"))


def _is_of(file: str, path: Path) -> bool:
    return file == str(path) or os.path.dirname(file) == str(path)


def _slurp(file: str, known: _Stamp | None) -> tuple[bytes | None, _Stamp]:
    """The file's bytes, or None where it is the one that is known."""
    with open_regular(file) as opened:
        status = os.fstat(opened.fileno())
        stamp = status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        if stamp == known:
            return None, stamp
        text = opened.read(MAX_SIZE + 1)
    if len(text) > MAX_SIZE:
        raise SyntaxProblem(f"found more than {MAX_SIZE >> 20} MiB; allowed: less; split it into several files")
    return text, stamp
