"""Files that somebody else names are opened here: the config file, manifests, a kubeconfig.

Who names a FIFO would have us wait for whoever writes to it, for ever, and in a thread that nothing can end; a device
may have no end. So only regular files are opened. What is in them is read, and judged, by those who ask for them.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file, or one at the end of a link, for reading. Raises OSError, of anything else as well."""
    opened = open(path, "rb", opener=_without_waiting)  # noqa: SIM115 - the caller's
    if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
        opened.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return opened


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)
