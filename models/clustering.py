"""Weights as points (mean, standard deviation) in a plane, and K Gaussians that cover them: the stages of clustering.

A weight with q_i = N(mu_i, sigma_i^2) is the point x_i = (mu_i, sigma_i). Between such points the Euclidean distance is
the 2-Wasserstein distance of the weights: ``W2^2(q_i, q_j) = (mu_i - mu_j)^2 + (sigma_i - sigma_j)^2``. The stages are
those of Lin et al. (AISTATS 2025, arXiv 2505.17856); each is a function of tensors, on their device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from sklearn.cluster import kmeans_plusplus
from torch import Tensor

#: points in one tile, points sorted into tiles at a time, and densities evaluated at a time
_TILE, _CHUNK, _EVALUATIONS = 512, 2**22, 2**20
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

    def log_scores(self, rate: float = 0.0) -> tuple[Tensor, Tensor]:
        """``A [K, 2, 2]`` and ``b [K]`` with ``(1 + rate) log pi_k + log N(x; c_k, Sigma_k) = b - |A (x - c)|^2 / 2``."""
        root = torch.linalg.cholesky(self.covariances.double())
        half = torch.linalg.solve_triangular(root, torch.eye(2, dtype=root.dtype, device=root.device), upper=False)
        normaliser = half.diagonal(dim1=-2, dim2=-1).log().sum(-1) - math.log(2 * math.pi)
        return half, normaliser + (1 + rate) * self.weights.double().log()


# -------------------------------------------------------------------------------------------------- outliers


def find_outliers(
    loc: Tensor,
    scale: Tensor,
    *,
    magnitude: float | None = None,
    gradient: Tensor | None = None,
    gradient_share: float = 0.01,
    snr: float | None = None,
    cap: float = 0.005,
) -> Tensor:
    """Sorted indices of the weights that keep a Gaussian of their own, at most the share ``cap`` of all.

    A weight is an outlier when ``|mu| > magnitude``, when its ``|gradient|`` is among the largest ``gradient_share``, or
    when ``|mu| / sigma > snr`` (Lin et al., algorithm 1, has the first two). Without any rule, it is when its ``|mu|``
    is among the largest ``cap``. Where the rules find more than the cap allows, those stay that exceed their thresholds
    by the largest factor.

    :param loc, scale: mu and sigma, ``[n]``.
    :param gradient: of the loss with respect to mu, ``[n]``.
    :raises ValueError: for NaN, or a share or threshold out of range.
    """
    _require_share("cap", cap)
    for name, value in (("magnitude", magnitude), ("snr", snr)):
        if value is not None and not value > 0:
            raise ValueError(f"{name}={value!r}: expected a positive threshold, or None for no such rule")
    most = int(cap * loc.numel() + 1e-6)
    scores = []
    if magnitude is not None:
        scores.append(loc.abs() / magnitude)
    if snr is not None:
        scores.append(loc.abs() / scale / snr)
    if gradient is not None:
        _require_share("gradient_share", gradient_share)
        if gradient.shape != loc.shape or not bool(torch.isfinite(gradient).all()):
            raise ValueError(f"gradient: expected {loc.numel()} finite numbers, one for each weight")
        count = int(gradient_share * loc.numel() + 1e-6)
        if count:
            least = gradient.abs().topk(count).values[-1]
            scores.append(gradient.abs() / least.clamp_min(torch.finfo(loc.dtype).tiny))
    if not most:
        return torch.zeros(0, dtype=torch.long, device=loc.device)
    if not scores:
        if magnitude is None and snr is None and gradient is None:
            return loc.abs().topk(most).indices.sort().values
        return torch.zeros(0, dtype=torch.long, device=loc.device)
    score = scores[0]
    for other in scores[1:]:
        score = torch.maximum(score, other)
    value, index = score.topk(most)
    return index[value >= 1].sort().values


def _require_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value!r}: expected a share of the weights, from 0 to 1")


# ------------------------------------------------------------------------------------------------ the E-step


def _tiles(x: Tensor) -> tuple[Tensor, Tensor]:
    """Indices ``[tiles, points]`` of neighbours in the plane, and which of them count (the others are repeated)."""
    n = len(x)
    strips = max(1, round(math.sqrt(n / _TILE)))
    length = _TILE * math.ceil(n / (strips * _TILE))
    order = x[:, 0].argsort()
    place = torch.arange(strips * length, device=x.device)
    order = order[place.clamp_max(n - 1)].view(strips, length)
    inner = x[:, 1][order].argsort(1)
    index = order.gather(1, inner).view(-1, _TILE)
    return index, (place < n).view(strips, length).gather(1, inner).view(-1, _TILE)


def _candidates(points: Tensor, mixture: PlaneMixture, half: Tensor, bias: Tensor, margin: float) -> Tensor:
    """Which codes may come within ``margin`` of the best score of some point of each tile, ``[tiles, K]``.

    On a box around b with half widths h, ``|A (x - c)|`` is within ``| |A| h |`` of its value at b.
    """
    low, high = points.amin(1).double(), points.amax(1).double()
    centre, reach = (low + high) / 2, (high - low) / 2
    # products in float32 would lose what tells narrow codes apart
    d = centre[:, None] - mixture.means.double()
    distance = (half * d.unsqueeze(-2)).sum(-1).norm(dim=-1)
    radius = (half.abs() * reach[:, None, None]).sum(-1).norm(dim=-1) * (1 + 1e-5)
    most = bias - (distance - radius).clamp_min(0).square() / 2
    least = bias - (distance + radius).square() / 2
    return most >= least.amax(1, keepdim=True) - margin - 1e-3


@dataclass
class _Part:
    """Some tiles with the codes that matter to them.

    :param index, valid: ``[t, points]``, as of :func:`_tiles`.
    :param codes: ``[t, C]``, filled up with code 0 where ``used`` is false.
    :param scores: ``[t, points, C]``.
    """

    index: Tensor
    valid: Tensor
    codes: Tensor
    scores: Tensor


def _scored(x: Tensor, mixture: PlaneMixture, rate: float, margin: float) -> Iterator[_Part]:
    """Scores of all points under all codes that come within ``margin`` of their best, in parts."""
    half, bias = mixture.log_scores(rate)
    table = torch.cat([mixture.means.double(), half.flatten(1)[:, [0, 2, 3]], bias[:, None]], 1)
    for start in range(0, len(x), _CHUNK):
        chunk = x[start : start + _CHUNK]
        index, valid = _tiles(chunk)
        step = max(1, 2**22 // len(mixture))
        parts = [
            _candidates(chunk[index[i : i + step]], mixture, half, bias, margin) for i in range(0, len(index), step)
        ]
        near = torch.cat(parts)
        counts = near.sum(1)
        order = counts.argsort()
        ends = counts[order].tolist()
        i = 0
        while i < len(ends):
            stop = i + 1
            while stop < len(ends) and (stop + 1 - i) * _TILE * ends[stop] <= _EVALUATIONS:
                stop += 1
            tiles = order[i:stop]
            used, codes = near[tiles].to(torch.uint8).topk(ends[stop - 1], 1)
            yield _part(chunk, index[tiles] + start, valid[tiles], start, codes, used.bool(), table)
            i = stop


def _part(chunk: Tensor, index: Tensor, valid: Tensor, start: int, codes: Tensor, used: Tensor, table: Tensor) -> _Part:
    points = chunk[index - start]
    middle = points[:, :1]  # differences to a point of the tile keep narrow codes apart in float32
    own = table[codes]
    m0, m1 = (own[..., a] - middle[..., a].double() for a in (0, 1))
    a00, a10, a11, bias = (own[..., a].to(points.dtype).unsqueeze(1) for a in (2, 3, 4, 5))
    bias = bias.masked_fill(~used.unsqueeze(1), -torch.inf)
    local = points - middle
    d0 = local[..., 0].unsqueeze(-1) - m0.to(points.dtype).unsqueeze(1)
    d1 = local[..., 1].unsqueeze(-1) - m1.to(points.dtype).unsqueeze(1)
    second = (d0 * a10).addcmul_(d1, a11)
    squares = d0.mul_(a00).square_().addcmul_(second, second)
    return _Part(index, valid, codes, torch.add(bias, squares, alpha=-0.5))


def assign(x: Tensor, mixture: PlaneMixture, *, rate: float = 0.0) -> Tensor:
    """The code of every point: ``argmax_k (1 + rate) log pi_k + log N(x_i; c_k, Sigma_k)``, int32 ``[n]``.

    The search is exact: codes are left out for a whole tile of neighbouring points only where a bound excludes them.

    :param rate: weight of the code length ``-log pi_k`` beyond that of the posterior: entropy-constrained quantisation
        (Chou, Lookabaugh and Gray 1989). 0 takes the most probable code.
    """
    labels = torch.zeros(len(x), dtype=torch.int32, device=x.device)
    for part in _scored(x, mixture, rate, 0.0):
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
    for part in _scored(x, mixture, 0.0, _MARGIN):
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
        moved = (
            *(s, s0 + t0 * s, s1 + t1 * s, s00 + 2 * t0 * s0 + t0 * t0 * s),
            *(s01 + t0 * s1 + t1 * s0 + t0 * t1 * s, s11 + 2 * t1 * s1 + t1 * t1 * s),
        )
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


# ------------------------------------------------------------------------------------------------ the fit


def covariance_floor(x: Tensor, codes: int) -> Tensor:
    """``[2]``: the square of a hundredth of what K equal parts of the data's standard deviation are.

    An axis along which all points agree has a thousandth of its distance from 0 in place of the standard deviation.
    """
    spread = x.double().std(0, correction=0) if len(x) > 1 else torch.zeros(2, dtype=torch.float64, device=x.device)
    size = x.double().abs().amax(0)
    spread = torch.where(spread > 1e-6 * size, spread, 1e-3 * size)
    spread = torch.where(spread > 0, spread, spread.amax().clamp_min(1e-12))
    return (0.01 * spread / codes).square()


def start_mixture(x: Tensor, codes: int, *, seed: int = 0) -> PlaneMixture:
    """Centres by k-means++ (of scikit-learn) on a sample of the points, with the moments of their Voronoi cells.

    Axes are divided by their standard deviations first. The sample has 16 points for each code, at least 4096.

    :raises ValueError: when there are fewer distinct points than codes.
    """
    generator = torch.Generator().manual_seed(seed)
    size = min(len(x), max(16 * codes, 4096))
    sample = x
    if size < len(x):
        sample = x[torch.randint(len(x), (size,), generator=generator).to(x.device)]
    sample = sample.double()
    spread = covariance_floor(sample, 1).sqrt() * 100
    scaled = (sample / spread).cpu()
    distinct = len(scaled.unique(dim=0))
    if distinct < codes:
        where = "among all weights" if size == len(x) else f"in a sample of {size:,} weights"
        raise ValueError(
            f"codes={codes}, but only {distinct} distinct pairs of mean and standard deviation {where}: ask for fewer codes"
        )
    _, chosen = kmeans_plusplus(scaled.numpy(), codes, random_state=seed, n_local_trials=1)
    means = sample[torch.as_tensor(chosen, device=x.device, dtype=torch.long)]
    floor = covariance_floor(sample, codes)
    uniform = torch.full((codes,), 1 / codes, dtype=torch.float64, device=x.device)
    # with equal and narrow codes the most probable is the nearest
    cells = PlaneMixture(uniform, means, torch.diag(spread.square()).expand(codes, 2, 2))
    return moments(sample, assign(sample, cells), cells, floor)


def moments(x: Tensor, labels: Tensor, mixture: PlaneMixture, floor: Tensor) -> PlaneMixture:
    """Shares, means and covariances of the points of each code; codes without points stay, with a weight near 0."""
    k, index = len(mixture), labels.long()
    d = x.double() - mixture.means.double()[index]
    features = torch.stack(
        [torch.ones_like(d[:, 0]), d[:, 0], d[:, 1], d[:, 0] ** 2, d[:, 0] * d[:, 1], d[:, 1] ** 2], 1
    )
    sums = torch.stack([x.new_zeros(k, dtype=torch.float64).index_add_(0, index, f) for f in features.unbind(1)], 1)
    alive = sums[:, 0] > 0
    by = sums[:, :1].clamp_min(1)
    step, squares = sums[:, 1:3] / by, sums[:, 3:] / by
    covariances = torch.diag_embed((squares[:, [0, 2]] - step.square()).clamp_min(0) + floor)
    limit = (covariances[:, 0, 0] * covariances[:, 1, 1]).sqrt() * (1 - 1e-6)
    covariances[:, 0, 1] = covariances[:, 1, 0] = (squares[:, 1] - step[:, 0] * step[:, 1]).clamp(-limit, limit)
    weights = torch.where(alive, sums[:, 0], 1e-3)
    return PlaneMixture(
        weights / weights.sum(),
        mixture.means.double() + step,
        torch.where(alive[:, None, None], covariances, mixture.covariances.double()),
    )


def fit_plane(
    x: Tensor,
    codes: int,
    *,
    zero: bool = False,
    iterations: int = 20,
    tolerance: float = 1e-3,
    sample: int = 2**18,
    seed: int = 0,
) -> PlaneMixture:
    """K Gaussians in the plane by EM, in float64, on the device of the points.

    :param x: points (mu, sigma), ``[n, 2]``.
    :param codes: K.
    :param zero: whether code 0 has its mean fixed at mu = 0.
    :param iterations: largest number of steps of EM.
    :param tolerance: EM ends once a step raises the mean log-likelihood of a point by less, in nats.
    :param sample: EM runs on that many points, drawn at random; the last step, on all.
    :raises ValueError: for NaN, or more codes than distinct points.
    """
    if not isinstance(codes, int) or codes < 1:
        raise ValueError(f"codes={codes!r}: expected the number of codes, at least 1")
    if codes > len(x):
        raise ValueError(f"codes={codes}, but there are only {len(x)} weights to share them: ask for fewer codes")
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{int((~torch.isfinite(x)).sum())} means or standard deviations of weights are not finite")
    mixture = _pinned(start_mixture(x, codes, seed=seed), zero)
    floor = covariance_floor(x, codes)
    part = x
    if sample < len(x):
        part = x[torch.randint(len(x), (sample,), generator=torch.Generator().manual_seed(seed + 1)).to(x.device)]
    before = -math.inf
    for _ in range(iterations):
        mixture, likelihood = em_step(part, mixture, floor)
        mixture = _pinned(mixture, zero)
        if float(likelihood) - before < tolerance:
            break
        before = float(likelihood)
    if part is not x:
        mixture = _pinned(em_step(x, mixture, floor)[0], zero)
    return mixture


def _pinned(mixture: PlaneMixture, zero: bool) -> PlaneMixture:
    """The code nearest to mu = 0 comes first and lies there."""
    if not zero:
        return mixture
    first = mixture.means[:, 0].abs().argmin()
    order = torch.arange(len(mixture), device=first.device)
    order = torch.where(order == 0, first, torch.where(order == first, 0, order))
    means = mixture.means[order].clone()
    offset = means[0, 0].clone()
    means[0, 0] = 0
    covariances = mixture.covariances[order].clone()
    covariances[0, 0, 0] += offset.square()  # about 0
    return PlaneMixture(mixture.weights[order], means, covariances)


def constrain_entropy(
    x: Tensor, mixture: PlaneMixture, rate: float, *, zero: bool = False, iterations: int = 5
) -> tuple[PlaneMixture, Tensor]:
    """Codes and labels of entropy-constrained quantisation: labels by :func:`assign`, then moments, by turns.

    The larger the rate the more weights share few codes, and the fewer bits an entropy coder takes for a label.
    """
    if not rate >= 0:
        raise ValueError(f"rate={rate!r}: expected the weight of the code length, at least 0")
    floor = covariance_floor(x, len(mixture))
    labels = assign(x, mixture, rate=rate)
    for _ in range(iterations if rate > 0 else 0):
        mixture = _pinned(moments(x, labels, mixture, floor), zero)
        new = assign(x, mixture, rate=rate)
        if torch.equal(new, labels):
            break
        labels = new
    return mixture, labels


# ------------------------------------------------------------------------------------------- between codes


def between_codes(
    x: Tensor, labels: Tensor, mixture: PlaneMixture, share: float = 0.01
) -> tuple[Tensor, Tensor, Tensor]:
    """The points farthest from their code, which two codes hold together: the "ellipse points" of Lin et al.

    Those whose squared Mahalanobis distance is above its empirical (1 - share) quantile. Of point i the two codes with
    the largest ``log pi_k + log N(x_i; c_k, Sigma_k)`` share it as the softmax of these two, alpha and 1 - alpha.

    :param labels: the code of each point, ``[n]``.
    :param share: of the points; 0.05 is that of the paper.
    :return: sorted indices ``[e]``, codes ``[e, 2]`` (int32, the likelier one first), and alpha ``[e]`` in [1/2, 1].
    :raises ValueError: unless share is in [0, 1].
    """
    _require_share("share", share)
    count = int(share * len(x) + 1e-6) if len(mixture) > 1 else 0
    if not count:
        empty = torch.zeros(0, dtype=torch.long, device=x.device)
        return empty, torch.zeros(0, 2, dtype=torch.int32, device=x.device), x.new_zeros(0)
    index = mahalanobis(x, labels, mixture).topk(count).indices.sort().values
    half, bias = mixture.log_scores()
    codes, alphas = [], []
    step = max(1, 2**21 // len(mixture))
    for part in x[index].double().split(step):
        d = part[:, None] - mixture.means.double()
        best = (bias - (half * d.unsqueeze(-2)).sum(-1).square().sum(-1) / 2).topk(2)
        codes.append(best.indices.to(torch.int32))
        alphas.append(best.values.softmax(1)[:, 0].to(x.dtype))
    return index, torch.cat(codes), torch.cat(alphas)


def mahalanobis(x: Tensor, labels: Tensor, mixture: PlaneMixture) -> Tensor:
    """``(x_i - c)^T Sigma^-1 (x_i - c)`` to the code of each point, ``[n]``."""
    half, _ = mixture.log_scores()
    found = []
    for points, own in zip(x.split(_CHUNK), labels.split(_CHUNK), strict=True):
        index = own.long()
        d = points.double() - mixture.means.double()[index]
        found.append((half[index] * d.unsqueeze(-2)).sum(-1).square().sum(-1).to(x.dtype))
    return torch.cat(found)
