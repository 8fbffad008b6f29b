"""The ways to a posterior that are compared, and the settings that validation chooses among for each."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn.command.recipes import trained_network
from pyro_bnn.inference import SVGD, SWAG, LastLayerLaplace, MCDropout, cosine, fit
from pyro_bnn.models import (
    Bella,
    CodebookGuide,
    Dense,
    MeanFieldGuide,
    MergeCodes,
    ParticleGuide,
    PointGuide,
    Rank1,
    Rank1Guide,
    WeightSharing,
)
from pyro_bnn.models.starting_means import starting_means
from tests.benchmarks import sparse_images
from tests.benchmarks.images.batch_ensemble import BatchEnsemble, signs, train
from tests.benchmarks.images.tasks import ONE, TASKS, Settings, Task, grid

Pair = tuple[Tensor, Tensor]
LIKELIHOOD = pb.likelihoods.Categorical()
MEMBERS, BATCH, RATE = 4, 32, 1e-3
#: networks of a prediction, where a posterior is not a few of them
DRAWS = 16


class Start(NamedTuple):
    """What a method is given: training data, a seed, and a trained network for those that start from one.

    :param network: ``network(i)`` is the i-th of the seed's four networks, trained, with the seconds that this took.
    :param share: of the usual number of epochs.
    """

    task: Task
    pair: Pair
    seed: int
    network: Callable[[int], tuple[nn.Module, float]]
    share: float

    def fresh(self, number: int = 0, dropout: float = 0.0) -> nn.Module:
        """The i-th of the seed's four networks before training."""
        return self.task.network(MEMBERS * self.seed + number, dropout)


class Fit(NamedTuple):
    """A posterior, the seconds of its training, that of a network which it starts from among them, and its numbers.

    :param numbers: how many numbers were trained, or are kept of chains; ``None`` for those that it stores.
    """

    posterior: pb.Posterior
    seconds: float
    numbers: int | None = None


@dataclass(frozen=True)
class Method:
    """A way to a posterior.

    :param run: from the settings.
    :param draws: of each member, in a prediction.
    :param grid: the settings among which validation chooses.
    :param is_after: whether it starts from trained networks, whose settings are then part of its own.
    :param seeds: of each setting's fits for validation: more than one where the NLL depends much on the seed.
    """

    run: Callable[[Start, Settings], Fit]
    draws: int = 1
    grid: tuple[Settings, ...] = ({},)
    is_after: bool = False
    seeds: int = 1


def training(start: Start, epochs: float | None = None, lr: float = RATE) -> dict[str, Any]:
    options: dict[str, Any] = {"schedule": cosine(), "seed": start.seed, "progress": False}
    epochs = max(1, round(start.share * (epochs or start.task.epochs)))
    return {"epochs": epochs, "batch_size": BATCH, "lr": lr, "precision": start.task.precision, **options}


def numbers_of(*modules: object) -> int:
    parameters = {id(p): p for m in modules if isinstance(m, nn.Module) for p in m.parameters() if p.requires_grad}
    return sum(p.numel() for p in parameters.values())


def by_svi(start: Start, model: Any, guide: Any, before: float = 0.0, **options: Any) -> Fit:
    began = time.perf_counter()
    posterior = fit(model, guide, start.pair, **options)
    return Fit(posterior, before + time.perf_counter() - began, numbers_of(model, guide))


def point(start: Start, settings: Settings, number: int = 0) -> Fit:
    """A network by MAP, from its own starting values."""
    net = start.fresh(number)
    model = Dense(net, LIKELIHOOD, len(start.pair[1]), prior=pb.priors.Normal(0.0, settings["scale"]))
    return by_svi(start, model, PointGuide(model), **training(start, settings["epochs"]))


def of_draws(draws: dict[str, Tensor], start: Start) -> pb.Posterior:
    model = Dense(start.fresh(), LIKELIHOOD, len(start.pair[1]))
    return pb.Posterior.from_draws(model, draws, is_sampled=False)


def ensemble(start: Start, settings: Settings) -> Fit:
    found = [start.network(number) for number in range(MEMBERS)]
    states = [net.state_dict() for net, _ in found]
    draws = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    seconds, numbers = sum(seconds for _, seconds in found), MEMBERS * numbers_of(found[0][0])
    return Fit(of_draws(draws, start), seconds, numbers)


