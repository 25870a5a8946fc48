"""SCTP proxy sockets, and relaying messages with what belongs to them.

Clients are taken, dialled for and accounted as TCP's are (`tcp`, `dial`), and a pair's two directions follow `relay`.
Here is what differs: a message is passed on whole, on the stream it came on, ordered or not, with its PPID as it was;
one that the other side cannot be given ends the pair by an ABORT. What waits is one message a direction at most.

There is no half-close in SCTP: who sends SHUTDOWN is sent nothing any more. So a SHUTDOWN is passed on when all
messages before it are through, and what the other side still says after that is lost, of which an ABORT tells it.

Set-up, addresses and events are pysctp's. Messages are not: it turns PPIDs around, refuses half of them, and leaks
a few bytes a receive; sendmsg and recvmsg with control messages do none of that.
"""

from __future__ import annotations

import errno
import socket
import struct
from functools import partial
from socket import SocketType

import sctp

from userspace_proxy import host
from userspace_proxy.exceptions import ProtocolUnavailable
from userspace_proxy.loadbalancer import LoadBalancer
from userspace_proxy.metrics import Metrics, Outcome, ServicePortMetrics
from userspace_proxy.model import IPFamily, Protocol, ProxyProtocol, SocketKey
from userspace_proxy.poller import Poller
from userspace_proxy.sockets.base import ABORT_ON_CLOSE, AF, CLOSE_IN_ORDER, Descriptors, bind
from userspace_proxy.sockets.dial import Dialer
from userspace_proxy.sockets.listening import BACKLOG
from userspace_proxy.sockets.relay import READABLE, TURN, Direction, Relay
from userspace_proxy.sockets.tcp import TCPSocket, TCPSockets

MAX_MESSAGE = 1 << 20
"""Bytes. A longer one ends its association, since it would have to be kept whole."""
WINDOW = MAX_MESSAGE
"""Bytes that may be on their way to us. Where a message does not fit, the kernel discards parts of it, which are sent
again a second later (measured); so this is more than net.core.rmem_max where that is allowed."""
STREAMS = 1024
"""Streams toward a client at most, be its own limit what it may: they cost the kernel some 40 bytes each."""
HEARTBEAT = 15_000
"""Milliseconds of silence on a path before it is probed."""
RTO_INITIAL = 1_000
RTO_MAX = 10_000
"""Milliseconds. The kernel's own minute makes a lost peer a matter of a quarter of an hour."""
PATH_RETRIES = 3
RETRIES = 8
"""Retransmissions until a path, or all of the association, is given up: with RTO_MAX about a minute."""

_SCTP = socket.IPPROTO_SCTP
_NODELAY = 3
_RECVRCVINFO = 32
_SNDINFO = 2
_SO_SNDBUFFORCE = 32
_SO_RCVBUFFORCE = 33
_NOTIFICATION = 0x8000
_EOR = int(socket.MSG_EOR)
_DONTWAIT = int(socket.MSG_DONTWAIT)
_ASSOC_CHANGE = 0x8001
_RESTART = 2
_SHUTDOWN_COMP = 3
_ANCILLARY = socket.CMSG_SPACE(28)
_NO_CONTEXT = bytes(8)
_FINISHED = frozenset((errno.EPIPE, errno.ESHUTDOWN))

_buffer = bytearray(256 * 1024)
_view = memoryview(_buffer)
_buffers = (_buffer,)

_Control = list[tuple[int, int, bytes]]


