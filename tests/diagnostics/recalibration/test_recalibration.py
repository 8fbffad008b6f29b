"""Temperature scaling against closed forms, scipy and scikit-learn."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diagnostics.linear import linear, normal, sampled
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, logsumexp, softmax
from sklearn.metrics import log_loss
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_bnn as pb
from pyro_bnn.diagnostics.recalibration.temperature import ScaledPosterior, scale_temperature
from pyro_bnn.likelihoods import Bernoulli, Categorical, Gaussian, Poisson

ONE = {"num_samples": 1}


def identity(classes: int, factor: float = 1.0) -> Tensor:
    """The weight of one function whose logits are ``factor x``."""
    return factor * torch.eye(classes, dtype=torch.float64).expand(1, 1, -1, -1)


def several(seed: int = 0) -> tuple[pb.Posterior, Tensor, Tensor, np.ndarray]:
    """Three draws of two members, with their logits ``[6, 200, 3]``."""
    weights, x = 3 * normal(3, 2, 3, 4, seed=seed), normal(200, 4, seed=seed + 1)
    logits = torch.einsum("skcd,nd->sknc", weights, x)
    y = sampled(logits.mean((0, 1)), seed=seed + 2)
    return linear(weights, Categorical()), x, y, logits.flatten(0, 1).numpy()


def mixture_nll(logits: np.ndarray, y: np.ndarray, temperature: float) -> float:
    log_probs = log_softmax(logits / temperature, -1)[:, np.arange(len(y)), y]
    return float(-(logsumexp(log_probs, 0) - math.log(len(logits))).mean())


# -------------------------------------------------------------------------------------------------------- the fit


@pytest.mark.parametrize("factor", [0.2, 1.0, 5.0])
def test_logits_that_are_too_large_by_a_factor_have_that_temperature(factor: float) -> None:
    logits = 1.5 * normal(2000, 4)
    fitted = scale_temperature(linear(identity(4, factor), Categorical()), (logits, sampled(logits)), **ONE)
    # At the truth, the information about log T is the sum over data of the variance of the true logits.
    p = logits.softmax(-1)
    information = float(((p * logits.square()).sum(-1) - (p * logits).sum(-1).square()).sum())
    assert abs(math.log(fitted.temperature / factor)) < 4 / math.sqrt(information)


def test_one_function_has_the_temperature_of_scipy_on_the_log_loss_of_scikit_learn() -> None:
    x = normal(300, 3)
    y = sampled(0.3 * x)
    fitted = scale_temperature(linear(identity(3), Categorical()), (x, y), **ONE)
    reference = minimize_scalar(
        lambda t: log_loss(y, softmax(x.numpy() / t, 1)), bounds=(0.5, 20), method="bounded", options={"xatol": 1e-9}
    )
    assert fitted.temperature == pytest.approx(reference.x, rel=1e-5)
    before, after = (float(p.predict(x, 1).log_prob(y).mean()) for p in (fitted.posterior, fitted))
    assert after == pytest.approx(-reference.fun, rel=1e-12) and after > before


@pytest.mark.parametrize("seed", range(3))
def test_an_average_of_functions_has_the_best_temperature_of_a_fine_grid(seed: int) -> None:
    posterior, x, y, logits = several(seed)
    fitted = scale_temperature(posterior, (x, y), num_samples=3, batch_size=64)
    grid = fitted.temperature * np.exp(np.linspace(-3, 3, 1201))
    assert np.argmin([mixture_nll(logits, y.numpy(), t) for t in grid]) == 600


@pytest.mark.parametrize(("right", "near"), [(140, 0.09), (110, 12.0)])
def test_the_better_of_two_local_minima_is_found(right: int, near: float) -> None:
    """One function has small logits, right for 120 of 200; the other large ones, right for ``right``."""
    n = torch.arange(200)
    small, large = (0.05 * (1 - 2 * (n >= 120).double()), 5 * (1 - 2 * (n * 7919 % 200 >= right).double()))
    x, y = torch.stack((small, large), 1), torch.zeros(200).long()
    weights = torch.zeros(2, 1, 2, 2, dtype=torch.float64)
    weights[0, 0, 0, 0] = weights[1, 0, 0, 1] = 1
    fitted = scale_temperature(linear(weights, Categorical()), (x, y), num_samples=2)
    assert fitted.temperature == pytest.approx(near, rel=0.1)
    logits = torch.einsum("scd,nd->snc", weights[:, 0], x).numpy()
    grid = np.exp(np.linspace(math.log(0.02), math.log(50), 400))
    values = np.array([mixture_nll(logits, y.numpy(), t) for t in grid])
    assert ((values[1:-1] < values[:-2]) & (values[1:-1] < values[2:])).sum() == 2
    assert mixture_nll(logits, y.numpy(), fitted.temperature) <= values.min()


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6), scale=st.floats(0.1, 10), draws=st.integers(1, 3))
def test_the_likelihood_of_held_out_data_never_falls(seed: int, scale: float, draws: int) -> None:
    weights, x = scale * normal(draws, 1, 3, 4, seed=seed), normal(60, 4, seed=seed + 1)
    y = sampled(torch.einsum("skcd,nd->nc", weights, x) / scale, seed=seed + 2)
    try:
        fitted = scale_temperature(linear(weights, Categorical()), (x, y), num_samples=draws)
    except ValueError:
        reject()
    log_probs = (p.log_likelihood(x, y, draws).logsumexp((0, 1)).mean() for p in (fitted.posterior, fitted))
    before, after = map(float, log_probs)
    assert after >= before - 1e-12
    if draws == 1:
        assert torch.equal(fitted.predict(x, 1).probs.argmax(-1), fitted.posterior.predict(x, 1).probs.argmax(-1))


def test_bernoulli_is_the_categorical_of_two_classes() -> None:
    x = normal(200, 1)
    y = (torch.rand(200, generator=torch.Generator().manual_seed(3)) < torch.sigmoid(2 * x[:, 0])).double()
    weights = normal(4, 1, 1, 1).abs() * 9
    two = torch.cat((torch.zeros_like(weights), weights), 2)
    settings = {"num_samples": 4, "batch_size": 33}
    expected = scale_temperature(linear(two, Categorical()), (x, y.long()), **settings).temperature
    for labels in (y, y[:, None], y.float()):
        fitted = scale_temperature(linear(weights, Bernoulli()), (x, labels), **settings)
        assert fitted.temperature == pytest.approx(expected, rel=1e-5)


def test_several_labels_a_row_count_as_one_datum_as_in_the_nll_of_evaluate() -> None:
    weights, x = 4 * normal(3, 1, 2, 4), normal(150, 4, seed=1)
    y = torch.einsum("skcd,nd->nc", weights, x).div(9).sigmoid().bernoulli(generator=torch.Generator().manual_seed(2))
    fitted = scale_temperature(linear(weights, Bernoulli()), (x, y), num_samples=3)

    def nll(factor: float) -> float:
        other = ScaledPosterior(fitted.posterior, factor * fitted.temperature)
        return pb.diagnostics.evaluate(other, (x, y), num_samples=3)["nll"]

    assert fitted.temperature > 1.5
    assert nll(1.0) < min(nll(0.99), nll(1.01), nll(1 / fitted.temperature))


def test_a_loader_a_dataset_and_a_pair_give_the_same_temperature() -> None:
    posterior, x, y, _ = several()
    data = TensorDataset(x, y)
    found = [
        scale_temperature(posterior, form, num_samples=3).temperature
        for form in ((x, y), data, DataLoader(data, batch_size=17))
    ]
    assert found == pytest.approx([found[0]] * 3, rel=1e-5)


def test_the_same_call_gives_the_same_temperature_and_leaves_the_global_random_state_alone() -> None:
    x = normal(100, 2).float()
    y = sampled(torch.stack((x[:, 0], -x[:, 0]), 1))
    net = nn.Linear(2, 2)
    net.load_state_dict({"weight": torch.tensor([[3.0, 0.0], [-3.0, 0.0]]), "bias": torch.zeros(2)})
    model = pb.models.Dense(net, Categorical(), 100)
    posterior = pb.Posterior(model, pb.models.MeanFieldGuide(model, init_scale=0.5))
    before = torch.get_rng_state()
    first, second, other = (scale_temperature(posterior, (x, y), seed=seed).temperature for seed in (0, 0, 1))
    assert first == second != other
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------------------------- the scaled posterior


def test_every_part_of_a_prediction_sees_the_temperature() -> None:
    posterior, x, y, logits = several()
    prediction = ScaledPosterior(posterior, 2.5).predict(x, num_samples=3)
    p = softmax(logits / 2.5, -1)
    mean = p.mean(0)
    np.testing.assert_allclose(prediction.per_member.flatten(0, 1), p, rtol=1e-10)
    np.testing.assert_allclose(prediction.probs, mean, rtol=1e-10)
    entropy, aleatoric = -(mean * np.log(mean)).sum(-1), -(p * np.log(p)).sum(-1).mean(0)
    np.testing.assert_allclose(prediction.entropy, entropy, rtol=1e-8)
    np.testing.assert_allclose(prediction.aleatoric, aleatoric, rtol=1e-8)
    np.testing.assert_allclose(prediction.mutual_information, entropy - aleatoric, rtol=1e-6, atol=1e-12)
    expected = np.log(p[:, np.arange(200), y])
    np.testing.assert_allclose(prediction.log_prob(y).flatten(0, 1), expected, rtol=1e-8)


def test_diagnostics_see_the_temperature() -> None:
    posterior, x, y, logits = several()
    scaled = ScaledPosterior(posterior, 2.5)
    assert isinstance(scaled, pb.Posterior)
    expected = log_softmax(logits / 2.5, -1)[:, np.arange(200), y]
    np.testing.assert_allclose(scaled.log_likelihood(x, y, 3).flatten(0, 1), expected, rtol=1e-8)
    nll = pb.diagnostics.evaluate(scaled, (x, y), num_samples=3, batch_size=64)["nll"]
    assert nll == pytest.approx(mixture_nll(logits, y.numpy(), 2.5), rel=1e-6)
    data = pb.diagnostics.to_arviz(scaled, x, y)
    np.testing.assert_allclose(data["log_likelihood"]["obs"][0], expected, rtol=1e-6)
    np.testing.assert_allclose(data["function"]["probs"][0], softmax(logits / 2.5, -1), rtol=1e-6)


def test_the_rest_is_that_of_the_posterior_inside() -> None:
    posterior, x, _, _ = several()
    scaled = ScaledPosterior(posterior, 2.5)
    assert scaled.posterior is posterior and scaled.model is posterior.model and scaled.guide is posterior.guide
    assert isinstance(scaled.model.likelihood, Categorical) and scaled.model.likelihood.temperature == 1
    assert (scaled.num_members, scaled.num_stored, scaled.num_chains, scaled.losses) == (2, 3, 1, [])
    assert torch.equal(scaled.draws(2, 0)["weight"], posterior.draws(2, 0)["weight"])
    assert torch.equal(scaled.sample(3, 5)["weight"], posterior.sample(3, 5)["weight"])
    assert torch.equal(scaled.predict(x, 3).outputs, posterior.predict(x, 3).outputs / 2.5)


def test_temperatures_multiply_and_one_changes_nothing() -> None:
    posterior, x, _, _ = several()
    twice, once, one = (
        ScaledPosterior(ScaledPosterior(posterior, 2.0), 4.0),
        ScaledPosterior(posterior, 8.0),
        ScaledPosterior(posterior, 1.0),
    )
    assert torch.equal(twice.predict(x, 3).outputs, once.predict(x, 3).outputs)
    assert torch.equal(one.predict(x, 3).outputs, posterior.predict(x, 3).outputs)


def test_a_fitted_posterior_cannot_be_improved_again() -> None:
    posterior, x, y, _ = several()
    once = scale_temperature(posterior, (x, y), num_samples=3)
    assert scale_temperature(once, (x, y), num_samples=3).temperature == pytest.approx(1, abs=1e-5)


def test_draws_and_a_sparser_network_keep_the_temperature() -> None:
    posterior, x, _, _ = several()
    drawn = ScaledPosterior(posterior, 2.5).as_draws(2, seed=0)
    assert isinstance(drawn, ScaledPosterior) and drawn.temperature == 2.5 and drawn.num_stored == 2

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = pb.models.SpikeSlab(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), Categorical(), 100)
        whole = pb.Posterior(model, pb.models.MeanFieldGuide(model)).as_draws(4, seed=0)
    settings = {"sparsity": 0.5, "example": x[:1].float(), "num_samples": 4}
    sparse, plain = ScaledPosterior(whole, 2.5).sparsify(**settings), whole.sparsify(**settings)
    assert sparse.after == plain.after
    outputs = (s.posterior.predict(x.float(), 4).outputs for s in (sparse, plain))
    torch.testing.assert_close(next(outputs), next(outputs) / 2.5)


def test_statistics_of_normalisation_layers_reach_the_posterior_inside() -> None:
    x = normal(64, 4).float()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = pb.models.Dense(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)), Categorical(), 64)
        posterior = pb.Posterior(model, pb.models.MeanFieldGuide(model))
    scaled = ScaledPosterior(posterior, 2.0)
    before = scaled.predict(x, 2, seed=0).outputs
    scaled.recompute_statistics([5 * x])
    after = scaled.predict(x, 2, seed=0).outputs
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, posterior.predict(x, 2, seed=0).outputs / 2)


def test_a_fitted_rank_1_posterior_and_its_way_to_disk(tmp_path: Path) -> None:
    x = normal(240, 2).float()
    y = sampled(torch.stack((x[:, 0], x[:, 1], -x[:, 0]), 1))

    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 3))

    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = pb.models.Rank1(net(), Categorical(temperature=0.05), 40)
        guide = pb.models.Rank1Guide(model, components=3)
    train = (x[:40], y[:40])
    posterior = pb.inference.fit(model, guide, train, epochs=60, lr=5e-2, progress=False, seed=0)
    x, y = x[40:], y[40:]
    fitted = scale_temperature(posterior, (x, y), num_samples=8, seed=3)
    assert fitted.temperature > 2  # a cold posterior, which has learned 40 labels by heart
    logits = posterior.predict(x, 8, seed=3).outputs.flatten(0, 1).double().numpy()
    reference = minimize_scalar(
        lambda log_t: log_loss(y, softmax(logits / math.exp(log_t), -1).mean(0)), bounds=(0, 4), method="bounded"
    )
    assert fitted.temperature == pytest.approx(math.exp(reference.x), rel=1e-3)

    with pytest.raises(TypeError, match=r"call scaled.posterior.save\(path\)"):
        fitted.save(tmp_path / "posterior")
    assert not (tmp_path / "posterior").exists()
    fitted.posterior.save(tmp_path / "posterior")
    again = ScaledPosterior(pb.load(tmp_path / "posterior", net()), fitted.temperature)
    assert torch.equal(again.predict(x, seed=1).probs, fitted.predict(x, seed=1).probs)


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("likelihood", [Gaussian(scale=1.0), Poisson(), None])
def test_other_likelihoods_are_sent_to_conformal_intervals(likelihood: pb.likelihoods.Likelihood | None) -> None:
    posterior = linear(identity(2), likelihood)
    with pytest.raises(TypeError, match="ConformalIntervals"):
        scale_temperature(posterior, (normal(5, 2), normal(5, 2)))
    with pytest.raises(TypeError, match="ConformalIntervals"):
        ScaledPosterior(posterior, 1.0)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_is_a_positive_number(temperature: float) -> None:
    with pytest.raises(ValueError, match="expected a positive number"):
        ScaledPosterior(linear(identity(2), Categorical()), temperature)


def test_data_that_are_all_classified_right_have_no_temperature() -> None:
    x = normal(50, 3)
    for posterior, draws in (
        (linear(identity(3), Categorical()), 1),
        (linear(identity(3).expand(2, 2, 3, 3), Categorical()), 2),
    ):
        with pytest.raises(ValueError, match="classified right"):
            scale_temperature(posterior, (x, x.argmax(-1)), num_samples=draws)
    with pytest.raises(ValueError, match="classified right"):
        scale_temperature(linear(identity(3), Categorical()), (x[:1], x[:1].argmax(-1)), **ONE)


def test_predictions_worse_than_chance_have_no_temperature() -> None:
    x = normal(50, 3)
    with pytest.raises(ValueError, match="no better than equal probabilities"):
        scale_temperature(linear(identity(3), Categorical()), (x, x.argmin(-1)), **ONE)


def test_logits_without_differences_have_no_temperature() -> None:
    x = normal(50, 3)
    constant = torch.ones(1, 1, 3, 3, dtype=torch.float64)
    for weights, y in ((constant, x.argmax(-1)), (constant[:, :, :1], torch.zeros(50).long())):
        with pytest.raises(ValueError, match="does not depend on the temperature"):
            scale_temperature(linear(weights, Categorical()), (x, y), **ONE)


def test_a_class_that_is_masked_out_cannot_be_a_label() -> None:
    class Masked(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.tensor([0.0, 0.0, -math.inf], dtype=x.dtype)

    model = pb.models.Dense(Masked(3, 3, bias=False).double(), Categorical(), 50)
    posterior = pb.Posterior.from_draws(model, {"weight": identity(3)})
    x = normal(50, 3)
    y = sampled(0.5 * x[:, :2])
    assert 1 < scale_temperature(posterior, (x, y), **ONE).temperature < 5
    y[0] = 2
    with pytest.raises(ValueError, match="probability 0 at every temperature"):
        scale_temperature(posterior, (x, y), **ONE)


def test_data_that_do_not_fit() -> None:
    posterior, x = linear(identity(3), Categorical()), normal(4, 3)
    with pytest.raises(ValueError, match="label 3, but the network has 3 outputs"):
        scale_temperature(posterior, (x, torch.tensor([0, 1, 2, 3])), **ONE)
    with pytest.raises(TypeError, match="class labels must be integers"):
        scale_temperature(posterior, (x, torch.zeros(4)), **ONE)
    with pytest.raises(ValueError, match="data is empty"):
        scale_temperature(posterior, (x[:0], torch.zeros(0).long()), **ONE)
    with pytest.raises(TypeError, match="a DataLoader, a Dataset or a pair"):
        scale_temperature(posterior, x, **ONE)
    with pytest.raises(ValueError, match="only 1 draws are stored"):
        scale_temperature(posterior, (x, torch.zeros(4).long()), num_samples=2)
    with pytest.raises(ValueError, match="(?i)nan"):
        scale_temperature(linear(math.nan * identity(3), Categorical()), (x, torch.zeros(4).long()), **ONE)
