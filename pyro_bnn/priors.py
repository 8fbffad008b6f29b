"""Priors for weights and for multiplicative factors, swapped through the keyword ``prior=``.

A prior is one of the classes here, a Pyro distribution, a callable ``(name, tensor) -> distribution``, or a mapping
``{regular expression: prior}``. ``loc=None`` means the centre that leaves the network as it is: 1 for a factor that
multiplies a weight (rank-1), 0 for a weight itself.

Hierarchical priors have scales of their own as latent sites, named ``<site>_tau`` (one for a whole layer) and
``<site>_lambda`` (one for each element).
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

__all__ = [
    *("Cauchy", "HierarchicalCauchy", "HierarchicalNormal", "Horseshoe", "Laplace", "Normal", "Prior", "PriorLike"),
    *("StudentT", "describe", "from_description", "resolve"),
]


def _require_numbers(owner: object, **positive: float) -> None:
    for name, value in positive.items():
        if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
            raise ValueError(f"{type(owner).__name__}({name}={value!r}): expected a positive finite number")
    loc = getattr(owner, "loc", None)
    if loc is not None and not (isinstance(loc, (int, float)) and math.isfinite(loc)):
        raise ValueError(f"{type(owner).__name__}(loc={loc!r}): expected a finite number, or None for the centre")


class Prior:
    """A prior of one site. Numbers only: it follows the network to any device and dtype."""

    #: whether one ``tau`` is shared by the whole layer
    has_tau: ClassVar[bool] = False
    #: whether every element has a scale ``lambda`` of its own
    has_lambda: ClassVar[bool] = False
    #: whether nothing but the device and dtype changes the distribution, so that it can be built once
    constant: ClassVar[bool] = False
    #: whether a Cauchy has a finite KL divergence from it
    heavy_tails: ClassVar[bool] = True

    def tau(self, like: Tensor) -> dist.TorchDistribution:
        """The distribution of the layer's scale, on the device and with the dtype of ``like``."""
        raise TypeError(f"{type(self).__name__} has no tau")

    def local(self, like: Tensor) -> dist.TorchDistribution:
        """The distribution of one element's scale."""
        raise TypeError(f"{type(self).__name__} has no lambda")

    def elements(self, center: float, like: Tensor, scale: Tensor | None) -> dist.TorchDistribution:
        """The distribution of the elements, with a batch shape that broadcasts against the site.

        :param scale: product of the sampled ``tau`` and ``lambda``; ``None`` when the prior has neither.
        """
        raise NotImplementedError(f"{type(self).__name__} must define elements()")


@dataclass(frozen=True)
class _LocationScale(Prior):
    loc: float | None = None
    scale: float = 1.0
    family: ClassVar[Any]
    constant: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _require_numbers(self, scale=self.scale)

    def elements(self, center: float, like: Tensor, scale: Tensor | None) -> dist.TorchDistribution:
        loc = like.new_full((), center if self.loc is None else self.loc)
        return self.family(loc, like.new_full((), self.scale))


@dataclass(frozen=True)
class Normal(_LocationScale):
    """``N(loc, scale^2)``, independent elements."""

    family = dist.Normal
    heavy_tails: ClassVar[bool] = False


@dataclass(frozen=True)
class Cauchy(_LocationScale):
    """``Cauchy(loc, scale)``, independent elements (Dusenberry et al. 2020, section 3.2)."""

    family = dist.Cauchy


@dataclass(frozen=True)
class Laplace(_LocationScale):
    """``Laplace(loc, scale)``, independent elements."""

    family = dist.Laplace
    heavy_tails: ClassVar[bool] = False


@dataclass(frozen=True)
class StudentT(Prior):
    """``StudentT(df, loc, scale)``, independent elements."""

    df: float = 3.0
    loc: float | None = None
    scale: float = 1.0
    constant: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _require_numbers(self, df=self.df, scale=self.scale)

    def elements(self, center: float, like: Tensor, scale: Tensor | None) -> dist.TorchDistribution:
        loc = center if self.loc is None else self.loc
        return dist.StudentT(like.new_full((), self.df), like.new_full((), loc), like.new_full((), self.scale))


