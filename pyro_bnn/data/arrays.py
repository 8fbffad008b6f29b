"""Arrays in ``.npz`` files: tables without names, images, sequences."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from pyro_bnn.data.encoding import ArrayForm, Encoding, in_float32, moments, standardised
from pyro_bnn.data.targets import absent_classes, class_names, is_classification, labels, numbers
from pyro_bnn.data.task import Task, TaskKind, listed, reading

_CHANNELS = (1, 3, 4)
#: divisors of unsigned integers that are pixels
_UNITS = {"uint8": 255.0, "uint16": 65535.0}
#: names under which new rows are found in an archive
NEW_ROWS = ("x", "x_new", "x_test")


def from_npz(path: str | Path, encoding: Encoding | None = None, *, task: TaskKind | None = None) -> Task:
    """Reads ``x_train, y_train, x_test, y_test`` and, if present, ``x_ood`` from an ``.npz`` file.

    A table (``x`` with two dimensions) is standardised in float64. Unsigned integers of 8 or 16 bits in more dimensions
    are pixels, which are divided by 255 or 65535. Pixels ``[N, H, W]`` get a channel, and images with 1, 3 or 4
    channels in the last dimension become ``[N, C, H, W]``. Other arrays are used as they are. Test inputs must have the
    unit of the training inputs. :func:`~pyro_bnn.data.targets.is_classification` says which targets are classes.

    :param encoding: the encoding of an earlier task, with which this file is read; by default it is learned.
    :param task: whether targets are classes or numbers, if their values leave that open.
    :raises FileNotFoundError: when there is no such file.
    :raises ValueError: when it is not an ``.npz`` file, an array is missing, lengths, shapes or units do not fit, a
        value is not finite, or a test label does not occur in training.
    """
    with reading(path):
        arrays = _read(path)
        missing = [key for key in ("x_train", "y_train", "x_test", "y_test") if key not in arrays]
        if missing:
            raise ValueError(f"it has no {', '.join(missing)}; it has {', '.join(arrays) or 'no arrays'}")
        x: dict[str, np.ndarray] = {
            key: _inputs(key, arrays[key]) for key in ("x_train", "x_test", "x_ood") if key in arrays
        }
        y: dict[str, np.ndarray] = {key: _targets(key, arrays[key]) for key in ("y_train", "y_test")}
        for key, value in x.items():
            if value.shape[1:] != x["x_train"].shape[1:]:
                raise ValueError(f"a row of {key} is {value.shape[1:]}, a row of x_train {x['x_train'].shape[1:]}")
        for part in ("train", "test"):
            if len(x[f"x_{part}"]) != len(y[f"y_{part}"]):
                raise ValueError(f"x_{part} has {len(x[f'x_{part}'])} rows and y_{part} has {len(y[f'y_{part}'])}")
        if encoding is None:
            encoding = _learned(x["x_train"], y["y_train"], task)
        tensors: dict[str, torch.Tensor] = {
            key: torch.from_numpy(_encoded(key, value, encoding)) for key, value in x.items()
        }
        for key, value in y.items():
            known = encoding.classes
            found = labels(value, known, key) if known else numbers(value, encoding, key)
            tensors[key] = torch.from_numpy(found)
        return Task(
            name=Path(path).stem,
            encoding=encoding,
            notes=absent_classes(tensors["y_test"], encoding.classes),
            **tensors,
        )


def new_rows(path: str | Path, encoding: Encoding) -> torch.Tensor:
    """Inputs without targets, ``[N, ...]`` with N >= 0, read as the training inputs were.

    :param path: an ``.npz`` file with one array, or with an array named as in :data:`NEW_ROWS`; or an ``.npy`` file.
    :raises FileNotFoundError: when there is no such file.
    :raises ValueError: when it holds no such array, or values that training would not have accepted.
    """
    with reading(path):
        arrays = _read(path)
        key = next((name for name in NEW_ROWS if name in arrays), None)
        if key is None and len(arrays) == 1:
            (key,) = arrays
        if key is None:
            raise ValueError(
                f"it has {', '.join(arrays) or 'no arrays'}; expected one array, or the new rows under the name 'x'"
            )
        return torch.from_numpy(_encoded(key, _inputs(key, arrays[key], may_be_empty=True), encoding))


def form_of(x: np.ndarray) -> ArrayForm:
    """The form of arrays ``[N, ...]`` with more than two dimensions, channels first."""
    unit = _UNITS.get(x.dtype.name, 1.0)
    return ArrayForm(x.dtype.name, unit, float(x.min()), float(x.max()), tuple(x.shape[1:]))


def _read(path: str | Path) -> dict[str, np.ndarray]:
    try:
        with open(path, "rb") as file:
            if Path(path).suffix.lower() == ".npy":
                return {"x": np.load(file, allow_pickle=False)}
            with np.load(file, allow_pickle=False) as archive:
                return {key: archive[key] for key in archive.files}
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as error:  # numpy, zipfile and zlib raise errors of many kinds
        raise ValueError(f"it is not an .npz file of plain arrays ({error})") from error


def _inputs(key: str, x: np.ndarray, may_be_empty: bool = False) -> np.ndarray:
    """Checks inputs and puts the channels of images first; the dtype stays."""
    if x.ndim < 2 or not len(x) and not may_be_empty or x.dtype.kind not in "buif" or 0 in x.shape[1:]:
        raise ValueError(f"{key} must hold numbers, [N, ...] with N >= 1; it is {x.dtype} {x.shape}")
    if x.dtype.kind == "f":
        _require_finite(key, x)
        if x.dtype.itemsize > 8:
            x = x.astype(np.float64)
    if x.ndim == 3 and x.dtype.name in _UNITS:
        return x[:, None]
    if x.ndim == 4 and x.shape[-1] in _CHANNELS and x.shape[1] not in _CHANNELS:
        return x.transpose(0, 3, 1, 2)
    return x


def _targets(key: str, y: np.ndarray) -> np.ndarray:
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1 or y.dtype.kind not in "buifU":
        hint = "; of one-hot rows give y.argmax(1)" if y.ndim == 2 and y.dtype.kind in "buif" else ""
        raise ValueError(
            f"{key} must hold class labels or numbers to predict, [N] or [N, 1]; it is {y.dtype} {y.shape}{hint}"
        )
    if y.dtype.kind == "f":
        _require_finite(key, y)
    return y


def _require_finite(key: str, values: np.ndarray) -> None:
    bad = np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(1))
    if len(bad):
        raise ValueError(
            f"{key} holds NaN or infinite values in row {listed([str(row + 1) for row in bad])}; fill them in or leave "
            "those rows out"
        )


def _learned(x: np.ndarray, y: np.ndarray, task: TaskKind | None) -> Encoding:
    if x.ndim == 2:
        x_mean, x_scale = moments(_plain(x))
        array = None
    else:
        x_mean, x_scale, array = (), (), form_of(x)
    if is_classification(y, task, "y_train"):
        return Encoding((), x_mean, x_scale, class_names(y, "y_train"), array=array)
    (y_mean,), (y_scale,) = moments(y[:, None])
    return Encoding((), x_mean, x_scale, (), y_mean, y_scale, array=array)


def _plain(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64) if x.dtype.kind == "b" else x


def _encoded(key: str, x: np.ndarray, encoding: Encoding) -> np.ndarray:
    """Float32 inputs of the network, in the unit of the training inputs."""
    if encoding.table:
        raise ValueError("the network was trained on a .csv file with named columns; give a .csv file")
    if encoding.x_mean:
        if x.shape[1:] != (len(encoding.x_mean),):
            raise ValueError(f"a row of {key} is {x.shape[1:]}, expected {len(encoding.x_mean)} numbers")
        return standardised(list(_plain(x).T), encoding.x_mean, encoding.x_scale)
    form = encoding.array or ArrayForm(x.dtype.name, _UNITS.get(x.dtype.name, 1.0) if x.ndim > 2 else 1.0, 0, 0, ())
    if form.shape and tuple(x.shape[1:]) != form.shape:
        raise ValueError(f"a row of {key} has shape {x.shape[1:]}, the network takes {form.shape}")
    if x.size:
        _require_same_unit(key, x, form)
    return in_float32(x.astype(np.float64) / form.unit) if form.unit != 1.0 else in_float32(x)


def _require_same_unit(key: str, x: np.ndarray, form: ArrayForm) -> None:
    """Refuses inputs in another unit: bytes read as values in [0, 1], say, would all be far out of range."""
    low, high = float(x.min()), float(x.max())
    held = f"{key} is {x.dtype} from {low:g} to {high:g}, the training inputs were {form.dtype}"
    if form.unit != 1.0 and x.dtype.name != form.dtype:
        whole = low >= 0 and 1 < high <= form.unit and bool((x == np.floor(x)).all())
        if not whole or x.dtype.name in _UNITS:
            raise ValueError(f"{held} from 0 to {form.unit:g}: give it in the same dtype")
    elif form.unit == 1.0 and x.dtype.name in _UNITS and x.dtype.name != form.dtype:
        if (form.low, form.high) != (0.0, 0.0) or form.dtype.startswith("float"):
            raise ValueError(f"{held} from {form.low:g} to {form.high:g}: give it in the same dtype and unit")
    elif form.high > 100 and form.low >= 0 and 0 <= low and high <= 1 and bool((x != np.floor(x)).any()):
        raise ValueError(f"{held} from {form.low:g} to {form.high:g}: bring it to the same unit")
    elif form.dtype.startswith("float") and 0 <= form.low and 0 < form.high <= 1 and low >= 0 and 2 < high <= 65535:
        raise ValueError(f"{held} from {form.low:g} to {form.high:g}: bring it to the same unit")
