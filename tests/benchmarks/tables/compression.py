"""The section of codebooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tests.benchmarks.markdown import table
from tests.benchmarks.measure import read_results

TEXT = """\
## Codebooks of trained networks

`python -m tests.benchmarks.compression --network lenet300100`, also with `--network lenet5` and with `--data fashion
--network resnet`: from one trained network a mean field, under a prior of which nine tenths are narrow, and from that
mean field codes of its weights, all trained on; one seed. A `rate` makes small files, as
[weight_sharing.md](weight_sharing.md#small-files) has it: 32 codes at most, of biases too; tempered is under a
likelihood at temperature .5. The other rows have 256 codes and the defaults. Out of distribution is the other of MNIST
and Fashion-MNIST; bytes are those of everything but the headers of files (some 3 kB), and times smaller is against the
float32 of the trained network.
"""
TITLES = {
    "mnist lenet300100": "LeNet-300-100, MNIST",
    "mnist lenet5": "LeNet-5 without a ReLU after its convolutions, MNIST",
    "fashion resnet": "A small ResNet, Fashion-MNIST",
}
#: ``{key: (title, decimal places)}``
COLUMNS = {
    "accuracy": ("accuracy", 4),
    "nll": ("NLL", 4),
    "ece": ("ECE", 4),
    "ood_auroc": ("OOD AUROC", 3),
    "trainable": ("trained numbers", 0),
    "bytes": ("bytes", 0),
    "ratio": ("times smaller", 1),
}
NAMES = {
    "deterministic": "deterministic",
    "mean-field": "mean field",
    "mean-field around the network": "mean field, prior around the network",
    **{f"frontier {rate}": f"`rate={rate}`" for rate in ("0.05", "0.2", "0.5", "1")},
    "cold mean-field": "mean field, tempered",
    **{f"cold frontier {rate}": f"tempered, `rate={rate}`" for rate in ("0.2", "0.5", "1")},
    "codebook": "codebook",
    "codebook frozen": "codebook, as converted",
    "codebook by the divergence": "codebook, by the divergence",
    "codebook as its own prior": "codebook as its own prior",
    "mixture": "mixture",
    "shared": "shared values",
}


def section() -> list[str]:
    found = read_results("compression")
    parts = []
    for key, title in TITLES.items():
        rows = {row["name"]: row for row in found.get("rows", []) if f"{row['data']} {row['network']}" == key}
        if rows:
            images = found["settings"][key]["images"]
            parts += [f"**{title}** ({images:,} training images)", of_network(rows)]
    return [TEXT, *parts] if parts else []


def of_network(rows: Mapping[str, Mapping[str, Any]]) -> str:
    lines: list[Sequence[str]] = [
        [label, *(f"{rows[name][key]:,.{places}f}" for key, (_, places) in COLUMNS.items())]
        for name, label in NAMES.items()
        if name in rows
    ]
    return table(["", *(title for title, _ in COLUMNS.values())], lines)
