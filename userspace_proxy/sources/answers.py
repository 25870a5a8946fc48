"""What an API server's answers mean and what to do next, decided without asking one: no I/O here.

Pages of a list and events of a watch are taken apart, refusals become an APIError that says what to do about them,
and a `Course` goes from listing to watching and back: where to go on from, and after how long. Asking is in
`sources.connection`, the loop around both in `sources.reflector`.

Lists come in pages and name no version, so that they are never older than what was seen before. A version is opaque:
it is handed back as it came.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import msgspec

from userspace_proxy.exceptions import APIError
from userspace_proxy.sources.shapes import learn

PAGE = 500
"""Objects in a page, as client-go asks for."""
MAX_LINE = 64 << 20
"""Bytes in one event; etcd holds no object above a few MiB."""
SELECTOR = "!service.kubernetes.io/headless,!service.kubernetes.io/service-proxy-name"
"""Services that are for no proxy at all or for another one, and their endpoints, are not sent to us."""

RELIST_AFTER = 3
"""Refused watches in a row after which the version itself is doubted."""
_WAIT = frozenset({401, 403, 429, 502, 503})
"""Refusals that say nothing about the version; listing anew would only add to the load."""


class Randomness(Protocol):
    """What is wanted of a `random.Random`."""

    def random(self) -> float: ...
    def randint(self, a: int, b: int) -> int: ...


@dataclass(frozen=True, slots=True)
class Pace:
    """How long things may take, in seconds."""

    first_delay: float = 0.8
    """After a failure; doubled with each in a row."""
    longest_delay: float = 30.0
    longest_wait: float = 300.0
    """The longest that an API server's Retry-After is heeded."""
    steady: float = 10.0
    """Watching for so long makes earlier failures forgotten."""
    shortest_watch: float = 1.0
    """A watch that ends sooner, and without an event, counts as failed."""
    stall: float = 90.0
    """Without a byte for so long a connection is given up; a watch has a bookmark each minute."""
    patience: float = 5.0
    """For the first lists; then the saved state is served meanwhile, and the Node is no longer waited for."""
    save_after: float = 5.0
    """Changes gather for so long before they are written to disk."""
    save_again: float = 30.0
    """After the disk would not take them."""
    resync: float = 900.0
    """Between two times that all is published again without a change."""


@dataclass(frozen=True, slots=True)
class Resource:
    kind: str
    api_version: str
    plural: str
    selector: tuple[str, str] = ("labelSelector", SELECTOR)

    @property
    def path(self) -> str:
        root = "apis" if "/" in self.api_version else "api"
        return f"/{root}/{self.api_version}/{self.plural}"

    @property
    def rule(self) -> str:
        """What a ClusterRole must hold for us."""
        group = self.api_version.rpartition("/")[0]
        return f'{{apiGroups: ["{group}"], resources: ["{self.plural}"], verbs: ["list", "watch"]}}'


SERVICES = Resource("Service", "v1", "services")
ENDPOINT_SLICES = Resource("EndpointSlice", "discovery.k8s.io/v1", "endpointslices")
ENDPOINTS = Resource("Endpoints", "v1", "endpoints")


def node(name: str) -> Resource:
    return Resource("Node", "v1", "nodes", ("fieldSelector", f"metadata.name={name}"))


def list_query(resource: Resource, *, limit: int = PAGE, proceed: str = "") -> dict[str, str]:
    query = dict([resource.selector])
    if limit:
        query["limit"] = str(limit)
    return {**query, "continue": proceed} if proceed else query


def watch_query(resource: Resource, version: str, rng: Randomness) -> dict[str, str]:
    """Watches end after five to ten minutes, not all at once."""
    return {
        **dict([resource.selector]),
        "watch": "true",
        "allowWatchBookmarks": "true",
        "resourceVersion": version,
        "timeoutSeconds": str(rng.randint(300, 600)),
    }


class Unreadable(NamedTuple):
    """What is JSON as a whole and yet holds what cannot be taken over: an integer out of all bounds, say."""

    kind: str
    namespace: str
    name: str
    """Empty where not even that can be told."""
    problem: str


class _Metadata(msgspec.Struct, rename="camel"):
    name: str = ""
    namespace: str = ""
    resource_version: str = ""


class _Named(msgspec.Struct):
    metadata: _Metadata = msgspec.field(default_factory=_Metadata)


class _ListMetadata(msgspec.Struct, rename="camel"):
    resource_version: str = ""
    proceed: str = msgspec.field(default="", name="continue")


class _Page(msgspec.Struct):
    metadata: _ListMetadata
    items: list[msgspec.Raw] | None = None


class _Details(msgspec.Struct, rename="camel"):
    retry_after_seconds: float = 0.0


class _Status(msgspec.Struct):
    message: str = ""
    reason: str = ""
    code: int = 0
    details: _Details | None = None


class _Event(msgspec.Struct):
    type: str
    object: msgspec.Raw


learn(_Named, _Page, _Status, _Event)


class Page(NamedTuple):
    version: str
    proceed: str
    """Asks for the next page; empty: this was the last."""
    items: list[msgspec.Raw]


class Event(NamedTuple):
    type: str
    """ADDED, MODIFIED, DELETED or BOOKMARK."""
    version: str
    value: Any


_BROKEN = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


