"""What all tables of flags are put through: defaults, good values, bad ones. A test file has the tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from userspace_proxy.config import Config, parse
from userspace_proxy.config.table import FIELDS, FLAGS
from userspace_proxy.exceptions import ConfigError

M = "--manifests=/"
SOURCES = ("manifests", "kubeconfig", "master", "config")
"""Flags that may not be given, or not so, beside M."""


def problems(*argv: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        parse(argv)
    return caught.value.problems


def problem(*argv: str) -> str:
    (only,) = problems(*argv)
    return only


def accepted(argv: list[str], field: str, value: object) -> None:
    config = parse([M, *argv])
    assert isinstance(config, Config)
    assert getattr(config, field) == value
    assert type(getattr(config, field)) is type(value)


def cases(texts: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, Any]]:
    """Of name and text to a value, or to what is wrong."""
    return [(name, text, value) for name, each in texts.items() for text, value in each.items()]


def refused(name: str, text: str, why: str) -> None:
    """And what is proposed instead is accepted."""
    given = [] if name in SOURCES else [M]
    line = problem(*given, f"--{name}={text}")
    assert line.startswith(f"--{name}={text!r}: {why}; allowed: ")
    parse([*given, line.rpartition("; write for example ")[2]], look=False)


def declared(settings: type) -> set[str]:
    """Names of the flags that a class of settings declares."""
    return {name for name in FLAGS if FIELDS[name] in settings.__annotations__ and "." not in name}


def by_default(settings: type) -> dict[str, Any]:
    return {field: getattr(Config(), field) for field in settings.__annotations__}