def batch_ensemble(start: Start, settings: Settings) -> Fit:
    began = time.perf_counter()
    net = BatchEnsemble(start.fresh(), MEMBERS, around_one(settings) if settings["spread"] else signs)
    torch.manual_seed(start.seed)
    options = training(start)
    decay = 1 / (len(start.pair[1]) * settings["scale"] ** 2)
    train(net, start.pair, options["epochs"], options["batch_size"], RATE, decay, start.task.precision == "bf16")
    return Fit(of_draws(net.explicit(), start), time.perf_counter() - began, net.numbers())


def around_one(settings: Settings) -> Callable[[torch.Size], Tensor]:
    """Of Normal(1, spread)."""
    normal = pb.priors.Normal(1.0, settings["spread"])
    return lambda shape: starting_means(torch.empty(shape), normal, settings.get("strata", False))


def rank1(start: Start, settings: Settings, prior: pb.priors.Prior) -> Fit:
    net, size = start.fresh(), len(start.pair[1])
    weight_prior = pb.priors.Normal(0.0, settings["scale"])
    model = Rank1(net, LIKELIHOOD, size, prior=prior, weight_prior=weight_prior)
    means = around_one(settings) if settings["spread"] else lambda shape: torch.randn(shape).sign()
    guide = Rank1Guide(model, MEMBERS, init_dropout_rate=settings["noise"], init_means=means)
    return by_svi(start, model, guide, **training(start))


def rank1_normal(start: Start, settings: Settings) -> Fit:
    """About 1, or about 0 where factors start from signs."""
    return rank1(start, settings, pb.priors.Normal(1.0, 0.5) if settings["spread"] else pb.priors.Normal(0.0, 1.0))


def rank1_cauchy(start: Start, settings: Settings) -> Fit:
    return rank1(start, settings, pb.priors.HierarchicalCauchy(0.5))


def field_prior(settings: Settings) -> pb.priors.Prior:
    return pb.priors.pretrained(settings["around"]) if "around" in settings else sparse_prior()


def sparse_prior() -> pb.priors.Prior:
    """Most weights are nearly zero, a tenth is not."""
    return pb.priors.GaussianMixture(locs=[0.0, 0.0], scales=[0.01, 0.2], weights=[0.9, 0.1])


def mean_field(start: Start, settings: Settings) -> Fit:
    """From the trained network."""
    net, seconds = start.network(0)
    model = WeightSharing(net, LIKELIHOOD, len(start.pair[1]), prior=field_prior(settings))
    return by_svi(start, model, MeanFieldGuide(model), seconds, **training(start))


