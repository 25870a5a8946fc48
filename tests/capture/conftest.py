"""Network namespaces for the kernel's side of captures."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.netns import Namespace


@pytest.fixture
def node() -> Iterator[Namespace]:
    """A machine with nothing but lo."""
    with Namespace() as namespace:
        yield namespace


@pytest.fixture
def client(node: Namespace) -> Iterator[Namespace]:
    """A second machine behind the node, at 10.1.0.2 and fd01::2, with its default routes through it."""
    with Namespace() as namespace:
        node.connect(namespace, "10.1.0.1/24", "10.1.0.2/24", "fd01::1/64", "fd01::2/64")
        namespace.run("ip route add default via 10.1.0.1")
        namespace.run("ip -6 route add default via fd01::1")
        yield namespace
