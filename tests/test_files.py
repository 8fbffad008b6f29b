"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import json
import os
import signal
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import killed
import pytest
import torch

from pyro_bnn.files import digest_of, read_json, replacing, replacing_folder, require_seal, sealed

Replacing = Callable[..., AbstractContextManager[Path]]
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


def test_files_of_others_stay_in_a_folder(tmp_path: Path) -> None:
    """Proves that a folder is not swept: files with other names and folders stay, files of the same name are new."""
    path = tmp_path / "folder"
    (path / "deep").mkdir(parents=True)
    for name in ("notes", "content", "deep/own", "deep/old"):
        (path / name).write_text("before")
    with replacing_folder(path) as temporary:
        fill(temporary, "new")
        (temporary / "deep").mkdir()
        (temporary / "deep" / "old").write_text("new")
    found = {str(file.relative_to(path)): file.read_text() for file in path.rglob("*") if file.is_file()}
    assert found == {"notes": "before", "content": "new", "deep/own": "before", "deep/old": "new"}


@pytest.mark.parametrize("way", WAYS)
def test_a_symbolic_link_stays_one(way: Replacing, tmp_path: Path) -> None:
    """Proves that what the link leads to is replaced, whether it is there or not."""
    link = tmp_path / "current"
    link.symlink_to(tmp_path / "elsewhere" / "real")
    for text in ("old", "new"):
        with way(link) as temporary:
            fill(temporary, text)
        assert link.is_symlink() and content(tmp_path / "elsewhere" / "real") == text
    assert sorted(child.name for child in tmp_path.iterdir()) == ["current", "elsewhere"]


def half_written(way: Replacing, path: Path) -> None:
    with way(path) as temporary:
        fill(temporary, "half")
        killed.kill_self()


@pytest.mark.parametrize("way", WAYS)
def test_what_a_killed_process_left_goes_with_the_next_writing(way: Replacing, tmp_path: Path) -> None:
    """Proves it for a file and a folder, new and old, and that what a living writer is at is left alone."""
    path = tmp_path / "re[s]ult"
    for text in ("old", "new"):
        assert killed.wait(killed.start(lambda: half_written(way, path))) == -signal.SIGKILL
        assert [*tmp_path.rglob(".*.partial")] and (content(path) == "old" if text == "new" else not path.exists())
        with way(path) as temporary, way(path) as other:
            fill(other, "another")
            fill(temporary, text)
        assert content(path) == text and not [*tmp_path.rglob(".*")]


def test_errors_of_the_system_name_the_place_and_what_is_left(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    for way in WAYS:
        with pytest.raises(OSError, match=r"could not be written \(.*\); nothing is left of it: '.*/file/result'"):
            with way(tmp_path / "file" / "result"):
                pass
    with pytest.raises(OSError, match="what was there before is as it was: '.*/file'"), replacing(tmp_path / "file"):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[" * 100_000, "null", "[1]", '{"a": ' + "9" * 5000 + "}", "\udc80", "{} {}"],
    ids=["empty", "open", "deep", "null", "list", "long", "bytes", "two"],
)
def test_json_that_is_no_object_is_refused_with_the_name_of_the_file(text: str, tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match="some.json"):
        read_json(path)


def test_a_seal_is_broken_by_any_edit() -> None:
    content = sealed({"a": [1, 2.5, None], "b": {"3": True}, "c": float("nan")})
    require_seal(json.loads(json.dumps(content)), Path("x.json"))
    edits: list[dict[str, Any]] = [{"a": [1, 2.5]}, {"b": {"3": 1}}, {"c": 0.0}, {"d": None}, {"digest": "0" * 64}]
    for edit in edits:
        with pytest.raises(ValueError, match="'x.json' is damaged or was edited"):
            require_seal(content | edit, Path("x.json"))


def test_the_digest_of_tensors_sees_names_dtypes_shapes_and_numbers() -> None:
    value = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    same = digest_of({"a": value, "b": torch.ones((), dtype=torch.bfloat16)})
    assert digest_of({"b": torch.ones((), dtype=torch.bfloat16), "a": value.t().contiguous().t()}) == same
    others = [{"A": value}, {"a": value.int()}, {"a": value.reshape(3, 2)}, {"a": value.neg()}, {"a": value[:0]}]
    digests = [digest_of({"b": torch.ones((), dtype=torch.bfloat16)} | other) for other in others]
    assert len({same, *digests}) == 1 + len(others)
