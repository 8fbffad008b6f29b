"""Merges codes that are close: the 2-Wasserstein distance of Gaussians in the plane, and greedy merging."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from pyro_bnn.models.weight_sharing.plane import PlaneMixture

MergeRule = Literal["moment", "average", "w2"]


def wasserstein(means: Tensor, covariances: Tensor, other_means: Tensor, other_covariances: Tensor) -> Tensor:
    """Squared 2-Wasserstein distance of Gaussians in the plane, in closed form; shapes broadcast.

    ``|c1 - c2|^2 + tr S1 + tr S2 - 2 sqrt(tr(S1 S2) + 2 sqrt(det S1 det S2))``: the trace of the square root of a 2 x 2
    matrix follows from its trace and determinant.

    :param means: ``[..., 2]``.
    :param covariances: ``[..., 2, 2]``, positive definite.
    """
    product = (covariances * other_covariances.transpose(-1, -2)).sum((-2, -1))
    dets = _det(covariances).clamp_min(0) * _det(other_covariances).clamp_min(0)
    inner = (product + 2 * dets.sqrt()).clamp_min(0).sqrt()
    bures = _trace(covariances) + _trace(other_covariances) - 2 * inner
    return (means - other_means).square().sum(-1) + bures.clamp_min(0)


def _trace(matrix: Tensor) -> Tensor:
    return matrix[..., 0, 0] + matrix[..., 1, 1]


def _det(matrix: Tensor) -> Tensor:
    return matrix[..., 0, 0] * matrix[..., 1, 1] - matrix[..., 0, 1] * matrix[..., 1, 0]


def root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a 2 x 2 matrix, ``(S + sqrt(det S) I) / sqrt(tr S + 2 sqrt(det S))``."""
    det = _det(matrix).clamp_min(0).sqrt()
    eye = torch.eye(2, dtype=matrix.dtype, device=matrix.device)
    return (matrix + det[..., None, None] * eye) / (_trace(matrix) + 2 * det).sqrt()[..., None, None]


def merge_pair(first: PlaneMixture, second: PlaneMixture, how: MergeRule = "moment") -> PlaneMixture:
    """Merges each pair of codes, ``[...]`` of both, into one whose weight is their sum. With t = pi_2 / (pi_1 + pi_2):

    ``"moment"``   mean and covariance of the two as a mixture, ``sum_j t_j (S_j + (c_j - c)(c_j - c)^T)``;
    ``"average"``  the plain averages of means and of covariances, whatever the weights (Lin et al.);
    ``"w2"``       the point t on the Wasserstein geodesic, ``M S1 M`` with ``M = (1 - t) I + t T`` and
    ``T = S1^-1/2 (S1^1/2 S2 S1^1/2)^1/2 S1^-1/2``.
    """
    total = first.weights + second.weights
    t = (second.weights / total)[..., None] if how != "average" else torch.full_like(total, 0.5)[..., None]
    means = torch.lerp(first.means, second.means, t)
    s1, s2, t = first.covariances, second.covariances, t[..., None]
    if how == "w2":
        half = root(s1)
        inverse = torch.linalg.inv(half)
        transport = inverse @ root(half @ s2 @ half) @ inverse
        map_ = torch.lerp(torch.eye(2, dtype=s1.dtype, device=s1.device).expand_as(transport), transport, t)
        return PlaneMixture(total, means, map_ @ s1 @ map_)
    covariances = torch.lerp(s1, s2, t)
    if how == "moment":
        d = second.means - first.means
        covariances = covariances + t * (1 - t) * d[..., :, None] * d[..., None, :]
    return PlaneMixture(total, means, covariances)


def neighbour_distance(mixture: PlaneMixture) -> Tensor:
    """The median over codes of the squared 2-Wasserstein distance to the nearest other code."""
    nearest = [merge_distances(mixture, i, None, math.inf, math.inf).amin(1) for i in _rows(len(mixture))]
    return torch.cat(nearest).median()


