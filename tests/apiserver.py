"""An API server over real HTTP(S), with the manners of real ones, good and bad: LIST in pages, WATCH, bookmarks, 410.

    with APIServer() as api:
        api.put(service("web", "10.96.0.10", [port(80)]))
        api.manner = lambda request: Manner(cut=1000) if request.verb == "watch" else GOOD
        ...
        assert api.requests[0].query["limit"] == "500"

Versions rise with each change; a watch gets every event after its version exactly once, as its selector sees it, or
410 if the server has forgotten so far back. A `Manner` bends one answer: refuses it, cuts the connection after any byte
of it (with a reset, headers included), falls silent, hands it out in small pieces. `away` and `back` keep the port.

Why not kmock (0.8, from PyPI): its objects all have the version "...", its lists no pages, its watches no versions,
bookmarks or selectors, and behind aiohttp no answer can be cut between two given bytes.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import http.server
import json
import socket
import socketserver
import ssl
import struct
import threading
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

Object = dict[str, Any]

KINDS = {
    "/api/v1/services": ("Service", "v1"),
    "/api/v1/endpoints": ("Endpoints", "v1"),
    "/api/v1/nodes": ("Node", "v1"),
    "/apis/discovery.k8s.io/v1/endpointslices": ("EndpointSlice", "discovery.k8s.io/v1"),
}
_ABORT = struct.pack("ii", 1, 0)


@dataclass(frozen=True)
class Request:
    verb: str
    """list, watch or create."""
    kind: str
    query: Mapping[str, str]
    headers: Mapping[str, str]


@dataclass(frozen=True)
class Manner:
    """How to answer one request."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    message: str = ""
    """Of the Status that comes with a refusal."""
    body: bytes | None = None
    """Instead of what should be answered."""
    cut: int | None = None
    """Reset the connection after as many bytes of the whole answer."""
    silent: int | None = None
    """Send nothing more after as many bytes, and keep the connection."""
    pieces: int = 0
    """Bytes sent at a time; 0: as many as there are."""
    events: int | None = None
    """End the watch in order after as many events."""
    error: Object | None = None
    """End the watch by an ERROR event with this object."""


GOOD = Manner()


class _Cut(Exception):
    """The answer ends here."""


class _Wire:
    """The way out, as far as a manner lets it go."""

    def __init__(self, sock: socket.socket, over: threading.Event) -> None:
        self._sock = sock
        self._over = over
        self.manner = GOOD
        self._sent = 0

    def begin(self, manner: Manner) -> None:
        self.manner, self._sent = manner, 0

    def write(self, content: bytes) -> int:
        manner = self.manner
        for limit in (manner.cut, manner.silent):
            if limit is not None and self._sent + len(content) > limit:
                self._send(content[: max(0, limit - self._sent)])
                if manner.silent is not None:
                    self._over.wait()
                else:
                    self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
                raise _Cut
        self._send(content)
        self._sent += len(content)
        return len(content)

    def _send(self, content: bytes) -> None:
        step = self.manner.pieces or len(content) or 1
        for start in range(0, len(content), step):
            self._sock.sendall(content[start : start + step])

    def flush(self) -> None:
        pass

    @property
    def closed(self) -> bool:
        return False

    def close(self) -> None:
        pass


@dataclass
class _Event:
    version: int
    kind: str
    before: Object | None
    after: Object | None


