"""What all tests with a node share: the ways to capture that each runs over, and the proxy's log when it fails.

A test whose node has the fixture `capture` runs over all ways. One that is about some of them says so, and why:

    @pytest.mark.captures("iptables", "nftables", why="where nothing is redirected, the address is somebody else's")
"""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest

from tests.e2e.cluster import Cluster, running
from tests.e2e.node import Node


@pytest.fixture(scope="package", params=["iptables", "nftables", "local"])
def capture(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if isinstance(item, pytest.Function) and not applies(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


def applies(item: pytest.Function) -> bool:
    params: dict[str, object] = getattr(getattr(item, "callspec", None), "params", {})
    for mark in item.iter_markers("captures"):
        assert mark.kwargs.keys() == {"why"}, f"{item.nodeid}: captures(..., why=...) says why the others are left out"
    return "capture" not in params or all(params["capture"] in mark.args for mark in item.iter_markers("captures"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        for value in getattr(item, "funcargs", {}).values():
            node = getattr(value, "node", value)
            if isinstance(node, Node) and node.log_file.exists():
                report.sections.append(("the proxy's log, its end", node.log()[-8000:]))
    return report


@pytest.fixture(scope="package")
def cluster(tmp_path_factory: pytest.TempPathFactory, capture: str) -> Iterator[Cluster]:
    """One for all the scenarios; each has a Service of its own."""
    with running(tmp_path_factory.mktemp("cluster"), capture) as made:
        yield made
