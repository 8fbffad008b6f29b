"""Dense Bayesian networks: every chosen parameter is a latent site of its own shape, with mean-field guides."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_bnn import priors
from pyro_bnn.guide import MixtureGuide
from pyro_bnn.likelihoods import Likelihood
from pyro_bnn.model import (
    BayesianNetwork,
    Site,
    sample_local,
    sample_noise,
    sample_scales,
    sample_share,
    storable,
)
from pyro_bnn.network import Output, Select, select_parameters
from pyro_bnn.priors import Normal, Prior, PriorLike


def list_sites(model: BayesianNetwork, priors: dict[str, Prior], centers: dict[str, Tensor]) -> list[Site]:
    """The sites of weights and of what their priors need, in the order in which :func:`sample_weights` samples them."""
    scales, weights = [], []
    for name, value in centers.items():
        prior = priors[name]
        if prior.has_tau:
            scales.append(Site(model.site(f"{name}_tau"), torch.Size(), "scale", prior.typical_tau()))
        if prior.has_inclusion:
            scales.append(Site(model.site(f"{name}_inclusion"), torch.Size(), "share", prior.typical_share()))
        if prior.has_lambda:
            scales.append(Site(model.site(f"{name}_lambda"), value.shape, "scale", 1.0))
        weights.append(Site(model.site(name), value.shape, "weight", value))
    if model.likelihood is not None and model.likelihood.learns_noise:
        scales.append(Site(model.site("noise"), torch.Size(), "scale", 1.0))
    return scales + weights


def sample_weights(
    model: BayesianNetwork,
    priors: dict[str, Prior],
    likes: dict[str, Tensor],
    centers: Mapping[str, Tensor] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """Samples the weights given their scales, all inside the members plate; ``{site: value}``.

    :param likes: ``{name: tensor with the shape of the weight}``.
    :param centers: what ``loc=None`` means for some of them, where it is not 0.
    """
    values: dict[str, Tensor] = {}
    given: dict[str, tuple[Prior, Tensor | None, Tensor | None]] = {}
    for name, like in likes.items():
        site = model.site(name)
        tau = sample_scales(priors[name], like, site)
        prior, share = sample_share(priors[name], like, site)
        local = sample_local(prior, like, site)
        given[name] = prior, tau, local
        for suffix, value in (("tau", tau), ("inclusion", share), ("lambda", local)):
            if value is not None:
                values[f"{site}_{suffix}"] = value
    values |= sample_noise(model)
    for name, like in likes.items():
        prior, tau, local = given[name]
        site = model.site(name)
        values[site] = pyro.sample(site, model.prior_of(site, prior, centers.get(name, 0.0), like, tau, local))
    return values


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
        self._sites = list_sites(self, self.priors, {name: parameters[name].detach() for name in self.random})

    def arguments(self) -> dict[str, Any]:
        return super().arguments() | {"select": [re.escape(n) for n in self.random], "chunk_size": self.chunk_size}

    def sites(self) -> list[Site]:
        return self._sites

    def sample_latents(self) -> dict[str, Tensor]:
        parameters = self.core().parameters_by_name()
        return sample_weights(self, self.priors, {name: parameters[name].detach() for name in self.random})

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
