"""Predictions and log-likelihoods of a user's own Pyro model, which chooses its own site names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.infer import MCMC
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_bnn.inputs import Inputs
from pyro_bnn.posterior.draw_source import DrawSource
from pyro_bnn.program.model import BayesianNetwork
from pyro_bnn.program.sites import Program
from pyro_bnn.randomness import device_of, seeded


class Densities(NamedTuple):
    """Log densities of the model at one draw, in nats: ``log p(y_n | draw)`` ``[N]``, and ``log p(all data, draw)``."""

    of_data: Tensor
    joint: Tensor


def sampler_statistics(mcmc: MCMC) -> dict[str, float]:
    """Divergences and acceptance rate of a finished run, if its kernel counts them."""
    # Private, because mcmc.diagnostics() also computes statistics of all draws, and fails when there are few.
    every: list[Any] = mcmc._diagnostics
    chains, found = [chain for chain in every if chain], dict[str, float]()
    if chains and all("divergences" in chain for chain in chains):
        found["divergences"] = sum(len(chain["divergences"]) for chain in chains)
    if chains and all("acceptance rate" in chain for chain in chains):
        found["acceptance rate"] = sum(chain["acceptance rate"] for chain in chains) / len(chains)
    return found


def predict_site(source: DrawSource, x: Inputs, n: int, seed: int | None, site: str | None) -> Tensor:
    """``[n, 1, *shape]``: values of a site of the model, called with x, under n draws.

    :raises ValueError: when no site is named, the model has no site of this name, it lacks a site that was drawn, or
        it observes the site without being given y.
    """
    if site is None:
        raise ValueError(
            "predict() with your own Pyro model needs return_site=, the name of the site to return; diagnostics of "
            "predictions need a model of this package, whose likelihood defines what the outputs mean"
        )
    values = []
    with seeded(device_of(source.model), seed), source.running():
        for latents in _draws(source, n, seed, x):
            conditioned = poutine.condition(source.model, latents)
            nodes = poutine.trace(conditioned).get_trace(x).nodes
            if not isinstance(source.model, BayesianNetwork):
                _require_sites(nodes, latents)
            values.append(_value(nodes, site, latents))
    return torch.stack(values).unsqueeze(1)


def predict_from_prior(model: Program, x: Inputs, n: int, seed: int | None, site: str | None) -> Tensor:
    """``[n, 1, *shape]``: values of a site of the model, called with x, whose latent sites are drawn from the prior.

    :raises ValueError: as :func:`predict_site`.
    """
    if site is None:
        raise ValueError("your own Pyro model needs return_site=, the name of the site to return")
    values = []
    with seeded(device_of(model), seed), DrawSource(model, model).running():
        for _ in range(n):
            values.append(_value(poutine.trace(model).get_trace(x).nodes, site, {}))
    return torch.stack(values).unsqueeze(1)


def log_likelihood(
    source: DrawSource, x: Inputs, y: Tensor, n: int, seed: int | None, site: str | None = None
) -> Tensor:
    """``[n, 1, N]``: log density of the data at the site that observes y, in nats.

    :param site: the observed site; by default the one whose values equal y.
    :raises ValueError: when no site is named and not exactly one site observes y, when the named site is not observed,
        or when the draws do not have the latent sites of the model.
    """
    with source.running():
        rows = [densities(source.model, latents, x, y, site).of_data for latents in _draws(source, n, seed, x)]
    return torch.stack(rows).unsqueeze(1)


def densities(model: Program, latents: Mapping[str, Tensor], x: Inputs, y: Tensor, site: str | None) -> Densities:
    """See :func:`log_likelihood`, also for the errors; to be called inside :meth:`DrawSource.running`."""
    trace = poutine.trace(poutine.condition(model, dict(latents))).get_trace(x, y)
    trace.compute_log_prob()
    _require_sites(trace.nodes, latents)
    if missing := [name for name, node in _sampled(trace.nodes) if name not in latents and not node["is_observed"]]:
        raise ValueError(
            f"the model samples {', '.join(map(repr, missing))}, of which there are no draws: give draws of all latent "
            "sites, and y to every site that observes data"
        )
    node: Any = trace.nodes[observed_site(trace.nodes, latents, y, site)]
    of_data = node["fn"].log_prob(node["value"]).reshape(-1)
    joint = sum((node["log_prob"].double().sum() for _, node in _sampled(trace.nodes)), torch.zeros(()).double())
    return Densities(of_data, joint)


def observed_site(nodes: Mapping[str, Any], latents: Mapping[str, Tensor], y: Tensor, site: str | None) -> str:
    """The name of the observed site that y belongs to.

    :param latents: values on which the model is conditioned, which Pyro also treats as observed.
    :raises ValueError: when the site cannot be determined.
    """
    observed = {name: node for name, node in _sampled(nodes) if node["is_observed"] and name not in latents}
    known = f"the sites that observe data are {', '.join(map(repr, observed)) or 'none'}"
    if site is not None:
        if site not in observed:
            raise ValueError(f"observed_site={site!r} is not an observed site of the model: {known}")
        if (plate := _subsampled(observed[site])) and not _same_values(observed[site]["value"], y):
            raise ValueError(
                f"the plate {plate!r} around {site!r} takes a random subset of the data at every call, so each draw "
                "would be scored on different data: call the model with all data"
            )
        return site
    found = [name for name, node in observed.items() if _same_values(node["value"], y)]
    if len(found) != 1:
        raise ValueError(
            f"expected one site that observes y, found {len(found)}: choose one with observed_site= ({known})"
        )
    return found[0]


def name_of_observed(model: Program, latents: Mapping[str, Tensor], x: Inputs, y: Tensor) -> str:
    """The name of the site whose values equal y."""
    return observed_site(poutine.trace(poutine.condition(model, dict(latents))).get_trace(x, y).nodes, latents, y, None)


def require_separate_data(model: Program, latents: Mapping[str, Tensor], x: Inputs, y: Tensor, site: str | None) -> str:
    """The observed site, once it is certain that dividing by the density of a datum leaves that datum out.

    :raises ValueError: when the data are one joint datum (``to_event``), in a subsampled plate, masked, or scaled.
    """
    trace = poutine.trace(poutine.condition(model, dict(latents))).get_trace(x, y)
    name = observed_site(trace.nodes, latents, y, site)
    node: Any = trace.nodes[name]
    if plate := next((p for _, other in _sampled(trace.nodes) if (p := _subsampled(other))), None):
        raise ValueError(
            f"the plate {plate!r} is subsampled, but leave-one-out needs all data at once: give all rows, to a model "
            "whose plate has as many"
        )
    if node["mask"] is not None and not bool(torch.as_tensor(node["mask"]).all()):
        raise ValueError(
            f"{name!r} masks data, and masked data cannot be left out: give only the rows that are observed"
        )
    if any(bool((torch.as_tensor(other["scale"]) != 1).any()) for _, other in _sampled(trace.nodes)):
        raise ValueError(
            "the model scales log densities (poutine.scale), so its draws are from a tempered posterior, to which "
            "leave-one-out does not apply: remove the scale and fit again"
        )
    if node["fn"].log_prob(node["value"]).numel() < len(y):
        raise ValueError(
            f"{name!r} has {node['fn'].log_prob(node['value']).numel()} densities for {len(y)} rows of y: dependent "
            "data (to_event, one multivariate distribution) cannot be left out one by one. Give each row its own "
            "density, in a plate"
        )
    return name


def _draws(source: DrawSource, n: int, seed: int | None, example: Inputs) -> Iterator[dict[str, Tensor]]:
    for group in source.groups(n, seed, example=example):
        for i in range(len(next(iter(group.values())))):
            yield {name: value[i, 0] for name, value in group.items()}


def _sampled(nodes: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The sites of the joint density, without plates and deterministic sites."""
    for name, node in nodes.items():
        if node["type"] == "sample" and not site_is_subsample(node) and not node["infer"].get("_deterministic"):
            yield name, node


def _require_sites(nodes: Mapping[str, Any], latents: Mapping[str, Tensor]) -> None:
    if unknown := [name for name in latents if name not in nodes]:
        there = ", ".join(repr(name) for name, _ in _sampled(nodes))
        raise ValueError(
            f"there are draws of {unknown[0]!r}, but the model has no such site: it has {there}. Give the model that "
            "was fitted"
        )


def _value(nodes: Mapping[str, Any], site: str, latents: Mapping[str, Tensor]) -> Tensor:
    if site not in nodes:
        raise ValueError(f"the model has no site {site!r}")
    if site not in latents and any(name == site and node["is_observed"] for name, node in _sampled(nodes)):
        raise ValueError(
            f"the model observes {site!r} even without y, so its values would be the data themselves: write it as "
            "model(x, y=None) with obs=y"
        )
    value: Tensor = nodes[site]["value"]
    return value


def _subsampled(node: Mapping[str, Any]) -> str | None:
    frames = (frame for frame in node["cond_indep_stack"] if frame.full_size != frame.size)
    return next((frame.name for frame in frames), None)


def _same_values(value: Tensor, y: Tensor) -> bool:
    return value.numel() == y.numel() and torch.equal(value.reshape(y.shape), y)
