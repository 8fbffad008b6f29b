"""Findings about inclusion: whether chains include the same groups, and whether those that are left out are needed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from pyro_bnn.diagnostics.checking.findings import Finding
from pyro_bnn.inputs import Data, Inputs
from pyro_bnn.network import batch_size as count_samples
from pyro_bnn.posterior import Posterior
from pyro_bnn.posterior.draw_source import DrawSource
from pyro_bnn.posterior.importance import APART, EXCESS, row_losses
from pyro_bnn.predicting import input_batches
from pyro_bnn.priors import SpikeAndSlab
from pyro_bnn.program.model import BayesianNetwork
from pyro_bnn.sparsity import has_inclusion

#: standard errors that leaving out an included input must cost
GAIN = 2.0
#: most groups that are left out one by one, each for a prediction of all rows
MOST = 200
TOPIC = "inclusion"


def inclusion_findings(
    posterior: Posterior, data: Data, x: Inputs, y: object, count: int, batch_size: int | None, seed: int
) -> Iterator[Finding]:
    """Findings about a network with a spike-and-slab prior; none for others.

    :param data: held-out data, or ``None``.
    :param x, y: training data, or ``None``.
    :param count: number of draws of each member.
    """
    model = posterior.model
    if not isinstance(model, BayesianNetwork) or not has_inclusion(model):
        return
    if any(site.role == "factor" for site in model.sites()):
        return  # the groups are of factors, which no weight can be left out by
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="chains differ")  # the finding says it
        by_chain = posterior.inclusion_by_chain()
    yield from _chains({name: of.apart for name, of in by_chain.items()}, posterior.num_chains)
    inclusion = {name: of.probability.mean(0) for name, of in by_chain.items()}
    priors = [prior for prior in model.priors.values() if isinstance(prior, SpikeAndSlab)]
    if x is not None and not any(prior.loc for prior in priors):
        pruned = posterior.sparsify(shrink=False, num_samples=count, seed=seed).posterior
        full_nll, pruned_nll = (
            -_log_mean(one.log_likelihood(x, y, count, batch_size, seed)) for one in (posterior, pruned)
        )
        yield _excess(full_nll, pruned_nll)
    if data is not None:
        included = {
            name: value >= 0.5
            for name, value in inclusion.items()
            if getattr(model.priors[name], "group", None) == "input"
        }
        if 0 < sum(int(chosen.sum()) for chosen in included.values()) <= MOST:
            source = DrawSource(model, posterior.draw_source.as_stored(count, seed))
            yield _gains(source, data, included, batch_size, seed)


def _log_mean(density: Tensor) -> float:
    """Mean over rows of the log of the mean density, of log densities ``[draws, members, N]``."""
    flat = density.flatten(0, 1).double()
    return float(flat.logsumexp(0).mean()) - math.log(len(flat))


def _chains(apart: dict[str, Tensor], chains: int) -> Iterator[Finding]:
    if chains < 2:
        return
    most = max(float(value.max()) for value in apart.values())
    text = f"The inclusion probabilities of {chains} chains differ by at most {most:.2f}."
    if most <= APART:
        yield Finding("good", TOPIC, text)
        return
    counts = {name: int((value > APART).sum()) for name, value in apart.items()}
    where = ", ".join(f"{count} of {name}" for name, count in counts.items() if count)
    yield Finding(
        "warning",
        TOPIC,
        f"{text} They should differ by at most {APART}; more differ the groups {where}.",
        "The chains have not found the same groups: use more warmup_steps and more chains "
        "(posterior.inclusion_by_chain() has each).",
    )


def _excess(full: float, pruned: float) -> Finding:
    text = (
        f"Without the groups that are probably in the spike the NLL of the training data is {pruned:.3f} nats per row, "
        f"with all {full:.3f}"
    )
    if pruned - full <= EXCESS:
        return Finding("good", TOPIC, f"{text}.")
    return Finding(
        "problem",
        TOPIC,
        f"{text}; it should grow by at most {EXCESS}. The spike holds effects that the network needs.",
        "Do not read inclusion as what matters. Use a narrower spike (SpikeAndSlab.for_inputs), more warmup_steps, and "
        "several chains.",
    )


def _gains(source: DrawSource, data: Data, included: dict[str, Tensor], batch_size: int | None, seed: int) -> Finding:
    """Whether each input that is included is worth something on held-out rows.

    An input of the network is shuffled among the rows of a batch; an input of a later layer, or of the only row of a
    batch, is put to 0.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in included}
    generator = torch.Generator().manual_seed(seed)
    for x, y in input_batches(data, batch_size):
        rows = count_samples(x)
        order = torch.randperm(rows, generator=generator) if rows > 1 else None
        for name, losses in row_losses(source, x, y, included, batch_size, order).items():
            parts[name].append(losses.cpu())
    idle, count, least = [], 0, math.inf
    for name, found in parts.items():
        losses = torch.cat(found, 1)
        error = losses.std(1) / math.sqrt(losses.shape[1])
        ratio = losses.mean(1) / error.clamp_min(1e-30)
        count += len(ratio)
        least = min(least, *ratio.tolist()) if len(ratio) else least
        where = included[name].flatten().nonzero().flatten()
        idle += [f"{name}[{int(i)}]" for i, value in zip(where, ratio, strict=True) if not value >= GAIN]
    if not idle:
        text = f"Each of {count} included inputs gains at least {least:.1f} standard errors on held-out rows."
        return Finding("good", TOPIC, text)
    return Finding(
        "warning",
        TOPIC,
        f"{len(idle)} of {count} included inputs gain less than {GAIN:.0f} standard errors on held-out rows: "
        f"{', '.join(idle[:10])}{', ...' if len(idle) > 10 else ''}.",
        "They may be included because a chain never left the slab: use more warmup_steps and several chains, and see "
        "posterior.importance(x, y).",
    )