def codebook(start: Start, settings: Settings) -> Fit:
    """Codes for the mean field under the sparse prior, of all parameters, as small as docs/weight_sharing.md has it."""
    base = mean_field(start, settings)
    model, guide = base.posterior.model, base.posterior.guide
    assert isinstance(model, WeightSharing) and isinstance(guide, MeanFieldGuide)
    small: dict[str, Any] = {"distance": "divergence", "zero": True, "blend": 0.0, "outliers": 0.0, "smallest": 0}
    codes = CodebookGuide.from_mean_field(model, guide, codes=32, rate=settings["rate"], coded=".*", **small)
    options = training(start, start.task.epochs / 2, lr=3e-4)
    merge = MergeCodes(stop=max(1, options["epochs"] // 2))
    found = by_svi(start, model, codes, base.seconds, **options, callbacks=[merge])
    return found._replace(numbers=codes.compression_report()["trainable"])


def spike_slab(level: float) -> Callable[[Start, Settings], Fit]:
    """By the recipe of ``tests.benchmarks.sparse_images``, from the trained network at once to a share removed."""

    def run(start: Start, settings: Settings) -> Fit:
        net, seconds = start.network(0)
        began = time.perf_counter()
        own = sparse_images.SETTINGS["lenet5"]
        if start.share < 1:
            own = sparse_images.replace(own, warmup=1, cycles=1)
        posterior = sparse_images.sghmcem(copy.deepcopy(net), start.pair, level, 0.0, own, start.seed)
        kept = sum(int((value != 0).sum()) for value in posterior.draws(posterior.num_stored or 1).values())
        return Fit(posterior, seconds + time.perf_counter() - began, kept)

    return run


def bella(start: Start, settings: Settings) -> Fit:
    net, seconds = start.network(0)
    model = Bella(net, LIKELIHOOD, len(start.pair[1]), rank=4, product_scale=settings["scale"])
    guide = ParticleGuide(model, MEMBERS)
    began = time.perf_counter()
    options = training(start)
    posterior = SVGD(model, guide, lr=options.pop("lr")).fit(start.pair, **options)
    return Fit(posterior, seconds + time.perf_counter() - began, numbers_of(guide))


def swag(start: Start, settings: Settings) -> Fit:
    net, seconds = start.network(0)
    began = time.perf_counter()
    options = training(start, lr=settings["lr"])
    del options["schedule"]
    options["epochs"] = max(2, options["epochs"])  # which it needs for a spread
    posterior = SWAG(net, LIKELIHOOD, len(start.pair[1])).fit(start.pair, num_samples=DRAWS, **options)
    return Fit(posterior, seconds + time.perf_counter() - began)


def dropout(start: Start, settings: Settings) -> Fit:
    net = start.fresh(dropout=settings["p"])
    began = time.perf_counter()
    method = MCDropout(net, LIKELIHOOD, len(start.pair[1]), prior=pb.priors.Normal(0.0, settings["scale"]))
    return Fit(method.fit(start.pair, **training(start)), time.perf_counter() - began, numbers_of(net))


def laplace(start: Start, settings: Settings) -> Fit:
    net, seconds = start.network(0)
    began = time.perf_counter()
    posterior = LastLayerLaplace(net, LIKELIHOOD, len(start.pair[1])).fit(start.pair, seed=start.seed)
    return Fit(posterior, seconds + time.perf_counter() - began)


SCALES = (0.1, 0.3, 1.0)
#: of rank-1, with the dropout rate that factors start from; what was behind after one or two seeds is in the JSON alone
FACTORS: tuple[Settings, ...] = (
    {"scale": 0.3, "noise": 0.1, "spread": 0.5},
    {"scale": 0.3, "noise": 0.03, "spread": 1.0, "strata": True},
    {"scale": 0.3, "noise": 1e-3, "spread": 0.0},
)
#: of BatchEnsemble, whose factors start as those of rank-1 in the second of these
STRATA: Settings = {"spread": 1.0, "scale": 0.3, "strata": True}
METHODS: dict[str, Method] = {
    ONE: Method(point, grid=grid(scale=SCALES, epochs=(5, 10))),
    "ensemble of 4": Method(ensemble, MEMBERS, is_after=True),
    "BatchEnsemble": Method(batch_ensemble, MEMBERS, (*grid(spread=(0.5, 0.0), scale=SCALES), STRATA)),
    "rank-1, Normal": Method(rank1_normal, DRAWS // MEMBERS, FACTORS, seeds=3),
    "rank-1, Cauchy": Method(rank1_cauchy, DRAWS // MEMBERS, FACTORS[:2]),
    "MC dropout": Method(dropout, DRAWS, grid(p=(0.2, 0.5), scale=SCALES)),
    "SWAG": Method(swag, DRAWS, grid(lr=(1e-4, 1e-3, 1e-2)), is_after=True),
    "last-layer Laplace": Method(laplace, DRAWS, is_after=True),
    "mean field": Method(mean_field, DRAWS, grid(around=(0.02, 0.05, 0.1)), is_after=True),
    "codebook": Method(codebook, DRAWS, grid(rate=(0.05,)), is_after=True),
    "Bella": Method(bella, 1, grid(scale=(0.02, 0.1)), is_after=True),
    "spike and slab": Method(spike_slab(0.0), 20, is_after=True),
    "spike and slab, 90 %": Method(spike_slab(0.9), 20, is_after=True),
    "spike and slab, 95 %": Method(spike_slab(0.95), 20, is_after=True),
}


def network_of(found: Fit) -> nn.Module:
    return trained_network(found.posterior)


def grid_of(data: str, method: str) -> tuple[Settings, ...]:
    """The settings of a method that validation chooses among on a data set."""
    return TASKS[data].grids.get(method, METHODS[method].grid)
