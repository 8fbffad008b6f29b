"""Runs the comparison: ``python -m tests.benchmarks.uci``, see the text of the package."""

from __future__ import annotations

import argparse
import warnings

import torch

import tests.benchmarks.uci as package
from tests.benchmarks.datasets import uci, uci_splits
from tests.benchmarks.uci.methods import METHODS
from tests.benchmarks.uci.rows import SPLITS, add, is_measured, measure


def main() -> None:
    parser = argparse.ArgumentParser(description=package.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = "files of the folder uci, a table of your own among them (default: the seven)"
    parser.add_argument("--tables", nargs="+", default=list(SPLITS), metavar="NAME", help=what)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="NAME")
    parser.add_argument("--splits", type=int, help="the first so many of each table; by default all")
    parser.add_argument("--gaps", action="store_true", help="leave out the middle third of each input instead")
    parser.add_argument("--quick", action="store_true", help="one split of yacht, a fiftieth of the steps, not written")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    tables = ["yacht"] if asked.quick else asked.tables
    parts = []
    for name in tables:
        kind, number = ("gap", uci(name, 0).x_train.shape[1]) if asked.gaps else ("split", uci_splits(name))
        parts += [(i, name, f"{kind} {i}") for i in range(number)[: 1 if asked.quick else asked.splits]]
    for _, name, part in sorted(parts, key=lambda one: one[0]):  # the first split of every table, then the second
        for method in asked.methods:
            if not asked.quick and is_measured(name, part, method):
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # chains that disagree are judged by their scores here
                row = measure(name, part, method, 0.02 if asked.quick else 1.0)
            shown = f"RMSE {row['rmse']:8.4f}  NLL {row['nll']:7.3f}  {row['seconds']:5.0f} s  {row['settings']}"
            print(f"{name:8} {part:8} {method:18} {shown}", flush=True)
            if not asked.quick:
                add(name, row)


if __name__ == "__main__":
    main()
