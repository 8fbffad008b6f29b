"""Risk-coverage curves against numbers worked by hand, averages over random orders, and scikit-learn."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import sklearn.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyro_bnn.diagnostics.scoring.selective import augrc, aurc, mean_over_ties, risk_at_coverage, risk_coverage

quick = settings(deadline=None, max_examples=25)


def ranked(n: int = 200, levels: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Confidence, with ties where levels is given, and errors of 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    confidence = torch.rand(n, generator=generator, dtype=torch.float64)
    loss = (torch.rand(n, generator=generator) > confidence).double()
    return (confidence if levels is None else (levels * confidence).floor() / levels), loss


def test_four_data_by_hand() -> None:
    confidence, loss = torch.tensor([0.7, 0.9, 0.6, 0.8]), torch.tensor([1.0, 0.0, 1.0, 0.0])
    coverage, risk = risk_coverage(confidence, loss)
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1]
    assert risk.tolist() == pytest.approx([0, 0, 1 / 3, 1 / 2])
    assert aurc(confidence, loss) == pytest.approx((0 + 0 + 1 / 3 + 1 / 2) / 4)
    # The generalised risks are 0, 0, 1/4 and 1/2 at coverages 1/4 apart, from 0 at 0.
    assert augrc(confidence, loss) == pytest.approx((0 + 0 + (0 + 1 / 4) / 2 + (1 / 4 + 1 / 2) / 2) / 4)
    assert risk_at_coverage(confidence, loss, 0.75) == pytest.approx(1 / 3)
    assert risk_at_coverage(confidence, loss, 0.76) == pytest.approx(1 / 2)
    assert risk_at_coverage(confidence, loss, 0.01) == 0
    assert risk_at_coverage(confidence, loss, 1) == 0.5


def test_ties_are_the_average_over_all_their_orders() -> None:
    confidence = np.array([3, 2, 2, 2, 1, 1])
    loss = np.array([0.5, 4.0, 1.0, 0.0, 2.0, 7.0])
    curves = []
    for order in itertools.permutations(range(6)):
        if all(confidence[a] >= confidence[b] for a, b in itertools.pairwise(order)):
            curves.append(np.cumsum(loss[list(order)]) / np.arange(1, 7))
    assert len(curves) == 12
    risk = risk_coverage(torch.tensor(confidence), torch.tensor(loss))[1]
    np.testing.assert_allclose(risk, np.mean(curves, 0), rtol=1e-12)


def test_without_ties_the_curve_is_a_running_mean() -> None:
    confidence, loss = ranked()
    order = np.argsort(-confidence.numpy())
    expected = np.cumsum(loss.numpy()[order]) / np.arange(1, 201)
    np.testing.assert_allclose(risk_coverage(confidence, loss)[1], expected, rtol=1e-12)
    assert aurc(confidence, loss) == pytest.approx(expected.mean(), rel=1e-12)
    assert risk_at_coverage(confidence, loss, 0.8) == pytest.approx(expected[159], rel=1e-12)


@pytest.mark.parametrize("levels", [None, 5])
def test_augrc_of_errors_follows_from_accuracy_and_auroc(levels: int | None) -> None:
    # Traub et al. (2024): (1 - AUROC) a (1 - a) + (1 - a)^2 / 2.
    confidence, loss = ranked(levels=levels)
    a = 1 - float(loss.mean())
    auroc = sklearn.metrics.roc_auc_score(1 - loss, confidence)
    assert augrc(confidence, loss) == pytest.approx((1 - auroc) * a * (1 - a) + (1 - a) ** 2 / 2, rel=1e-12)


def test_confidence_that_knows_nothing() -> None:
    confidence, loss = torch.full((50,), 0.7), ranked(50)[1]
    error = float(loss.mean())
    assert aurc(confidence, loss) == pytest.approx(error)
    assert augrc(confidence, loss) == pytest.approx(error / 2)
    assert risk_at_coverage(confidence, loss, 0.8) == pytest.approx(error)
    # A random order gives the same in expectation: the mean of 300 orders, within five of its standard errors.
    generator = torch.Generator().manual_seed(3)
    found = np.array([aurc(torch.rand(50, generator=generator), loss) for _ in range(300)])
    assert abs(found.mean() - error) < 5 * found.std() / math.sqrt(300)
    found = np.array([augrc(torch.rand(50, generator=generator), loss) for _ in range(300)])
    assert abs(found.mean() - error / 2) < 5 * found.std() / math.sqrt(300)


def test_a_perfect_ranking() -> None:
    # With e errors among n data, the error rate is (k - n + e) / k from k = n - e + 1 on, and 0 before.
    n, e = 20, 5
    loss = torch.cat([torch.zeros(n - e), torch.ones(e)])
    confidence = -torch.arange(n, dtype=torch.float64)
    assert aurc(confidence, loss) == pytest.approx(sum((k - n + e) / k for k in range(n - e + 1, n + 1)) / n)
    assert augrc(confidence, loss) == pytest.approx((e / n) ** 2 / 2)
    assert risk_at_coverage(confidence, loss, 0.75) == 0
    assert aurc(-confidence, loss) > aurc(torch.zeros(n), loss) > aurc(confidence, loss)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_all_right_and_all_wrong(value: float) -> None:
    confidence, loss = ranked(30)[0], torch.full((30,), value)
    assert aurc(confidence, loss) == value
    assert augrc(confidence, loss) == pytest.approx(value / 2)
    assert risk_at_coverage(confidence, loss, 0.8) == value


def test_one_datum() -> None:
    coverage, risk = risk_coverage(torch.tensor([0.3]), torch.tensor([2.0]))
    assert (coverage.tolist(), risk.tolist()) == ([1], [2])
    assert aurc(torch.tensor([0.3]), torch.tensor([2.0])) == 2


@pytest.mark.parametrize(("n", "coverage", "kept"), [(100, 0.55, 55), (100, 0.29, 29), (15, 0.8, 12), (3, 0.5, 2)])
def test_coverage_in_decimals_keeps_the_number_that_it_says(n: int, coverage: float, kept: int) -> None:
    loss = torch.arange(n, dtype=torch.float64)
    assert risk_at_coverage(-loss, loss, coverage) == pytest.approx((kept - 1) / 2)


def test_booleans_and_float32_are_summed_in_float64() -> None:
    confidence, loss = ranked()
    assert aurc(confidence, loss.bool()) == aurc(confidence, loss)
    assert risk_coverage(confidence.float(), loss.float())[1].dtype == torch.float64


def test_mean_over_ties() -> None:
    key, value = torch.tensor([2.0, 1.0, 2.0, 3.0]), torch.tensor([1.0, 5.0, 2.0, 7.0])
    assert mean_over_ties(key, value).tolist() == [1.5, 5, 1.5, 7]


@quick
@given(st.integers(1, 60), st.integers(1, 12), st.integers(0, 10**6))
def test_invariances_and_ranges(n: int, levels: int, seed: int) -> None:
    confidence, loss = ranked(n, levels, seed)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=generator)
    coverage, risk = risk_coverage(confidence, loss)
    # No order of the rows matters, and of the confidence nothing but its order.
    np.testing.assert_allclose(risk_coverage(confidence[order], loss[order])[1], risk, atol=1e-12)
    np.testing.assert_allclose(risk_coverage(torch.exp(3 * confidence) - 7, loss)[1], risk, atol=1e-12)
    assert risk[-1] == pytest.approx(float(loss.mean()))
    assert coverage[-1] == 1 and (coverage.diff() > 0).all()
    assert ((risk >= 0) & (risk <= 1)).all()
    # Between the best and the worst ranking.
    for area in (aurc, augrc):
        best, found, worst = (area(score, loss) for score in (-loss, confidence, loss))
        assert best - 1e-12 <= found <= worst + 1e-12
    # The areas are linear in the loss.
    scaled = 2.5 * loss + 1
    assert aurc(confidence, scaled) == pytest.approx(2.5 * aurc(confidence, loss) + 1)
    assert augrc(confidence, scaled) == pytest.approx(2.5 * augrc(confidence, loss) + 0.5)


def test_bad_input() -> None:
    confidence, loss = ranked(5)
    with pytest.raises(ValueError, match="expected \\[N\\] for both"):
        risk_coverage(confidence, loss[:4])
    with pytest.raises(ValueError, match="at least one datum"):
        aurc(confidence[:0], loss[:0])
    with pytest.raises(ValueError, match="expected \\[N\\] for both"):
        augrc(confidence[None], loss[None])
    with pytest.raises(ValueError, match="confidence holds NaN"):
        aurc(confidence * math.nan, loss)
    with pytest.raises(ValueError, match="loss holds NaN"):
        aurc(confidence, loss * math.nan)
    for coverage in (0, -0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"expected a number in \(0, 1\]"):
            risk_at_coverage(confidence, loss, coverage)
