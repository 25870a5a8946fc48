"""What the capture is told: differences while all is known, everything otherwise."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from tests.fakes import RecordingCapture
from userspace_proxy.captured import Captured
from userspace_proxy.metrics import Metrics
from userspace_proxy.model import IPFamily, Portal, PortalKind, Protocol, Redirect, ServicePortName

Run = Callable[[Coroutine[Any, Any, Any]], Any]


def redirect(number: int, proxy_port: int = 40000) -> Redirect:
    portal = Portal(IPFamily.IPV4, Protocol.TCP, f"10.96.0.{number}", 80, PortalKind.CLUSTER_IP)
    return Redirect(portal, proxy_port, ServicePortName("default", f"s{number}"))


def place(number: int) -> tuple[IPFamily, Protocol, str, int]:
    return redirect(number).portal.place


def test_a_part_is_exchanged_and_the_rest_stays(run: Run) -> None:
    async def main() -> None:
        capture = RecordingCapture()
        captured = Captured(capture, Metrics())
        assert await captured.exchange((), [redirect(1), redirect(2), redirect(3)])
        assert capture.whole == 1, "at first nothing is known"
        assert await captured.exchange([place(1), place(2), place(9)], [redirect(2, 50000), redirect(4)])
        assert capture.redirects == {redirect(2, 50000), redirect(3), redirect(4)}
        assert captured.redirects == {r.portal.place: r for r in capture.redirects}
        assert await captured.exchange([place(3)], [redirect(3)]), "the same again"
        assert await captured.repair()
        assert capture.whole == 1

    run(main())


def test_after_a_failure_everything_is_told(run: Run) -> None:
    async def main() -> None:
        capture = RecordingCapture()
        captured = Captured(capture, Metrics())
        assert await captured.exchange((), [redirect(1)])
        capture.error = "locked"
        assert not await captured.exchange([place(1)], [redirect(1, 50000)])
        assert not captured.known
        assert captured.error == "locked"
        assert captured.redirects == {place(1): redirect(1)}, "what was in force when it last was known"
        capture.error = ""
        assert await captured.exchange([place(1)], [redirect(1, 50000)])
        assert (captured.known, captured.error, capture.whole) == (True, "", 2)

    run(main())
