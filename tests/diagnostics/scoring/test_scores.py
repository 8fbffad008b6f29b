"""The CRPS against numerical integration, sums and closed forms; intervals against numbers worked by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyro_bnn import likelihoods
from pyro_bnn.diagnostics.scoring import scores
from pyro_bnn.diagnostics.scoring.scores import crps, interval_coverage, interval_width
from pyro_bnn.posterior import Prediction

quick = settings(deadline=None, max_examples=25)


def normal(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(means: Tensor, scale: float = 1.0) -> Prediction:
    return Prediction(means, likelihoods.Gaussian(scale=scale))


def poisson(rates: Tensor) -> Prediction:
    return Prediction(rates.log(), likelihoods.Poisson())


def integral(cdf: Callable[[float], float], y: float, reach: float = 40.0) -> float:
    below = scipy.integrate.quad(lambda z: cdf(z) ** 2, -reach, y, limit=500, epsabs=1e-10)[0]
    return float(below + scipy.integrate.quad(lambda z: (1 - cdf(z)) ** 2, y, reach, limit=500, epsabs=1e-10)[0])


def test_one_gaussian_has_the_closed_form() -> None:
    means, y = normal((1, 1, 50)), 3 * normal((50,), 1)
    z = (y - means[0, 0]).numpy() / 0.7
    expected = 0.7 * (z * (2 * scipy.stats.norm.cdf(z) - 1) + 2 * scipy.stats.norm.pdf(z) - 1 / math.sqrt(math.pi))
    np.testing.assert_allclose(crps(gaussian(means, 0.7), y), expected, rtol=1e-10)


def test_a_gaussian_mixture_is_the_integral_of_the_squared_difference() -> None:
    means, y = 2 * normal((3, 2, 5)), 3 * normal((5,), 1)
    found = crps(gaussian(means, 0.5), y)
    for n in range(5):
        m = means[:, :, n].flatten().numpy()
        assert found[n] == pytest.approx(integral(lambda z, m=m: scipy.stats.norm.cdf(z, m, 0.5).mean(), float(y[n])))


@pytest.mark.parametrize("targets", [(), (2,)])
def test_members_of_different_scales(targets: tuple[int, ...]) -> None:
    outputs = normal((2, 2, 4, 2 * math.prod(targets)))
    y = normal((4, *targets), 1)
    found = crps(Prediction(outputs, likelihoods.HeteroscedasticGaussian()), y)
    assert found.shape == y.shape
    means, scale = (part.reshape(4, 4, -1) for part in outputs.chunk(2, -1))
    scale = torch.nn.functional.softplus(scale) + 1e-6
    for n in range(4):
        for d in range(math.prod(targets)):
            m, s = means[:, n, d].numpy(), scale[:, n, d].numpy()
            expected = integral(lambda z, m=m, s=s: scipy.stats.norm.cdf(z, m, s).mean(), float(y.reshape(4, -1)[n, d]))
            assert float(found.reshape(4, -1)[n, d]) == pytest.approx(expected, rel=1e-6)


def test_the_learned_noise_of_every_member() -> None:
    means, noise, y = normal((2, 3, 4)), torch.rand(2, 3).double() + 0.1, normal((4,), 1)
    found = crps(Prediction(means, likelihoods.Gaussian(), noise), y)
    for n in range(4):
        m, s = means[:, :, n].numpy(), noise.numpy()
        expected = integral(lambda z, m=m, s=s: scipy.stats.norm.cdf(z, m, s).mean(), float(y[n]))
        assert found[n] == pytest.approx(expected, rel=1e-6)


def test_a_column_of_outputs_and_a_row_of_targets() -> None:
    means, y = normal((3, 2, 6)), normal((6,), 1)
    expected = crps(gaussian(means), y)
    for outputs, targets in ((means[..., None], y), (means[..., None], y[:, None]), (means, y[:, None])):
        np.testing.assert_allclose(crps(gaussian(outputs), targets), expected)


def test_certain_gaussians_give_the_absolute_error() -> None:
    means, y = normal((1, 1, 20)), normal((20,), 1)
    np.testing.assert_allclose(crps(gaussian(means, 1e-9), y), (y - means[0, 0]).abs(), atol=1e-8)
    # Several certain members: E|Y - y| - E|Y - Y'| / 2 over them.
    means = normal((5, 2, 20))
    m = means.flatten(0, 1)
    expected = (m - y).abs().mean(0) - (m[:, None] - m).abs().mean((0, 1)) / 2
    np.testing.assert_allclose(crps(gaussian(means, 1e-9), y), expected, atol=1e-8)


def test_poisson_is_the_sum_over_the_counts() -> None:
    generator = torch.Generator().manual_seed(0)
    rates = 30 * torch.rand(3, 2, 40, generator=generator, dtype=torch.float64) ** 3
    y = torch.poisson(2 * rates.mean((0, 1)), generator=generator)
    counts = np.arange(1000)[:, None, None]
    cdf = scipy.stats.poisson.cdf(counts, rates.flatten(0, 1).numpy()).mean(1)
    expected = ((cdf - (y.numpy() <= counts[:, 0])) ** 2).sum(0)
    np.testing.assert_allclose(crps(poisson(rates), y), expected, atol=1e-8)


def test_counts_far_outside_the_support() -> None:
    # E|Y - y| - E|Y - Y'| / 2, where Y lies on one side of y: |y - m| less half of the mean difference.
    rates, y = torch.tensor([[[4.0, 400.0]]]).double(), torch.tensor([3000.0, 0.0]).double()
    counts = np.arange(1000)
    for n, rate in enumerate((4.0, 400.0)):
        cdf = scipy.stats.poisson.cdf(counts, rate)
        expected = abs(float(y[n]) - rate) - (cdf * (1 - cdf)).sum()
        assert crps(poisson(rates), y)[n] == pytest.approx(expected, abs=1e-8)


def test_a_rate_of_zero_and_of_several_magnitudes() -> None:
    # Half of the mass at 0 and half around 1000.
    rates, y = torch.tensor([[[0.0]], [[1000.0]]]).double(), torch.tensor([10.0]).double()
    counts = np.arange(3000)
    cdf = (scipy.stats.poisson.cdf(counts, 0) + scipy.stats.poisson.cdf(counts, 1000)) / 2
    assert crps(poisson(rates), y)[0] == pytest.approx(((cdf - (counts >= 10)) ** 2).sum(), abs=1e-7)
    assert crps(poisson(torch.zeros(1, 1, 1).double()), torch.tensor([7.0]).double()).tolist() == [7]


def test_huge_rates_are_scored_as_gaussians_in_good_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = torch.tensor([[[3.0, 2000.0, 1e30]], [[5.0, 2200.0, 2e30]]]).double()
    y = torch.tensor([4.0, 2150.0, 1e30]).double()
    found = crps(poisson(rates), y)
    assert found[2] == pytest.approx(0.25e30)  # E|Y - y| - E|Y - Y'| / 2 = 1/2 - 1/4
    # The other rows are scored as if it were not there; and where both ways can be had, they agree.
    np.testing.assert_allclose(found[:2], crps(poisson(rates[..., :2]), y[:2]), rtol=1e-9)
    monkeypatch.setattr(scores, "_MOST_COUNTS", 500)
    assert crps(poisson(rates), y)[1] == pytest.approx(float(found[1]), abs=0.2)
    assert crps(poisson(rates), y)[1] != found[1]


def test_the_members_are_taken_in_pieces_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    means, rates, y = normal((10, 3, 20)), normal((10, 3, 20), 2).exp(), torch.arange(20.0).double()
    whole = crps(gaussian(means), y), crps(poisson(rates), y)
    largest = 0
    erf, xlogy = torch.erf, torch.xlogy

    def watched(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Tensor) -> Tensor:
            nonlocal largest
            result = function(*args)
            largest = max(largest, result.numel())
            return result

        return call

    monkeypatch.setattr(torch, "erf", watched(erf))
    monkeypatch.setattr(torch, "xlogy", watched(xlogy))
    for limit in (100, 1000):
        largest = 0
        monkeypatch.setattr(scores, "_MAX_ELEMENTS", limit)
        pieces = crps(gaussian(means), y), crps(poisson(rates), y)
        np.testing.assert_allclose(pieces[0], whole[0], rtol=1e-12)
        np.testing.assert_allclose(pieces[1], whole[1], atol=1e-9)
        assert 0 < largest <= limit


def test_float32_is_computed_in_float64() -> None:
    means, y = 1000 + normal((4, 2, 30)), 1000 + normal((30,), 1)
    single = crps(gaussian(means.float()), y.float())
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single, crps(gaussian(means.float().double()), y.float().double()), rtol=1e-6)


@quick
@given(st.integers(1, 6), st.integers(1, 8), st.floats(0.1, 5), st.integers(0, 10**6))
def test_invariances_of_the_gaussian_score(members: int, rows: int, scale: float, seed: int) -> None:
    means, y = normal((2, members, rows), seed), normal((rows,), seed + 1)
    found = crps(gaussian(means, scale), y)
    assert (found >= 0).all()
    assert (found <= (means - y).abs().mean((0, 1)) + scale).all()
    order = torch.randperm(members, generator=torch.Generator().manual_seed(seed))
    np.testing.assert_allclose(crps(gaussian(means[:, order].flip(0), scale), y), found, rtol=1e-9)
    rows_order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    np.testing.assert_allclose(
        crps(gaussian(means[..., rows_order], scale), y[rows_order]), found[rows_order], rtol=1e-9
    )
    # It moves and scales with y.
    np.testing.assert_allclose(crps(gaussian(3 * means + 7, 3 * scale), 3 * y + 7), 3 * found, rtol=1e-7)
    # A copy of every member changes nothing.
    np.testing.assert_allclose(crps(gaussian(means.repeat(2, 1, 1), scale), y), found, rtol=1e-9)


@quick
@given(st.floats(0.0, 50), st.floats(0.0, 50), st.integers(0, 100))
def test_the_poisson_score_is_the_expected_distance_less_half_the_spread(first: float, second: float, y: int) -> None:
    rates = torch.tensor([[[first]], [[second]]]).double()
    counts = np.arange(300)
    cdf = scipy.stats.poisson.cdf(counts, rates[:, 0].numpy()).mean(0)
    mass = np.diff(cdf, prepend=0)
    expected = (mass * abs(counts - y)).sum() - (mass[:, None] * mass * abs(counts[:, None] - counts)).sum() / 2
    assert crps(poisson(rates), torch.tensor([y]).double())[0] == pytest.approx(expected, abs=1e-7)


def test_the_true_distribution_scores_best() -> None:
    y = normal((4000,))
    truth = float(crps(gaussian(torch.zeros(1, 1, 4000).double()), y).mean())
    assert truth == pytest.approx(1 / math.sqrt(math.pi), abs=5 * float(y.abs().std()) / math.sqrt(4000))
    for shift, scale in ((0.3, 1.0), (0.0, 0.5), (0.0, 2.0)):
        assert float(crps(gaussian(torch.full((1, 1, 4000), shift).double(), scale), y).mean()) > truth


def test_bad_input() -> None:
    means = normal((2, 3, 4))
    with pytest.raises(TypeError, match="Categorical gives Categorical; use nll"):
        crps(Prediction(normal((2, 3, 4, 5)), likelihoods.Categorical()), torch.zeros(4))
    with pytest.raises(TypeError, match="has no likelihood"):
        crps(Prediction(means, None), torch.zeros(4))
    with pytest.raises(ValueError, match=r"y has shape \(3,\); the prediction is for targets of shape \(4,\)"):
        crps(gaussian(means), torch.zeros(3))
    with pytest.raises(ValueError, match=r"shape \(8,\); the prediction is for targets of shape \(4, 2\)"):
        crps(gaussian(normal((2, 3, 4, 2))), torch.zeros(8))
    with pytest.raises(ValueError, match="y holds NaN or infinite"):
        crps(gaussian(means), torch.full((4,), math.nan))
    with pytest.raises(ValueError, match="not counts"):
        crps(poisson(means.exp()), torch.full((4,), 0.5))
    with pytest.raises(ValueError, match="the predicted mean holds NaN or infinite"):
        crps(poisson(torch.full((1, 1, 4), math.inf)), torch.zeros(4))


def test_coverage_and_width_by_hand() -> None:
    low, high = torch.tensor([[0.0, 1.0], [2.0, -1.0]]), torch.tensor([[1.0, 1.0], [5.0, 3.0]])
    y = torch.tensor([[1.0, 1.0], [1.9, 4.0]])
    assert interval_coverage((low, high), y).tolist() == [[1, 1], [0, 0]]
    assert interval_width((low, high)).tolist() == [[1, 0], [3, 4]]
    assert interval_coverage((low[:, 0], high[:, 0]), y[:, :1]).tolist() == [1, 0]


def test_intervals_of_a_gaussian_have_their_width_and_coverage() -> None:
    prediction, y = gaussian(torch.zeros(2, 2, 10_000).double(), 2.0), 2 * normal((10_000,))
    interval = prediction.interval(0.9)
    assert float(interval_width(interval).mean()) == pytest.approx(2 * 2 * scipy.stats.norm.ppf(0.95), rel=1e-6)
    covered = float(interval_coverage(interval, y).mean())
    assert covered == pytest.approx(0.9, abs=4 * math.sqrt(0.9 * 0.1 / 10_000))


def test_likelihoods_of_other_distributions_are_refused() -> None:
    class Laplace(likelihoods.Likelihood):
        kind = "regression"

        def distribution(self, f: Tensor, noise: Tensor | None = None) -> dist.TorchDistribution:
            return dist.Laplace(f, torch.ones_like(f))

    with pytest.raises(TypeError, match="Laplace gives Laplace"):
        crps(Prediction(normal((2, 3, 4)), Laplace()), torch.zeros(4))
