"""The sockets of one proxy port, one for each worker: made, listening and silenced here, in the control process.

Worker `i` is given the `i`-th and takes clients from it; this side keeps all of them. So clients that wait in the
queue of a worker that died find its successor instead of a reset, and the sockets' order, which is what steering counts
on, never changes while there are clients: whether a socket listens is a property of the socket that all processes
share, so it is changed here alone, at once, and whatever state a worker is in.

The first socket of a port is bound on its own, to be sure that nobody else has the port, the others beside it.
"""

from __future__ import annotations

import contextlib
import socket
import typing
from collections.abc import Iterator, Sequence

from userspace_proxy.exceptions import PortError
from userspace_proxy.model import IPFamily, Protocol
from userspace_proxy.sockets import listening, udp
from userspace_proxy.sockets.base import bind, claim, hear_nobody
from userspace_proxy.sockets.screen import screen
from userspace_proxy.workers.steering import steer, unsteer


class Group(typing.Protocol):
    """Refusing at first. `steered`: all connections of a client address go to one worker. Its datagrams always do."""

    @property
    def sockets(self) -> Sequence[socket.socket]:
        """In the order of the workers, while it serves."""

    def serve(self, *, steered: bool) -> None:
        """Take clients, from here on and all workers' at once. Raises PortError."""

    def waiting(self) -> Iterator[tuple[int, socket.socket]]:
        """Clients that nobody has taken yet, and in which worker's share they are: `refuse` would reset them."""

    def refuse(self) -> None:
        """Have the kernel refuse clients, in whatever hands the sockets are, and keep the port. Raises PortError."""

    def steer(self, steered: bool) -> None:
        """Change, while serving, how connections are spread."""

    def screen(self, networks: Sequence[str] | None) -> None:
        """Hear only clients from these networks, now and whenever it serves. Raises PortError."""

    def close(self) -> None:
        """Give the port up, as far as it is ours: workers close what they were given."""


class TCPGroup:
    """Listeners, which join the group by listen() and leave it by shutdown()."""

    def __init__(self, family: IPFamily, ip: str, port: int, count: int) -> None:
        self._family = family
        self._port = port
        self._networks: Sequence[str] | None = None
        self.sockets: list[socket.socket] = [bind(family, socket.SOCK_STREAM, ip, port, prepare=listening.prepare)]
        try:
            self.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            for _ in range(1, count):
                self.sockets.append(
                    bind(family, socket.SOCK_STREAM, ip, port, beside_ours=True, prepare=listening.prepare)
                )
        except BaseException:
            self.close()
            raise

    def serve(self, *, steered: bool) -> None:
        first = self.sockets[0]
        try:
            for sock in self.sockets if steered else ():
                screen(sock, self._family, ())  # deaf, until the group is complete
            for sock in self.sockets:
                listening.listen(sock)
                if sock is first and steered:  # not before: a socket that has a program but no group cannot listen
                    steer(first, self._family, len(self.sockets))
            for sock in self.sockets if steered else ():
                screen(sock, self._family, self._networks)
        except (OSError, PortError) as error:
            self.refuse()
            raise PortError(f"cannot listen on proxy port {self._port}: {error}") from error

    def screen(self, networks: Sequence[str] | None) -> None:
        self._networks = networks
        for sock in self.sockets:
            screen(sock, self._family, networks)

    def waiting(self) -> Iterator[tuple[int, socket.socket]]:
        for index, listener in enumerate(self.sockets):
            for _ in range(listening.BACKLOG):
                try:
                    client, _peer = listener.accept()
                except OSError:  # none is left; or there is no descriptor for it, or it does not listen
                    break
                yield index, client

    def refuse(self) -> None:
        for sock in self.sockets:
            with contextlib.suppress(OSError):  # it did not listen
                listening.stop_listening(sock)

    def steer(self, steered: bool) -> None:
        if steered:
            steer(self.sockets[0], self._family, len(self.sockets))
        else:
            unsteer(self.sockets[0])

    def close(self) -> None:
        for sock in self.sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


class UDPGroup:
    """Sockets made anew for each time of serving, and a claim in their place while refusing.

    Always steered: a connection is one worker's from its start, but each datagram is placed anew, so that flows would
    lose their worker, and with it their endpoint, whenever another way to spread them began.
    """

    def __init__(self, family: IPFamily, ip: str, port: int, count: int) -> None:
        self.sockets: list[socket.socket] = []
        self._family = family
        self._ip = ip
        self._port = port
        self._count = count
        self._networks: Sequence[str] | None = None
        self._claim: socket.socket | None = claim(family, socket.SOCK_DGRAM, ip, port)
        self._claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)

    def serve(self, *, steered: bool) -> None:
        made: list[socket.socket] = []
        try:
            for _ in range(self._count):
                made.append(self._bind_deaf())
                # Leaving later, the claim, which may be a member, would put the last one in the first place.
                self._give_up_claim()
            steer(made[0], self._family, self._count)
            for sock in made:
                screen(sock, self._family, self._networks)
        except (OSError, PortError) as error:
            self.sockets = made
            self.refuse()
            raise PortError(f"cannot serve on proxy port {self._port}: {error}") from error
        self.sockets = made

    def screen(self, networks: Sequence[str] | None) -> None:
        self._networks = networks
        for sock in self.sockets:
            screen(sock, self._family, networks)

    def _bind_deaf(self) -> socket.socket:
        def prepare(sock: socket.socket) -> None:
            udp.prepare(sock)
            screen(sock, self._family, ())

        return bind(self._family, socket.SOCK_DGRAM, self._ip, self._port, beside_ours=True, prepare=prepare)

    def waiting(self) -> Iterator[tuple[int, socket.socket]]:
        """Datagrams that nobody has read are lost, as everywhere."""
        return iter(())

    def _give_up_claim(self) -> None:
        if self._claim is not None:
            self._claim.close()
            self._claim = None

    def refuse(self) -> None:
        if self._claim is None:
            self._claim = claim(self._family, socket.SOCK_DGRAM, self._ip, self._port, beside_ours=True)
        self._retire()

    def _retire(self) -> None:
        """Take our sockets out of use though workers hold them still, for as long as they please.

        With another interface each is hashed anew and loses its place in the group, which it would else keep, and leave
        at a time when its successors are counted.
        """
        for sock in self.sockets:
            hear_nobody(sock)
            sock.close()
        self.sockets = []

    def steer(self, steered: bool) -> None:
        """They are already, and remain so."""

    def close(self) -> None:
        self._retire()
        self._give_up_claim()


GROUPS: dict[Protocol, type[TCPGroup | UDPGroup]] = {Protocol.TCP: TCPGroup, Protocol.UDP: UDPGroup}
