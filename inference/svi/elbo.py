"""The evidence lower bound for guides that are mixtures of members."""

from __future__ import annotations

import contextlib
import math
from typing import Any, Literal

import torch
from pyro import poutine
from pyro.distributions import Cauchy, Delta, LogNormal, Normal
from pyro.distributions.util import scale_and_mask
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.trace_mean_field_elbo import _check_mean_field_requirement
from pyro.infer.util import check_fully_reparametrized, is_validation_enabled, torch_item
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from pyro.util import check_model_guide_match, check_site_shape
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_bnn import display
from pyro_bnn.entry import checks
from pyro_bnn.program.divergences import closed_form, kl_of_sites
from pyro_bnn.program.factorised import FactorisedNormal
from pyro_bnn.program.guide import MixtureGuide
from pyro_bnn.program.model import BayesianNetwork
from pyro_bnn.program.statements import NotTraceableError, is_traceable, traced


class ScaleLatents(Messenger):
    """Multiplies the log densities of all latent sites in model and guide, for KL annealing and tempering.

    ``with ScaleLatents(beta): loss = elbo.differentiable_loss(model, guide, x, y)``

    It must enclose both programs, because analytic KL terms use the scale of the guide, and sampled KL terms the scales
    of both.

    :param scale: the factor beta of the KL divergence, a number or a scalar tensor, which is not looked at.
    :param per_member: also multiply by the number of members, which turns a mean over members into a sum.
    """

    def __init__(self, scale: float | Tensor = 1.0, per_member: bool = False) -> None:
        super().__init__()
        self.scale = scale if isinstance(scale, Tensor) else checks.not_negative("scale", scale)
        self.per_member = checks.truth("per_member", per_member)
        self._products: dict[float, Tensor] = {}  # sites with one scale share one tensor, and have one sum

    def __repr__(self) -> str:
        return display.call(self, scale=self.scale, per_member=self.per_member)

    def __enter__(self) -> Any:
        self._products.clear()  # of a tensor that may have been written into since
        return super().__enter__()

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or type(msg["fn"]).__name__ == "_Subsample":
            return
        frame = _members_frame(msg)
        size = frame.size if self.per_member and frame is not None else 1
        if not isinstance(self.scale, Tensor) or isinstance(msg["scale"], Tensor):
            msg["scale"] = msg["scale"] * (self.scale * size)
            return
        factor = msg["scale"] * size
        if factor not in self._products:
            self._products[factor] = factor * self.scale
        msg["scale"] = self._products[factor]


def _members_frames(site: Any) -> list[Any]:
    return [f for f in site["cond_indep_stack"] if f.name.rpartition(".")[2] == "members"]


def _members_frame(site: Any) -> Any:
    return next(iter(_members_frames(site)), None)


