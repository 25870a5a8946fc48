"""The saved state: what is written is read, whole, and nothing else ever."""

from __future__ import annotations

import os
import resource
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from userspace_proxy.model import (
    Endpoint,
    Node,
    Protocol,
    ServicePort,
    ServicePortName,
    SessionAffinity,
    Snapshot,
)
from userspace_proxy.sources.saved import FORSAKEN, SavedState

SERVER = "https://192.0.2.1:6443"
NAME, OTHER = ServicePortName("default", "web", "http"), ServicePortName("kube-system", "dns")
SNAPSHOT = Snapshot(
    {
        NAME: ServicePort(
            Protocol.UDP, 53, ("10.96.0.10", "fd00::1"), 30053, ("192.0.2.7",), (), SessionAffinity.CLIENT_IP, 17.5
        )
    },
    {NAME: (Endpoint("10.1.0.2", 80), Endpoint("fd01::2", 80, ready=False, terminating=True)), OTHER: ()},
    Node("node-1", "zone-a"),
)


@pytest.mark.parametrize("snapshot", [SNAPSHOT, Snapshot(), Snapshot({}, {OTHER: ()})])
def test_there_and_back(tmp_path: Path, snapshot: Snapshot) -> None:
    state = SavedState(tmp_path / "made" / "for it", SERVER)
    assert state.load() is None
    state.save(Snapshot({}, {}, Node("earlier")))
    state.save(snapshot)
    assert SavedState(tmp_path / "made" / "for it", SERVER).load() == snapshot
    assert os.listdir(state.file.parent) == [state.file.name], "nothing is left over"
    assert stat.S_IMODE(state.file.stat().st_mode) == 0o600


def test_the_state_of_another_cluster_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    SavedState(tmp_path, SERVER).save(SNAPSHOT)
    assert SavedState(tmp_path, "https://192.0.2.2:6443").load() is None
    assert "found the state of https://192.0.2.1:6443" in caplog.text


def test_another_version_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = SavedState(tmp_path, SERVER)
    state.file.write_bytes(b'{"version": 2, "entirely": "different"}\n')
    assert state.load() is None
    assert "found version 2; allowed: 1" in caplog.text


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_happened_to_the_file_it_is_read_whole_or_not_at_all(tmp_path: Path, data: st.DataObject) -> None:
    state = SavedState(tmp_path, SERVER)
    state.save(SNAPSHOT)
    content = bytearray(state.file.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[position] = data.draw(st.integers(0, 255))
    else:
        del content[position:]
    state.file.write_bytes(bytes(content))
    loaded = state.load()
    node_or_server_changed = position < content.find(b"\n") or b"\n" not in content
    assert loaded is None or loaded == SNAPSHOT or node_or_server_changed
    assert loaded is None or (loaded.services, loaded.endpoints) == (SNAPSHOT.services, SNAPSHOT.endpoints)
    state.save(SNAPSHOT)
    assert state.load() == SNAPSHOT


def test_what_cannot_be_read_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = SavedState(tmp_path, SERVER)
    state.file.mkdir()
    assert state.load() is None
    assert "Is a directory" in caplog.text
    with pytest.raises(OSError, match="directory"):
        state.save(SNAPSHOT)
    assert os.listdir(tmp_path) == [state.file.name], "nothing is left over"


def test_what_has_no_room_leaves_nothing_and_the_last_state_as_it_was(tmp_path: Path) -> None:
    state = SavedState(tmp_path, SERVER)
    state.save(SNAPSHOT)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            state.save(SNAPSHOT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == [state.file.name]
    assert state.load() == SNAPSHOT


def test_several_proxies_to_a_directory_are_not_in_each_others_way(tmp_path: Path) -> None:
    def save_often(snapshot: Snapshot) -> None:
        state = SavedState(tmp_path, SERVER)
        for _ in range(40):
            state.save(snapshot)

    state = SavedState(tmp_path, SERVER)
    snapshots = [replace(SNAPSHOT, node=Node("n" * length)) for length in (1, 300, 2000)]
    state.save(snapshots[0])
    with ThreadPoolExecutor() as threads:
        savers = [threads.submit(save_often, snapshot) for snapshot in snapshots]
        while not all(saver.done() for saver in savers):
            assert state.load() in snapshots
        for saver in savers:
            saver.result()
    assert os.listdir(tmp_path) == [state.file.name]


def test_what_a_dead_proxy_left_is_removed_and_what_another_is_writing_is_not(tmp_path: Path) -> None:
    left, current = tmp_path / ".snapshot.jsonl.left", tmp_path / ".snapshot.jsonl.current"
    for file in (left, current):
        file.touch()
    long_ago = left.stat().st_mtime - FORSAKEN - 60
    os.utime(left, (long_ago, long_ago))
    state = SavedState(tmp_path, SERVER)
    state.save(SNAPSHOT)
    assert {path.name for path in tmp_path.iterdir()} == {state.file.name, current.name}
