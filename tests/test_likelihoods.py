"""Likelihoods against SciPy, with and without axes of members, and what they say about labels that do not fit."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pyro import poutine
from scipy import special, stats
from torch import Tensor, nn

from pyro_bnn.inference import fit
from pyro_bnn.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    HeteroscedasticGaussian,
    Likelihood,
    Poisson,
    from_description,
)
from pyro_bnn.models import Dense, MeanFieldGuide

N = 6
ALL = [Categorical(), Bernoulli(), Gaussian(0.7), Gaussian(), HeteroscedasticGaussian(), Poisson()]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_density(likelihood: Likelihood, f: NDArray[Any], y: NDArray[Any], noise: float = 0.4) -> NDArray[Any]:
    """log p(y | f), with the axes of the outputs last (not summed)."""
    match likelihood:
        case Categorical():
            return np.take_along_axis(special.log_softmax(f, -1), np.broadcast_to(y, f.shape[:-1])[..., None], -1)
        case Bernoulli():
            return stats.bernoulli.logpmf(y, special.expit(f))
        case Gaussian():
            return stats.norm.logpdf(y, f, likelihood.scale or noise)
        case HeteroscedasticGaussian():
            mean, raw = np.split(f, 2, -1)
            return stats.norm.logpdf(y, mean, np.log1p(np.exp(raw)) + 1e-6)
        case Poisson():
            return stats.poisson.logpmf(y, np.exp(f))
    raise NotImplementedError


def example(likelihood: Likelihood, events: tuple[int, ...], lead: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """Outputs ``[*lead, N, *events, C]`` and labels ``[N, *events]`` (or ``[N, *events, 3]``) of a likelihood."""
    generator = torch.Generator().manual_seed(1)
    width = {Categorical: 4, HeteroscedasticGaussian: 6}.get(type(likelihood), 3)
    f = normal(*lead, N, *events, width)
    match likelihood:
        case Categorical():
            y = torch.randint(4, (N, *events), generator=generator)
        case Bernoulli():
            y = torch.randint(2, (N, *events, 3), generator=generator).double()
        case Poisson():
            y = torch.randint(7, (N, *events, 3), generator=generator).double()
        case _:
            y = normal(N, *events, 3, seed=2)
    return f, y


def name_of(likelihood: Any) -> str:
    learned = isinstance(likelihood, Gaussian) and likelihood.scale is None
    return type(likelihood).__name__ + ("(None)" if learned else "")


# ------------------------------------------------------------------------------------------------- densities


@pytest.mark.parametrize("lead", [(), (2,), (2, 5)], ids=["plain", "members", "draws-members"])
@pytest.mark.parametrize("events", [(), (3,), (3, 2)], ids=["rows", "sequences", "images"])
@pytest.mark.parametrize("likelihood", ALL, ids=name_of)
def test_log_density(likelihood: Likelihood, events: tuple[int, ...], lead: tuple[int, ...]) -> None:
    """One number for every sample of every member; outputs and positions of one sample are added up."""
    f, y = example(likelihood, events, lead)
    noise = torch.full(lead + (1,) if lead else (), 0.4, dtype=torch.float64)
    d = likelihood.given(f, y, noise, lead=len(lead) + 1)
    expected = log_density(likelihood, f.numpy(), y.numpy())
    expected = expected.reshape(lead + (N, -1)).sum(-1)
    assert d.batch_shape == lead + (N,)
    np.testing.assert_allclose(d.log_prob(y).numpy(), expected, rtol=1e-7)
    without = likelihood.given(f, None, noise, lead=len(lead) + 1)
    assert without.batch_shape == lead + (N,) and without.event_shape == d.event_shape
    assert without.sample().shape == lead + tuple(y.shape)


@pytest.mark.parametrize("lead", [(), (2,)], ids=["plain", "members"])
@pytest.mark.parametrize("events", [(), (3,)], ids=["rows", "sequences"])
@pytest.mark.parametrize("likelihood", ALL[1:], ids=name_of)
def test_one_output_goes_with_plain_labels(likelihood: Likelihood, events: tuple[int, ...], lead: Any) -> None:
    """A last axis of one output may be missing in y, and is left out of what is predicted; but y may have it too."""
    f, y = example(likelihood, events, lead)
    f = f[..., [0, 3]] if isinstance(likelihood, HeteroscedasticGaussian) else f[..., :1]
    plain, column = y[..., 0], y[..., :1]
    noise = torch.full(lead + (1,) if lead else (), 0.4, dtype=torch.float64)
    expected = log_density(likelihood, f.numpy(), column.numpy()).reshape(lead + (N, -1)).sum(-1)
    for labels in (plain, column):
        d = likelihood.given(f, labels, noise, lead=len(lead) + 1)
        assert d.batch_shape == lead + (N,)
        np.testing.assert_allclose(d.log_prob(labels).numpy(), expected, rtol=1e-7)
    assert likelihood.given(f, None, noise, lead=len(lead) + 1).sample().shape == lead + (N,) + events


@pytest.mark.parametrize("likelihood", [Bernoulli(), Gaussian(0.5), Poisson()], ids=name_of)
def test_outputs_without_a_last_axis(likelihood: Likelihood) -> None:
    f, y = example(likelihood, (), (2,))
    d = likelihood.given(f[..., 0], y[..., 0], lead=2)
    expected = log_density(likelihood, f[..., 0].numpy(), y[..., 0].numpy())
    np.testing.assert_allclose(d.log_prob(y[..., 0]).numpy(), expected, rtol=1e-7)


def test_each_member_has_its_own_noise() -> None:
    noise = torch.tensor([[0.2], [1.5]], dtype=torch.float64)
    f, y = normal(2, N, 3), normal(N, 3, seed=2)
    ours = Gaussian().given(f, y, noise, lead=2).log_prob(y)
    expected = stats.norm.logpdf(y.numpy(), f.numpy(), noise.numpy()[..., None]).sum(-1)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("members_dim", [-2, -4])
def test_learned_noise_is_a_site_of_the_model(members_dim: int) -> None:
    """A half-Cauchy, one for a member, wherever the members' axis is; and recovered from data."""
    torch.manual_seed(0)
    net = nn.Linear(2, 1)
    x = torch.randn(400, 2)
    y = x[:, 0] + 0.3 * torch.randn(400)
    model = Dense(net, Gaussian(noise_prior_scale=2.0), 400, members_dim=members_dim)
    trace = poutine.trace(model).get_trace(x, y)
    noise = trace.nodes["noise"]
    assert noise["value"].shape == (1,) * -members_dim
    expected = stats.halfcauchy.logpdf(float(noise["value"]), scale=2.0)
    assert float(noise["fn"].log_prob(noise["value"])) == pytest.approx(expected, rel=1e-5)
    posterior = fit(
        model, MeanFieldGuide(model, 2), (x, y), epochs=150, lr=0.05, progress=False, seed=0, batch_size=400
    )
    drawn = posterior.draws(200, seed=0)["noise"]
    assert drawn.shape == (200, 2)
    # of N Gaussian residuals the standard deviation has a relative error of 1 / sqrt(2 N)
    assert abs(float(drawn.mean()) - 0.3) < 4 * 0.3 / math.sqrt(2 * 400) + 0.02


