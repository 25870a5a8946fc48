"""The config file, looked at: changes, symbolic links that are turned, and what is no change."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from userspace_proxy.config import Config, parse
from userspace_proxy.configfile import ConfigFile

HEAD = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
PERIOD = 0.01


@asynccontextmanager
async def looking(file: Path) -> AsyncIterator[asyncio.Future[Config]]:
    def read() -> Config:
        config = parse([f"--config={file}"])
        assert isinstance(config, Config)
        return config

    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(ConfigFile(file, read(), read, PERIOD).changed())
        await asyncio.sleep(5 * PERIOD)
        yield task
        task.cancel()


def write(file: Path, body: str) -> None:
    file.write_text(HEAD + body)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - nobody tells what was logged
            await asyncio.sleep(PERIOD)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.conf"
    path.write_text(HEAD)
    return path


def test_a_change_is_the_config_that_it_makes(file: Path) -> None:
    async def main() -> None:
        async with looking(file) as changed, asyncio.timeout(10):
            write(file, "udpIdleTimeout: 9s\n")
            assert (await changed).udp_timeout == 9.0

    asyncio.run(main())


def test_a_change_before_the_first_look_is_seen(file: Path) -> None:
    running = parse([f"--config={file}"])
    assert isinstance(running, Config)
    write(file, "udpIdleTimeout: 9s\n")

    def read() -> Config:
        return replace(running, udp_timeout=9.0)

    async def main() -> None:
        async with asyncio.timeout(10):
            assert (await ConfigFile(file, running, read, PERIOD).changed()).udp_timeout == 9.0

    asyncio.run(main())


def test_a_directory_that_a_link_is_turned_to(tmp_path: Path) -> None:
    """As kubelet changes a ConfigMap: the file's own name never changes what it points to."""
    for name, body in (("one", ""), ("two", "oomScoreAdj: 7\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.conf").write_text(HEAD + body)
    (tmp_path / "data").symlink_to("one")
    (tmp_path / "config.conf").symlink_to("data/config.conf")

    async def main() -> None:
        async with looking(tmp_path / "config.conf") as changed, asyncio.timeout(10):
            (tmp_path / "next").symlink_to("two")
            os.replace(tmp_path / "next", tmp_path / "data")
            assert (await changed).oom_score_adj == 7

    asyncio.run(main())


def test_what_cannot_be_used_or_says_the_same_changes_nothing(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "userspace_proxy")

    async def main() -> None:
        async with looking(file) as changed:
            write(file, "udpIdleTimeout: never\noomScoreAdj: 5000\n")
            await until(lambda: "going on as before" in caplog.text)
            assert "udpIdleTimeout: 'never': not a duration" in caplog.text
            assert "oomScoreAdj: '5000': too large" in caplog.text
            write(file, "udpIdleTimeout: 250ms  # as ever\n")
            await until(lambda: "says the same" in caplog.text)
            os.unlink(file)
            await until(lambda: caplog.text.count("going on as before") == 2)
            assert not changed.done()
            async with asyncio.timeout(10):
                write(file, "udpIdleTimeout: 1s\n")
                assert (await changed).udp_timeout == 1.0

    asyncio.run(main())
    assert caplog.text.count("going on as before") == 2, "each is told once"
    assert caplog.text.count("says the same") == 1, "and nothing at the start"


def test_reading_it_ends_nothing(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever it names is read with it: a kubeconfig, say, with what nobody has thought of."""
    running = parse([f"--config={file}"])
    assert isinstance(running, Config)

    def read() -> Config:
        if b"9s" not in file.read_bytes():
            raise AttributeError("'str' object has no attribute 'get'")
        return replace(running, udp_timeout=9.0)

    async def main() -> None:
        task = asyncio.create_task(ConfigFile(file, running, read, PERIOD).changed())
        await until(lambda: "going on as before" in caplog.text)
        write(file, "udpIdleTimeout: 9s\n")
        async with asyncio.timeout(10):
            assert (await task).udp_timeout == 9.0

    asyncio.run(main())
    assert "AttributeError" in caplog.text


@pytest.mark.timeout(20)
def test_what_is_no_file_any_more_is_not_waited_for(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with looking(file) as changed:
            os.unlink(file)
            os.mkfifo(file)
            await until(lambda: "going on as before" in caplog.text)
            assert f"--config='{file}': not a regular file" in caplog.text
            os.unlink(file)
            async with asyncio.timeout(10):
                write(file, "udpIdleTimeout: 1s\n")
                assert (await changed).udp_timeout == 1.0

    asyncio.run(main())
