"""Priors of independent elements, some with scales that are latent sites."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_bnn import display
from pyro_bnn.entry import checks


def require_numbers(owner: object, **positive: float) -> None:
    """Checks the parameters of a prior and converts them to plain numbers, which can be saved.

    :param owner: the prior; its ``loc``, if it has one that is not ``None``, must be finite.
    :param positive: the parameters that must be positive, by name.
    :raises TypeError: for a parameter that is not a number.
    :raises ValueError: for a number out of range.
    """
    for name, value in positive.items():
        object.__setattr__(owner, name, checks.positive(f"{type(owner).__name__}.{name}", value))
    loc = getattr(owner, "loc", None)
    if loc is not None:
        object.__setattr__(owner, "loc", checks.finite(f"{type(owner).__name__}.loc", loc))


class RootInverseGamma(dist.TransformedDistribution):
    """The distribution of a standard deviation whose square is ``InverseGamma(concentration, rate)``."""

    def __init__(self, concentration: Tensor, rate: Tensor) -> None:
        self.concentration, self.rate = concentration, rate
        root = dist.transforms.PowerTransform(concentration.new_full((), 0.5))
        super().__init__(dist.InverseGamma(concentration, rate), [root])

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> RootInverseGamma:
        return RootInverseGamma(*(v.expand(torch.Size(batch_shape)) for v in (self.concentration, self.rate)))


def root_of_inverse_gamma(like: Tensor, concentration: float, rate: float) -> RootInverseGamma:
    """The prior of a layer's standard deviation, on the device and with the dtype of ``like``."""
    return RootInverseGamma(like.new_full((), concentration), like.new_full((), rate))


def location(loc: float | None, center: float | Tensor, like: Tensor) -> Tensor:
    """The location of a prior: ``loc``, or the centre of the site if ``loc`` is ``None``."""
    place = center if loc is None else loc
    return place if isinstance(place, Tensor) else like.new_full((), place)


class Prior:
    """Base class of priors of one site. A prior holds plain numbers only, so it works on any device and with any dtype.

    A subclass defines :meth:`elements`, and the other methods if it has a ``tau``, ``lambda`` or ``inclusion``.
    """

    #: whether one ``tau`` is shared by the whole layer
    has_tau: ClassVar[bool] = False
    #: whether every element has its own scale ``lambda``
    has_lambda: ClassVar[bool] = False
    #: whether the prior inclusion probability, one number for the whole layer, is itself random
    has_inclusion: ClassVar[bool] = False
    #: whether the distribution depends only on the device and dtype, so that it can be built once
    is_constant: ClassVar[bool] = False
    #: whether the KL divergence of a Cauchy from this prior is finite
    has_heavy_tails: ClassVar[bool] = True
    #: whether the elements are centred at the values that the network has when it is given to a model
    is_pretrained: ClassVar[bool] = False

    def __repr__(self) -> str:
        return display.call(self)

    def require_fit(self, name: str, like: Tensor) -> None:
        """Checks that the prior fits a site.

        :param name: name of the site, for the message.
        :param like: a tensor with the shape of the site.
        :raises ValueError: when it does not fit.
        """

    def tau(self, like: Tensor) -> dist.TorchDistribution:
        """The distribution of the layer's scale, on the device and with the dtype of ``like``.

        :raises TypeError: for a prior without ``tau``.
        """
        raise TypeError(f"{type(self).__name__} has no tau")

    def typical_tau(self) -> float:
        """A typical value of tau under its prior, at which a guide starts.

        :raises TypeError: for a prior without ``tau``.
        """
        raise TypeError(f"{type(self).__name__} has no tau")

    def local(self, like: Tensor) -> dist.TorchDistribution:
        """The distribution of the scale of one element, on the device and with the dtype of ``like``.

        :raises TypeError: for a prior without ``lambda``.
        """
        raise TypeError(f"{type(self).__name__} has no lambda")

    def share(self, like: Tensor) -> dist.TorchDistribution:
        """The distribution of the prior inclusion probability, on the device and with the dtype of ``like``.

        :raises TypeError: for a prior without a random inclusion probability.
        """
        raise TypeError(f"{type(self).__name__} has no inclusion")

    def typical_share(self) -> float:
        """The mean of the prior inclusion probability, at which a guide starts.

        :raises TypeError: for a prior without a random inclusion probability.
        """
        raise TypeError(f"{type(self).__name__} has no inclusion")

    def with_share(self, share: Tensor) -> Prior:
        """The prior given the inclusion probability.

        :param share: the inclusion probability, ``[*batch]``.
        :raises TypeError: for a prior without a random inclusion probability.
        """
        raise TypeError(f"{type(self).__name__} has no inclusion")

    def constants(self, center: float) -> dict[str, float]:
        """Those parameters of the distribution of the elements that are one number for all, by name."""
        return {}

    def elements(self, center: float | Tensor, like: Tensor, scale: Tensor | None) -> dist.TorchDistribution:
        """The distribution of the elements, with a batch shape that broadcasts against the site.

        :param center: what ``loc=None`` means: a number, or a tensor of the shape of the site.
        :param like: a tensor with the shape, device and dtype of the site.
        :param scale: product of the sampled ``tau`` and ``lambda``; ``None`` when the prior has neither.
        """
        raise NotImplementedError(f"{type(self).__name__} must define elements()")


