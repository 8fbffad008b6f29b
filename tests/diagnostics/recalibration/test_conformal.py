"""Conformal sets and intervals: worked by hand, and their coverage against its exact distribution."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diagnostics.linear import linear, normal, sampled
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_bnn as pb
from pyro_bnn.diagnostics.recalibration.conformal import ConformalIntervals, ConformalSets
from pyro_bnn.diagnostics.recalibration.temperature import ScaledPosterior
from pyro_bnn.likelihoods import Bernoulli, Categorical, Gaussian, HeteroscedasticGaussian, Poisson

ONE = {"num_samples": 1, "seed": 0}


def classifier(factor: float = 1.0, classes: int = 3) -> pb.Posterior:
    """One function whose logits are ``factor x``."""
    return linear(factor * torch.eye(classes, dtype=torch.float64)[None, None], Categorical())


def regression(scale: float = 1.0, columns: int = 1) -> pb.Posterior:
    """One function that is x, with noise of one size."""
    return linear(torch.eye(columns, dtype=torch.float64)[None, None], Gaussian(scale=scale))


def log_of(*probs: list[float]) -> Tensor:
    return torch.tensor(probs, dtype=torch.float64).log()


def labelled(n: int, seed: int) -> tuple[Tensor, Tensor]:
    x = 1.5 * normal(n, 3, seed=seed)
    return x, sampled(x, seed=seed + 1)


# ------------------------------------------------------------------------------------------------ worked by hand


def held_out() -> tuple[Tensor, Tensor]:
    """Four rows whose labels come first, first, second and third in their order of probability."""
    x = log_of([0.52, 0.28, 0.2], [0.2, 0.6, 0.2], [0.3, 0.15, 0.55], [0.5, 0.3, 0.2])
    return x, torch.tensor([0, 1, 0, 2])


def test_aps_by_hand() -> None:
    # Scores 0, 0, 0.55 and 0.8, the probability above that of the label; k = ceil(5 * 0.6) = 3.
    sets = ConformalSets(classifier(), held_out(), 0.6, **ONE)
    assert float(sets.threshold) == pytest.approx(0.55)
    x = log_of([0.6, 0.3, 0.1], [0.25, 0.35, 0.4], [0.34, 0.34, 0.32])
    expected = [[True, False, False], [False, True, True], [True, True, False]]
    assert sets.predict(x).tolist() == expected
    # k = ceil(5 * 0.8) = 4, threshold 0.8
    sizes = ConformalSets(classifier(), held_out(), 0.8, **ONE).predict(x).sum(1)
    assert sizes.tolist() == [2, 3, 3]


def test_lac_by_hand() -> None:
    # Scores 0.48, 0.4, 0.7 and 0.8; the third smallest is 0.7: classes of probability 0.3 and more.
    sets = ConformalSets(classifier(), held_out(), 0.6, score="lac", **ONE)
    assert float(sets.threshold) == pytest.approx(0.7)
    x = log_of([0.6, 0.31, 0.09], [0.29, 0.31, 0.4], [0.28, 0.29, 0.43])
    assert sets.predict(x).tolist() == [[True, True, False], [False, True, True], [False, False, True]]
    # k = 2, threshold 0.48: no class has 0.52 in the last row, whose set is empty.
    assert ConformalSets(classifier(), held_out(), 0.4, score="lac", **ONE).predict(x).sum(1).tolist() == [1, 0, 0]


def test_randomised_aps_takes_the_last_class_as_often_as_the_threshold_says() -> None:
    # With threshold q, class c is in when u < (q - probability above c) / p_c.
    sets = ConformalSets(classifier(), labelled(200, 0), 0.8, randomised=True, **ONE)
    n, p = 4000, np.array([0.5, 0.3, 0.2])
    found = sets.predict(log_of([0.5, 0.3, 0.2]).expand(n, -1))
    share = np.clip((float(sets.threshold) - np.array([0, 0.5, 0.8])) / p, 0, 1)
    assert 0.02 < share[2] < 0.98
    for column, probability in zip(found.T, share, strict=True):
        assert stats.binomtest(int(column.sum()), n, probability).pvalue > 1e-3


def test_conformal_objects_say_their_level_rows_and_threshold() -> None:
    """Proves that a console shows what was asked for and what came out."""
    sets = ConformalSets(classifier(), labelled(60, 0), 0.8, score="lac", **ONE)
    words = f"ConformalSets(level=0.8, score='lac', randomised=False, num_rows=60, threshold={sets.threshold:.4g})"
    assert repr(sets) == words and sets.num_rows == 60
    x = normal(50, 1)
    intervals = ConformalIntervals(regression(), (x, x[:, 0] + 1), **ONE)
    assert repr(intervals) == f"ConformalIntervals(level=0.9, num_rows=50, threshold={intervals.threshold:.4g})"
    several = repr(ConformalIntervals(regression(columns=2), (torch.cat((x, x), 1), torch.cat((x, x), 1)), **ONE))
    assert several.count("threshold=[") == 1 and several.endswith("])")


def test_probabilities_of_all_draws_and_members_are_averaged() -> None:
    weights, (x, y) = 2 * normal(3, 2, 3, 3), labelled(100, 0)
    probs = torch.einsum("skcd,nd->sknc", weights, x).softmax(-1).mean((0, 1))
    sets = ConformalSets(linear(weights, Categorical()), (x, y), num_samples=3, score="lac")
    k = math.ceil(101 * 0.9)
    q = (1 - probs[torch.arange(100), y]).sort().values[k - 1]
    assert float(sets.threshold) == pytest.approx(float(q), rel=1e-12)
    away = (1 - probs - q).abs() > 1e-9  # the row of the threshold itself may fall on either side by rounding
    assert torch.equal(sets.predict(x)[away], (1 - probs <= q)[away])


def test_intervals_of_one_function_and_noise_are_quantiles_of_the_residuals() -> None:
    """low - q = x - z - (|r|_(k) - z): what the posterior believes of its noise cancels."""
    x, new = normal(49, 1), normal(5, 1, seed=2)
    residual = 3 * normal(49, seed=1)
    half = float(residual.abs().sort().values[math.ceil(50 * 0.9) - 1])
    for scale in (0.1, 1.0, 20.0):
        intervals = ConformalIntervals(regression(scale), (x, x[:, 0] + residual), 0.9, **ONE)
        assert float(intervals.threshold) == pytest.approx(half - scale * stats.norm.ppf(0.95), abs=1e-9)
        low, high = intervals.predict(new)
        np.testing.assert_allclose(low, new[:, 0] - half, atol=1e-9)
        np.testing.assert_allclose(high, new[:, 0] + half, atol=1e-9)


def test_each_output_has_a_threshold_of_its_own() -> None:
    x = normal(99, 2)
    noise = normal(99, 2, seed=1) * torch.tensor([1.0, 100.0], dtype=torch.float64)
    both = ConformalIntervals(regression(columns=2), (x, x + noise), **ONE)
    for column in range(2):
        y = x[:, column] + noise[:, column]
        alone = ConformalIntervals(regression(), (x[:, column : column + 1], y), **ONE)
        assert float(both.threshold[column]) == pytest.approx(float(alone.threshold), abs=1e-9)
    low, high = both.predict(x)
    assert low.shape == (99, 2)
    # The datum that is the threshold lies on the bound, up to rounding.
    assert (noise.abs() <= (high - low) / 2 + 1e-9).sum(0).tolist() == [90, 90]


def test_evaluate_counts_what_predict_gives() -> None:
    x, y = labelled(300, 5)
    sets = ConformalSets(classifier(0.3), labelled(60, 0), **ONE)
    found = sets.predict(x)
    result = sets.evaluate((x, y))
    assert result["coverage"] == pytest.approx(float(found[torch.arange(300), y].double().mean()))
    assert result["size"] == pytest.approx(float(found.sum(1).double().mean()))

    x, noise = normal(300, 1), normal(300, seed=1)
    intervals = ConformalIntervals(regression(0.2), (x[:60], x[:60, 0] + noise[:60]), **ONE)
    low, high = intervals.predict(x)
    result = intervals.evaluate((x, x[:, 0] + noise))
    assert result["coverage"] == pytest.approx(float((noise.abs() <= (high - low) / 2).double().mean()))
    assert result["width"] == pytest.approx(float((high - low).mean()))


# ------------------------------------------------------------------------------------------------------- rounding


def tied(n: int) -> tuple[pb.Posterior, Tensor, Tensor]:
    """A network in float32, a few inputs, and for each of n rows the index of its input."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 64), nn.Tanh(), nn.Linear(64, 3))
    model = pb.models.Dense(net, Categorical(), 100)
    draws = {site.name: 0.3 * torch.randn(16, *site.shape) for site in model.sites()}
    return pb.Posterior.from_draws(model, draws), torch.randn(4, 12), torch.randint(4, (n,))