@dataclass(frozen=True)
class HierarchicalCauchy(Prior):
    """tau ~ HalfCauchy(scale), one for a layer; element | tau ~ Cauchy(loc, tau)."""

    scale: float = 0.1
    loc: float | None = None
    has_tau: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _require_numbers(self, scale=self.scale)

    def tau(self, like: Tensor) -> dist.TorchDistribution:
        return dist.HalfCauchy(like.new_full((), self.scale))

    def elements(self, center: float, like: Tensor, scale: Tensor | None) -> dist.TorchDistribution:
        assert scale is not None
        return dist.Cauchy(like.new_full((), center if self.loc is None else self.loc), scale)


@dataclass(frozen=True)
class HierarchicalNormal(Prior):
    """tau^2 ~ InverseGamma(concentration, rate), one for a layer; element | tau ~ N(loc, tau^2).

    Each element is marginally Student-t with ``2 * concentration`` degrees of freedom and scale
    ``sqrt(rate / concentration)``. The site holds the standard deviation tau.
    """

    concentration: float = 2.0
    rate: float = 0.02
    loc: float | None = None
    has_tau: ClassVar[bool] = True
    heavy_tails: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _require_numbers(self, concentration=self.concentration, rate=self.rate)

    def tau(self, like: Tensor) -> dist.TorchDistribution:
        variance = dist.InverseGamma(like.new_full((), self.concentration), like.new_full((), self.rate))
        return dist.TransformedDistribution(variance, [dist.transforms.PowerTransform(like.new_full((), 0.5))])

    def elements(self, center: float, like: Tensor, scale: Tensor | None) -> dist.TorchDistribution:
        assert scale is not None
        return dist.Normal(like.new_full((), center if self.loc is None else self.loc), scale)


@dataclass(frozen=True)
class Horseshoe(Prior):
    """element_i ~ N(loc, (tau lambda_i)^2), lambda_i ~ HalfCauchy(1), and tau ~ HalfCauchy(scale) for a layer.

    Carvalho, Polson and Scott (2010).
    """

    scale: float = 0.1
    loc: float | None = None
    has_tau: ClassVar[bool] = True
    has_lambda: ClassVar[bool] = True
    heavy_tails: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _require_numbers(self, scale=self.scale)

    def tau(self, like: Tensor) -> dist.TorchDistribution:
        return dist.HalfCauchy(like.new_full((), self.scale))

    def local(self, like: Tensor) -> dist.TorchDistribution:
        return dist.HalfCauchy(like.new_full((), 1.0))

    def elements(self, center: float, like: Tensor, scale: Tensor | None) -> dist.TorchDistribution:
        assert scale is not None
        return dist.Normal(like.new_full((), center if self.loc is None else self.loc), scale)


def typical_tau(prior: Prior) -> float:
    """A value from the bulk of the prior of tau, at which a guide starts."""
    if isinstance(prior, HierarchicalNormal):
        return float((prior.rate / prior.concentration) ** 0.5)
    return float(getattr(prior, "scale", 1.0))


class _Fixed(Prior):
    """A Pyro distribution as a prior: a scalar one for every element, or one with the shape of the site."""

    def __init__(self, name: str, distribution: dist.TorchDistribution) -> None:
        self.name, self.distribution = name, distribution

    def elements(self, center: float, like: Tensor, scale: Tensor | None) -> dist.TorchDistribution:
        d = _moved(self.distribution, like)
        shape = d.batch_shape + d.event_shape
        try:
            fits = torch.broadcast_shapes(shape, like.shape) == like.shape
        except RuntimeError:
            fits = False
        fits = fits and d.event_shape == like.shape[like.dim() - len(d.event_shape) :]  # an event cannot be expanded
        if not fits:
            raise ValueError(
                f"the prior of {self.name!r} has shape {tuple(shape)}, the site has {tuple(like.shape)}: give a "
                "scalar distribution, or one that broadcasts to the shape of the site"
            )
        return d


