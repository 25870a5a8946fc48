"""An API server with one Service on one node."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.apiserver import APIServer
from tests.sources.cluster import NODE_OBJECT, WEB, WEB_SLICE


@pytest.fixture
def api() -> Iterator[APIServer]:
    with APIServer() as made:
        made.put(WEB, WEB_SLICE, NODE_OBJECT)
        yield made
