"""The contract of a proxy socket, and what all kinds of it share.

A proxy socket serves one service port in one family on one proxy port. It knows its balancer, its
endpoints through it, and the destinations it may be reached by; how traffic gets to it is `capture`'s
business, when it opens and closes `proxier`'s.

A socket is always in one of three states. *Serving*: clients are taken. *Refusing*: there is no
endpoint; the port stays claimed but new clients are refused by the kernel (TCP reset, ICMP port
unreachable), not accepted and dropped. *Closed*. Connections that are established live on in all three.
"""

from __future__ import annotations

import typing
from collections.abc import Collection

from userspace_proxy.model import Portal, SocketKey


class ProxySocket(typing.Protocol):
    key: SocketKey
    port: int
    """The proxy port. It does not change while the socket is open."""

    def serve(self) -> None:
        """Take clients. Raises PortError; does nothing if it serves already."""

    def refuse(self) -> None:
        """Take no more clients, keep the port. UDP flows end, TCP connections go on."""

    def admit(self, portals: Collection[Portal] | None) -> None:
        """Only clients that were sent here through these portals are served; None: whoever connects."""

    def close(self) -> None:
        """Release the port. TCP connections go on; who waits for them is the registry they are in."""