class APIServer:
    def __init__(self, *, tls: ssl.SSLContext | None = None, address: str = "127.0.0.1", port: int = 0) -> None:
        self.requests: list[Request] = []
        self.manner: Callable[[Request], Manner] = lambda request: GOOD
        self.tokens: set[str] = set()
        """Those that are accepted; empty: everybody is."""
        self.not_served: set[str] = set()
        """Kinds."""
        self.gone_by_status = False
        """Tell 410 by the status of the answer, not by an event."""
        self.made: list[tuple[str, Object]] = []
        """Where and what clients have created: events."""
        self.users: list[str] = []
        """The subjects of the client certificates that were shown."""
        self._tls = tls
        self._address = (address, port)
        self._changed = threading.Condition()
        self._version = 100
        self._forgotten = 100
        self._objects: dict[tuple[str, str, str], Object] = {}
        self._events: list[_Event] = []
        self._pages: dict[str, tuple[int, list[Object]]] = {}
        self._bookmarks = 0
        self._server: _Server | None = None
        self.back()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.away()

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://{self._address[0]}:{self._address[1]}"

    @property
    def version(self) -> int:
        return self._version

    # -- what it holds

    def put(self, *objects: Object) -> None:
        """Create or replace objects."""
        for value in objects:
            self._change((value["kind"], value["metadata"].get("namespace", ""), value["metadata"]["name"]), value)

    def delete(self, *objects: Object) -> None:
        for value in objects:
            self._change((value["kind"], value["metadata"].get("namespace", ""), value["metadata"]["name"]), None)

    def _change(self, key: tuple[str, str, str], value: Object | None) -> None:
        with self._changed:
            self._version += 1
            before = self._objects.pop(key, None)
            after = copy.deepcopy(value)
            if after is not None:
                after["metadata"]["resourceVersion"] = str(self._version)
                self._objects[key] = after
            if before is not None or after is not None:
                self._events.append(_Event(self._version, key[0], before, after))
            self._changed.notify_all()

    def objects(self) -> list[Object]:
        with self._changed:
            return copy.deepcopy(list(self._objects.values()))

    def forget(self) -> None:
        """Compact: no version before the present one can be watched from, and no list be continued."""
        with self._changed:
            self._forgotten = self._version
            self._events.clear()
            self._pages.clear()

    def bookmark(self) -> None:
        """Tell all watches the present version."""
        with self._changed:
            self._version += 1
            self._bookmarks += 1
            self._changed.notify_all()

    def watches(self, kind: str) -> int:
        """How many there have been."""
        return sum(request.verb == "watch" and request.kind == kind for request in self.requests)

    # -- being there

    def away(self) -> None:
        """Stop listening, and break off whatever is going on."""
        if self._server is not None:
            self._server.end()
            self._server = None

    def back(self) -> None:
        self._server = _Server(self._address, self, self._tls)
        self._address = self._server.server_address[:2]  # type: ignore[assignment]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    # -- answering

    def answer(self, handler: _Handler) -> None:
        path, _, text = handler.path.partition("?")
        query = dict(urllib.parse.parse_qsl(text, keep_blank_values=True))
        kind, _ = KINDS.get(path, ("", ""))
        request = Request("watch" if "watch" in query else "list", kind, query, dict(handler.headers))
        with self._changed:
            self.requests.append(request)
        manner = self.manner(request)
        handler.wire.begin(manner)
        if self.tokens and request.headers.get("Authorization", "").removeprefix("Bearer ") not in self.tokens:
            handler.refuse(401, "Unauthorized")
        elif not kind or kind in self.not_served:
            handler.refuse(404, "the server could not find the requested resource")
        elif manner.status != 200:
            handler.refuse(manner.status, manner.message, manner.headers)
        elif manner.body is not None:
            handler.send(manner.body)
        elif request.verb == "list":
            self._list(handler, request)
        else:
            self._watch(handler, request, manner)

    def take(self, handler: _Handler, content: Object) -> None:
        """Something that a client wants to have made; kept beside what is listed."""
        request = Request("create", content["kind"], {}, dict(handler.headers))
        manner = self.manner(request)
        handler.wire.begin(manner)
        if manner.status != 200:
            handler.refuse(manner.status, manner.message, manner.headers)
            return
        made = [(handler.path, content)]
        if manner.cut is None:  # before the answer, upon which the next may come
            self.made += made
        handler.send(json.dumps(content).encode(), 201)
        if manner.cut is not None:  # and the answer was whole for all that
            self.made += made

    def _list(self, handler: _Handler, request: Request) -> None:
        limit = int(request.query.get("limit", 0))
        token = request.query.get("continue", "")
        with self._changed:
            found = self._pages.pop(token, None)
        if token and not found:
            handler.refuse(410, "The provided continue parameter is too old", reason="Expired")
            return
        with self._changed:
            if found:
                version, items = found
            else:
                version = self._version
                items = [o for (kind, _, _), o in self._objects.items() if kind == request.kind and _seen(o, request)]
            page, rest = (items[:limit], items[limit:]) if limit else (items, [])
            metadata: Object = {"resourceVersion": str(version)}
            if rest:
                token = base64.b64encode(f"ÿ{request.kind}?>{version}/{len(rest)}".encode("latin-1")).decode()
                self._pages[token] = version, rest
                metadata |= {"continue": token, "remainingItemCount": len(rest)}
        # Items of a list do not repeat their kind.
        bare = [{name: value for name, value in item.items() if name not in ("kind", "apiVersion")} for item in page]
        handler.send(json.dumps({"kind": f"{request.kind}List", "metadata": metadata, "items": bare}).encode())

    def _watch(self, handler: _Handler, request: Request, manner: Manner) -> None:
        version = int(request.query["resourceVersion"])
        gone = {"kind": "Status", "code": 410, "reason": "Expired", "message": f"too old: {version}"}
        if version < self._forgotten and self.gone_by_status:
            handler.refuse(410, f"too old: {version}", reason="Expired")
            return
        handler.begin_chunks()
        sent, bookmarks = 0, self._bookmarks
        while not handler.over.is_set():
            with self._changed:
                too_old = version < self._forgotten
                news = [event for event in self._events if event.version > version and event.kind == request.kind]
                version = self._version
                if (
                    not too_old
                    and not news
                    and bookmarks == self._bookmarks
                    and not manner.error
                    and manner.events != sent
                ):
                    self._changed.wait(0.05)
                    continue
                told, bookmarks = bookmarks, self._bookmarks
            if too_old:
                handler.chunk(_line("ERROR", gone))
                break
            for event in news:
                if manner.events == sent:
                    break
                if line := _told(event, request):
                    handler.chunk(line)
                    sent += 1
            if manner.error:
                handler.chunk(_line("ERROR", manner.error))
            elif told != bookmarks and manner.events != sent:
                metadata = {"resourceVersion": str(version), "creationTimestamp": None}
                handler.chunk(_line("BOOKMARK", {"kind": request.kind, "metadata": metadata}))
            if manner.error or manner.events == sent:
                break
        handler.end_chunks()