@dataclass(frozen=True)
class _LocationScale(Prior):
    loc: float | None = None
    scale: float = 1.0
    family: ClassVar[Any]
    is_constant: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_numbers(self, scale=self.scale)

    def elements(self, center: float | Tensor, like: Tensor, scale: Tensor | None) -> dist.TorchDistribution:
        return self.family(location(self.loc, center, like), like.new_full((), self.scale))

    def constants(self, center: float) -> dict[str, float]:
        return {"loc": center if self.loc is None else self.loc, "scale": self.scale}


@dataclass(frozen=True)
class Normal(_LocationScale):
    """``N(loc, scale^2)``, independent elements.

    :param loc: the mean; ``None`` for the centre that the model sets: 1 for a factor, 0 for a weight.
    :param scale: the standard deviation, in the units of the elements.
    :raises TypeError: for a parameter that is not a number.
    :raises ValueError: for a ``loc`` that is not finite, or a ``scale`` that is not positive.
    """

    family = dist.Normal
    has_heavy_tails: ClassVar[bool] = False


@dataclass(frozen=True)
class Pretrained(Prior):
    """``N(w*, scale^2)``, independent elements, around the weights w* of the given network; see :func:`pretrained`."""

    scale: float = 0.1
    is_constant: ClassVar[bool] = True
    has_heavy_tails: ClassVar[bool] = False
    is_pretrained: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_numbers(self, scale=self.scale)

    def elements(self, center: float | Tensor, like: Tensor, scale: Tensor | None) -> dist.TorchDistribution:
        if not isinstance(center, Tensor):
            raise ValueError(
                "pretrained() is a prior around weights of the given network, and what has it here is no such weight: "
                "use Normal(loc, scale) for factors, shared values and point estimates"
            )
        return dist.Normal(center, like.new_full((), self.scale))


def pretrained(scale: float = 0.1) -> Pretrained:
    """A prior around the weights w* that the network has when it is given to a model::

        w_i ~ N(w*_i, scale^2)

    For networks that were trained before: the posterior then starts, and without data stays, at what they have learned
    (MOPED; Krishnan, Subedar and Tickoo 2020, *AAAI*). It keeps w* as part of the model, in saved posteriors too. It
    is a prior for parameters of the network themselves: of ``Dense``, ``WeightSharing`` and ``SpikeSlab``, and for the
    gains and biases of ``Bella``.

    :param scale: the standard deviation, in the units of the weights; a mapping ``{pattern: pretrained(scale)}`` sets
        it by layer.
    :raises TypeError: for a scale that is not a number.
    :raises ValueError: for a scale that is not positive.
    """
    return Pretrained(scale)


@dataclass(frozen=True)
class Cauchy(_LocationScale):
    """``Cauchy(loc, scale)``, independent elements (Dusenberry et al. 2020, section 3.2).

    :param loc: the median; ``None`` for the centre that the model sets: 1 for a factor, 0 for a weight.
    :param scale: half the interquartile range, in the units of the elements.
    :raises TypeError: for a parameter that is not a number.
    :raises ValueError: for a ``loc`` that is not finite, or a ``scale`` that is not positive.
    """

    family = dist.Cauchy


@dataclass(frozen=True)
class Laplace(_LocationScale):
    """``Laplace(loc, scale)``, independent elements: density ``exp(-|w - loc| / scale) / (2 scale)``.

    :param loc: the mean; ``None`` for the centre that the model sets: 1 for a factor, 0 for a weight.
    :param scale: the mean absolute deviation, in the units of the elements.
    :raises TypeError: for a parameter that is not a number.
    :raises ValueError: for a ``loc`` that is not finite, or a ``scale`` that is not positive.
    """

    family = dist.Laplace
    has_heavy_tails: ClassVar[bool] = False


