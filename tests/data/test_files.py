"""A file is read by what training saw, and what cannot be read is refused with its row and column."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from pyro_bnn import data
from pyro_bnn.data import Encoding


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def rows(count: int = 40, **columns: Any) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"age": rng.integers(18, 90, count), "size": rng.normal(size=count).round(3)})
    frame["y"] = np.where(frame["age"] > 50, "hi", "lo")
    return frame.assign(**columns)


def csv(path: Path, frame: pd.DataFrame, **options: Any) -> Path:
    frame.to_csv(path, **({"index": False} | options))
    return path


def through_json(encoding: Encoding) -> Encoding:
    found = Encoding.from_json(json.loads(json.dumps(asdict(encoding))))
    assert found == encoding
    return found


@pytest.mark.parametrize("bad", ["?", "", "NA", "unknown", "12,5", "1_000", "inf", "0x10"])
@pytest.mark.parametrize("trained", [False, True])
def test_one_bad_cell_in_a_column_of_numbers_is_named_with_its_row(tmp_path: Path, bad: str, trained: bool) -> None:
    """Proves that neither training nor a later file turns a column of numbers into strings or zeros."""
    encoding = through_json(data.load(csv(tmp_path / "good.csv", rows()), "y").encoding) if trained else None
    frame = rows().astype({"age": object})
    frame.loc[7, "age"] = bad
    with pytest.raises(ValueError, match=r"bad.csv.*age.*row 8 \(line 9\)"):
        data.load(csv(tmp_path / "bad.csv", frame), "y", encoding)


def test_missing_values_are_imputed_by_what_training_saw(tmp_path: Path) -> None:
    """Proves that the median is that of the training rows, that an indicator says where it stands, and that a column
    which had no gap in training may have none later."""
    frame = rows(60).astype({"age": object})
    frame.loc[[3, 8, 11, 30], "age"] = "?"
    task = data.load(csv(tmp_path / "gaps.csv", frame), "y", impute=True)
    encoding = through_json(task.encoding)
    assert encoding.columns == ("age", "size", "age is missing")
    missing = torch.cat([task.x_train, task.x_test])[:, 2]
    assert int((missing > missing.min()).sum()) == 4
    (age,) = (column for column in encoding.table if column.name == "age")
    new = write(tmp_path / "new.csv", "size,age\n0,\n0,40\n")
    x = data.load_inputs(new, encoding).x
    assert x[0, 0] * encoding.x_scale[0] + encoding.x_mean[0] == pytest.approx(age.median, rel=1e-5)
    assert x[1, 0] * encoding.x_scale[0] + encoding.x_mean[0] == pytest.approx(40, rel=1e-5)
    assert x[0, 2] > x[1, 2]
    with pytest.raises(ValueError, match=r"values are missing in size \(1\): row 2"):
        data.load_inputs(write(tmp_path / "new.csv", "size,age\n0,1\n,1\n"), encoding)


def test_the_median_knows_nothing_of_test_rows(tmp_path: Path) -> None:
    """Proves by rows whose test half is far away: the median, the mean and the scale are those of the training half."""
    training = [1.0, 2.0, 3.0, 4.0, None, 10.0]
    lines = [f"{'' if v is None else v},{i % 2},train" for i, v in enumerate(training)]
    lines += [f"{1000 + i},{i % 2},test" for i in range(6)]
    file = write(tmp_path / "far.csv", "\n".join(["age,y,part", *lines]) + "\n")
    task = data.load(file, "y", split="part", impute=True)
    (age,) = task.encoding.table
    assert age.median == 3.0  # of 1, 2, 3, 4, 10
    filled = np.asarray([1.0, 2.0, 3.0, 4.0, 3.0, 10.0])
    assert task.encoding.x_mean[0] == pytest.approx(filled.mean())
    assert task.encoding.x_scale[0] == pytest.approx(filled.std())


def test_columns_are_found_by_name(tmp_path: Path) -> None:
    """Proves: another order changes nothing, a missing and a new column are named, `drop` takes out the new one."""
    task = data.load(csv(tmp_path / "a.csv", rows()), "y")
    turned = csv(tmp_path / "b.csv", rows()[["y", "size", "age"]])
    assert torch.equal(data.load(turned, "y", task.encoding).x_test, task.x_test)
    assert len(data.load_inputs(turned, task.encoding).x) == 40, "the target may be there"
    more = csv(tmp_path / "c.csv", rows(extra=1))
    with pytest.raises(ValueError, match="column 'extra' did not occur in training"):
        data.load(more, "y", task.encoding)
    assert torch.equal(data.load(more, "y", task.encoding, drop=["extra"]).x_test, task.x_test)
    with pytest.raises(ValueError, match="column 'size', on which the network was trained, is missing"):
        data.load(csv(tmp_path / "d.csv", rows().drop(columns="size")), "y", task.encoding)


def test_a_written_row_number_is_no_input(tmp_path: Path) -> None:
    task = data.load(csv(tmp_path / "a.csv", rows(), index=True), "y")
    assert task.encoding.columns == ("age", "size") and "counts the rows" in task.notes[0]
    assert len(data.load_inputs(csv(tmp_path / "b.csv", rows(), index=True), task.encoding).x) == 40


@pytest.mark.parametrize(
    ("y", "kind"),
    [
        ([0.0, 1.0] * 20, "classification"),
        ([-1.0, 1.0] * 20, "classification"),
        ([1, 2, 3, 4] * 10, "classification"),
        ([True, False] * 20, "classification"),
        (list(range(100, 140)), "regression"),
        (list(np.arange(40) / 7), "regression"),
        ([10.0, 20.0, 40.0, 80.0] * 10, None),
    ],
)
@pytest.mark.parametrize("form", ["csv", "npz"])
def test_what_a_target_means_is_known_or_asked_for(tmp_path: Path, y: list[Any], kind: str | None, form: str) -> None:
    """Proves the rule in both kinds of files, and that `task` decides where the values do not."""
    if form == "csv":
        path, target = csv(tmp_path / "a.csv", rows(y=y).astype({"y": object})), "y"
    else:
        path, target = tmp_path / "a.npz", None  # type: ignore[assignment]
        x = rows()[["age", "size"]].to_numpy()
        np.savez(path, x_train=x, y_train=np.asarray(y), x_test=x, y_test=np.asarray(y))
    if kind is not None:
        assert data.load(path, target).kind == kind
        return
    with pytest.raises(ValueError, match="--task classification or --task regression"):
        data.load(path, target)
    assert data.load(path, target, task="classification").encoding.classes == ("10", "20", "40", "80")
    assert data.load(path, target, task="regression").kind == "regression"


def test_labels_are_the_same_however_a_file_writes_them(tmp_path: Path) -> None:
    """Proves that classes 0 and 1 of training are found as 0.0 and 1.0, and that a new class is named with its row."""
    task = data.load(csv(tmp_path / "a.csv", rows(y=[0, 1] * 20)), "y")
    other = data.load(csv(tmp_path / "b.csv", rows(y=[0.0, 1.0] * 20)), "y", task.encoding)
    assert torch.equal(task.y_test, other.y_test)
    with pytest.raises(ValueError, match="class '7' is not among the training classes 0, 1.*row 1"):
        data.load(csv(tmp_path / "c.csv", rows(y=[7, 1] * 20)), "y", task.encoding)


def test_a_column_or_a_share_says_which_rows_are_for_testing(tmp_path: Path) -> None:
    part = ["train"] * 30 + ["Test"] * 10
    path = csv(tmp_path / "a.csv", rows(fold=part))
    task = data.load(path, "y", split="fold")
    assert task.encoding.columns == ("age", "size") and (len(task.x_train), len(task.x_test)) == (30, 10)
    again = data.load(path, "y", through_json(task.encoding))
    assert torch.equal(again.x_test, task.x_test)
    assert len(data.load(path, "y", split=0.5, drop=["fold"]).x_test) == 20
    with pytest.raises(ValueError, match="row 1 has 'a'; expected 'train' or 'test'"):
        data.load(csv(tmp_path / "b.csv", rows(fold="a")), "y", split="fold")


def test_numbers_can_be_categories(tmp_path: Path) -> None:
    """Proves that codes are one-hot when told so, and that an unknown code is refused by name."""
    task = data.load(csv(tmp_path / "a.csv", rows(code=[1010, 1020] * 20)), "y", category=["code"])
    assert task.encoding.columns == ("age", "size", "code=1010", "code=1020")
    with pytest.raises(ValueError, match="column 'code' has '1030' in row 1"):
        data.load_inputs(write(tmp_path / "b.csv", "age,size,code\n1,1,1030\n"), task.encoding)


@pytest.mark.parametrize("start", [1_700_000_000, 1_700_000_000_000_000_000])
def test_a_time_stamp_is_not_lost_before_it_is_standardised(tmp_path: Path, start: int) -> None:
    """Proves that all seconds, or nanoseconds, of a Unix time stay apart, in both kinds of files."""
    t = start + np.random.default_rng(0).permutation(300)
    y = (t - start > 150).astype(int)
    np.savez(tmp_path / "a.npz", x_train=t[:200, None], y_train=y[:200], x_test=t[200:, None], y_test=y[200:])
    assert data.load(tmp_path / "a.npz").x_train.unique().numel() == 200
    task = data.load(csv(tmp_path / "a.csv", pd.DataFrame({"t": t, "y": y})), "y")
    assert task.x_train.unique().numel() == len(task.x_train)
    assert task.x_train.std(correction=0).item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_large_coordinates_and_targets_keep_their_spread(tmp_path: Path, dtype: type) -> None:
    x = (4e5 + np.arange(40) / 2).astype(dtype)
    np.savez(tmp_path / "a.npz", x_train=x[:, None], y_train=x, x_test=x[:, None], y_test=x)
    task = data.load(tmp_path / "a.npz")
    torch.testing.assert_close(task.x_train[:, 0], task.y_train)
    assert task.y_train.unique().numel() == 40 and task.y_train.std(correction=0) == pytest.approx(1, abs=1e-5)


BAD_TABLES: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "it is empty: a header line"),
    "blank": ("\n\n", "it is empty"),
    "header only": ("a,y\n", "at least 4 rows"),
    "not UTF-8": (b"a,y\n1,x\n2,\xe9\n", "line 3 is not UTF-8 .byte 0xe9"),
    "UTF-16": ("a,y\n1,2\n".encode("utf-16"), "line 1 is not UTF-8"),
    "zero bytes": ("a,y\n1,\0\n", "line 2 holds a zero byte"),
    "longer row": ("a,y\n1,2\n1,2,3\n1,2\n", "line 3 has 3 cells, the header 2"),
    "shorter row": ("a,b,y\n1,2,3\n1,2\n1,2,3\n", "line 3 has 2 cells, the header 3"),
    "cut short": ("a,b,y\n1,2,3\n1,2,3\n1,", "line 4 has 2 cells.*is the file truncated"),
    "open quote": ('a,y\n1,2\n"1,2\n', "is a quote open, or the file truncated"),
    "duplicate names": ("a,a,y\n1,2,3\n", "two columns have the name 'a'"),
    "no names": (",,y\n1,2,3\n", "columns 1, 2 have no name"),
    "semicolons": ("a;y\n1;2\n", "the header has no comma, but ';'"),
    "dates": ("d,y\n" + "".join(f"2024-01-{i + 1:02},{i % 2}\n" for i in range(20)), "'d' holds dates or times"),
    "written numbers": (
        "d,y\n" + "".join(f'"{i + 1},000",{i % 2}\n' for i in range(20)),
        "numbers with separators or signs, such as '1,000' in row 1",
    ),
    "per cent": ("d,y\n" + "".join(f"{i} %,{i % 2}\n" for i in range(20)), "numbers with separators or signs"),
    "names of rows": ("d,y\n" + "".join(f"u{i},{i % 2}\n" for i in range(40)), "40 different strings in 40 rows"),
    "too many digits": ("d,y\n" + "".join(f"{2**70 + i},{i % 2}\n" for i in range(20)), "which 64 bits cannot hold"),
    "empty column": ("a,b,y\n" + "1,,0\n2,,1\n" * 5, "column 'b' has no value in any row"),
    "copy of the target": ("a,b,y\n" + "1,p,p\n2,q,q\n" * 5, "column 'b' equals the target in every row"),
    "missing target": ("a,y\n" + "1,p\n2,q\n" * 5 + "3,\n", r"values are missing in y \(1\), the target: '' in row 11"),
    "bad target": ("a,y\n" + "".join(f"{i},{i}.5\n" for i in range(30)) + "3,x\n", "'y', the target, holds numbers"),
    "no input": ("y\n" + "1\n2\n" * 5, "at least 4 rows and 2 columns"),
    "one class": ("a,y\n" + "1,p\n2,p\n" * 5, "needs at least two classes"),
    "a class of one row": ("a,y\n" + "1,p\n2,q\n" * 5 + "1,r\n", "class 'r' has one row"),
    "more classes than test rows": (
        "a,y\n" + "".join(f"{i},c{i % 15}\n" for i in range(30)),
        "there are 15 classes, but only 9 of the 30 rows are for testing",
    ),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_a_bad_table_is_refused_with_its_place(tmp_path: Path, name: str) -> None:
    content, message = BAD_TABLES[name]
    with pytest.raises(ValueError, match=f"cannot use .*bad.csv.*{message}"):
        data.load(write(tmp_path / "bad.csv", content), "y")


def test_line_ends_blanks_marks_and_quotes_do_not_matter(tmp_path: Path) -> None:
    """Proves that mixed line ends, a byte order mark, blanks, a quoted comma and a cell of two lines are read."""
    text = '\ufeffage, size ,"kind",y\r\n' + '1,2,"a, b",p\n3, 4 ,"c\nd",q\r' * 6 + "\n\n"
    task = data.load(write(tmp_path / "a.csv", text), "y")
    assert task.encoding.columns == ("age", "size", "kind=a, b", "kind=c\nd") and len(task.x_train) == 8


def save_images(folder: Path, mode: str = "RGB", count: int = 4) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new(mode, (8, 8)).save(folder / f"{i}.png")


@pytest.mark.parametrize(
    ("folders", "classes"),
    [
        (("Train/a", "Train/b", "Test/a", "Test/b"), ("a", "b")),
        (("training/a", "training/b", "validation/a", "validation/b"), ("a", "b")),
        (("TRAIN/a", "TRAIN/b", "val/a", "val/b", "test/a", "test/b"), ("a", "b")),
        (("a", "b", ".ipynb_checkpoints", "__MACOSX"), ("a", "b")),
        (("train/a", "train/b", "train/.cache", "testing/a", "testing/b"), ("a", "b")),
    ],
)
def test_parts_and_hidden_folders_are_no_classes(
    tmp_path: Path, folders: tuple[str, ...], classes: tuple[str, ...]
) -> None:
    for folder in folders:
        save_images(tmp_path / "images" / folder)
    (tmp_path / "images" / folders[0] / "._0.png").write_text("a resource fork")
    assert data.load(tmp_path / "images").encoding.classes == classes


@pytest.mark.parametrize("folders", [("train/a", "train/b", "test/a", "test/b", "c"), ("train/a", "Train/b", "test/a")])
def test_unclear_folders_are_refused(tmp_path: Path, folders: tuple[str, ...]) -> None:
    for folder in folders:
        save_images(tmp_path / folder)
    with pytest.raises(ValueError, match="for training and testing it has 'c': move|two folders for one part"):
        data.load(tmp_path)


def test_an_image_keeps_its_range_its_colours_and_its_upright(tmp_path: Path) -> None:
    """Proves: 16 bits are not clipped, grey and palettes become RGB, transparency lies on white, EXIF turns."""
    ramp = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "wide.png")
    np.testing.assert_allclose(data.read_image(tmp_path / "wide.png", 8), np.stack([ramp / 65535] * 3), atol=1e-6)
    Image.new("L", (8, 8), 51).save(tmp_path / "grey.png")
    np.testing.assert_allclose(data.read_image(tmp_path / "grey.png", 8), 0.2)
    Image.new("RGB", (8, 8), (255, 51, 0)).quantize(4).save(tmp_path / "palette.png")
    np.testing.assert_allclose(data.read_image(tmp_path / "palette.png", 8)[:, 0, 0], [1, 0.2, 0])
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (data.read_image(tmp_path / "clear.png", 8) == 1).all()
    half = np.zeros((8, 8, 3), np.uint8)
    half[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(half).save(tmp_path / "turned.png", exif=exif)
    assert (
        data.read_image(tmp_path / "turned.png", 8)[:, 0].max()
        < 0.1
        < data.read_image(tmp_path / "turned.png", 8).max()
    )


def image_arrays(path: Path, train: np.ndarray, test: np.ndarray) -> Path:
    np.savez(path, x_train=train, x_test=test, y_train=np.arange(len(train)) % 2, y_test=np.arange(len(test)) % 2)
    return path


def test_arrays_of_images_have_one_unit_and_one_layout(tmp_path: Path) -> None:
    """Proves that test images in the unit of training are equal to them in any dtype and layout, else refused."""
    byte = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 4)).astype(np.uint8)
    whole = byte.astype(np.float32).transpose(0, 3, 1, 2)
    for test in (byte, whole, whole.astype(np.int64)):
        task = data.load(image_arrays(tmp_path / "a.npz", byte, test))
        assert task.x_train.shape == (20, 4, 8, 8) and torch.equal(task.x_train, task.x_test)
    other = whole.astype(np.int64)
    for train, test in (
        (other, whole / 255),
        (whole, whole / 255),
        (byte, whole / 255),
        (whole / 255, whole),
        (byte, byte.astype(np.uint16)),
    ):
        with pytest.raises(ValueError, match="x_test is .* the same (dtype|unit)"):
            data.load(image_arrays(tmp_path / "a.npz", train, test))
    wide = byte.astype(np.uint16) * 257
    assert data.load(image_arrays(tmp_path / "a.npz", wide, wide)).x_train.max() == pytest.approx(byte.max() / 255)


def test_an_encoding_of_before_reads_tables_by_name(tmp_path: Path) -> None:
    """Proves that what older run folders hold is enough to find columns and categories."""
    old = Encoding.from_json(
        {"columns": ["size", "age", "c=u", "c=v"], "x_mean": [0.0] * 4, "x_scale": [1.0] * 4, "classes": ["a", "b"]}
    )
    x = data.load_inputs(write(tmp_path / "a.csv", "age,c,size\n1,v,2\n"), old).x
    assert x.tolist() == [[2, 1, 0, 1]]
