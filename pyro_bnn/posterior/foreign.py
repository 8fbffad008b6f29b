"""Predictions and log-likelihoods of a Pyro model of the user's own, which names its sites itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_bnn.inputs import Inputs
from pyro_bnn.posterior.draw_source import DrawSource
from pyro_bnn.program.model import BayesianNetwork
from pyro_bnn.program.sites import Program
from pyro_bnn.randomness import device_of, seeded


class Densities(NamedTuple):
    """Of the model under one draw, in nats: ``log p(y_n | draw)``, ``[N]``, and ``log p(all data, draw)``."""

    of_data: Tensor
    joint: Tensor


def predict_site(source: DrawSource, x: Inputs, n: int, seed: int | None, site: str | None) -> Tensor:
    """``[n, 1, *shape]``: values of a site of the model, called with x, under n draws.

    :raises ValueError: when no site is named, the model has none of this name, it lacks a site that was drawn, or it
        observes the site without being given y.
    """
    if site is None:
        raise ValueError(
            "predict() of a model that is not of this package needs return_site=, the name of the site wanted; "
            "diagnostics of predictions are for models of this package, which say what their outputs mean"
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
        raise ValueError("a model that is not of this package needs return_site=, the name of the site wanted")
    values = []
    with seeded(device_of(model), seed), DrawSource(model, model).running():
        for _ in range(n):
            values.append(_value(poutine.trace(model).get_trace(x).nodes, site, {}))
    return torch.stack(values).unsqueeze(1)


def log_likelihood(
    source: DrawSource, x: Inputs, y: Tensor, n: int, seed: int | None, site: str | None = None
) -> Tensor:
    """``[n, 1, N]``: log density of the data at the site that observes y, in nats.

    :param site: the observed site; by default the one whose values are y.
    :raises ValueError: when not exactly one site observes y and none is named, the named one is not observed, or draws
        and sites of the model are not the same.
    """
    with source.running():
        rows = [densities(source.model, latents, x, y, site).of_data for latents in _draws(source, n, seed, x)]
    return torch.stack(rows).unsqueeze(1)


def densities(model: Program, latents: Mapping[str, Tensor], x: Inputs, y: Tensor, site: str | None) -> Densities:
    """See :func:`log_likelihood`, which has the errors; called where the model runs (:meth:`DrawSource.running`)."""
    trace = poutine.trace(poutine.condition(model, dict(latents))).get_trace(x, y)
    trace.compute_log_prob()
    _require_sites(trace.nodes, latents)
    if missing := [name for name, node in _sampled(trace.nodes) if name not in latents and not node["is_observed"]]:
        raise ValueError(
            f"the model samples {', '.join(map(repr, missing))} beside its data, of which there are no draws: give "
            "draws of all latent sites (and y to every site that observes data)"
        )
    node: Any = trace.nodes[observed_site(trace.nodes, latents, y, site)]
    of_data = node["fn"].log_prob(node["value"]).reshape(-1)
    joint = sum((node["log_prob"].double().sum() for _, node in _sampled(trace.nodes)), torch.zeros(()).double())
    return Densities(of_data, joint)


def observed_site(nodes: Mapping[str, Any], latents: Mapping[str, Tensor], y: Tensor, site: str | None) -> str:
    """The name of the site whose data are meant.

    :param latents: values on which the model is conditioned, which look like data to Pyro.

    :raises ValueError: when that cannot be told.
    """
    observed = {name: node for name, node in _sampled(nodes) if node["is_observed"] and name not in latents}
    known = f"the sites that observe data are {', '.join(map(repr, observed)) or 'none'}"
    if site is not None:
        if site not in observed:
            raise ValueError(f"observed_site={site!r} is no observed site of the model: {known}")
        if (plate := _subsampled(observed[site])) and not _same_values(observed[site]["value"], y):
            raise ValueError(
                f"the plate {plate!r} around {site!r} takes a random part of the data at every call, so that draws see "
                "different ones: call the model with all data"
            )
        return site
    found = [name for name, node in observed.items() if _same_values(node["value"], y)]
    if len(found) != 1:
        raise ValueError(
            f"expected one site that observes y, found {len(found)}: name the one that is meant with observed_site= "
            f"({known})"
        )
    return found[0]


def name_of_observed(model: Program, latents: Mapping[str, Tensor], x: Inputs, y: Tensor) -> str:
    """The site whose values are y."""
    return observed_site(poutine.trace(poutine.condition(model, dict(latents))).get_trace(x, y).nodes, latents, y, None)


def require_separate_data(model: Program, latents: Mapping[str, Tensor], x: Inputs, y: Tensor, site: str | None) -> str:
    """The observed site, where leaving a datum out is dividing by its density.

    :raises ValueError: where the data are one datum (``to_event``), part of a subsampled plate, masked, or scaled.
    """
    trace = poutine.trace(poutine.condition(model, dict(latents))).get_trace(x, y)
    name = observed_site(trace.nodes, latents, y, site)
    node: Any = trace.nodes[name]
    if plate := next((p for _, other in _sampled(trace.nodes) if (p := _subsampled(other))), None):
        raise ValueError(
            f"the plate {plate!r} is subsampled, and leave-one-out takes all data at once: give all rows, to a model "
            "whose plate has their number"
        )
    if node["mask"] is not None and not bool(torch.as_tensor(node["mask"]).all()):
        raise ValueError(f"{name!r} masks data, which then cannot be left out: give only the rows that are observed")
    if any(bool((torch.as_tensor(other["scale"]) != 1).any()) for _, other in _sampled(trace.nodes)):
        raise ValueError(
            "the model scales log densities (poutine.scale), so that its draws are of a tempered posterior, which "
            "leaving a datum out does not divide by its density: leave the scale out and fit again"
        )
    if node["fn"].log_prob(node["value"]).numel() < len(y):
        raise ValueError(
            f"{name!r} has {node['fn'].log_prob(node['value']).numel()} densities for {len(y)} rows of y: data that "
            "are dependent (to_event, one multivariate distribution) cannot be left out one by one. Give each row a "
            "density of its own, in a plate"
        )
    return name


def _draws(source: DrawSource, n: int, seed: int | None, example: Inputs) -> Iterator[dict[str, Tensor]]:
    for group in source.groups(n, seed, example=example):
        for i in range(len(next(iter(group.values())))):
            yield {name: value[i, 0] for name, value in group.items()}


def _sampled(nodes: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Sites of the joint density: no plates, and no values that follow from others."""
    for name, node in nodes.items():
        if node["type"] == "sample" and not site_is_subsample(node) and not node["infer"].get("_deterministic"):
            yield name, node


def _require_sites(nodes: Mapping[str, Any], latents: Mapping[str, Tensor]) -> None:
    if unknown := [name for name in latents if name not in nodes]:
        there = ", ".join(repr(name) for name, _ in _sampled(nodes))
        raise ValueError(
            f"the model has no site {unknown[0]!r}, of which there are draws: it has {there}. Give the model that the "
            "draws are of"
        )


def _value(nodes: Mapping[str, Any], site: str, latents: Mapping[str, Tensor]) -> Tensor:
    if site not in nodes:
        raise ValueError(f"the model has no site {site!r}")
    if site not in latents and any(name == site and node["is_observed"] for name, node in _sampled(nodes)):
        raise ValueError(
            f"the model observes {site!r} though it is not given y, so that its values would be the data themselves: "
            "write it as model(x, y=None) with obs=y"
        )
    value: Tensor = nodes[site]["value"]
    return value


def _subsampled(node: Mapping[str, Any]) -> str | None:
    frames = (frame for frame in node["cond_indep_stack"] if frame.full_size != frame.size)
    return next((frame.name for frame in frames), None)


def _same_values(value: Tensor, y: Tensor) -> bool:
    return value.numel() == y.numel() and torch.equal(value.reshape(y.shape), y)
