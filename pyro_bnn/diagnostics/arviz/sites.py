"""Summaries of the latent sites of a posterior, by layer: networks have too many weights to store them all."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_bnn.diagnostics.arviz.arrays import Budget, Variables, at_least_float32, safe, sampled
from pyro_bnn.inputs import Inputs

if TYPE_CHECKING:
    from pyro_bnn.posterior import Posterior


def posterior_group(
    posterior: Posterior,
    sites: str | Sequence[str] | None,
    num_samples: int,
    seed: int,
    example: Inputs,
    chains: int,
    budget: Budget,
) -> Variables:
    """The group ``posterior``. Memory is bounded: draws are summarised in groups, and only ``sites`` are kept whole."""
    whole: set[str] | None = None
    prefix = getattr(posterior.model, "prefix", "")
    parts: dict[str, list[Tensor]] = {}
    short: dict[str, dict[str, list[Tensor]]] = {}
    for draws in posterior.draw_source.groups(num_samples, seed=seed, example=example):
        if whole is None:
            whole = _chosen_sites(sites, draws)
            for site in whole:
                budget.take(f"posterior/{safe(site)}", draws[site][0].numel() * num_samples)
        for site, values in draws.items():
            if site in whole:
                parts.setdefault(site, []).append(values.cpu())
                continue
            layer, quantity = _place(site.removeprefix(f"{prefix}."))
            for suffix, summary in _summaries(site, values):
                name = quantity + suffix
                if summary.dim() > 2:  # a hyper-parameter with several elements keeps its shape
                    parts.setdefault(site, []).append(summary.cpu())
                else:
                    short.setdefault(name, {}).setdefault(layer, []).append(summary.cpu())
    group: Variables = {}
    for site, pieces in parts.items():
        values, name = torch.cat(pieces), safe(site)
        if site not in (whole or ()):
            budget.take(f"posterior/{name}", values.numel())
        group[name] = sampled(values, chains, *(f"{name}_dim_{axis}" for axis in range(values.dim() - 2)))
    return group | _layered(short, chains, budget)


def _summaries(site: str, values: Tensor) -> list[tuple[str, Tensor]]:
    """What is stored of a site by default, as pairs ``(suffix, [n, members, ...])``."""
    if values[0, 0].numel() == 1:
        return [("", values.reshape(values.shape[:2]))]
    if site.endswith(("_tau", "_inclusion", "noise")):
        return [("", values)]
    if values[0, 0].numel() == 0:
        return []
    sd, mean = torch.std_mean(at_least_float32(values.flatten(2)), -1, correction=0)
    return [("_mean", mean), ("_sd", sd)]


def _place(site: str) -> tuple[str, str]:
    """Layer and quantity of a site: ``("layer1.0.conv1", "weight.s")`` of ``layer1.0.conv1.weight.s``."""
    match = re.fullmatch(r"(?:(.*?)\.)?([^.]+(?:\.[srAB](?:_\w+)?)?)", site)
    return (match[1] or "", match[2]) if match else ("", site)


def _layered(short: dict[str, dict[str, list[Tensor]]], chains: int, budget: Budget) -> Variables:
    """One variable for each quantity, with a dimension for the layers that have it."""
    group: Variables = {}
    first: list[str] | None = None
    for quantity, layers in short.items():
        name, names = safe(quantity), list(layers)
        values = torch.stack([torch.cat(pieces) for pieces in layers.values()], -1)
        budget.take(f"posterior/{name}", values.numel())
        if names == [""]:
            group[name] = sampled(values.squeeze(-1), chains)
            continue
        first = first or names
        axis = "layer" if names == first else f"{name}_layer"
        group[name] = sampled(values, chains, axis).assign_coords({axis: names})
    return group


def _chosen_sites(sites: str | Sequence[str] | None, available: Collection[str]) -> set[str]:
    chosen: set[str] = set()
    for site in (sites,) if isinstance(sites, str) else sites or ():
        # A name is also a pattern in which dots match any character, so an exact match takes precedence.
        matches = {site} if site in available else {name for name in available if _matches(site, name)}
        if not matches:
            raise ValueError(
                f"sites: {site!r} is neither the name of a latent site nor a regular expression that matches one; "
                f"the sites are {', '.join(available) or 'none'}"
            )
        chosen |= matches
    return chosen


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:
        return False
