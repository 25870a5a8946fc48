"""The last state on disk, so that a proxy that starts while the API server is away serves what the one before it did.

One file: a header line that tells version, API server, node and the digest of the rest, then a line for each service
port. It is written beside its final name, synced and renamed, so that there is always a whole one, old or new. Each
save has a file of its own until then, because there may be several proxies to a directory; the last one counts. What
is not exactly as it was written is told and passed over; the next state replaces it.

When to write and when to read is decided in `sources.kubernetes`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

import msgspec

from userspace_proxy.model import Endpoint, Node, ServicePort, ServicePortName, Snapshot
from userspace_proxy.sources.shapes import learn

logger = logging.getLogger(__name__)

VERSION = 1
FILE = "snapshot.jsonl"
UNFINISHED = f".{FILE}."
"""What names start with until they are final."""
FORSAKEN = 600.0
"""Seconds after which what is not final is thought to be left by a proxy that is dead. One that lives tries again."""


class _Header(msgspec.Struct):
    version: int
    server: str
    node: Node | None
    digest: str


class _Line(msgspec.Struct, omit_defaults=True):
    name: ServicePortName
    service: ServicePort | None = None
    endpoints: tuple[Endpoint, ...] | None = None
    """None: none are known, which is not the same as knowing that there are none."""


learn(_Header, _Line)


class SavedState:
    """The file in `directory` for one API server, named by where it was configured to be."""

    def __init__(self, directory: Path, server: str) -> None:
        self.file = directory / FILE
        self._server = server
        self._turn = threading.Lock()

    def save(self, snapshot: Snapshot) -> None:
        """Raises OSError. May run on another thread: a Snapshot does not change, and no step of it takes long.

        A thread that nobody waits for any more may still be at it when the end saves what came since.
        """
        with self._turn:
            self._write(snapshot)

    def _write(self, snapshot: Snapshot) -> None:
        names = [*snapshot.services, *(name for name in snapshot.endpoints if name not in snapshot.services)]
        lines = [
            msgspec.json.encode(_Line(name, snapshot.services.get(name), snapshot.endpoints.get(name)))
            for name in names
        ]
        body = b"\n".join(lines)
        header = _Header(VERSION, self._server, snapshot.node, hashlib.sha256(body).hexdigest())
        self.file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, new = tempfile.mkstemp(dir=self.file.parent, prefix=UNFINISHED)
        try:
            with open(descriptor, "wb") as opened:
                self._remove_forsaken(os.fstat(descriptor).st_mtime)
                opened.write(msgspec.json.encode(header) + b"\n" + body)
                opened.flush()
                os.fsync(descriptor)
            os.rename(new, self.file)
        except BaseException:
            with suppress(OSError):
                os.unlink(new)
            raise
        directory = os.open(self.file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _remove_forsaken(self, now: float) -> None:
        """`now` by the file system's own clock."""
        for left in self.file.parent.glob(f"{UNFINISHED}*"):
            with suppress(OSError):
                if now - left.stat().st_mtime > FORSAKEN:
                    left.unlink()

    def load(self) -> Snapshot | None:
        """None: there is no state, or none that can be trusted."""
        try:
            head, _, body = self.file.read_bytes().partition(b"\n")
        except FileNotFoundError:
            return None
        except OSError as error:
            logger.warning("%s: %s; it is not used", self.file, error.strerror)
            return None
        try:
            # The version is looked at first: others may mean anything.
            version = msgspec.json.decode(head, type=dict[str, object]).get("version")
            if version != VERSION:
                raise ValueError(f"found version {version!r}; allowed: {VERSION}")
            header = msgspec.json.decode(head, type=_Header)
            if header.server != self._server:
                raise ValueError(f"found the state of {header.server}; allowed: of {self._server}")
            if hashlib.sha256(body).hexdigest() != header.digest:
                raise ValueError("found something else than was written")
            lines = [msgspec.json.decode(line, type=_Line) for line in body.split(b"\n") if line]
        except (ValueError, msgspec.MsgspecError, RecursionError) as error:
            logger.warning("%s: %s; it is not used, and the next state replaces it", self.file, error)
            return None
        return Snapshot(
            {line.name: line.service for line in lines if line.service is not None},
            {line.name: line.endpoints for line in lines if line.endpoints is not None},
            header.node,
        )
