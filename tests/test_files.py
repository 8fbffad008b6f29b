"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from pyro_bnn.files import replacing, replacing_folder

Replacing = Callable[[Path], AbstractContextManager[Path]]
WAYS: list[Replacing] = [replacing, replacing_folder]


def fill(temporary: Path, text: str) -> None:
    (temporary / "content" if temporary.is_dir() else temporary).write_text(text)


def content(path: Path) -> str:
    return (path / "content" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("way", WAYS)
def test_what_is_written_appears_when_it_is_whole(way: Replacing, tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "result"
    for text in ("old", "new"):
        with way(path) as temporary:
            fill(temporary, text)
            assert not path.exists() if text == "old" else content(path) == "old"
        assert content(path) == text
    assert [child.name for child in path.parent.iterdir()] == ["result"]


@pytest.mark.parametrize("way", WAYS)
def test_an_error_leaves_what_was_there(way: Replacing, tmp_path: Path) -> None:
    path = tmp_path / "result"
    with pytest.raises(KeyboardInterrupt), way(path) as temporary:
        fill(temporary, "half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with way(path) as temporary:
        fill(temporary, "old")
    with pytest.raises(OSError, match="disk full"), way(path) as temporary:
        fill(temporary, "half")
        raise OSError("disk full")
    assert content(path) == "old" and [child.name for child in tmp_path.iterdir()] == ["result"]


@pytest.mark.parametrize("way", WAYS)
def test_two_who_write_at_once_do_not_meet(way: Replacing, tmp_path: Path) -> None:
    path = tmp_path / "result"
    with way(path) as first:
        fill(first, "first")
        with way(path) as second:
            assert first != second
            fill(second, "second")
        assert content(path) == "second"
    assert content(path) == "first"


@pytest.mark.parametrize(("umask", "expected"), [(0o022, 0o755), (0o077, 0o700), (0o002, 0o775)])
def test_permissions_are_those_of_the_umask(umask: int, expected: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with replacing_folder(tmp_path / "folder") as temporary:
            fill(temporary, "text")
        with replacing(tmp_path / "file") as temporary:
            fill(temporary, "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == expected
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == expected & 0o666


def test_files_that_were_in_a_folder_before_go_with_it(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "stale").write_text("x")
    with replacing_folder(path) as temporary:
        fill(temporary, "new")
    assert [child.name for child in path.iterdir()] == ["content"]