@pytest.mark.parametrize("likelihood", ALL, ids=name_of)
def test_temperature_raises_the_likelihood_to_a_power(likelihood: Likelihood) -> None:
    """In the model log p(y | f) / T, prior and prediction untouched."""
    f, y = example(likelihood, ())
    tempered = type(likelihood)(**{**vars(likelihood), "temperature": 0.25})
    net = nn.Linear(2, f.shape[-1], dtype=torch.float64)
    x = normal(N, 2)
    values: dict[float, dict[str, float]] = {}
    draws: Any = None
    for one in (likelihood, tempered):
        model = Dense(net, one, 2 * N)
        conditioned = model if draws is None else poutine.condition(model, draws)
        torch.manual_seed(0)
        trace = poutine.trace(conditioned).get_trace(x, y)
        trace.compute_log_prob()
        draws = {s.name: trace.nodes[s.name]["value"] for s in model.sites()}
        values[one.temperature] = {n: float(trace.nodes[n]["log_prob_sum"]) for n in (*draws, "obs")}
    assert values[0.25].pop("obs") == pytest.approx(4 * values[1.0].pop("obs"), rel=1e-12)
    assert values[0.25] == values[1.0]


def test_extreme_outputs_stay_finite() -> None:
    big = torch.tensor([[-1e4, 1e4], [1e4, -1e4]])
    assert torch.isfinite(Categorical().given(big, torch.tensor([0, 1])).log_prob(torch.tensor([0, 1]))).all()
    ones = torch.ones(2, 2)
    assert torch.isfinite(Bernoulli().given(big, ones).log_prob(ones)).all()
    far = torch.tensor([[0.0, -200.0], [1.0, 200.0]])
    assert torch.isfinite(HeteroscedasticGaussian().given(far, torch.zeros(2)).log_prob(torch.zeros(2))).all()


# --------------------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("likelihood", "y", "message"),
    [
        (Categorical(), torch.zeros(N), r"y has dtype torch.float32; class labels must be integers \(y.long\(\)\)"),
        (Categorical(), torch.zeros(N, dtype=torch.bool), "y has dtype torch.bool; class labels must be integers"),
        (Bernoulli(), torch.zeros(N, 3, dtype=torch.long), r"torch.int64; give 0 and 1 as floating point"),
        (Gaussian(1.0), torch.zeros(N, 3, dtype=torch.long), "torch.int64; a regression target must be floating point"),
        (HeteroscedasticGaussian(), torch.zeros(N, 3, dtype=torch.int32), "torch.int32; expected floating point"),
    ],
)
def test_wrong_dtype(likelihood: Likelihood, y: Tensor, message: str) -> None:
    f, _ = example(likelihood, (), (2,))
    with pytest.raises(TypeError, match=f"{type(likelihood).__name__}: y has dtype .*{message.split('; ')[1]}"):
        likelihood.given(f, y, lead=2)
    with pytest.raises(TypeError, match=message):
        likelihood.given(f, y, lead=2)


