"""What is logged, in which of two formats."""

from __future__ import annotations

import json
import logging

import pytest

from userspace_proxy import logs
from userspace_proxy.config import LoggingFormat


@pytest.fixture
def _logging_restored() -> object:
    root, ours = logging.getLogger(), logging.getLogger("userspace_proxy")
    sessions = logging.getLogger("userspace_proxy.sockets")
    before = (root.handlers[:], root.level, ours.level, sessions.level)
    yield
    root.handlers[:], levels = before[0], before[1:]
    for logger, level in zip((root, ours, sessions), levels, strict=True):
        logger.setLevel(level)


@pytest.mark.usefixtures("_logging_restored")
@pytest.mark.parametrize(("verbosity", "syncs", "connections"), [(0, False, False), (2, True, False), (4, True, True)])
def test_verbosity(verbosity: int, syncs: bool, connections: bool) -> None:
    logs.set_up(verbosity, LoggingFormat.TEXT)
    assert logging.getLogger("userspace_proxy.proxier").isEnabledFor(logging.DEBUG) is syncs
    assert logging.getLogger("userspace_proxy.sockets.tcp").isEnabledFor(logging.DEBUG) is connections
    assert logging.getLogger("userspace_proxy.sockets.tcp").isEnabledFor(logging.INFO)


@pytest.mark.usefixtures("_logging_restored")
def test_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up(0, LoggingFormat.JSON)
    try:
        raise ZeroDivisionError
    except ZeroDivisionError:
        logging.getLogger("userspace_proxy").exception("%s broke", "it")
    line = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert (line["level"], line["message"]) == ("error", "it broke")
    assert "ZeroDivisionError" in line["exception"]
    assert "process" not in line


@pytest.mark.usefixtures("_logging_restored")
def test_other_processes_say_who_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    for logging_format in LoggingFormat:
        logs.set_up(0, logging_format, "worker 1")
        logging.getLogger("userspace_proxy").warning("it broke")
    text, line = capsys.readouterr().err.splitlines()
    assert text.endswith("WARNING worker 1: it broke")
    assert json.loads(line)["process"] == "worker 1"


@pytest.mark.usefixtures("_logging_restored")
def test_a_message_stays_on_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    for logging_format in LoggingFormat:
        logs.set_up(0, logging_format)
        logging.getLogger("userspace_proxy").warning("Service %s is refused", "a\nERROR all is lost\x1b[2J\udcff é")
    text, line = capsys.readouterr().err.splitlines()
    shown = r"Service a\nERROR all is lost\x1b[2J\udcff é is refused"
    assert text.endswith(f"WARNING {shown}")
    assert json.loads(line)["message"] == shown
