"""Data sets become the tensors that their loaders promise, and what cannot be used is refused with a remedy."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from pyro_bnn import data
from pyro_bnn.data import Encoding


def arrays(**changes: Any) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    good = {
        "x_train": rng.normal(3.0, 5.0, (40, 3)),
        "y_train": rng.normal(100.0, 20.0, 40),
        "x_test": rng.normal(3.0, 5.0, (10, 3)),
        "y_test": rng.normal(100.0, 20.0, 10),
    }
    return {key: value for key, value in (good | changes).items() if value is not None}


def table(rows: int = 60) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    size = rng.normal(50.0, 10.0, rows)
    return pd.DataFrame(
        {
            "size": size,
            "colour": rng.choice(["red", "green"], rows),
            "kind": rng.choice(["cat", "dog"], rows),
            "rooms": rng.integers(1, 5, rows),
            "price": 3 * size + rng.normal(size=rows),
        }
    )


def save_images(folder: Path, colours: dict[str, tuple[int, int, int]], count: int = 4, side: int = 10) -> None:
    for name, colour in colours.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (side + number, side), colour).save(folder / name / f"{number}.png")


def test_digits_are_split_once_and_for_all() -> None:
    """Proves: 1,257 + 540 images of 1 x 8 x 8 in [0, 1], disjoint, balanced, the same at every call under any seed."""
    torch.manual_seed(0)
    first = data.digits()
    torch.manual_seed(1)
    second = data.digits()
    assert first.x_train.shape == (1257, 1, 8, 8) and first.x_test.shape == (540, 1, 8, 8)
    assert first.x_train.dtype == torch.float32 and first.y_train.dtype == torch.int64
    assert (first.kind, first.out_features, first.name) == ("classification", 10, "digits")
    everything = torch.cat([first.x_train, first.x_test])
    assert (everything.min(), everything.max()) == (0, 1)
    train = {row.numpy().tobytes() for row in first.x_train}
    assert not any(row.numpy().tobytes() in train for row in first.x_test)
    assert first.y_test.bincount().min() >= 52 and first.y_test.bincount().max() <= 55
    assert first.x_ood is not None and second.x_ood is not None
    for one, other in (
        (first.x_train, second.x_train),
        (first.y_test, second.y_test),
        (first.x_ood, second.x_ood),
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("size", [10, 100, 999])
def test_few_digits_are_balanced_and_the_same_each_time(size: int) -> None:
    """Proves: so many of the training images, each digit as often give or take one, more of them hold the fewer, and
    the same test images."""
    whole, few, again = data.digits(), data.load(f"digits-{size}"), data.digits(size)
    assert few.name == f"digits-{size}" and few.x_train.shape == (size, 1, 8, 8)
    counts = few.y_train.bincount(minlength=10)
    assert counts.max() - counts.min() <= 1 and torch.equal(few.x_train, again.x_train)
    rows = {row.numpy().tobytes(): int(y) for row, y in zip(whole.x_train, whole.y_train, strict=True)}
    assert [rows[row.numpy().tobytes()] for row in few.x_train] == few.y_train.tolist()
    assert torch.equal(few.x_test, whole.x_test) and few.encoding == whole.encoding
    more = {row.numpy().tobytes() for row in data.digits(min(size + 50, 1257)).x_train}
    assert all(row.numpy().tobytes() in more for row in few.x_train)


@pytest.mark.parametrize("name", ["digits-9", "digits-1258", "digits-0"])
def test_a_number_of_digits_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"train_size={name[7:]}: "):
        data.load(name)


@pytest.mark.parametrize("name", ["digits-", "digits-ten", "digits100", "few-digits"])
def test_other_names_are_paths(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="no such data"):
        data.load(name)


def test_photograph_patches_look_like_images_of_the_same_range() -> None:
    """Proves that the out-of-distribution set has the digits' shape and range, and patches that are not flat grey."""
    x_ood = data.digits().x_ood
    assert x_ood is not None and x_ood.shape == (540, 1, 8, 8)
    assert x_ood.min() >= 0 and x_ood.max() <= 1
    assert x_ood.flatten(1).std(1).median() > 0.05


