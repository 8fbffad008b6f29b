"""Loads data from a name or a path, whatever kind of file it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from pyro_bnn.data.arrays import from_npz, new_rows
from pyro_bnn.data.digits import digits, number_of_digits
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

    :param spec: ``"digits"``, ``"digits-100"`` for a hundred training images of them, or the path of a file or folder.
    :param target: the target column of a ``.csv`` file.
    :param encoding: the encoding of an earlier task, with which this file is read. By default it is learned from the
        training rows; ``task``, ``category`` and ``impute`` then say what the values leave open.
    :param size: width and height of images from a folder, in pixels.
    :param task, drop, split, category, impute: see :func:`from_csv`. ``task`` is also for ``.npz`` files and ``split``
        also for folders of images; the others are for ``.csv`` files only.
    :raises FileNotFoundError: when there is nothing at that path.
    :raises ValueError: when the kind of file is unknown, its content is not valid, or an argument does not apply to it.
    """
    path = Path(spec)
    built_in = number_of_digits(str(spec))
    is_built_in = built_in is not None
    extension = "" if is_built_in or path.is_dir() else path.suffix.lower()
    if target is not None and path.suffix.lower() != ".csv":
        raise ValueError(f"a target column ({target!r}) is for a .csv file, and {str(spec)!r} is not one")
    given = {"task": task, "drop": drop, "category": category, "impute": impute, "split": split}
    takes = {".csv": {*given}, ".npz": {"task"}}.get(
        extension, {"split"} if path.is_dir() and not is_built_in else set()
    )
    for name, value in given.items():
        if value and encoding is not None and name in ("task", "category", "impute"):
            raise ValueError(f"--{name} is for training; {str(spec)!r} is read as the training data were")
        if value and name not in takes and (is_built_in or path.exists()):
            raise ValueError(f"--{name} does not apply to {str(spec)!r}: it is for a .csv file" + _also(name))
    if built_in is not None:
        return digits(built_in)
    if not path.exists():
        raise FileNotFoundError(
            f"no such data: {str(spec)!r} is neither built in, as 'digits' and 'digits-100' are, nor a file or folder"
        )
    if path.is_dir():
        if isinstance(split, str):
            raise ValueError(f"--split {split}: expected a share in (0, 1), as a folder of images has no columns")
        return from_image_folder(path, size, encoding, split=split)
    if extension == ".npz":
        return from_npz(path, encoding, task=task)
    if extension == ".csv":
        return from_csv(path, target, encoding, task=task, drop=drop, split=split, category=category, impute=impute)
    raise ValueError(f"cannot read {str(spec)!r}: expected an .npz file, a .csv file or a folder of images")


class NewRows(NamedTuple):
    """Inputs without targets.

    :param x: inputs of the network, ``[N, ...]``.
    :param names: file names of images; empty for rows of a table or an array.
    """

    x: Tensor
    names: list[str]


def load_inputs(path: str | Path, encoding: Encoding, size: int = IMAGE_SIZE, *, drop: Sequence[str] = ()) -> NewRows:
    """Reads any number of rows without targets, with the encoding of the training data.

    A ``.csv`` file must have the columns of training, in any order; the target and columns that training left out may
    be there and are ignored. An ``.npz`` file must hold a single array, or one named ``x``, ``x_new`` or ``x_test``;
    an ``.npy`` file is read too. Images are in a folder or its subfolders, or in a single file.

    :param encoding: ``Task.encoding`` of the training data.
    :param size: width and height of images, in pixels: the last number of the input shape of the network.
    :param drop: columns of this file that are not inputs.
    :raises FileNotFoundError: when there is nothing at that path.
    :raises ValueError: when the file is of another kind than that of training, or cannot be read in the same way.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such data: there is nothing at {str(path)!r}")
    extension = "" if path.is_dir() else path.suffix.lower()
    if drop and extension != ".csv":
        raise ValueError(f"--drop is for a .csv file, and {str(path)!r} is not one")
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