def _rows(count: int) -> list[slice]:
    step = max(1, 2**21 // count)
    return [slice(i, min(i + step, count)) for i in range(0, count, step)]


def merge_distances(
    mixture: PlaneMixture, rows: slice, alive: Tensor | None, distance: float, variance: float
) -> Tensor:
    """Squared 2-Wasserstein distances ``[rows, K]``; infinite for a code itself and where a test forbids the merger."""
    pick, every = mixture[rows, None], mixture[None]
    cost = wasserstein(pick.means, pick.covariances, every.means, every.covariances)
    index = torch.arange(len(mixture), device=cost.device)
    forbidden = (index == index[rows, None]) | (cost >= distance)
    if math.isfinite(variance):
        forbidden |= _trace(merge_pair(pick, every).covariances) >= variance
    if alive is not None:
        forbidden |= ~(alive & alive[rows, None])
    return cost.masked_fill(forbidden, math.inf)


def merge_closest(
    mixture: PlaneMixture,
    *,
    distance: float,
    gradient: Tensor | None = None,
    gradient_limit: float = math.inf,
    variance_limit: float = math.inf,
    how: MergeRule = "moment",
    fixed: Tensor | None = None,
) -> tuple[PlaneMixture, Tensor]:
    """Merges the closest pair of codes, again and again, until no pair passes the three tests of Lin et al.:

    ``W2^2 < distance``; for both codes ``sqrt(g^T Sigma g) < gradient_limit``, where g is the gradient of the loss with
    respect to the code (this is the change of the loss over the spread of the code, in the units of the loss); and the
    trace of the covariance of the merged code ``< variance_limit``.

    :param mixture: K codes; a weight of 0 marks one that is no longer in use.
    :param gradient: g, ``[K, 2]``.
    :param how: see :func:`merge_pair`.
    :param fixed: codes that are never merged, ``[K]`` of bool.
    :return: the mixture with the same K, in which codes that were merged into others have weight 0; and for each code
        the one that it is now part of, ``[K]``.
    :raises ValueError: for an unknown ``how``.
    """
    if how not in get_args(MergeRule):
        raise ValueError(f"merge={how!r}: expected one of {', '.join(map(repr, get_args(MergeRule)))}")
    weights, means, covariances = (v.double().clone() for v in (mixture.weights, mixture.means, mixture.covariances))
    now = PlaneMixture(weights, means, covariances)
    alive = weights > 0
    if fixed is not None:
        alive &= ~fixed
    if gradient is not None:
        g = gradient.double()
        alive &= (g[:, None] @ covariances @ g[:, :, None]).reshape(-1).clamp_min(0).sqrt() < gradient_limit
    into = torch.arange(len(mixture), device=weights.device)
    if int(alive.sum()) < 2:
        return now, into
    pairs = [merge_distances(now, rows, alive, distance, variance_limit).min(1) for rows in _rows(len(mixture))]
    nearest, partner = torch.cat([p.values for p in pairs]), torch.cat([p.indices for p in pairs])
    while True:
        i = int(nearest.argmin())
        if not math.isfinite(float(nearest[i])):
            return now, into
        i, j = sorted((i, int(partner[i])))
        merged = merge_pair(now[i], now[j], how)
        weights[i], means[i], covariances[i] = merged.weights, merged.means, merged.covariances
        weights[j] = 0
        alive[j] = False
        into[into == j] = i
        nearest[j] = math.inf
        # search again for codes whose partner changed; the merged code may now be the nearest of any other
        changed = ((partner == i) | (partner == j)).nonzero().flatten().tolist()
        for c in [i] + [c for c in changed if c != i and alive[c]]:
            least = merge_distances(now, slice(c, c + 1), alive, distance, variance_limit)[0].min(0)
            nearest[c], partner[c] = least.values, least.indices
        row = merge_distances(now, slice(i, i + 1), alive, distance, variance_limit)[0]
        closer = row < nearest
        nearest[closer] = row[closer]
        partner[closer] = i
