"""The handwritten digits that come with scikit-learn."""

from __future__ import annotations

import re

import numpy as np
import torch
from torch import Tensor

from pyro_bnn.data.encoding import ArrayForm, Encoding
from pyro_bnn.data.task import Task
from pyro_bnn.entry import checks

#: training images, and classes
TRAINING, CLASSES = 1257, 10


def digits(train_size: int = TRAINING) -> Task:
    """Handwritten digits, ``[N, 1, 8, 8]`` with values in [0, 1]: 1,257 for training and 540 for testing.

    The split is fixed and stratified. The out-of-distribution inputs are 540 grey 8 x 8 patches of the two photographs
    that come with scikit-learn, which are first shrunk by a factor of eight so that a patch shows structure.

    :param train_size: how many training images to take, as many of each digit, give or take one; the same ones each
        time, and all of them in a larger number. The test images stay as they are.
    :raises TypeError, ValueError: when it is not a whole number from 10 to 1,257.

    Source: `sklearn.datasets.load_digits`, `sklearn.datasets.load_sample_images`.
    """
    if not CLASSES <= checks.count("train_size", train_size) <= TRAINING:
        raise ValueError(
            f"train_size={train_size}: there are {TRAINING:,} training digits of {CLASSES} kinds; ask for {CLASSES} to "
            f"{TRAINING:,} of them, as 'digits-100' does"
        )
    from sklearn.datasets import load_digits  # takes a second to import
    from sklearn.model_selection import train_test_split

    raw = load_digits()
    x = torch.from_numpy(raw.images).float().unsqueeze(1) / 16
    y = torch.from_numpy(raw.target).long()
    train, test = train_test_split(np.arange(len(y)), test_size=540, stratify=raw.target, random_state=0)
    name = "digits"
    if train_size < TRAINING:
        name, train = f"digits-{train_size}", train[_balanced(raw.target[train])[:train_size]]
    form = ArrayForm("float32", 1.0, 0.0, 1.0, (1, 8, 8))
    encoding = Encoding(classes=tuple(map(str, raw.target_names)), array=form)
    return Task(name, x[train], y[train], x[test], y[test], encoding, x_ood=_photograph_patches())


def number_of_digits(name: str) -> int | None:
    """The training images that a name of built-in data asks for: ``"digits"`` all, ``"digits-100"`` a hundred.

    ``None`` for other names.
    """
    found = re.fullmatch(r"digits(?:-(\d+))?", name)
    return None if found is None else int(found[1] or TRAINING)


def _balanced(classes: np.ndarray) -> np.ndarray:
    """An order of rows in which the first of each class come first, then the second of each, and so on."""
    place = np.empty(len(classes), int)
    for label in np.unique(classes):
        (rows,) = np.nonzero(classes == label)
        place[rows] = np.arange(len(rows))
    return np.lexsort((classes, place))


def _photograph_patches() -> Tensor:
    from PIL import Image
    from sklearn.datasets import load_sample_images
    from sklearn.feature_extraction.image import extract_patches_2d

    patches = []
    for pixels in load_sample_images().images:
        photograph = Image.fromarray(pixels).convert("L")
        small = photograph.resize((photograph.width // 8, photograph.height // 8), Image.Resampling.BOX)
        patches.append(extract_patches_2d(np.asarray(small), (8, 8), max_patches=270, random_state=0))
    return torch.from_numpy(np.concatenate(patches)).float().unsqueeze(1) / 255
