"""Weights as points (mean, standard deviation) in a plane, and K Gaussians that cover them: densities, labels and EM.

A weight with q_i = N(mu_i, sigma_i^2) is the point x_i = (mu_i, sigma_i). Between such points the Euclidean distance is
the 2-Wasserstein distance of the weights: ``W2^2(q_i, q_j) = (mu_i - mu_j)^2 + (sigma_i - sigma_j)^2``.

The search for codes is exact, but does not compare every point with every code: points are sorted into tiles of
neighbours, and a bound excludes the codes that cannot matter to any point of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: points in one tile, points sorted into tiles at a time, and densities evaluated at a time
TILE, CHUNK, EVALUATIONS = 512, 2**22, 2**20
#: responsibilities below exp(-margin) of the largest are left out of a step of EM
_MARGIN = 16.0


@dataclass(frozen=True)
class PlaneMixture:
    """K Gaussians in the plane of (mean, standard deviation): ``sum_k pi_k N(x; c_k, Sigma_k)``.

    :param weights: pi, ``[K]``.
    :param means: c, ``[K, 2]``.
    :param covariances: Sigma, ``[K, 2, 2]``.
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, index: Any) -> PlaneMixture:
        """Some of the Gaussians: the index is applied to each of the three tensors."""
        return PlaneMixture(self.weights[index], self.means[index], self.covariances[index])

    def log_scores(self, rate: float = 0.0) -> tuple[Tensor, Tensor]:
        """``A [K, 2, 2]``, ``b [K]``: ``(1 + rate) log pi_k + log N(x; c_k, Sigma_k) = b_k - |A_k (x - c_k)|^2/2``."""
        root = torch.linalg.cholesky(self.covariances.double())
        half = torch.linalg.solve_triangular(root, torch.eye(2, dtype=root.dtype, device=root.device), upper=False)
        normaliser = half.diagonal(dim1=-2, dim2=-1).log().sum(-1) - math.log(2 * math.pi)
        return half, normaliser + (1 + rate) * self.weights.double().clamp_min(1e-300).log()


def sort_into_tiles(x: Tensor) -> tuple[Tensor, Tensor]:
    """Indices ``[tiles, points]`` of neighbours in the plane, and which of them count (the others are repetitions)."""
    n = len(x)
    strips = max(1, round(math.sqrt(n / TILE)))
    length = TILE * math.ceil(n / (strips * TILE))
    order = x[:, 0].argsort()
    place = torch.arange(strips * length, device=x.device)
    order = order[place.clamp_max(n - 1)].view(strips, length)
    inner = x[:, 1][order].argsort(1)
    index = order.gather(1, inner).view(-1, TILE)
    return index, (place < n).view(strips, length).gather(1, inner).view(-1, TILE)


def codes_near_tiles(points: Tensor, mixture: PlaneMixture, half: Tensor, bias: Tensor, margin: float) -> Tensor:
    """Which codes may come within ``margin`` of the best score of some point of each tile, ``[tiles, K]``.

    On a box around b with half widths h, ``|A (x - c)|`` is within ``| |A| h |`` of its value at b.
    """
    low, high = points.amin(1).double(), points.amax(1).double()
    centre, reach = (low + high) / 2, (high - low) / 2
    # float32 would lose the differences between narrow codes
    distance = triangular_norm(half, centre[:, None] - mixture.means.double())
    radius = triangular_norm(half.abs(), reach[:, None].expand(-1, len(mixture), -1)) * (1 + 1e-5)
    most = bias - (distance - radius).clamp_min(0).square() / 2
    least = bias - (distance + radius).square() / 2
    return most >= least.amax(1, keepdim=True) - margin - 1e-3


def triangular_norm(half: Tensor, d: Tensor) -> Tensor:
    """``|A d|`` for lower triangular A ``[..., 2, 2]`` and d ``[..., 2]``."""
    first, second = d.unbind(-1)
    square = (half[..., 0, 0] * first).square_()
    last = (half[..., 1, 0] * first).addcmul_(half[..., 1, 1], second)
    return square.addcmul_(last, last).sqrt_()