@pytest.mark.parametrize("likelihood", ALL, ids=name_of)
def test_wrong_shape(likelihood: Likelihood) -> None:
    """The message says what y has, what the output has, and what y should have."""
    f, y = example(likelihood, (), (2,))
    noise = torch.ones(2, 1, dtype=torch.float64)
    wrong = torch.zeros(N, 9, dtype=y.dtype)
    expected = (
        rf"{type(likelihood).__name__}: y has shape \(6, 9\); .*output of shape \(6, {f.shape[-1]}\) it should have "
    )
    expected += r"\(6,\)" if isinstance(likelihood, Categorical) else r"\(6, 3\)"
    with pytest.raises(ValueError, match=expected):
        likelihood.given(f, wrong, noise, lead=2)
    if not isinstance(likelihood, Categorical):
        with pytest.raises(ValueError, match=r"y has shape \(6,\)"):
            likelihood.given(f, y[:, 0], noise, lead=2)


def test_output_of_the_wrong_width() -> None:
    with pytest.raises(ValueError, match="3 features; it needs an even number"):
        HeteroscedasticGaussian().given(torch.zeros(N, 3), torch.zeros(N))
    with pytest.raises(ValueError, match=r"output has shape \(6,\), without an axis for the classes"):
        Categorical().given(torch.zeros(2, N), torch.zeros(N, dtype=torch.long), lead=2)
    with pytest.raises(ValueError, match=r"output has shape \(6,\), without an axis for mean and scale"):
        HeteroscedasticGaussian().given(torch.zeros(2, N), torch.zeros(N), lead=2)


@pytest.mark.parametrize(
    ("likelihood", "good", "bad", "message"),
    [
        (Categorical(), [0, 3], [0, 4], "y holds label 4, but the network has 4 outputs; labels must lie in 0 ... 3"),
        (Categorical(), [0, 3], [-1, 2], "y holds label -1"),
        (Bernoulli(), [0.0, 1.0], [0.5, 1.0], "values other than 0 and 1"),
        (Bernoulli(), [0.0, 1.0], [math.nan, 1.0], "values other than 0 and 1"),
        (Gaussian(1.0), [0.0, -5.0], [0.0, math.inf], "y holds NaN or infinite values; drop or impute"),
        (HeteroscedasticGaussian(), [0.0, -5.0], [math.nan, 0.0], "y holds NaN or infinite values"),
        (Poisson(), [0.0, 7.0], [0.0, -1.0], "not counts"),
        (Poisson(), [0.0, 7.0], [0.5, 1.0], "not counts"),
        (Poisson(), [0.0, 7.0], [math.nan, 1.0], "not counts"),
        (Poisson(), [0.0, 7.0], [math.inf, 1.0], "not counts"),
    ],
)
def test_values_outside_the_support(likelihood: Likelihood, good: Any, bad: Any, message: str) -> None:
    f = torch.zeros(2, 4)
    likelihood.check(torch.tensor(good), f)
    with pytest.raises(ValueError, match=f"{type(likelihood).__name__}: .*{message}"):
        likelihood.check(torch.tensor(bad), f)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Categorical(temperature=0.0), "temperature=0.0: expected a positive number"),
        (lambda: Poisson(temperature=math.nan), "temperature=nan"),
        (lambda: Bernoulli(temperature=math.inf), "temperature=inf"),
        (lambda: Gaussian(scale=-1.0), "scale=-1.0: expected a positive number"),
        (lambda: Gaussian(scale=math.inf), "scale=inf"),
        (lambda: Gaussian(noise_prior_scale=0.0), "noise_prior_scale=0.0"),
    ],
)
def test_bad_arguments(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_missing_noise() -> None:
    with pytest.raises(ValueError, match="needs the latent noise scale"):
        Gaussian().given(torch.zeros(N), torch.zeros(N))


@pytest.mark.parametrize("likelihood", [*ALL, Gaussian(0.1, 3.0, temperature=2.0)], ids=name_of)
def test_description_round_trip(likelihood: Likelihood) -> None:
    assert from_description(json.loads(json.dumps(likelihood.describe()))) == likelihood
    for broken in ({"class": "Gamma"}, {**likelihood.describe(), "sigma": 1.0}, {}):
        with pytest.raises(ValueError, match="unknown likelihood .*known are Categorical, Bernoulli"):
            from_description(broken)


def test_a_categorical_of_before_has_its_classes_last() -> None:
    """What versions wrote that knew no ``class_dim`` means what they did."""
    assert from_description({"class": "Categorical", "temperature": 1.0}) == Categorical(class_dim=-1)


def test_first_argument_is_the_scale() -> None:
    """What a likelihood is about comes first; the temperature goes by name alone."""
    assert Gaussian(0.1) == Gaussian(scale=0.1) and Gaussian(0.1).temperature == 1.0
    with pytest.raises(TypeError):
        Poisson(2.0)  # type: ignore[misc]


def test_kinds() -> None:
    assert [one.kind for one in ALL] == ["classification"] * 2 + ["regression"] * 3 + ["count"]
