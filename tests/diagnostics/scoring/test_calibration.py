"""Calibration errors against torchmetrics, numpy and numbers worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from pyro_bnn import likelihoods
from pyro_bnn.diagnostics.scoring.calibration import (
    ClasswiseCalibrationError,
    calibration_error,
    classwise_calibration_error,
    reliability,
)
from pyro_bnn.posterior import Prediction

quick = settings(deadline=None, max_examples=25)


def predictions(n: int = 500, classes: int = 4, seed: int = 0, decimals: int | None = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    probs = (2 * torch.randn(n, classes, generator=generator, dtype=torch.float64)).softmax(-1)
    if decimals is not None:
        # Rounded, so that there are ties; the last class takes what is left.
        probs = probs.mul(0.9).round(decimals=decimals)
        probs[:, -1] += 1 - probs.sum(-1)
    return probs, torch.randint(classes, (n,), generator=generator)


def two(*confidences: float) -> Tensor:
    p = torch.tensor(confidences, dtype=torch.float64)
    return torch.stack((p, 1 - p), -1)


@pytest.mark.parametrize(("n", "classes", "bins"), [(500, 4, 15), (37, 2, 10), (1, 3, 15), (200, 10, 1)])
def test_equal_widths_equal_torchmetrics(n: int, classes: int, bins: int) -> None:
    probs, y = predictions(n, classes)
    theirs = multiclass_calibration_error(probs, y, classes, n_bins=bins, norm="l1")
    assert calibration_error(probs, y, bins) == pytest.approx(float(theirs), abs=1e-6)


def test_bins_of_equal_width_by_hand() -> None:
    # Five bins of the width 0.2: confidences 0.6 and 0.7 in the fourth, 0.8 (a lower bound) and 1 in the last.
    found = reliability(two(0.6, 0.7, 0.8, 1.0), torch.tensor([0, 1, 0, 0]), bins=5)
    assert found.edges.tolist() == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert found.count.tolist() == [0, 0, 0, 2, 2]
    assert found.confidence.tolist() == pytest.approx([0, 0, 0, 0.65, 0.9])
    assert found.accuracy.tolist() == [0, 0, 0, 0.5, 1]
    assert found.error == pytest.approx((2 * 0.15 + 2 * 0.1) / 4)


def test_bins_of_equal_mass_by_hand() -> None:
    # Ranks 0 ... 4 of five data in two bins: floor(2 i / 5) is 0, 0, 0, 1, 1.
    found = reliability(two(0.9, 0.6, 1.0, 0.8, 0.7), torch.tensor([0, 0, 0, 1, 1]), bins=2, adaptive=True)
    assert found.count.tolist() == [3, 2]
    assert found.confidence.tolist() == pytest.approx([0.7, 0.95])
    assert found.accuracy.tolist() == pytest.approx([1 / 3, 1])
    assert found.edges.tolist() == pytest.approx([0.6, 0.9, 1])
    assert found.error == pytest.approx((3 * (0.7 - 1 / 3) + 2 * 0.05) / 5)


def test_ties_share_their_right_predictions() -> None:
    # Three data of confidence 0.75, one of them right, lie on both sides of the bound between two bins of two.
    found = reliability(two(0.75, 0.75, 0.75, 1.0), torch.tensor([0, 1, 1, 0]), bins=2, adaptive=True)
    assert found.accuracy.tolist() == pytest.approx([1 / 3, (1 / 3 + 1) / 2])
    assert found.confidence.tolist() == pytest.approx([0.75, 0.875])


@pytest.mark.parametrize(("n", "bins"), [(500, 15), (44, 15), (16, 15), (15, 15)])
def test_equal_masses_equal_a_split_of_the_sorted_data(n: int, bins: int) -> None:
    probs, y = predictions(n)
    confidence, correct = probs.max(1).values.numpy(), (probs.argmax(1) == y).numpy()
    rank = np.argsort(np.argsort(confidence))
    parts = [np.flatnonzero(rank * bins // n == b) for b in range(bins)]
    assert {len(part) for part in parts} <= {n // bins, -(-n // bins)}
    expected = sum(abs(correct[part].sum() - confidence[part].sum()) for part in parts) / n
    assert calibration_error(probs, y, bins, adaptive=True) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("adaptive", [False, True])
def test_fewer_data_than_bins(adaptive: bool) -> None:
    found = reliability(two(0.9, 0.6), torch.tensor([0, 1]), adaptive=adaptive)
    assert found.count.sum() == 2 and found.count.max() == 1
    assert found.error == pytest.approx((0.1 + 0.6) / 2)
    assert not any(part.isnan().any() for part in (found.confidence, found.accuracy, found.edges))


@pytest.mark.parametrize("adaptive", [False, True])
def test_perfect_constant_and_always_wrong_predictions(adaptive: bool) -> None:
    _, y = predictions(100)
    assert calibration_error(torch.eye(4)[y], y, adaptive=adaptive) == 0
    assert calibration_error(torch.eye(4)[(y + 1) % 4], y, adaptive=adaptive) == 1
    share = float((y == 0).double().mean())
    constant = torch.full((100, 4), 0.25)
    assert calibration_error(constant, y, adaptive=adaptive) == pytest.approx(abs(share - 0.25))


def classwise(probs: np.ndarray, y: np.ndarray, bins: int) -> float:
    total = 0.0
    for c in range(probs.shape[1]):
        index = np.minimum((probs[:, c] * bins).astype(int), bins - 1)
        for b in range(bins):
            inside = index == b
            if inside.any():
                total += inside.mean() * abs((y[inside] == c).mean() - probs[inside, c].mean())
    return total / probs.shape[1]


@pytest.mark.parametrize(("n", "classes", "bins"), [(500, 4, 15), (37, 2, 10), (1, 3, 15)])
def test_classwise_equals_a_loop_over_classes_and_bins(n: int, classes: int, bins: int) -> None:
    probs, y = predictions(n, classes)
    assert classwise_calibration_error(probs, y, bins) == pytest.approx(classwise(probs.numpy(), y.numpy(), bins))


def test_classwise_by_hand() -> None:
    # One bin: |1/2 - mean p(0)| and the same for class 1.
    assert classwise_calibration_error(two(0.9, 0.7), torch.tensor([0, 1]), bins=1) == pytest.approx(0.3)
    # Classes that are always right or always wrong.
    assert classwise_calibration_error(torch.eye(3), torch.arange(3)) == 0
    assert classwise_calibration_error(torch.eye(3), torch.tensor([1, 2, 0])) == pytest.approx(2 / 3)


def test_classwise_over_batches_is_that_of_all_and_keeps_no_rows() -> None:
    probs, y = predictions(300, 5)
    metric = ClasswiseCalibrationError(5).set_dtype(torch.float64)
    for p, label in zip(probs.split(70), y.split(70), strict=True):
        metric.update(p, label)
    assert float(metric.compute()) == pytest.approx(classwise_calibration_error(probs, y), rel=1e-10)
    assert metric.excess.shape == (5, 15) and metric.size == 300


def test_float32_is_summed_in_float64() -> None:
    probs, y = predictions(500)
    assert reliability(probs.float(), y).confidence.dtype == torch.float64
    assert calibration_error(probs.float(), y) == pytest.approx(calibration_error(probs, y), abs=1e-6)
    assert classwise_calibration_error(probs.float(), y) == pytest.approx(classwise(probs.numpy(), y.numpy(), 15), 1e-5)


@quick
@given(st.integers(1, 60), st.integers(2, 5), st.integers(1, 20), st.integers(0, 10**6), st.sampled_from([1, 2, None]))
def test_ranges_and_no_order_of_the_rows(n: int, classes: int, bins: int, seed: int, decimals: int | None) -> None:
    probs, y = predictions(n, classes, seed, decimals)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    for adaptive in (False, True):
        found = reliability(probs, y, bins, adaptive)
        assert found.count.sum() == n
        assert (found.edges.diff() >= 0).all()
        assert 0 <= found.error <= 1
        assert found.error == pytest.approx(reliability(probs[order], y[order], bins, adaptive).error, abs=1e-12)
        # The bins hold all right predictions and all confidence, whatever the bounds.
        correct = float((probs.argmax(1) == y).double().sum())
        assert float((found.count * found.accuracy).sum()) == pytest.approx(correct)
        assert float((found.count * found.confidence).sum()) == pytest.approx(float(probs.amax(1).sum()))
        # The error is at least that of one bin: the triangle inequality.
        assert found.error >= reliability(probs, y, 1).error - 1e-12
    found = classwise_calibration_error(probs, y, bins)
    assert 0 <= found <= 2 / classes + 1e-12
    assert found == pytest.approx(classwise_calibration_error(probs[order], y[order], bins), abs=1e-12)


@quick
@given(st.integers(0, 10**6))
def test_classes_may_be_renumbered(seed: int) -> None:
    probs, y = predictions(50, 4, seed)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    renumbered = probs[:, order], order.argsort()[y]
    assert calibration_error(*renumbered) == pytest.approx(calibration_error(probs, y), abs=1e-12)
    assert classwise_calibration_error(*renumbered) == pytest.approx(classwise_calibration_error(probs, y), abs=1e-12)


def test_labels_drawn_from_the_probabilities_are_calibrated() -> None:
    probs, _ = predictions(20_000)
    y = torch.multinomial(probs, 1, generator=torch.Generator().manual_seed(1)).squeeze(-1)
    # Each of 15 bins is off by at most about sqrt(N_b) / 2, so the sum by at most sqrt(15 N) / 2; twice that.
    assert calibration_error(probs, y) < math.sqrt(15 / 20_000)
    assert calibration_error(probs, y, adaptive=True) < math.sqrt(15 / 20_000)
    assert classwise_calibration_error(probs, y) < math.sqrt(15 / 20_000)


@pytest.mark.parametrize("measure", [calibration_error, classwise_calibration_error])
def test_bad_input(measure: object) -> None:
    assert callable(measure)
    probs, y = predictions(5)
    with pytest.raises(ValueError, match=r"shape \(5,\); expected \[N, C\]"):
        measure(probs[:, 0], y)
    with pytest.raises(ValueError, match="at least one datum"):
        measure(probs[:0], y[:0])
    with pytest.raises(ValueError, match="not logits"):
        measure(probs.log(), y)
    with pytest.raises(ValueError, match="NaN"):
        measure(torch.full((5, 4), math.nan), y)
    with pytest.raises(TypeError, match="must be integers"):
        measure(probs, y.float())
    with pytest.raises(ValueError, match="one label for each row of probs, 5"):
        measure(probs, y[:4])
    with pytest.raises(TypeError, match="got Prediction: give prediction.probs"):
        measure(Prediction(probs.log()[None, None], likelihoods.Categorical()), y)
    with pytest.raises(TypeError, match="y must be a tensor of class labels, got ndarray"):
        measure(probs, y.numpy())
    with pytest.raises(ValueError, match="labels from 4 to 4; probs has 4 classes"):
        measure(probs, torch.full((5,), 4))
    with pytest.raises(ValueError, match="labels from -1"):
        measure(probs, torch.full((5,), -1))
    with pytest.raises(ValueError, match="bins=0: expected a whole number, at least 1"):
        measure(probs, y, bins=0)
