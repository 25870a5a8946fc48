"""The wiring: from a Config to a running proxy and, at a signal, to one that has left nothing behind.

Everything long-lived is made here and runs in one TaskGroup. At the end sockets stop taking clients, who are
refused while sessions drain; then redirects are withdrawn, what is left of the sessions is reset, sockets close,
and the capture lets go. How to loop, to plan and to relay is elsewhere; so is what the flags mean (`config`).
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from functools import partial
from typing import NamedTuple

from userspace_proxy import __version__, host
from userspace_proxy.admin.debugging import add_debugging
from userspace_proxy.admin.health import Health, HealthPages, is_fresh, is_live
from userspace_proxy.admin.healthchecks import Checked, HealthChecks
from userspace_proxy.admin.metrics import Views
from userspace_proxy.admin.servers import AdminServer
from userspace_proxy.capture import sole
from userspace_proxy.capture.base import Capture
from userspace_proxy.capture.choose import choose
from userspace_proxy.capture.none import NoCapture
from userspace_proxy.config import Config, PortRange
from userspace_proxy.configfile import ConfigFile
from userspace_proxy.exceptions import CaptureError
from userspace_proxy.features import gated
from userspace_proxy.logs import set_verbosity, show
from userspace_proxy.metrics import Metrics, Outcome
from userspace_proxy.model import Protocol, Snapshot
from userspace_proxy.proxier import Proxier
from userspace_proxy.sockets.base import RESERVE
from userspace_proxy.sockets.path import DataPath, RelaySettings
from userspace_proxy.sockets.portals import PortalSockets
from userspace_proxy.sources import choose as sources
from userspace_proxy.sources.base import Event, Source, Told
from userspace_proxy.systemd import Supervisor
from userspace_proxy.table import render
from userspace_proxy.tuning import cpus, set_oom_score, tune_conntrack
from userspace_proxy.workers.messages import Start
from userspace_proxy.workers.pool import Pool

logger = logging.getLogger(__name__)

SWITCH = 0.0001
"""Seconds that a thread, which reads manifests or plans, may keep the interpreter from the event loop: the loop asks
for it back after each system call, and Python's own 5 ms would be the latency of every one."""

UNDELIVERED = 0.05
"""Seconds between looks for bytes that are still on their way when all sessions have ended."""


class Stopped(Exception):
    """Ends the TaskGroup when it is time to."""


