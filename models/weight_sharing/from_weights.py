"""Builds a codebook of weights with given means and standard deviations: the stages of Lin et al. up to training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_bnn.entry import checks
from pyro_bnn.models.weight_sharing import clustering
from pyro_bnn.models.weight_sharing.codebook import Between, Codebook, Codes, Outliers
from pyro_bnn.models.weight_sharing.deviations import rho_of


def codebook_from_weights(
    sites: Sequence[tuple[str, Sequence[int]]],
    loc: Tensor,
    scale: Tensor,
    codes: int = 256,
    *,
    outliers: float = 0.005,
    magnitude: float | None = None,
    gradient: Tensor | None = None,
    snr: float | None = None,
    smallest: int = 20,
    blend: float = 0.01,
    zero: bool = False,
    rate: float = 0.0,
    distance: clustering.Distance = "wasserstein",
    iterations: int = 20,
    seed: int | None = None,
) -> Codebook:
    """Builds a codebook by all stages up to training: outliers, EM, labels, weights between codes.

    :param sites: name and shape of each site; the weights are those of all sites in this order.
    :param loc, scale: mean and standard deviation of every weight, ``[n]``.
    :param codes: K, at most.
    :param outliers: largest fraction of the weights that become outliers. Up to half of it is taken by
        :func:`~pyro_bnn.models.weight_sharing.clustering.find_outliers`, with the rules ``magnitude``, ``gradient`` and
        ``snr``; the rest is for members of codes with at most ``smallest`` weights, the smallest codes first.
    :param blend: fraction of the other weights that two codes share.
    :param zero: whether one code has its mean fixed at 0.
    :param rate, distance: see :func:`~pyro_bnn.models.weight_sharing.clustering.quantise`.
    :param iterations, seed: see :func:`~pyro_bnn.models.weight_sharing.clustering.fit_plane`.
    :raises ValueError: for NaN, numbers out of range, or more codes than distinct weights.
    """
    if not bool((scale > 0).all()):  # NaN fails this too
        raise ValueError("standard deviations of weights must be positive and finite numbers")
    codes = checks.count("codes", codes)
    if codes > loc.numel():
        raise ValueError(f"codes={codes}, but there are only {loc.numel()} weights to share them: ask for fewer codes")
    if not bool(torch.isfinite(loc).all()):
        raise ValueError(f"{int((~torch.isfinite(loc)).sum())} means of weights are NaN or infinite")
    checks.fraction("outliers", outliers)
    checks.fraction("blend", blend)
    checks.optional(checks.positive, "magnitude", magnitude)
    checks.optional(checks.not_negative, "snr", snr)
    checks.count("smallest", smallest, 0)
    checks.not_negative("rate", rate)
    checks.count("iterations", iterations, 0)
    checks.seed("seed", seed)
    out = clustering.find_outliers(loc, scale, magnitude=magnitude, gradient=gradient, snr=snr, cap=outliers / 2)
    inside = _others(out, loc.numel())
    points = torch.stack([loc, scale], 1)[inside]
    points = points.to(torch.promote_types(loc.dtype, torch.float32))
    mixture = clustering.fit_plane(points, codes, zero=zero, iterations=iterations, seed=seed)
    mixture, labels = clustering.quantise(
        points, mixture, rate, distance=distance, zero=zero, iterations=3 if distance == "wasserstein" else 20
    )
    room = int(outliers * loc.numel() + 1e-6) - len(out)
    small = clustering.members_of_small_codes(labels, codes, smallest, room, zero)
    out = torch.cat([out, inside[small]]).sort().values
    stay = _others(small, len(points))
    inside, points, labels = inside[stay], points[stay], labels[stay]
    index, pair, alpha = clustering.between_codes(points, labels, mixture, blend)
    alpha = ((alpha * 255).round() / 255).to(loc.dtype)
    assignment = torch.zeros(loc.numel(), dtype=torch.int32, device=loc.device)
    assignment[inside] = labels
    centres = mixture.means.to(loc.dtype)
    book = Codebook(
        sites,
        assignment,
        Codes(centres[:, 0].clone(), rho_of(centres[:, 1]), mixture.covariances.to(loc.dtype)),
        Outliers(out, loc[out].clone(), rho_of(scale[out])),
        Between(inside[index], pair, alpha),
        zero=zero,
    )
    return book.compact()


def _others(index: Tensor, n: int) -> Tensor:
    """The sorted positions below n that are not in ``index``."""
    keep = torch.ones(n, dtype=torch.bool, device=index.device)
    keep[index] = False
    return keep.nonzero().flatten()
