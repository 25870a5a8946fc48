"""What feature gates that are off leave of a Snapshot. Which gates there are is in `config.gates`.

A proxy with all of them on, which is how they are by themselves, has nothing to do with this.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from userspace_proxy.model import Protocol, Snapshot


def gated(publish: Callable[[Snapshot], None], is_on: Callable[[str], bool]) -> Callable[[Snapshot], None]:
    """`publish`, without what is off."""
    if is_on("SCTPSupport"):
        return publish
    return lambda snapshot: publish(without_sctp(snapshot))


def without_sctp(snapshot: Snapshot) -> Snapshot:
    kept = {name: port for name, port in snapshot.services.items() if port.protocol is not Protocol.SCTP}
    gone = snapshot.services.keys() - kept.keys()
    endpoints = {name: those for name, those in snapshot.endpoints.items() if name not in gone}
    return replace(snapshot, services=kept, endpoints=endpoints)
