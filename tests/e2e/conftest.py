"""What all tests with a node share: the proxy's log in the report of a test that failed."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest

from tests.e2e.cluster import Cluster, running
from tests.e2e.node import Node


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    funcargs = getattr(item, "funcargs", {})
    node = funcargs["cluster"].node if "cluster" in funcargs else funcargs.get("node")
    if report.failed and isinstance(node, Node) and node.log_file.exists():
        report.sections.append(("the proxy's log, its end", node.log()[-8000:]))
    return report


@pytest.fixture(scope="package")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One for all the scenarios; each has a Service of its own."""
    with running(tmp_path_factory.mktemp("cluster")) as made:
        yield made
