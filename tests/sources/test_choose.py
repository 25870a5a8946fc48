"""Which source a Config leads to, and the error where there is none."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from userspace_proxy.config import Config
from userspace_proxy.exceptions import ConfigError
from userspace_proxy.sources import choose
from userspace_proxy.sources.kubernetes import KubernetesSource
from userspace_proxy.sources.manifests import ManifestSource


async def chosen(config: Config) -> object:
    return choose.choose(config)


def test_manifests_are_all_that_is_asked_where_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "192.0.2.1")
    assert isinstance(asyncio.run(chosen(Config(manifests=(Path("m"),)))), ManifestSource)


def test_an_api_server(tmp_path: Path) -> None:
    config = Config(master="http://192.0.2.1:1", state_dir=tmp_path)
    assert isinstance(asyncio.run(chosen(config)), KubernetesSource)


def test_nothing_to_ask(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ConfigError, match="nothing to serve"):
        asyncio.run(chosen(Config()))
    with pytest.raises(ConfigError, match="No such file"):
        asyncio.run(chosen(Config(kubeconfig=str(tmp_path / "missing"))))


def test_the_kubernetes_client_is_not_loaded_for_manifests() -> None:
    code = "import sys, userspace_proxy.app; sys.exit('kubernetes_asyncio' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
