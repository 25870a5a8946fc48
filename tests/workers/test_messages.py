"""Every message arrives as it was sent, with the model's values in it."""

from __future__ import annotations

import msgspec

from userspace_proxy.config import LoggingFormat
from userspace_proxy.metrics import Outcome
from userspace_proxy.model import (
    IPFamily,
    Portal,
    PortalKind,
    Protocol,
    ServicePortName,
    SessionAffinity,
    SocketKey,
)
from userspace_proxy.sockets.path import RelaySettings
from userspace_proxy.workers.messages import (
    Admit,
    AskCounts,
    Balance,
    Counts,
    Dialled,
    EndAll,
    Open,
    Probing,
    Report,
    Sessions,
    Start,
    ToControl,
    ToWorker,
)

KEY = SocketKey(ServicePortName("default", "web", "http"), IPFamily.IPV6)
SESSION = {
    "service_port": "default/web",
    "protocol": "TCP",
    "client": "127.0.0.1:1",
    "endpoint": "127.0.0.1:2",
    "state": "open",
    "seconds": 0.5,
    "to_endpoint": 1,
    "to_client": 2,
}


def test_to_a_worker() -> None:
    messages: list[ToWorker] = [
        Open(1, 2, KEY, Protocol.UDP),
        Balance(1, (("127.0.0.1", 80), ("::1", 81)), (("::1", 81),), SessionAffinity.CLIENT_IP, 10.5),
        Admit(1, None),
        Admit(1, (Portal(IPFamily.IPV6, Protocol.TCP, "fd00::1", 80, PortalKind.CLUSTER_IP),)),
        EndAll(Protocol.TCP, Outcome.DRAIN_TIMEOUT),
        AskCounts(7),
        Dialled(1, ("127.0.0.1", 80), False),
        Probing(1, ("::1", 80)),
    ]
    for message in messages:
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=ToWorker) == message


def test_to_the_control_process() -> None:
    counts = Counts(1, 2, -3, 4, 5, 6, 7, 8, 9, {Outcome.IDLE: 1}, {111: 2}, {"ECONNREFUSED": 3})
    for message in (Report(7, (counts,), (1, 2), {Protocol.TCP: 3}, 1, 20), Sessions(8, (SESSION,))):  # type: ignore[arg-type]
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=ToControl) == message


def test_how_a_worker_is_started_fits_a_command_line() -> None:
    start = Start(1, RelaySettings(1000, True, 300.0, 0.25, 4096), 10.0, 2, LoggingFormat.JSON)
    assert msgspec.json.decode(msgspec.json.encode(start), type=Start) == start