class MixtureELBO(TraceMeanField_ELBO):
    """ELBO with closed-form KL terms where they exist, and with options for mixtures of K members.

    :param mixture_kl: how KL(q || p) of the mixture q = (1/K) sum_k q_k is bounded:

        ``"mean"``  (1/K) sum_k KL(q_k || p): Jensen's bound, which makes the objective a true ELBO;
        ``"sum"``   sum_k KL(q_k || p), as the code released with Dusenberry et al. (2020) does;
        ``"kt"``    "mean" + (1/K) sum_k log (1/K) sum_j exp(-B(q_k, q_j)) with the Bhattacharyya distance B: the bound
        of Kolchinsky and Tracey (Entropy 19, 361, 2017), never above "mean". It needs a density for every site, so a
        model in which each member has biases as point estimates is refused.
    :param likelihood_bound: ``"average"`` takes (1/K) sum_k log p(y | k) of every sample (eq. 13 of the paper),
        ``"mixture"`` the larger log (1/K) sum_k p(y | k) (eq. 14), which is tighter for the predictive density of one
        sample; summed over a data set, it is an objective but not a bound of the evidence.
    :param num_particles: number of draws from the guide for one estimate.
    :raises ValueError: for unknown options; and during training, when "kt" cannot be computed.
    """

    def __init__(
        self,
        mixture_kl: Literal["mean", "sum", "kt"] = "mean",
        likelihood_bound: Literal["average", "mixture"] = "average",
        num_particles: int = 1,
        **options: Any,
    ) -> None:
        if mixture_kl not in ("mean", "sum", "kt"):
            raise ValueError(f"mixture_kl={mixture_kl!r}: expected 'mean', 'sum' or 'kt'")
        if likelihood_bound not in ("average", "mixture"):
            raise ValueError(f"likelihood_bound={likelihood_bound!r}: expected 'average' or 'mixture'")
        super().__init__(num_particles=checks.count("num_particles", num_particles), **options)
        self.mixture_kl, self.likelihood_bound = mixture_kl, likelihood_bound

    def __repr__(self) -> str:
        bounds = {"mixture_kl": self.mixture_kl, "likelihood_bound": self.likelihood_bound}
        return display.call(self, **bounds, num_particles=self.num_particles)

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[poutine.Trace, poutine.Trace]:
        """Traces without log densities: which of them are needed is known only once closed forms have been tried."""
        with ScaleLatents(per_member=True) if self.mixture_kl == "sum" else contextlib.nullcontext():
            found = _traces_of_statements(model, guide, args, kwargs)
            if found is not None:
                return found
            guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
            model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
        if is_validation_enabled():
            check_model_guide_match(model_trace, guide_trace, self.max_plate_nesting)
            guide_trace, model_trace = prune_subsample_sites(guide_trace), prune_subsample_sites(model_trace)
            _check_mean_field_requirement(model_trace, guide_trace)
            model_trace.compute_log_prob()
            guide_trace.compute_score_parts()
            for trace in (model_trace, guide_trace):
                for site in _sample_sites(trace).values():
                    check_site_shape(site, self.max_plate_nesting)
        return model_trace, guide_trace

    def differentiable_loss(self, model: Any, guide: Any, *args: object, **kwargs: object) -> Tensor:
        """The negative ELBO in nats, for ``backward()``; it is not read, so a GPU need not be waited for."""
        loss: Any = 0.0
        for model_trace, guide_trace in self._get_traces(model, guide, args, kwargs):
            loss = loss + self._negative_elbo(model_trace, guide_trace)
        return loss if self.num_particles == 1 else loss / self.num_particles

    def _differentiable_loss_particle(
        self, model_trace: poutine.Trace, guide_trace: poutine.Trace
    ) -> tuple[float, Tensor]:
        loss = self._negative_elbo(model_trace, guide_trace)
        return torch_item(loss), loss

    def _negative_elbo(self, model_trace: poutine.Trace, guide_trace: poutine.Trace) -> Tensor:
        model_sites, guide_sites = _sample_sites(model_trace), _sample_sites(guide_trace)
        latent = {name: site for name, site in model_sites.items() if not site["is_observed"]}
        if is_validation_enabled():
            for name in latent:
                check_fully_reparametrized(guide_sites[name])
        elbo, done = _closed_form_of_blocks(guide_sites, latent)
        sampled: set[str] = set()
        for name, site in latent.items():
            if name in done:
                continue
            try:
                kl = kl_divergence(guide_sites[name]["fn"], site["fn"])
            except NotImplementedError:  # no closed form: estimated from this draw
                sampled.add(name)
                continue
            kl = scale_and_mask(kl, scale=guide_sites[name]["scale"], mask=guide_sites[name]["mask"])
            elbo = elbo - kl.sum()
        model_trace.compute_log_prob(lambda name, site: site["is_observed"] or name in sampled)
        alone = [name for name in guide_sites if name in sampled or name not in model_sites]  # the latter: auxiliary
        guide_trace.compute_log_prob(lambda name, site: name in alone)
        for name, site in model_sites.items():
            if site["is_observed"] and self.likelihood_bound == "mixture":
                _mix_members(site)
            if site["is_observed"] or name in sampled:
                elbo = elbo + site["log_prob_sum"]
        for name in alone:
            elbo = elbo - guide_sites[name]["log_prob_sum"]
        if self.mixture_kl == "kt":
            elbo = elbo - kolchinsky_tracey(guide_trace)
        return -elbo


