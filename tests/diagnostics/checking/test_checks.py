"""The findings, on posteriors with one known fault each, and on sound ones."""

from __future__ import annotations

import math
from typing import Any

import arviz
import numpy as np
import pytest
import torch
from diagnostics.fake import FakePosterior, rows
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn import likelihoods
from pyro_bnn.diagnostics.checking.chains import rhat_limit
from pyro_bnn.diagnostics.checking.checks import check
from pyro_bnn.diagnostics.checking.findings import Finding

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

N = 2000


def severities(findings: list[Finding]) -> dict[str, str]:
    return {finding.topic: finding.severity for finding in findings}


def calibrated(sharpen: float = 1.0, draws: int = 8) -> tuple[FakePosterior, Tensor]:
    """Labels that are drawn from the mean of the draws' probabilities, whose odds are then raised to a power."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(1, 1, N, 3, generator=generator, dtype=torch.float64)
    logits = logits + 0.3 * torch.randn(draws, 1, N, 3, generator=generator, dtype=torch.float64)
    y = torch.multinomial(logits.softmax(-1).mean((0, 1)), 1, generator=generator).squeeze(1)
    return FakePosterior((sharpen * logits).softmax(-1), likelihoods.Categorical()), y


def test_a_sound_classifier() -> None:
    posterior, y = calibrated()
    posterior.losses = (2 + torch.randn(2000, generator=torch.Generator().manual_seed(0))).tolist()
    findings = check(posterior, (rows(N), y))
    assert severities(findings) == {"training": "good", "spread": "good", "accuracy": "good", "calibration": "good"}
    assert not any(finding.remedy for finding in findings)


@pytest.mark.parametrize(("sharpen", "word"), [(3.0, "Overconfident"), (0.3, "Underconfident")])
def test_confidence_that_is_off(sharpen: float, word: str) -> None:
    posterior, y = calibrated(sharpen)
    worst = check(posterior, (rows(N), y))[0]
    assert (worst.severity, worst.topic) == ("warning", "calibration") and worst.remedy.startswith(word)


def test_false_alarms_of_calibration_are_as_rare_as_three_standard_errors() -> None:
    """Of 100 calibrated sets of 200 data, more than 4 outside three standard errors have a probability below .1 %."""
    posterior, _ = calibrated()
    generator = torch.Generator().manual_seed(1)
    alarms = 0
    for i in range(100):
        part = torch.arange(20 * i, 20 * i + 200) % N
        y = torch.multinomial(posterior.table.mean((0, 1))[part], 1, generator=generator).squeeze(1)
        alarms += severities(check(posterior, (part.double(), y)))["calibration"] != "good"
    assert alarms <= 4


def test_a_classifier_that_learned_nothing_or_is_one_function() -> None:
    constant = torch.tensor([0.5, 0.3, 0.2]).double().expand(8, 1, N, 3)
    y = torch.multinomial(constant[0, 0], 1, generator=torch.Generator().manual_seed(0)).squeeze(1)
    found = severities(check(FakePosterior(constant, likelihoods.Categorical()), (rows(N), y)))
    assert found == {"accuracy": "problem", "spread": "warning", "calibration": "good"}
    assert (
        severities(check(FakePosterior(constant, likelihoods.Categorical()), (rows(N), y), num_samples=1))["spread"]
        == "note"
    )


def test_foreign_inputs_that_seem_familiar() -> None:
    posterior, y = calibrated()
    entropy = torch.special.entr(posterior.table.mean((0, 1))).sum(-1)
    order = entropy.argsort().double()
    own, other = order[N // 2 :], order[: N // 2]
    found = check(posterior, (own, y[own.long()]), ood=other)
    assert severities(found)["out of domain"] == "warning"
    found = check(posterior, (other, y[other.long()]), ood=own)
    assert severities(found)["out of domain"] == "good"


@pytest.mark.parametrize(
    ("scale", "severity", "word"), [(1.0, "good", ""), (0.5, "warning", "Too narrow"), (2.0, "warning", "Too wide")]
)
def test_intervals(scale: float, severity: str, word: str) -> None:
    generator = torch.Generator().manual_seed(0)
    mean = 3 * torch.randn(1, 1, N, 1, generator=generator, dtype=torch.float64).expand(4, 1, N, 1)
    y = mean[0, 0] + torch.randn(N, 1, generator=generator, dtype=torch.float64)
    findings = check(FakePosterior(mean, likelihoods.Gaussian(scale=1.0), scale=scale), (rows(N), y))
    found = next(finding for finding in findings if finding.topic == "calibration")
    assert found.severity == severity and found.remedy.startswith(word)
    assert severities(findings)["accuracy"] == "good"
    shuffled = check(FakePosterior(mean.flip(2), likelihoods.Gaussian(scale=1.0), scale=scale), (rows(N), y))
    assert severities(shuffled)["accuracy"] == "problem"


def test_noise_and_offsets_are_no_knowledge() -> None:
    """Random small slopes on pure noise, and outputs of different means that are predicted by nothing else."""
    generator = torch.Generator().manual_seed(0)
    good = 0
    for _ in range(50):
        guess = 0.05 * torch.randn(1, 1, 100, 1, generator=generator, dtype=torch.float64)
        y = torch.randn(100, 1, generator=generator, dtype=torch.float64)
        good += (
            severities(check(FakePosterior(guess, likelihoods.Gaussian(scale=1.0)), (rows(100), y)))["accuracy"]
            == "good"
        )
    assert good <= 1  # three standard errors: .13 % each
    means = torch.tensor([0.0, 100.0]).double()
    y = means + torch.randn(100, 2, generator=generator, dtype=torch.float64)
    useless = FakePosterior(means.expand(1, 1, 100, 2), likelihoods.Gaussian(scale=1.0))
    assert severities(check(useless, (rows(100), y)))["accuracy"] == "problem"


@pytest.mark.parametrize(
    ("losses", "severity"),
    [
        (torch.linspace(3, 1, 1000).tolist(), "warning"),
        (torch.linspace(1, 3, 1000).tolist(), "warning"),
        ([1.0] * 999 + [math.nan], "problem"),
        ([1.0] * 100, "note"),
    ],
)
def test_training(losses: list[float], severity: str) -> None:
    posterior, _ = calibrated()
    posterior.losses = losses
    (finding,) = check(posterior)
    assert (finding.topic, finding.severity) == ("training", severity)


def regression() -> tuple[Any, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 2, generator=generator)
    y = x @ torch.tensor([[1.0], [-1.0]]) + 0.5 * torch.randn(60, 1, generator=generator)
    return pb.models.Dense(nn.Linear(2, 1), pb.likelihoods.Gaussian(scale=0.5), 60), x, y


def test_chains_and_temperatures_of_a_sampler() -> None:
    model, x, y = regression()
    kernel = pb.inference.SGHMC(model, (x, y), step_size=0.1, friction=0.3, batch_size=60, thinning=10)
    one = pb.inference.sample(kernel, 50, 20, num_chains=1, progress=False, seed=0)
    assert {"kinetic temperature", "configurational temperature", "temperature"} < set(one.sampler)
    assert severities(check(one, (x, y)))["convergence"] == "note"
    four = pb.inference.sample(kernel, 300, 100, num_chains=4, progress=False, seed=0)
    found = severities(check(four, (x, y)))
    assert found["sampler"] == "good" and found["convergence"] == "good"
    hot = pb.inference.SGHMC(model, (x, y), step_size=0.1, friction=0.3, batch_size=6, thinning=5)
    assert severities(check(pb.inference.sample(hot, 200, 20, progress=False, seed=0)))["sampler"] == "warning"
    apart = {name: value.clone() for name, value in four.draws(1200).items()}
    apart["bias"][:300] += 5
    worst = check(pb.Posterior.from_draws(model, apart, num_chains=4), (x, y))[0]
    assert (worst.topic, worst.severity) == ("convergence", "problem")


def chained(draws: int, chains: int, shift: float = 0.0) -> pb.Posterior:
    """Independent draws of a linear function, of which one chain is shifted."""
    model, _, _ = regression()
    generator = torch.Generator().manual_seed(draws + chains)
    weight = torch.randn(chains * draws, 1, 2, generator=generator)
    bias = torch.randn(chains * draws, 1, generator=generator)
    bias[:draws] += shift
    return pb.Posterior.from_draws(model, {"weight": weight, "bias": bias}, num_chains=chains)


@pytest.mark.parametrize(
    ("draws", "chains", "shift", "severity"),
    [
        (250, 4, 0.0, "good"),  # the largest of twenty R-hats passes 1.01 by chance
        (500, 4, 0.0, "good"),
        (500, 4, 0.6, "warning"),
        (500, 4, 5.0, "problem"),
        (90, 4, 0.0, "warning"),  # 100 independent draws are wanted of each chain
    ],
)
def test_chains_of_independent_draws(draws: int, chains: int, shift: float, severity: str) -> None:
    _, x, y = regression()
    found = {finding.topic: finding for finding in check(chained(draws, chains, shift), (x, y))}["convergence"]
    assert found.severity == severity, found


def test_the_largest_rhat_that_chance_gives() -> None:
    """Of 200 sets of four chains of 100 independent draws some 2 pass the limit, and more than 8 are improbable."""
    values = np.random.default_rng(0).normal(size=(200, 4, 100, 10))
    limit = rhat_limit(400, 4, 10)
    rhat = np.array([arviz.rhat(arviz.convert_to_dataset({"x": part}))["x"].max() for part in values])
    assert (rhat > limit).sum() <= 8 and (rhat > 1.01).mean() > 0.5
    assert rhat_limit(16_000, 4, 10) == 1.01


@pytest.mark.parametrize(("ratio", "severity"), [(1.0, "good"), (1.2, "good"), (1.35, "warning"), (0.65, "warning")])
def test_temperatures_count_with_their_noise(ratio: float, severity: str) -> None:
    """400 independent draws of 3 coordinates: within .1 and three standard errors of sqrt(3 / 1200) = .05."""
    posterior = chained(400, 1)
    posterior.sampler = {
        "temperature": 2.0,
        "kinetic temperature": 1.8,
        "expected kinetic temperature": 1.8,
        "configurational temperature": 2.0 * ratio,
    }
    assert severities(check(posterior))["sampler"] == severity


def test_functions_that_hardly_differ() -> None:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(1, 1, N, 1, generator=generator, dtype=torch.float64)
    y = mean[0, 0] + torch.randn(N, 1, generator=generator, dtype=torch.float64)
    jitter = torch.randn(8, 1, N, 1, generator=generator, dtype=torch.float64)
    for size, severity in ((0.1, "good"), (0.01, "note"), (1e-4, "warning")):  # shares of .009, 9e-5 and 9e-9
        posterior = FakePosterior(mean + size * jitter, likelihoods.Gaussian(scale=1.0))
        assert severities(check(posterior, (rows(N), y)))["spread"] == severity


def test_scaled_predictions_do_not_hide_the_guide() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(30, 2), torch.randint(3, (30,))
    model = pb.models.Dense(nn.Linear(2, 3), likelihoods.Categorical(), 30)
    posterior = pb.Posterior(model, pb.models.MeanFieldGuide(model))
    scaled = pb.diagnostics.ScaledPosterior(posterior, 2.0)
    assert "fit" in severities(check(scaled, (x, y), x_train=x, y_train=y))
    with pytest.raises(ValueError, match="only one of x_train and y_train was given"):
        check(posterior, (x, y), x_train=x)


def test_divergences_are_told(tmp_path: Any) -> None:
    model, x, y = regression()
    posterior = pb.Posterior.from_draws(model, {s.name: torch.randn(10, *s.shape) for s in model.sites()})
    posterior.sampler["divergences"] = 7
    posterior.save(tmp_path / "posterior")
    loaded = pb.load(tmp_path / "posterior", nn.Linear(2, 1))
    (finding,) = check(loaded)
    assert finding.topic == "sampler" and finding.message.startswith("7 transitions of NUTS diverged")
    loaded.sampler["divergences"] = 0
    assert severities(check(loaded)) == {"sampler": "good"}


def test_the_guide_is_compared_with_the_posterior_where_it_can_be() -> None:
    model, x, y = regression()
    design = torch.cat((x, torch.ones(60, 1)), 1).double()
    covariance = torch.linalg.inv(torch.eye(3).double() + design.T @ design / 0.25)
    mean = (covariance @ design.T @ y.double() / 0.25).flatten().float()
    for factor, severity in ((1.0, "good"), (0.2, "note")):
        guide = pb.models.MeanFieldGuide(model)
        with torch.no_grad():
            views, widths = guide.coordinates(), guide.widths()
            sd = factor * covariance.diagonal().sqrt().float()
            for name, part in (("weight", slice(0, 2)), ("bias", slice(2, 3))):
                views[name].copy_(mean[part].reshape(views[name].shape))
                widths[name].copy_(sd[part].expm1().log().reshape(views[name].shape))
        found = check(pb.Posterior(model, guide), x_train=x, y_train=y)
        assert severities(found) == {"fit": severity}
    assert check(pb.Posterior(model, pb.models.PointGuide(model)), x_train=x, y_train=y) == []
    with pytest.raises(ValueError, match="num_data=60"):
        check(pb.Posterior(model, guide), x_train=x[:5], y_train=y[:5])


def test_a_finding_reads_as_a_line() -> None:
    finding = Finding("warning", "calibration", "Too narrow.", "Learn the noise.")
    assert str(finding) == "[warning] calibration: Too narrow. Learn the noise."
    assert str(Finding("good", "training", "At rest.")) == "[good] training: At rest."


def test_bad_input() -> None:
    posterior, y = calibrated()
    with pytest.raises(ValueError, match="data is empty"):
        check(posterior, (rows(0), y[:0]))
    posterior.table[0, 0, 3] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        check(posterior, (rows(N), y))
