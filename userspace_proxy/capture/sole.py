"""One proxy to a network namespace: two would take each other's traffic, each repairing what the other does.

Who captures holds a name among abstract Unix sockets, which every network namespace has for itself and which go with
their process, whichever way it ends: a killed proxy leaves no stale lock behind. Listening there tells who it is.
"""

from __future__ import annotations

import logging
import os
import socket
import struct

from userspace_proxy.exceptions import CaptureError

logger = logging.getLogger(__name__)

_NAME = "\0userspace-proxy"
_CREDENTIALS = struct.Struct("3i")
"""struct ucred: process, user and group."""


def hold() -> socket.socket:
    """Be the one that captures here until the socket is closed. Raises CaptureError where another is."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.bind(_NAME)
        sock.listen()
    except OSError as error:
        other = holder()
        if other:
            sock.close()
            raise CaptureError(
                f"{other} captures in this network namespace, and two would take each other's traffic: end it first, "
                "or start this one with --capture=none or in a network namespace of its own"
            ) from error
        logger.warning("the name %s is taken by who has no right to keep a proxy from starting: %s", _NAME[1:], error)
    return sock


def holder() -> str:
    """Who captures here, or "". Any user may take the name, so it must be our own or root to be believed."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(0)
        try:
            sock.connect(_NAME)
            found = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        except OSError:
            return ""
    process, user, _ = _CREDENTIALS.unpack(found)
    if user not in (0, os.geteuid()):
        return ""
    # One in a PID namespace that we cannot look into has no number here.
    return f"another userspace-proxy (pid {process})" if process else "another userspace-proxy"
