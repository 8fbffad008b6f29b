"""Dense Bayesian networks: every chosen parameter is a latent site of its own shape, with mean-field guides."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pyro_bnn import priors
from pyro_bnn.guide import MixtureGuide
from pyro_bnn.likelihoods import Likelihood
from pyro_bnn.model import BayesianNetwork, Form
from pyro_bnn.network import Output, Select, select_parameters
from pyro_bnn.priors import Normal, PriorLike
from pyro_bnn.registry import storable
from pyro_bnn.sites import Site


@storable
class Dense(BayesianNetwork):
    """Pyro model ``w ~ prior, y ~ likelihood(net_w(x))`` over the parameters themselves.

    Each chosen parameter is a site with its dotted name; the others are point estimates (normalisation layers, by
    default). Hierarchical priors have one ``<name>_tau`` for a parameter.

    :param net: any module; the model works on a copy.
    :param likelihood: what the output means; ``None`` for the function alone, inside a larger Pyro model.
    :param num_data: size N of the training set.
    :param prior: as for :class:`~pyro_bnn.models.Rank1`; ``loc=None`` means 0 here.
    :param select: which parameters are random; by default all except those of normalisation layers.
    :param chunk_size: how many members are vectorised at a time; ``None`` for all.
    :param prefix, members_dim, output: see :class:`~pyro_bnn.model.BayesianNetwork`.
    :raises ValueError: when ``select`` matches nothing, or a prior does not fit.
    """

    def __init__(
        self,
        net: nn.Module,
        likelihood: Likelihood | None,
        num_data: int | None = None,
        *,
        prior: PriorLike = Normal(0.0, 1.0),
        select: Select | None = None,
        chunk_size: int | None = None,
        prefix: str = "",
        members_dim: int = -2,
        output: Output = None,
    ) -> None:
        super().__init__(net, likelihood, num_data, prefix=prefix, members_dim=members_dim, output=output)
        core = self.core()
        parameters = core.parameters_by_name()
        if select is None:
            norms = core.normalisation_parameters()
            self.random = [n for n, p in parameters.items() if n not in norms and p.is_floating_point()]
        else:
            self.random = select_parameters(dict(parameters), core.net, select)
        if not self.random:
            raise ValueError("the network has no parameters to make random")
        self.prior, self.chunk_size = prior, chunk_size
        self.priors = {n: priors.resolve(prior, (n,), parameters[n].detach()) for n in self.random}
        for name in self.random:
            parameters[name].requires_grad_(False)  # kept as the starting value and for its shape
        self._sites = self.list_weight_sites(self.priors, {name: parameters[name].detach() for name in self.random})

    def arguments(self) -> dict[str, Any]:
        return super().arguments() | {"select": [re.escape(n) for n in self.random], "chunk_size": self.chunk_size}

    def sites(self) -> list[Site]:
        return self._sites

    def forms(self) -> dict[str, Form]:
        return super().forms() | dict.fromkeys(self.random, "dense")

    def weights_of(self, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: latents[self.site(name)] for name in self.random}

    def sample_latents(self) -> dict[str, Tensor]:
        parameters = self.core().parameters_by_name()
        return self.sample_weights(self.priors, {name: parameters[name].detach() for name in self.random})

    def function(self, x: Any, latents: dict[str, Tensor], size: int) -> Tensor:
        lead = self.lead_shape(latents)
        plates = lead + (1,) * (-self.members_dim - 1)
        parameters = self.core().parameters_by_name()
        weights = {}
        for name in self.random:
            shape = parameters[name].shape
            value = latents[self.site(name)]
            weights[name] = value.expand(plates + shape).reshape((-1,) + shape)
        return self.unfold(self.core().explicit(x, weights, self.chunk_size), lead)


@storable
class MeanFieldGuide(MixtureGuide):
    """Independent Normals for every element of every parameter (Blundell et al. 2015), or K of them as a mixture.

    :param model: a :class:`Dense`.
    :param components: number of mixture components; 1 is mean field.
    :param init_scale: starting standard deviation of every weight. Means start at the network's own values.
    """

    def __init__(self, model: Dense, components: int = 1, *, init_scale: float = 1e-2) -> None:
        super().__init__(model, components)
        self.start_scales(init_scale)

    def arguments(self) -> dict[str, Any]:
        return {"components": self.num_members}


@storable
class PointGuide(MixtureGuide):
    """One point for all parameters: the MAP estimate, which is the deterministic network with its weight penalty.

    :param model: a :class:`Dense`.
    """

    def __init__(self, model: Dense) -> None:
        super().__init__(model, family="point")
