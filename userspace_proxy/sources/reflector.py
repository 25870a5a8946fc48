"""One resource of the API server, followed for ever: LIST in pages, then WATCH from there, and again.

Here is the loop and its I/O. What an answer means and what comes next is decided in `sources.answers`; how requests get
to the server is in `sources.connection`; what the objects mean is the `Feed`'s business. A list counts when its last
page has come and replaces everything; whole events count even if the connection breaks in the next one.

While nothing can be had the feed keeps what it has. A failure is told once, and once more when it is over.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Generic, Protocol, TypeVar

import aiohttp

from userspace_proxy.exceptions import APIError
from userspace_proxy.sources.answers import (
    Course,
    Lines,
    Pace,
    Randomness,
    Resource,
    list_query,
    read_event,
    read_object,
    read_page,
    refusal,
    watch_query,
)
from userspace_proxy.sources.connection import Connection

logger = logging.getLogger(__name__)

BATCH = 50
"""Events after which the data path gets its turn."""
_NUMBER = re.compile(r"\d+")

Item = TypeVar("Item")


class Feed(Protocol[Item]):
    """Where objects go. All but `read` are called on the loop's thread."""

    def read(self, value: object) -> Item:
        """Make what is kept of an object; called on another thread too."""

    async def replace(self, items: Sequence[Item]) -> None:
        """These are all objects there are now."""

    def put(self, item: Item) -> None: ...
    def remove(self, item: Item) -> None: ...
    def flush(self) -> None:
        """No more has arrived for the moment."""

    def failed(self) -> None:
        """Nothing can be had at present."""


class Reflector(Generic[Item]):
    """`resources` are those that will do, the best first; another is taken where one is not served."""

    def __init__(
        self,
        connection: Connection,
        resources: Sequence[Resource],
        feed: Feed[Item],
        pace: Pace,
        clock: Callable[[], float],
        rng: Randomness,
    ) -> None:
        self._connection = connection
        self._resources = resources
        self._resource = resources[0]
        self._feed = feed
        self._clock = clock
        self._rng = rng
        self._course = Course(pace, rng)
        self._trouble = ""
        """What was told, without its numbers: the bytes that had come when a connection broke are others each time."""
        self._listed = False
        self._step: asyncio.Timeout | None = None

    async def run(self) -> None:
        """Follow until cancelled."""
        delay = 0.0
        while True:
            with suppress(TimeoutError):  # only `start_over` lets this one run out
                async with asyncio.timeout(None) as self._step:
                    await asyncio.sleep(delay)
                    delay = 0.0
                    delay = await self._go_on()

    def start_over(self) -> None:
        """List anew, now."""
        self._course.start_over()
        if self._step is not None:
            with suppress(RuntimeError):  # it is ending already
                self._step.reschedule(asyncio.get_running_loop().time())

    async def _go_on(self) -> float:
        """List or watch, once; the time to wait afterwards."""
        started = self._clock()
        try:
            if not self._course.version:
                await self._list()
                return 0.0
            delay = await self._watch(started)
        except APIError as error:
            delay = self._course.failed(error, self._clock() - started)
            self._tell(error)
        if self._resource is not self._resources[0]:
            self._course.start_over()  # the better one may be served by now
        return delay

    async def _list(self) -> None:
        for resource in self._resources:
            try:
                items, version = await self._pages(resource)
            except APIError as error:
                if error.status != 404 or resource is self._resources[-1]:
                    raise
                continue
            break
        if resource is not self._resources[0] and resource is not self._resource:
            logger.warning("%s are not served; %s are followed instead", self._resources[0].plural, resource.plural)
        self._resource = resource
        await self._feed.replace(items)
        self._course.listed(version)
        self._listed = True
        self._well()
        self._feed.flush()

    async def _pages(self, resource: Resource) -> tuple[list[Item], str]:
        items: list[Item] = []
        proceed = ""
        while True:
            query = list_query(resource, limit=self._course.limit, proceed=proceed)
            async with self._connection.request(resource.path, query) as response:
                body = await response.read()
            if response.status != 200:
                raise _refused(resource, "list", response, body)
            version, proceed, found = await asyncio.to_thread(self._read_page, resource, body)
            items += found
            if not proceed:
                return items, version

    def _read_page(self, resource: Resource, body: bytes) -> tuple[str, str, list[Item]]:
        page = read_page(resource, body)
        return page.version, page.proceed, [self._feed.read(read_object(resource, raw)) for raw in page.items]

    async def _watch(self, started: float) -> float:
        resource = self._resource
        query = watch_query(resource, self._course.version, self._rng)
        lines = Lines()
        progress = 0
        async with self._connection.request(resource.path, query) as response:
            if response.status != 200:
                raise _refused(resource, "watch", response, await response.read())
            try:
                async for chunk in response.content.iter_any():
                    for line in lines.feed(chunk):
                        self._take(resource, line)
                        progress += 1
                        if progress % BATCH == 0:
                            self._feed.flush()
                            await asyncio.sleep(0)
                    self._well()
                    self._feed.flush()
            finally:
                self._feed.flush()
        return self._course.watched(self._clock() - started, progress=bool(progress))

    def _take(self, resource: Resource, line: bytes) -> None:
        if not line.strip():
            return
        event = read_event(resource, line)
        if event.type in ("ADDED", "MODIFIED"):
            self._feed.put(self._feed.read(event.value))
        elif event.type == "DELETED":
            self._feed.remove(self._feed.read(event.value))
        self._course.progressed(event.version)

    def _tell(self, error: APIError) -> None:
        trouble = str(error) if error.status else f"{self._resource.plural}: {error}"
        if self._course.version and not error.status and not self._course.is_failing:
            logger.debug("%s", trouble)  # watches break off: a load balancer has had enough of it, say
            return
        kind = f"{error.status} {_NUMBER.sub('', trouble)}"
        if kind != self._trouble:
            level = logging.INFO if error.status == 410 else logging.WARNING
            meanwhile = "what was known last is served" if self._listed else "nothing is known of them yet"
            logger.log(level, "%s; %s", trouble, meanwhile)
        self._trouble = kind
        self._feed.failed()

    def _well(self) -> None:
        if self._trouble:
            logger.info("%s are followed again", self._resource.plural)
            self._trouble = ""


def _refused(resource: Resource, verb: str, response: aiohttp.ClientResponse, body: bytes) -> APIError:
    return refusal(resource, verb, response.status, body, response.headers.get("Retry-After", ""))