@pytest.mark.parametrize("score", ["lac", "aps"])
def test_rows_keep_their_sets_whatever_the_rounding_of_their_batch(score: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that a row whose score is the threshold keeps its class when a batch of another size rounds it up."""
    posterior, cells, index = tied(400)
    y = torch.multinomial(posterior.predict(cells).probs[index], 1)[:, 0]
    found = ConformalSets(posterior, (cells[index], y), 0.9, score=score)
    whole = found.predict(cells[index])
    assert float(whole.gather(1, y[:, None]).double().mean()) >= 0.9
    for start in range(4):
        assert torch.equal(found.predict(cells[index[start : start + 1]]), whole[start : start + 1])
    probs = pb.Prediction.probs.fget

    def scale_scores(by: float) -> None:
        """Class probabilities under which every score is multiplied by a number: 1 - p, or a sum of p."""

        def scaled(prediction: pb.Prediction) -> torch.Tensor:
            return by * probs(prediction) if score == "aps" else 1 - by * (1 - probs(prediction))

        monkeypatch.setattr(pb.Prediction, "probs", property(scaled))

    for factor in (1 + 1e-6, 1 - 1e-6):  # ten roundings of float32
        scale_scores(factor)
        assert torch.equal(found.predict(cells[index]), whole)
    scale_scores(1 + 3e-4)
    assert not torch.equal(found.predict(cells[index]), whole), "that is no rounding"


@pytest.mark.parametrize(("dtype", "slack"), [(torch.float32, 6.4e-6), (torch.float64, 1.8e-12)])
def test_intervals_of_equal_rows_hold_them_whatever_the_rounding(dtype: torch.dtype, slack: float) -> None:
    """Proves that bounds are wider by a share of their size that follows the dtype, and by no more."""
    x = torch.full((30, 1), 1000.0, dtype=dtype)
    y = x[:, 0] + 3
    found = ConformalIntervals(linear(torch.ones(1, 1, 1, 1, dtype=dtype), Gaussian(scale=1.0)), (x, y), **ONE)
    low, high = found.predict(x)
    beyond = (high - y).double()
    assert float(beyond.min()) > 0.4 * slack * 1000 and float(beyond.max()) < 2.5 * slack * 1000
    assert found.evaluate((x, y + 0.2 * slack * 1000))["coverage"] == 1
    assert found.evaluate((x, y + 5 * slack * 1000))["coverage"] == 0


def test_bounds_of_counts_stay_whole() -> None:
    rate = torch.full((1, 1, 1, 1), 2.0)
    x, y = torch.ones(30, 1), torch.arange(30) % 15
    low, high = ConformalIntervals(linear(rate, Poisson()), (x, y), **ONE).predict(x)
    assert torch.equal(low, low.round()) and torch.equal(high, high.round())


# ------------------------------------------------------------------------------------------------------- coverage

#: a seed and the numbers of held-out and new data, to the result of evaluate
Trial = Callable[[int, int, int], dict[str, float]]


def sets(factor: float, **options: Any) -> Trial:
    """Data under the softmax of x, and a posterior that believes in that of ``factor x``."""

    def make(seed: int, n: int, m: int) -> dict[str, float]:
        x, y = labelled(n + m, seed)
        return ConformalSets(classifier(factor), (x[:n], y[:n]), 0.8, num_samples=1, seed=seed, **options).evaluate(
            (x[n:], y[n:])
        )

    return make


def intervals(scale: float) -> Trial:
    """Noise that grows with x, and a posterior that believes in one size of it."""

    def make(seed: int, n: int, m: int) -> dict[str, float]:
        x = normal(n + m, 1, seed=seed)
        y = x[:, 0] + x[:, 0].abs() * normal(n + m, seed=seed + 1)
        return ConformalIntervals(regression(scale), (x[:n], y[:n]), 0.8, **ONE).evaluate((x[n:], y[n:]))

    return make


EXACT = {
    "lac": sets(1.0, score="lac"),
    "lac of a wrong posterior": sets(-2.0, score="lac"),
    "randomised aps": sets(1.0, randomised=True),
    "randomised aps of a wrong posterior": sets(-2.0, randomised=True),
    "intervals": intervals(0.5),
    "intervals far too wide": intervals(30.0),
}


@pytest.mark.parametrize("name", EXACT)
def test_coverage_has_its_exact_distribution_over_held_out_data(name: str) -> None:
    """Of m new data, as many are covered as a beta-binomial draw of Beta(k, n + 1 - k): here n = 24, k = 20."""
    n, m, repetitions = 24, 100, 50
    law = stats.betabinom(m, 20, 5)
    hits = np.array([round(m * EXACT[name](10 * i, n, m)["coverage"]) for i in range(repetitions)])
    # Uniform under the law, as a discrete variable needs a uniform number between its two tail probabilities.
    uniform = np.random.default_rng(0).uniform(law.cdf(hits - 1), law.cdf(hits))
    assert stats.kstest(uniform, "uniform").pvalue > 1e-3
    assert abs(hits.mean() / m - 0.8) < 4 * law.std() / m / math.sqrt(repetitions)


@pytest.mark.parametrize("factor", [1.0, -2.0])
def test_aps_without_randomisation_covers_at_least_as_often(factor: float) -> None:
    n, m, repetitions = 24, 100, 50
    make = sets(factor)
    coverage = [make(10 * i, n, m)["coverage"] for i in range(repetitions)]
    assert np.mean(coverage) > 0.8 - 4 * stats.betabinom(m, 20, 5).std() / m / math.sqrt(repetitions)


def test_an_accurate_classifier_gets_one_class_for_every_row() -> None:
    x = 20 * normal(400, 3)
    y = sampled(x)
    found = ConformalSets(classifier(), (x[:200], y[:200]), 0.8, **ONE)
    assert float(found.threshold) == 0
    assert torch.equal(found.predict(x).int().argmax(1), x.argmax(1)) and bool((found.predict(x).sum(1) == 1).all())
    assert found.evaluate((x, y)) == {"coverage": pytest.approx(float((x.argmax(1) == y).double().mean())), "size": 1}


def test_one_row_at_a_time_is_randomised_anew() -> None:
    """With one u for all single rows, coverage over them would be 0 or 1 far too often."""
    x, y = labelled(500, 50)
    found = ConformalSets(classifier(), labelled(999, 0), 0.8, randomised=True, **ONE)
    covered = sum(bool(found.predict(x[i : i + 1])[0, y[i]]) for i in range(500))
    low, high = stats.betabinom(500, 800, 200).ppf([1e-4, 1 - 1e-4])
    assert low <= covered <= high


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    levels=st.tuples(st.floats(0.05, 0.95), st.floats(0.05, 0.95)),
    options=st.sampled_from([{"score": "lac"}, {"score": "aps"}, {"score": "aps", "randomised": True}]),
)
def test_sets_of_a_higher_level_contain_those_of_a_lower_one(
    seed: int, levels: tuple[float, float], options: dict[str, Any]
) -> None:
    x, data = normal(40, 3, seed=seed), labelled(30, seed + 1)
    small, large = (ConformalSets(classifier(), data, level, **options, **ONE).predict(x) for level in sorted(levels))
    assert bool((small <= large).all())
    if options == {"score": "aps"}:
        assert bool(small.gather(1, x.argmax(1, keepdim=True)).all())


@settings(deadline=None, max_examples=25)
@given(n=st.integers(5, 60), percent=st.integers(1, 80), seed=st.integers(0, 1000))
def test_the_threshold_is_the_quantile_for_a_finite_sample(n: int, percent: int, seed: int) -> None:
    x, residual = normal(n, 1), normal(n, seed=seed)
    intervals = ConformalIntervals(regression(), (x, x[:, 0] + residual), percent / 100, **ONE)
    k = -(-(n + 1) * percent // 100)
    low, high = intervals.predict(x)
    inside = int(((high - low) / 2 + 1e-9 >= residual.abs()).sum())
    assert inside == k


# -------------------------------------------------------------------------------------- posteriors and data of use


def test_a_fitted_classifier_and_its_scaled_form() -> None:
    x = normal(1300, 2).float()
    y = sampled(torch.stack((2 * x[:, 0], 2 * x[:, 1], -x[:, 0]), 1))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 3))
        model = pb.models.Dense(net, Categorical(), 100)
        guide = pb.models.MeanFieldGuide(model)
    train, held, new = ((x[a:b], y[a:b]) for a, b in ((0, 100), (100, 300), (300, 1300)))
    posterior = pb.inference.fit(model, guide, train, epochs=15, lr=5e-2, progress=False, seed=0)
    low, high = stats.betabinom(1000, 181, 20).ppf([1e-4, 1 - 1e-4])  # k = ceil(201 * 0.9)
    for each in (posterior, ScaledPosterior(posterior, 3.0)):
        for options in ({"score": "lac"}, {"randomised": True}):
            found = ConformalSets(each, DataLoader(TensorDataset(*held), batch_size=64), num_samples=8, **options)
            result = found.evaluate(new)
            assert low <= 1000 * result["coverage"] <= high
            assert 1 < result["size"] < 3


def test_a_fitted_regression() -> None:
    x = normal(1300, 1).float()
    y = (torch.sin(2 * x) + 0.3 * normal(1300, 1, seed=1)).float()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 2))
        model = pb.models.Rank1(net, HeteroscedasticGaussian(), 100)
        guide = pb.models.Rank1Guide(model, components=2)
    train, held, new = ((x[a:b], y[a:b]) for a, b in ((0, 100), (100, 300), (300, 1300)))
    posterior = pb.inference.fit(model, guide, train, epochs=20, lr=2e-2, progress=False, seed=0)
    found = ConformalIntervals(posterior, held, num_samples=4, seed=0)
    low, high = stats.betabinom(1000, 181, 20).ppf([1e-4, 1 - 1e-4])
    assert low <= 1000 * found.evaluate(new)["coverage"] <= high
    own = posterior.predict(x[:50], 4, seed=0).interval(0.9)
    bounds = found.predict(x[:50])
    torch.testing.assert_close(bounds[0], own[0] - found.threshold, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(bounds[1], own[1] + found.threshold, atol=1e-4, rtol=1e-4)


def test_counts() -> None:
    x = normal(600, 1).abs()
    y = torch.poisson(3 * x.exp(), generator=torch.Generator().manual_seed(1))
    posterior = linear(torch.ones(1, 1, 1, 1, dtype=torch.float64), Poisson())
    found = ConformalIntervals(posterior, (x[:200], y[:200]), **ONE)
    assert float(found.threshold) == int(found.threshold) > 0
    assert found.evaluate((x[200:], y[200:]))["coverage"] > stats.betabinom(400, 181, 20).ppf(1e-4) / 400


def test_bernoulli_is_the_categorical_of_two_classes() -> None:
    weights, x = normal(4, 1, 1, 1), normal(100, 1, seed=1)
    y = (normal(100, seed=2) + x[:, 0] > 0).double()
    two = ConformalSets(
        linear(torch.cat((torch.zeros_like(weights), weights), 2), Categorical()), (x, y.long()), num_samples=4
    )
    for labels in (y, y[:, None]):
        one = ConformalSets(linear(weights, Bernoulli()), (x, labels), num_samples=4)
        assert float(one.threshold) == pytest.approx(float(two.threshold), rel=1e-12)
        assert one.predict(normal(50, 1)).tolist() == two.predict(normal(50, 1)).tolist()


@pytest.mark.parametrize("options", [{"score": "lac"}, {"randomised": True}])
def test_batches_loaders_and_datasets_give_the_same_sets(options: dict[str, Any]) -> None:
    data, x = labelled(70, 0), normal(50, 3)
    y = torch.zeros(50).long()

    def found(held: Any, new: Any, batch_size: int | None) -> list[list[bool]]:
        return ConformalSets(classifier(), held, batch_size=batch_size, **options, **ONE).predict(new).tolist()

    expected = found(data, x, None)
    assert expected == found(TensorDataset(*data), x, 7) == found(data, TensorDataset(x, y), 20)
    assert expected == found(DataLoader(TensorDataset(*data), batch_size=9), DataLoader(TensorDataset(x), 8), None)


def test_inputs_that_are_tuples() -> None:
    class Sum(nn.Linear):
        def forward(self, first: Tensor, second: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(first + second)

    model = pb.models.Dense(Sum(3, 3, bias=False).double(), Categorical(), 100)
    posterior = pb.Posterior.from_draws(model, {"weight": torch.eye(3, dtype=torch.float64)[None]})
    x, y = labelled(50, 0)
    found = ConformalSets(posterior, ((x, 0 * x), y), **ONE)
    expected = ConformalSets(classifier(), (x, y), **ONE).predict(x[:20])
    assert torch.equal(found.predict((x[:20], 0 * x[:20])), expected)
    assert torch.equal(found.predict([((x[:20], 0 * x[:20]), y[:20])]), expected)


def test_the_same_calls_give_the_same_sets_and_leave_the_global_random_state_alone() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = pb.models.Dense(nn.Linear(3, 3), Categorical(), 100)
        posterior = pb.Posterior(model, pb.models.MeanFieldGuide(model, init_scale=1.0))
    x, y = labelled(40, 0)
    x = x.float()
    before = torch.get_rng_state()
    first, second, other = (ConformalSets(posterior, (x, y), randomised=True, seed=seed) for seed in (0, 0, 1))
    assert float(first.threshold) == float(second.threshold) != float(other.threshold)
    assert torch.equal(first.predict(x), second.predict(x))
    for made in (
        ConformalSets(posterior, (x, y), score="lac", seed=7),
        ConformalIntervals(regression(), (x[:, :1].double(), x[:, 1].double()), **ONE),
    ):
        new = x if isinstance(made, ConformalSets) else x[:, :1].double()
        for once, again in zip(made.predict(new), made.predict(new), strict=True):
            assert torch.equal(once, again)
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------------------------------------------- edges, errors


@pytest.mark.parametrize(("level", "needed"), [(0.5, 1), (0.55, 2), (0.9, 9), (0.95, 19), (0.99, 99), (0.999, 999)])
def test_too_few_data_for_the_level_are_refused_with_their_number(level: float, needed: int) -> None:
    x = normal(needed, 1)
    y = x[:, 0] + normal(needed, seed=1)
    found = ConformalIntervals(regression(), (x, y), level, **ONE)
    low, high = found.predict(x)
    assert float((high - low).max()) == pytest.approx(2 * float((y - x[:, 0]).abs().max()))
    if needed > 1:
        with pytest.raises(ValueError, match=f"expected at least {needed} held-out data, got {needed - 1}"):
            ConformalIntervals(regression(), (x[1:], y[1:]), level, **ONE)


def test_one_class_and_one_row() -> None:
    one = linear(torch.ones(1, 1, 1, 2, dtype=torch.float64), Categorical())
    x = normal(9, 2)
    for options in ({"score": "lac"}, {"score": "aps"}):
        found = ConformalSets(one, (x, torch.zeros(9).long()), **options, **ONE)
        assert found.predict(x[:1]).tolist() == [[True]]
        assert found.evaluate((x[:1], torch.zeros(1).long())) == {"coverage": 1, "size": 1}
    low, high = ConformalIntervals(regression(), (x[:1, :1], x[:1, 0] + 2), 0.5, **ONE).predict(x[1:2, :1])
    assert [float(low), float(high)] == pytest.approx([float(x[1, 0]) - 2, float(x[1, 0]) + 2])


def test_an_interval_that_shrinks_past_its_middle_is_empty_and_has_no_width() -> None:
    wide = linear(torch.tensor([[[[1.0], [1.0]]]], dtype=torch.float64), HeteroscedasticGaussian())
    x = torch.full((99, 1), 10.0, dtype=torch.float64)
    found = ConformalIntervals(wide, (x, x[:, 0]), **ONE)
    low, high = found.predict(torch.zeros(1, 1, dtype=torch.float64))
    assert float(low) > float(high)
    zeros = torch.zeros(3, 1, dtype=torch.float64)
    assert found.evaluate((zeros, zeros[:, 0])) == {"coverage": 0, "width": 0}


@pytest.mark.parametrize("level", [0.0, 1.0, -0.5, 90, math.nan])
def test_a_level_is_a_probability(level: float) -> None:
    with pytest.raises(ValueError, match="level=.*expected a number in"):
        ConformalSets(classifier(), labelled(20, 0), level, **ONE)


def test_options_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match="expected one of aps, lac"):
        ConformalSets(classifier(), labelled(20, 0), score="raps", **ONE)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected score='aps', got score='lac'"):
        ConformalSets(classifier(), labelled(20, 0), score="lac", randomised=True, **ONE)


def test_the_wrong_kind_of_likelihood() -> None:
    data = (normal(20, 3), normal(20, 3))
    for likelihood in (Gaussian(scale=1.0), None):
        with pytest.raises(TypeError, match="ConformalIntervals for regression and count"):
            ConformalSets(linear(torch.eye(3)[None, None], likelihood), data, **ONE)
    for likelihood in (Categorical(), None):
        with pytest.raises(TypeError, match="ConformalSets is for classification"):
            ConformalIntervals(linear(torch.eye(3)[None, None], likelihood), data, **ONE)
    with pytest.raises(ValueError, match="one label per row, .* use a network with one label per row"):
        ConformalSets(
            linear(torch.eye(3, dtype=torch.float64)[None, None], Bernoulli()), (data[0], (data[1] > 0).double()), **ONE
        )


def test_data_that_do_not_fit() -> None:
    x, y = labelled(20, 0)
    for made in (lambda d: ConformalSets(classifier(), d, **ONE), ConformalSets(classifier(), (x, y), **ONE).evaluate):
        with pytest.raises(ValueError, match="label 5, but the network has 3 outputs"):
            made((x, torch.full((20,), 5)))
        with pytest.raises(TypeError, match="class labels must be integers"):
            made((x, y.double()))
        with pytest.raises(ValueError, match="data is empty"):
            made((x[:0], y[:0]))
        with pytest.raises(TypeError, match="a DataLoader, a Dataset or a pair"):
            made(x)
    with pytest.raises(ValueError, match="x is empty"):
        ConformalSets(classifier(), (x, y), **ONE).predict(x[:0])
    target = x[:, 0].clone()
    fitted = ConformalIntervals(regression(), (x[:, :1], target), **ONE)
    target[3] = math.nan
    for made in (lambda d: ConformalIntervals(regression(), d, **ONE), fitted.evaluate):
        with pytest.raises(ValueError, match="y holds NaN"):
            made((x[:, :1], target))
        with pytest.raises(ValueError, match="y has shape"):
            made((x[:, :1], x))
        with pytest.raises(TypeError, match="must be floating point"):
            made((x[:, :1], y))


def test_a_posterior_that_predicts_nan() -> None:
    x, y = labelled(20, 0)
    weights = torch.full((1, 1, 3, 3), math.nan, dtype=torch.float64)
    with pytest.raises(ValueError, match="(?i)nan"):
        ConformalSets(linear(weights, Categorical()), (x, y), **ONE)
    with pytest.raises(ValueError, match="(?i)nan"):
        ConformalIntervals(linear(weights, Gaussian(scale=1.0)), (x, x), **ONE)


def test_what_is_no_posterior() -> None:
    data = labelled(20, 0)
    with pytest.raises(TypeError, match="expected a posterior, got Linear"):
        ConformalSets(nn.Linear(3, 3), data)  # type: ignore[arg-type]
    sets = ConformalSets(classifier(), data, **ONE)
    assert torch.equal(sets.predict(data[0].numpy()), sets.predict(data[0]))
    with pytest.raises(TypeError, match="got str"):
        sets.predict("data")
