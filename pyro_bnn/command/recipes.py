"""How `pyro-bnn fit` trains: from options to networks, models, posteriors and metrics."""

import copy
import io
import math
import time
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import nn

import pyro_bnn as pb
from pyro_bnn.command.options import Options
from pyro_bnn.command.shifts import shift_scores
from pyro_bnn.command.unfinished import Unfinished
from pyro_bnn.data import Task
from pyro_bnn.distributed import processes
from pyro_bnn.inference import Checkpoint
from pyro_bnn.models.architectures import pretrained
from pyro_bnn.models.architectures.named import build_network

Metrics = dict[str, Any]

#: codes get a smaller learning rate, as each sums the gradients of all its weights: docs/weight_sharing.md
CODE_SLOWER = 30.0


@dataclass(frozen=True)
class Trained:
    """A posterior, and what it cost: seconds of training and number of trained parameters."""

    posterior: pb.Posterior
    cost: Metrics


@dataclass(frozen=True)
class Fitted:
    """A Bayesian network, its deterministic twin, and the metrics of both as ``metrics.json`` holds them."""

    posterior: pb.Posterior
    twin: Trained
    metrics: Metrics


def train_and_score(
    net: nn.Module,
    task: Task,
    options: Options,
    console: Console,
    state: Unfinished,
    twin: Trained | None = None,
    field: pb.Posterior | None = None,
) -> Fitted:
    """Trains the deterministic twin, unless it is given, and then the Bayesian network; computes the metrics of both.

    :param state: where training keeps its state, so that it can go on after an interruption.
    :param twin: the deterministic network, from whose weights particles or codes start.
    :param field: a mean field from which codes start, instead of the twin.
    :raises ArithmeticError, ValueError: when training diverges, or an option does not fit the network.
    """
    twin = twin or train_by_svi(deterministic(net, task), task, options, console, state.checkpoint("deterministic"))
    place = state.checkpoint("posterior")
    compression: Metrics = {}
    match options.method:
        case "spike-slab":
            found = train_spike_slab(trained_network(twin.posterior), task, options, console, place)
        case "bella":
            start = net if isinstance(net, pretrained.Pretrained) else trained_network(twin.posterior)
            found = train_bella(start, task, options, console, place)
        case "weight-sharing":
            found, compression = train_weight_sharing(twin, field, task, options, console, place)
        case _:
            found = train_by_svi(bayesian(net, task, options), task, options, console, place)
    metrics = score(found.posterior, task, options) | found.cost
    metrics["deterministic"] = score(twin.posterior, task, options) | twin.cost
    if options.method == "spike-slab":
        metrics["sparsity"], metrics["deterministic"]["sparsity"] = sparsity_of(found.posterior), 0.0
    if options.method == "weight-sharing":
        metrics["compression"] = compression
        metrics["bits_per_coded_weight"] = 8 * compression["bytes"]["total"] / compression["weights"]
        metrics["deterministic"]["bits_per_coded_weight"] = 32.0
    return Fitted(found.posterior, twin, metrics)


def score(posterior: pb.Posterior, task: Task, options: Options) -> Metrics:
    """Metrics on the test data, and on these data corrupted; for a regression in the unit of the raw target."""
    ood = task.x_ood if task.kind == "classification" else None
    metrics: Metrics = pb.diagnostics.evaluate(
        posterior, (task.x_test, task.y_test), ood, num_samples=options.samples, seed=options.seed
    )
    if task.kind == "classification":
        metrics = {"ood_auroc": None} | metrics
    else:
        unit = task.encoding.y_scale
        metrics["nll"] += math.log(unit)
        for name, power in {"rmse": 1, "crps": 1, "width": 1, "aleatoric": 2, "epistemic": 2}.items():
            metrics[name] *= unit**power
    shift = shift_scores(posterior, task, options.samples, options.seed)
    return metrics if shift is None else metrics | shift.means() | {"shift": shift.to_json()}


def bayesian(net: nn.Module, task: Task, options: Options) -> tuple[nn.Module, nn.Module]:
    prior = _prior(options)
    size = len(task.x_train)
    if options.method == "dense":
        dense = pb.models.Dense(net, _likelihood(task), size, prior=prior)
        return dense, pb.models.MeanFieldGuide(dense, components=options.components)
    rank1 = pb.models.Rank1(net, _likelihood(task), size, prior=prior)
    # The rate for Normals was chosen by cross-validation on the training digits (docs/rank1.md), that for Cauchys is
    # the published one.
    rate = 1e-2 if options.family == "normal" else 1e-6
    guide = pb.models.Rank1Guide(rank1, components=options.components, family=options.family, init_dropout_rate=rate)
    return rank1, guide