def _moved(value: Any, like: Tensor) -> Any:
    """A distribution, whatever it is made of, with its tensors on the device and with the dtype of ``like``."""
    if isinstance(value, Tensor):
        return value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)
    if isinstance(value, list):
        return [_moved(one, like) for one in value]
    if isinstance(value, torch.distributions.transforms._InverseTransform):
        return _moved(value.inv, like).inv
    if isinstance(value, (torch.distributions.Distribution, torch.distributions.Transform)):
        moved = copy.copy(value)
        for name, part in value.__dict__.items():
            moved.__dict__[name] = None if name == "_inv" else _moved(part, like)  # transforms make inverses anew
        return moved
    return value


PriorLike = (
    Prior
    | dist.TorchDistribution
    | Callable[[str, Tensor], dist.TorchDistribution]
    | Mapping[str, "Prior | dist.TorchDistribution | Callable[[str, Tensor], dist.TorchDistribution]"]
)


def resolve(prior: PriorLike, names: tuple[str, ...], like: Tensor) -> Prior:
    """The prior of one site.

    :param names: the names that a pattern may match, the most specific first (``fc.weight.s``, ``fc.weight``).
    :param like: a tensor with the shape of the site.
    :raises ValueError: when a mapping has no pattern for the site, or a distribution does not have its shape.
    :raises TypeError: when the prior is none of the kinds above.
    """
    if isinstance(prior, Mapping):
        for pattern, one in prior.items():
            if any(re.fullmatch(pattern, name) for name in names):
                return resolve(one, names, like)
        raise ValueError(
            f"no pattern of the prior matches {names[0]!r} (patterns: {', '.join(map(repr, prior))}); the whole name "
            "must match. Add a last pattern '.*' for all others."
        )
    if isinstance(prior, Prior):
        return prior
    if isinstance(prior, TorchDistributionMixin):
        fixed = _Fixed(names[0], prior)
    elif callable(prior):
        result = prior(names[0], like)
        if isinstance(result, Prior):
            return result
        if not isinstance(result, TorchDistributionMixin):
            raise TypeError(f"the prior function returned {type(result).__name__} for {names[0]!r}, not a distribution")
        fixed = _Fixed(names[0], result)
    else:
        raise TypeError(
            f"a prior is a class of pyro_bnn.priors, a Pyro distribution, a function (name, tensor) -> distribution "
            f"or a mapping of patterns to these; got {type(prior).__name__}"
        )
    fixed.elements(0.0, like, None)  # a wrong shape is an error where the prior is given, not where it is used
    return fixed


_BY_NAME = {
    c.__name__: c for c in (Normal, Cauchy, Laplace, StudentT, HierarchicalCauchy, HierarchicalNormal, Horseshoe)
}


def describe(prior: PriorLike | None) -> Any:
    """The prior as JSON.

    :raises TypeError: for a function or a Pyro distribution, which JSON cannot describe.
    """
    if prior is None:
        return None
    if isinstance(prior, Mapping):
        return {"patterns": [[pattern, describe(one)] for pattern, one in prior.items()]}
    if type(prior).__name__ in _BY_NAME and isinstance(prior, Prior):
        return {"class": type(prior).__name__, **asdict(prior)}  # type: ignore[arg-type]
    kind = type(prior).__name__ if isinstance(prior, TorchDistributionMixin) else "a function"
    raise TypeError(f"a prior given as {kind} cannot be written to JSON")


def from_description(description: Any) -> PriorLike | None:
    """The inverse of :func:`describe`.

    :raises ValueError: when the description names no prior of this version.
    """
    if description is None:
        return None
    if "patterns" in description:
        return {pattern: from_description(one) for pattern, one in description["patterns"]}  # type: ignore[misc]
    arguments = dict(description)
    name = arguments.pop("class", None)
    if name not in _BY_NAME or set(arguments) - {f.name for f in fields(_BY_NAME[name])}:
        raise ValueError(f"unknown prior {description!r}; known are {', '.join(_BY_NAME)}")
    return _BY_NAME[name](**arguments)
