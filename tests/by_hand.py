"""The objectives of small networks written out in NumPy and SciPy, against which the library is compared.

Everything here is for a chain of linear layers with tanh between them, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

from pyro_bnn import priors

Array = NDArray[np.float64]


def chain(*sizes: int, seed: int = 0) -> nn.Sequential:
    """Linear layers with tanh between them, in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for i, o in pairwise(sizes):
            layers += [nn.Linear(i, o, dtype=torch.float64), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def scatter(guide: Any, seed: int = 1) -> None:
    """Random means and scales of order one, so that no term of the objective is small by accident."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in guide.named_parameters():
            p.add_(0.4 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
            if name.startswith("rho."):
                p.copy_(-0.5 + 0.5 * torch.randn(p.shape, generator=generator, dtype=p.dtype))


def array(value: Tensor) -> Array:
    return value.detach().double().numpy()


def softplus(v: Array) -> Array:
    return np.log1p(np.exp(-np.abs(v))) + np.maximum(v, 0)


def means_and_scales(model: Any, guide: Any) -> dict[str, tuple[Array, Array | None]]:
    """``{site: (loc [K, *shape], scale [K, *shape])}``, read off the guide's blocks laid side by side."""
    kinds = {"scale": ("scale_loc", "scale_rho"), "bias": ("point", None)}
    offsets: dict[str, int] = {}
    found = {}
    for site in model.sites():
        loc, rho = kinds.get(site.role, ("loc", "rho"))
        start = offsets.get(loc, 0)
        stop = offsets[loc] = start + site.shape.numel()

        def part(name: str, start: int = start, stop: int = stop, shape: Any = site.shape) -> Array:
            flat = np.concatenate([array(block) for block in getattr(guide, name)], 1)
            return flat[:, start:stop].reshape(-1, *shape)

        found[site.name] = part(loc), None if rho is None else softplus(part(rho)) + 1e-7
    return found


def log_prior(prior: Any, value: Array, center: float, scale: Array | float | None) -> Array:
    """Log density of the elements under a prior, given the product of its sampled scales."""
    if isinstance(prior, dist.Distribution):
        return array(prior.log_prob(torch.as_tensor(value)))
    loc = center if prior.loc is None else prior.loc
    match prior:
        case priors.Normal():
            return stats.norm.logpdf(value, loc, prior.scale)
        case priors.Cauchy():
            return stats.cauchy.logpdf(value, loc, prior.scale)
        case priors.Laplace():
            return -np.abs(value - loc) / prior.scale - math.log(2 * prior.scale)
        case priors.StudentT():
            return stats.t.logpdf(value, prior.df, loc, prior.scale)
        case priors.HierarchicalCauchy():
            return stats.cauchy.logpdf(value, loc, scale)
        case priors.HierarchicalNormal() | priors.Horseshoe():
            return stats.norm.logpdf(value, loc, scale)
    raise NotImplementedError(prior)


def expectation(function: Callable[[Array], Array], loc: Array, scale: Array) -> Array:
    """``E function(loc + scale e)``, e ~ N(0, 1), by the trapezoidal rule, which is exact here as all poles of the
    functions are further than a hundredth of ``scale`` away."""
    e = np.linspace(-12, 12, 12_001)
    weight = np.exp(-e * e / 2)
    return (function(loc[..., None] + scale[..., None] * e) * weight).sum(-1) / weight.sum()


def log_prior_of_tau(prior: Any, tau: Array) -> Array:
    if isinstance(prior, priors.HierarchicalNormal):  # of the variance, times d tau^2 / d tau
        return stats.invgamma.logpdf(tau**2, prior.concentration, scale=prior.rate) + np.log(2 * tau)
    return stats.halfcauchy.logpdf(tau, scale=prior.scale)


def divergence(
    prior: Any, family: str, value: Array, loc: Array, scale: Array, center: float, by: Array | float | None
) -> Array:
    """KL(q || p) of every element: in closed form or by an integral, else log q - log p at the draw."""
    m = center if getattr(prior, "loc", None) is None else prior.loc
    if family == "normal":
        if isinstance(prior, (priors.Normal, priors.HierarchicalNormal, priors.Horseshoe)):
            s = prior.scale if isinstance(prior, priors.Normal) else by
            return np.broadcast_to(np.log(s / scale) + (scale**2 + (loc - m) ** 2) / (2 * s**2) - 0.5, value.shape)
        if isinstance(prior, priors.Laplace):
            d = loc - m
            folded = scale * math.sqrt(2 / math.pi) * np.exp(-(d**2) / (2 * scale**2)) + d * (
                1 - 2 * stats.norm.cdf(-d / scale)
            )
            entropy = 0.5 * np.log(2 * math.pi * math.e * scale**2)
            return np.broadcast_to(np.log(2 * prior.scale) + folded / prior.scale - entropy, value.shape)
        if isinstance(prior, (priors.Cauchy, priors.StudentT, priors.HierarchicalCauchy)):
            cross = expectation(
                lambda w: log_prior(prior, w, center, None if by is None else by[..., None]), loc, scale
            )
            return np.broadcast_to(-cross - stats.norm.entropy(loc, scale), value.shape)
        return stats.norm.logpdf(value, loc, scale) - log_prior(prior, value, center, by)
    if isinstance(prior, (priors.Cauchy, priors.HierarchicalCauchy)):
        s = prior.scale if isinstance(prior, priors.Cauchy) else by
        return np.broadcast_to(np.log(((scale + s) ** 2 + (loc - m) ** 2) / (4 * scale * s)), value.shape)
    return stats.cauchy.logpdf(value, loc, scale) - log_prior(prior, value, center, by)


def affinity(family: str, m: float, s: float, n: float, t: float) -> float:
    """Integral of sqrt(q_1 q_2), by the trapezoidal rule after x = c + w tan(angle), which makes it periodic."""
    angle = (np.arange(20_000) + 0.5) / 20_000 * np.pi - np.pi / 2
    width = math.sqrt(s * t)
    x = (m + n) / 2 + width * np.tan(angle)
    log = stats.cauchy.logpdf if family == "cauchy" else stats.norm.logpdf
    return float((np.exp(0.5 * (log(x, m, s) + log(x, n, t))) * width / np.cos(angle) ** 2).mean() * np.pi)


@dataclass
class Parts:
    """What an ELBO is made of, for one set of draws."""

    likelihood: float
    log_weights: float
    kl: float

    @property
    def elbo(self) -> float:
        return self.likelihood + self.log_weights - self.kl


def parts(
    model: Any,
    guide: Any,
    values: dict[str, Tensor],
    x: Tensor,
    y: Tensor,
    *,
    prior: Any,
    mixture_kl: str = "mean",
    likelihood_bound: str = "average",
) -> Parts:
    """The parts of the ELBO of a rank-1 or dense network with one prior for all, at the draws of one guide call."""
    count = guide.num_members
    family, center = guide.family, 1.0 if any(s.role == "factor" for s in model.sites()) else 0.0
    draws = {}
    for site in model.sites():
        value = array(values[site.name])
        draws[site.name] = value.reshape(count, -1, *site.shape)
    q = means_and_scales(model, guide)
    kl = np.zeros(count)
    for site in model.sites():
        value, (loc, scale) = draws[site.name], q[site.name]
        loc = loc[:, None]
        if site.role == "bias":
            terms = -log_prior(model.weight_prior, value, 0.0, None)
        elif site.role == "scale":
            if site.name.endswith("_lambda"):  # at the draw
                log_q = stats.lognorm.logpdf(value, scale[:, None], scale=np.exp(loc))
                terms = log_q - stats.halfcauchy.logpdf(value)
            else:
                noise = priors.HierarchicalCauchy(model.likelihood.noise_prior_scale) if site.name == "noise" else prior
                own = lambda u, p=noise: log_prior_of_tau(p, np.exp(u))  # noqa: E731
                terms = -loc - stats.norm.entropy(loc, scale[:, None]) - expectation(own, loc, scale[:, None])
        else:
            weight = site.name.removesuffix(".s").removesuffix(".r")
            by: Any = None
            if f"{weight}_tau" in draws:
                by = draws[f"{weight}_tau"].reshape(count, 1, *[1] * len(site.shape))
            if f"{site.name}_lambda" in draws:
                by = by * draws[f"{site.name}_lambda"]
            terms = divergence(prior, family, value, loc, scale[:, None], center, by)
        kl += terms.reshape(*terms.shape[:2], -1).sum(-1).mean(1)
    total = float(kl.sum() if mixture_kl == "sum" else kl.mean())
    if mixture_kl == "kt":
        total += kolchinsky_tracey(model, guide, q)
    log_y = log_likelihood(model, draws, x, y)
    each = np.logaddexp.reduce(log_y, 0) - math.log(count) if likelihood_bound == "mixture" else log_y.mean(0)
    likelihood = model.num_data / len(y) * float(each.sum()) / model.likelihood.temperature
    log_weights = 0.0
    if center == 1.0 and model.weight_prior is not None:
        for name in model.weights:
            w = array(dict(model.core().net.named_parameters())[name])
            log_weights += float(log_prior(model.weight_prior, w, 0.0, None).sum())
    return Parts(likelihood, log_weights, total)


def kolchinsky_tracey(model: Any, guide: Any, q: dict[str, tuple[Array, Array | None]]) -> float:
    count = guide.num_members
    log_affinity = np.zeros((count, count))
    for site in model.sites():
        loc, scale = q[site.name]
        family = "normal" if site.role == "scale" else guide.family  # a log-normal's is that of its logarithm
        for i in range(count):
            for j in range(count):
                for a in zip(loc[i].flat, scale[i].flat, loc[j].flat, scale[j].flat, strict=True):
                    log_affinity[i, j] += math.log(affinity(family, *a)) if i != j else 0.0
    return float(np.log(np.exp(log_affinity).mean(1)).mean())


def log_likelihood(model: Any, draws: dict[str, Array], x: Tensor, y: Tensor) -> Array:
    """``[K, B]``: every member's log p(y_b | x_b), each row with explicit weights of its own."""
    point = {n: array(p) for n, p in model.core().net.named_parameters()}
    count = next(iter(draws.values())).shape[0]
    result = np.zeros((count, len(y)))
    kind = type(model.likelihood).__name__
    for k in range(count):
        for b in range(len(y)):

            def pick(name: str, k: int = k, b: int = b) -> Array:
                value = draws[name][k]
                return value[b if len(value) > 1 else 0]

            h = array(x[b])
            layers = sorted({n.split(".")[0] for n in point}, key=int)
            for layer in layers:
                name = f"{layer}.weight"
                weight = pick(name) if name in draws else point[name]
                if f"{name}.r" in draws:
                    weight = weight * np.outer(pick(f"{name}.r"), pick(f"{name}.s"))
                bias_name = f"{layer}.bias"
                bias = pick(bias_name) if bias_name in draws else point.get(bias_name, 0.0)
                h = weight @ h + bias
                if layer != layers[-1]:
                    h = np.tanh(h)
            if kind == "Gaussian":
                noise = model.likelihood.scale or pick("noise")
                result[k, b] = stats.norm.logpdf(array(y[b]).reshape(-1), h, noise).sum()
            elif kind == "Categorical":
                result[k, b] = h[int(y[b])] - np.logaddexp.reduce(h)
            else:
                raise NotImplementedError(kind)
    return result
