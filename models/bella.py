"""Bella: a frozen network with many low-rank perturbations of its weights (Doan et al., AAAI 2025, arXiv 2407.20891).

Particle i has the weights ``W_i = W_0 + scale B_i A_i`` (Hu et al. 2022); all particles share the frozen W_0. The
particles are n points, trained separately as an ensemble or jointly by :class:`~pyro_bnn.inference.SVGD`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, Unpack, get_args

import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_bnn import display, priors
from pyro_bnn.entry import checks
from pyro_bnn.entry.threads import one_at_a_time
from pyro_bnn.given.copying import unwrapped
from pyro_bnn.given.fixed import has_spectral_norm, not_frozen, require_own_weights, require_random
from pyro_bnn.inputs import Inputs
from pyro_bnn.likelihoods import Likelihood
from pyro_bnn.network import NORMALISATIONS
from pyro_bnn.perturb import LowRankFactors, Perturbation, Replacement, Shift
from pyro_bnn.priors import Normal, Prior, PriorLike
from pyro_bnn.program.guide import MixtureGuide
from pyro_bnn.program.model import BayesianNetwork, Form, NetworkOptions
from pyro_bnn.program.sites import Site
from pyro_bnn.registry import storable
from pyro_bnn.selection import Select

Init = Literal["kaiming", "gaussian", "orthogonal", "prior"]

#: default standard deviation of every element of ``scale B A``
_PRODUCT_SCALE = 0.1
#: from values of sites to the coordinates of points
_COORDINATES = {"scale_loc": torch.log, "share_loc": torch.logit}


@storable
class Bella(BayesianNetwork):
    """Pyro model ``A, B ~ prior, y ~ likelihood(net_W(x))`` with ``W = W_0 + scale B A`` for the chosen weights.

    A weight ``w`` has the sites ``w.A`` ``[rank, *w.shape[1:]]`` and ``w.B`` ``[w.shape[0], rank]``. For a convolution,
    A is a convolution with ``rank`` output channels and B is a 1 x 1 convolution. W_0 shares the storage of the given
    network: it is never copied, takes no gradient and never changes. Normalisation layers keep their statistics, also
    in training; with ``affine`` their gains and biases are sites under their own names, and so are the weight and bias
    of a ``head``.

    :param net: a trained network; its parameters are shared.
    :param likelihood: the distribution of y given the output; ``None`` for the function alone, inside a larger Pyro
        model.
    :param num_data: size N of the training set.
    :param rank: r.
    :param alpha: ``scale = alpha / rank``; by default ``4 * rank``, which gives the scale of the authors (16 / 4) at
        every rank.
    :param rank_stabilised: ``scale = alpha / sqrt(rank)`` (Kalajdzievski 2023), with alpha 8 by default.
    :param product_scale: standard deviation of every element of ``scale B A`` under the prior, 0.1 by default. Elements
        of A and B have a Normal prior with mean 0 and variance ``product_scale / (scale sqrt(rank))``, which gives the
        product this standard deviation at every rank and scale.
    :param prior: prior of the elements of A and B, in place of ``product_scale``; patterns match ``<weight>.A``,
        ``<weight>.B``, the weight or a module.
    :param select: the weights with factors, see :func:`~pyro_bnn.selection.select_parameters`; by default all linear,
        convolutional, attention and recurrent weights except those of depthwise convolutions and those with
        ``requires_grad=False``.
    :param head: linear layers of which each particle has its own weight and bias, such as a new output layer; selected
        in the same way, with the prior ``head_prior``.
    :param affine: ``True`` gives each particle its own gains and biases of all normalisation layers, a selection those
        of some layers. They start at the given values.
    :param affine_prior: prior of these gains and biases; ``loc=None`` centres it at the given values.
    :param options: see :class:`~pyro_bnn.program.model.NetworkOptions`.
    :raises ValueError: when ``select``, ``head`` or ``affine`` matches nothing, a number is out of range, or
        ``product_scale`` and ``prior`` are both given.
    """

    @one_at_a_time
    def __init__(
        self,
        net: nn.Module,
        likelihood: Likelihood | None,
        num_data: int | None = None,
        *,
        rank: int = 4,
        alpha: float | None = None,
        rank_stabilised: bool = False,
        product_scale: float | None = None,
        prior: PriorLike | None = None,
        select: Select | None = None,
        head: Select | None = None,
        head_prior: Prior = Normal(0.0, 1.0),
        affine: bool | Select = False,
        affine_prior: Prior = Normal(scale=0.1),
        **options: Unpack[NetworkOptions],
    ) -> None:
        rank = checks.count("rank", rank)
        alpha = checks.optional(checks.positive, "alpha", alpha)
        checks.truth("rank_stabilised", rank_stabilised)
        for option, given in {"head_prior": head_prior, "affine_prior": affine_prior}.items():
            if not isinstance(given, Prior):
                raise TypeError(f"{option}={given!r}: expected an object of pyro_bnn.priors, such as Normal(0.0, 1.0)")
        super().__init__(net, likelihood, num_data, **options, share=True)
        self.rank, self.rank_stabilised, self.head_prior = rank, rank_stabilised, head_prior
        self.alpha = float((8 if rank_stabilised else 4 * rank) if alpha is None else alpha)
        self.scale = self.alpha / (math.sqrt(rank) if rank_stabilised else rank)
        self.prior = self._prior_of_factors(product_scale, prior)
        self.head_parameters = [] if head is None else self._find_head(head)
        self.affine_prior, self.affine_parameters = affine_prior, self._find_affine(affine)
        self._chosen = self._find_weights(select, dict(unwrapped(net).named_parameters()))
        self.weights = [name for name in self._chosen if name not in self.head_parameters]
        parameters = self.core().parameters_by_name()
        self.priors: dict[str, Prior] = {}
        self._likes: dict[str, Tensor] = {}
        for weight in self.weights:
            w = parameters[weight].detach()
            for factor, shape in zip("AB", ((rank, *w.shape[1:]), (w.shape[0], rank)), strict=True):
                name = f"{weight}.{factor}"
                like = self._likes[name] = w.new_empty(()).expand(shape)
                self.priors[name] = priors.resolve(self.prior, (name, weight), like)
        for name in self.own_parameters():
            self._likes[name] = parameters[name]
            is_head = name in self.head_parameters
            own = head_prior if is_head else affine_prior
            self.priors[name] = priors.resolve(own, (name,), parameters[name].detach(), not is_head)
        self._sites = self.list_weight_sites(self.priors, self._likes | self._centers())
        self.train(self.training)

    def _prior_of_factors(self, product_scale: float | None, prior: PriorLike | None) -> PriorLike:
        if prior is not None:
            if product_scale is not None:
                raise ValueError(
                    f"product_scale={product_scale!r} and prior={prior!r}: both set the prior of A and B, the first "
                    "through their product; give only one of them"
                )
            return prior
        sigma = _PRODUCT_SCALE if product_scale is None else product_scale
        checks.positive("product_scale", sigma)
        return Normal(0.0, math.sqrt(sigma / (self.scale * math.sqrt(self.rank))))

    def _find_weights(self, select: Select | None, given: dict[str, nn.Parameter]) -> list[str]:
        """
        :param given: the parameters of the original network: those of the copy take no gradients.
        """
        core = self.core()
        parameters = core.parameters_by_name()
        owners = {name: core.owner(name) for name in core.product_weights()}
        if select is not None:
            known = {n: parameters[n] for n, owner in owners.items() if not isinstance(owner, nn.Bilinear)}
            return self.selected_random(select, known, what="weights")
        require_own_weights(core.net)
        without = (nn.Embedding, nn.Bilinear)
        usual = [n for n, owner in owners.items() if not isinstance(owner, without) and not _is_depthwise(owner)]
        if not usual:
            raise ValueError("the network has no weights that can have low-rank factors: choose some with select=")
        found = not_frozen({name: given[name] for name in usual}, "weights")
        require_random(core.net, found)
        return found

    def _find_head(self, head: Select) -> list[str]:
        core = self.core()
        linear = {n: p for n, p in core.parameters_by_name().items() if isinstance(core.owner(n), nn.Linear)}
        found = self.selected(head, linear, option="head", what="weights and biases of linear layers")
        known = [id(p) for _, p in core.net.named_parameters(remove_duplicate=False)]
        tied = next((name for name in found if known.count(id(linear[name])) > 1), None)
        if tied is not None:
            raise ValueError(f"head: {tied!r} is tied to another parameter; a head needs parameters of its own")
        return found

    def _find_affine(self, affine: bool | Select) -> list[str]:
        if affine is False:
            return []
        norms = self.core().normalisation_parameters()
        known = {name: p for name, p in self.core().parameters_by_name().items() if name in norms}
        if affine is not True:
            return self.selected(affine, known, option="affine", what="gains and biases of normalisation layers")
        if not known:
            raise ValueError("affine=True: the network has no normalisation layer with gains or biases; leave it out")
        return list(known)

    def own_parameters(self) -> list[str]:
        """The parameters that every particle has in full: those of heads and of normalisation layers."""
        return self.head_parameters + self.affine_parameters

    def _centers(self) -> dict[str, Tensor]:
        """Factors that leave the network unchanged but have a gradient: A as in a new layer, B zero."""
        return {name: draw_factor(name, like) for name, like in self._likes.items() if name[-2:] in (".A", ".B")}

    def pairs(self) -> list[tuple[str, str, float]]:
        """``(site of A, site of B, scale)`` of every weight: a particle adds ``scale B A`` to W_0."""
        return [(self.site(f"{weight}.A"), self.site(f"{weight}.B"), self.scale) for weight in self.weights]

    def train(self, mode: bool = True) -> Bella:
        """Sets the mode, except that normalisation layers stay in eval mode: all particles share their statistics."""
        super().train(mode)
        for module in self.core().net.modules():
            if isinstance(module, NORMALISATIONS) or has_spectral_norm(module):
                module.eval()
        return self

    def moving_layers(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = True) -> Any:
        """Replaces the tensors instead of copying into them, because W_0 shares storage with the user's network."""
        self._constants.clear()  # priors around the parameters that are replaced
        return super().load_state_dict(state_dict, strict=strict, assign=True)

    def arguments(self) -> dict[str, object]:
        return super().arguments() | {
            "rank": self.rank,
            "alpha": self.alpha,
            "rank_stabilised": self.rank_stabilised,
            "select": self._chosen,
            "head": self.head_parameters or None,
            "head_prior": priors.describe(self.head_prior),
            "affine": self.affine_parameters or False,
            "affine_prior": priors.describe(self.affine_prior),
        }

    @classmethod
    def from_arguments(cls, net: nn.Module, arguments: dict[str, Any]) -> Bella:
        for name in {"head_prior", "affine_prior"} & arguments.keys():
            arguments[name] = priors.from_description(arguments[name])
        return cls(net, **arguments)

    def sites(self) -> list[Site]:
        return self._sites

    def forms(self) -> dict[str, Form]:
        return super().forms() | dict.fromkeys(self.weights, "low-rank") | dict.fromkeys(self.own_parameters(), "dense")

    def repr_fields(self) -> dict[str, object]:
        own = {"head": ", ".join(self.head_parameters), "affine": ", ".join(self.affine_parameters)}
        return super().repr_fields() | {"rank": self.rank, "scale": display.number(self.scale)} | own

    def weights_of(self, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``W_0 + scale B A`` of every weight with factors, and the particle's own heads, gains and biases."""
        parameters = self.core().parameters_by_name()
        values: dict[str, Tensor] = {}
        for weight in self.weights:
            a, b = (latents[self.site(f"{weight}.{factor}")][None] for factor in "AB")
            values[weight] = LowRankFactors(a, b, self.scale).explicit(parameters[weight].detach(), 0, 0)
        return values | {name: latents[self.site(name)] for name in self.own_parameters()}

    def sample_latents(self) -> dict[str, Tensor]:
        like, parameters = self.like(), self.core().parameters_by_name()
        likes = {n: like.new_empty(()).expand(v.shape) for n, v in self._likes.items()}
        return self.sample_weights(self.priors, likes, {n: parameters[n] for n in self.affine_parameters})

    def function(self, x: Inputs, latents: dict[str, Tensor], size: int) -> Tensor:
        lead = self.lead_shape(latents)
        parameters = self.core().parameters_by_name()
        perturbations: dict[str, Perturbation] = {}
        for weight in self.weights:
            a, b = (self._by_member(latents, f"{weight}.{factor}", lead) for factor in "AB")
            perturbations[weight] = LowRankFactors(a, b, self.scale)
        for name in self.own_parameters():
            value = self._by_member(latents, name, lead)
            if value.dim() == 2 or name in self.affine_parameters:
                perturbations[name] = Replacement(value.flatten(1).unsqueeze(1))
            else:
                perturbations[name] = Shift(value - parameters[name])
        f = self.core().perturbed(x, size, perturbations, lead.numel())
        return self.unfold(f, lead)

    def _by_member(self, latents: dict[str, Tensor], name: str, lead: torch.Size) -> Tensor:
        """``[*lead, 1 ..., *event] -> [members | 1, *event]``."""
        event = self._likes[name].shape
        return self.fold(latents[self.site(name)], len(event), lead).squeeze(1)


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd) and module.groups == module.in_channels > 1


