"""Data as tensors: the digits that come with scikit-learn, and the user's own arrays, tables and images."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from sklearn.feature_extraction.image import extract_patches_2d
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision import transforms
from torchvision.datasets import ImageFolder

TEST_SHARE = 0.3
IMAGE_SIZE = 32
MAX_INTEGER_CLASSES = 20
MAX_CATEGORIES = 100


@dataclass(frozen=True)
class Encoding:
    """How raw values became tensors: learned from the training rows alone, kept so that new data are read alike.

    :param columns: inputs of a table, strings already one-hot as ``"column=value"``; empty for arrays and images.
    :param x_mean: mean of each input of a table; empty where inputs are used as they are.
    :param x_scale: standard deviation of each input of a table.
    :param classes: names of the classes in the order of their labels; empty for regression.
    :param y_mean: mean of a regression target, in the target's own unit.
    :param y_scale: standard deviation of a regression target, in the target's own unit.
    """

    columns: tuple[str, ...] = ()
    x_mean: tuple[float, ...] = ()
    x_scale: tuple[float, ...] = ()
    classes: tuple[str, ...] = ()
    y_mean: float = 0.0
    y_scale: float = 1.0

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> "Encoding":
        """The inverse of ``dataclasses.asdict`` after a trip through JSON, where tuples become lists."""
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**fields)


@dataclass(frozen=True, eq=False)
class Task:
    """Training and test data of one problem.

    :param name: what to call it in tables and folder names.
    :param x_train: inputs, ``[N, ...]``, float32; ``x_test`` alike.
    :param y_train: class labels, ``[N]``, int64; or regression targets, ``[N]``, float32, counted from
        ``encoding.y_mean`` in units of ``encoding.y_scale``; ``y_test`` alike.
    :param encoding: how the raw values became these tensors.
    :param x_ood: inputs from elsewhere, of the same shape and range, that a good posterior is uncertain about.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    encoding: Encoding
    x_ood: Tensor | None = None

    @property
    def kind(self) -> Literal["classification", "regression"]:
        return "classification" if self.encoding.classes else "regression"

    @property
    def out_features(self) -> int:
        """How many numbers a network has to return for a row: the number of classes, or 1 for regression."""
        return len(self.encoding.classes) or 1


def load_task(
    spec: str | Path, target: str | None = None, encoding: Encoding | None = None, size: int = IMAGE_SIZE
) -> Task:
    """Reads ``"digits"``, an ``.npz`` file, a ``.csv`` file or a folder of images.

    A ``.csv`` file needs ``target``, the name of the column to predict; nothing else takes it. ``encoding`` is that of
    an earlier task; without it, it is learned from the training rows. ``size`` is that of images in a folder.

    :raises FileNotFoundError: when there is nothing at that path.
    :raises ValueError: when the file is of a kind that is not known, or its content is not what its loader asks for.
    """
    path = Path(spec)
    extension = path.suffix.lower()
    if target is not None and extension != ".csv":
        raise ValueError(f"a target column ({target!r}) goes with a .csv file, and {str(spec)!r} is not one")
    if str(spec) == "digits":
        return digits()
    if not path.exists():
        raise FileNotFoundError(f"no such data: {str(spec)!r} is neither the built-in 'digits' nor a file or folder")
    if path.is_dir():
        return from_image_folder(path, size, encoding)
    if extension == ".npz":
        return from_npz(path, encoding=encoding)
    if extension == ".csv":
        return from_csv(path, target, encoding=encoding)
    raise ValueError(f"cannot read {str(spec)!r}: expected an .npz file, a .csv file or a folder of images")


