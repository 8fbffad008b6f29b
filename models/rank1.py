"""Rank-1 Bayesian neural networks (Dusenberry et al., ICML 2020, arXiv 2005.07186).

W' = W o (r s^T) in every product, convolution and embedding (eq. 1). W is a point estimate; r and s are latent. Their
prior is centred at 1, and their posterior is a mixture of K components with one component index for the whole network
(sections 3.2 and 3.3). In training, every sample of a batch gets its own draw in each component (section 3.1).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal, Unpack

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_bnn import priors
from pyro_bnn.entry import checks
from pyro_bnn.entry.threads import one_at_a_time
from pyro_bnn.given.fixed import not_frozen, require_own_weights, require_random
from pyro_bnn.inputs import Inputs, inputs
from pyro_bnn.likelihoods import Likelihood
from pyro_bnn.models.starting_means import StartingMeans, starting_means
from pyro_bnn.network import batch_size
from pyro_bnn.perturb import Perturbation, Rank1Factors, Replacement
from pyro_bnn.priors import HierarchicalCauchy, Normal, Prior, PriorLike
from pyro_bnn.program.guide import Family, MixtureGuide
from pyro_bnn.program.model import BayesianNetwork, Form, NetworkOptions
from pyro_bnn.program.sites import Site, log_density, sample_local, sample_share
from pyro_bnn.program.statements import sample
from pyro_bnn.registry import storable
from pyro_bnn.selection import Select


@storable
class Rank1(BayesianNetwork):
    """Pyro model of a rank-1 Bayesian network.

    For every selected weight W, with r over dimension 0 and s over dimension 1 of the stored tensor::

        [<W>_tau ~ prior.tau]    s_i ~ prior(1 | tau),   r_j ~ prior(1 | tau),   y ~ likelihood(net with W o (r s^T))

    and ``log p(W)`` enters as one factor. With ``member_bias=True`` the biases of these layers are also latent sites,
    with the prior ``weight_prior``; in :class:`Rank1Guide` each component has a point estimate of them.

    :param net: any module; a copy is trained, and the given module does not change.
    :param likelihood: the distribution of y given the output; ``None`` for the function alone, inside a larger Pyro
        model.
    :param num_data: size N of the training set.
    :param prior: prior of the factors: an object of :mod:`pyro_bnn.priors`, a Pyro distribution, a function
        ``(site name, tensor) -> distribution``, or a mapping of patterns (of weight or site names) to these.
    :param select: the weights that get factors, see :func:`~pyro_bnn.selection.select_parameters`; by default all
        except those with ``requires_grad=False``.
    :param member_bias: whether every component has its own biases, except for frozen ones.
    :param weight_prior: prior of the elements of W; ``None`` for a flat prior (optionally with weight decay).
    :param clip: factors are clipped to ``[-clip, clip]`` where the network uses them (the code released with the paper
        clips at 10, which matters for Cauchy draws); ``None`` for no clipping.
    :param example: an input. The network then runs on it once, to find the weights that it uses and their layouts.
        Needed when ``forward`` calls functions such as ``F.linear`` with parameters of the module itself.
    :param options: see :class:`~pyro_bnn.program.model.NetworkOptions`.
    :raises ValueError: when ``select`` matches nothing, or a prior does not fit.
    """

    def __init__(
        self,
        net: nn.Module,
        likelihood: Likelihood | None,
        num_data: int | None = None,
        *,
        prior: PriorLike = HierarchicalCauchy(),
        select: Select | None = None,
        member_bias: bool = True,
        weight_prior: Prior | None = Normal(0.0, 1.0),
        clip: float | None = None,
        example: Inputs = None,
        **options: Unpack[NetworkOptions],
    ) -> None:
        super().__init__(net, likelihood, num_data, **options)
        core = self.core()
        parameters = core.parameters_by_name()
        own = isinstance(weight_prior, Prior) and not weight_prior.has_tau and not weight_prior.is_pretrained
        if weight_prior is not None and not own:
            raise TypeError(
                f"weight_prior={weight_prior!r}: expected a prior of pyro_bnn.priors without latent scales or given "
                "weights (Normal, Cauchy, Laplace or StudentT), or None for a flat prior"
            )
        clip = checks.optional(checks.positive, "clip", clip)
        checks.truth("member_bias", member_bias)
        self.prior, self.weight_prior, self.member_bias, self.clip = prior, weight_prior, member_bias, clip
        example = None if example is None else inputs(example, self.like())
        consumed = None if example is None else core.consumed(example)
        known = core.product_weights()
        if select is None:
            require_own_weights(core.net)
        if consumed is None:
            candidates = {
                n: parameters[n] for n in (known if select is None else parameters) if parameters[n].dim() > 1
            }
        else:
            candidates = {n: p for n, p in parameters.items() if n in consumed and p.dim() > 1}
        if not candidates:
            raise ValueError(
                "the network has no weights that can have factors: no linear, convolutional, recurrent, attention or "
                "embedding layer was found. Give example=x if its forward uses parameters of the module itself"
            )
        norms = core.normalisation_parameters()
        candidates = {n: p for n, p in candidates.items() if n not in norms}
        if select is None:
            self.weights = not_frozen(candidates, "weights")
            require_random(core.net, self.weights)
        else:
            self.weights = self.selected_random(select, candidates, what="weights")
        self._complete = select is not None or example is not None
        biases = core.biases_of(self.weights) if member_bias else []
        self.biases = [name for name in biases if parameters[name].requires_grad]
        self.priors: dict[str, Prior] = {}
        for weight in self.weights:
            for factor, size in zip("sr", self._sizes(weight, parameters[weight]), strict=True):
                like = parameters[weight].detach().new_ones(size)
                self.priors[f"{weight}.{factor}"] = priors.resolve(prior, (f"{weight}.{factor}", weight), like)
        self._sites = self._list_sites(parameters)
        if example is not None:
            core.layouts(example, batch_size(example), self._perturbed())

    def _sizes(self, weight: str, parameter: Tensor) -> tuple[int, int]:
        """Sizes of s and r. A grouped convolution has one element of s for every input channel of the layer."""
        owner = self.core().owner(weight)
        groups = owner.groups if isinstance(owner, nn.modules.conv._ConvNd) else 1
        return parameter.shape[1] * groups, parameter.shape[0]

    def _shared_tau(self, weight: str) -> bool:
        """Whether r and s of a weight share one tau: they do unless a mapping gives them different priors."""
        s, r = self.priors[f"{weight}.s"], self.priors[f"{weight}.r"]
        return s.has_tau and s == r

    def _tau_names(self, weight: str) -> dict[str, Prior]:
        if self._shared_tau(weight):
            return {weight: self.priors[f"{weight}.s"]}
        return {n: p for n in (f"{weight}.s", f"{weight}.r") if (p := self.priors[n]).has_tau}

    def _list_sites(self, parameters: dict[str, nn.Parameter]) -> list[Site]:
        scales, factors = [], []
        for weight in self.weights:
            for name, prior in self._tau_names(weight).items():
                scales.append(Site(self.site(f"{name}_tau"), torch.Size(), "scale", prior.typical_tau()))
            for factor, size in zip("sr", self._sizes(weight, parameters[weight]), strict=True):
                name, shape = f"{weight}.{factor}", torch.Size([size])
                if self.priors[name].has_inclusion:
                    share = self.priors[name].typical_share()
                    scales.append(Site(self.site(f"{name}_inclusion"), torch.Size(), "share", share))
                if self.priors[name].has_lambda:
                    scales.append(Site(self.site(f"{name}_lambda"), shape, "scale", 1.0))
                factors.append(Site(self.site(name), shape, "factor", 1.0))
        for name in self.biases:
            value = parameters[name].detach()
            scales.append(Site(self.site(name), value.shape, "bias", value.clone()))
        if self.likelihood is not None and self.likelihood.learns_noise:
            scales.append(Site(self.site("noise"), torch.Size(), "scale", 1.0))
        return scales + factors

    def sites(self) -> list[Site]:
        return self._sites

    def forms(self) -> dict[str, Form]:
        return super().forms() | dict.fromkeys(self.weights, "rank-1") | dict.fromkeys(self.biases, "dense")

    def repr_fields(self) -> dict[str, object]:
        return super().repr_fields() | {"weight_prior": repr(self.weight_prior or "flat"), "clip": self.clip}

    def weights_of(self, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``W o (r s^T)`` of every weight with factors, and the biases of the member."""
        parameters = self.core().parameters_by_name()
        values: dict[str, Tensor] = {}
        for weight in self.weights:
            r, s = (self._clipped(latents[self.site(f"{weight}.{f}")])[None, None] for f in "rs")
            values[weight] = Rank1Factors(r, s).explicit(parameters[weight].detach(), 0, 0)
        return values | {name: latents[self.site(name)] for name in self.biases}

    def _clipped(self, factor: Tensor) -> Tensor:
        return factor if self.clip is None else factor.clamp(-self.clip, self.clip)

    def arguments(self) -> dict[str, object]:
        return super().arguments() | {
            "select": self.weights,
            "member_bias": self.member_bias,
            "weight_prior": priors.describe(self.weight_prior),
            "clip": self.clip,
        }

    @classmethod
    def from_arguments(cls, net: nn.Module, arguments: dict[str, object]) -> Rank1:
        weight_prior = priors.from_description(arguments.pop("weight_prior"))
        return cls(net, **arguments, weight_prior=weight_prior)  # type: ignore[arg-type]

    def _perturbed(self) -> list[str]:
        return [*self.weights, *self.biases]

    def sample_latents(self) -> dict[str, Tensor]:
        parameters = self.core().parameters_by_name()
        values: dict[str, Tensor] = {}
        tau: dict[str, Tensor | None] = {}
        local: dict[str, Tensor | None] = {}
        given: dict[str, Prior] = {}
        like: dict[str, Tensor] = {}
        for weight in self.weights:
            w = parameters[weight].detach()
            shared = self._shared_tau(weight)
            for name, prior in self._tau_names(weight).items():
                tau[name] = values[self.site(f"{name}_tau")] = self.sample_scale(prior, w, self.site(name))  # type: ignore
            for factor, size in zip("sr", self._sizes(weight, w), strict=True):
                name = f"{weight}.{factor}"
                like[name] = w.new_empty(()).expand(size)
                if shared:
                    tau[name] = tau[weight]
                given[name], share = sample_share(self.priors[name], like[name], self.site(name))
                if share is not None:
                    values[self.site(f"{name}_inclusion")] = share
                local[name] = sample_local(self.priors[name], like[name], self.site(name))
                if local[name] is not None:
                    values[self.site(f"{name}_lambda")] = local[name]  # type: ignore[assignment]
        for bias in self.biases:
            values[self.site(bias)] = sample(self.site(bias), self._bias_prior(bias, parameters[bias].detach()))
        values |= self.sample_noise()
        with self.rows_plate():
            for name, one in like.items():
                site = self.site(name)
                d = self.prior_of(site, given[name], 1.0, one, tau.get(name), local.get(name))
                values[site] = sample(site, d)
        return values

    def _require_complete(self, x: Inputs) -> None:
        """With ``select=None`` every weight of a product must have factors, whatever the type of its module."""
        core = self.core()
        norms = core.normalisation_parameters()
        parameters = core.parameters_by_name()
        left_out = norms | {n for n, p in parameters.items() if p.dim() < 2 or not p.requires_grad}
        missed = [n for n in core.consumed(x) if n not in self.weights and n not in left_out]
        if missed:
            raise ValueError(
                f"the network also uses {', '.join(map(repr, sorted(missed)))} in products, which its module types do "
                "not show: build the model with example=x to give them factors too, or with select= to leave them out"
            )
        self._complete = True

    def _bias_prior(self, name: str, like: Tensor) -> dist.TorchDistribution:
        if self.weight_prior is None:
            return dist.ImproperUniform(dist.constraints.real, (), like.shape)
        return self.prior_of(self.site(name), self.weight_prior, 0.0, like, None, None)

    def log_prior(self) -> Tensor | None:
        if self.weight_prior is None:
            return None
        parameters = self.core().parameters_by_name()
        weights = self.core().held({name: parameters[name] for name in self.weights})  # padding has no gradient
        return log_density(self.weight_prior, [*weights.values()])

    def decayed(self) -> list[nn.Parameter]:
        parameters = self.core().parameters_by_name()
        return [parameters[n] for n in self.weights]

    def function(self, x: Inputs, latents: dict[str, Tensor], size: int) -> Tensor:
        if not self._complete:
            self._require_complete(x)
        lead = self.lead_shape(latents)
        perturbations: dict[str, Perturbation] = {}
        for weight in self.weights:
            r, s = (self._clipped(self.fold(latents[self.site(f"{weight}.{f}")], 1, lead)) for f in "rs")
            perturbations[weight] = Rank1Factors(r, s)
        for bias in self.biases:
            perturbations[bias] = Replacement(self.fold(latents[self.site(bias)], 1, lead))
        f = self.core().perturbed(x, size, perturbations, lead.numel())
        return self.unfold(f, lead)

    @staticmethod
    def paper_settings(
        task: Literal["cifar10", "cifar100", "imagenet"], family: Family = "normal"
    ) -> dict[str, dict[str, Any]]:
        """The settings of tables 5 and 6 of the paper (not the defaults of the released code), grouped by use.

        ``Rank1(**s["model"])``, ``Rank1Guide(**s["guide"])``, ``fit(**s["fit"])``,
        ``posterior.predict(**s["predict"])``; the objective is ``MixtureELBO(**s["elbo"])`` and the schedule
        ``multistep(**s["schedule"])``, both of :mod:`pyro_bnn.inference`, and ``s["network"]`` says which network.
        The L2 coefficient on sum(w^2) is a ``weight_decay`` of twice its value in torch, and takes the place of
        ``weight_prior``. On CIFAR it applies to the biases and normalisation layers too.

        :raises ValueError: for another task or family.
        """
        if task not in _PAPER or family not in ("normal", "cauchy"):
            raise ValueError(
                f"paper_settings({task!r}, family={family!r}): expected {', '.join(_PAPER)}; normal, cauchy"
            )
        t = _PAPER[task]
        scale = t["scale"][family]
        return {
            "network": {"name": t["network"], "num_classes": t["classes"]},
            "model": {
                "prior": Normal(1.0, scale) if family == "normal" else priors.Cauchy(1.0, scale),
                "weight_prior": None,
                "clip": 10.0,
            },
            "guide": {
                "components": 4,
                "family": family,
                "init_dropout_rate": 1e-3 if family == "normal" else 1e-6,
                "init_means": Normal(1.0, t["spread"][family]),
            },
            "fit": {
                "epochs": t["epochs"],
                "batch_size": t["batch"],
                "optim": "sgd",
                "lr": t["lr"],
                "weight_decay": 2 * t["l2"],
                "decay": t["decay"],
                "kl_annealing": t["anneal"],
            },
            "elbo": {"mixture_kl": "sum", "likelihood_bound": "average"},
            "schedule": {"warmup": t["warmup"], "milestones": t["milestones"], "ratio": t["ratio"]},
            "predict": {"num_samples": 1 if family == "normal" else 4},
        }