class Signals:
    """SIGTERM and SIGINT: the first asks for an orderly end, the second for an end. SIGHUP: to read anew."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.hurry = asyncio.Event()
        self.final = False
        """One has come: what ends then is not to start anew."""
        self.reload: Callable[[], None] = lambda: None
        """What SIGHUP does; nothing before there is a source, which has everything to read yet."""

    def watch(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end, number)
        loop.add_signal_handler(signal.SIGHUP, self._read_anew)

    def _read_anew(self) -> None:
        self.reload()

    def _end(self, number: signal.Signals) -> None:
        self.final = True
        if self.stop.is_set():
            self.hurry.set()
        else:
            logger.info("%s: draining; a second signal ends at once", number.name)
            self.stop.set()


class Successor(NamedTuple):
    """The proxy to start anew with, and what the source of the one before was told last."""

    config: Config
    told: Told | None = None


class App:
    """One running proxy. `run` is all there is to call."""

    def __init__(
        self, config: Config, source: Source, capture: Capture, signals: Signals, config_file: ConfigFile | None
    ) -> None:
        self._config = config
        self._config_file = config_file
        self._successor: Config | None = None
        self._signals = signals
        self._capture = capture
        self._has_portals = capture.rewrites_destination or bool(capture.listens)
        """Whether clients come by the services' own addresses."""
        self._metrics = Metrics()
        self._metrics.capture_info.labels(capture.name).set(1)
        self._data_path = _data_path(config, self._metrics)
        self._source = source
        limit = host.raise_descriptor_limit()
        self._most_held = limit - min(2 * RESERVE, limit // 2)
        self._portals = {
            protocol: PortalSockets(sockets, config.bind_address, config.nodeport_addresses, self._has_room)
            for protocol, sockets in self._data_path.sockets.items()
            if protocol in capture.listens
        }
        self._proxier = Proxier(
            capture,
            {**self._data_path.sockets, **self._portals},
            self._metrics,
            bind_address=config.bind_address,
            port_range=config.proxy_port_range or PortRange(*host.ephemeral_ports()),
            nodeport_networks=config.nodeport_addresses,
            sync_period=config.iptables_sync_period,
            min_sync_period=config.iptables_min_sync_period,
            max_ejection=config.max_ejection_time,
            after_sync=self._fit,
            room=self._has_room,
        )
        self._supervisor = Supervisor(os.environ, os.getpid())
        self._health_checks = HealthChecks(
            self._is_healthy,
            config.nodeport_addresses,
            self._no_health_check,
            period=config.iptables_sync_period,
            room=self._has_room,
            held=self._fit,
        )

    async def run(self) -> Successor | None:
        """Serve until a signal, then drain and clean up. Raises ConfigError for what shows only now.

        Where the config file ended it, what to start anew with.
        """
        sys.setswitchinterval(SWITCH)
        self._signals.reload = self._read_anew
        self._source.tell(Event("Starting", "StartKubeProxy", f"userspace-proxy {__version__} starts"))
        gc.disable()  # until the first sync is done: all that is made before is there to stay
        try:
            async with asyncio.TaskGroup() as tasks:
                if isinstance(self._data_path, Pool):
                    tasks.create_task(self._data_path.run(), name="workers")
                publish = gated(self._publish, self._config.is_on)
                tasks.create_task(self._source.run(publish), name="source")
                tasks.create_task(self._answer_load_balancers(), name="health checks")
                tasks.create_task(self._proxier.run(), name="proxier")
                for server in self._admin_servers():
                    tasks.create_task(server.run(), name="admin")
                tasks.create_task(self._tell_of_first_sync(), name="first sync")
                # From the start: a predecessor may have been ready, or the first sync be long in coming.
                tasks.create_task(self._supervisor.run(self._status, self._is_live), name="supervisor")
                tasks.create_task(self._end_on_signal(), name="signals")
                if self._config_file:
                    tasks.create_task(self._end_on_change(self._config_file), name="config file")
        except* Stopped:
            pass
        finally:
            await self._leave_nothing_behind()
        anew = self._successor if not self._signals.final else None
        return Successor(anew, self._source.told) if anew else None

    async def _tell_of_first_sync(self) -> None:
        await self._proxier.progress.first_sync.wait()
        self._supervisor.ready()
        # What there is by now stays; looking through it for garbage held up the data path for 0.1 s at 5,000 services.
        gc.freeze()
        gc.enable()
        captured = self._has_portals and not self._proxier.progress.capture_error
        try:
            show(render(list(self._proxier.report()), captured=captured) + "\n")
        except OSError as error:  # a full disk, or a reader that has left: no reason to end
            logger.warning("the table cannot be shown on standard output: %s; see /services", error.strerror)

    def _status(self) -> str:
        """A line for `systemctl status`."""
        if self._signals.stop.is_set():
            return "draining"
        if not self._proxier.progress.first_sync.is_set():
            return "waiting for the first state to be served"
        trouble = self._proxier.progress.capture_error
        return f"serving {self._proxier.service_ports} service ports, capture {self._capture.name}" + (
            f": {trouble}" if trouble else ""
        )

    def _is_live(self) -> bool:
        return is_live(self._health(), time.monotonic(), 2 * self._config.iptables_sync_period)

    def _read_anew(self) -> None:
        """What is read is served as every change is, when it is there; to have begun is all there is to tell."""
        if self._signals.stop.is_set():
            return
        self._supervisor.reloading()
        self._source.reload()
        self._supervisor.reloaded()

    async def _end_on_signal(self) -> None:
        """Drain while health, metrics and the control loop still answer; then end them all."""
        await self._signals.stop.wait()
        await self._drain()
        raise Stopped

    async def _end_on_change(self, config_file: ConfigFile) -> None:
        self._successor = await config_file.changed()
        if not self._signals.stop.is_set():
            logger.info("--config: %s has changed: draining, then starting anew with it", self._config.config)
            self._signals.stop.set()

    async def _drain(self) -> None:
        """Until nothing is left to wait for, a second signal comes, or the time is over."""
        if self._signals.final:
            self._supervisor.stopping()
        else:
            self._supervisor.reloading()
        self._proxier.stop()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._config.drain_timeout), asyncio.TaskGroup() as tasks:
                drained = tasks.create_task(self._drained())
                hurried = tasks.create_task(self._signals.hurry.wait())
                drained.add_done_callback(lambda _: hurried.cancel())
                hurried.add_done_callback(lambda _: drained.cancel())

    async def _drained(self) -> None:
        open_kinds = set(self._data_path.sockets)
        over = asyncio.Event()

        def ended(protocol: Protocol) -> None:
            open_kinds.discard(protocol)
            if not open_kinds:
                over.set()

        for protocol, sockets in self._data_path.sockets.items():
            sockets.drain(partial(ended, protocol))
        await over.wait()
        await self._until_delivered()
        await self._proxier.settled()

    async def _until_delivered(self) -> None:
        """Wait until the last bytes of connections that have ended are with their clients.

        The kernel sends on after close(), but what it sends must still be translated on its way, and it is not once
        the capture has let go.
        """
        if not self._has_portals:
            return
        ports = self._proxier.ports
        while await asyncio.to_thread(host.undelivered, ports):  # noqa: ASYNC110 - the kernel tells nobody
            await asyncio.sleep(UNDELIVERED)

    def _publish(self, snapshot: Snapshot) -> None:
        self._proxier.publish(snapshot)
        self._health_checks.publish(snapshot)

    def _fit(self) -> None:
        """Sessions may have the descriptors that are not held otherwise."""
        self._data_path.fit(self._held())

    def _held(self) -> int:
        """Descriptors that wait for clients."""
        portals = sum(each.listeners for each in self._portals.values())
        return self._proxier.descriptors + portals + self._health_checks.descriptors

    def _has_room(self) -> bool:
        """Whether one more may, so that some stay for connections."""
        return self._held() < self._most_held

    async def _answer_load_balancers(self) -> None:
        """From when there is something to send clients to, and with the descriptors that proxy sockets have left."""
        await self._proxier.progress.first_sync.wait()
        await self._health_checks.run()

    def _no_health_check(self, checked: Checked, problem: str) -> None:
        """Load balancers will send this node no traffic of the Service."""
        event = Event("FailedToStartServiceHealthcheck", "Listen", problem, True, checked.namespace, checked.name)
        self._source.tell(event)

    def _no_probes(self, problem: str) -> None:
        self._source.tell(Event("FailedToStartProxierHealthcheck", "StartKubeProxy", problem, warning=True))

    def _admin_servers(self) -> Iterator[AdminServer]:
        config = self._config
        if config.healthz_bind_address:
            health = HealthPages(self._health, time.monotonic, 2 * config.iptables_sync_period)
            yield AdminServer(
                "--healthz-bind-address",
                config.healthz_bind_address,
                health.app(),
                hard_fail=config.bind_address_hard_fail,
                failed=self._no_probes,
            )
        if config.metrics_bind_address:
            views = Views(self._exposition, config.configz, self._proxier.report, self._data_path.sessions)
            pages = views.app()
            if config.profiling:
                add_debugging(pages, set_verbosity)
            yield AdminServer(
                "--metrics-bind-address",
                config.metrics_bind_address,
                pages,
                hard_fail=config.bind_address_hard_fail,
            )

    def _health(self) -> Health:
        progress, node = self._proxier.progress, self._proxier.node
        return Health(
            last_sync=progress.last_sync,
            waiting_since=progress.waiting_since,
            trouble=progress.capture_error and f"capture {self._capture.name}: {progress.capture_error}",
            troubled_since=progress.troubled_since,
            draining=self._signals.stop.is_set(),
            leaving=node is not None and node.leaving,
        )

    def _is_healthy(self) -> bool:
        health = self._health()
        return is_fresh(health, time.monotonic(), 2 * self._config.iptables_sync_period) and not health.draining

    async def _exposition(self) -> tuple[bytes, str]:
        self._metrics.refused_objects.set(len(self._source.problems))
        await self._data_path.count()
        return await self._metrics.exposition()

    async def _leave_nothing_behind(self) -> None:
        if self._signals.final:  # it may have come while a new config file was the reason to end
            self._supervisor.stopping()
        await self._data_path.count()
        left = sum(sockets.active for sockets in self._data_path.sockets.values())
        if left:
            logger.warning("%d sessions were still open and are reset; see --drain-timeout", left)
        # Resets must still be translated on their way, so conntrack is let go last of all.
        await self._proxier.withdraw()
        for sockets in self._data_path.sockets.values():
            sockets.end_all(Outcome.DRAIN_TIMEOUT)
        self._proxier.close()
        await self._data_path.close()
        try:
            await self._capture.close()
        except CaptureError as error:
            logger.error("%s; run userspace-proxy --cleanup", error)