def draw_factor(name: str, like: Tensor) -> Tensor:
    """Starting values of one factor: B zero, A uniform with the standard deviation of a new layer (He et al. 2015)."""
    value = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    if name.endswith(".B"):
        return value
    bound = 1 / math.sqrt(math.prod(like.shape[1:]))
    return value.uniform_(-bound, bound)


@storable
class ParticleGuide(MixtureGuide):
    """n particles: points in the space of all latent sites, with equal weights.

    :param model: a :class:`Bella`.
    :param particles: n.
    :param init: how to draw the starting values of each particle. ``"kaiming"``: A uniform in ``+-1 / sqrt(fan in)``
        and B zero, so that all particles start at the given network. ``"gaussian"``: the same A, and B normal with
        standard deviation ``init_scale``; heads, gains and biases get noise of this standard deviation too. Particles
        then differ from the start; otherwise a kernel on products, functions or tensors would move them all alike.
        ``"orthogonal"``: A and B both random with B A = 0, which needs an even rank. ``"prior"``: a draw from the
        prior, of all but the noise of a likelihood, so that particles differ as much as it says and end at different
        networks.
    :param init_scale: see ``init``; ``"prior"`` has no use for it.
    :raises TypeError: for a model that is not a :class:`Bella`.
    :raises ValueError: for an unknown ``init``, or an odd rank with ``"orthogonal"``.
    """

    @one_at_a_time
    def __init__(self, model: Bella, particles: int = 5, *, init: Init = "gaussian", init_scale: float = 1e-2) -> None:
        if not isinstance(model, Bella):
            raise TypeError(
                f"ParticleGuide takes a pyro_bnn.models.Bella, got {type(model).__name__}: for other models use "
                "pyro_bnn.inference.AutoParticles"
            )
        if init not in get_args(Init):
            raise ValueError(f"init={init!r}: expected 'kaiming', 'gaussian', 'orthogonal' or 'prior'")
        if init == "orthogonal" and model.rank % 2:
            raise ValueError(f"init='orthogonal' halves the rank between A and B: rank={model.rank} is odd")
        checks.positive("init_scale", init_scale)
        super().__init__(model, checks.count("particles", particles), family="point")
        self._pairs = model.pairs()
        values = self.coordinates()
        if init == "prior":
            self._start_at_draws(model)
            return
        with torch.no_grad():
            for a, b, _ in self._pairs:
                for own_a, own_b in zip(values[a], values[b], strict=True):
                    if init == "orthogonal":
                        _orthogonal(own_a, own_b, init_scale)
                        continue
                    own_a.copy_(draw_factor(".A", own_a))
                    if init == "gaussian":
                        own_b.normal_(0, init_scale)
            for name in model.own_parameters() if init == "gaussian" else ():
                values[model.site(name)].add_(torch.randn_like(values[model.site(name)]), alpha=init_scale)

    def _start_at_draws(self, model: Bella) -> None:
        """Puts each particle at a draw from the prior, but for the noise of a likelihood."""
        values = self.coordinates()
        kinds = {site.name: block.kind for block in self.blocks() for site in block.sites}
        kinds.pop(model.site("noise"), None)
        with torch.no_grad(), poutine.block():
            for i in range(self.num_members):
                drawn = model.sample_latents()
                for name, kind in kinds.items():
                    values[name][i] = _COORDINATES.get(kind, torch.positive)(drawn[name])

    def arguments(self) -> dict[str, object]:
        return {"particles": self.num_members}

    def pairs(self) -> list[tuple[str, str, float]]:
        """See :meth:`Bella.pairs`."""
        return self._pairs


def _orthogonal(a: Tensor, b: Tensor, scale: float) -> None:
    """Puts A into one half of an orthonormal basis of the r coordinates and B into the other."""
    basis = torch.linalg.qr(torch.randn(a.shape[0], a.shape[0], dtype=a.dtype, device=a.device))[0]
    bound = 1 / math.sqrt(math.prod(a.shape[1:]))
    half = torch.empty_like(a.flatten(1)[::2]).uniform_(-bound, bound)
    a.copy_((basis[:, ::2] @ half).view_as(a))
    b.copy_(scale * torch.randn_like(b[:, ::2]) @ basis[:, 1::2].t())
