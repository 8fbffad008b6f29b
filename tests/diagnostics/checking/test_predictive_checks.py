"""Findings about predictions: how often they are wrong about sound posteriors, and what they say of unsound ones."""

from __future__ import annotations

import math
from typing import Any

import pytest
import scipy.stats
import torch
from diagnostics.fake import FakePosterior, rows
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn import likelihoods
from pyro_bnn.diagnostics.checking.checks import check
from pyro_bnn.diagnostics.checking.findings import Finding
from pyro_bnn.diagnostics.checking.predictive_checks import Predicted, out_of_domain


def found(findings: list[Finding], topic: str) -> Finding:
    (finding,) = [finding for finding in findings if finding.topic == topic]
    return finding


def classifier(probs: Tensor, y: Tensor) -> list[Finding]:
    return check(FakePosterior(probs, likelihoods.Categorical()), (rows(len(y)), y))


def test_all_labels_share_the_function_that_explains_them() -> None:
    """Exact posteriors of few data, judged on many: at most 6 alarms of 50, where errors of the labels alone give 15.

    The share is no Normal variable, so that three standard errors are passed in some 5 % of the cases.
    """
    noise, n, d, test = 0.3, 8, 5, 300
    alarms = binomial = 0
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        w = torch.randn(d, generator=generator)
        x = torch.randn(n, d, generator=generator)
        y = x @ w + noise * torch.randn(n, generator=generator)
        covariance = torch.linalg.inv(torch.eye(d) + x.T @ x / noise**2)
        centre = covariance @ x.T @ y / noise**2
        drawn = centre + torch.randn(50, d, generator=generator) @ torch.linalg.cholesky(covariance).T
        model = pb.models.Dense(nn.Linear(d, 1, bias=False), likelihoods.Gaussian(scale=noise), n)
        posterior = pb.Posterior.from_draws(model, {"weight": drawn[:, None, :]}, is_sampled=False)
        x = torch.randn(test, d, generator=generator)
        y = (x @ w + noise * torch.randn(test, generator=generator))[:, None]
        predicted = Predicted("regression")
        predicted.add(posterior.predict(x, 50), y)
        alarms += found(list(predicted.findings()), "calibration").severity != "good"
        binomial += abs(predicted.hits / test - 0.95) > 3 * math.sqrt(0.95 * 0.05 / test)
    assert alarms <= 6 and binomial >= 15


def test_the_standard_error_of_calibration_by_hand() -> None:
    """Two functions that are sure of class 0 with .9 and .7 each: expected .8, and an error of labels and of both."""
    n = 400
    probs = torch.tensor([[0.9, 0.1], [0.7, 0.3]]).double().reshape(2, 1, 1, 2).expand(2, 1, n, 2)
    y = (torch.arange(n) % 5 == 0).long()
    labels, functions = math.sqrt(0.8 * 0.2 / n), math.sqrt(0.02 * (1 + 1 / 2))
    assert f"standard error {math.hypot(labels, functions):.2%}" in found(classifier(probs, y), "calibration").message
    same = probs.mean(0, keepdim=True).expand_as(probs)
    assert f"standard error {labels:.2%}" in found(classifier(same, y), "calibration").message


def test_a_certain_network_that_is_wrong_once_has_no_error_of_zero() -> None:
    probs = torch.tensor([1.0, 0.0]).double().expand(1, 1, 50, 2)
    y = torch.zeros(50, dtype=torch.long)
    y[0] = 1
    finding = found(classifier(probs, y), "calibration")
    assert finding.severity == "good" and f"{0.5 / 50:.2%}" in finding.message
    y[:2] = 1
    assert found(classifier(probs, y), "calibration").severity == "warning"


def counts(rate: Tensor, y: Tensor) -> Finding:
    model = pb.models.Dense(nn.Linear(1, 1, bias=False), likelihoods.Poisson(), 10)
    posterior = pb.Posterior.from_draws(model, {"weight": rate.log()[:, None, None]}, is_sampled=False)
    findings = check(posterior, (torch.ones(len(y), 1), y[:, None]), num_samples=len(rate))
    return found(findings, "calibration")


def test_counts_are_compared_with_what_their_intervals_really_hold() -> None:
    """An interval of counts holds more than 95 %, as scipy says; beyond that it is too wide."""
    generator = torch.Generator().manual_seed(0)
    for rate in (2.0, 30.0):
        exact = scipy.stats.poisson(rate)
        held = f"{exact.cdf(exact.ppf(0.975)) - exact.cdf(exact.ppf(0.025) - 1):.1%}"
        y = torch.poisson(torch.full((4000,), rate), generator=generator)
        finding = counts(torch.full((3,), rate), y)
        assert finding.severity == "good" and finding.message.startswith(f"Intervals that should hold {held}")
    wide = counts(torch.tensor([800.0, 1000.0, 1250.0]), torch.full((400,), 1000.0))
    assert wide.severity == "good"  # all functions but one have a share of 0 or 1: nothing is certain
    narrow = counts(torch.full((3,), 1000.0), torch.poisson(torch.full((400,), 1100.0), generator=generator))
    assert narrow.severity == "warning" and narrow.remedy.startswith("Too narrow")
    constant = counts(torch.full((3,), 1000.0), torch.full((400,), 1000.0))
    assert constant.severity == "warning" and constant.remedy.startswith("Too wide")


@pytest.mark.parametrize(("n", "severity"), [(15, "note"), (2000, "good")])
def test_few_data_cannot_tell_and_are_no_problem(n: int, severity: str) -> None:
    """Right in 80 % of the cases where the larger class has 60 %."""
    y = (torch.arange(n) % 5 < 2).long()
    right = torch.arange(n) % 7 % 5 != 0
    guess = torch.where(right, y, 1 - y)
    probs = torch.nn.functional.one_hot(guess, 2).double() * 0.6 + 0.2
    finding = found(classifier(probs.expand(1, 1, n, 2), y), "accuracy")
    assert finding.severity == severity


