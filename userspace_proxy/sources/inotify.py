"""What changes in directories, told by the kernel the moment it is complete.

A file that is written counts when its writer closes it, not before: nobody reads half of one, and nobody has to wait
for a pause in the writing. (watchfiles, the usual choice, tells of every write and looks a hundred times a second.)
Directories are watched, not files, because most programs save by renaming another file over the old one. What a
change means is `manifests`' to say.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

from inotify_simple import INotify, flags

_EVENTS = (
    *(flags.CLOSE_WRITE, flags.MOVED_FROM, flags.MOVED_TO, flags.CREATE, flags.DELETE),
    *(flags.ATTRIB, flags.DELETE_SELF, flags.MOVE_SELF, flags.ONLYDIR),
)


class Change(NamedTuple):
    path: str
    """Empty where it is not told what changed: too much at once, or a watched directory has gone."""
    is_plain: bool
    """Whether it is, or was, a file, and neither a link nor a directory."""


class Changes:
    """The changes in some directories since it was made. Those that may not be read, or are not there, tell nothing."""

    def __init__(self, directories: Iterable[str]) -> None:
        """Raises OSError if the kernel will not watch: it has a limit for each user."""
        self._inotify = INotify(nonblocking=True)
        self._watched: dict[int, list[str]] = {}
        try:
            for directory in directories:
                with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
                    number = self._inotify.add_watch(directory, sum(_EVENTS))
                    self._watched.setdefault(number, []).append(directory)
        except OSError:
            self.close()
            raise

    def fileno(self) -> int:
        return int(self._inotify.fileno())

    def close(self) -> None:
        self._inotify.close()

    def read(self) -> list[Change]:
        """What has changed since the last reading, in order."""
        found = []
        for number, mask, _, name in self._inotify.read(timeout=0):
            directories = self._watched.get(number, ()) if name else ()
            paths = [os.path.join(directory, name) for directory in directories] or [""]
            if not (mask & flags.CREATE and _is_being_written(paths[0])):
                is_plain = not mask & flags.ISDIR and not os.path.islink(paths[0])
                found += [Change(path, is_plain and bool(path)) for path in paths]
        return found


def _is_being_written(path: str) -> bool:
    """Of a file that was made by opening it the end is still to come; not of a link to one that was there before."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1
