"""Opening: regular files alone, whatever the name says, and never a wait. Writing: through links."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from mobileformer.files.reading import NotRegularError, is_regular, open_regular, read_regular
from mobileformer.files.replacing import replacing


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


def test_a_link_stays_and_what_it_points_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "first").symlink_to("second")
    (tmp_path / "second").symlink_to(Path("far") / "file")
    for text in ("one", "two"):
        with replacing(tmp_path / "first") as temporary:
            assert temporary.parent == tmp_path / "far"
            temporary.write_text(text)
        assert (tmp_path / "far" / "file").read_text() == text
        assert (tmp_path / "first").is_symlink()
        assert (tmp_path / "second").is_symlink()
    assert [file.name for file in (tmp_path / "far").iterdir()] == ["file"]


def test_links_that_lead_nowhere_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "lost").symlink_to("nowhere/file")
    (tmp_path / "device").symlink_to("/dev/null")
    os.mkfifo(tmp_path / "fifo")
    for name, message in (
        ("circle", "symbolic links"), ("lost", "nowhere"), ("device", "a character device"), ("fifo", "a FIFO"),
    ):  # fmt: skip
        with pytest.raises(OSError, match=message), replacing(tmp_path / name):
            raise AssertionError("nothing can be written here")
        assert os.path.lexists(tmp_path / name)


def test_the_longest_name_is_written(tmp_path: Path) -> None:
    with replacing(tmp_path / ("x" * 255)) as temporary:
        temporary.write_text("text")
    assert len(os.listdir(tmp_path)) == 1
