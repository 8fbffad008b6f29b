"""Numbers that mean nothing are refused at the call, by the name of the argument, in every public function."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn import data, diagnostics, inference, likelihoods, models, priors
from pyro_bnn.inference import pruning

X = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()
CATEGORICAL = likelihoods.Categorical()
PROBS = torch.tensor([[0.7, 0.3], [0.2, 0.8], [0.5, 0.5], [0.9, 0.1]])
LABELS = torch.tensor([0, 1, 1, 0])

NOT_NUMBERS: list[object] = [True, "3", [1], 1j]
NEVER: list[object] = [*NOT_NUMBERS, math.nan, -math.inf]
#: what each kind of number must not be
COUNT = [*NEVER, math.inf, 0, -1, 2.5, np.float32(1.5)]
COUNT_OR_0 = [*NEVER, math.inf, -1, 2.5]
SEED = [*NEVER, math.inf, -1, 1.5, 2**63]
POSITIVE = [*NEVER, math.inf, 0, 0.0, -1, -1e-9, 10**400]
NOT_NEGATIVE = [*NEVER, math.inf, -1, -1e-9]
FINITE = [*NEVER, math.inf]
LIMIT = [*NEVER, -1]
SHARE = [*NEVER, math.inf, 0, 1, -0.1, 1.5]
FROM_0 = [*NEVER, math.inf, 1, -0.1, 1.5]
UP_TO_1 = [*NEVER, math.inf, 0, -0.1, 1.5]
FRACTION = [*NEVER, math.inf, -0.1, 1.5]


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


def dropout_net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.2), nn.Linear(3, 2))


def dense() -> models.Dense:
    return models.Dense(net(), CATEGORICAL, 12)


def spike_slab() -> models.SpikeSlab:
    return models.SpikeSlab(net(), CATEGORICAL, 12)


def rank1() -> models.Rank1:
    return models.Rank1(net(), CATEGORICAL, 12)


def bella(**options: Any) -> models.Bella:
    return models.Bella(net(), CATEGORICAL, 12, **options)


def posterior() -> pb.Posterior:
    model = dense()
    return pb.Posterior(model, models.MeanFieldGuide(model))


def spiky() -> pb.Posterior:
    model = spike_slab()
    return pb.Posterior(model, models.MeanFieldGuide(model))


def regression() -> pb.Prediction:
    return pb.Prediction(torch.randn(2, 1, 5, 1), likelihoods.Gaussian(0.5))


def line(x: Tensor, y: Tensor | None = None) -> Tensor:
    return x


def shared_weights(**options: Any) -> models.SharedWeights:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        book = models.CodebookGuide(codebook_model(), 3).book
    return models.SharedWeights(net(), CATEGORICAL, codebook=book, **options)


def codebook_model() -> models.WeightSharing:
    return models.WeightSharing(net(), CATEGORICAL, 12)


def fit(**options: Any) -> object:
    model = dense()
    given: dict[str, Any] = {"epochs": 1, "progress": False} | options
    return inference.fit(model, models.MeanFieldGuide(model), (X, Y), **given)


def svgd(**options: Any) -> inference.SVGD:
    model = bella()
    return inference.SVGD(model, models.ParticleGuide(model), **options)


def sghmc(**options: Any) -> inference.SGHMC:
    return inference.SGHMC(dense(), (X, Y), **({"step_size": 0.1, "friction": 0.1} | options))


def em(**options: Any) -> inference.SGHMCEM:
    return inference.SGHMCEM(spike_slab(), (X, Y), **({"step_size": 0.1, "friction": 0.1} | options))


def sample(**options: Any) -> object:
    return inference.sample(sghmc(), **({"num_samples": 1, "progress": False} | options))


def swag_fit(**options: Any) -> object:
    return inference.SWAG(net(), CATEGORICAL, 12).fit((X, Y), **({"epochs": 2, "progress": False} | options))


def ensemble_fit(**options: Any) -> object:
    return inference.DeepEnsemble(net(), CATEGORICAL, 12).fit((X, Y), **({"epochs": 1, "progress": False} | options))


def sbc(**options: Any) -> object:
    return diagnostics.sbc(dense(), models.MeanFieldGuide, X, **options)


@dataclass
class Door:
    """A public callable: how it is called in a test, and what its numbers must not be."""

    public: Callable[..., Any]
    call: Callable[..., Any]
    numbers: dict[str, list[object]]


def draws_of(function: Callable[..., Any], *others: Any) -> Door:
    """One of the many diagnostics that draw from a posterior and then predict."""
    known = inspect.signature(function).parameters
    numbers = {"num_samples": COUNT, "batch_size": COUNT, "seed": SEED}
    call = lambda **options: function(posterior(), *others, **options)  # noqa: E731
    return Door(function, call, {name: bad for name, bad in numbers.items() if name in known})


MODEL = {"num_data": COUNT, "members_dim": [*NEVER, 0, -1, 2]}


def model_door(cls: Any, **numbers: list[object]) -> Door:
    own: dict[str, Any] = {"num_data": 12}
    return Door(cls, lambda **options: cls(net(), CATEGORICAL, **(own | options)), MODEL | numbers)


def baseline_door(cls: Any, network: Callable[[], nn.Module] = net, **numbers: list[object]) -> Door:
    own: dict[str, Any] = {"num_data": 12}
    call = lambda **options: cls(network(), CATEGORICAL, **(own | options))  # noqa: E731
    return Door(cls, call, {"num_data": COUNT} | numbers)


TRAINING = {
    "batch_size": COUNT,
    "seed": SEED,
    "lr": POSITIVE,
    "weight_decay": NOT_NEGATIVE,
    "kl_annealing": NOT_NEGATIVE,
}
LOOP = {"clip_norm": POSITIVE, "accumulate": COUNT, "log_every": COUNT, "max_steps": COUNT, "max_time": POSITIVE}
CHECKPOINT = {"epochs": COUNT, "steps": COUNT, "minutes": POSITIVE, "keep": COUNT}
STEPS = {"batch_size": COUNT, "num_data": COUNT, "thinning": COUNT, "check_every": COUNT}
SAMPLER = STEPS | {"step_size": POSITIVE, "friction": UP_TO_1, "temperature": NOT_NEGATIVE}
SAMPLER |= {"draws_per_cycle": COUNT, "exploration": COUNT_OR_0}
PRUNING = {"em_start": COUNT_OR_0, "em_every": COUNT, "prune_start": COUNT_OR_0, "prune_every": COUNT}

DOORS = [
    # models and guides
    model_door(models.Dense, chunk_size=COUNT),
    model_door(models.Rank1, clip=POSITIVE),
    model_door(models.SpikeSlab, chunk_size=COUNT),
    model_door(models.WeightSharing, chunk_size=COUNT),
    Door(models.SharedWeights, lambda **o: shared_weights(**({"num_data": 12} | o)), MODEL | {"chunk_size": COUNT}),
    model_door(models.Bella, rank=COUNT, alpha=POSITIVE, product_scale=POSITIVE),
    Door(
        models.MeanFieldGuide,
        lambda **o: models.MeanFieldGuide(dense(), **o),
        {"components": COUNT, "init_scale": POSITIVE},
    ),
    Door(
        models.Rank1Guide,
        lambda **o: models.Rank1Guide(rank1(), **o),
        {"components": COUNT, "init_dropout_rate": SHARE},
    ),
    Door(
        models.ParticleGuide,
        lambda **o: models.ParticleGuide(bella(), **o),
        {"particles": COUNT, "init_scale": POSITIVE},
    ),
    Door(
        models.CodebookGuide,
        lambda **o: models.CodebookGuide(codebook_model(), **({"codes": 3} | o)),
        {"codes": [v for v in COUNT if v is not True], "blend": FRACTION, "outliers": FRACTION, "init_scale": POSITIVE},
    ),
    Door(
        models.MergeCodes,
        models.MergeCodes,
        {
            "start": COUNT,
            "stop": COUNT,
            "every": COUNT,
            "tightness": POSITIVE,
            "gradient_limit": LIMIT,
            "variance_limit": LIMIT,
            "absorb": FRACTION,
        },
    ),
    # priors and likelihoods
    *(Door(p, p, {"loc": FINITE, "scale": POSITIVE}) for p in (priors.Normal, priors.Cauchy, priors.Laplace)),
    *(Door(p, p, {"scale": POSITIVE}) for p in (priors.Pretrained, priors.pretrained)),
    Door(priors.StudentT, priors.StudentT, {"df": POSITIVE, "loc": FINITE, "scale": POSITIVE}),
    Door(priors.HierarchicalCauchy, priors.HierarchicalCauchy, {"scale": POSITIVE, "loc": FINITE}),
    Door(priors.Horseshoe, priors.Horseshoe, {"scale": POSITIVE, "loc": FINITE}),
    Door(
        priors.HierarchicalNormal,
        priors.HierarchicalNormal,
        {"concentration": POSITIVE, "rate": POSITIVE, "loc": FINITE},
    ),
    Door(priors.CodebookPrior, priors.CodebookPrior, {"slab": POSITIVE, "concentration": POSITIVE, "rate": POSITIVE}),
    Door(
        priors.SpikeAndSlab,
        priors.SpikeAndSlab,
        {"spike_scale": POSITIVE, "slab_scale": POSITIVE, "inclusion": SHARE, "loc": FINITE},
    ),
    *(
        Door(likelihood, likelihood, {"temperature": POSITIVE})
        for likelihood in (
            likelihoods.Likelihood,
            likelihoods.Categorical,
            likelihoods.Bernoulli,
            likelihoods.Poisson,
            likelihoods.HeteroscedasticGaussian,
        )
    ),
    Door(
        likelihoods.Categorical,
        likelihoods.Categorical,
        {"class_dim": [*NEVER, math.inf, 0, 1.5], "ignore_index": [*NEVER, math.inf, 1.5]},
    ),
    Door(data.digits, data.digits, {"train_size": [*COUNT, 9, 1258]}),
    Door(
        data.next_token_labels,
        lambda **o: data.next_token_labels(torch.tensor([[1, 2]]), **o),
        {"ignore_index": [*NEVER, math.inf, 1.5]},
    ),
    Door(
        likelihoods.Gaussian,
        likelihoods.Gaussian,
        {"scale": POSITIVE, "noise_prior_scale": POSITIVE, "temperature": POSITIVE},
    ),
    # engines
    Door(inference.fit, fit, TRAINING | LOOP | {"epochs": COUNT}),
    Door(inference.Checkpoint, lambda **o: inference.Checkpoint("run.pt", **o), CHECKPOINT),
    Door(
        inference.Objective,
        lambda **o: inference.Objective(*(lambda m: (m, models.MeanFieldGuide(m)))(dense()), **o),
        {"kl_annealing": NOT_NEGATIVE, "num_data": COUNT},
    ),
    Door(inference.MixtureELBO, inference.MixtureELBO, {"num_particles": COUNT}),
    Door(inference.ScaleLatents, inference.ScaleLatents, {"scale": NOT_NEGATIVE}),
    Door(inference.cosine, inference.cosine, {"warmup": NOT_NEGATIVE}),
    Door(
        inference.multistep,
        lambda **o: inference.multistep(**({"warmup": 1, "milestones": [2], "ratio": 0.1} | o)),
        {"warmup": NOT_NEGATIVE, "ratio": POSITIVE},
    ),
    Door(
        inference.cyclical_annealing,
        lambda **o: inference.cyclical_annealing(**({"total_steps": 100} | o)),
        {"total_steps": COUNT, "cycles": COUNT, "power": POSITIVE},
    ),
    Door(inference.SVGD, svgd, {"repulsion": NOT_NEGATIVE, "num_data": COUNT, "lr": POSITIVE}),
    Door(
        inference.SVGD.fit,
        lambda **o: svgd().fit((X, Y), **({"epochs": 1, "progress": False} | o)),
        {"epochs": COUNT, "batch_size": COUNT, "seed": SEED} | LOOP,
    ),
    Door(inference.AutoParticles, lambda **o: inference.AutoParticles(line, **o), {"num_particles": COUNT}),
    Door(inference.RBF, inference.RBF, {"bandwidth": POSITIVE}),
    Door(inference.IMQ, inference.IMQ, {"bandwidth": POSITIVE, "exponent": POSITIVE}),
    Door(inference.ScaledMedian, inference.ScaledMedian, {"factor": POSITIVE}),
    Door(inference.SGHMC, sghmc, SAMPLER),
    Door(inference.SGHMC.gradient_noise, lambda **o: sghmc().gradient_noise(**o), {"num_batches": [*COUNT, 1]}),
    Door(
        inference.SGLD,
        lambda **o: inference.SGLD(dense(), (X, Y), **({"step_size": 0.1} | o)),
        STEPS | {"step_size": POSITIVE, "temperature": NOT_NEGATIVE},
    ),
    Door(
        inference.SGHMCEM,
        em,
        SAMPLER | PRUNING | {"rate": UP_TO_1, "soft_threshold": POSITIVE, "anneal": SHARE, "swap_every": COUNT_OR_0},
    ),
    Door(
        inference.KeFanSGHMC,
        lambda **o: inference.KeFanSGHMC(spike_slab(), (X, Y), **({"step_size": 0.1, "friction": 0.1} | o)),
        SAMPLER | PRUNING | {"soft_threshold": POSITIVE},
    ),
    Door(
        inference.sample,
        sample,
        {"num_samples": COUNT, "warmup_steps": COUNT_OR_0, "num_chains": COUNT, "seed": SEED},
    ),
    baseline_door(inference.DeepEnsemble, num_networks=COUNT),
    Door(inference.DeepEnsemble.fit, ensemble_fit, TRAINING | LOOP | {"epochs": COUNT}),
    baseline_door(inference.SWAG, rank=[*COUNT, 1]),
    Door(
        inference.SWAG.fit,
        swag_fit,
        {
            "epochs": [*COUNT, 1],
            "warmup_epochs": COUNT_OR_0,
            "lr": POSITIVE,
            "momentum": FROM_0,
            "num_samples": COUNT,
            "batch_size": COUNT,
            "seed": SEED,
        }
        | LOOP,
    ),
    baseline_door(inference.LastLayerLaplace),
    Door(
        inference.LastLayerLaplace.fit,
        lambda **o: inference.LastLayerLaplace(net(), CATEGORICAL, 12).fit((X, Y), **o),
        {"epochs": COUNT_OR_0, "batch_size": COUNT, "seed": SEED},
    ),
    baseline_door(inference.MCDropout, dropout_net),
    Door(
        inference.MCDropout.fit,
        lambda **o: inference.MCDropout(dropout_net(), CATEGORICAL, 12).fit((X, Y), **o),
        {"epochs": COUNT_OR_0, "batch_size": COUNT, "seed": SEED},
    ),
    Door(pruning.InclusionRule, pruning.InclusionRule, {"threshold": SHARE}),
    Door(
        pruning.MagnitudeRule,
        pruning.MagnitudeRule,
        {"sparsity": SHARE, "decay": SHARE, "start": [*FRACTION, 1], "regrow": FRACTION},
    ),
    Door(pruning.KeFanRule, pruning.KeFanRule, {"hard_threshold": POSITIVE}),
    # posteriors
    draws_of(pb.Posterior.predict, X),
    Door(
        pb.predict,
        lambda **options: pb.predict("no run", "new.csv", **options),
        {"level": SHARE, "num_samples": COUNT, "seed": SEED},
    ),
    draws_of(pb.Posterior.log_likelihood, X, Y),
    *(
        Door(method, lambda method=method, **o: method(posterior(), **({"n": 1} | o)), {"n": COUNT, "seed": SEED})
        for method in (pb.Posterior.draws, pb.Posterior.sample, pb.Posterior.networks, pb.Posterior.as_draws)
    ),
    Door(
        pb.Posterior.from_draws,
        lambda **o: pb.Posterior.from_draws(dense(), dense_draws(), **o),
        {"num_chains": COUNT},
    ),
    Door(
        pb.Posterior.inclusion_probabilities,
        lambda **o: spiky().inclusion_probabilities(**o),
        {"num_samples": COUNT, "seed": SEED},
    ),
    Door(
        pb.Posterior.sparsify,
        lambda **o: spiky().sparsify(**({"num_samples": 2} | o)),
        {"sparsity": FROM_0, "num_samples": COUNT, "seed": SEED},
    ),
    Door(
        pb.Posterior.importance,
        lambda **o: spiky().importance(X, Y, **({"num_samples": 2} | o)),
        {"least": FRACTION, "num_samples": COUNT, "batch_size": COUNT, "seed": SEED},
    ),
    Door(
        priors.SpikeAndSlab.from_weight_decay,
        lambda **o: priors.SpikeAndSlab.from_weight_decay(**({"num_data": 9, "spike": 1e-3, "slab": 1e-4} | o)),
        {"num_data": COUNT, "spike": POSITIVE, "slab": POSITIVE},
    ),
    Door(
        priors.SpikeAndSlab.for_inputs,
        lambda **o: priors.SpikeAndSlab.for_inputs(**({"num_inputs": 5, "num_data": 9} | o)),
        {"num_inputs": [*COUNT, 1], "num_data": COUNT, "expected": POSITIVE},
    ),
    Door(
        priors.SpikeAndSlab.threshold,
        lambda **o: priors.SpikeAndSlab().threshold(**({"group_size": 2} | o)),
        {"group_size": COUNT},
    ),
    Door(pb.Prediction.interval, lambda **o: regression().interval(**o), {"level": SHARE}),
    Door(pb.Prediction.quantile, lambda **o: regression().quantile(**o), {"q": SHARE}),
    Door(pb.Prediction.sample, lambda **o: regression().sample(**o), {"seed": SEED}),
    Door(pb.Prediction.to_dataframe, lambda **o: regression().to_dataframe(**o), {"level": SHARE}),
    Door(pb.summary, lambda **o: pb.summary(dense(), **o), {"batch_size": COUNT}),
    # diagnostics
    draws_of(diagnostics.evaluate, (X, Y)),
    draws_of(diagnostics.check, (X, Y)),
    draws_of(diagnostics.diversity, (X, Y)),
    draws_of(diagnostics.loo, X, Y),
    draws_of(diagnostics.pareto_k, X, Y),
    draws_of(diagnostics.contraction, X),
    draws_of(diagnostics.scale_temperature, (X, Y)),
    Door(
        diagnostics.to_arviz,
        lambda **o: diagnostics.to_arviz(posterior(), X, Y, **o),
        {"num_samples": COUNT, "batch_size": COUNT, "seed": SEED, "max_values": COUNT},
    ),
    Door(
        diagnostics.convergence,
        lambda **o: diagnostics.convergence([posterior(), posterior()], X, **o),
        {"num_samples": COUNT, "batch_size": COUNT, "seed": SEED, "max_values": COUNT},
    ),
    Door(
        diagnostics.compare_to_reference,
        lambda **o: diagnostics.compare_to_reference(posterior(), posterior(), (X, Y), **o),
        {"num_samples": COUNT, "reference_samples": COUNT, "batch_size": COUNT, "seed": SEED},
    ),
    *(
        Door(
            function,
            lambda f=function, **o: f(dense(), X, **o),
            {"num_samples": COUNT, "batch_size": COUNT, "seed": SEED},
        )
        for function in (diagnostics.check_prior, diagnostics.prior_predictive)
    ),
    Door(
        diagnostics.sbc,
        sbc,
        {
            "simulations": [*COUNT, 1],
            "draws": COUNT,
            "steps": COUNT,
            "lr": POSITIVE,
            "warmup": COUNT_OR_0,
            "thinning": COUNT,
            "seed": SEED,
        },
    ),
    *(
        Door(
            conformal,
            lambda c=conformal, **o: c(posterior(), (X, Y), **o),
            {"level": SHARE, "num_samples": COUNT, "batch_size": COUNT, "seed": SEED},
        )
        for conformal in (diagnostics.ConformalSets,)
    ),
    Door(
        diagnostics.ScaledPosterior,
        lambda **o: diagnostics.ScaledPosterior(posterior(), **o),
        {"temperature": POSITIVE},
    ),
    *(
        Door(error, lambda e=error, **o: e(PROBS, LABELS, **o), {"bins": COUNT})
        for error in (diagnostics.calibration_error, diagnostics.classwise_calibration_error, diagnostics.reliability)
    ),
    Door(
        diagnostics.risk_at_coverage,
        lambda **o: diagnostics.risk_at_coverage(PROBS[:, 0], PROBS[:, 1], **o),
        {"coverage": UP_TO_1},
    ),
]


def dense_draws() -> dict[str, Tensor]:
    return {site.name: torch.zeros((2, *site.shape)) for site in dense().sites()}


CASES = [
    pytest.param(door.call, name, bad, id=f"{door.public.__qualname__}-{name}")
    for door in DOORS
    for name, bad in door.numbers.items()
]


@pytest.mark.parametrize(("call", "name", "bad"), CASES)
def test_a_number_that_means_nothing_is_refused_by_name(call: Callable[..., Any], name: str, bad: list[object]) -> None:
    """Negative, zero, NaN, infinite, fractional and huge numbers, and what is none: each by ``name=``."""
    for value in bad:
        with pytest.raises((ValueError, TypeError)) as caught:
            call(**{name: value})
        assert f"{name}=" in str(caught.value), (value, str(caught.value))


def public_callables() -> Iterator[tuple[str, Callable[..., Any]]]:
    """All public functions, classes, and methods of public classes that are written here."""
    for module in (pb, priors, likelihoods, models, inference, diagnostics, pruning):
        for name in getattr(module, "__all__", dir(module)):
            thing = getattr(module, name)
            if inspect.isclass(thing) and thing.__module__.startswith("pyro_bnn"):
                yield name, thing
                for own, method in inspect.getmembers(thing, inspect.isroutine):
                    if not own.startswith("_") and (getattr(method, "__module__", "") or "").startswith("pyro_bnn"):
                        yield f"{name}.{own}", method
            elif inspect.isfunction(thing):
                yield name, thing


#: Numbers that a program computes, or that are checked by their meaning elsewhere.
LEFT_OUT = {
    *(
        "FitState",
        "Shift",
        "Summary",
        "SBCResult",
        "SpikeAndSlabDistribution",
        "SiteGroups",
    ),  # results, and a distribution
    *("report", "compare_loo"),  # hand their numbers on to what is tested here
    "ConformalIntervals",  # the same door as ConformalSets, but it takes a regression
}


def test_every_public_number_is_in_the_table() -> None:
    """A public function with a number among its arguments that nobody has put into the table above is found here."""
    tried = {(getattr(door.public, "__qualname__", ""), name) for door in DOORS for name in door.numbers}
    of = {getattr(door.public, "__qualname__", "") for door in DOORS}
    missing = []
    for name, thing in public_callables():
        if name in LEFT_OUT or getattr(thing, "__qualname__", "") not in of and "." in name:
            continue
        try:
            parameters = inspect.signature(thing).parameters.values()
        except ValueError:
            continue
        for parameter in parameters:
            kinds = set(str(parameter.annotation).replace("|", " ").split())
            if kinds & {"int", "float"} and (thing.__qualname__, parameter.name) not in tried:
                missing.append(f"{name}({parameter.name}=)")
    assert missing == []


@pytest.mark.parametrize("whole", [np.int64(2), np.int32(2), 2])
def test_numbers_of_numpy_are_numbers(whole: Any) -> None:
    """Counts, seeds and scales may be NumPy's, and are kept as plain numbers, which files can hold."""
    model = models.Dense(net(), CATEGORICAL, np.int64(12), prior=priors.Normal(np.float32(0.5), np.float64(2.0)))
    guide = models.MeanFieldGuide(model, whole, init_scale=np.float32(0.1))
    posterior = inference.fit(model, guide, (X, Y), epochs=whole, lr=np.float64(1e-3), seed=whole, progress=False)
    assert type(model.num_data) is int
    assert type(guide.num_members) is int
    assert torch.equal(posterior.predict(X, whole, seed=whole).outputs, posterior.predict(X, 2, seed=2).outputs)


def test_bad_values_are_found_before_anything_is_set_up() -> None:
    """A refused training has neither changed the model nor drawn a random number."""
    model = dense()
    guide = models.MeanFieldGuide(model)
    before, random = [p.clone() for p in guide.parameters()], torch.get_rng_state()
    for name, value in (("clip_norm", -1.0), ("kl_annealing", math.nan), ("epochs", 2.5), ("lr", -1), ("seed", -1)):
        with pytest.raises(ValueError, match=f"{name}="):
            inference.fit(model, guide, (X, Y), **({"epochs": 1, "progress": False} | {name: value}))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(a, b) for a, b in zip(before, guide.parameters(), strict=True))
