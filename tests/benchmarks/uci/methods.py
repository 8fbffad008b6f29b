"""The ways to a posterior that are compared, and the settings that validation chooses among for each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn.inference import SGHMC, SGHMCEM, SVGD, SWAG, DeepEnsemble, LastLayerLaplace, MCDropout
from pyro_bnn.models import Bella, CodebookGuide, Dense, MeanFieldGuide, ParticleGuide, Rank1, Rank1Guide, SpikeSlab
from tests.benchmarks.datasets import Table

Settings = Mapping[str, Any]
Fit = Callable[[Table, Settings, int, float], pb.Posterior]

#: a table of more rows takes larger batches, and more steps
SMALL = 5000
#: optimiser steps of a whole training of a small table, by how much larger ones have more, and rows of their batches
STEPS, MORE, BATCHES = 5000, 4, (128, 512)
#: up to so many training rows a chain has the gradient of all, and with it a Metropolis test of each step
EXACT = 12_000
LIKELIHOODS: dict[str, tuple[type[pb.likelihoods.Likelihood], int]] = {
    "gaussian": (pb.likelihoods.Gaussian, 1),
    "heteroscedastic": (pb.likelihoods.HeteroscedasticGaussian, 2),
    "categorical": (pb.likelihoods.Categorical, 10),
}
#: of these, the likelihood whose noise the network predicts
PREDICTED = "heteroscedastic"
PARTICLES, COMPONENTS, NETWORKS, CHAINS = 5, 4, 5, 4


@dataclass(frozen=True)
class Method:
    """A way to a posterior.

    :param fit: ``(table, settings, seed, share)``; share is that of the usual number of steps.
    :param grid: the settings among which validation chooses.
    :param draws: of each member, in a prediction.
    :param is_ours: whether it is one of the methods that this library is for, and not a baseline.
    :param of_large: the grid for tables of more than :data:`SMALL` rows, if it is another one.
    :param half_of: the method of whose draws this one's are half: where that is measured too, it stands for both.
    """

    fit: Fit
    grid: tuple[Settings, ...]
    draws: int
    is_ours: bool = False
    of_large: tuple[Settings, ...] = ()
    half_of: str = ""

    def settings(self, table: Table) -> tuple[Settings, ...]:
        """Those among which validation chooses for this table."""
        return self.of_large if self.of_large and len(table.x_train) > SMALL else self.grid


def grid(**values: Any) -> tuple[Settings, ...]:
    """All combinations with both likelihoods of a table: one noise, or a noise that the network predicts."""
    combined = product(("gaussian", "heteroscedastic"), *values.values())
    return tuple(dict(zip(("likelihood", *values), combination, strict=True)) for combination in combined)


def pair(table: Table) -> tuple[Tensor, Tensor]:
    return table.x_train, table.y_train


def network(table: Table, settings: Settings, dropout: float | None = None) -> nn.Module:
    """One hidden layer; two outputs, mean and log scale, where the noise depends on the input."""
    _, outputs = LIKELIHOODS[settings["likelihood"]]
    first, last = nn.Linear(table.x_train.shape[1], table.units), nn.Linear(table.units, outputs)
    between = [] if dropout is None else [nn.Dropout(dropout)]
    return nn.Sequential(first, nn.ReLU(), *between, last)


def given(table: Table, settings: Settings, dropout: float | None = None) -> tuple[Any, Any, int]:
    """Network, likelihood and number of rows: what every model and baseline begins with."""
    likelihood, _ = LIKELIHOODS[settings["likelihood"]]
    return network(table, settings, dropout), likelihood(), len(table.x_train)


def batch_size(table: Table) -> int:
    return min(len(table.x_train), BATCHES[len(table.x_train) > SMALL])


def epochs(table: Table, share: float, steps: int = STEPS) -> int:
    more = MORE if len(table.x_train) > SMALL else 1
    return max(1, round(share * more * steps / math.ceil(len(table.x_train) / batch_size(table))))


def training(table: Table, share: float, steps: int = STEPS) -> dict[str, Any]:
    """What all trainings by gradients have in common."""
    common: dict[str, Any] = {"schedule": pb.inference.cosine(), "progress": False, "compile": share == 1}
    return {"epochs": epochs(table, share, steps), "batch_size": batch_size(table), "lr": 1e-2, **common}


def networks(table: Table, settings: Settings, seed: int, share: float, number: int = NETWORKS) -> pb.Posterior:
    """Networks by MAP from different starting values."""
    ensemble = DeepEnsemble(*given(table, settings), num_networks=number)
    return ensemble.fit(pair(table), seed=seed, **training(table, share, settings["steps"]))


def one_network(table: Table, settings: Settings, seed: int, share: float) -> pb.Posterior:
    return networks(table, settings, seed, share, 1)


def trained(table: Table, settings: Settings, seed: int, share: float, steps: int = STEPS) -> nn.Module:
    """One network by MAP, for methods that start at one."""
    (net,) = one_network(table, {**settings, "steps": steps}, seed, share).networks(1)
    return net


def dropout(table: Table, settings: Settings, seed: int, share: float) -> pb.Posterior:
    method = MCDropout(*given(table, settings, settings["p"]))
    return method.fit(pair(table), seed=seed, **training(table, share))


def swag(table: Table, settings: Settings, seed: int, share: float) -> pb.Posterior:
    _, likelihood, size = given(table, settings)
    method = SWAG(trained(table, settings, seed, share, STEPS // 2), likelihood, size)
    rate = {"lr": settings["lr"], "num_samples": 100, "batch_size": batch_size(table), "progress": False}
    return method.fit(pair(table), epochs=epochs(table, share, STEPS // 2), seed=seed, **rate)


def laplace(table: Table, settings: Settings, seed: int, share: float) -> pb.Posterior:
    method = LastLayerLaplace(*given(table, settings))
    return method.fit(pair(table), seed=seed, **training(table, share, settings["steps"]))


def mean_field_model(table: Table, settings: Settings) -> Dense:
    return Dense(*given(table, settings), prior=pb.priors.Normal(0.0, settings["scale"]))


def mean_field(table: Table, settings: Settings, seed: int, share: float) -> pb.Posterior:
    model = mean_field_model(table, settings)
    return pb.inference.fit(model, MeanFieldGuide(model), pair(table), seed=seed, **training(table, share))


def codebook(table: Table, settings: Settings, seed: int, share: float) -> pb.Posterior:
    model = mean_field_model(table, settings)
    field = MeanFieldGuide(model)
    pb.inference.fit(model, field, pair(table), seed=seed, **training(table, share))
    guide = CodebookGuide.from_mean_field(model, field, codes=64)
    tuning = training(table, share, STEPS // 2) | {"lr": 1e-3}
    return pb.inference.fit(model, guide, pair(table), seed=seed, **tuning)


def rank1(table: Table, settings: Settings, seed: int, share: float) -> pb.Posterior:
    model = Rank1(*given(table, settings))
    guide = Rank1Guide(model, COMPONENTS, init_dropout_rate=1e-2)
    return pb.inference.fit(model, guide, pair(table), seed=seed, **training(table, share, settings["steps"]))


def bella(table: Table, settings: Settings, seed: int, share: float) -> pb.Posterior:
    """From draws of a wide prior: what starts near the trained network stays one network, with repulsion too."""
    model = Bella(trained(table, settings, seed, share, STEPS // 2), *given(table, settings)[1:], **settings["room"])
    options = training(table, share, STEPS // 2)
    guide = ParticleGuide(model, PARTICLES, init="prior")
    engine = SVGD(model, guide, method="ensemble", lr=options.pop("lr"))
    return engine.fit(pair(table), seed=seed, **options)


def chains(kernel: Any, share: float, seed: int, draws: int, warmup: int | None = None) -> pb.Posterior:
    """So many draws of each chain."""
    lengths = (draws, warmup) if share == 1 else (max(10, round(share * draws)), 200)
    return pb.inference.sample(kernel, *lengths, num_chains=CHAINS, seed=seed, progress=False)


def by_width(net: Any, scale: float = 1.0) -> dict[str, pb.priors.Prior]:
    """A prior under which functions do not grow with the number of units.

    :param scale: of the first layer: under a larger one functions bend more.
    """
    output = pb.priors.Normal(0.0, net[2].in_features ** -0.5)
    return {r"2\.weight": output, r"0\..*": pb.priors.Normal(0.0, scale), ".*": pb.priors.Normal(0.0, 1.0)}


def of_learned_scales(net: Any) -> dict[str, pb.priors.Prior]:
    """A prior of the same kind whose scale, one for a matrix or a bias, is learned."""
    output = pb.priors.HierarchicalNormal(2.0, 2.0 / net[2].in_features)
    return {r"2\.weight": output, ".*": pb.priors.HierarchicalNormal(2.0, 2.0)}


def sghmc(table: Table, settings: Settings, seed: int, share: float, draws: int = 50) -> pb.Posterior:
    """With the gradient of all rows where these are not too many, and nothing set but a long warm-up.

    Chains start at trained networks where a predicted noise can explain what a chain has not learned yet, and keep it
    there, and where warm-up alone does not learn enough, as of large tables. Those determine the scales of the weights,
    too; small tables do not, and have fixed ones, that of the first layer by validation.
    """
    net, likelihood, size = given(table, settings)
    prior = of_learned_scales(net) if size > SMALL else by_width(net, settings["scale"])
    model = Dense(net, likelihood, size, prior=prior)
    rows = size if size <= EXACT else batch_size(table)
    kernel = SGHMC(model, pair(table), batch_size=rows, compile=share == 1)
    if size > SMALL or settings["likelihood"] == "heteroscedastic":
        starts = networks(table, {**settings, "steps": STEPS if size > SMALL else STEPS // 5}, seed, share, CHAINS)
        kernel.initial_params = {name: value[:, 0] for name, value in starts.draws(CHAINS).items()}
    return chains(kernel, share, seed, draws, 600)


def of_both_noises(table: Table, settings: Settings, seed: int, share: float) -> pb.Posterior:
    """Half of the draws are of chains whose network predicts the noise, half of chains with one noise for all rows.

    Where noise is predicted, rows that fit badly count less: NLL is better, and RMSE worse, than with one noise. Half
    of each has the NLL of the first and much of the RMSE of the second.
    """
    predicted, one = (
        weights_of(sghmc(table, {**settings, "likelihood": likelihood}, seed, share))
        for likelihood in (PREDICTED, "gaussian")
    )
    halves = [predicted, predicting_one_noise(one)]
    draws = {name: torch.cat([half[name] for half in halves]) for name in predicted}
    return pb.Posterior.from_draws(Dense(*given(table, {"likelihood": PREDICTED})), draws)


def weights_of(posterior: pb.Posterior) -> dict[str, Tensor]:
    """All stored draws, ``{name: [draws, *shape]}``, and the noise, where it is one number."""
    draws = posterior.draws(posterior.num_stored or 1)
    shapes = {"0.weight": 2, "0.bias": 1, "2.weight": 2, "2.bias": 1, "noise": 0}
    return {name: draws[name].flatten(0, -1 - dims) for name, dims in shapes.items() if name in draws}


def predicting_one_noise(draws: dict[str, Tensor]) -> dict[str, Tensor]:
    """Draws with one noise, as those of a network with a second output that is the same for all rows."""
    raw = draws["noise"].expm1().log().unsqueeze(-1)  # of which softplus is the noise
    weight = torch.cat([draws["2.weight"], torch.zeros_like(draws["2.weight"])], -2)
    kept = {name: value for name, value in draws.items() if name != "noise"}
    return {**kept, "2.weight": weight, "2.bias": torch.cat([draws["2.bias"], raw], -1)}


def spike_slab(table: Table, settings: Settings, seed: int, share: float) -> pb.Posterior:
    """By the recipe of docs/spike_slab.md: inputs are in the spike or in the slab, or single weights of many pixels."""
    net, likelihood, size = given(table, settings)
    inputs = table.x_train.shape[1]
    first = pb.priors.SpikeAndSlab.for_inputs(inputs, size) if inputs < size / 5 else pb.priors.SpikeAndSlab()
    prior = {r"0\.weight": first, **by_width(net)}
    model = SpikeSlab(net, likelihood, size, prior=prior)
    options: dict[str, Any] = {"batch_size": min(size, 256), "thinning": 10}
    kernel = SGHMCEM(model, pair(table), step_size=settings["step size"], friction=0.1, **options)
    return chains(kernel, share, seed, 100, 750)


def of_scales(settings: Settings) -> tuple[Settings, ...]:
    """Chains with two prior scales of the first layer, which small tables do not determine."""
    return tuple({**settings, "scale": scale} for scale in (1.0, 2.0))


#: of chains
ONE: Settings = {"likelihood": PREDICTED}
BOTH: Settings = {"noise": "both"}
TRAINED = grid(steps=(STEPS // 5, STEPS))
SCALED = grid(scale=(0.3, 1.0))
METHODS: dict[str, Method] = {
    "one network": Method(one_network, TRAINED, 1),
    "ensemble of 5": Method(networks, TRAINED, NETWORKS),
    "MC dropout": Method(dropout, grid(p=(0.01, 0.1)), 100),
    "SWAG": Method(swag, grid(lr=(1e-5, 1e-3)), 100),
    "last-layer Laplace": Method(laplace, TRAINED, 100),
    "mean field": Method(mean_field, SCALED, 100),
    "codebook": Method(codebook, SCALED, 100, is_ours=True),
    "rank-1": Method(rank1, TRAINED, 100, is_ours=True),
    "Bella": Method(bella, grid(room=({"product_scale": 0.6}, {"product_scale": 1.0})), 1, is_ours=True),
    "spike and slab": Method(spike_slab, grid(**{"step size": (0.02, 0.05)}), 400, is_ours=True),
    "SGHMC, predicted noise": Method(sghmc, of_scales(ONE), 200, is_ours=True, of_large=(ONE,), half_of="SGHMC"),
    "SGHMC": Method(of_both_noises, of_scales(BOTH), 400, is_ours=True, of_large=(BOTH,)),
}
