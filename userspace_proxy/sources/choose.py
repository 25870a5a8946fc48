"""Which source a Config asks for: manifest files, or an API server.

The Kubernetes client is loaded only where it is asked for: it is half of this program's memory.
"""

from __future__ import annotations

import random
import socket
import time

from userspace_proxy.config import Config
from userspace_proxy.model import Node
from userspace_proxy.sources.base import Source, Told
from userspace_proxy.sources.manifests import ManifestSource


def choose(config: Config, before: Told | None = None) -> Source:
    """`before`: what the source of a proxy that this one takes over from was told.

    Raises ConfigError where there is nothing to serve, or no way to it.
    """
    if config.manifests:
        return ManifestSource(config.manifests, Node(_node_name(config)))
    return _kubernetes(config, before)


def _node_name(config: Config) -> str:
    return config.hostname_override or socket.gethostname().strip().lower()


def _kubernetes(config: Config, before: Told | None) -> Source:
    from userspace_proxy.sources.answers import Pace
    from userspace_proxy.sources.connection import Connection
    from userspace_proxy.sources.credentials import Access
    from userspace_proxy.sources.kubernetes import KubernetesSource
    from userspace_proxy.sources.saved import SavedState

    access = Access(str(config.kubeconfig or ""), config.master, config.kube_api_qps, config.kube_api_burst)
    pace = Pace(resync=config.config_sync_period)
    connection = Connection(access, time.monotonic, stall=pace.stall)
    server = connection.check()
    return KubernetesSource(
        connection,
        server,
        _node_name(config),
        SavedState(config.state_dir, server) if config.state_dir else None,
        before,
        pace=pace,
        clock=time.monotonic,
        rng=random.Random(),
        slices=config.is_on("EndpointSliceProxying"),
    )
