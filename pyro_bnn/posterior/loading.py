"""Loads posteriors that :meth:`Posterior.save` wrote."""

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
    """Loads a posterior that :meth:`Posterior.save` wrote; the same ``seed`` gives the same predictions, bit for bit.

    :param path: the folder.
    :param net: a network of the same architecture; it is copied, and its weights do not matter.
    :param model: for draws of your own Pyro model, that model, in place of ``net``; a module is copied.
    :param prior: the prior, if it was not saved; otherwise replaces the saved one.
    :param likelihood: replaces the saved likelihood, for example when its class is no longer available.
    :param device: the device of the posterior; by default that of ``net`` or ``model``.
    :raises TypeError: unless either ``net`` or ``model`` is given, or when ``prior`` or ``likelihood`` is given with
        ``model``.
    :raises FileNotFoundError: when there is nothing at ``path``.
    :raises ValueError: when the folder is not a posterior, is damaged, was written by a newer version, or is for
        another network.
    """
    if model is not None:
        if net is not None or prior is not None or likelihood is not None:
            raise TypeError(
                "net=, prior= and likelihood= are for networks: your own Pyro model contains them, so give model= alone"
            )
        draws = own_draws.read_draws(path, model, device=device)
        settle(draws.model)
        return Posterior(draws.model, draws.guide, losses=draws.losses, sampler=draws.sampler, store=draws.store)
    if net is None:
        raise TypeError("net=None: expected a network of the same architecture, or model= for your own Pyro model")
    stored = storage.read(path, net, prior=prior, likelihood=likelihood, device=device)
    settle(stored.model, stored.guide)
    return Posterior(stored.model, stored.guide, losses=stored.losses, sampler=stored.sampler)
