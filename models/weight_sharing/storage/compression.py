"""What a codebook saves: numbers to train, and bytes on disk."""

from __future__ import annotations

from typing import Any

import torch

from pyro_bnn.models.weight_sharing.codebook import Codebook
from pyro_bnn.models.weight_sharing.storage.packed_codebook import pack_codebook


def compression_report(book: Codebook) -> dict[str, Any]:
    """What a codebook takes, in numbers and bytes, against the two ways of storing its weights without one.

    ``weights`` N, ``codes`` K, ``outliers`` and ``between``; ``trainable`` numbers for the weights; ``bytes`` by part
    with their ``total``; ``of_mean_field`` and ``of_network``, the total divided by that of a mean-field posterior (of
    mean and deviation of every weight) and of the deterministic network; ``per_trainable`` N / trainable;
    ``label_bits`` of a stored label, and ``label_entropy``, what an ideal entropy coder takes for one.
    """
    n = len(book.labels)
    size = book.loc.element_size()
    parts = {name: value.numel() * value.element_size() for name, value in pack_codebook(book).items()}
    grouped = {
        "labels": sum(parts.get(name, 0) for name in ("labels", "label_states", "label_frequencies")),
        "codes": parts["loc"] + parts["rho"] + parts["spread"],
        "outliers": parts["outliers"] + parts["outlier_loc"] + parts["outlier_rho"],
        "between": parts["between"] + parts["second"] + parts["alpha"],
    }
    total = sum(grouped.values())
    p = torch.bincount(book.codes(), minlength=len(book)).double() / n
    trainable = 2 * len(book) + 2 * len(book.outliers) - int(book.zero)
    return {
        "weights": n,
        "codes": len(book),
        "outliers": len(book.outliers),
        "between": len(book.between),
        "trainable": trainable,
        "per_trainable": n / trainable,
        "bytes": grouped | {"total": total},
        "of_mean_field": total / (2 * size * n),
        "of_network": total / (size * n),
        "label_bits": 8 * grouped["labels"] / n,
        "label_entropy": float(torch.special.entr(p).sum() / torch.log(p.new_tensor(2.0))),
    }
