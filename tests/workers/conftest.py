from __future__ import annotations

import pytest

from tests.sockets.conftest import family, start

__all__ = ["family", "start"]


@pytest.fixture
def variant() -> tuple[str, int]:
    """What `start` starts: two workers. How they behave on the other loop is the tests' of sockets to show."""
    return "uvloop", 2
