"""Runs the comparison: ``python -m tests.benchmarks.images``, see the text of the package."""

from __future__ import annotations

import argparse
import warnings

import torch

import tests.benchmarks.images as package
from tests.benchmarks.images.methods import METHODS
from tests.benchmarks.images.rows import Study
from tests.benchmarks.images.tasks import TASKS

SHOWN = ("accuracy", "nll", "ece", "AUROC, notMNIST", "cNLL")


def main() -> None:
    parser = argparse.ArgumentParser(description=package.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=list(TASKS), default=list(TASKS), metavar="NAME")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=5, help="the first so many (default: 5)")
    parser.add_argument("--quick", action="store_true", help="a hundred images, a hundredth of the epochs, not written")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)
    for data in asked.data:
        study = Study(data, 0.01 if asked.quick else 1.0)
        for row in study.rows(asked.methods, list(range(1 if asked.quick else asked.seeds))):
            figures = "  ".join(f"{key} {row[key]:.4f}" for key in SHOWN)
            text = f"{figures}  {row['seconds of training']:.0f} s  {row['settings']}"
            print(f"{data:8} {row['method']:21} seed {row['seed']}: {text}", flush=True)


if __name__ == "__main__":
    main()