def _seen(value: Object | None, request: Request) -> bool:
    if value is None:
        return False
    labels = value["metadata"].get("labels", {})
    for term in filter(None, request.query.get("labelSelector", "").split(",")):
        assert term.startswith("!"), f"this server knows no selector like {term}"
        if term[1:] in labels:
            return False
    field_selector = request.query.get("fieldSelector", "")
    return not field_selector or field_selector == f"metadata.name={value['metadata']['name']}"


def _told(event: _Event, request: Request) -> bytes:
    before, after = _seen(event.before, request), _seen(event.after, request)
    if not before and not after:
        return b""
    if after:
        return _line("MODIFIED" if before else "ADDED", event.after or {})
    last = copy.deepcopy(event.before or {})
    last["metadata"]["resourceVersion"] = str(event.version)
    return _line("DELETED", last)


def _line(kind: str, value: Object) -> bytes:
    return json.dumps({"type": kind, "object": value}).encode() + b"\n"


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], api: APIServer, tls: ssl.SSLContext | None) -> None:
        self.api = api
        self.over = threading.Event()
        self._tls = tls
        self._open: set[socket.socket] = set()
        super().__init__(address, _Handler)

    def finish_request(self, request: Any, client_address: Any) -> None:
        """On the connection's own thread: the handshake of one holds up no other."""
        sock: socket.socket = request
        with contextlib.suppress(OSError, _Cut):
            sock.settimeout(10)
            if self._tls:
                sock = self._tls.wrap_socket(sock, server_side=True)
            self._open.add(sock)
            with sock:
                if isinstance(sock, ssl.SSLSocket) and (shown := sock.getpeercert()):
                    subject: Any = shown["subject"]
                    self.api.users.append(dict(pair for [pair] in subject)["commonName"])
                _Handler(sock, client_address, self)
        self._open.discard(sock)

    def shutdown_request(self, request: Any) -> None:
        """Without the goodbye, which would turn a reset into an end in order."""
        request.close()

    def end(self) -> None:
        self.over.set()
        self.shutdown()
        self.server_close()
        for sock in list(self._open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.over = self.server.over
        self.wire = _Wire(self.connection, self.over)
        self.wfile = self.wire  # type: ignore[assignment]

    def do_GET(self) -> None:
        self.server.api.answer(self)

    def do_POST(self) -> None:
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.api.take(self, content)

    def send(self, body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wire.write(body)

    def refuse(self, status: int, message: str, headers: Mapping[str, str] | None = None, reason: str = "") -> None:
        said = {"kind": "Status", "status": "Failure", "message": message, "reason": reason, "code": status}
        self.send(json.dumps(said).encode(), status, headers)

    def begin_chunks(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def chunk(self, content: bytes) -> None:
        self.wire.write(b"%x\r\n%s\r\n" % (len(content), content))

    def end_chunks(self) -> None:
        self.wire.write(b"0\r\n\r\n")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass
