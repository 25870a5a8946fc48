"""Each flag that kube-proxy has not: its default, good values and bad."""

from __future__ import annotations

import pathlib

import pytest

from tests.config.flags import accepted, by_default, cases, declared, refused
from userspace_proxy.config import CaptureWay, LoggingFormat
from userspace_proxy.config.own import OwnSettings


def test_defaults():
    assert by_default(OwnSettings) == {
        "manifests": (),
        "capture": CaptureWay.AUTO,
        "state_dir": None,
        "workers": 1,
        "max_udp_flows": 4096,
        "half_close_timeout": 300.0,
        "max_ejection_time": 10.0,
        "splice": True,
        "drain_timeout": 5.0,
        "logging_format": LoggingFormat.TEXT,
    }


GOOD = [
    (
        ["--manifests", "userspace_proxy", "--manifests=tests"],
        "manifests",
        (pathlib.Path("/"), pathlib.Path("userspace_proxy"), pathlib.Path("tests")),
    ),
    (["--state-dir=/x"], "state_dir", pathlib.Path("/x")),
    (["--state-dir="], "state_dir", None),
    (["--capture=none"], "capture", CaptureWay.NONE),
    (["--capture", "iptables"], "capture", CaptureWay.IPTABLES),
    (["--drain-timeout=0s"], "drain_timeout", 0.0),
    (["--half-close-timeout=1.5h"], "half_close_timeout", 5400.0),
    (["--max-ejection-time=0"], "max_ejection_time", 0.0),
    (["--max-ejection-time=1m"], "max_ejection_time", 60.0),
    (["--splice=false"], "splice", False),
    (["--splice=false", "--splice"], "splice", True),
    (["--max-udp-flows=1"], "max_udp_flows", 1),
    (["--workers", "4"], "workers", 4),
    (["--logging-format=json"], "logging_format", LoggingFormat.JSON),
]
BAD = {
    "manifests": {"": "an empty path"},
    "state-dir": {" ": "blanks around it"},
    "capture": {"": "no such choice", "IPTABLES": "no such choice", "ipvs": "no such choice"},
    "workers": {"0": "too small", "65": "too large", "auto": "not a whole number"},
    "max-udp-flows": {
        "0": "too small",
        "-5": "too small",
        "2000000": "too large",
        "many": "not a whole number",
        "1.5": "not a whole number",
    },
    "drain-timeout": {"-1ms": "too short", "5": "5 has no unit"},
    "max-ejection-time": {"-1s": "too short", "never": "not a duration"},
    "half-close-timeout": {"0": "too short", "1ns": "too short", "99ms": "too short", "forever": "not a duration"},
    "splice": {"no": "neither true nor false"},
    "logging-format": {"JSON": "no such choice", "xml": "no such choice"},
}


@pytest.mark.parametrize(("argv", "field", "value"), GOOD, ids=[" ".join(argv) for argv, _, _ in GOOD])
def test_good_values(argv, field, value):
    accepted(argv, field, value)


@pytest.mark.parametrize(("name", "text", "why"), cases(BAD))
def test_bad_values(name, text, why):
    refused(name, text, why)


def test_every_flag_has_been_given_badly():
    assert set(BAD) == declared(OwnSettings)
