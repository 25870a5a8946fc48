"""What a change costs each capture, by how many services there are: python -m bench.captures [SERVICES...]

Each way is started in a network namespace of its own, is told so many redirects at once, and then one more and one
less, many times over, as the proxy tells it. Printed is how long the calls take, with the processes and threads that
they pass through. No traffic flows.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Collection, Sequence

import uvloop

from bench.namespace import fresh
from userspace_proxy.capture.base import Capture, Difference
from userspace_proxy.capture.choose import choose
from userspace_proxy.model import IPFamily, Portal, PortalKind, Protocol, Redirect, ServicePortName

WAYS = ("iptables", "nftables", "local")
SERVICES = (10, 1000, 10000)
CHANGES = 100
"""One more, or one less; half of each."""


def redirect(number: int) -> Redirect:
    ip = f"10.{96 + (number >> 16)}.{number >> 8 & 255}.{number & 255}"
    portal = Portal(IPFamily.IPV4, Protocol.TCP, ip, 80, PortalKind.CLUSTER_IP)
    return Redirect(portal, 20000 + number % 40000, ServicePortName("default", f"service-{number}"))


async def timed(capture: Capture, redirects: Collection[Redirect], difference: Difference | None) -> float:
    began = time.perf_counter()
    await capture.replace(redirects, difference)
    return (time.perf_counter() - began) * 1000


async def measure(way: str, count: int) -> tuple[float, float, float]:
    """Milliseconds: all of them at once, one change (median), and a look for what others have changed."""
    capture = await choose(way, bind_address="0.0.0.0")
    try:
        redirects = {number: redirect(number) for number in range(count)}
        whole = await timed(capture, redirects.values(), None)
        one = redirect(count)
        changes = []
        for _ in range(CHANGES // 2):
            redirects[count] = one
            changes.append(await timed(capture, redirects.values(), Difference(new=(one,))))
            del redirects[count]
            changes.append(await timed(capture, redirects.values(), Difference(gone=(one,))))
        look = await timed(capture, redirects.values(), Difference())
    finally:
        await capture.close()
    return whole, statistics.median(changes), look


def main(arguments: Sequence[str]) -> None:
    counts = [int(each) for each in arguments] or SERVICES
    print("milliseconds     services      all at once       one change   look for damage")
    for way in WAYS:
        for count in counts:
            fresh()
            whole, change, look = uvloop.run(measure(way, count))
            print(f"{way:12}{count:13}{whole:17.1f}{change:17.2f}{look:18.1f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
