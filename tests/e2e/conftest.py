"""What all tests with a node share: the proxy's log in the report of a test that failed."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from tests.e2e.node import Node


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    node = getattr(item, "funcargs", {}).get("node")
    if report.failed and isinstance(node, Node) and node.log_file.exists():
        report.sections.append(("the proxy's log, its end", node.log()[-8000:]))
    return report
