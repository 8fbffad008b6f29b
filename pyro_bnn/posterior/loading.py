"""Reads what :meth:`Posterior.save` wrote."""

from __future__ import annotations

import os

import torch
from torch import nn

from pyro_bnn.entry.threads import one_at_a_time
from pyro_bnn.likelihoods import Likelihood
from pyro_bnn.modes import settle
from pyro_bnn.posterior import own_draws, storage
from pyro_bnn.posterior.posterior import Posterior
from pyro_bnn.priors import PriorLike
from pyro_bnn.program.sites import Program


@one_at_a_time
def load(
    path: str | os.PathLike[str],
    net: nn.Module | None = None,
    *,
    model: Program | None = None,
    prior: PriorLike | None = None,
    likelihood: Likelihood | None = None,
    device: torch.device | str | None = None,
) -> Posterior:
    """The posterior that :meth:`Posterior.save` wrote; the same ``seed`` gives the same predictions, bit for bit.

    :param net: a network of the same architecture; it is copied, its own weights do not matter.
    :param model: for draws of a Pyro model of your own, that model, in the place of ``net``; a module is copied.
    :param prior: the prior, when it was not saved, or in place of the saved one.
    :param likelihood: in place of the saved one, where the class of an own likelihood is not to be had.
    :param device: where to put it; by default where ``net`` is.
    :raises TypeError: unless one of ``net`` and ``model`` is given, and for what does not go with ``model``.
    :raises FileNotFoundError: when there is nothing at ``path``.
    :raises ValueError: when it is no posterior, is damaged, was written by a newer version, or is for another network.
    """
    if model is not None:
        if net is not None or prior is not None or likelihood is not None:
            raise TypeError(
                "net=, prior= and likelihood= are for networks: a model of your own has them, give it alone"
            )
        draws = own_draws.read_draws(path, model, device=device)
        settle(draws.model)
        return Posterior(draws.model, draws.guide, losses=draws.losses, sampler=draws.sampler, store=draws.store)
    if net is None:
        raise TypeError("give a network of the same architecture, or model= for draws of a Pyro model of your own")
    stored = storage.read(path, net, prior=prior, likelihood=likelihood, device=device)
    settle(stored.model, stored.guide)
    return Posterior(stored.model, stored.guide, losses=stored.losses, sampler=stored.sampler)
