"""A codebook on disk: labels in the bits they need, and sorted positions as gaps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_bnn.models.weight_sharing.codebook import Between, Codebook, Codes, Outliers
from pyro_bnn.models.weight_sharing.storage import entropy_coding, packing


def describe_codebook(book: Codebook) -> dict[str, object]:
    """What :func:`unpack_codebook` must know of a codebook beside its tensors, as JSON."""
    return {
        "sites": [[name, list(shape)] for name, shape in book.sites],
        "codes": len(book),
        "outliers": len(book.outliers),
        "outlier_bits": packing.pack_positions(book.outliers)[1],
        "between": len(book.between),
        "between_bits": packing.pack_positions(book.between)[1],
        "zero": book.zero,
        "units": book.units.tolist(),
    }


def pack_codebook(book: Codebook) -> dict[str, Tensor]:
    """The tensors of a codebook without anything dead (:meth:`Codebook.compact`), packed.

    Labels have a fixed width, or are entropy coded where that takes fewer bytes.
    """
    bits = packing.width(len(book))
    codes = book.codes()
    counts = torch.bincount(codes, minlength=len(book))
    labels = {"labels": packing.pack(codes, bits)}
    if int((counts > 0).sum()) <= 2**entropy_coding.BITS:
        freq = entropy_coding.frequencies(counts)
        size = entropy_coding.coded_bits(counts, freq) / 8 + 4 * len(freq) + 8 * (len(codes) / entropy_coding.LANE + 1)
        if size < len(labels["labels"]):
            stream, states = entropy_coding.encode(codes, freq)
            labels = {"labels": stream, "label_states": states, "label_frequencies": freq}
    return labels | {
        "loc": book.loc.detach(),
        "rho": book.rho.detach(),
        "spread": book.spread.flatten(1)[:, [0, 1, 3]],
        "outliers": packing.pack_positions(book.outliers)[0],
        "outlier_loc": book.outlier_loc.detach(),
        "outlier_rho": book.outlier_rho.detach(),
        "between": packing.pack_positions(book.between)[0],
        "second": packing.pack(book.pair[:, 1], bits),
        "alpha": (book.alpha * 255).round().to(torch.uint8),
    }


def unpack_codebook(description: dict[str, Any], tensors: dict[str, Tensor]) -> Codebook:
    """The codebook that :func:`pack_codebook` was given, on the device of the tensors.

    :raises ValueError: when tensors are missing, or do not agree with each other or the description.
    """
    names = ("loc", "rho", "spread", "labels", "outliers", "outlier_loc", "outlier_rho", "between", "second", "alpha")
    missing = [name for name in names if name not in tensors]
    if missing:
        raise ValueError(f"the packed codebook is damaged: {', '.join(missing)} is missing")
    k, o, e = (int(description[name]) for name in ("codes", "outliers", "between"))
    shapes = {"loc": (k,), "rho": (k,), "spread": (k, 3), "alpha": (e,), "outlier_loc": (o,), "outlier_rho": (o,)}
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(
                f"the packed codebook is damaged: {name} has shape {tuple(tensors[name].shape)}, expected {shape}"
            )
    sites = [(name, torch.Size(shape)) for name, shape in description["sites"]]
    n, bits = sum(shape.numel() for _, shape in sites), packing.width(k)
    if "label_frequencies" in tensors:
        freq = tensors["label_frequencies"]
        if freq.shape != (k,) or "label_states" not in tensors:
            raise ValueError(
                f"the packed codebook is damaged: the frequencies of its labels are not those of {k} codes"
            )
        codes = entropy_coding.decode(tensors["labels"], tensors["label_states"], freq, n)
    else:
        codes = packing.unpack(tensors["labels"], bits, n)
    outliers = packing.unpack_positions(tensors["outliers"], int(description["outlier_bits"]), o)
    between = packing.unpack_positions(tensors["between"], int(description["between_bits"]), e)
    if e and int(between[-1]) >= n:
        raise ValueError(f"the packed codebook is damaged: position {int(between[-1])} of {n} weights")
    a, b, c = tensors["spread"].unbind(1)
    spread = torch.stack([a, b, b, c], 1).view(k, 2, 2)
    pair = torch.stack([codes[between], packing.unpack(tensors["second"], bits, e)], 1)
    return Codebook(
        sites,
        codes,
        Codes(tensors["loc"], tensors["rho"], spread),
        Outliers(outliers, tensors["outlier_loc"], tensors["outlier_rho"]),
        Between(between, pair, tensors["alpha"].to(tensors["loc"].dtype) / 255),
        zero=bool(description["zero"]),
        units=torch.tensor(description["units"], dtype=torch.float64, device=spread.device),
    )
