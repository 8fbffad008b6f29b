"""The stages that make a codebook, against scikit-learn, brute force and closed forms."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from sklearn.mixture import GaussianMixture
from torch import Tensor

from pyro_bnn.models.weight_sharing import clustering, merging
from pyro_bnn.models.weight_sharing import plane as planes
from pyro_bnn.models.weight_sharing.plane import PlaneMixture


def plane(n: int = 3000, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Points (mu, sigma) as of a trained mean field: small standard deviations of different sizes."""
    g = torch.Generator().manual_seed(seed)
    mu = 0.05 * torch.randn(n, generator=g, dtype=torch.float64)
    sigma = torch.exp(-4 + 0.3 * torch.randn(n, generator=g, dtype=torch.float64) - 3 * mu.abs())
    return torch.stack([mu, sigma], 1).to(dtype)


def mixture(k: int, seed: int = 0) -> PlaneMixture:
    """Codes with covariances of all shapes."""
    g = torch.Generator().manual_seed(seed)
    half = torch.randn(k, 2, 2, generator=g, dtype=torch.float64) * torch.tensor([0.03, 0.01], dtype=torch.float64)
    covariances = half.transpose(1, 2) @ half + 1e-6 * torch.eye(2)
    weights = torch.rand(k, generator=g, dtype=torch.float64) + 0.1
    return PlaneMixture(weights / weights.sum(), plane(k, seed=seed + 1), covariances)


def scores(x: Tensor, m: PlaneMixture, rate: float = 0.0) -> Tensor:
    normal = torch.distributions.MultivariateNormal(m.means, m.covariances)
    return (1 + rate) * m.weights.log() + normal.log_prob(x.double()[:, None])


