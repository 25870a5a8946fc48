"""What probes ask: /healthz, /livez and /readyz.

Three questions with different consequences. *Live*: does the control loop get its work done? If not, a
restart may help. *Healthy*: should load balancers send this node traffic? Not while it drains, while the node is
being deleted, or when the rules are old because the kernel refuses new ones, which no restart helps. *Ready*: is
everything served that was asked for? The verdicts are pure functions of a `Health`, which whoever runs the control
loop makes.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
from aiohttp import web

from userspace_proxy.admin.servers import application


@dataclass(frozen=True, slots=True)
class Health:
    """The state of the control loop at one moment. Times are seconds of a monotonic clock."""

    last_sync: float | None = None
    """When a sync last succeeded; None: never yet."""
    waiting_since: float | None = None
    """Since when the oldest change or due sync has waited to be synced; None: nothing waits."""
    trouble: str = ""
    """What keeps traffic from being served as a whole, in one line: the capture fails. Empty: nothing does."""
    troubled_since: float | None = None
    """Since when that has been so; None: it is not."""
    draining: bool = False
    leaving: bool = False
    """The node is being deleted."""


def is_fresh(health: Health, now: float, patience: float) -> bool:
    """Live, and what is in the kernel is not old."""
    stale = health.troubled_since is not None and now - health.troubled_since > patience
    return is_live(health, now, patience) and not stale


def is_live(health: Health, now: float, patience: float) -> bool:
    return health.waiting_since is None or now - health.waiting_since <= patience


def why_not_ready(health: Health) -> str:
    """Empty if it is ready."""
    if health.draining:
        return "draining: no new connections are taken"
    if health.trouble:
        return health.trouble
    return "the first sync is not done yet" if health.last_sync is None else ""


class HealthPages:
    """`patience` is how many seconds a change may wait before the control loop counts as stuck."""

    def __init__(self, health: Callable[[], Health], clock: Callable[[], float], patience: float) -> None:
        self._health = health
        self._clock = clock
        self._patience = patience

    def app(self) -> web.Application:
        app = application()
        app.router.add_route("*", "/healthz", self._healthz)
        app.router.add_route("*", "/livez", self._livez)
        app.router.add_route("*", "/readyz", self._readyz)
        return app

    async def _healthz(self, _request: web.Request) -> web.Response:
        health = self._health()
        eligible = not (health.draining or health.leaving)
        return self._report(health, is_fresh(health, self._clock(), self._patience), eligible, nodeEligible=eligible)

    async def _livez(self, _request: web.Request) -> web.Response:
        health = self._health()
        return self._report(health, is_live(health, self._clock(), self._patience), True)

    async def _readyz(self, _request: web.Request) -> web.Response:
        reason = why_not_ready(self._health())
        return web.Response(status=503 if reason else 200, text=reason or "ok")

    def _report(self, health: Health, fresh: bool, eligible: bool, **more: bool) -> web.Response:
        """kube-proxy's answer: two wall-clock times, equal while all is well."""
        now = self._clock()
        wall = datetime.datetime.now(datetime.UTC)
        if fresh:
            updated = _go_time(wall)
        elif health.last_sync is None:
            updated = "0001-01-01 00:00:00 +0000 UTC"
        else:
            updated = _go_time(wall - datetime.timedelta(seconds=now - health.last_sync))
        body = msgspec.json.encode({"lastUpdated": updated, "currentTime": _go_time(wall), **more})
        return web.Response(status=200 if fresh and eligible else 503, body=body, content_type="application/json")


def _go_time(moment: datetime.datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S.%f} +0000 UTC"