@pytest.mark.parametrize(("differ", "severity"), [(4, "problem"), (30, "note")])
def test_nothing_learned_is_said_of_those_who_cannot_have_learned_much(differ: int, severity: str) -> None:
    """Half right where it differs from the largest class, whose error rate is .4: with 4 of 200 rows at most .03 better
    by three standard errors, less than a tenth of that rate, with 30 rows at most .08."""
    n = 200
    y = (torch.arange(n) % 5 < 2).long()
    right, wrong = y.nonzero().flatten()[: differ // 2], (1 - y).nonzero().flatten()[: differ // 2]
    guess = torch.zeros(n, dtype=torch.long)
    guess[right] = guess[wrong] = 1
    probs = torch.nn.functional.one_hot(guess, 2).double() * 0.6 + 0.2
    assert found(classifier(probs.expand(1, 1, n, 2), y), "accuracy").severity == severity


def test_a_rare_class_that_is_found_is_worth_something() -> None:
    """93.6 % against 90 %, with few rows that differ: differences of rows decide, not the error of each share."""
    n = 500
    y = (torch.arange(n) < 50).long()
    guess = (torch.arange(n) < 18).long()
    probs = torch.nn.functional.one_hot(guess, 2).double() * 0.6 + 0.2
    finding = found(classifier(probs.expand(1, 1, n, 2), y), "accuracy")
    assert finding.severity == "good" and "93.6%" in finding.message and "90.0%" in finding.message


def test_labels_of_a_row_have_a_most_frequent_class_each() -> None:
    """Outputs that know nothing but their base rates .95 and .05 learned nothing, and so do many with few rows."""
    generator = torch.Generator().manual_seed(0)
    rates = torch.tensor([0.95, 0.05]).double()
    for likelihood, probs in (
        (likelihoods.Bernoulli(), rates.expand(1, 1, 1000, 2)),
        (likelihoods.Categorical(), torch.stack((1 - rates, rates), -1).expand(1, 1, 1000, 2, 2)),
    ):
        y = torch.bernoulli(rates.expand(1000, 2), generator=generator)
        y = y.long() if isinstance(likelihood, likelihoods.Categorical) else y
        finding = found(check(FakePosterior(probs, likelihood), (rows(1000), y)), "accuracy")
        assert finding.severity == "problem", finding
    images = torch.randint(3, (6, 300), generator=generator)  # of six rows each place has a frequent class by chance
    guess = torch.where(torch.rand(6, 300, generator=generator) < 0.3, images, (images + 1) % 3)
    guess = torch.where(torch.rand(6, 300, generator=generator) < 0.3, images, guess)  # right for half of the labels
    probs = (torch.nn.functional.one_hot(guess, 3).double() * 0.4 + 0.2).expand(1, 1, 6, 300, 3)
    finding = found(check(FakePosterior(probs, likelihoods.Categorical()), (rows(6), images)), "accuracy")
    assert finding.severity == "good"


def test_what_cannot_show_anything() -> None:
    n = 50
    probs = torch.tensor([0.9, 0.1]).double().expand(1, 1, n, 2)
    assert found(classifier(probs, torch.zeros(n, dtype=torch.long)), "accuracy").severity == "note"
    assert found(classifier(probs[:, :, :1], torch.zeros(1, dtype=torch.long)), "accuracy").severity == "note"
    mean = torch.zeros(1, 1, 1, 1).double()
    assert (
        found(
            check(FakePosterior(mean, likelihoods.Gaussian(scale=1.0)), (rows(1), torch.ones(1, 1).double())),
            "accuracy",
        ).severity
        == "note"
    )


@pytest.mark.parametrize(
    ("auroc", "own", "foreign", "severity"),
    [
        (0.9, 100, 100, "good"),
        (0.89, 100, 100, "note"),
        (0.5, 10**6, 10**6, "note"),
        (0.45, 100, 100, "note"),
        (0.37, 100, 100, "warning"),  # three standard errors are .123
        (0.45, 10**4, 10**4, "warning"),
        (0.45, 10**4, 50, "note"),
    ],
)
def test_foreign_inputs(auroc: float, own: int, foreign: int, severity: str) -> None:
    (finding,) = out_of_domain({"ood_auroc": auroc}, own, foreign)
    assert finding.severity == severity


def test_inputs_of_the_same_distribution_are_not_called_foreign() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        probs = torch.randn(4, 1, 120, 3, generator=generator, dtype=torch.float64).softmax(-1)
        posterior: Any = FakePosterior(probs, likelihoods.Categorical())
        y = torch.randint(3, (80,), generator=generator)
        assert found(check(posterior, (rows(80), y), ood=rows(120)[80:]), "out of domain").severity == "note"


def test_sums_do_not_depend_on_the_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    probs = torch.randn(4, 2, 60, 3, generator=generator, dtype=torch.float64).softmax(-1)
    y = torch.randint(3, (60,), generator=generator)
    posterior: Any = FakePosterior(probs, likelihoods.Categorical())
    whole, parts = Predicted("classification"), Predicted("classification")
    whole.add(posterior.predict(rows(60), 4), y)
    for part in torch.arange(60).split(7):
        parts.add(posterior.predict(part.double(), 4), y[part])
    assert [str(finding) for finding in whole.findings()] == [str(finding) for finding in parts.findings()]
    assert whole.rows == parts.rows == 60
