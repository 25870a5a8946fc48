"""Manifest files: found, read, and watched, so that a change to one is served a moment later.

Files are untrusted and people edit them in place, so nothing in one can stop the others: a file that cannot be parsed
keeps what it last held, and so does a path that has gone away altogether.

How text becomes values is in `sources.documents`, what the objects mean in `sources.objects`, and what they are
together in `sources.store`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import watchfiles

from userspace_proxy.exceptions import ConfigError, ObjectError
from userspace_proxy.model import Snapshot
from userspace_proxy.sources.base import Publish
from userspace_proxy.sources.documents import SyntaxProblem, read_json, read_yaml
from userspace_proxy.sources.objects import decode, identify, is_other_kind, unpack
from userspace_proxy.sources.store import Object, Refused, Store

logger = logging.getLogger(__name__)

SUFFIXES = (".yaml", ".yml", ".json")
MAX_SIZE = 64 << 20
STEP = 10
"""Milliseconds without a change after which files are taken as written."""
DEBOUNCE = 100
"""Milliseconds after which they are read even if changes go on."""

_Stamp = tuple[int, int, int, int]
_Watched = tuple[tuple[str, int, int], ...]


class ManifestSource:
    """Serves the objects in `paths`: files, and directories of `*.yaml`, `*.yml` and `*.json`."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = tuple(dict.fromkeys(Path(os.path.abspath(path)) for path in paths))
        self._store = Store()
        self._stamps: dict[str, _Stamp] = {}
        self._missing: tuple[str, ...] = ()
        self._wake = asyncio.Event()
        self._reload = False
        self._touched: set[str] = set()
        self._warned: frozenset[str] = frozenset()
        self.problems: tuple[str, ...] = ()
        """What is refused at present, one line each."""

    async def run(self, publish: Publish) -> None:
        """Publish what the manifests hold, and again whenever that changes. Raises ConfigError for a missing path."""
        self._require_paths()
        published: Snapshot | None = None
        async with asyncio.TaskGroup() as tasks:
            watched = await asyncio.to_thread(self._directories)
            watch = tasks.create_task(self._watch(watched), name="watch")
            await asyncio.sleep(0)  # the watch is in place before the first reading: no change falls between them
            while True:
                self._wake.clear()
                touched, self._touched = self._touched, set()
                again, self._reload = self._reload, False
                snapshot = await asyncio.to_thread(self._read, touched, again)
                self._tell_problems()
                if snapshot is not published or again:
                    published = snapshot
                    publish(snapshot)
                now = await asyncio.to_thread(self._directories)
                if now != watched or watch.done():
                    watched = now
                    watch.cancel()
                    await asyncio.wait([watch])
                    watch = tasks.create_task(self._watch(watched), name="watch")
                    await asyncio.sleep(0)
                    continue  # something may have changed while nobody was looking
                await self._wake.wait()

    def reload(self) -> None:
        self._reload = True
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
        self.problems = (*self._missing, *self._store.problems)
        for problem in self.problems:
            if problem not in self._warned:
                logger.warning("%s", problem)
        self._warned = frozenset(self.problems)

    async def _watch(self, watched: _Watched) -> None:
        """Wake the reading at every change. Ends when the kernel will not tell of any."""
        changes = watchfiles.awatch(
            *(path for path, _, _ in watched),
            watch_filter=None,
            recursive=False,
            debounce=DEBOUNCE,
            step=STEP,
            ignore_permission_denied=True,
        )
        try:
            async for found in changes:
                self._touched.update(path for _, path in found)
                self._wake.set()
        except (
            OSError,
            RuntimeError,
        ) as error:  # a directory has gone since it was looked up, or inotify has no watch left
            logger.warning("cannot watch the manifests: %s; looking again in a second", error)
            await asyncio.sleep(1)
        self._wake.set()

    def _directories(self) -> _Watched:
        """The directories in which a change can matter, with what tells them from others of the same name.

        The one that holds a path, for renames and for its return; the path's own; and those that hold what symbolic
        links lead to. Of what does not exist, the nearest that does.
        """
        wanted: set[str] = set()
        for path in self._paths:
            wanted.update((os.path.dirname(path), os.path.dirname(os.path.realpath(path))))
            if os.path.isdir(path):
                wanted.add(str(path))
                with suppress(OSError):
                    links = [file for name in _listing(path) if os.path.islink(file := path / name)]
                    wanted.update(os.path.dirname(os.path.realpath(link)) for link in links)
        found = set()
        for directory in wanted:
            existing = directory
            while not os.path.isdir(existing):
                existing = os.path.dirname(existing)
            with suppress(OSError):
                status = os.stat(existing)
                found.add((existing, status.st_dev, status.st_ino))
        return tuple(sorted(found))

    def _read(self, touched: set[str], everything: bool) -> Snapshot:
        """Read the files that changed; runs in a thread, never twice at a time."""
        present: set[str] = set()
        missing = []
        for path in self._paths:
            try:
                names = [path / name for name in _listing(path)] if os.path.isdir(path) else [path]
                path.stat()
            except OSError as error:
                missing.append(
                    f"{_printable(path)}: {error.strerror}; what was read from it is served until it is back"
                )
                present.update(file for file in self._store.files if _is_of(file, path))
                continue
            for name in names:
                file = str(name)
                if file not in present:
                    present.add(file)
                    self._read_file(file, everything or file in touched or os.path.realpath(file) in touched)
        self._missing = tuple(missing)
        for file in self._store.files - present:
            self._store.forget(file)
            self._stamps.pop(file, None)
        return self._store.snapshot()

    def _read_file(self, file: str, changed: bool) -> None:
        try:
            text, stamp = _slurp(file, None if changed else self._stamps.get(file))
            if text is None:
                return
            self._stamps[file] = stamp
            self._store.replace(file, list(_objects(file, text)))
        except FileNotFoundError:  # gone since it was listed, or a link that leads nowhere
            self._stamps.pop(file, None)
            if file in self._store.files:
                self._store.forget(file)
        except (OSError, SyntaxProblem) as error:
            if isinstance(error, OSError):
                self._stamps.pop(file, None)
            reason = error.strerror if isinstance(error, OSError) else error
            self._store.refuse(file, f"{_printable(file)}: {reason}; what was read from it before is served")