class Messages(Direction):
    """Messages from one socket to the other."""

    __slots__ = ("begun", "control", "counted_messages", "lost", "messages")

    reverse: Messages

    def __init__(self, relay: Relay, source: SocketType, sink: SocketType) -> None:
        super().__init__(relay, source, sink)
        self.begun: bytearray | None = None
        """The beginning of a message that the kernel hands over in pieces."""
        self.control: _Control = []
        """What belongs to the pending message."""
        self.lost = False
        """The sink had shut down when there was a message for it."""
        self.messages = 0
        self.counted_messages = 0

    def pump(self, events: int) -> None:
        """Move messages until the source has none or the sink takes no more."""
        for _ in TURN:
            try:
                size, ancillary, flags, _address = self.source.recvmsg_into(_buffers, _ANCILLARY, _DONTWAIT)
            except BlockingIOError:
                return
            except OSError as error:
                self.relay.broken(self.source, error.errno or errno.EIO)
                return
            if flags & _NOTIFICATION:
                if self.ends_by_notification():
                    return
            elif not size:
                self.eof = True
                self.finish()
                return
            elif flags & _EOR and self.begun is None:
                if not self.pass_on(_view[:size], _as_sent(ancillary)):
                    return
            elif not self.collect(size, ancillary, whole=bool(flags & _EOR)):
                return
        self.queue()

    def ends_by_notification(self) -> bool:
        """What the kernel has to say of the association, in the buffer; whether that is the end of it.

        Its own SHUTDOWN answered, a socket reads no end of file but this.
        """
        kind, _flags, _length, state = struct.unpack_from("=HHIH", _buffer)
        if kind != _ASSOC_CHANGE:
            return False
        if state == _SHUTDOWN_COMP:
            self.eof = True
            self.finish()
            return True
        if state == _RESTART:  # the peer has begun anew, and knows nothing of what was under way
            self.relay.broken(self.source, errno.ECONNRESET)
            return True
        return False

    def collect(self, size: int, ancillary: _Control, *, whole: bool) -> bool:
        """One more piece of a message that the kernel had no room for at once."""
        if self.begun is None:
            self.begun = bytearray()
        self.begun += _view[:size]
        if len(self.begun) > MAX_MESSAGE:
            self.undeliverable("message too long")
            return False
        if not whole:
            return True
        message, self.begun = memoryview(bytes(self.begun)), None
        return self.pass_on(message, _as_sent(ancillary))

    def pass_on(self, message: memoryview, control: _Control) -> bool:
        """Give the sink a message; false if nothing more may be read for now."""
        try:
            self.sink.sendmsg((message,), control, _DONTWAIT)
        except BlockingIOError:
            self.pending = memoryview(bytes(message))
            self.control = control
            self.blocked = True
            return False
        except OSError as error:
            number = error.errno or errno.EIO
            if number == errno.EMSGSIZE and _make_room(self.sink, len(message)):
                return self.pass_on(message, control)
            if number in _FINISHED:
                self.lose()
            elif number == errno.EINVAL:
                self.undeliverable("no such stream")
            elif number == errno.EMSGSIZE:
                self.undeliverable("message too long")
            else:
                self.relay.broken(self.sink, number)
            return False
        self.bytes += len(message)
        self.messages += 1
        return True

    def lose(self) -> None:
        """The sink has shut down. What it has said before comes first, then the source is told."""
        self.relay.metrics.drops["receiver has shut down"] += 1
        self.lost = True
        self.blocked = True
        if self.reverse.done:
            self.end_with_loss()

    def end_with_loss(self) -> None:
        """An ABORT to the source only: the sink has ended in order."""
        self.sink.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, CLOSE_IN_ORDER)
        to_client = self is self.relay.to_client
        self.relay.abort(Outcome.CLIENT_CLOSED if to_client else Outcome.ENDPOINT_CLOSED)

    def undeliverable(self, why: str) -> None:
        """Both are told by an ABORT."""
        self.relay.metrics.drops[why] += 1
        self.relay.abort(Outcome.UNDELIVERABLE)

    def resume(self) -> None:
        if self.lost:
            return
        self.blocked = False
        if self.pending is not None:
            message, self.pending = self.pending, None
            if not self.pass_on(message, self.control):
                return
        if not self.queued:
            self.pump(READABLE)

    def finish(self) -> None:
        reverse = self.reverse
        if not (reverse.eof or reverse.blocked):
            # Once the sink's kernel has answered a SHUTDOWN, nothing can tell it any more that a message was lost.
            reverse.pump(READABLE)
        if self.relay.ended:
            return
        if reverse.lost:
            reverse.end_with_loss()
        else:
            super().finish()

    def salvage(self) -> None:
        if self.done or self.blocked or self.begun is not None:
            return
        for _ in TURN:
            try:
                size, ancillary, flags, _address = self.source.recvmsg_into(_buffers, _ANCILLARY, _DONTWAIT)
                if not size or flags & _NOTIFICATION or not flags & _EOR:
                    return
                self.sink.sendmsg((_view[:size],), _as_sent(ancillary), _DONTWAIT)
            except OSError:
                return
            self.bytes += size
            self.messages += 1


class Association(Relay):
    """A client's association, and the one with its endpoint."""

    __slots__ = ()

    direction = Messages
    to_endpoint: Messages
    to_client: Messages

    def count(self) -> None:
        super().count()
        to_endpoint, to_client = self.to_endpoint, self.to_client
        self.metrics.received += to_endpoint.messages - to_endpoint.counted_messages
        self.metrics.replied += to_client.messages - to_client.counted_messages
        to_endpoint.counted_messages, to_client.counted_messages = to_endpoint.messages, to_client.messages