def read_page(resource: Resource, body: bytes) -> Page:
    try:
        page = msgspec.json.decode(body, type=_Page)
    except _BROKEN as error:
        raise APIError(f"list {resource.plural}: found {error}; allowed: a list of objects in JSON") from None
    if not page.metadata.resource_version:
        raise APIError(f"list {resource.plural}: found no resourceVersion; allowed: one to watch from")
    return Page(page.metadata.resource_version, page.metadata.proceed, page.items or [])


def read_object(resource: Resource, raw: msgspec.Raw) -> Any:
    """An object's value, or Unreadable. Items of a list do not repeat their kind, so it is added."""
    try:
        value = msgspec.json.decode(raw)
    except _BROKEN as error:
        named = _read(raw, _Named)
        namespace, name = (named.metadata.namespace, named.metadata.name) if named else ("", "")
        what = f"{resource.kind} {namespace}/{name}" if name else f"a {resource.kind} without a name"
        return Unreadable(resource.kind, namespace, name, f"{resource.path}: {what}: {error}")
    if isinstance(value, dict):
        value.setdefault("kind", resource.kind)
        value.setdefault("apiVersion", resource.api_version)
    return value


def read_event(resource: Resource, line: bytes) -> Event:
    """Raises APIError for an event that is one itself."""
    try:
        event = msgspec.json.decode(line, type=_Event)
    except _BROKEN as error:
        raise APIError(f"watch {resource.plural}: found {error}; allowed: an event in JSON", status=500) from None
    if event.type == "ERROR":
        raise refusal(resource, "watch", 200, bytes(event.object))
    if event.type not in ("ADDED", "MODIFIED", "DELETED", "BOOKMARK"):
        problem = f"watch {resource.plural}: found an event of type {event.type!r}; allowed: ADDED, MODIFIED, "
        raise APIError(problem + "DELETED, BOOKMARK, ERROR", status=500)
    named = _read(event.object, _Named)
    value = None if event.type == "BOOKMARK" else read_object(resource, event.object)
    return Event(event.type, named.metadata.resource_version if named else "", value)


def refusal(resource: Resource, verb: str, status: int, body: bytes, retry_after: str = "") -> APIError:
    """The error in an answer, or (with 200) in an event of a watch, and what people can do about it."""
    said = _read(body, _Status) or _Status()
    status = said.code if status == 200 else status
    if status in (0, 200):
        status = 500
    seconds = float(retry_after) if retry_after.isdigit() else 0.0  # a date is written by no API server
    if not seconds and said.details is not None:
        seconds = max(0.0, said.details.retry_after_seconds)
    advice = {
        401: "it does not accept these credentials; they are read anew before the next try",
        403: f"give the user a ClusterRole with the rule {resource.rule}",
        404: f"it does not serve {resource.api_version} {resource.plural}",
        410: "what was seen last is too old to go on from; listing anew",
        429: "it has too much to do",
    }.get(status, "it failed" if status >= 500 else "it does not understand the request")
    words = f" ({said.message[:500]})" if said.message else ""
    message = f"{verb} {resource.plural}: the API server says {status}{words}: {advice}"
    return APIError(message, status=status, retry_after=seconds)


def _read(raw: bytes | msgspec.Raw, kind: type[Any]) -> Any:
    try:
        return msgspec.json.decode(raw, type=kind)
    except _BROKEN:
        return None


class Lines:
    """Cuts a stream of bytes into lines, however it arrives. What has no end yet is kept, and never given away."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Raises APIError if a line grows out of all bounds."""
        *whole, rest = chunk.split(b"\n")
        if whole:
            yield b"".join([*self._parts, whole[0]])
            self._parts.clear()
            self._size = 0
            yield from whole[1:]
        self._parts.append(rest)
        self._size += len(rest)
        if self._size > MAX_LINE:
            raise APIError(f"found an event of more than {MAX_LINE >> 20} MiB; allowed: less", status=500)


class Course:
    """Where one resource's reading stands, and the time until the next step, in seconds."""

    def __init__(self, pace: Pace, rng: Randomness) -> None:
        self._pace = pace
        self._rng = rng
        self.version = ""
        """What to watch from; empty: list first."""
        self.limit = PAGE
        """Objects in a page, 0 for all at once."""
        self._failures = 0
        self._refused = 0

    @property
    def is_failing(self) -> bool:
        return self._failures > 1

    def listed(self, version: str) -> None:
        self.version = version
        self.limit = PAGE
        self._refused = 0

    def progressed(self, version: str) -> None:
        """An event or a bookmark came."""
        self.version = version or self.version
        self._failures = self._refused = 0

    def watched(self, lasted: float, *, progress: bool) -> float:
        """A watch has ended in order."""
        if progress or lasted >= self._pace.shortest_watch:
            self._failures = self._refused = 0
            return 0.0
        return self._back_off()

    def failed(self, error: APIError, lasted: float) -> float:
        if lasted >= self._pace.steady:
            self._failures = 0
        if error.status == 410 and not self.version:
            self.limit = 0  # pages come slower than the server forgets them
        if error.status and error.status not in _WAIT:
            self._refused += 1
        if error.status in (400, 404, 410) or self._refused >= RELIST_AFTER:
            self.version = ""
            self._refused = 0
        wait = min(error.retry_after, self._pace.longest_wait) * (1 + self._rng.random() / 2)
        return max(wait, self._back_off())

    def start_over(self) -> None:
        self.version = ""

    def _back_off(self) -> float:
        delay = min(self._pace.longest_delay, self._pace.first_delay * 2.0 ** min(self._failures, 10))
        self._failures += 1
        return delay * (0.5 + self._rng.random())
