"""Every metric against scikit-learn, scipy or a number worked by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import sklearn.metrics
import torch
from diagnostics.fake import FakePosterior, rows
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from pyro_bnn import Posterior, likelihoods
from pyro_bnn.diagnostics import evaluate
from pyro_bnn.diagnostics.scoring import metrics
from pyro_bnn.models import Dense, PointGuide
from pyro_bnn.predicting import require_repeatable

CLASSIFICATION = {
    *("accuracy", "nll", "brier", "ece", "ece_adaptive", "ece_classwise"),
    *("aurc", "augrc", "risk_at_80", "aleatoric", "epistemic", "disagreement"),
}
DETECTION = {
    f"ood_{metric}{score}"
    for metric in ("auroc", "aupr", "fpr95")
    for score in ("", "_max_probability", "_mutual_information")
}
REGRESSION = {"nll", "rmse", "crps", "coverage", "width", "aleatoric", "epistemic"}


def classifier(
    n: int = 300, classes: int = 4, draws: int = 5, members: int = 3, sharpness: float = 2.0
) -> FakePosterior:
    generator = torch.Generator().manual_seed(0)
    logits = sharpness * torch.randn(draws, members, n, classes, generator=generator, dtype=torch.float64)
    return FakePosterior(logits.softmax(-1), likelihoods.Categorical())


def labels(n: int = 300, classes: int = 4) -> Tensor:
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(1))


def binned_calibration_error(probs: np.ndarray, y: np.ndarray, bins: int = 15) -> float:
    confidence, correct = probs.max(1), probs.argmax(1) == y
    index = np.minimum(np.floor(confidence * bins).astype(int), bins - 1)
    gaps = [abs(correct[index == b].sum() - confidence[index == b].sum()) for b in range(bins)]
    return float(sum(gaps) / len(y))


def test_classification_equals_independent_computations() -> None:
    posterior, y = classifier(), labels()
    p = posterior.table.mean((0, 1)).numpy()
    result = evaluate(posterior, (rows(200), y[:200]), ood=rows(300)[200:], num_samples=5)
    inside, outside = p[:200], p[200:]
    assert set(result) == CLASSIFICATION | DETECTION
    assert result["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(y[:200], inside.argmax(1)), abs=1e-6)
    assert result["nll"] == pytest.approx(sklearn.metrics.log_loss(y[:200], inside, labels=range(4)), rel=1e-10)
    brier = sklearn.metrics.brier_score_loss(y[:200], inside, labels=range(4), scale_by_half=False)
    assert result["brier"] == pytest.approx(brier, rel=1e-10)
    assert result["ece"] == pytest.approx(binned_calibration_error(inside, y[:200].numpy()), abs=1e-6)
    entropy = scipy.stats.entropy(np.concatenate([inside, outside]), axis=1)
    assert result["ood_auroc"] == pytest.approx(sklearn.metrics.roc_auc_score([0] * 200 + [1] * 100, entropy), abs=1e-6)


def test_calibration_and_selection_equal_independent_computations() -> None:
    posterior, y = classifier(), labels()
    p = posterior.table.mean((0, 1)).numpy()
    result = evaluate(posterior, (rows(300), y), num_samples=5)
    confidence, wrong = p.max(1), p.argmax(1) != y.numpy()
    order = np.argsort(confidence)
    parts = np.array_split(order, 15)  # 300 data: bins of 20
    gaps = [abs((~wrong[part]).sum() - confidence[part].sum()) for part in parts]
    assert result["ece_adaptive"] == pytest.approx(sum(gaps) / 300, rel=1e-10)
    gaps = []
    for c in range(4):
        index = np.minimum((p[:, c] * 15).astype(int), 14)
        gaps += [abs((y.numpy()[index == b] == c).sum() - p[index == b, c].sum()) for b in range(15)]
    assert result["ece_classwise"] == pytest.approx(sum(gaps) / (300 * 4), rel=1e-10)
    risk = np.cumsum(wrong[order[::-1]]) / np.arange(1, 301)
    assert result["aurc"] == pytest.approx(risk.mean(), rel=1e-10)
    assert result["risk_at_80"] == pytest.approx(risk[239], rel=1e-10)
    a, auroc = 1 - wrong.mean(), sklearn.metrics.roc_auc_score(~wrong, confidence)
    assert result["augrc"] == pytest.approx((1 - auroc) * a * (1 - a) + (1 - a) ** 2 / 2, rel=1e-10)


def test_the_split_of_uncertainty_equals_independent_computations() -> None:
    posterior, y = classifier(), labels()
    members = posterior.table.flatten(0, 1).numpy()
    result = evaluate(posterior, (rows(300), y), num_samples=5, batch_size=77)
    assert result["aleatoric"] == pytest.approx(scipy.stats.entropy(members, axis=-1).mean(), rel=1e-10)
    whole = scipy.stats.entropy(members.mean(0), axis=-1).mean()
    assert result["aleatoric"] + result["epistemic"] == pytest.approx(whole, rel=1e-10)
    choices = members.argmax(-1)
    pairs = [(a != b).mean() for a, b in itertools.combinations(choices, 2)]
    assert result["disagreement"] == pytest.approx(np.mean(pairs), rel=1e-10)


def test_detection_by_every_score_equals_scikit_learn() -> None:
    posterior, y = classifier(), labels()
    result = evaluate(posterior, (rows(200), y[:200]), ood=rows(300)[200:], num_samples=5, batch_size=64)
    p = posterior.table.numpy()
    mean = p.mean((0, 1))
    entropy = scipy.stats.entropy(mean, axis=1)
    scores = {
        "": entropy,
        "_max_probability": -mean.max(1),
        "_mutual_information": entropy - scipy.stats.entropy(p, axis=-1).mean((0, 1)),
    }
    label = [0] * 200 + [1] * 100
    for name, score in scores.items():
        assert result[f"ood_auroc{name}"] == pytest.approx(sklearn.metrics.roc_auc_score(label, score), abs=1e-6)
        aupr = sklearn.metrics.average_precision_score(label, score)
        assert result[f"ood_aupr{name}"] == pytest.approx(aupr, abs=1e-6)
        fpr, tpr, _ = sklearn.metrics.roc_curve(label, score, drop_intermediate=False)
        assert result[f"ood_fpr95{name}"] == pytest.approx(fpr[np.argmax(tpr >= 0.95)], abs=1e-12)


def test_two_data_by_hand() -> None:
    # Two draws of one member; the mean probabilities are (0.7, 0.3) and (0.4, 0.6), the labels 0 and 0.
    table = torch.tensor([[[[0.9, 0.1], [0.5, 0.5]]], [[[0.5, 0.5], [0.3, 0.7]]]])
    result = evaluate(FakePosterior(table, likelihoods.Categorical()), (rows(2), torch.tensor([0, 0])))
    assert result["accuracy"] == 0.5
    assert result["nll"] == pytest.approx(-(math.log(0.7) + math.log(0.4)) / 2, rel=1e-6)
    assert result["brier"] == pytest.approx((2 * 0.3**2 + 2 * 0.6**2) / 2, rel=1e-6)
    assert result["ece"] == pytest.approx(((1 - 0.7) + (0.6 - 0)) / 2, rel=1e-5)


def test_members_are_averaged_like_draws() -> None:
    posterior, y = classifier(draws=6, members=2), labels()
    turned = FakePosterior(posterior.table.transpose(0, 1).contiguous(), likelihoods.Categorical())
    first, second = (evaluate(p, (rows(300), y)) for p in (posterior, turned))
    assert first == pytest.approx(second, rel=1e-10)


def test_perfect_predictions() -> None:
    y = labels()
    table = torch.nn.functional.one_hot(y, 4).double().expand(2, 3, -1, -1)
    result = evaluate(FakePosterior(table, likelihoods.Categorical()), (rows(300), y))
    assert result == pytest.approx(dict.fromkeys(CLASSIFICATION, 0) | {"accuracy": 1}, abs=1e-6)


def test_constant_predictions() -> None:
    y = labels()
    posterior = FakePosterior(torch.full((2, 3, 300, 4), 0.25), likelihoods.Categorical())
    result = evaluate(posterior, (rows(300), y), ood=rows(100))
    share = float((y == 0).double().mean())
    assert result["accuracy"] == pytest.approx(share, abs=1e-6)  # of equally probable classes, the first
    assert result["nll"] == pytest.approx(math.log(4), rel=1e-6)
    assert result["brier"] == pytest.approx(0.75, rel=1e-6)
    for name in ("ece", "ece_adaptive"):
        assert result[name] == pytest.approx(abs(share - 0.25), abs=1e-6)
    shares = torch.bincount(y, minlength=4) / 300
    assert result["ece_classwise"] == pytest.approx(float((shares - 0.25).abs().mean()), abs=1e-6)
    assert result["aurc"] == pytest.approx(1 - share)
    assert result["risk_at_80"] == pytest.approx(1 - share)
    assert result["augrc"] == pytest.approx((1 - share) / 2)
    assert result["aleatoric"] == pytest.approx(math.log(4), rel=1e-6)
    assert result["epistemic"] == result["disagreement"] == 0
    for name in ("", "_max_probability", "_mutual_information"):
        assert result[f"ood_auroc{name}"] == 0.5
        assert result[f"ood_aupr{name}"] == pytest.approx(100 / 400)
        assert result[f"ood_fpr95{name}"] == 1


def test_one_datum_of_one_function() -> None:
    table = torch.tensor([[[[0.7, 0.2, 0.1], [0.4, 0.4, 0.2]]]])
    result = evaluate(FakePosterior(table, likelihoods.Categorical()), (rows(1), torch.tensor([0])), ood=rows(2)[1:])
    assert result["epistemic"] == result["disagreement"] == result["aurc"] == result["risk_at_80"] == 0
    assert result["ece_adaptive"] == result["ece"] == pytest.approx(0.3)
    assert result["ece_classwise"] == pytest.approx((0.3 + 0.2 + 0.1) / 3)
    assert (result["ood_auroc"], result["ood_aupr"], result["ood_fpr95"]) == (1, 1, 0)
    assert result["ood_auroc_mutual_information"] == 0.5  # one function carries none
    assert all(math.isfinite(value) for value in result.values())


def test_labels_of_one_class_alone() -> None:
    posterior, y = classifier(), torch.full((300,), 2)
    result = evaluate(posterior, (rows(300), y), ood=rows(50))
    assert all(math.isfinite(value) for value in result.values())
    p = posterior.table.mean((0, 1))
    assert result["accuracy"] == pytest.approx(float((p.argmax(-1) == 2).double().mean()))


def test_a_network_of_one_class() -> None:
    posterior = FakePosterior(torch.ones(2, 3, 10, 1), likelihoods.Categorical())
    result = evaluate(posterior, (rows(10), torch.zeros(10).long()), ood=rows(10))
    assert result["accuracy"] == 1
    assert result["nll"] == result["brier"] == result["ece"] == result["ece_classwise"] == 0


def test_no_order_of_the_rows_matters() -> None:
    table = classifier().table.mul(5).round() + 0.1  # ties
    posterior = FakePosterior(table / table.sum(-1, keepdim=True), likelihoods.Categorical())
    y, order = labels(), torch.randperm(300, generator=torch.Generator().manual_seed(7))
    whole = evaluate(posterior, (rows(300), y), num_samples=1)
    assert evaluate(posterior, (rows(300)[order], y[order]), num_samples=1) == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize(("draws", "classes"), [(2, 3), (40, 3), (2, 50)])
def test_what_stays_in_memory_does_not_grow_with_draws_or_classes(
    draws: int, classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []
    monkeypatch.setattr(metrics.ClassificationMetrics, "compute", lambda metric: kept.append(metric) or {})
    posterior = classifier(draws=draws, classes=classes)
    evaluate(posterior, (rows(200), labels(200, 3)), ood=rows(300)[200:], num_samples=draws, batch_size=50)
    quality = kept[0]
    held = [*quality.confidence, *quality.correct]
    held += [part for scores in (quality.inside, quality.outside) for parts in scores.values() for part in parts]
    # A view would keep the whole tensor behind it.
    assert sum(t.untyped_storage().nbytes() // t.element_size() for t in held) == 5 * 200 + 3 * 100
    assert quality.classwise.excess.shape == (classes, 15)


def test_several_labels_a_row() -> None:
    logits = 2 * torch.randn(5, 2, 40, 3, 4, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    y = torch.randint(4, (30, 3), generator=torch.Generator().manual_seed(9))
    posterior = FakePosterior(logits.softmax(-1), likelihoods.Categorical())
    flat = FakePosterior(posterior.table[:, :, :30].flatten(2, 3), likelihoods.Categorical())
    result = evaluate(posterior, (rows(30), y), ood=rows(40)[30:], batch_size=7)
    expected = evaluate(flat, (rows(90), y.flatten()))
    assert result["nll"] == pytest.approx(3 * expected["nll"], rel=0.1)  # of a row, over functions that are the same
    for name in CLASSIFICATION - {"nll"}:
        assert result[name] == pytest.approx(expected[name], rel=1e-9), name
    entropy = scipy.stats.entropy(posterior.table.mean((0, 1)).numpy(), axis=-1).mean(-1)
    auroc = sklearn.metrics.roc_auc_score([0] * 30 + [1] * 10, entropy)
    assert result["ood_auroc"] == pytest.approx(auroc, abs=1e-6)


def test_a_certain_mistake_costs_infinity() -> None:
    table = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
    result = evaluate(FakePosterior(table, likelihoods.Categorical()), (rows(2), torch.tensor([0, 0])))
    assert result["nll"] == math.inf
    assert result["brier"] == 1.0
    # Both confidences are exactly 1: they share the last bin, whose accuracy is one half.
    assert result["ece"] == pytest.approx(0.5, abs=1e-6)


def test_certain_and_nearly_certain_predictions_share_the_last_bin() -> None:
    table = torch.tensor([[[[1.0, 0.0], [0.95, 0.05]]]], dtype=torch.float64)
    y = torch.tensor([1, 0])
    result = evaluate(FakePosterior(table, likelihoods.Categorical()), (rows(2), y))
    assert result["ece"] == pytest.approx(abs((0 + 1) - (1 + 0.95)) / 2, abs=1e-6)


def test_probabilities_above_one_by_rounding_stay_probabilities() -> None:
    posterior, y = classifier(), labels()
    expected = evaluate(posterior, (rows(300), y))
    table = posterior.table.clone()
    table[:, :, 0] = torch.nn.functional.one_hot(y[:1], 4).double()[0]
    exact = evaluate(FakePosterior(table, likelihoods.Categorical()), (rows(300), y))
    rounded = FakePosterior(table, likelihoods.Categorical())
    rounded.table = torch.where(table == 1, 1 + 1e-7, table)
    assert evaluate(rounded, (rows(300), y)) == pytest.approx(exact, abs=1e-6)
    assert exact["ece"] != expected["ece"]


def test_an_entropy_above_one_changes_no_other_score() -> None:
    # All but one are nearly certain, those from elsewhere a little less. The one belongs to the data and has an entropy
    # above 1; torchmetrics takes the sigmoid of every batch that holds such a score, and of no other.
    rest = torch.cat([torch.full((50,), 1e-9), torch.full((50,), 2e-9)])[:, None].expand(-1, 3)
    table = torch.cat([rest, 1 - rest.sum(-1, keepdim=True)], -1)
    table[0] = 0.25
    posterior = FakePosterior(table[None, None], likelihoods.Categorical())
    result = evaluate(posterior, (rows(50), torch.full((50,), 3)), ood=rows(100)[50:])
    assert result["ood_auroc"] == pytest.approx(49 / 50, abs=1e-6)


@pytest.mark.parametrize("column", [False, True])
def test_bernoulli_is_a_classification_into_two(column: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    p = torch.rand(5, 2, 100, generator=generator, dtype=torch.float64)
    y = torch.randint(2, (100,), generator=generator).double()
    posterior = FakePosterior(p[..., None] if column else p, likelihoods.Bernoulli())
    target = y[:60, None] if column else y[:60]
    result = evaluate(posterior, (rows(60), target), ood=rows(100)[60:])
    mean = p.mean((0, 1)).numpy()
    inside = mean[:60]
    assert result["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(y[:60], inside > 0.5), abs=1e-6)
    assert result["nll"] == pytest.approx(sklearn.metrics.log_loss(y[:60], inside), rel=1e-10)
    assert result["brier"] == pytest.approx(2 * sklearn.metrics.brier_score_loss(y[:60], inside), rel=1e-10)
    both = np.stack([1 - inside, inside], 1)
    assert result["ece"] == pytest.approx(binned_calibration_error(both, y[:60].numpy()), abs=1e-6)
    entropy = scipy.stats.entropy(np.stack([1 - mean, mean]), axis=0)
    assert result["ood_auroc"] == pytest.approx(sklearn.metrics.roc_auc_score([0] * 60 + [1] * 40, entropy), abs=1e-6)
    # All else as for the two classes.
    table = torch.stack((1 - p, p), -1)
    twice = evaluate(FakePosterior(table, likelihoods.Categorical()), (rows(60), y[:60].long()), ood=rows(100)[60:])
    assert result == pytest.approx(twice, abs=1e-9)


@pytest.mark.parametrize("outputs", [(), (1,), (3,)])
def test_regression_equals_independent_computations(outputs: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    means = torch.randn(4, 2, 200, *outputs, generator=generator, dtype=torch.float64)
    y = 2 * torch.randn(200, *outputs, generator=generator, dtype=torch.float64)
    posterior = FakePosterior(means, likelihoods.Gaussian(scale=0.8), scale=0.8)
    result = evaluate(posterior, (rows(200), y), batch_size=64)
    assert set(result) == REGRESSION
    center = means.mean((0, 1))
    rmse = sklearn.metrics.root_mean_squared_error(y.flatten(), center.flatten())
    assert result["rmse"] == pytest.approx(rmse, rel=1e-10)
    log_density = scipy.stats.norm.logpdf(y.numpy(), means.numpy(), 0.8).reshape(8, 200, -1).sum(-1)
    mixture = scipy.special.logsumexp(log_density, axis=0) - math.log(8)
    assert result["nll"] == pytest.approx(-mixture.mean(), rel=1e-10)
    inside = (y - center).abs() <= scipy.stats.norm.ppf(0.975) * 0.8
    assert result["coverage"] == pytest.approx(float(inside.double().mean()), abs=1e-12)
    assert result["width"] == pytest.approx(2 * scipy.stats.norm.ppf(0.975) * 0.8, rel=1e-6)
    assert result["aleatoric"] == pytest.approx(0.8**2)
    assert result["epistemic"] == pytest.approx(means.numpy().var((0, 1)).mean(), rel=1e-10)
    # E|Y - y| - E|Y - Y'| / 2, each as the mean of a folded normal distribution.
    first, m = (y - means).numpy() / 0.8, means.flatten(0, 1).numpy() / (0.8 * math.sqrt(2))
    near = 0.8 * scipy.stats.foldnorm.mean(abs(first)).mean((0, 1))
    spread = 0.8 * math.sqrt(2) * scipy.stats.foldnorm.mean(abs(m[:, None] - m)).mean((0, 1))
    assert result["crps"] == pytest.approx((near - spread / 2).mean(), rel=1e-8)


def test_a_column_of_targets_meets_a_row_of_predictions() -> None:
    means, y = torch.zeros(2, 1, 3), torch.tensor([1.0, -1.0, 2.0])
    posterior = FakePosterior(means, likelihoods.Gaussian(scale=1.0))
    posterior_column = FakePosterior(means[..., None], likelihoods.Gaussian(scale=1.0))
    expected = evaluate(posterior, (rows(3), y))
    assert expected["rmse"] == pytest.approx(math.sqrt(2), rel=1e-6)
    assert evaluate(posterior_column, (rows(3), y[:, None])) == pytest.approx(expected, rel=1e-6)


def test_perfect_regression() -> None:
    y = torch.randn(20)
    posterior = FakePosterior(y.expand(3, 2, -1), likelihoods.Gaussian(scale=1.0))
    result = evaluate(posterior, (rows(20), y))
    assert result["rmse"] == pytest.approx(0, abs=1e-6)
    assert result["coverage"] == 1
    assert result["nll"] == pytest.approx(0.5 * math.log(2 * math.pi), rel=1e-6)
    assert result["crps"] == pytest.approx((math.sqrt(2) - 1) / math.sqrt(math.pi), rel=1e-6)
    assert result["epistemic"] == 0


def test_counts() -> None:
    generator = torch.Generator().manual_seed(4)
    rates = 5 * torch.rand(4, 3, 100, generator=generator, dtype=torch.float64) + 0.5
    y = torch.poisson(rates.mean((0, 1)), generator=generator)
    result = evaluate(FakePosterior(rates, likelihoods.Poisson()), (rows(100), y))
    log_mass = scipy.stats.poisson.logpmf(y.numpy(), rates.numpy()).reshape(12, 100)
    assert result["nll"] == pytest.approx(-(scipy.special.logsumexp(log_mass, axis=0) - math.log(12)).mean(), rel=1e-10)
    rmse = sklearn.metrics.root_mean_squared_error(y, rates.mean((0, 1)))
    assert result["rmse"] == pytest.approx(rmse, rel=1e-10)
    assert 0 <= result["coverage"] <= 1
    counts = np.arange(100)[:, None, None]
    cdf = scipy.stats.poisson.cdf(counts, rates.flatten(0, 1).numpy()).mean(1)
    crps = ((cdf - (y.numpy() <= counts[:, 0])) ** 2).sum(0).mean()
    assert result["crps"] == pytest.approx(crps, rel=1e-8)
    assert result["aleatoric"] == pytest.approx(float(rates.mean()))
    assert result["epistemic"] == pytest.approx(rates.numpy().var((0, 1)).mean())


class Rows(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


@pytest.mark.parametrize("batch_size", [None, 1, 7, 300, 1000])
def test_the_result_does_not_depend_on_the_batches(batch_size: int | None) -> None:
    posterior, y, ood = classifier(350), labels(), rows(350)[300:]
    whole = evaluate(posterior, (rows(300), y), ood=ood, batch_size=300, seed=0)
    assert evaluate(posterior, (rows(300), y), ood=ood, batch_size=batch_size, seed=0) == pytest.approx(whole, rel=1e-6)
    assert {call["seed"] for call in posterior.calls} == {0}
    if batch_size:
        assert max(call["rows"] for call in posterior.calls[2:]) <= batch_size


def test_every_form_of_data_gives_the_same() -> None:
    posterior, x, y = classifier(390), rows(300), labels()
    other = rows(390)[300:]
    expected = evaluate(posterior, (x, y), ood=other)
    dataset, far = Rows(x, y), TensorDataset(other)
    nested = ({"rows": x, "weight": torch.rand(300, 2)}, y)
    forms = [
        ([x, y], other),
        (dataset, far),
        (DataLoader(dataset, batch_size=64, shuffle=True), DataLoader(far, batch_size=32)),
        ([(x[:100], y[:100]), (x[100:], y[100:])], (other, torch.zeros(90))),
        (nested, {"rows": other, "weight": torch.rand(90, 2)}),
        (nested, [({"rows": other[:50]}, torch.zeros(50)), {"rows": other[50:]}]),
        (((x, torch.rand(300, 2)), y), (other, torch.rand(90, 2))),
        (((x, torch.rand(300, 2)), y), ((other, torch.rand(90, 2)), torch.zeros(90))),
        (dataset, Rows(other, torch.zeros(90))),
    ]
    for data, ood in forms:
        assert evaluate(posterior, data, ood=ood) == pytest.approx(expected, abs=1e-6)


def test_settings_reach_the_posterior() -> None:
    posterior = classifier()
    evaluate(posterior, (rows(300), labels()), num_samples=3, batch_size=200, seed=11)
    assert posterior.calls == [
        {"rows": 200, "num_samples": 3, "batch_size": 200, "seed": 11},
        {"rows": 100, "num_samples": 3, "batch_size": 200, "seed": 11},
    ]


@pytest.mark.parametrize("data", [(rows(0), torch.zeros(0).long()), TensorDataset(rows(0), rows(0)), []])
def test_empty_data(data: object) -> None:
    with pytest.raises(ValueError, match="data is empty.*at least one row"):
        evaluate(classifier(), data)


@pytest.mark.parametrize("ood", [rows(0), TensorDataset(rows(0)), []])
def test_empty_ood(ood: object) -> None:
    with pytest.raises(ValueError, match="ood is empty.*leave out"):
        evaluate(classifier(), (rows(300), labels()), ood=ood)


def test_nan_predictions() -> None:
    posterior = classifier()
    posterior.table[2, 1, 40, 0] = math.nan
    with pytest.raises(ValueError, match="predicts NaN: check for parameters that diverged"):
        evaluate(posterior, (rows(300), labels()))
    with pytest.raises(ValueError, match="predicts NaN"):
        evaluate(posterior, (rows(30), labels()[:30]), ood=rows(50))


def test_nan_targets() -> None:
    posterior = FakePosterior(torch.zeros(2, 1, 3), likelihoods.Gaussian(scale=1.0))
    with pytest.raises(ValueError, match="y holds NaN or infinite values; drop"):
        evaluate(posterior, (rows(3), torch.tensor([0.0, math.nan, 1.0])))


def test_lengths_that_differ() -> None:
    with pytest.raises(ValueError, match="x and y disagree on the number of samples"):
        evaluate(classifier(), (rows(300), labels()[:299]))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (rows(300), "data must be a DataLoader, a Dataset or a pair"),
        ((rows(3), rows(3), labels()[:3]), "got a tuple of 3"),
        (3, "got int"),
        ((rows(300).numpy(), "labels"), r"a tuple of 2 \(ndarray, str\). Labels go with their inputs: give \(x, y\)"),
        (rows(300).numpy(), "got ndarray. Labels go with their inputs"),
        ([(rows(1)[0], labels()[0])], r"which is one row: give a Dataset, or DataLoader\(data, batch_size=256\)"),
        ([(rows(2), 1), (rows(2), 2)], "which is one row"),
        (TensorDataset(rows(300)), r"expected pairs \(x, y\)"),
        ([rows(2), rows(2), rows(2)], r"expected pairs \(x, y\).*got Tensor"),
        ((rows(3), 1), "got a tuple of 2"),
    ],
)
def test_data_of_another_form(data: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        evaluate(classifier(), data)


def test_ood_of_another_form() -> None:
    with pytest.raises(TypeError, match="got int"):
        evaluate(classifier(), (rows(300), labels()), ood=3)


def test_ood_of_a_regression() -> None:
    posterior = FakePosterior(torch.zeros(2, 1, 3), likelihoods.Gaussian(scale=1.0))
    with pytest.raises(ValueError, match="regression does not have: leave out ood="):
        evaluate(posterior, (rows(3), torch.zeros(3)), ood=rows(3))


def test_a_model_without_likelihood() -> None:
    posterior = FakePosterior(torch.zeros(2, 1, 3), None)
    with pytest.raises(ValueError, match="evaluate needs a model with a likelihood"):
        evaluate(posterior, (rows(3), torch.zeros(3)))


def test_what_is_no_posterior() -> None:
    with pytest.raises(TypeError, match="expected a posterior, got Linear: give what pyro_bnn.inference.fit"):
        evaluate(nn.Linear(3, 3), (rows(3), labels()[:3]))  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_has_a_row(size: int) -> None:
    with pytest.raises(ValueError, match=f"batch_size={size}: expected a whole number, at least 1"):
        evaluate(classifier(), (rows(300), labels()), batch_size=size)


def test_arrays_score_as_their_tensors_do() -> None:
    arrays, whole = (rows(300).numpy(), labels().numpy()), (rows(300), labels())
    assert evaluate(classifier(), arrays, ood=rows(3).numpy()) == evaluate(classifier(), whole, ood=rows(3))


def test_one_pass_is_enough_and_two_take_data_that_can_be_repeated() -> None:
    """Proves that evaluate goes through an iterator, and that all other forms of data are let through twice."""
    posterior, whole = classifier(), (rows(300), labels())
    assert evaluate(posterior, iter([whole])) == evaluate(posterior, whole)
    for once in (iter([whole]), (pair for pair in [whole]), map(tuple, [whole])):
        with pytest.raises(TypeError, match=f"data is read more than once, and a {type(once).__name__} is"):
            require_repeatable(once, "data")
    for again in (whole, [whole], TensorDataset(*whole), DataLoader(TensorDataset(*whole)), rows(3), None):
        require_repeatable(again, "data")


def test_points_are_one_function() -> None:
    """Proves that a deterministic network has no epistemic uncertainty at all, however many draws are asked for."""
    model = Dense(nn.Linear(3, 3), likelihoods.Categorical(), 20)
    point = Posterior(model, PointGuide(model))
    generator = torch.Generator().manual_seed(0)
    x, ood = torch.randn(2, 200, 3, generator=generator)
    found = evaluate(point, (x, torch.arange(200) % 3), ood, num_samples=16)
    assert found == evaluate(point, (x, torch.arange(200) % 3), ood)
    assert found["epistemic"] == found["disagreement"] == 0
    assert found["ood_auroc_mutual_information"] == 0.5
