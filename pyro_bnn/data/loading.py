"""From a name or a path to data, whatever kind of file it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from pyro_bnn.data.arrays import from_npz, new_rows
from pyro_bnn.data.digits import digits
from pyro_bnn.data.encoding import Encoding
from pyro_bnn.data.images import IMAGE_SIZE, from_image_folder, new_images
from pyro_bnn.data.tables import from_csv, inputs_of_table, read_table
from pyro_bnn.data.task import Task, TaskKind, listed, reading


def load(
    spec: str | Path,
    target: str | None = None,
    encoding: Encoding | None = None,
    size: int = IMAGE_SIZE,
    *,
    task: TaskKind | None = None,
    drop: Sequence[str] = (),
    split: str | float | None = None,
    category: Sequence[str] = (),
    impute: bool = False,
) -> Task:
    """Reads ``"digits"``, an ``.npz`` file, a ``.csv`` file or a folder of images.

    :param target: the column of a ``.csv`` file that is to be predicted.
    :param encoding: that of an earlier task, by which this one is read; without it, it is learned from the training
        rows, and ``task``, ``category`` and ``impute`` say what cannot be known from the values.
    :param size: of images in a folder, in pixels.
    :param task, drop, split, category, impute: see :func:`from_csv`; ``task`` goes with ``.npz`` too, ``split`` with a
        folder of images, the others with ``.csv`` alone.
    :raises FileNotFoundError: when there is nothing at that path.
    :raises ValueError: when the file is of a kind that is not known, its content is not what its loader asks for, or
        an argument does not go with it.
    """
    path = Path(spec)
    is_built_in = str(spec) == "digits"
    extension = "" if is_built_in or path.is_dir() else path.suffix.lower()
    if target is not None and path.suffix.lower() != ".csv":
        raise ValueError(f"a target column ({target!r}) goes with a .csv file, and {str(spec)!r} is not one")
    given = {"task": task, "drop": drop, "category": category, "impute": impute, "split": split}
    takes = {".csv": {*given}, ".npz": {"task"}}.get(
        extension, {"split"} if path.is_dir() and not is_built_in else set()
    )
    for name, value in given.items():
        if value and encoding is not None and name in ("task", "category", "impute"):
            raise ValueError(f"--{name} goes with training; {str(spec)!r} is read as the training data were")
        if value and name not in takes and (is_built_in or path.exists()):
            raise ValueError(f"--{name} does not go with {str(spec)!r}: it is for a .csv file" + _also(name))
    if is_built_in:
        return digits()
    if not path.exists():
        raise FileNotFoundError(f"no such data: {str(spec)!r} is neither the built-in 'digits' nor a file or folder")
    if path.is_dir():
        if isinstance(split, str):
            raise ValueError(f"--split {split} is no share; in a folder of images there are no columns")
        return from_image_folder(path, size, encoding, split=split)
    if extension == ".npz":
        return from_npz(path, encoding, task=task)
    if extension == ".csv":
        return from_csv(path, target, encoding, task=task, drop=drop, split=split, category=category, impute=impute)
    raise ValueError(f"cannot read {str(spec)!r}: expected an .npz file, a .csv file or a folder of images")


class NewRows(NamedTuple):
    """Inputs without targets.

    :param x: ``[N, ...]``, as the network takes them.
    :param names: of the files of images; empty for rows of a table or an array, which are known by their order.
    """

    x: Tensor
    names: list[str]


def load_inputs(path: str | Path, encoding: Encoding, size: int = IMAGE_SIZE, *, drop: Sequence[str] = ()) -> NewRows:
    """Reads rows without a target, any number of them, by the encoding of training.

    A ``.csv`` file has the columns of training, in any order; the target, and what training left out, may be there and
    are not looked at. An ``.npz`` file has one array, or one named ``x``; ``.npy`` is read too. Images lie in a folder
    or below it, or are one file.

    :param size: of images, in pixels: the last number of the shape that the network takes.
    :param drop: columns of this file that are no inputs.
    :raises FileNotFoundError: when there is nothing at that path.
    :raises ValueError: when the file is of another kind than that of training, or cannot be read as that was.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such data: there is nothing at {str(path)!r}")
    extension = "" if path.is_dir() else path.suffix.lower()
    if drop and extension != ".csv":
        raise ValueError(f"--drop goes with a .csv file, and {str(path)!r} is not one")
    if encoding.table:
        if extension != ".csv":
            raise ValueError(f"cannot use {str(path)!r}: the network was trained on a .csv file; give one")
        with reading(path):
            table = read_table(path)
            drop = (drop,) if isinstance(drop, str) else drop
            if unknown := [name for name in drop if name not in table.names]:
                raise ValueError(
                    f"there is no column {listed([repr(n) for n in unknown])}; its columns are: "
                    f"{', '.join(table.names)}"
                )
            return NewRows(inputs_of_table(table, encoding, ignored={*drop, *table.row_numbers()}), [])
    if extension in (".npz", ".npy"):
        return NewRows(new_rows(path, encoding), [])
    was_image = encoding.array is None or encoding.array.dtype == "image"
    if extension == ".csv" or encoding.x_mean or not was_image:
        raise ValueError(f"cannot use {str(path)!r}: the network was trained on arrays; give an .npz file")
    x, names = new_images(path, size)
    return NewRows(x, names)


def _also(name: str) -> str:
    return {"task": ", or an .npz file", "split": ", or a folder of classes"}.get(name, "")
