"""Detection of inputs from elsewhere against scikit-learn and numbers worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyro_bnn import likelihoods
from pyro_bnn.diagnostics.scoring.ood import aupr, auroc, fpr95, ood_scores
from pyro_bnn.posterior import Prediction

quick = settings(deadline=None, max_examples=25)


def scores(n: int = 200, m: int = 80, levels: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Scores of both kinds, with ties where levels is given."""
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(n, generator=generator).double(), 1 + torch.randn(m, generator=generator).double()
    return both if levels is None else ((levels * both[0]).round(), (levels * both[1]).round())


def sklearn_fpr95(inside: Tensor, outside: Tensor) -> float:
    label = [0] * len(inside) + [1] * len(outside)
    fpr, tpr, _ = sklearn.metrics.roc_curve(label, torch.cat([inside, outside]), drop_intermediate=False)
    return float(fpr[np.argmax(tpr >= 0.95)])


@pytest.mark.parametrize("levels", [None, 2])
@pytest.mark.parametrize(("n", "m"), [(200, 80), (1, 1), (1, 50), (50, 1), (300, 20)])
def test_all_three_equal_scikit_learn(n: int, m: int, levels: int | None) -> None:
    inside, outside = scores(n, m, levels)
    label, both = [0] * n + [1] * m, torch.cat([inside, outside])
    assert auroc(inside, outside) == pytest.approx(sklearn.metrics.roc_auc_score(label, both), abs=1e-6)
    assert aupr(inside, outside) == pytest.approx(sklearn.metrics.average_precision_score(label, both), abs=1e-6)
    assert fpr95(inside, outside) == pytest.approx(sklearn_fpr95(inside, outside), abs=1e-12)


def test_by_hand() -> None:
    inside, outside = torch.tensor([0.1, 0.2, 0.5]), torch.tensor([0.5, 0.9])
    assert auroc(inside, outside) == pytest.approx((3 + 2.5) / 6)  # one of six pairs is a tie
    assert aupr(inside, outside) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert fpr95(inside, outside) == pytest.approx(1 / 3)  # the tie at the threshold counts as found


def test_the_threshold_finds_exactly_95_percent_where_it_can() -> None:
    # 19 of 20 are 0.95 of them: the threshold is the 19th largest, above which lie no data from inside.
    outside = torch.arange(1.0, 21.0)
    inside = torch.tensor([1.5, 0.0])
    assert fpr95(inside, outside) == 0
    # Of 21, 20 are needed.
    assert fpr95(inside, torch.arange(1.0, 22.0)) == 0
    # Of 19, all are.
    assert fpr95(inside, torch.arange(1.0, 20.0)) == 0.5


def test_separated_and_equal_scores() -> None:
    low, high, same = torch.zeros(30), torch.ones(10), torch.full((10,), 0.0)
    assert (auroc(low, high), aupr(low, high), fpr95(low, high)) == (1, 1, 0)
    assert (auroc(high, low), fpr95(high, low)) == (0, 1)
    assert (auroc(low, same), fpr95(low, same)) == (0.5, 1)
    assert aupr(low, same) == pytest.approx(0.25)


def test_large_and_infinite_scores_keep_their_order() -> None:
    # Their sigmoids are all 1.
    inside, outside = torch.tensor([100.0, 200.0, 300.0]), torch.tensor([250.0, math.inf])
    assert auroc(inside, outside) == pytest.approx(5 / 6)
    assert aupr(inside, outside) == pytest.approx(0.5 + 0.5 * 2 / 3)


@quick
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 4), st.integers(0, 10**6))
def test_invariances_and_ranges(n: int, m: int, levels: int, seed: int) -> None:
    inside, outside = scores(n, m, levels, seed)
    generator = torch.Generator().manual_seed(seed)
    for metric in (auroc, aupr, fpr95):
        found = metric(inside, outside)
        assert 0 <= found <= 1
        shuffled = inside[torch.randperm(n, generator=generator)], outside[torch.randperm(m, generator=generator)]
        assert metric(*shuffled) == pytest.approx(found, abs=1e-6)
        assert metric(inside.exp() - 50, outside.exp() - 50) == pytest.approx(found, abs=1e-6)
    assert auroc(outside, inside) == pytest.approx(1 - auroc(inside, outside), abs=1e-6)


@pytest.mark.parametrize("metric", [auroc, aupr, fpr95])
def test_bad_input(metric: object) -> None:
    assert callable(metric)
    inside, outside = scores(5, 3)
    with pytest.raises(ValueError, match="inside is a tensor of shape \\(0,\\)"):
        metric(inside[:0], outside)
    with pytest.raises(ValueError, match="outside is a tensor of shape \\(0,\\)"):
        metric(inside, outside[:0])
    with pytest.raises(ValueError, match="5 of its entries NaN"):
        metric(inside * math.nan, outside)
    with pytest.raises(ValueError, match="shape \\(5, 1\\)"):
        metric(inside[:, None], outside)


def test_scores_of_a_classification() -> None:
    logits = torch.randn(3, 2, 10, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = ood_scores(Prediction(logits, likelihoods.Categorical()))
    p = logits.softmax(-1).numpy()
    mean = p.mean((0, 1))
    np.testing.assert_allclose(found["entropy"], scipy.stats.entropy(mean, axis=1), rtol=1e-10)
    np.testing.assert_allclose(found["max_probability"], 1 - mean.max(1), rtol=1e-10)
    information = scipy.stats.entropy(p, np.broadcast_to(mean, p.shape), axis=-1).mean((0, 1))
    np.testing.assert_allclose(found["mutual_information"], information, rtol=1e-8)


def test_scores_of_one_function_carry_no_information_of_the_weights() -> None:
    logits = torch.randn(1, 1, 10, 4, generator=torch.Generator().manual_seed(0))
    assert not ood_scores(Prediction(logits, likelihoods.Categorical()))["mutual_information"].any()


@pytest.mark.parametrize("columns", [None, 1, 3])
def test_scores_of_a_bernoulli(columns: int | None) -> None:
    shape = (5, 2, 10) if columns is None else (5, 2, 10, columns)
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = ood_scores(Prediction(logits, likelihoods.Bernoulli()))
    p = logits.sigmoid().mean((0, 1)).numpy().reshape(10, -1)
    np.testing.assert_allclose(found["max_probability"], (1 - np.maximum(p, 1 - p)).mean(1), rtol=1e-10)
    np.testing.assert_allclose(found["entropy"], scipy.stats.entropy(np.stack([p, 1 - p])).mean(1), rtol=1e-10)
    assert all(score.shape == (10,) for score in found.values())


def test_scores_of_several_labels_are_their_mean() -> None:
    logits = torch.randn(5, 2, 10, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = ood_scores(Prediction(logits, likelihoods.Categorical()))
    parts = [ood_scores(Prediction(logits[..., t, :], likelihoods.Categorical())) for t in range(3)]
    for name, score in whole.items():
        np.testing.assert_allclose(score, sum(part[name] for part in parts) / 3, rtol=1e-10)


def test_scores_of_a_regression() -> None:
    with pytest.raises(TypeError, match="not defined for Gaussian"):
        ood_scores(Prediction(torch.zeros(2, 1, 3), likelihoods.Gaussian(scale=1.0)))
