"""What a large cluster costs: CPU and memory of listing it, and of one changed endpoint.

    python -m bench.cluster [SERVICES] [ENDPOINTS PER SERVICE]

The API server runs in a process of its own and answers with objects as fat as those of real clusters (managed fields,
annotations, target references). What is printed is the user and system time and the peak resident memory of the
process that has the source, its imports included.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import resource
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection as Pipe
from typing import Any

import uvloop

Object = dict[str, Any]


def _metadata(name: str, **more: Any) -> Object:
    fields: Object = {
        f"f:{part}": {"f:value": {}, ".": {}} for part in ("metadata", "spec", "status", "labels", "ports")
    }
    return {
        "name": name,
        "namespace": "default",
        "uid": f"{hash(name) & (1 << 64) - 1:036x}",
        "creationTimestamp": "2026-01-01T00:00:00Z",
        "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "x" * 400},
        "managedFields": [{"manager": "kube-controller-manager", "operation": "Update", "fieldsV1": fields}] * 2,
        **more,
    }


def service(number: int) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(f"service-{number}", labels={"app": f"app-{number}"}),
        "spec": {
            "type": "ClusterIP",
            "clusterIP": f"10.96.{number >> 8}.{number & 255}",
            "clusterIPs": [f"10.96.{number >> 8}.{number & 255}"],
            "ports": [{"name": "http", "port": 80, "targetPort": 8080, "protocol": "TCP"}],
            "selector": {"app": f"app-{number}"},
            "sessionAffinity": "None",
        },
        "status": {"loadBalancer": {}},
    }


def slice_of(number: int, count: int, shift: int = 0) -> Object:
    first = number * count
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": _metadata(f"service-{number}-x", labels={"kubernetes.io/service-name": f"service-{number}"}),
        "addressType": "IPv4",
        "endpoints": [
            {
                "addresses": [f"10.{128 + (i >> 16)}.{i >> 8 & 255}.{i & 255}"],
                "conditions": {"ready": True, "serving": True, "terminating": False},
                "nodeName": f"node-{i % 500}",
                "zone": "zone-a",
                "targetRef": {"kind": "Pod", "namespace": "default", "name": f"pod-{i}", "uid": f"{i:036x}"},
            }
            for i in range(first + shift, first + shift + count)
        ],
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
    }


def _serve(pipe: Pipe, services: int, endpoints: int) -> None:
    from tests.apiserver import APIServer

    with APIServer() as api:
        for number in range(services):
            api.put(service(number), slice_of(number, endpoints))
        pipe.send(api.url)
        changes = 0
        while (number := pipe.recv()) is not None:
            changes += 1
            api.put(slice_of(number, endpoints, shift=changes))


def _used() -> tuple[float, float]:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


async def _longest_gap(done: Callable[[], bool]) -> float:
    """Seconds between two turns of the loop, until something holds."""
    worst, last = 0.0, time.monotonic()
    while not done():
        await asyncio.sleep(0.001)
        now = time.monotonic()
        worst, last = max(worst, now - last - 0.001), now
    return worst


async def _measure(pipe: Pipe, url: str, services: int) -> None:
    from userspace_proxy.model import Snapshot
    from userspace_proxy.sources.answers import Pace
    from userspace_proxy.sources.connection import Connection
    from userspace_proxy.sources.credentials import Access
    from userspace_proxy.sources.kubernetes import KubernetesSource

    print(f"imports: {_used()[0]:.2f} s of CPU, {_used()[1]:.0f} MB")
    published: list[Snapshot] = []
    told = asyncio.Event()

    def publish(snapshot: Snapshot) -> None:
        published[:] = [snapshot]
        told.set()

    connection = Connection(Access(master=url), time.monotonic, stall=90)
    source = KubernetesSource(connection, url, "node", None, pace=Pace(), clock=time.monotonic, rng=random.Random())
    task = asyncio.ensure_future(source.run(publish))
    before = _used()[0]
    gap = await _longest_gap(lambda: bool(published))
    count = sum(map(len, published[-1].endpoints.values()))
    print(
        f"list of {len(published[-1].services)} service ports, {count} endpoints: {_used()[0] - before:.2f} s of CPU,"
    )
    print(f"    {_used()[1]:.0f} MB at most; the loop was held up for {gap * 1000:.0f} ms at most")
    await asyncio.sleep(1)
    before, end = _used()[0], time.monotonic() + 15
    source.reload()
    gap = await _longest_gap(lambda: time.monotonic() > end)
    print(
        f"list without a change, and 15 s of polling: {_used()[0] - before:.2f} s of CPU, {_used()[1]:.0f} MB at most;"
    )
    print(f"    the loop was held up for {gap * 1000:.0f} ms at most")
    await asyncio.sleep(1)
    changes, before = 500, _used()[0]
    for _ in range(changes):
        told.clear()
        pipe.send(random.randrange(services))
        await told.wait()
    print(f"one changed slice, published: {(_used()[0] - before) / changes * 1e6:.0f} µs of CPU")
    task.cancel()
    await asyncio.wait([task])


def main() -> None:
    services, endpoints = map(int, (sys.argv[1:] + ["5000", "10"][len(sys.argv) - 1 :])[:2])
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs, services, endpoints))
    server.start()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_measure(ours, ours.recv(), services))
    ours.send(None)
    server.join()


if __name__ == "__main__":
    main()
