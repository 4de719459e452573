"""Opening: regular files alone, whatever the name says, and never a wait."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from mobileformer.files import NotRegularError, is_regular, open_regular, read_regular


def test_regular_files_and_links_to_them_are_opened(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"abc")
    (tmp_path / "link").symlink_to(file)
    for path in (file, str(file), tmp_path / "link"):
        with open_regular(path) as opened:
            assert opened.read() == b"abc"
        assert read_regular(path, 3) == b"abc"
        assert is_regular(path)
    with pytest.raises(ValueError, match="a: 3 bytes, expected at most 2"):
        read_regular(file, 2)
    with pytest.raises(ValueError, match="mode: expected 'rb', got 'w'"):
        open_regular(file, "w")


def test_everything_else_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path may have 107 bytes
    os.mkfifo("fifo.jpg")
    Path("folder.jpg").mkdir()
    Path("link.jpg").symlink_to("fifo.jpg")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket.jpg")
        for path, kind in (
            ("fifo.jpg", "a FIFO"), ("link.jpg", "a FIFO"), ("folder.jpg", "a folder"), ("socket.jpg", "a socket"),
            ("/dev/zero", "a character device"),
        ):  # fmt: skip
            with pytest.raises(NotRegularError, match=f"^{path}: expected a regular file, got {kind}$"):
                open_regular(path)
            assert not is_regular(path)
    with pytest.raises(FileNotFoundError):
        open_regular("absent")
    assert not is_regular("absent")
    assert not is_regular("a\0b")