def deterministic(net: nn.Module, task: Task) -> tuple[nn.Module, nn.Module]:
    model = pb.models.Dense(net, _likelihood(task), len(task.x_train))
    return model, pb.models.PointGuide(model)


def _likelihood(task: Task) -> pb.likelihoods.Likelihood:
    return pb.likelihoods.Categorical() if task.kind == "classification" else pb.likelihoods.Gaussian(scale=None)


def _prior(options: Options) -> pb.priors.Prior:
    # Factors of rank-1 networks vary by about 10 % around 1, as published; what a particle adds has the same order.
    scale = 0.1 if options.method in ("rank1", "bella") else 1.0
    match options.prior:
        case "hierarchical-cauchy":
            return pb.priors.HierarchicalCauchy(scale)
        case "hierarchical-normal":
            return pb.priors.HierarchicalNormal(2.0, 2.0 * scale**2)
        case "horseshoe":
            return pb.priors.Horseshoe(scale)
        case "normal":
            return pb.priors.Normal(scale=scale)
        case "cauchy":
            return pb.priors.Cauchy(scale=scale)
        case "laplace":
            return pb.priors.Laplace(scale=scale)
        case "student-t":
            return pb.priors.StudentT(scale=scale)
        case "spike-and-slab":
            return pb.priors.SpikeAndSlab(0.1 * scale, scale, group=options.group)
        case "gaussian-mixture":  # most weights near zero
            return pb.priors.GaussianMixture(locs=[0.0, 0.0], scales=[0.01, 0.2], weights=[0.9, 0.1])


def new_network(options: Options, task: Task, console: Console) -> nn.Module:
    """The network to train, on its device, initialised with the seed of the run.

    :raises ValueError, OSError: as :func:`build_network`.
    """
    torch.manual_seed(options.seed)
    with redirect_stdout(io.StringIO()) if console.quiet else nullcontext():  # torch.hub prints what it downloads
        net = build_network(options.network, tuple(task.x_train.shape[1:]), task.out_features, load=True)
    return net.to(options.device)


def find_device(name: str) -> torch.device:
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device()) if processes().are_several else torch.device("cuda")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} is not available on this machine: {error}") from error
    return device


def train_by_svi(
    model_and_guide: tuple[nn.Module, nn.Module], task: Task, options: Options, console: Console, place: Checkpoint
) -> Trained:
    model, guide = model_and_guide
    console.print(f"{type(model).__name__} with {type(guide).__name__}, {options.network}, {options.device}")
    start = time.perf_counter()
    schedule = pb.inference.cosine(warmup=1.0)
    posterior = _fit(model, guide, task, options, console, place, lr=options.lr, schedule=schedule)
    parameters = {id(p): p for module in (model, guide) for p in module.parameters() if p.requires_grad}
    size = sum(parameter.numel() for parameter in parameters.values())
    return Trained(posterior, {"seconds": time.perf_counter() - start, "trainable_parameters": size})


def _fit(
    model: nn.Module,
    guide: nn.Module,
    task: Task,
    options: Options,
    console: Console,
    place: Checkpoint,
    **settings: Any,
) -> pb.Posterior:
    return pb.inference.fit(
        model,
        guide,
        (task.x_train, task.y_train),
        epochs=options.epochs,
        batch_size=options.batch_size,
        seed=options.seed,
        progress=not console.quiet,
        checkpoint=place,
        **settings,
    )


def trained_network(posterior: pb.Posterior) -> nn.Module:
    """The deterministic twin as a plain network, with its trained weights and statistics."""
    net = copy.deepcopy(posterior.model.core().net)  # type: ignore[attr-defined]
    parameters = dict(net.named_parameters())
    with torch.no_grad():
        for name, value in posterior.draws(1).items():
            if name in parameters:
                parameters[name].copy_(value[0, 0])
    return net.requires_grad_()


def train_spike_slab(net: nn.Module, task: Task, options: Options, console: Console, place: Checkpoint) -> Trained:
    """Samples by SGHMC within EM, starting from the deterministic network."""
    size = len(task.x_train)
    model = pb.models.SpikeSlab(net, _likelihood(task), size, prior=_prior(options))
    kernel = pb.inference.SGHMCEM(
        model,
        (task.x_train, task.y_train),
        step_size=math.sqrt(options.lr),
        friction=0.1,
        temperature=options.temperature,
        batch_size=options.batch_size,
        thinning=math.ceil(size / options.batch_size),
        prune=pb.inference.pruning.MagnitudeRule(options.sparsity) if options.sparsity else None,
    )
    console.print(f"SpikeSlab with SGHMCEM, {options.network}, {options.device}, from the deterministic network")
    start = time.perf_counter()
    posterior = pb.inference.sample(
        kernel, options.samples, options.epochs, checkpoint=place, seed=options.seed, progress=not console.quiet
    )
    cost = {"seconds": time.perf_counter() - start, "trainable_parameters": kernel.potential.dim}
    return Trained(posterior, cost)


