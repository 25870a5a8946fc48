"""Tests marked `sctp`, on a machine whose kernel has no SCTP: run together in one guest, reported one by one here.

Where the kernel has SCTP they run right here, as all others do. Else the first of them to come up starts a
user-mode Linux (`machine`) in which pytest runs all that were selected; what it reports is replayed
as if each had run in its own turn. Coverage measured in there comes along.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from coverage.config import CoverageConfig

from tests.uml.machine import kernel
from userspace_proxy import host

_MACHINE = Path(__file__).with_name("machine.py")
_IN_GUEST = "IN_UML" in os.environ
_REPORTS = "UML_REPORTS"
_COVERAGE = "COVERAGE_PROCESS_CONFIG"
_outcome = pytest.StashKey["Outcome"]()


class Outcome:
    """What became of the tests in the guest."""

    def __init__(self, session: pytest.Session) -> None:
        self.reports: dict[str, list[pytest.TestReport]] = {}
        config = session.config
        names = [item.nodeid for item in session.items if item.get_closest_marker("sctp")]
        with tempfile.TemporaryDirectory(prefix="sctp.") as directory:
            reports = Path(directory) / "reports"
            environment = os.environ | {_REPORTS: str(reports)}
            if _COVERAGE in environment:
                environment[_COVERAGE] = _measure_into(environment[_COVERAGE], directory)
            command = [sys.executable, str(_MACHINE), "--writable", directory, sys.executable, "-m", "pytest"]
            options = [
                "-p",
                "no:cacheprovider",
                "-p",
                "no:hypothesispytest",
                "-q",
                "--color=no",
                f"--rootdir={config.rootpath}",
            ]
            done = subprocess.run(
                [*command, *options, *names],
                cwd=config.rootpath,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                check=False,
            )
            self.said = f"the guest's exit status was {done.returncode}; it said:\n{done.stdout}"
            for line in reports.read_text().splitlines() if reports.exists() else ():
                self._add(config.hook.pytest_report_from_serializable(config=config, data=json.loads(line)))
            for measured in Path(directory).glob(".coverage.*"):
                shutil.copy(measured, config.rootpath)

    def _add(self, report: pytest.TestReport) -> None:
        if isinstance(report.longrepr, list):  # JSON knows no tuples, and a skip's reason is one
            report.longrepr = tuple(report.longrepr)
        self.reports.setdefault(report.nodeid, []).append(report)

    def of(self, item: pytest.Item) -> list[pytest.TestReport]:
        found = self.reports.get(item.nodeid, [])
        if any(report.when == "teardown" for report in found):
            return found
        lost = pytest.TestReport(item.nodeid, item.location, {}, "failed", f"no result; {self.said}", "call")
        return [*found, lost]


def _measure_into(configuration: str, directory: str) -> str:
    """The configuration that coverage hands to subprocesses, writing elsewhere."""
    changed = CoverageConfig.deserialize(configuration)
    changed.data_file = f"{directory}/.coverage"
    return changed.serialize()


def pytest_configure(config: pytest.Config) -> None:
    if _IN_GUEST:
        # Processes that tests start in there take long enough without being measured.
        os.environ.pop(_COVERAGE, None)
    if _IN_GUEST and _REPORTS in os.environ:
        config.pluginmanager.register(Reporter(config, os.environ[_REPORTS]))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    if _IN_GUEST or not item.get_closest_marker("sctp") or not host.sctp():
        return None
    if kernel() is None or os.geteuid() != 0:
        item.add_marker(pytest.mark.skip(reason="needs a kernel with SCTP, or root and the package user-mode-linux"))
        return None
    stash = item.session.stash
    if _outcome not in stash:
        # The time of all of them is not this one's; the machine has a limit of its own.
        item.config.hook.pytest_timeout_cancel_timer(item=item)
        stash[_outcome] = Outcome(item.session)
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in stash[_outcome].of(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    # What the test before left set up for this one, which had no use for it.
    item.session._setupstate.teardown_exact(nextitem)
    return True


class Reporter:
    """In the guest: writes down each report for the host."""

    def __init__(self, config: pytest.Config, path: str) -> None:
        self._config = config
        self._path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        line: Any = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        with open(self._path, "a") as file:
            file.write(json.dumps(line) + "\n")
