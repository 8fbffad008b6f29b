"""Predictions and log-likelihoods of a Pyro model of the user's own, which names its sites itself."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from pyro.infer import Predictive
from torch import Tensor

from pyro_bnn.inputs import Inputs
from pyro_bnn.posterior.draw_source import DrawSource
from pyro_bnn.randomness import device_of, seeded


def predict_site(source: DrawSource, x: Inputs, n: int, seed: int | None, site: str | None) -> Tensor:
    """``[n, 1, *shape]``: values of a site of the model, called with x, under n draws.

    :raises ValueError: when no site is named, or the model has none of this name.
    """
    if site is None:
        raise ValueError(
            "predict() of a model that is not of this package needs return_site=, the name of the site wanted; "
            "diagnostics of predictions are for models of this package, which say what their outputs mean"
        )
    draws = {
        name: torch.cat([group[name] for group in groups])[:, 0]
        for groups in [list(source.groups(n, seed, example=x))]
        for name in groups[0]
    }
    with seeded(device_of(source.model), seed), source.running():
        values = Predictive(source.model, posterior_samples=draws, return_sites=[site])(x)
    if site not in values:
        raise ValueError(f"the model has no site {site!r}")
    return values[site].unsqueeze(1)


def log_likelihood(source: DrawSource, x: Inputs, y: Tensor, n: int, seed: int | None) -> Tensor:
    """``[n, 1, N]``: log density of the one site that observes y, in nats.

    :raises ValueError: when not exactly one site observes y.
    """
    rows = []
    with source.running():
        for group in source.groups(n, seed, example=x):
            for i in range(len(next(iter(group.values())))):
                conditioned = poutine.condition(source.model, {name: value[i, 0] for name, value in group.items()})
                trace = poutine.trace(conditioned).get_trace(x, y)
                sites: list[Any] = list(trace.nodes.values())
                observed = [
                    site["fn"].log_prob(site["value"])
                    for site in sites
                    if site["type"] == "sample" and site["is_observed"] and _same_values(site["value"], y)
                ]
                if len(observed) != 1:
                    raise ValueError(f"expected one site that observes y, found {len(observed)}")
                rows.append(observed[0].reshape(-1))
    return torch.stack(rows).unsqueeze(1)


def _same_values(value: Tensor, y: Tensor) -> bool:
    return value.numel() == y.numel() and torch.equal(value.reshape(y.shape), y)
