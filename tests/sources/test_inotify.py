"""Real changes in a real directory, and when they are told."""

from __future__ import annotations

import contextlib
import os

import pytest

from userspace_proxy.sources.inotify import Change, Changes


@pytest.fixture
def watch(tmp_path):
    with contextlib.closing(Changes([str(tmp_path)])) as changes:
        yield changes


def test_a_file_is_told_when_its_writer_closes_it(watch, tmp_path):
    file = tmp_path / "a"
    with file.open("w") as opened:
        opened.write("half")
        opened.flush()
        assert watch.read() == []
    assert watch.read() == [Change(str(file), True)]
    with file.open("w") as opened:
        opened.flush()
        assert watch.read() == []
    assert watch.read() == [Change(str(file), True)]


def test_renaming_and_deleting(watch, tmp_path):
    (tmp_path / "a").write_text("")
    watch.read()
    (tmp_path / "a").rename(tmp_path / "b")
    assert watch.read() == [Change(str(tmp_path / "a"), True), Change(str(tmp_path / "b"), True)]
    (tmp_path / "b").unlink()
    assert Change(str(tmp_path / "b"), True) in watch.read()


def test_links_are_told_at_once_and_are_not_plain(watch, tmp_path):
    os.symlink("nowhere", tmp_path / "soft")
    assert watch.read() == [Change(str(tmp_path / "soft"), False)]
    (tmp_path / "a").write_text("")
    watch.read()
    os.link(tmp_path / "a", tmp_path / "hard")
    assert Change(str(tmp_path / "hard"), True) in watch.read()


def test_directories_are_not_plain(watch, tmp_path):
    (tmp_path / "d").mkdir()
    assert watch.read() == [Change(str(tmp_path / "d"), False)]


def test_what_is_not_told_may_be_anything(tmp_path):
    (tmp_path / "d").mkdir()
    with contextlib.closing(Changes([str(tmp_path / "d")])) as watch:
        (tmp_path / "d").rmdir()
        assert set(watch.read()) == {Change("", False)}


def test_a_directory_of_two_names_tells_both(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "link").symlink_to("d")
    names = [str(tmp_path / "d"), str(tmp_path / "link")]
    with contextlib.closing(Changes(names)) as watch:
        (tmp_path / "d" / "a").write_text("")
        assert watch.read() == [Change(f"{name}/a", True) for name in names]


def test_what_is_not_there_tells_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with contextlib.closing(Changes([str(tmp_path / "none"), str(tmp_path / "file"), str(tmp_path)])) as watch:
        (tmp_path / "a").write_text("")
        assert watch.read() == [Change(str(tmp_path / "a"), True)]