# --------------------------------------------------------------------------------------------------- EM


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_of_em_is_that_of_scikit_learn(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also over several chunks and tiles; in float32 to 1e-4 of the spread of a code."""
    monkeypatch.setattr(planes, "CHUNK", 1100)
    monkeypatch.setattr(planes, "TILE", 64)
    x = plane(3000, dtype)
    floor = torch.full((2,), 1e-7, dtype=torch.float64)
    start = mixture(7)
    theirs = GaussianMixture(
        7, reg_covar=1e-7, max_iter=1, init_params="random", random_state=0,
        weights_init=start.weights.numpy(), means_init=start.means.numpy(),
        precisions_init=np.linalg.inv(start.covariances.numpy()),
    )  # fmt: skip
    with pytest.warns(UserWarning, match="did not converge"):
        theirs.fit(x.double().numpy())
    ours, likelihood = planes.em_step(x, start, floor)
    expected = scores(x, start).logsumexp(1).mean()
    tol = {"rtol": 1e-6, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(likelihood, expected, **tol)
    torch.testing.assert_close(ours.weights, torch.as_tensor(theirs.weights_), **tol)
    torch.testing.assert_close(ours.means, torch.as_tensor(theirs.means_), **tol)
    torch.testing.assert_close(ours.covariances, torch.as_tensor(theirs.covariances_), **tol)


def test_em_never_lowers_the_likelihood_and_finds_what_generated_the_points() -> None:
    """Four separate Gaussians: means within 5 standard errors, shares within 5 of theirs."""
    g = torch.Generator().manual_seed(0)
    centres = torch.tensor([[-0.4, 0.02], [0.0, 0.05], [0.3, 0.01], [0.9, 0.03]], dtype=torch.float64)
    n, s = 8000, torch.tensor([0.02, 0.002], dtype=torch.float64)
    which = torch.randint(4, (n,), generator=g)
    x = centres[which] + s * torch.randn(n, 2, generator=g, dtype=torch.float64)
    found = clustering.fit_plane(x, 4, iterations=60, tolerance=1e-9, seed=0)
    order = found.means[:, 0].argsort()
    counts = torch.bincount(which, minlength=4).double()
    assert ((found.means[order] - centres).abs() < 5 * s / counts.sqrt()[:, None]).all()
    assert ((found.weights[order] - counts / n).abs() < 5 * 0.5 / math.sqrt(n)).all()
    floor = clustering.covariance_floor(x, 9)
    m, values = clustering.start_mixture(x, 9, seed=0), []
    for _ in range(8):
        m, value = planes.em_step(x, m, floor)
        values.append(float(value))
    assert all(b >= a - 1e-6 for a, b in pairwise(values)) and values[-1] > values[0] + 1e-3


@pytest.mark.parametrize("rate", [0.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_assignment_is_that_of_brute_force(dtype: torch.dtype, rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planes, "CHUNK", 2000)
    monkeypatch.setattr(planes, "TILE", 32)
    x = plane(5000, dtype)
    m = clustering.fit_plane(x, 150, seed=0)
    values = scores(x, m, rate)
    labels = planes.assign(x, m, rate=rate).long()
    lost = values.amax(1) - values.gather(1, labels[:, None])[:, 0]
    assert float(lost.max()) < (1e-10 if dtype == torch.float64 else 1e-3)
    assert labels.unique().numel() > 100


def test_entropy_constraint_shortens_the_code() -> None:
    """The larger the rate, the lower the entropy of the labels; and the larger the distortion."""
    x = plane(20000)
    m = clustering.fit_plane(x, 64, seed=0)
    entropies, errors = [], []
    for rate in (0.0, 2.0, 8.0):
        new, labels = clustering.quantise(x, m, rate)
        p = torch.bincount(labels.long(), minlength=64).double() / len(x)
        entropies.append(float(-torch.xlogy(p, p).sum()))
        errors.append(float((x - new.means[labels.long()]).square().sum()))
    assert entropies[0] > entropies[1] + 0.1 > entropies[2] + 0.2
    assert errors[0] < errors[1] < errors[2]


def test_the_code_length_is_weighed_against_half_the_mean_square_error() -> None:
    """One step of ``|x_i - c_k|^2 / (2 v) - rate log pi_k`` by brute force; v is half the mean square at the start."""
    x = plane(5000)
    m = clustering.fit_plane(x, 8, seed=0)
    squares, nearest = torch.cdist(x, m.means).square().min(1)
    means = torch.stack([x[nearest == k].mean(0) for k in range(8)])
    shares = nearest.bincount(minlength=8) / len(x)
    cost = torch.cdist(x, means).square() / squares.mean() - 2.0 * shares.log()
    found, labels = clustering.quantise(x, m, 2.0, iterations=1)
    assert torch.equal(labels.long(), cost.argmin(1)) and not torch.equal(labels.long(), nearest)


@pytest.mark.parametrize("zero", [False, True])
def test_labels_are_the_nearest_codes_and_codes_the_means_of_their_members(zero: bool) -> None:
    """Lloyd's two conditions by brute force, where deviations hardly differ; the labels of Gaussians
    with covariances of their own leave a larger error."""
    x = plane(5000)
    x[:, 1] = 0.0122 + 2e-5 * torch.randn(5000, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    m = clustering.fit_plane(x, 32, zero=zero, seed=0)
    found, labels = clustering.quantise(x, m, zero=zero, iterations=100)
    distances = torch.cdist(x, found.means)
    own = distances.gather(1, labels.long()[:, None])[:, 0]
    torch.testing.assert_close(own, distances.amin(1), rtol=0, atol=1e-9)
    for k in range(32):
        mean = x[labels == k].mean(0)
        if zero and k == 0:
            mean[0] = 0
        torch.testing.assert_close(found.means[k], mean, rtol=1e-9, atol=1e-12)
    by_density = planes.assign(x, m).long()
    assert float(own.square().sum()) < float((x - m.means[by_density]).square().sum())


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_quantisation_by_the_divergence(zero: bool, rate: float) -> None:
    """Lloyd's two conditions against PyTorch's KL divergence, and a cost that falls from turn to turn."""
    x = plane(3000)
    start = clustering.fit_plane(x, 24, zero=zero, seed=0)
    costs = []
    for turns in (0, 1, 3, 60):
        found, labels = clustering.quantise(x, start, rate, distance="divergence", zero=zero, iterations=turns)
        q = torch.distributions.Normal(x[:, :1], x[:, 1:])
        to_each = torch.distributions.kl_divergence(torch.distributions.Normal(*found.means.unbind(1)), q)
        cost = to_each - rate * found.weights.log()
        own = cost.gather(1, labels.long()[:, None])[:, 0]
        costs.append(float(own.sum()))
    assert costs[0] > costs[1] > costs[2] > costs[3]
    torch.testing.assert_close(own, cost.amin(1), rtol=0, atol=1e-9)  # labels have settled
    for k in range(24):
        members = x[labels == k]
        if not len(members):
            continue
        assert float(found.weights[k]) == pytest.approx(len(members) / len(x), rel=1e-4)

        def lost(m: Tensor, s: Tensor, members: Tensor = members) -> Tensor:
            theirs = torch.distributions.Normal(*members.unbind(1))
            return torch.distributions.kl_divergence(torch.distributions.Normal(m, s), theirs).sum()

        by_m, by_s = torch.autograd.functional.jacobian(lost, tuple(found.means[k]))
        scale = float((1 / members[:, 1]).sum())
        assert (zero and k == 0) or abs(float(by_m)) < 1e-8 * scale
        assert abs(float(by_s)) < 1e-8 * scale
    assert not zero or float(found.means[0, 0]) == 0
    for k in range(24):
        members = x[labels == k]
        if len(members) > 1:
            centre = members.mean(0) * torch.tensor([float(not (zero and k == 0)), 1.0])
            variance = (members - centre).square().mean(0)
            floor = clustering.covariance_floor(x, 24)
            torch.testing.assert_close(found.covariances[k].diagonal(), variance + floor, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("distance", ["wasserstein", "divergence"])
@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_codes_without_weights_take_none(distance: clustering.Distance, rate: float) -> None:
    x = plane(500)
    m = clustering.fit_plane(x, 8, seed=0)
    weights = m.weights.clone()
    weights[3] = 0
    far = m.means.clone()
    far[3] = 1e3
    _, labels = clustering.quantise(x, PlaneMixture(weights, far, m.covariances), rate, distance=distance)
    assert set(labels.tolist()) <= set(range(8)) - {3} and len(labels.unique()) > 4


def test_the_divergence_spends_codes_where_the_data_speak() -> None:
    """Weights whose means are lost in their deviations share one code; in the plane they take as many as others."""
    g = torch.Generator().manual_seed(0)
    mu = torch.randn(4000, generator=g, dtype=torch.float64)
    sigma = torch.where(torch.arange(4000) < 2000, 10.0, 0.01).double()
    x = torch.stack([mu, sigma], 1)
    start = clustering.fit_plane(x, 32, seed=0)
    used = {}
    for distance in ("wasserstein", "divergence"):
        _, labels = clustering.quantise(x, start, 1.0, distance=distance, iterations=30)  # type: ignore[arg-type]
        used[distance] = len(labels[:2000].unique())
    assert used["divergence"] <= 2 < 4 <= used["wasserstein"]


def test_the_zero_code_stays_at_zero() -> None:
    found = clustering.fit_plane(plane(4000), 16, zero=True, seed=0)
    assert float(found.means[0, 0]) == 0.0 and float(found.means[0, 1]) > 0
    assert float(found.weights[0]) > 0.01 and (found.means[1:, 0] != 0).all()


@pytest.mark.parametrize("k", [1, 2, 5])
def test_a_network_without_standard_deviations_of_its_own(k: int) -> None:
    """All points on one line: codes still cover the means, and have positive definite covariances."""
    x = torch.stack([plane(2000)[:, 0], torch.full((2000,), 0.01, dtype=torch.float64)], 1).float()
    found = clustering.fit_plane(x, k, seed=0)
    torch.testing.assert_close(found.means[:, 1], torch.full((k,), 0.01, dtype=torch.float64), rtol=1e-4, atol=0)
    assert (torch.linalg.eigvalsh(found.covariances) > 0).all()
    quantised, labels = clustering.quantise(x, found, iterations=50)
    error = (x[:, 0] - quantised.means[labels.long(), 0]).square().mean() / x[:, 0].double().var(correction=0)
    # of the best quantiser of a Gaussian with 1, 2 and 5 levels (Max 1960), and 5 % for a sample and a local minimum
    assert float(error) < 1.05 * {1: 1.0, 2: 0.3634, 5: 0.07994}[k]


def test_bad_points() -> None:
    x = plane(50)
    with pytest.raises(ValueError, match="codes=51, but there are only 50 weights"):
        clustering.fit_plane(x, 51, seed=0)
    with pytest.raises(ValueError, match="codes=0: expected the number of codes"):
        clustering.fit_plane(x, 0, seed=0)
    with pytest.raises(ValueError, match="codes=3, but only 2 distinct pairs of mean and standard deviation"):
        clustering.fit_plane(x[:2].repeat(20, 1), 3, seed=0)
    with pytest.raises(ValueError, match="1 means or standard deviations of weights are not finite"):
        clustering.fit_plane(torch.cat([x, torch.tensor([[math.nan, 1.0]])]), 3, seed=0)
    constant = clustering.fit_plane(torch.tensor([[0.0, 0.01]]).repeat(30, 1), 1, seed=0)
    torch.testing.assert_close(constant.means, torch.tensor([[0.0, 0.01]]).double())
    with pytest.raises(ValueError, match="share=2: expected a share of the weights"):
        clustering.between_codes(x, torch.zeros(50, dtype=torch.int32), mixture(3), 2)
    with pytest.raises(ValueError, match="rate=-1: expected the weight of the code length"):
        clustering.quantise(x, mixture(3), -1)


# --------------------------------------------------------------------------------- outliers and in between


def test_outliers() -> None:
    loc = torch.tensor([0.1, -0.5, 0.3, 0.0, 0.25, -0.2, 0.0, 0.01, 0.02, -0.03])
    scale = torch.full_like(loc, 0.1)
    scale[7] = 1e-4
    gradient = torch.zeros(10).index_fill_(0, torch.tensor([3]), -9.0)

    def found(**rules: object) -> list[int]:
        return clustering.find_outliers(loc, scale, **rules).tolist()  # type: ignore[arg-type]

    assert found(cap=0.2) == [1, 2]
    assert found(magnitude=0.22, cap=1.0) == [1, 2, 4]
    assert found(magnitude=0.22, cap=0.2) == [1, 2]
    assert found(snr=50.0, cap=1.0) == [7]
    assert found(gradient=gradient, gradient_share=0.1, cap=1.0) == [3]  # the size counts, not the sign
    assert found(magnitude=0.22, gradient=gradient, gradient_share=0.1, snr=50.0, cap=1.0) == [1, 2, 3, 4, 7]
    assert found(cap=0.0) == [] and found(magnitude=9.0, cap=0.5) == []
    for wrong, message in (({"cap": 1.5}, "cap=1.5"), ({"snr": -1.0}, "snr=-1.0"), ({"gradient": loc[1:]}, "gradient")):
        with pytest.raises(ValueError, match=message):
            found(**wrong)


def test_points_between_codes() -> None:
    """The empirical quantile of the Mahalanobis distance, and the softmax of log densities with their weights."""
    x, m = plane(2000), clustering.fit_plane(plane(2000), 12, seed=0)
    labels = planes.assign(x, m)
    index, codes, alpha = clustering.between_codes(x, labels, m, 0.05)
    assert len(index) == 100 and index.tolist() == sorted(index.tolist())
    d = x - m.means[labels.long()]
    distances = (d[:, None] @ torch.linalg.inv(m.covariances)[labels.long()] @ d[:, :, None]).reshape(-1)
    inside = torch.ones(2000, dtype=torch.bool).index_fill_(0, index, False)
    assert distances[index].min() >= distances[inside].max()
    top = scores(x[index], m).topk(2)
    assert torch.equal(top.indices, codes.long())
    torch.testing.assert_close(alpha, top.values.softmax(1)[:, 0])
    assert float(alpha.min()) >= 0.5
    assert len(clustering.between_codes(x, labels, m, 0.0)[0]) == 0


# ----------------------------------------------------------------------------------------------- merging


def pairs(count: int = 300) -> tuple[PlaneMixture, PlaneMixture]:
    return mixture(count, 1), mixture(count, 5)


def test_wasserstein_is_that_of_a_matrix_square_root() -> None:
    one, two = pairs()
    ours = merging.wasserstein(one.means, one.covariances, two.means, two.covariances)
    for i in range(len(one)):
        s1, s2 = one.covariances[i].numpy(), two.covariances[i].numpy()
        half = sqrtm(s1).real
        exact = ((one.means[i] - two.means[i]) ** 2).sum() + np.trace(s1 + s2 - 2 * sqrtm(half @ s2 @ half).real)
        assert abs(float(ours[i]) - float(exact)) < 1e-11
    # one-dimensional Gaussians: the distance in the plane itself
    flat = torch.zeros(300, 2, 2, dtype=torch.float64)
    flat[:, 0, 0] = one.means[:, 1].square()
    other = torch.zeros_like(flat)
    other[:, 0, 0] = two.means[:, 1].square()
    zeros = torch.zeros_like(one.means[:, 0])
    line = [torch.stack([m.means[:, 0], zeros], 1) for m in (one, two)]
    exact = (one.means - two.means).square().sum(1)
    torch.testing.assert_close(merging.wasserstein(line[0], flat, line[1], other), exact, rtol=1e-9, atol=1e-15)


def test_merged_codes() -> None:
    """Moments of the pair as a mixture; the plain average; the point of the geodesic, at t times the distance."""
    one, two = pairs()
    total = one.weights + two.weights
    t = (two.weights / total)[:, None]
    moment = merging.merge_pair(one, two, "moment")
    mean = (1 - t) * one.means + t * two.means
    second = (1 - t)[..., None] * (one.covariances + one.means[:, :, None] * one.means[:, None])
    second = second + t[..., None] * (two.covariances + two.means[:, :, None] * two.means[:, None])
    torch.testing.assert_close(moment.means, mean, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(moment.covariances, second - mean[:, :, None] * mean[:, None], rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(moment.weights, total)
    average = merging.merge_pair(one, two, "average")
    torch.testing.assert_close(average.means, (one.means + two.means) / 2)
    torch.testing.assert_close(average.covariances, (one.covariances + two.covariances) / 2)
    geodesic = merging.merge_pair(one, two, "w2")
    whole = merging.wasserstein(one.means, one.covariances, two.means, two.covariances).sqrt()
    part = merging.wasserstein(one.means, one.covariances, geodesic.means, geodesic.covariances).sqrt()
    torch.testing.assert_close(part, t[:, 0] * whole, rtol=1e-5, atol=1e-8)


def naive_merge(m: PlaneMixture, distance: float) -> list[tuple[float, ...]]:
    """The closest pair of all, until none is close."""
    codes = [m[i] for i in range(len(m))]
    while True:
        best = (distance, -1, -1)
        for i in range(len(codes)):
            for j in range(i):
                d = merging.wasserstein(codes[i].means, codes[i].covariances, codes[j].means, codes[j].covariances)
                best = min(best, (float(d), i, j))
        if best[1] < 0:
            return sorted((*c.means.tolist(), float(c.weights)) for c in codes)
        one, two = codes.pop(best[1]), codes.pop(best[2])
        codes.append(merging.merge_pair(two, one))


def test_merging_is_greedy_over_all_pairs() -> None:
    m = clustering.fit_plane(plane(4000), 40, seed=0)
    distance = 3 * float(merging.neighbour_distance(m))
    merged, into = merging.merge_closest(m, distance=distance)
    alive = merged.weights > 0
    left = [(*c.tolist(), float(w)) for c, w in zip(merged.means[alive], merged.weights[alive], strict=True)]
    np.testing.assert_allclose(sorted(left), naive_merge(m, distance), rtol=1e-9)
    assert 5 < int(alive.sum()) < 35
    assert torch.equal(into.unique(), alive.nonzero().flatten())
    weights = torch.zeros(40, dtype=torch.float64).index_add_(0, into, m.weights)
    torch.testing.assert_close(weights, merged.weights)
    # mean and covariance of all points stay what they were
    for a in (m, merged):
        a_mean = (a.weights[:, None] * a.means).sum(0)
        second = (a.weights[:, None, None] * (a.covariances + a.means[:, :, None] * a.means[:, None])).sum(0)
        if a is m:
            mean, spread = a_mean, second
    torch.testing.assert_close(a_mean, mean, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(second, spread, rtol=1e-10, atol=1e-14)


def test_the_tests_of_a_merger() -> None:
    m = clustering.fit_plane(plane(4000), 20, seed=0)
    kept = {"distance": math.inf, "gradient": torch.ones(20, 2, dtype=torch.float64)}
    assert int((merging.merge_closest(m, distance=math.inf)[0].weights > 0).sum()) == 1
    assert int((merging.merge_closest(m, **kept, gradient_limit=1e-9)[0].weights > 0).sum()) == 20  # type: ignore[arg-type]
    limit = float(m.covariances.diagonal(dim1=-2, dim2=-1).sum(-1).min())
    assert int((merging.merge_closest(m, distance=math.inf, variance_limit=limit)[0].weights > 0).sum()) == 20
    fixed = torch.zeros(20, dtype=torch.bool).index_fill_(0, torch.tensor([3]), True)
    merged, into = merging.merge_closest(m, distance=math.inf, fixed=fixed)
    assert int((merged.weights > 0).sum()) == 2 and torch.equal(merged.means[3], m.means[3])
    assert int((into == 3).sum()) == 1
    with pytest.raises(ValueError, match="merge='mean': expected one of 'moment', 'average', 'w2'"):
        merging.merge_closest(m, distance=1.0, how="mean")  # type: ignore[arg-type]