@dataclass(frozen=True)
class StudentT(Prior):
    """``StudentT(df, loc, scale)`` with ``df`` degrees of freedom, independent elements.

    :param df: degrees of freedom; 1 is a Cauchy distribution, and a large number is close to a Normal one.
    :param loc: the median; ``None`` for the centre that the model sets: 1 for a factor, 0 for a weight.
    :param scale: factor on a standard Student-t variable, in the units of the elements.
    :raises TypeError: for a parameter that is not a number.
    :raises ValueError: for a ``loc`` that is not finite, or a ``df`` or ``scale`` that is not positive.
    """

    df: float = 3.0
    loc: float | None = None
    scale: float = 1.0
    is_constant: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_numbers(self, df=self.df, scale=self.scale)

    def elements(self, center: float | Tensor, like: Tensor, scale: Tensor | None) -> dist.TorchDistribution:
        loc = location(self.loc, center, like)
        return dist.StudentT(like.new_full((), self.df), loc, like.new_full((), self.scale))

    def constants(self, center: float) -> dict[str, float]:
        return {"df": self.df, "loc": center if self.loc is None else self.loc, "scale": self.scale}


@dataclass(frozen=True)
class HierarchicalCauchy(Prior):
    """tau ~ HalfCauchy(scale), one for a layer; element | tau ~ Cauchy(loc, tau).

    :param scale: the median of tau, in the units of the elements.
    :param loc: the median of the elements; ``None`` for the centre that the model sets: 1 for a factor, 0 for a weight.
    :raises TypeError: for a parameter that is not a number.
    :raises ValueError: for a ``loc`` that is not finite, or a ``scale`` that is not positive.
    """

    scale: float = 0.1
    loc: float | None = None
    has_tau: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_numbers(self, scale=self.scale)

    def tau(self, like: Tensor) -> dist.TorchDistribution:
        return dist.HalfCauchy(like.new_full((), self.scale))

    def typical_tau(self) -> float:
        return self.scale

    def elements(self, center: float | Tensor, like: Tensor, scale: Tensor | None) -> dist.TorchDistribution:
        assert scale is not None
        return dist.Cauchy(location(self.loc, center, like), scale)

    def constants(self, center: float) -> dict[str, float]:
        return {"loc": center if self.loc is None else self.loc}


@dataclass(frozen=True)
class HierarchicalNormal(Prior):
    """tau^2 ~ InverseGamma(concentration, rate), one for a layer; element | tau ~ N(loc, tau^2).

    Each element is marginally Student-t with ``2 * concentration`` degrees of freedom and scale
    ``sqrt(rate / concentration)``. The site holds the standard deviation tau.

    :param concentration, rate: parameters of the prior of tau^2; ``rate`` is in the squared units of the elements.
    :param loc: the median of the elements; ``None`` for the centre that the model sets: 1 for a factor, 0 for a weight.
    :raises TypeError: for a parameter that is not a number.
    :raises ValueError: for a ``loc`` that is not finite, or a ``concentration`` or ``rate`` that is not positive.
    """

    concentration: float = 2.0
    rate: float = 0.02
    loc: float | None = None
    has_tau: ClassVar[bool] = True
    has_heavy_tails: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_numbers(self, concentration=self.concentration, rate=self.rate)

    def tau(self, like: Tensor) -> dist.TorchDistribution:
        return root_of_inverse_gamma(like, self.concentration, self.rate)

    def typical_tau(self) -> float:
        return math.sqrt(self.rate / self.concentration)

    def elements(self, center: float | Tensor, like: Tensor, scale: Tensor | None) -> dist.TorchDistribution:
        assert scale is not None
        return dist.Normal(location(self.loc, center, like), scale)

    def constants(self, center: float) -> dict[str, float]:
        return {"loc": center if self.loc is None else self.loc}


@dataclass(frozen=True)
class Horseshoe(Prior):
    """element_i ~ N(loc, (tau lambda_i)^2), lambda_i ~ HalfCauchy(1), and tau ~ HalfCauchy(scale) for a layer.

    Source: Carvalho, Polson and Scott (2010).

    :param scale: the median of tau, in the units of the elements.
    :param loc: the median of the elements; ``None`` for the centre that the model sets: 1 for a factor, 0 for a weight.
    :raises TypeError: for a parameter that is not a number.
    :raises ValueError: for a ``loc`` that is not finite, or a ``scale`` that is not positive.
    """

    scale: float = 0.1
    loc: float | None = None
    has_tau: ClassVar[bool] = True
    has_lambda: ClassVar[bool] = True
    has_heavy_tails: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_numbers(self, scale=self.scale)

    def tau(self, like: Tensor) -> dist.TorchDistribution:
        return dist.HalfCauchy(like.new_full((), self.scale))

    def typical_tau(self) -> float:
        return self.scale

    def local(self, like: Tensor) -> dist.TorchDistribution:
        return dist.HalfCauchy(like.new_full((), 1.0))

    def elements(self, center: float | Tensor, like: Tensor, scale: Tensor | None) -> dist.TorchDistribution:
        assert scale is not None
        return dist.Normal(location(self.loc, center, like), scale)

    def constants(self, center: float) -> dict[str, float]:
        return {"loc": center if self.loc is None else self.loc}
