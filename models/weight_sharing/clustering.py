"""The stages that turn many weights into a codebook: outliers, codes, labels, and weights between codes.

They follow Lin et al. (AISTATS 2025, arXiv 2505.17856). Each is a function of tensors and runs on their device. Weights
are points (mu, sigma) in a plane, see :mod:`pyro_bnn.models.weight_sharing.plane`.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from pyro_bnn.entry import checks
from pyro_bnn.models.weight_sharing.plane import PlaneMixture, assign, em_step, mahalanobis, triangular_norm
from pyro_bnn.randomness import some_seed

Distance = Literal["wasserstein", "divergence"]


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
    """Finds the weights that keep a Gaussian of their own: their sorted indices, at most a fraction ``cap`` of all.

    A weight is an outlier when ``|mu| > magnitude``, when its ``|gradient|`` is among the largest ``gradient_share``,
    or when ``|mu| / sigma > snr`` (Lin et al., algorithm 1, has the first two). Without any rule, the outliers are the
    fraction ``cap`` of the weights with the largest ``|mu|``. If the rules find more than the cap allows, those that
    exceed their thresholds by the largest factor are taken.

    :param loc, scale: mu and sigma, ``[n]``.
    :param magnitude: a threshold in the units of the weights; ``None`` for no such rule.
    :param gradient: of the loss with respect to mu, ``[n]``; ``None`` for no such rule.
    :param gradient_share: a fraction of the weights.
    :param snr: a threshold of the signal-to-noise ratio; ``None`` for no such rule.
    :raises ValueError: for a fraction or threshold out of range, or a gradient that is not finite or has another shape.
    """
    checks.fraction("cap", cap)
    checks.fraction("gradient_share", gradient_share)
    for name, value in (("magnitude", magnitude), ("snr", snr)):
        if value is not None and not value > 0:
            raise ValueError(f"{name}={value!r}: expected a positive threshold, or None for no such rule")
    if gradient is not None and (gradient.shape != loc.shape or not bool(torch.isfinite(gradient).all())):
        raise ValueError(f"gradient: expected {loc.numel()} finite numbers, one for each weight")
    most = int(cap * loc.numel() + 1e-6)
    if magnitude is None and snr is None and gradient is None:
        return loc.abs().topk(most).indices.sort().values
    score = torch.zeros_like(loc)  # by what factor a weight exceeds the threshold of a rule
    if magnitude is not None:
        score = loc.abs() / magnitude
    if snr is not None:
        score = torch.maximum(score, loc.abs() / scale / snr)
    count = int(gradient_share * loc.numel() + 1e-6)
    if gradient is not None and count:
        least = gradient.abs().topk(count).values[-1].clamp_min(torch.finfo(loc.dtype).tiny)
        score = torch.maximum(score, gradient.abs() / least)
    best = score.topk(most)
    return best.indices[best.values >= 1].sort().values


def members_of_small_codes(labels: Tensor, codes: int, smallest: int, most: int, zero: bool) -> Tensor:
    """Positions of the weights whose code has at most ``smallest`` members.

    They become outliers (Lin et al.): a Gaussian that few weights share saves nothing.

    :param labels: the code of each weight, ``[n]``.
    :param codes: K.
    :param most: the largest number of positions; the smallest codes are taken first, each as a whole.
    :param zero: whether code 0 stays whatever its size.
    """
    counts = torch.bincount(labels, minlength=codes)
    small = (counts > 0) & (counts <= smallest)
    if zero:
        small[0] = False
    order = counts.masked_fill(~small, counts.max() + 1).argsort()
    fitting = (counts[order].cumsum(0) <= most) & small[order]
    chosen = torch.zeros(codes, dtype=torch.bool, device=labels.device)
    chosen[order[fitting]] = True
    return chosen[labels.long()].nonzero().flatten()


def covariance_floor(x: Tensor, codes: int) -> Tensor:
    """What is added to the variances of a code along each axis, ``[2]``: ``(0.01 spread / K)^2``.

    ``spread`` is the standard deviation of the points; where all points agree, a thousandth of their distance from 0.
    """
    spread = x.double().std(0, correction=0) if len(x) > 1 else torch.zeros(2, dtype=torch.float64, device=x.device)
    size = x.double().abs().amax(0)
    spread = torch.where(spread > 1e-6 * size, spread, 1e-3 * size)
    spread = torch.where(spread > 0, spread, spread.amax().clamp_min(1e-12))
    return (0.01 * spread / codes).square()


def start_mixture(x: Tensor, codes: int, *, seed: int) -> PlaneMixture:
    """The start of EM: centres by k-means++ (of scikit-learn), with the moments of their Voronoi cells.

    Both come from a sample of 8 points for each code, at least 4096. Axes are first divided by their standard
    deviations.

    :raises ValueError: when there are fewer distinct points than codes.
    """
    generator = torch.Generator().manual_seed(seed)
    size = min(len(x), max(8 * codes, 4096))
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
            f"codes={codes}, but only {distinct} distinct pairs of mean and standard deviation {where}: ask for fewer "
            "codes"
        )
    from sklearn.cluster import kmeans_plusplus  # takes a second to import

    _, chosen = kmeans_plusplus(scaled.numpy(), codes, random_state=seed, n_local_trials=1)
    means = sample[torch.as_tensor(chosen, device=x.device, dtype=torch.long)]
    floor = covariance_floor(sample, codes)
    uniform = torch.full((codes,), 1 / codes, dtype=torch.float64, device=x.device)
    # among equal codes the most probable is the nearest
    cells = PlaneMixture(uniform, means, torch.diag(spread.square()).expand(codes, 2, 2))
    return moments(sample, assign(sample, cells), cells, floor)


def moments(x: Tensor, labels: Tensor, mixture: PlaneMixture, floor: Tensor) -> PlaneMixture:
    """Shares, means and covariances of the points of each code; a code without points stays, with a weight near 0."""
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
    tolerance: float = 2e-3,
    sample: int | None = None,
    seed: int | None = None,
) -> PlaneMixture:
    """K Gaussians in the plane by EM, in float64, on the device of the points.

    :param x: points (mu, sigma), ``[n, 2]``.
    :param codes: K.
    :param zero: whether code 0 has its mean fixed at mu = 0.
    :param iterations: largest number of steps of EM.
    :param tolerance: EM ends once a step raises the mean log-likelihood of a point by less, in nats.
    :param sample: EM runs on that many points, drawn at random; by default 64 for each code, at least 2^17.
    :param seed: of the starting codes and the sample; by default torch's global generator gives one.
    :raises ValueError: for NaN, or more codes than distinct points.
    """
    checks.count("codes", codes)
    if codes > len(x):
        raise ValueError(f"codes={codes}, but there are only {len(x)} weights to share them: ask for fewer codes")
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{int((~torch.isfinite(x)).sum())} means or standard deviations of weights are not finite")
    seed = some_seed(seed)
    mixture = pin_first_code(start_mixture(x, codes, seed=seed), zero)
    floor = covariance_floor(x, codes)
    part = x
    sample = max(2**17, 64 * codes) if sample is None else sample
    if sample < len(x):
        part = x[torch.randint(len(x), (sample,), generator=torch.Generator().manual_seed(seed + 1)).to(x.device)]
    before = -math.inf
    for _ in range(iterations):
        mixture, likelihood = em_step(part, mixture, floor)
        mixture = pin_first_code(mixture, zero)
        if float(likelihood) - before < tolerance:
            break
        before = float(likelihood)
    return mixture


def pin_first_code(mixture: PlaneMixture, zero: bool) -> PlaneMixture:
    """With ``zero``, moves the code nearest to mu = 0 to the front, and sets its mean to mu = 0."""
    if not zero:
        return mixture
    first = mixture.means[:, 0].abs().argmin()
    order = torch.arange(len(mixture), device=first.device)
    order = torch.where(order == 0, first, torch.where(order == first, 0, order))
    return _first_at_zero(mixture[order])


def _first_at_zero(mixture: PlaneMixture) -> PlaneMixture:
    means, covariances = mixture.means.clone(), mixture.covariances.clone()
    covariances[0, 0, 0] += means[0, 0].square()  # the variance about the new mean
    means[0, 0] = 0
    return PlaneMixture(mixture.weights, means, covariances)


def quantise(
    x: Tensor,
    mixture: PlaneMixture,
    rate: float = 0.0,
    *,
    distance: Distance = "wasserstein",
    zero: bool = False,
    iterations: int = 3,
) -> tuple[PlaneMixture, Tensor]:
    """Alternates between labels of the smallest cost and the best codes for their members (Lloyd 1982)::

        "wasserstein"   a_i = argmin_k ((mu_i - m_k)^2 + (sigma_i - s_k)^2) / (2 v) - rate log pi_k
                        m_k and s_k the means of mu_i and sigma_i; v half the mean square to the nearest code
        "divergence"    a_i = argmin_k KL(N(m_k, s_k^2) || N(mu_i, sigma_i^2)) - rate log pi_k
                        m_k the mean of mu_i with weights 1 / sigma_i^2, s_k^-2 that of sigma_i^-2

    EM alone does not quantise well: it does not depend on the units of an axis, and spends codes on standard deviations
    that hardly differ. The divergence is what the ELBO loses if the mean field is the posterior: where the data say
    little about a weight, its mean can move far at little cost. With ``rate=1`` the divergence and the code length are
    both in nats. The divergence is computed for all codes and all weights, the Wasserstein distance by an exact search
    that skips most codes.

    :param x: points (mu, sigma), ``[n, 2]``.
    :param mixture: the codes to start from.
    :param rate: the weight of the code length in entropy-constrained quantisation (Chou, Lookabaugh and Gray 1989),
        dimensionless. The larger it is, the more weights share few codes, and the fewer bits a label takes.
    :param zero: whether code 0 has its mean fixed at mu = 0.
    :param iterations: largest number of rounds.
    :return: a mixture whose means are the codes (m_k, s_k), with shares and covariances of their members, and the label
        of every point, int32 ``[n]``.
    :raises ValueError: when the rate is negative, or for another distance.
    """
    checks.not_negative("rate", rate)
    if distance not in get_args(Distance):
        raise ValueError(f"distance={distance!r}: expected one of {', '.join(map(repr, get_args(Distance)))}")
    floor = covariance_floor(x, len(mixture))
    near = distance == "wasserstein"
    if near:
        labels = _nearest(x, mixture, x.new_ones(()), 0.0)
        error = (x.double() - mixture.means.double()[labels.long()]).square().sum(1).mean() / 2
        error = error.clamp_min(floor.sum())
    else:
        labels = least_divergence(x, mixture, rate)

    def codes(labels: Tensor) -> PlaneMixture:
        found = moments(x, labels, mixture, floor)
        if zero:
            found = _first_at_zero(found)
        if near:
            return found
        means = _divergence_means(x, labels, mixture)
        if zero:
            means[0, 0] = 0
        return PlaneMixture(found.weights, means, found.covariances)

    for _ in range(iterations):
        mixture = codes(labels)
        if near:
            mixture = pin_first_code(mixture, zero)
        new = _nearest(x, mixture, error, rate) if near else least_divergence(x, mixture, rate)
        if torch.equal(new, labels):
            break
        labels = new
    return codes(labels), labels


def _nearest(x: Tensor, mixture: PlaneMixture, error: Tensor, rate: float) -> Tensor:
    """``argmin_k |x_i - c_k|^2 / (2 error) - rate log pi_k``: :func:`assign` among circles of one size."""
    circle = error.double() * torch.eye(2, dtype=torch.float64, device=x.device)
    circles = PlaneMixture(mixture.weights, mixture.means, circle.expand(len(mixture), 2, 2))
    return assign(x, circles, rate=rate - 1)


def least_divergence(x: Tensor, mixture: PlaneMixture, rate: float) -> Tensor:
    """``argmin_k KL(N(m_k, s_k^2) || N(mu_i, sigma_i^2)) - rate log pi_k``, int32 ``[n]``."""
    m, s = mixture.means.to(x.dtype).unbind(1)
    own = -s.log() - rate * mixture.weights.clamp_min(1e-30).to(x.dtype).log()
    found = []
    for part in x.split(max(1, 2**21 // len(mixture))):
        mu, sigma = part.unbind(1)
        cost = (m - mu[:, None]).square_().add_(s.square())
        found.append(cost.mul_((0.5 / sigma.square())[:, None]).add_(own).argmin(1).to(torch.int32))
    return torch.cat(found)


def _divergence_means(x: Tensor, labels: Tensor, mixture: PlaneMixture) -> Tensor:
    """The codes (m_k, s_k) with the least ``sum_i KL(N(m_k, s_k^2) || q_i)`` over members; one without any stays."""
    mu, sigma = x.double().unbind(1)
    features = torch.stack([torch.ones_like(mu), sigma**-2, mu * sigma**-2], 1)
    sums = features.new_zeros(len(mixture), 3).index_add_(0, labels.long(), features)
    count, precision, weighed = sums.unbind(1)
    alive = (count > 0)[:, None]
    means = torch.stack([weighed / precision, (count / precision).sqrt()], 1)
    return torch.where(alive, means, mixture.means.double())


# ------------------------------------------------------------------------------------------- between codes


def between_codes(
    x: Tensor, labels: Tensor, mixture: PlaneMixture, share: float = 0.01
) -> tuple[Tensor, Tensor, Tensor]:
    """The points farthest from their code, which two codes share: the "ellipse points" of Lin et al.

    They are the points whose squared Mahalanobis distance is above its empirical (1 - share) quantile. The two codes
    with the largest ``log pi_k + log N(x_i; c_k, Sigma_k)`` share point i with the weights alpha and 1 - alpha, the
    softmax of these two scores.

    :param labels: the code of each point, ``[n]``.
    :param share: a fraction of the points; the paper uses 0.05.
    :return: sorted indices ``[e]``, codes ``[e, 2]`` (int32, the likelier one first), and alpha ``[e]`` in [1/2, 1].
    :raises ValueError: when ``share`` is not in [0, 1].
    """
    checks.fraction("share", share)
    count = int(share * len(x) + 1e-6) if len(mixture) > 1 else 0
    if not count:
        empty = torch.zeros(0, dtype=torch.long, device=x.device)
        return empty, torch.zeros(0, 2, dtype=torch.int32, device=x.device), x.new_zeros(0)
    index = mahalanobis(x, labels, mixture).topk(count).indices.sort().values
    half, bias = mixture.log_scores()
    codes, alphas = [], []
    step = max(1, 2**21 // len(mixture))
    for part in x[index].double().split(step):
        distance = triangular_norm(half, part[:, None] - mixture.means.double())
        best = (bias - distance.square_() / 2).topk(2)
        codes.append(best.indices.to(torch.int32))
        alphas.append(best.values.softmax(1)[:, 0].to(x.dtype))
    return index, torch.cat(codes), torch.cat(alphas)