def _traces_of_statements(
    model: Any, guide: Any, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[poutine.Trace, poutine.Trace] | None:
    """The traces of a guide and a model of this package, which take less time than Pyro's; ``None`` where these differ.

    They do when a handler of Pyro is at work beside those of this file, and when Pyro is to validate.
    """
    handlers = poutine.runtime._PYRO_STACK
    if (
        is_validation_enabled()
        or not (isinstance(model, BayesianNetwork) and isinstance(guide, MixtureGuide))
        or not (is_traceable(model) and is_traceable(guide))
        or any(type(handler) is not ScaleLatents for handler in handlers)
    ):
        return None
    innermost_first: Any = handlers[::-1]
    try:
        guide_trace = traced(guide, args, kwargs, handlers=innermost_first)
        return traced(model, args, kwargs, guide_trace, innermost_first), guide_trace
    except NotTraceableError:
        return None


def _closed_form_of_blocks(guide_sites: dict[str, Any], latent: dict[str, Any]) -> tuple[Any, set[str]]:
    """Minus the KL divergences of sites that have one for all of a block together, and the names of those."""
    groups: dict[object, list[str]] = {}
    for name, site in latent.items():
        own = guide_sites[name]
        form = closed_form(own["fn"], site["fn"])
        if form is not None and own["mask"] is None:
            groups.setdefault((id(own["fn"].block), form), []).append(name)
    total: Any = 0.0
    done: set[str] = set()
    for names in groups.values():
        own = [guide_sites[name] for name in names]
        first = own[0]
        if not all(_same_number(site["scale"], first["scale"]) for site in own):
            continue
        kl = kl_of_sites([site["fn"] for site in own], [latent[name]["fn"] for name in names])
        total = total - (kl.expand(first["fn"].batch_shape) * first["scale"]).sum()
        done.update(names)
    return total, done


def _same_number(a: Any, b: Any) -> bool:
    return a is b or not (isinstance(a, Tensor) or isinstance(b, Tensor)) and bool(a == b)


def _sample_sites(trace: poutine.Trace) -> dict[str, Any]:
    nodes: dict[str, Any] = trace.nodes
    return {name: site for name, site in nodes.items() if site["type"] == "sample" and not site_is_subsample(site)}


def _mix_members(site: Any) -> None:
    """Replaces the members' average of log p(y) by the log of their average of p(y), of all networks in the model."""
    frames = [f for f in _members_frames(site) if f.size > 1]
    if not frames:
        return
    count = math.prod(f.size for f in frames)
    dims = [f.dim for f in frames]
    mixed = site["unscaled_log_prob"].logsumexp(dims, keepdim=True) - math.log(count)
    mask = site["mask"]
    if isinstance(mask, Tensor) and any(mask.dim() >= -d and mask.shape[d] > 1 for d in dims):
        raise ValueError(
            "likelihood_bound='mixture' averages over the members of a sample, whose mask must be the same for all of "
            "them: give the mask an axis of length 1 there"
        )
    site["log_prob_sum"] = scale_and_mask(mixed, scale=site["scale"] * count, mask=mask).sum()


def kolchinsky_tracey(guide_trace: poutine.Trace) -> Tensor:
    """``(1/K) sum_k log (1/K) sum_j exp(-B(q_k, q_j))``, at most 0, over all latent sites of a guide's trace.

    Several networks in one model have independent mixtures, whose corrections add up.

    :raises ValueError: when a site of the guide is a point, or of a family without a closed form.
    """
    totals: dict[str, Any] = {}
    betas: dict[str, Any] = {}
    for name, site in guide_trace.nodes.items():
        frame = _members_frame(site) if site["type"] == "sample" else None
        if frame is None or site["is_observed"] or type(site["fn"]).__name__ == "_Subsample":
            continue
        totals[frame.name] = totals.get(frame.name, 0.0) + _pairwise(name, site["fn"], frame.dim)
        betas[frame.name] = site["scale"] * math.prod(f.size for f in site["cond_indep_stack"])
    if not totals:
        raise ValueError("mixture_kl='kt' needs a guide with a members plate, such as Rank1Guide")
    corrections = [betas[n] * ((-d).logsumexp(1) - math.log(len(d))).mean() for n, d in totals.items()]
    return torch.stack(corrections).sum()


def _pairwise(name: str, fn: Any, dim: int) -> Tensor:
    """Bhattacharyya distances ``[K, K]`` between the members of one site."""
    base = fn.in_full if isinstance(fn, FactorisedNormal) else fn
    while isinstance(base, torch.distributions.Independent):
        base = base.base_dist
    if isinstance(base, Delta):
        raise ValueError(
            f"mixture_kl='kt' bounds the divergence of random sites, but {name!r} is a point in every member: build "
            "the model with member_bias=False, or use 'mean'"
        )
    batch = len(fn.batch_shape)
    if batch + dim != 0:
        raise ValueError("mixture_kl='kt' does not go with vectorize_particles or plates left of the members")

    def members(value: Tensor) -> Tensor:  # all rows have the same distribution: the first stands for them
        value = value.expand(fn.batch_shape + fn.event_shape)
        for _ in range(batch - 1):
            value = value[:, 0]
        return value.reshape(value.shape[0], -1)

    if not isinstance(base, (Normal, LogNormal, Cauchy)):
        raise ValueError(f"mixture_kl='kt' has no closed form for the site {name!r} ({type(base).__name__})")
    loc, scale = members(base.loc), members(base.scale)
    distance = _cauchy_distance if isinstance(base, Cauchy) else _normal_distance
    return distance(loc[:, None], scale[:, None], loc[None], scale[None]).sum(-1)


def _normal_distance(m: Tensor, s: Tensor, n: Tensor, t: Tensor) -> Tensor:
    variance = s.square() + t.square()
    return (m - n).square() / (4 * variance) + 0.5 * (variance / (2 * s * t)).log()


def _cauchy_distance(m: Tensor, s: Tensor, n: Tensor, t: Tensor) -> Tensor:
    """The affinity of two Cauchys depends on one invariant u = ((m - n)^2 + (s - t)^2) / (2 s t) alone.

    A Moebius map takes them to scales 1 and v with v + 1/v = 2 (1 + u), whose affinity is sqrt(v) / agm(1, v).
    """
    u = ((m - n).square() + (s - t).square()) / (2 * s * t)
    root = (u * (u + 2) + torch.finfo(u.dtype).tiny).sqrt()
    v = 1 + u + root
    a, g = (1 + v) / 2, v.sqrt()
    log_affinity = 0.5 * v.log()
    for _ in range(12):  # the mean converges quadratically; 12 steps do for any ratio that floats hold
        a, g = (a + g) / 2, (a * g).sqrt()
    return a.log() - log_affinity