def digits() -> Task:
    """Handwritten digits, 1 x 8 x 8 with values in [0, 1]: 1,257 for training and 540 for testing.

    The split is fixed and stratified. Out of distribution are 540 grey 8 x 8 patches of the two photographs that come
    with scikit-learn, made eight times smaller first so that a patch shows structure.

    Source: `sklearn.datasets.load_digits`, `sklearn.datasets.load_sample_images`.
    """
    raw = load_digits()
    x = torch.from_numpy(raw.images).float().unsqueeze(1) / 16
    y = torch.from_numpy(raw.target).long()
    train, test = train_test_split(np.arange(len(y)), test_size=540, stratify=raw.target, random_state=0)
    encoding = Encoding(classes=tuple(map(str, raw.target_names)))
    return Task("digits", x[train], y[train], x[test], y[test], encoding, x_ood=_photograph_patches())


def _photograph_patches() -> Tensor:
    patches = []
    for pixels in load_sample_images().images:
        photograph = Image.fromarray(pixels).convert("L")
        small = photograph.resize((photograph.width // 8, photograph.height // 8), Image.Resampling.BOX)
        patches.append(extract_patches_2d(np.asarray(small), (8, 8), max_patches=270, random_state=0))
    return torch.from_numpy(np.concatenate(patches)).float().unsqueeze(1) / 255


def from_npz(path: str | Path, encoding: Encoding | None = None) -> Task:
    """Reads ``x_train, y_train, x_test, y_test`` and, where it is there, ``x_ood`` from an ``.npz`` file.

    Labels that are whole numbers, booleans or strings make a classification, floating-point targets a regression
    whose targets are standardised. A table (``x`` of two dimensions) is standardised too. Bytes are images: they are
    scaled to [0, 1], ``[N, H, W]`` gets a channel and ``[N, H, W, 1 or 3]`` becomes ``[N, C, H, W]``. Other arrays
    are used as they are.

    :raises FileNotFoundError: when there is no such file.
    :raises ValueError: when it is not an ``.npz`` file, an array is missing, lengths or shapes do not fit, a value is
        not finite, or a test label does not occur in training.
    """
    with _reading(path):
        try:
            with np.load(path, allow_pickle=False) as archive:
                arrays = {key: archive[key] for key in archive.files}
        except FileNotFoundError:
            raise
        except Exception as error:  # numpy, zipfile and zlib raise errors of many kinds
            raise ValueError(f"it is not an .npz file of plain arrays ({error})") from error
        missing = [key for key in ("x_train", "y_train", "x_test", "y_test") if key not in arrays]
        if missing:
            raise ValueError(f"it lacks {', '.join(missing)}; it has {', '.join(arrays) or 'no arrays'}")
        x = {key: _inputs(key, arrays[key]) for key in ("x_train", "x_test", "x_ood") if key in arrays}
        y = {key: _targets(key, arrays[key]) for key in ("y_train", "y_test")}
        for key, value in x.items():
            if value.shape[1:] != x["x_train"].shape[1:]:
                raise ValueError(f"a row of {key} is {value.shape[1:]}, a row of x_train {x['x_train'].shape[1:]}")
        for part in ("train", "test"):
            if len(x[f"x_{part}"]) != len(y[f"y_{part}"]):
                raise ValueError(f"x_{part} has {len(x[f'x_{part}'])} rows and y_{part} has {len(y[f'y_{part}'])}")
        return _task(path, x | y, encoding)


def _inputs(key: str, x: np.ndarray) -> np.ndarray:
    if x.ndim < 2 or not len(x) or x.dtype.kind not in "buif":
        raise ValueError(f"{key} must hold numbers, [N, ...] with N >= 1; it is {x.dtype} {x.shape}")
    if x.dtype != np.uint8 or x.ndim == 2:
        return x.astype(np.float32)
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[-1] in (1, 3) and x.shape[1] not in (1, 3):
        x = x.transpose(0, 3, 1, 2)
    return x.astype(np.float32) / 255


def _targets(key: str, y: np.ndarray) -> np.ndarray:
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1 or y.dtype.kind not in "buifU":
        raise ValueError(f"{key} must be [N] or [N, 1], class labels or numbers to predict; it is {y.dtype} {y.shape}")
    return y


def from_csv(path: str | Path, target: str | None, encoding: Encoding | None = None) -> Task:
    """Reads a table with a header line, whose column ``target`` is to be predicted from all others.

    A fixed 30 % of the rows are for testing. Numbers are standardised with the training rows' mean and standard
    deviation, strings become one-hot columns. A target of strings, booleans or at most 20 different whole numbers
    makes a classification (split by strata), any other a regression.

    :raises FileNotFoundError: when there is no such file.
    :raises ValueError: when it is not a table, there is no such column, values are missing, a column holds more than
        100 different strings, or a class has too few rows.
    """
    with _reading(path):
        frame = pd.read_csv(path)
        columns = f"its columns are: {', '.join(map(str, frame.columns))}"
        if target is None:
            raise ValueError(f"a target column is needed (--target); {columns}")
        if target not in frame.columns:
            raise ValueError(f"there is no column {target!r}; {columns}")
        if frame.shape[0] < 4 or frame.shape[1] < 2:
            raise ValueError(f"at least 4 rows and 2 columns are needed, it has {frame.shape[0]} and {frame.shape[1]}")
        gaps = frame.isna().sum()
        if gaps.any():
            listed = ", ".join(f"{name} ({count})" for name, count in gaps[gaps > 0].items())
            raise ValueError(f"values are missing in {listed}; fill them in or leave those rows or columns out")
        x = _one_hot(frame.drop(columns=target), encoding)
        y = frame[target]
        if _is_label(y) if encoding is None else encoding.classes:
            y = y.to_numpy(y.dtype if pd.api.types.is_numeric_dtype(y) else str)
            train, test = _split(len(y), strata=y)
        else:
            y = y.to_numpy(np.float64)
            train, test = _split(len(y))
        values = x.to_numpy(np.float32)
        arrays = {"x_train": values[train], "y_train": y[train], "x_test": values[test], "y_test": y[test]}
        return _task(path, arrays, encoding, tuple(x.columns))


def _is_label(y: pd.Series) -> bool:
    if not pd.api.types.is_numeric_dtype(y) or pd.api.types.is_bool_dtype(y):
        return True
    return pd.api.types.is_integer_dtype(y) and y.nunique() <= MAX_INTEGER_CLASSES


def _one_hot(frame: pd.DataFrame, encoding: Encoding | None) -> pd.DataFrame:
    strings = [name for name in frame.columns if not pd.api.types.is_numeric_dtype(frame[name])]
    for name in strings:
        if (count := frame[name].nunique()) > MAX_CATEGORIES:
            raise ValueError(
                f"column {name!r} has {count} different strings, more than the {MAX_CATEGORIES} that become one input "
                "each; leave it out or turn it into numbers"
            )
    x = pd.get_dummies(frame, columns=strings, prefix_sep="=", dtype=float)
    if encoding is None:
        return x
    for column in encoding.columns:
        if column not in x and column.partition("=")[0] not in strings:
            raise ValueError(f"column {column!r}, on which the network was trained, is not there")
    return x.reindex(columns=list(encoding.columns), fill_value=0.0)


def from_image_folder(path: str | Path, size: int = IMAGE_SIZE, encoding: Encoding | None = None) -> Task:
    """Reads images from ``train/<class>/`` and ``test/<class>/``, or from ``<class>/`` alone.

    In the second case a fixed 30 % of each class are for testing. Images become RGB, ``size`` x ``size`` pixels, with
    values in [0, 1].

    :raises FileNotFoundError: when there is no folder of a class, or one without images.
    :raises ValueError: when one of ``train/`` and ``test/`` is missing, they hold different classes, or a file is not
        an image.

    Source: `torchvision.datasets.ImageFolder`.
    """
    path = Path(path)
    with _reading(path):
        parts = [part for part in ("train", "test") if (path / part).is_dir()]
        if len(parts) == 1:
            raise ValueError(f"it has a folder {parts[0]!r} alone; it needs both 'train' and 'test', or neither")
        if parts:
            (x_train, y_train), (x_test, y_test) = (_images(path / part, size) for part in parts)
            if differing := set(y_train) ^ set(y_test):
                raise ValueError(f"only one of 'train' and 'test' has class {str(min(differing))!r}")
        else:
            x, y = _images(path, size)
            train, test = _split(len(y), strata=y)
            x_train, y_train, x_test, y_test = x[train], y[train], x[test], y[test]
        return _task(path, {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}, encoding)


def _images(path: Path, size: int) -> tuple[np.ndarray, np.ndarray]:
    folder = ImageFolder(str(path), transforms.Compose([transforms.Resize((size, size)), transforms.ToTensor()]))
    try:
        images, labels = zip(*folder, strict=True)
    except OSError as error:
        raise ValueError(str(error)) from error
    return torch.stack(images).numpy(), np.asarray(folder.classes)[list(labels)]


@contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    """Adds the file's name to what is wrong with its content."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"cannot use {str(path)!r}: {error}") from error


def _split(rows: int, strata: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    if strata is not None:
        classes, counts = np.unique(strata, return_counts=True)
        if counts.min() < 2:
            raise ValueError(f"class {str(classes[counts.argmin()])!r} has one row; training and testing need one each")
    train, test = train_test_split(np.arange(rows), test_size=TEST_SHARE, stratify=strata, random_state=0)
    return train, test


def _task(
    path: str | Path, arrays: dict[str, np.ndarray], encoding: Encoding | None, columns: tuple[str, ...] = ()
) -> Task:
    """Encodes ``x_train, y_train, x_test, y_test`` and perhaps ``x_ood``; whatever in y is not a float is a label."""
    for key, values in arrays.items():
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise ValueError(f"{key} holds NaN or infinite values; fill them in or leave those rows out")
    if encoding is None:
        encoding = _encoding(arrays["x_train"], arrays["y_train"], columns)
    tensors = {}
    for key, values in arrays.items():
        if key.startswith("y") and encoding.classes:
            tensors[key] = torch.tensor(_label_numbers(values, encoding.classes))
            continue
        if key.startswith("y"):
            if values.dtype.kind != "f":
                raise ValueError(f"{key} holds labels ({values.dtype}), numbers to predict were expected")
            values = (values - encoding.y_mean) / encoding.y_scale
        elif encoding.x_mean:
            if values.shape[1:] != (len(encoding.x_mean),):
                raise ValueError(f"a row of {key} is {values.shape[1:]}, expected {len(encoding.x_mean)} numbers")
            values = (values - np.asarray(encoding.x_mean)) / np.asarray(encoding.x_scale)
        tensors[key] = torch.tensor(values, dtype=torch.float32)
    return Task(name=Path(path).stem, encoding=encoding, **tensors)


def _encoding(x: np.ndarray, y: np.ndarray, columns: tuple[str, ...]) -> Encoding:
    x_mean, x_scale = _moments(x) if x.ndim == 2 else ((), ())
    if y.dtype.kind == "f":
        (y_mean,), (y_scale,) = _moments(y[:, None])
        return Encoding(columns, x_mean, x_scale, (), y_mean, y_scale)
    classes = tuple(map(str, np.unique(y)))
    if len(classes) < 2:
        raise ValueError(f"a classification needs at least two classes, there is {classes[0]!r} alone")
    return Encoding(columns, x_mean, x_scale, classes)


def _moments(values: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each column; 1 in place of a deviation that is nothing but rounding."""
    mean = values.mean(0, dtype=np.float64)
    scale = values.std(0, dtype=np.float64)
    scale = np.where(scale <= 1e-7 * np.abs(mean), 1.0, scale)
    return tuple(mean.tolist()), tuple(scale.tolist())


def _label_numbers(y: np.ndarray, classes: tuple[str, ...]) -> np.ndarray:
    numbers = {name: number for number, name in enumerate(classes)}
    names = list(map(str, y))
    if unknown := set(names) - numbers.keys():
        raise ValueError(f"class {min(unknown)!r} is not among the training classes {', '.join(classes)}")
    return np.asarray([numbers[name] for name in names], dtype=np.int64)
