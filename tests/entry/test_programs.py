"""What is no network, no model or no guide is refused where it is given, with a word on what was expected."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoLaplaceApproximation, AutoNormal
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn import inference, models

X = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()
CATEGORICAL = pb.likelihoods.Categorical()
SHORT = {"epochs": 1, "progress": False, "seed": 0}


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def dense() -> models.Dense:
    return models.Dense(net(), CATEGORICAL, 24)


NETWORKS: dict[str, Callable[[Any], object]] = {
    "Dense": lambda given: models.Dense(given, CATEGORICAL, 24),
    "Rank1": lambda given: models.Rank1(given, CATEGORICAL, 24),
    "Bella": lambda given: models.Bella(given, CATEGORICAL, 24),
    "DeepEnsemble": lambda given: inference.DeepEnsemble(given, CATEGORICAL, 24),
    "SWAG": lambda given: inference.SWAG(given, CATEGORICAL, 24),
    "MCDropout": lambda given: inference.MCDropout(given, CATEGORICAL, 24),
    "LastLayerLaplace": lambda given: inference.LastLayerLaplace(given, CATEGORICAL, 24),
}
PROGRAMS: dict[str, Callable[[], object]] = {
    "a model": dense,
    "a rank-1 model": lambda: models.Rank1(net(), CATEGORICAL, 24),
    "a guide": lambda: models.MeanFieldGuide(dense()),
    "an AutoGuide": lambda: AutoNormal(dense()),
    "a network around a model": lambda: nn.Sequential(dense(), nn.Linear(3, 3)),
    "a posterior": lambda: pb.Posterior(dense(), models.MeanFieldGuide(dense())),
    "a function": lambda: torch.tanh,
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
@pytest.mark.parametrize("takes", NETWORKS.values(), ids=NETWORKS)
def test_what_is_no_network_is_refused_as_one(takes: Callable[[Any], object], program: Callable[[], object]) -> None:
    """Models and baselines refuse programs that are Bayesian already, also as parts, and what is no module."""
    with pytest.raises(TypeError, match=r"net.*(expected a plain network|must be a torch.nn.Module)"):
        takes(program())


def test_a_model_and_a_guide_that_change_places_are_refused() -> None:
    """In ``fit`` and in ``SVGD``, before anything runs."""
    model = models.Bella(net(), CATEGORICAL, 24)
    for guide in (models.MeanFieldGuide(model), AutoNormal(model), models.ParticleGuide(model)):
        with pytest.raises(TypeError, match="expected the model first and then its guide"):
            inference.fit(guide, model, (X, Y), **SHORT)
        with pytest.raises(TypeError, match="expected the model first and then its guide"):
            inference.SVGD(guide, model)
    with pytest.raises(TypeError, match="guide=3: expected a Pyro program"):
        inference.fit(model, 3, (X, Y), **SHORT)


@pytest.mark.parametrize("kernel", [lambda d: d, inference.RBF, "rbf", 1.0])
def test_what_is_no_kernel_is_refused(kernel: Any) -> None:
    """A function, a class, a name and a number are no kernels."""
    model = models.Bella(net(), CATEGORICAL, 24)
    with pytest.raises(TypeError, match="kernel=.*expected a kernel of pyro_bnn.inference"):
        inference.SVGD(model, models.ParticleGuide(model), kernel=kernel)


def test_a_laplace_approximation_that_nothing_would_finish_is_refused() -> None:
    """``fit`` finds its mode alone; other AutoGuides of points are what they say."""
    model = dense()
    with pytest.raises(TypeError, match=r"guide=AutoLaplaceApproximation.*laplace_approximation\(x, y\)"):
        inference.fit(model, AutoLaplaceApproximation(model), (X, Y), **SHORT)
    assert inference.fit(model, AutoDelta(model), (X, Y), **SHORT).predict(X, 1).outputs.shape == (1, 1, 24, 3)


@pytest.mark.parametrize("family", ["point", "laplace", None])
def test_rank_1_guides_have_two_families(family: Any) -> None:
    with pytest.raises(ValueError, match="family=.*expected 'normal' or 'cauchy'"):
        models.Rank1Guide(models.Rank1(net(), CATEGORICAL, 24), family=family)


def line(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(x @ w, 1.0), obs=y)


@pytest.mark.parametrize("count", [3, 16, 20])
def test_every_particle_and_every_network_predicts(count: int) -> None:
    """By default all of them, also of more than the 16 draws that stand for a guide or a chain."""
    particles = inference.SVGD(line, inference.AutoParticles(line, count)).fit((X, X[:, 0]), **SHORT)
    assert particles.predict(X, return_site="obs").outputs.shape == (count, 1, 24)
    networks = inference.DeepEnsemble(net(), CATEGORICAL, 24, num_networks=count).fit((X, Y), **SHORT)
    assert networks.predict(X).outputs.shape == (count, 1, 24, 3)
    chain = pb.Posterior.from_draws(dense(), {s.name: torch.zeros(count, *s.shape) for s in dense().sites()})
    assert chain.predict(X).outputs.shape == (min(count, 16), 1, 24, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_laplace_approximation_in_half_precision_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"network is in torch\..*float16.*net\.float\(\)"):
        inference.LastLayerLaplace(net().to(dtype), CATEGORICAL, 24)


@pytest.mark.parametrize("label", [3, 9, -1])
def test_labels_without_an_output_are_named_wherever_they_are_scored(label: int) -> None:
    """Log densities of predictions speak of the label, as training does."""
    model = dense()
    posterior = inference.fit(model, models.MeanFieldGuide(model), (X, Y), **SHORT)
    wrong = Y.clone()
    wrong[3] = label
    for call in (
        lambda: posterior.predict(X).log_prob(wrong),
        lambda: posterior.log_likelihood(X, wrong),
        lambda: pb.diagnostics.evaluate(posterior, (X, wrong)),
        lambda: inference.LastLayerLaplace(net(), CATEGORICAL, 24).fit((X, wrong)),
    ):
        with pytest.raises(ValueError, match=rf"y holds label {label}, but the network has 3 outputs"):
            call()


def test_no_rows_are_no_prediction() -> None:
    """Of every form of inputs, for ``predict`` and ``log_likelihood``."""
    posterior = pb.Posterior(dense(), models.MeanFieldGuide(dense()))
    for empty in (X[:0], X[:0].numpy(), (X[:0],)):
        with pytest.raises(ValueError, match="x is empty: give at least one row"):
            posterior.predict(empty)
    with pytest.raises(ValueError, match="x is empty: give at least one row"):
        posterior.log_likelihood(X[:0], Y[:0])