@dataclass
class ScoredTiles:
    """Some tiles with the codes that matter to them.

    :param index, valid: ``[t, points]``, see :func:`sort_into_tiles`.
    :param codes: ``[t, C]``, filled up with other codes, whose scores are minus infinity.
    :param scores: ``[t, points, C]``.
    """

    index: Tensor
    valid: Tensor
    codes: Tensor
    scores: Tensor


def scored_tiles(x: Tensor, mixture: PlaneMixture, rate: float, margin: float) -> Iterator[ScoredTiles]:
    """The scores of all points under all codes that come within ``margin`` of their best, some tiles at a time."""
    half, bias = mixture.log_scores(rate)
    table = torch.cat([mixture.means.double(), half.flatten(1)[:, [0, 2, 3]], bias[:, None]], 1)
    for start in range(0, len(x), CHUNK):
        chunk = x[start : start + CHUNK]
        index, valid = sort_into_tiles(chunk)
        step = max(1, 2**22 // len(mixture))
        parts = [
            codes_near_tiles(chunk[index[i : i + step]], mixture, half, bias, margin)
            for i in range(0, len(index), step)
        ]
        near = torch.cat(parts)
        counts = near.sum(1)
        order = counts.argsort()
        ends = counts[order].tolist()
        i = 0
        while i < len(ends):
            stop = i + 1
            while stop < len(ends) and (stop + 1 - i) * TILE * ends[stop] <= EVALUATIONS:
                stop += 1
            tiles = order[i:stop]
            used, codes = near[tiles].to(torch.uint8).topk(ends[stop - 1], 1)
            yield score_tiles(chunk, index[tiles] + start, valid[tiles], start, codes, used.bool(), table)
            i = stop


def score_tiles(
    chunk: Tensor, index: Tensor, valid: Tensor, start: int, codes: Tensor, used: Tensor, table: Tensor
) -> ScoredTiles:
    """The scores of some tiles of a chunk that begins at point ``start``.

    :param codes, used: ``[t, C]``, the codes of each tile, and which of them matter to it.
    :param table: ``[K, 6]``: mean, lower triangle of A and b of each code, see :meth:`PlaneMixture.log_scores`.
    """
    points = chunk[index - start]
    middle = points[:, :1]  # relative to a point of the tile, float32 still separates narrow codes
    own = table[codes]
    m0, m1 = (own[..., a] - middle[..., a].double() for a in (0, 1))
    a00, a10, a11, bias = (own[..., a].to(points.dtype).unsqueeze(1) for a in (2, 3, 4, 5))
    bias = bias.masked_fill(~used.unsqueeze(1), -torch.inf)
    local = points - middle
    d0 = local[..., 0].unsqueeze(-1) - m0.to(points.dtype).unsqueeze(1)
    d1 = local[..., 1].unsqueeze(-1) - m1.to(points.dtype).unsqueeze(1)
    second = (d0 * a10).addcmul_(d1, a11)
    squares = d0.mul_(a00).square_().addcmul_(second, second)
    return ScoredTiles(index, valid, codes, torch.add(bias, squares, alpha=-0.5))


def assign(x: Tensor, mixture: PlaneMixture, *, rate: float = 0.0) -> Tensor:
    """The code of every point: ``argmax_k (1 + rate) log pi_k + log N(x_i; c_k, Sigma_k)``, int32 ``[n]``.

    The search is exact: codes are left out for a whole tile of neighbouring points only where a bound excludes them.

    :param rate: weight of the code length ``-log pi_k`` beyond that of the posterior: entropy-constrained quantisation
        (Chou, Lookabaugh and Gray 1989). 0 takes the most probable code.
    """
    labels = torch.zeros(len(x), dtype=torch.int32, device=x.device)
    for part in scored_tiles(x, mixture, rate, 0.0):
        best = part.codes.gather(1, part.scores.argmax(-1))
        labels[part.index[part.valid]] = best[part.valid].to(torch.int32)
    return labels


def em_step(x: Tensor, mixture: PlaneMixture, floor: Tensor) -> tuple[PlaneMixture, Tensor]:
    """One step of EM, and the mean log-likelihood of a point before it, in nats.

    ``r_ik ~ pi_k N(x_i; c_k, Sigma_k)``, ``pi_k = sum_i r_ik / n``, ``c_k = sum_i r_ik x_i / sum_i r_ik`` and
    ``Sigma_k = sum_i r_ik (x_i - c_k)(x_i - c_k)^T / sum_i r_ik + diag(floor)``. Sums are in float64. A code without
    points stays where it is, with the weight of a thousandth of a point.

    :param x: ``[n, 2]``.
    :param floor: ``[2]``, added to the variances.
    """
    k = len(mixture)
    sums = torch.zeros(k, 6, dtype=torch.float64, device=x.device)
    likelihood = torch.zeros((), dtype=torch.float64, device=x.device)
    for part in scored_tiles(x, mixture, 0.0, _MARGIN):
        total = part.scores.logsumexp(-1, keepdim=True)
        likelihood += (total.squeeze(-1).double() * part.valid).sum()
        shares = part.scores.sub_(total).exp_().mul_(part.valid.unsqueeze(-1))
        points = x[part.index]
        middle = points[:, :1]
        d = points - middle
        features = torch.stack(
            [torch.ones_like(d[..., 0]), d[..., 0], d[..., 1], d[..., 0] ** 2, d[..., 0] * d[..., 1], d[..., 1] ** 2],
            -1,
        )
        local = (shares.transpose(1, 2) @ features).double()  # moments about a point of the tile
        # and about the old centre of the code, which is the same for all tiles
        to = middle.double() - mixture.means.double()[part.codes]
        s, s0, s1, s00, s01, s11 = local.unbind(-1)
        t0, t1 = to.unbind(-1)
        moved = [s, s0 + t0 * s, s1 + t1 * s]
        moved.append(s00 + 2 * t0 * s0 + t0 * t0 * s)
        moved.append(s01 + t0 * s1 + t1 * s0 + t0 * t1 * s)
        moved.append(s11 + 2 * t1 * s1 + t1 * t1 * s)
        sums.index_add_(0, part.codes.flatten(), torch.stack(moved, -1).flatten(0, 1))
    mass = sums[:, 0]
    alive = mass > 1e-3
    by = torch.where(alive, mass, 1.0)
    step = sums[:, 1:3] / by[:, None]
    cross = sums[:, 4] / by - step[:, 0] * step[:, 1]
    variances = sums[:, [3, 5]] / by[:, None] - step.square()
    covariances = torch.diag_embed(variances.clamp_min(0) + floor.double())
    limit = (covariances[:, 0, 0] * covariances[:, 1, 1]).sqrt() * (1 - 1e-6)
    covariances[:, 0, 1] = covariances[:, 1, 0] = cross.clamp(-limit, limit)
    weights = torch.where(alive, mass, 1e-3)
    new = PlaneMixture(
        weights / weights.sum(),
        torch.where(alive[:, None], mixture.means.double() + step, mixture.means.double()),
        torch.where(alive[:, None, None], covariances, mixture.covariances.double()),
    )
    return new, likelihood / len(x)


def mahalanobis(x: Tensor, labels: Tensor, mixture: PlaneMixture) -> Tensor:
    """``(x_i - c)^T Sigma^-1 (x_i - c)`` to the code of each point, ``[n]``."""
    half, _ = mixture.log_scores()
    found = []
    for points, own in zip(x.split(2**20), labels.split(2**20), strict=True):
        index = own.long()
        found.append(
            triangular_norm(half[index], points.double() - mixture.means.double()[index]).square_().to(x.dtype)
        )
    return torch.cat(found)
