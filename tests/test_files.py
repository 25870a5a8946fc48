from __future__ import annotations

import os
from pathlib import Path

import pytest

from userspace_proxy.files import open_regular


def test_regular_files_and_links_to_them_are_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        with open_regular(tmp_path / name) as opened:
            assert opened.read() == b"content"
            assert not os.get_inheritable(opened.fileno())


@pytest.mark.timeout(20)
def test_anything_else_is_an_error_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("fifo")
    before = os.listdir("/proc/self/fd")
    for path in (tmp_path / "fifo", tmp_path / "link", Path("/dev/zero")):
        with pytest.raises(OSError, match="not a regular file"):
            open_regular(path)
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "none")
    assert os.listdir("/proc/self/fd") == before