_PAPER: dict[str, dict[str, Any]] = {
    "cifar10": {
        **{"network": "wide_resnet_28_10", "classes": 10, "scale": {"normal": 0.1, "cauchy": 0.1}},
        **{"spread": {"normal": 0.5, "cauchy": 0.5}},
        **{"l2": 1e-4, "epochs": 250, "anneal": 200, "batch": 128, "lr": 0.1, "decay": "all"},
        **{"warmup": 1, "milestones": (100, 200, 225), "ratio": 0.2},
    },
    "cifar100": {
        **{"network": "wide_resnet_28_10", "classes": 100, "scale": {"normal": 0.1, "cauchy": 0.01}},
        **{"spread": {"normal": 1.0, "cauchy": 1.0}},
        **{"l2": 3e-4, "epochs": 250, "anneal": 200, "batch": 128, "lr": 0.1, "decay": "all"},
        **{"warmup": 1, "milestones": (100, 200, 225), "ratio": 0.2},
    },
    "imagenet": {
        **{"network": "resnet50", "classes": 1000, "scale": {"normal": 0.05, "cauchy": 0.005}},
        **{"spread": {"normal": 0.75, "cauchy": 0.5}},
        **{"l2": 1e-4, "epochs": 135, "anneal": 90, "batch": 1024, "lr": 0.4, "decay": "weights"},
        **{"warmup": 5, "milestones": (45, 90, 120), "ratio": 0.1},
    },
}


