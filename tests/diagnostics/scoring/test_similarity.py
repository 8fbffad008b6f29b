"""Agreement and diversity against loops over pairs, scipy and numbers worked by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from diagnostics.fake import FakePosterior, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from pyro_bnn import likelihoods
from pyro_bnn.diagnostics.scoring.similarity import (
    agreement,
    compare_to_reference,
    disagreement,
    diversity,
    total_variation,
)
from pyro_bnn.posterior import Prediction

quick = settings(deadline=None, max_examples=25)


def table(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(shape, generator=generator, dtype=torch.float64)).softmax(-1)


def posterior(*shape: int, seed: int = 0) -> Any:
    return FakePosterior(table(*shape, seed=seed), likelihoods.Categorical())


def prediction(members: Tensor) -> Prediction:
    return Prediction(members.log(), likelihoods.Categorical())


def test_by_hand() -> None:
    p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.5, 0.4], [1.0, 0.0, 0.0]])
    q = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.4, 0.5], [0.0, 0.0, 1.0]])
    assert agreement(p, q) == pytest.approx(1 / 3)
    assert total_variation(p, q) == pytest.approx((0.2 + 0.1 + 1) / 3)


def test_predictions_stand_for_their_averaged_probabilities() -> None:
    first, second = table(4, 2, 30, 5), table(3, 1, 30, 5, seed=1)
    p, q = first.mean((0, 1)), second.mean((0, 1))
    expected = float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert agreement(prediction(first), prediction(second)) == pytest.approx(expected)
    assert agreement(prediction(first), q) == pytest.approx(expected)
    assert total_variation(p, prediction(second)) == pytest.approx(float((p - q).abs().sum(-1).mean() / 2))


@pytest.mark.parametrize("columns", [None, 1, 3])
def test_a_bernoulli_has_two_classes(columns: int | None) -> None:
    shape = (4, 2, 30) if columns is None else (4, 2, 30, columns)
    logits = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first, second = (Prediction(f, likelihoods.Bernoulli()) for f in logits)
    p, q = (f.sigmoid().mean((0, 1)).flatten() for f in logits)
    assert agreement(first, second) == pytest.approx(float(((p > 0.5) == (q > 0.5)).double().mean()))
    assert total_variation(first, second) == pytest.approx(float((p - q).abs().mean()))


@quick
@given(st.integers(1, 30), st.integers(2, 6), st.integers(0, 10**6))
def test_agreement_and_distance_are_symmetric_and_bounded(n: int, classes: int, seed: int) -> None:
    p, q, r = (table(n, classes, seed=seed + i) for i in range(3))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    for measure in (agreement, total_variation):
        assert 0 <= measure(p, q) <= 1
        assert measure(p, q) == pytest.approx(measure(q, p))
        assert measure(p[order], q[order]) == pytest.approx(measure(p, q))
    assert agreement(p, p) == 1
    assert total_variation(p, p) == 0
    assert total_variation(p, r) <= total_variation(p, q) + total_variation(q, r) + 1e-12


def pairwise(members: Tensor) -> float:
    choices = members.flatten(0, 1).argmax(-1).numpy()
    return float(np.mean([(a != b).mean() for a, b in itertools.combinations(choices, 2)]))


@pytest.mark.parametrize("shape", [(5, 3, 40, 4), (2, 1, 40, 3), (1, 7, 1, 10)])
def test_disagreement_is_that_of_all_pairs(shape: tuple[int, ...]) -> None:
    members = table(*shape)
    assert float(disagreement(prediction(members)).mean()) == pytest.approx(pairwise(members), rel=1e-12)


def test_disagreement_by_hand() -> None:
    # Of four functions three choose the first class: 3 of the 6 pairs differ. Then two against two: 4 of 6.
    choice = torch.tensor([[0, 0], [0, 0], [0, 1], [1, 1]])
    members = torch.nn.functional.one_hot(choice, 3).double().mul(0.7).add(0.1)[:, None]
    assert disagreement(prediction(members)).tolist() == pytest.approx([1 / 2, 2 / 3])
    assert disagreement(prediction(members[:1])).tolist() == [0, 0]
    assert disagreement(prediction(members[:1].expand(5, -1, -1, -1))).tolist() == [0, 0]


def test_disagreement_of_several_labels_and_of_a_bernoulli() -> None:
    members = table(4, 2, 10, 3, 5)
    assert disagreement(prediction(members)).shape == (30,)
    assert float(disagreement(prediction(members)).mean()) == pytest.approx(pairwise(members.flatten(2, 3)))
    logits = torch.randn(4, 2, 10, generator=torch.Generator().manual_seed(0))
    two = torch.stack((-logits, logits), -1).softmax(-1)
    found = disagreement(Prediction(logits, likelihoods.Bernoulli()))
    assert float(found.mean()) == pytest.approx(pairwise(two), rel=1e-6)


@quick
@given(st.integers(1, 5), st.integers(1, 4), st.integers(2, 5), st.integers(0, 10**6))
def test_disagreement_knows_no_order_of_members(draws: int, members: int, classes: int, seed: int) -> None:
    values = table(draws, members, 6, classes, seed=seed)
    found = disagreement(prediction(values))
    functions = draws * members
    most = functions / (functions - 1) * (1 - 1 / classes) if functions > 1 else 0
    assert ((found >= 0) & (found <= min(1, most) + 1e-12)).all()
    order = torch.randperm(functions, generator=torch.Generator().manual_seed(seed))
    shuffled = values.flatten(0, 1)[order][:, None]
    assert torch.equal(disagreement(prediction(shuffled)), found)


def test_two_posteriors_batch_by_batch() -> None:
    first, second = posterior(5, 3, 100, 4), posterior(4, 1, 100, 4, seed=1)
    p, q = (one.table.mean((0, 1)) for one in (first, second))
    expected = {"agreement": agreement(p, q), "total_variation": total_variation(p, q)}
    x, y = rows(100), torch.zeros(100).long()
    dataset = TensorDataset(x, y)
    halves = [(x[:30], y[:30]), (x[30:], y[30:])]
    forms = [x, (x, y), {"rows": x}, dataset, TensorDataset(x), [x[:30], x[30:50], x[50:]], halves]
    # A shuffled loader hands both the same batch.
    for data in (*forms, DataLoader(dataset, batch_size=7, shuffle=True, generator=torch.Generator())):
        assert compare_to_reference(first, second, data) == pytest.approx(expected)
    assert compare_to_reference(first, second, x, batch_size=9) == pytest.approx(expected)


def test_settings_reach_both_posteriors() -> None:
    first, second = posterior(5, 3, 10, 4), posterior(8, 1, 10, 4, seed=1)
    compare_to_reference(first, second, rows(10), num_samples=3, reference_samples=2, batch_size=6, seed=11)
    calls = [{"rows": n, "num_samples": 3, "batch_size": 6, "seed": 11} for n in (6, 4)]
    assert first.calls == calls
    assert second.calls == [call | {"num_samples": 2} for call in calls]
    compare_to_reference(first, second, rows(10), num_samples=3)
    assert second.calls[-1]["num_samples"] == 3
    second.num_stored = 8
    compare_to_reference(first, second, rows(10), num_samples=3)
    assert second.calls[-1]["num_samples"] == 8


def test_diversity_equals_independent_computations() -> None:
    one, y = posterior(5, 3, 60, 4), torch.randint(4, (60,), generator=torch.Generator().manual_seed(2))
    p = one.table.flatten(0, 1).numpy()
    kl = scipy.stats.entropy(p, np.broadcast_to(p.mean(0), p.shape), axis=-1).mean()
    error = float((p.argmax(-1) != y.numpy()).mean())
    expected = {
        "kl_to_mean": kl,
        "disagreement": pairwise(one.table),
        "error_rate": error,
        "normalised_disagreement": pairwise(one.table) / error,
    }
    for data in ((rows(60), y), DataLoader(TensorDataset(rows(60), y), batch_size=11)):
        assert diversity(one, data) == pytest.approx(expected, rel=1e-9)
    alone = diversity(one, rows(60), batch_size=13)
    assert alone == pytest.approx({name: expected[name] for name in ("kl_to_mean", "disagreement")}, rel=1e-9)


def test_copies_of_one_function_have_no_diversity() -> None:
    one = FakePosterior(table(1, 1, 20, 4).expand(3, 2, -1, -1), likelihoods.Categorical())
    found = diversity(one, (rows(20), torch.zeros(20).long()))
    assert found["kl_to_mean"] == pytest.approx(0, abs=1e-12)
    assert found["disagreement"] == found["normalised_disagreement"] == 0
    assert found["error_rate"] > 0


def test_functions_that_are_always_right() -> None:
    y = torch.arange(4)
    one = FakePosterior(torch.eye(4).expand(3, 2, 4, 4), likelihoods.Categorical())
    assert diversity(one, (rows(4), y)) == {
        "kl_to_mean": 0,
        "disagreement": 0,
        "error_rate": 0,
        "normalised_disagreement": 0,
    }


def test_members_certain_of_different_classes_are_as_far_as_can_be() -> None:
    one = FakePosterior(torch.eye(4)[:, None, None].expand(4, 1, 6, 4), likelihoods.Categorical())
    found = diversity(one, rows(6))
    assert found == pytest.approx({"kl_to_mean": math.log(4), "disagreement": 1})


def test_diversity_of_a_bernoulli() -> None:
    p = torch.rand(4, 2, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = (torch.arange(30) % 2).double()
    for members, target in ((p, y), (p[..., None], y[:, None])):
        found = diversity(FakePosterior(members, likelihoods.Bernoulli()), (rows(30), target))
        assert found["error_rate"] == pytest.approx(float(((p > 0.5) != y.bool()).double().mean()))
        both = torch.stack((1 - p, p), -1).numpy()
        kl = scipy.stats.entropy(both, np.broadcast_to(both.mean((0, 1)), both.shape), axis=-1).mean()
        assert found["kl_to_mean"] == pytest.approx(kl)


def test_bad_input() -> None:
    p = table(5, 3)
    with pytest.raises(ValueError, match="5 labels with 3 classes and the reference for 4 with 3"):
        agreement(p, p[:4])
    with pytest.raises(ValueError, match="not logits"):
        total_variation(p.log(), p)
    with pytest.raises(ValueError, match=r"expected \[N, C\]"):
        agreement(p[:, 0], p[:, 0])
    gaussian = Prediction(torch.zeros(2, 1, 3), likelihoods.Gaussian(scale=1.0))
    for measure in (lambda: agreement(gaussian, gaussian), lambda: disagreement(gaussian)):
        with pytest.raises(TypeError, match="not defined for Gaussian"):
            measure()
    one, other = posterior(5, 3, 10, 4), posterior(5, 3, 10, 3)
    with pytest.raises(ValueError, match="10 labels with 4 classes and the reference for 10 with 3"):
        compare_to_reference(one, other, rows(10))
    for found in (lambda: compare_to_reference(one, one, rows(0)), lambda: diversity(one, [])):
        with pytest.raises(ValueError, match="data is empty"):
            found()
    with pytest.raises(ValueError, match="x and y disagree"):
        diversity(one, (rows(10), torch.zeros(9).long()))
    with pytest.raises(ValueError, match="the posterior predicts 10 labels"):
        diversity(one, (rows(10), torch.zeros(10, 2).long()))
    with pytest.raises(TypeError, match="got int"):
        diversity(one, 3)
    one.table[0, 0, 3, 0] = math.nan
    with pytest.raises(ValueError, match="predicts NaN"):
        diversity(one, rows(10))


def test_a_regression_has_no_classes_to_compare() -> None:
    regression = FakePosterior(torch.zeros(2, 1, 3), likelihoods.Gaussian(scale=1.0))
    for what, found in (
        ("diversity", lambda: diversity(regression, rows(3))),
        ("compare_to_reference", lambda: compare_to_reference(regression, regression, rows(3))),
    ):
        with pytest.raises(TypeError, match=rf"{what} compares the classes .* Gaussian.*evaluate\(.*\['epistemic'\]"):
            found()


def test_what_is_no_prediction() -> None:
    p = table(5, 3)
    with pytest.raises(TypeError, match="got Tensor: give posterior.predict"):
        disagreement(p)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got ndarray: give prediction.probs"):
        agreement(p, p.numpy())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected a posterior, got int"):
        compare_to_reference(posterior(5, 3, 10, 4), 3, rows(10))  # type: ignore[arg-type]
