"""What is set on the host: in files of the test's own, and in the kernel, in a network namespace."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.netns import Namespace
from userspace_proxy.config import Config
from userspace_proxy.tuning import cpus, set_oom_score, tune_conntrack

CONFIG = replace(Config(), conntrack_max_per_core=100, conntrack_min=150)


@pytest.fixture
def sysctls(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Path:
    caplog.set_level(logging.DEBUG, "userspace_proxy")
    for name, value in (("max", 10), ("tcp_timeout_established", 10), ("tcp_timeout_close_wait", 7200)):
        (tmp_path / f"nf_conntrack_{name}").write_text(f"{value}\n")
    (tmp_path / "hashsize").write_text("1\n")
    return tmp_path


def found(directory: Path) -> dict[str, str]:
    return {path.name.removeprefix("nf_conntrack_"): path.read_text().strip() for path in directory.iterdir()}


@pytest.mark.parametrize(("processors", "room"), [(1, "150"), (4, "400")])
def test_what_is_too_low_is_raised_and_nothing_is_lowered(sysctls: Path, processors: int, room: str) -> None:
    tune_conntrack(CONFIG, processors, sysctls, sysctls / "hashsize")
    assert found(sysctls) == {
        "max": room,
        "hashsize": str(int(room) // 4),
        "tcp_timeout_established": "86400",
        "tcp_timeout_close_wait": "7200",
    }
    tune_conntrack(replace(CONFIG, conntrack_min=1), 1, sysctls, sysctls / "hashsize")
    assert found(sysctls)["max"] == room


def test_zero_leaves_it_alone(sysctls: Path) -> None:
    before = found(sysctls)
    config = replace(CONFIG, conntrack_max_per_core=0, conntrack_tcp_timeout_established=0.0)
    tune_conntrack(replace(config, conntrack_tcp_timeout_close_wait=0.0), 4, sysctls, sysctls / "hashsize")
    assert found(sysctls) == before


def test_what_cannot_be_set_is_told_and_no_reason_to_end(sysctls: Path, caplog: pytest.LogCaptureFixture) -> None:
    (sysctls / "nf_conntrack_max").unlink()
    (sysctls / "nf_conntrack_max").mkdir()
    (sysctls / "nf_conntrack_tcp_timeout_close_wait").unlink()
    tune_conntrack(CONFIG, 1, sysctls, sysctls / "hashsize")
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    room, close_wait = told
    assert room == (
        f"--conntrack-max-per-core: {sysctls}/nf_conntrack_max cannot be read: Is a directory; "
        "set it to 150 on the host, or --conntrack-max-per-core=0 to leave it alone"
    )
    missing = f"{sysctls}/nf_conntrack_tcp_timeout_close_wait cannot be read: No such file or directory; "
    assert close_wait.startswith(f"--conntrack-tcp-timeout-close-wait: {missing}")
    assert close_wait.endswith("set it to 3600 on the host, or --conntrack-tcp-timeout-close-wait=0 to leave it alone")
    assert (sysctls / "hashsize").read_text() == "1\n", "it follows the limit"


@pytest.mark.privileged
def test_in_the_kernel() -> None:
    """The limit belongs to the host: from a network namespace of its own it can be seen and not be set."""
    tune = (
        "import dataclasses; from userspace_proxy.config import Config; from userspace_proxy import logs, tuning; "
        "logs.set_up(0, 'text'); "
        "tuning.tune_conntrack(dataclasses.replace(Config(), conntrack_min=2**31 - 1), 1)"
    )
    with Namespace() as node:
        node.run("iptables-legacy -t nat -A POSTROUTING -m conntrack --ctstate NEW -j RETURN")
        directory = "/proc/sys/net/netfilter"
        node.run(f"sh -c 'echo 5 >{directory}/nf_conntrack_tcp_timeout_close_wait'")
        before = node.run(f"cat {directory}/nf_conntrack_max")
        said = node.run(f'{sys.executable} -c "{tune}" 2>&1')
        assert node.run(f"cat {directory}/nf_conntrack_tcp_timeout_close_wait").strip() == "3600"
        assert node.run(f"cat {directory}/nf_conntrack_max") == before
        assert "nf_conntrack_max has" in said or "cannot be raised: Permission denied" in said


@pytest.mark.parametrize(("score", "level"), [(-999, logging.DEBUG), (-5, logging.WARNING)])
def test_the_oom_score(tmp_path: Path, caplog: pytest.LogCaptureFixture, score: int, level: int) -> None:
    """That the default cannot be had is usual; what was asked for is missed."""
    caplog.set_level(logging.DEBUG, "userspace_proxy")
    config = replace(Config(), oom_score_adj=score)
    set_oom_score(config, tmp_path / "score")
    assert (tmp_path / "score").read_text() == str(score)
    assert not caplog.records
    set_oom_score(config, tmp_path / "missing" / "score")
    (record,) = caplog.records
    assert record.levelno == level
    assert record.getMessage().startswith(f"--oom-score-adj={score}: not set, {tmp_path}/missing/score: No such file")


def test_there_are_processors() -> None:
    assert cpus() >= 1
