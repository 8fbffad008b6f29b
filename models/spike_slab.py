"""Networks with spike-and-slab priors, whose indicators are summed out (Ke and Fan 2022)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Unpack

from torch import nn

from pyro_bnn.given.copying import unwrapped
from pyro_bnn.given.fixed import not_frozen
from pyro_bnn.likelihoods import Likelihood
from pyro_bnn.models.dense import Dense, DenseOptions
from pyro_bnn.priors import Normal, PriorLike, SpikeAndSlab
from pyro_bnn.registry import storable
from pyro_bnn.selection import Select


@storable
class SpikeSlab(Dense):
    """Pyro model ``w ~ spike-and-slab, y ~ likelihood(net_w(x))``, with sites as in :class:`Dense`.

    Each weight has its own site ``<name>_inclusion``, the share of its groups that are in the slab, unless the prior
    fixes this share. By default all parameters with ``requires_grad=True`` are random, including those of normalisation
    layers, because a sampler moves only latent sites.

    :param prior: a :class:`~pyro_bnn.priors.SpikeAndSlab` for parameters with at least two axes; a mapping
        ``{pattern: prior}`` applies to all parameters.
    :param bias_prior: prior of parameters with one axis (biases, and the scales and shifts of normalisation layers); by
        default Normal(0, 1).
    :param net, likelihood, num_data, select: as for :class:`Dense`.
    :param options: see :class:`~pyro_bnn.models.dense.DenseOptions`.
    :raises ValueError: as :class:`Dense`.
    """

    def __init__(
        self,
        net: nn.Module,
        likelihood: Likelihood | None,
        num_data: int | None = None,
        *,
        prior: PriorLike = SpikeAndSlab(),
        bias_prior: PriorLike | None = None,
        select: Select | None = None,
        **options: Unpack[DenseOptions],
    ) -> None:
        parameters = {n: p for n, p in unwrapped(net).named_parameters() if p.is_floating_point()}
        weights = "|".join(re.escape(n) for n, p in parameters.items() if p.dim() > 1)
        if isinstance(prior, Mapping) and bias_prior is not None or isinstance(bias_prior, Mapping):
            raise TypeError(
                f"bias_prior={bias_prior!r}: expected a single prior, next to a single prior for the weights; to give "
                "several, leave bias_prior out and pass one mapping for all parameters as prior="
            )
        if not isinstance(prior, Mapping):
            prior = {weights: prior, ".*": bias_prior or Normal(0.0, 1.0)}
        chosen = not_frozen(dict(unwrapped(net).named_parameters()), "parameters") if select is None else select
        super().__init__(net, likelihood, num_data, prior=prior, select=chosen, **options)
