"""TCP listeners: what they are told before they are bound, and how they begin and end to listen.

Options are set on the listener, whose accepted sockets inherit them: no delay, keep-alive, and the linger that makes a
reset of every end that is not in order. One process may have the listeners and others take their clients: who does is
told in `tcp` and in `workers.groups`.
"""

from __future__ import annotations

import socket
from socket import SocketType

from userspace_proxy.sockets.base import ABORT_ON_CLOSE
from userspace_proxy.sockets.dial import set_keepalive

BACKLOG = 65535
"""Clients that may wait to be taken; the kernel cuts it to net.core.somaxconn."""


def prepare(listener: SocketType) -> None:
    """Set what connections inherit."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT_ON_CLOSE)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    set_keepalive(listener)


def listen(listener: SocketType) -> None:
    # Inherited by connections, whose TIME_WAIT then does not keep a successor from binding this port.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.listen(BACKLOG)


def stop_listening(listener: SocketType) -> None:
    """Have clients refused; those that wait to be taken are reset."""
    listener.shutdown(socket.SHUT_RDWR)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