@storable
class Rank1Guide(MixtureGuide):
    """A uniform mixture of K factorised components over all factors, with one component index for the network.

    :param model: a :class:`Rank1`.
    :param components: number K of components.
    :param family: ``"normal"`` or ``"cauchy"`` factors. The KL divergence of a Cauchy is finite only from priors with
        equally heavy tails (Cauchy, HierarchicalCauchy, StudentT); with others, the guide warns.
    :param init_dropout_rate: p in the starting scale ``sqrt(p / (1 - p))`` of every factor (appendix B).
    :param init_means: distribution of the starting means: a Pyro distribution, a class of :mod:`pyro_bnn.priors` or a
        function ``shape -> tensor``. Random signs, for example: ``lambda shape: torch.randn(shape).sign()``.
    :param init_stratified: whether the components start far apart in every factor: of K equally likely strata of
        ``init_means`` each has another, in a random order (Latin hypercube sampling, McKay et al. 1979). Which means
        a component has then depends less on the seed, and so does what they reach together (docs/rank1.md).
    :param draws: in training, one draw for every ``"row"`` of the batch (as in the paper) or for every ``"member"``.
    :raises TypeError: for a model that is not a :class:`Rank1`, or where ``init_means`` gives no tensor.
    :raises ValueError: when ``components < 1``, the rate is not in (0, 1), ``family`` or ``draws`` is unknown, or
        strata are asked of a function or of a distribution without quantiles; and for ``init_means`` of another
        shape, or not finite.
    """

    @one_at_a_time
    def __init__(
        self,
        model: Rank1,
        components: int = 4,
        family: Family = "normal",
        *,
        init_dropout_rate: float = 1e-3,
        init_means: StartingMeans = Normal(1.0, 0.5),
        init_stratified: bool = False,
        draws: Literal["row", "member"] = "row",
    ) -> None:
        if not isinstance(model, Rank1):
            raise TypeError(
                f"Rank1Guide takes a pyro_bnn.models.Rank1, got {type(model).__name__}: for other models use "
                "pyro_bnn.models.MeanFieldGuide"
            )
        init_dropout_rate = checks.share("init_dropout_rate", init_dropout_rate)
        if family not in ("normal", "cauchy"):
            raise ValueError(
                f"family={family!r}: expected 'normal' or 'cauchy'. For point estimates use "
                "pyro_bnn.program.guide.MixtureGuide(model, components, family='point')"
            )
        if draws not in ("row", "member"):
            raise ValueError(f"draws={draws!r}: expected 'row' or 'member'")
        light = next((name for name, p in model.priors.items() if not p.has_heavy_tails), None)
        if family == "cauchy" and light is not None:
            warnings.warn(
                f"family='cauchy', but the prior of {light!r} has light tails: the KL divergence is infinite, and its "
                "estimates are meaningless. Use the prior Cauchy, HierarchicalCauchy or StudentT, or family='normal'",
                stacklevel=2,
            )
        checks.truth("init_stratified", init_stratified)
        super().__init__(model, components, family, rows=draws == "row")
        self.draws = draws
        with torch.no_grad():
            for loc in self.loc:
                loc.copy_(starting_means(loc, init_means, init_stratified))
        self.start_scales((init_dropout_rate / (1 - init_dropout_rate)) ** 0.5)

    def arguments(self) -> dict[str, object]:
        return {"components": self.num_members, "family": self.family, "draws": self.draws}

    def repr_arguments(self) -> dict[str, object]:
        return super().repr_arguments() | {"draws": self.draws}