def test_npz_regression_is_standardised_with_training_statistics(tmp_path: Path) -> None:
    """Proves: training values get mean 0 and deviation 1, test values the same map, and the constants undo it."""
    raw = arrays()
    np.savez(tmp_path / "wind.npz", **raw)
    task = data.load(tmp_path / "wind.npz")
    assert (task.name, task.kind, task.out_features) == ("wind", "regression", 1)
    assert task.y_train.shape == (40,) and task.y_train.dtype == torch.float32
    for values in (task.x_train, task.y_train):
        torch.testing.assert_close(values.mean(0), torch.zeros_like(values[0]), atol=1e-6, rtol=0)
        torch.testing.assert_close(values.std(0, correction=0), torch.ones_like(values[0]), atol=1e-5, rtol=0)
    np.testing.assert_allclose(task.y_test * task.encoding.y_scale + task.encoding.y_mean, raw["y_test"], rtol=1e-5)
    x_scale, x_mean = np.array(task.encoding.x_scale), np.array(task.encoding.x_mean)
    np.testing.assert_allclose(task.x_test.numpy() * x_scale + x_mean, raw["x_test"], rtol=1e-4)


def test_npz_labels_of_any_kind_become_numbers_from_zero(tmp_path: Path) -> None:
    """Proves that labels 5 and 7, or strings, are numbered from 0 in sorted order, with their names kept."""
    for labels in (np.array([7, 5]), np.array(["b", "a"]), np.array([True, False])):
        np.savez(tmp_path / "labels.npz", **arrays(y_train=np.tile(labels, 20), y_test=np.tile(labels, 5)))
        task = data.load(tmp_path / "labels.npz")
        assert task.kind == "classification" and task.y_test.dtype == torch.int64
        assert task.y_test.tolist() == [1, 0] * 5
        assert task.encoding.classes == tuple(sorted(map(str, labels)))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((28, 28), (1, 28, 28)), ((28, 28, 3), (3, 28, 28)), ((3, 28, 28), (3, 28, 28))],
    ids=["grey", "channels-last", "channels-first"],
)
def test_npz_of_bytes_holds_images(tmp_path: Path, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Proves that bytes become images [N, C, H, W] in [0, 1], whatever the layout, and that x_ood is read with them."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (10, *shape), dtype=np.uint8)
    x[0] = 255
    labels = np.arange(10) % 2
    np.savez(tmp_path / "images.npz", x_train=x, x_test=x[:4], x_ood=x[:3], y_train=labels, y_test=labels[:4])
    task = data.load(tmp_path / "images.npz")
    assert task.x_train.shape == (10, *expected) and task.x_train[0].min() == 1
    assert task.x_ood is not None and task.x_ood.shape == (3, *expected)
    pixel = x[1, 2, 3] if len(shape) == 2 else x[1, 2, 3, 1] if shape[-1] == 3 else x[1, 1, 2, 3]
    assert task.x_train[1, -1 if len(shape) == 2 else 1, 2, 3] == pytest.approx(pixel / 255)


def test_csv_regression(tmp_path: Path) -> None:
    """Proves: strings become one-hot, numbers are standardised, and the same 30 % of the rows are for testing."""
    table().to_csv(tmp_path / "houses.csv", index=False)
    task = data.load(tmp_path / "houses.csv", target="price")
    assert task.kind == "regression" and task.x_train.shape == (42, 6) and task.x_test.shape == (18, 6)
    assert task.encoding.columns == ("size", "rooms", "colour=green", "colour=red", "kind=cat", "kind=dog")
    torch.testing.assert_close(task.x_train.mean(0), torch.zeros(6), atol=1e-6, rtol=0)
    correlation = torch.corrcoef(torch.stack([task.x_test[:, 0], task.y_test]))[0, 1]
    assert correlation > 0.99, "rows and targets belong together"
    assert torch.equal(task.x_test, data.from_csv(tmp_path / "houses.csv", "price").x_test)


@pytest.mark.parametrize(("target", "classes"), [("kind", ("cat", "dog")), ("rooms", ("1", "2", "3", "4"))])
def test_csv_classification(tmp_path: Path, target: str, classes: tuple[str, ...]) -> None:
    """Proves that a target of strings, or of few whole numbers, makes a classification split by strata."""
    table().to_csv(tmp_path / "houses.csv", index=False)
    task = data.load(tmp_path / "houses.csv", target=target)
    assert task.encoding.classes == classes and task.out_features == len(classes)
    shares = [labels.bincount(minlength=len(classes)) / len(labels) for labels in (task.y_train, task.y_test)]
    assert (shares[0] - shares[1]).abs().max() < 0.06


def test_csv_with_many_whole_numbers_is_a_regression(tmp_path: Path) -> None:
    """Proves that a whole-number target with more than 20 values, such as a price, is not taken for classes."""
    table().assign(price=np.arange(60)).to_csv(tmp_path / "counts.csv", index=False)
    assert data.load(tmp_path / "counts.csv", target="price").kind == "regression"


def test_new_data_are_read_with_an_earlier_encoding(tmp_path: Path) -> None:
    """Proves that an encoding survives JSON and reads other rows by the old constants, columns and classes."""
    old, new = tmp_path / "old.csv", tmp_path / "new.csv"
    table().to_csv(old, index=False)
    frame = table()
    frame.loc[:, "size"] += 1000.0
    frame[frame.columns[::-1]].to_csv(new, index=False)
    task = data.load(old, target="kind")
    encoding = Encoding.from_json(json.loads(json.dumps(dataclasses.asdict(task.encoding))))
    assert encoding == task.encoding
    other = data.load(new, target="kind", encoding=encoding)
    assert other.encoding == encoding
    shift = 1000 / encoding.x_scale[0]
    torch.testing.assert_close(other.x_test[:, 0], task.x_test[:, 0] + shift, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(other.x_test[:, 1:], task.x_test[:, 1:])
    frame.assign(colour="blue").to_csv(new, index=False)
    with pytest.raises(
        ValueError, match="'colour' has 'blue' in row 1 .* did not occur in training; expected one of green, red"
    ):
        data.load(new, target="kind", encoding=encoding)

    frame.drop(columns="size").to_csv(new, index=False)
    with pytest.raises(ValueError, match="column 'size', on which the network was trained, is missing"):
        data.load(new, target="kind", encoding=encoding)
    frame.assign(kind=["cow", "pig"] * 30).to_csv(new, index=False)
    with pytest.raises(ValueError, match="class 'cow' is not among the training classes cat, dog"):
        data.load(new, target="kind", encoding=encoding)


def test_constant_columns_stay_finite(tmp_path: Path) -> None:
    """Proves that a column without any spread is centred and not divided by zero or by rounding."""
    raw = arrays()
    raw["x_train"][:, 1] = 0.1
    raw["x_test"][:, 1] = 0.2
    np.savez(tmp_path / "constant.npz", **raw)
    task = data.load(tmp_path / "constant.npz")
    torch.testing.assert_close(task.x_test[:, 1], torch.full((10,), 0.1))


def test_image_folder_with_train_and_test(tmp_path: Path) -> None:
    """Proves that images of several sizes become RGB 3 x 32 x 32 in [0, 1], with their folder as class."""
    for part in ("train", "test"):
        save_images(tmp_path / part, {"blue": (0, 0, 255), "red": (255, 0, 0)})
    task = data.load(tmp_path)
    assert task.x_train.shape == (8, 3, 32, 32) and task.encoding.classes == ("blue", "red")
    for image, label in zip(task.x_test, task.y_test, strict=True):
        assert image.amax((1, 2)).tolist() == ([0, 0, 1] if label == 0 else [1, 0, 0])


def test_image_folder_without_parts_is_split_by_class(tmp_path: Path) -> None:
    """Proves that a folder of classes alone is split 70 : 30 within each class."""
    save_images(tmp_path, {"blue": (0, 0, 255), "red": (255, 0, 0)}, count=10)
    task = data.from_image_folder(tmp_path, size=16)
    assert task.x_train.shape == (14, 3, 16, 16)
    assert task.y_train.bincount().tolist() == [7, 7] and task.y_test.bincount().tolist() == [3, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, "it has no y_test; it has x_train, y_train, x_test"),
        ({"x_train": np.zeros((39, 3))}, "x_train has 39 rows and y_train has 40"),
        ({"x_test": np.zeros((10, 4))}, r"a row of x_test is \(4,\), a row of x_train \(3,\)"),
        ({"x_train": np.full((40, 3), np.nan)}, "x_train holds NaN or infinite values"),
        ({"x_test": np.full((10, 3), np.inf)}, "x_test holds NaN or infinite values"),
        ({"y_train": np.full(40, np.nan)}, "y_train holds NaN or infinite values"),
        (
            {"y_train": np.eye(40), "y_test": np.eye(10)},
            r"y_train must hold class labels or numbers to predict, \[N\] or \[N, 1\]",
        ),
        ({"x_train": np.zeros(40)}, r"x_train must hold numbers, \[N, ...\]"),
        ({"x_train": np.full((40, 3), "a")}, r"x_train must hold numbers, \[N, ...\]"),
        ({"y_train": np.arange(40) % 2, "y_test": np.arange(10)}, "class '2' is not among the training classes 0, 1"),
        ({"y_train": np.zeros(40, int), "y_test": np.zeros(10, int)}, "at least two classes, but there is only '0'"),
        ({"y_test": np.full(10, "a")}, "y_test holds labels"),
    ],
)
def test_npz_refuses(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """Proves that each fault of the arrays is named together with the file."""
    np.savez(tmp_path / "bad.npz", **arrays(**changes))
    with pytest.raises(ValueError, match=message) as caught:
        data.load(tmp_path / "bad.npz")
    assert "bad.npz" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut short"])
def test_npz_refuses_other_files(tmp_path: Path, content: bytes) -> None:
    """Proves that an empty, foreign or truncated file is refused as such, whatever numpy makes of it."""
    (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad.npz': it is not an .npz file of plain arrays"):
        data.load(tmp_path / "bad.npz")


@pytest.mark.parametrize(
    ("change", "target", "message"),
    [
        (lambda t: t, None, "a target column is needed .*its columns are: size, colour, kind, rooms, price"),
        (lambda t: t, "cost", "there is no column 'cost'; its columns are: size, colour, kind, rooms, price"),
        (
            lambda t: t.assign(size=t["size"].where(t.index != 3), colour=t["colour"].where(t.index != 5)),
            "price",
            r"values are missing in size \(1\): row 4 \(line 5\)",
        ),
        (lambda t: t.assign(name=[f"n{i % 101}" for i in range(len(t))]), "price", "column 'name' has 101 different"),
        (lambda t: t.assign(kind=["cow"] + ["cat"] * (len(t) - 1)), "kind", "class 'cow' has one row"),
        (lambda t: t.assign(kind="cat"), "kind", "at least two classes, but there is only 'cat'"),
        (lambda t: t.assign(size=t["size"].where(t.index > 1, np.inf)), "price", "'inf' in row 1 .line 2., 'inf' in"),
        (lambda t: t.head(3), "price", "at least 4 rows and 2 columns are needed, but it has 3 and 5"),
        (lambda t: t[["price"]], "price", "it has 202 and 1"),
    ],
)
def test_csv_refuses(tmp_path: Path, change: Any, target: str | None, message: str) -> None:
    """Proves that each fault of the table is named together with the file and, where it helps, its columns."""
    change(table(rows=202)).to_csv(tmp_path / "bad.csv", index=False)
    with pytest.raises(ValueError, match=message) as caught:
        data.load(tmp_path / "bad.csv", target=target)
    assert "bad.csv" in str(caught.value)


def test_csv_refuses_an_empty_file(tmp_path: Path) -> None:
    """Proves that a file without a header line is refused with its name."""
    (tmp_path / "bad.csv").touch()
    with pytest.raises(ValueError, match="bad.csv"):
        data.load(tmp_path / "bad.csv", target="price")


def test_image_folder_refuses(tmp_path: Path) -> None:
    """Proves that a lone part, differing classes, a folder without classes and a file that is no image are refused."""
    save_images(tmp_path / "one" / "train", {"blue": (0, 0, 255)})
    with pytest.raises(ValueError, match="only the folder 'train'"):
        data.load(tmp_path / "one")
    save_images(tmp_path / "one" / "test", {"red": (0, 0, 255)})
    with pytest.raises(ValueError, match="only one of 'train' and 'test' has class 'blue'"):
        data.load(tmp_path / "one")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty"):
        data.load(tmp_path / "empty")
    save_images(tmp_path / "broken", {"blue": (0, 0, 255), "red": (255, 0, 0)})
    (tmp_path / "broken" / "blue" / "0.png").write_text("no image")
    with pytest.raises(ValueError, match="0.png' is not an image, or is damaged"):
        data.load(tmp_path / "broken")


def test_load_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    """Proves that a missing file, an unknown kind of file and a target without columns are refused."""
    with pytest.raises(FileNotFoundError, match="'digit' is neither built in, .* nor a file or folder"):
        data.load("digit")
    (tmp_path / "table.parquet").touch()
    with pytest.raises(ValueError, match=r"expected an .npz file, a .csv file or a folder of images"):
        data.load(tmp_path / "table.parquet")
    with pytest.raises(ValueError, match=r"a target column \('price'\) is for a .csv file"):
        data.load("digits", target="price")