def _data_path(config: Config, metrics: Metrics) -> DataPath | Pool:
    """In this process, or in several others; each may have as many descriptors as this one."""
    settings = RelaySettings(
        descriptors=max(2, host.raise_descriptor_limit() - RESERVE),
        splice=config.splice,
        half_close_timeout=config.half_close_timeout,
        udp_timeout=config.udp_timeout,
        max_udp_flows=-(-config.max_udp_flows // config.workers),
    )
    metrics.workers.set(1)
    if config.workers == 1:
        return DataPath(settings, metrics)
    start = Start(0, settings, config.max_ejection_time, config.verbosity, config.logging_format)
    return Pool(config.workers, start, metrics)


async def serve(this: Successor, parse: Callable[[], Config]) -> Successor | None:
    """Run a proxy until a signal ends it, or a change of --config's file, which `parse` reads anew.

    What to start anew with; None after a signal. Raises ConfigError, or CaptureError where the capture cannot work.
    """
    config = this.config
    signals = Signals()
    signals.watch()  # before anything is put into the kernel: from here on the end is an orderly one
    config_file = ConfigFile(config.config, config, parse) if config.config else None
    set_oom_score(config)
    source = sources.choose(config, this.told)
    with nullcontext() if config.capture == NoCapture.name else sole.hold():
        return await _serve(config, source, signals, config_file)


async def _serve(config: Config, source: Source, signals: Signals, config_file: ConfigFile | None) -> Successor | None:
    capture = await choose(
        config.capture,
        bind_address=config.bind_address,
        nodeport_cidrs=config.nodeport_addresses,
        inside=config.cluster_cidr,
    )
    try:
        if capture.rewrites_destination:
            tune_conntrack(config, cpus())
        app = App(config, source, capture, signals, config_file)
    except BaseException:
        await capture.close()
        raise
    return await app.run()