def train_bella(net: nn.Module, task: Task, options: Options, console: Console, place: Checkpoint) -> Trained:
    """Trains low-rank particles around a trained network; if its last layer is new, each particle has its own."""
    head = net.head if isinstance(net, pretrained.Pretrained) else None
    # With the default Normal prior, Bella chooses the scale of the factors from that of what they add to the weights.
    prior = None if options.prior == "normal" else _prior(options)
    model = pb.models.Bella(net, _likelihood(task), len(task.x_train), rank=options.rank, prior=prior, head=head)
    guide = pb.models.ParticleGuide(model, options.particles)
    console.print(f"Bella with {options.particles} particles by {options.update}, {options.network}, {options.device}")
    start = time.perf_counter()
    engine = pb.inference.SVGD(model, guide, method=options.update, lr=options.lr)
    posterior = engine.fit(
        (task.x_train, task.y_train),
        options.epochs,
        batch_size=options.batch_size,
        seed=options.seed,
        progress=not console.quiet,
        checkpoint=place,
    )
    size = sum(p.numel() for p in guide.parameters())
    return Trained(posterior, {"seconds": time.perf_counter() - start, "trainable_parameters": size})


def train_weight_sharing(
    twin: Trained, field: pb.Posterior | None, task: Task, options: Options, console: Console, place: Checkpoint
) -> tuple[Trained, Metrics]:
    """Finds codes for the weights of a mean field or of the deterministic network, then trains and merges them.

    :returns: the posterior, and its ``compression_report()``.
    """
    net = (
        trained_network(twin.posterior) if field is None else copy.deepcopy(field.model.core().net).requires_grad_()  # type: ignore[attr-defined]
    )
    likelihood, size = _likelihood(task), len(task.x_train)
    prior: pb.priors.PriorLike = _prior(options)
    if options.prior == "gaussian-mixture":  # the codebook is the prior of what it codes
        coded = pb.models.WeightSharing(net, likelihood, size).weights()
        prior = {name: pb.priors.CodebookPrior() for name in coded} | {".*": pb.priors.Normal()}
    model: pb.models.WeightSharing | pb.models.SharedWeights
    model = sharing = pb.models.WeightSharing(net, likelihood, size, prior=prior)
    start = time.perf_counter()
    given: dict[str, Any] = {"codes": options.codes, "seed": options.seed}
    if options.sampling == "mixture":
        given["sampling"] = "mixture"
    if field is None:
        guide = pb.models.CodebookGuide.from_network(sharing, **given)
    else:
        guide = pb.models.CodebookGuide.from_mean_field(sharing, field.guide, **given)  # type: ignore[arg-type]
    console.print(
        f"WeightSharing with {len(guide.book)} codes, sampling {options.sampling}, {options.network}, "
        f"{options.device}, from the {'deterministic network' if field is None else 'mean field'}"
    )
    merge = [pb.models.MergeCodes(stop=max(1, options.epochs // 2))]
    trained: pb.models.CodebookGuide | pb.models.MeanFieldGuide = guide
    if options.sampling == "shared":
        shared = pb.models.SharedWeights(net, likelihood, size, codebook=guide.book, prior=_prior(options))
        model, merge, trained = shared, [], shared.shared_guide(guide)
    rate = {"lr": options.lr / CODE_SLOWER, "schedule": pb.inference.cosine()}
    posterior = _fit(model, trained, task, options, console, place, **rate, callbacks=merge)
    report = guide.compression_report()
    points = sum(p.numel() for p in model.parameters() if p.requires_grad)
    parameters = report["trainable"] + report["other_trainable"] + points
    return Trained(posterior, {"seconds": time.perf_counter() - start, "trainable_parameters": parameters}), report


def sparsity_of(posterior: pb.Posterior) -> float:
    """Share of all parameters that are zero in every draw."""
    draws = posterior.draws(posterior.num_stored or 1)
    zeros = sum(int((value == 0).all(0).sum()) for value in draws.values())
    return zeros / sum(value[0].numel() for value in draws.values())