def _listing(directory: Path) -> list[str]:
    """The manifests in a directory. Editors keep their own files beside them, hidden or with other endings."""
    return sorted(
        name
        for name in os.listdir(directory)
        if name.endswith(SUFFIXES) and not name.startswith((".", "#")) and not os.path.isdir(directory / name)
    )


def _is_of(file: str, path: Path) -> bool:
    return file == str(path) or os.path.dirname(file) == str(path)


def _slurp(file: str, known: _Stamp | None) -> tuple[bytes | None, _Stamp]:
    """The file's bytes, or None where it is the one that is known. Not to wait in the opening of a FIFO."""
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as opened:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise SyntaxProblem("found no regular file; allowed: a regular file or a link to one")
        stamp = status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        if stamp == known:
            return None, stamp
        text = opened.read(MAX_SIZE + 1)
    if len(text) > MAX_SIZE:
        raise SyntaxProblem(f"found more than {MAX_SIZE >> 20} MiB; allowed: less; split it into several files")
    return text, stamp


def _objects(file: str, text: bytes) -> Iterator[Object | Refused]:
    """Everything a proxy can use in a file, and what it cannot and why. Raises SyntaxProblem."""
    documents = read_json(text) if file.endswith(".json") else read_yaml(text)
    for number, document in enumerate(documents, 1):
        if document.value is None and not document.problems:
            continue  # nothing but comments between two `---`
        where = _printable(file)
        if len(documents) > 1:
            where += f" (document {number}, line {document.line})"
        for item in unpack(document.value):
            problems = document.problems_of(item)
            identity = identify(item)
            try:
                if problems and not is_other_kind(item):
                    raise ObjectError(where, str(identity or "object"), problems)
                found = decode(item, where, allow_loopback=True)
            except ObjectError as error:
                yield Refused(identity, str(error))
            else:
                if found is not None:
                    yield found


def _printable(path: str | Path) -> str:
    text = str(path)
    return text if text.isprintable() else ascii(text)
