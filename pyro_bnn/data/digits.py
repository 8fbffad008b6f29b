"""The handwritten digits that come with scikit-learn."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pyro_bnn.data.encoding import ArrayForm, Encoding
from pyro_bnn.data.task import Task


def digits() -> Task:
    """Handwritten digits, ``[N, 1, 8, 8]`` with values in [0, 1]: 1,257 for training and 540 for testing.

    The split is fixed and stratified. The out-of-distribution inputs are 540 grey 8 x 8 patches of the two photographs
    that come with scikit-learn, which are first shrunk by a factor of eight so that a patch shows structure.

    Source: `sklearn.datasets.load_digits`, `sklearn.datasets.load_sample_images`.
    """
    from sklearn.datasets import load_digits  # takes a second to import
    from sklearn.model_selection import train_test_split

    raw = load_digits()
    x = torch.from_numpy(raw.images).float().unsqueeze(1) / 16
    y = torch.from_numpy(raw.target).long()
    train, test = train_test_split(np.arange(len(y)), test_size=540, stratify=raw.target, random_state=0)
    form = ArrayForm("float32", 1.0, 0.0, 1.0, (1, 8, 8))
    encoding = Encoding(classes=tuple(map(str, raw.target_names)), array=form)
    return Task("digits", x[train], y[train], x[test], y[test], encoding, x_ood=_photograph_patches())


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
