"""Texts of objects: no public one is an address, and each says what it is made of, whatever parts are missing."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, is_typeddict

import pytest
import torch
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn.inference import DeepEnsemble, FitState, LastLayerLaplace, MCDropout
from pyro_bnn.likelihoods import Categorical, Gaussian
from pyro_bnn.models import (
    Bella,
    Codebook,
    CodebookGuide,
    Dense,
    MeanFieldGuide,
    ParticleGuide,
    PointGuide,
    Rank1,
    Rank1Guide,
    SpikeSlab,
    WeightSharing,
)
from pyro_bnn.priors import Normal, SpikeAndSlab

N = 8


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.2), nn.Tanh(), nn.Linear(3, 2))


def data() -> tuple[Tensor, Tensor]:
    return torch.linspace(-1, 1, 2 * N).reshape(N, 2), torch.arange(N) % 2


def dense() -> Dense:
    return Dense(network(), Categorical(), N)


def spike() -> SpikeSlab:
    return SpikeSlab(network(), Categorical(), N)


def particles() -> tuple[Any, Any]:
    model = Bella(network(), Categorical(), N)
    return model, ParticleGuide(model, 2)


def posterior() -> pb.Posterior:
    model = dense()
    return pb.inference.fit(model, MeanFieldGuide(model), data(), epochs=2, progress=False, seed=0)


def book() -> Codebook:
    return CodebookGuide(WeightSharing(network(), Categorical(), N), 2).book


#: how an object of every public class is made that cannot be built from nothing
MAKE: dict[str, Callable[[], Any]] = {
    "Posterior": posterior,
    "Prediction": lambda: posterior().predict(data()[0], 2, seed=0),
    "Bella": lambda: particles()[0],
    "Codebook": book,
    "CodebookGuide": lambda: CodebookGuide(WeightSharing(network(), Categorical(), N), 2),
    "Dense": dense,
    "MeanFieldGuide": lambda: MeanFieldGuide(dense()),
    "ParticleGuide": lambda: particles()[1],
    "PointGuide": lambda: PointGuide(dense()),
    "Rank1": lambda: Rank1(network(), Categorical(), N),
    "Rank1Guide": lambda: Rank1Guide(Rank1(network(), Categorical(), N), 2),
    "SpikeSlab": spike,
    "WeightSharing": lambda: WeightSharing(network(), Categorical(), N),
    "Summary": lambda: pb.summary(dense()),
    "SGHMC": lambda: pb.inference.SGHMC(dense(), data(), step_size=0.1, friction=0.2),
    "SGHMCEM": lambda: pb.inference.SGHMCEM(spike(), data(), step_size=0.1, friction=0.2, prune="inclusion"),
    "SGLD": lambda: pb.inference.SGLD(dense(), data(), step_size=0.1),
    "Objective": lambda: pb.inference.Objective(
        *(lambda m: (m, pb.models.MeanFieldGuide(m)))(Dense(network(), Gaussian(), 50))
    ),
    "Checkpoint": lambda: pb.inference.Checkpoint("run.pt", steps=10),
    "CSVLog": lambda: pb.inference.CSVLog("log.csv"),
    "SVGD": lambda: pb.inference.SVGD(*particles(), annealing=lambda step: 1.0),
    "SWAG": lambda: pb.inference.SWAG(network(), Categorical(), N),
    "AutoParticles": lambda: pb.inference.AutoParticles(dense()),
    "DeepEnsemble": lambda: DeepEnsemble(network(), Categorical(), N),
    "FitState": lambda: FitState(1, 2, 0.5, dense(), MeanFieldGuide(dense()), torch.optim.SGD([torch.zeros(1)], 0.1)),
    "LastLayerLaplace": lambda: LastLayerLaplace(network(), Categorical(), N),
    "MCDropout": lambda: MCDropout(network(), Categorical(), N),
    "KernelSum": lambda: pb.inference.KernelSum((pb.inference.RBF(), pb.inference.IMQ())),
    "KeFanSGHMC": lambda: pb.inference.KeFanSGHMC(spike(), data(), step_size=0.1, friction=0.2),
    "GaussianMixture": lambda: pb.priors.GaussianMixture(locs=[0.0, 0.0], scales=[0.01, 0.2]),
    "SharedWeights": lambda: pb.models.SharedWeights(network(), Categorical(), N, codebook=book()),
    "SpikeAndSlabDistribution": lambda: SpikeAndSlab(inclusion=0.5).elements(0.0, torch.zeros(3, 2), None),
}


def public_classes() -> list[type]:
    modules = (pb, pb.models, pb.inference, pb.priors, pb.likelihoods)
    found = [getattr(module, name) for module in modules for name in module.__all__]
    return list(dict.fromkeys(c for c in found if inspect.isclass(c) and not is_typeddict(c)))


@pytest.mark.parametrize("cls", public_classes(), ids=lambda cls: cls.__name__)
def test_the_text_of_no_public_object_is_its_address(cls: type) -> None:
    made = MAKE.get(cls.__name__, cls)()
    assert isinstance(made, cls)
    shown = repr(made)
    assert cls.__name__ in shown or cls.__name__ in ("SpikeAndSlabDistribution",)
    assert "object at" not in shown and " at 0x" not in shown
    assert max(map(len, shown.splitlines())) < 250


def test_a_model_says_its_parts_and_not_its_modules() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    shown = repr(Dense(net, Gaussian(), 50, prior=Normal(0.0, 2.0)))
    assert shown.splitlines()[0] == "Dense of Sequential"
    assert "Gaussian(" in shown and "Normal(loc=0.0, scale=2.0)" in shown and "50" in shown
    assert "14 random, 6 point estimates" in shown  # 2 x 3 + 3 + 3 + 1 and the learned noise; gains and shifts
    assert "BatchNorm1d" not in shown


def test_a_rank_1_network_counts_factors_as_random_and_weights_as_point_estimates() -> None:
    model = Rank1(nn.Linear(4, 3), Categorical(), N, prior=Normal(1.0, 0.1))
    assert "10 random, 12 point estimates" in repr(model)  # s, r and a bias for each member; W
    assert "21 random, 12 frozen" in repr(Bella(nn.Linear(4, 3, bias=False), Categorical(), N, rank=3))


def test_texts_are_whole_when_parts_are_missing() -> None:
    alone = Dense(network(), None)
    assert "the function alone" in repr(alone) and "num_data" not in repr(alone)

    def my_guide(x: Any, y: Any = None) -> None: ...

    def my_model(x: Any, y: Any = None) -> None: ...

    shown = repr(pb.Posterior(my_model, my_guide))
    assert shown.splitlines()[0] == "Posterior of my_model" and "my_guide" in shown and "training" not in shown
    values = pb.Prediction(torch.zeros(2, 1, 3), None)
    assert "values of a function" in repr(values) and "[2, 1, 3]" in repr(values)


def test_a_posterior_says_its_draws_chains_and_training() -> None:
    trained = posterior()
    assert "made by the guide, for 1 member" in repr(trained)
    assert "2 steps, last loss" in repr(trained)
    model = dense()
    stored = pb.Posterior.from_draws(model, trained.draws(6, seed=0), num_chains=2, sampler={"temperature": 1.0})
    assert "6 stored in 2 chains, for 1 member" in repr(stored) and "temperature 1" in repr(stored)


def test_a_notebook_shows_tables_and_no_markup_of_the_users() -> None:
    class Odd(nn.Linear):
        pass

    Odd.__name__ = "<b>Odd</b>"
    model = Dense(Odd(2, 2), Categorical(), N)
    shown = pb.Posterior(model, PointGuide(model))._repr_html_()
    assert "&lt;b&gt;Odd" in shown and "<b>" not in shown and "<table>" in shown
    html = pb.Prediction(torch.zeros(1, 1, 25, 3), Categorical())._repr_html_()
    assert html.count("<tr") - 3 == 1 + 10 and "and 15 more rows" in html  # three fields, a heading, ten rows
    assert "0.3333" in html