class SCTPSockets(TCPSockets):
    """All SCTP proxy sockets, and their associations."""

    protocol = Protocol.SCTP
    relay = Association

    def __init__(
        self, poller: Poller, descriptors: Descriptors, metrics: Metrics, *, half_close_timeout: float
    ) -> None:
        super().__init__(poller, descriptors, metrics, splice=False, half_close_timeout=half_close_timeout)

    def open(
        self, key: SocketKey, ip: str, port: int, balancer: LoadBalancer, metrics: ServicePortMetrics
    ) -> SCTPSocket:
        """Raises ProtocolUnavailable where the kernel has no SCTP."""
        if problem := host.sctp():
            raise ProtocolUnavailable(problem)
        listener = bind(key.family, socket.SOCK_STREAM, ip, port, protocol=_SCTP, prepare=prepare)
        return SCTPSocket(self, key, listener, balancer, metrics)

    def dialer(self, family: IPFamily, balancer: LoadBalancer, metrics: ServicePortMetrics) -> Dialer:
        make = partial(_outgoing, AF[family])
        return Dialer(make, balancer, self.poller, metrics, self._expect, self._connected, self._refuse)

    def _keep_alive(self) -> None:
        """SCTP's heartbeats are on from the start."""


class SCTPSocket(TCPSocket):
    """The proxy socket of one SCTP service port."""

    def speak(self, proxy_protocol: ProxyProtocol) -> None:
        """The PROXY protocol is for streams of bytes."""

    def listen(self, listener: SocketType) -> None:
        # As associations hold the port too, listening anew takes this; they inherit it.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.listen(BACKLOG)

    def stop_listening(self, listener: SocketType) -> None:
        """Unlike TCP's, a listener that stops leaves those who wait in its queue without an answer."""
        while True:
            try:
                fd, _ = listener._accept()  # type: ignore[attr-defined]
            except OSError:
                break
            socket.close(fd)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        listener.listen(0)


def prepare(sock: SocketType, outgoing: int = STREAMS, incoming: int = 65535) -> None:
    """Set what associations inherit, or are to have: `outgoing` streams, and `incoming` ones at most."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT_ON_CLOSE)
    sock.setsockopt(_SCTP, _NODELAY, 1)
    sock.setsockopt(_SCTP, _RECVRCVINFO, 1)
    _set_buffer(sock, socket.SO_RCVBUF, _SO_RCVBUFFORCE, WINDOW)
    wrapped = _wrap(sock)
    wrapped.events.association = 1
    streams = wrapped.initparams
    streams.autoflush = False
    streams.num_ostreams, streams.max_instreams = outgoing, incoming
    streams.flush()
    times = wrapped.get_rtoinfo()
    times.initial, times.max = RTO_INITIAL, RTO_MAX
    wrapped.set_rtoinfo(times)
    limits = wrapped.get_assocparams()
    limits.assocmaxrxt = RETRIES
    wrapped.set_assocparams(limits)
    path = sctp.paddrparams()
    path.hbinterval, path.pathmaxrxt, path.flags = HEARTBEAT, PATH_RETRIES, sctp.paddrparams.flags_HB_ENABLED
    wrapped.set_paddrparams(path)


def _outgoing(family: int, client: SocketType) -> SocketType:
    """A socket to dial with for this client: as many streams either way as there are with it.

    An endpoint so knows how many streams the client accepts, as if they spoke directly.
    """
    sock = SocketType(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK, _SCTP)
    try:
        status = _wrap(client).get_status()
        prepare(sock, status.instrms, status.outstrms)
    except OSError:
        sock.close()
        raise
    return sock


def _wrap(sock: SocketType) -> sctp.sctpsocket_tcp:
    """pysctp's view of a socket, which stays ours to close."""
    return sctp.sctpsocket_tcp(sock.family, sock)


def _make_room(sink: SocketType, size: int) -> bool:
    """A message must fit the send buffer, which the kernel makes twice what is asked for; whether it fits now."""
    if size > MAX_MESSAGE:
        return False
    _set_buffer(sink, socket.SO_SNDBUF, _SO_SNDBUFFORCE, size)
    return sink.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) >= size


def _set_buffer(sock: SocketType, option: int, forced: int, size: int) -> None:
    """As large as asked for where that is allowed, else as large as the system's limit."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, forced, size)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, option, size)


def _as_sent(ancillary: _Control) -> _Control:
    """SCTP_RCVINFO as SCTP_SNDINFO: the stream, the unordered flag, the four bytes of the PPID."""
    received = ancillary[0][2]
    return [(_SCTP, _SNDINFO, received[0:2] + received[4:6] + received[8:12] + _NO_CONTEXT)]
