"""Dense Bayesian networks: every selected parameter is a latent site of the same shape, with mean-field guides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Unpack

from torch import Tensor, nn

from pyro_bnn import priors
from pyro_bnn.entry import checks
from pyro_bnn.given.fixed import not_frozen, require_random
from pyro_bnn.inputs import Inputs
from pyro_bnn.likelihoods import Likelihood
from pyro_bnn.perturb.probe import require_rows
from pyro_bnn.priors import Normal, PriorLike
from pyro_bnn.program.guide import MixtureGuide
from pyro_bnn.program.model import BayesianNetwork, Form, NetworkOptions
from pyro_bnn.program.sites import Site
from pyro_bnn.registry import storable
from pyro_bnn.selection import Select


class DenseOptions(NetworkOptions, total=False):
    """Keyword arguments of :class:`Dense` and of the models derived from it.

    ``chunk_size: int | None = None`` is the number of members that are vectorised at a time; ``None`` for all.
    """

    chunk_size: int | None


@storable
class Dense(BayesianNetwork):
    """Pyro model ``w ~ prior, y ~ likelihood(net_w(x))`` over the parameters themselves.

    Each selected parameter is a site with its dotted name; the others (by default those of normalisation layers) are
    point estimates. Hierarchical priors add one ``<name>_tau`` for each parameter.

    :param net: any module; the model works on a copy.
    :param likelihood: the distribution of y given the output; ``None`` for the function alone, inside a larger Pyro
        model.
    :param num_data: size N of the training set.
    :param prior: as for :class:`~pyro_bnn.models.Rank1`; ``loc=None`` means 0 here.
    :param select: the random parameters, see :func:`~pyro_bnn.selection.select_parameters`; by default all except those
        of normalisation layers and those with ``requires_grad=False``.
    :param chunk_size: number of members that are vectorised at a time; ``None`` for all.
    :param options: see :class:`~pyro_bnn.program.model.NetworkOptions`.
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
        **options: Unpack[NetworkOptions],
    ) -> None:
        chunk_size = checks.optional(checks.count, "chunk_size", chunk_size)
        super().__init__(net, likelihood, num_data, **options)
        parameters = self.core().parameters_by_name()
        self.random = freeze_random(self, select)
        self.prior, self.chunk_size = prior, chunk_size
        self.priors = {n: priors.resolve(prior, (n,), parameters[n].detach(), True) for n in self.random}
        self._sites = self.list_weight_sites(self.priors, {name: parameters[name].detach() for name in self.random})

    def arguments(self) -> dict[str, object]:
        return super().arguments() | {"select": self.random, "chunk_size": self.chunk_size}

    def sites(self) -> list[Site]:
        return self._sites

    def forms(self) -> dict[str, Form]:
        return super().forms() | dict.fromkeys(self.random, "dense")

    def weights_of(self, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: latents[self.site(name)] for name in self.random}

    def sample_latents(self) -> dict[str, Tensor]:
        parameters = self.core().parameters_by_name()
        return self.sample_weights(self.priors, {name: parameters[name].detach() for name in self.random})

    def function(self, x: Inputs, latents: dict[str, Tensor], size: int) -> Tensor:
        lead = self.lead_shape(latents)
        plates = lead + (1,) * (-self.members_dim - 1)
        parameters = self.core().parameters_by_name()
        weights = {}
        for name in self.random:
            shape = parameters[name].shape
            value = latents[self.site(name)]
            weights[name] = value.expand(plates + shape).reshape((-1,) + shape)
        f = self.core().explicit(x, weights, self.chunk_size)
        require_rows(f[0], size)
        return self.unfold(f, lead)


def freeze_random(model: BayesianNetwork, select: Select | None) -> list[str]:
    """Freezes the parameters that are random and returns their names; they provide starting values and shapes.

    :param select: which parameters; by default all except those of normalisation layers and those that the user froze.
    :raises ValueError: when there are none, or one cannot be random; see :mod:`pyro_bnn.given.fixed`.
    """
    core = model.core()
    parameters = core.parameters_by_name()
    if select is None:
        norms = core.normalisation_parameters()
        random = not_frozen({n: p for n, p in parameters.items() if n not in norms}, "parameters")
        require_random(core.net, random)
    else:
        random = model.selected_random(select, parameters)
    if not random:
        raise ValueError("the network has no parameters to make random")
    for name in random:
        parameters[name].requires_grad_(False)
    return random


@storable
class MeanFieldGuide(MixtureGuide):
    """An independent Normal for every element of every parameter (Blundell et al. 2015), or a mixture of K of these::

        q(w) = (1/K) sum_k prod_i N(w_i; mu_ki, softplus(rho_ki)^2)

    :param model: a :class:`Dense`, or another model whose sites are weights.
    :param components: number K of mixture components; 1 is mean field.
    :param init_scale: starting standard deviation of every weight. Means start at the values of the network.
    :raises ValueError: when ``components`` or ``init_scale`` is out of range.
    """

    def __init__(self, model: BayesianNetwork, components: int = 1, *, init_scale: float = 1e-2) -> None:
        checks.positive("init_scale", init_scale)
        super().__init__(model, components)
        self.start_scales(init_scale)

    def arguments(self) -> dict[str, object]:
        return {"components": self.num_members}


@storable
class PointGuide(MixtureGuide):
    """A single point for all parameters: the maximum a posteriori (MAP) estimate.

    Training with it is training the deterministic network with ``-log p(w)`` as the weight penalty.

    :param model: a :class:`Dense`.
    """

    def __init__(self, model: Dense) -> None:
        super().__init__(model, family="point")
