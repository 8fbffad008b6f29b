"""What the output of a network means: the distribution of y given f = net(x).

``f`` has the shape ``[..., N, *output]``: any number of member axes, then the samples. A likelihood turns it into a
Pyro distribution with batch shape ``[..., N]``; axes of y beyond the first (sequences, images, several targets) are
event axes. ``temperature=T`` raises the likelihood to the power 1/T, and is the only scaling there is.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Bernoulli", "Categorical", "Gaussian", "HeteroscedasticGaussian", "Likelihood", "Poisson"]

_SMALLEST_SCALE = 1e-6  # keeps a heteroscedastic density bounded in float32


@dataclass(frozen=True)
class Likelihood:
    """Base class. ``temperature`` is T in ``p(y | f)^(1/T)``; 1 is Bayes."""

    temperature: float = field(default=1.0, kw_only=True)
    kind: ClassVar[Literal["classification", "regression", "count"]]
    #: whether there is a noise scale to learn, a latent site of the model
    learns_noise: ClassVar[bool] = False
    #: whether the last axis of y is over targets, so that y may leave it out where there is one
    has_target_axis: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature!r}: expected a positive number (1 is the plain posterior)")

    def distribution(self, f: Tensor, noise: Tensor | None = None) -> dist.TorchDistribution:
        """The distribution of y, batch shape ``[..., N]`` once trailing axes of y are event axes."""
        raise NotImplementedError(f"{type(self).__name__} must define distribution()")

    def of_one_target(self, f: Tensor, noise: Tensor | None = None) -> dist.TorchDistribution:
        """The distribution where the last axis of y has length 1, without that axis."""
        return self.distribution(f.squeeze(-1), noise)

    def require_dtype(self, y: Tensor) -> None:
        """Raises TypeError when y has a dtype that this likelihood is not for."""

    def require_outputs(self, f: Tensor, lead: int) -> None:
        """Raises ValueError when the network's output has too few axes."""

    def given(self, f: Tensor, y: Tensor | None, noise: Tensor | None = None, lead: int = 1) -> dist.TorchDistribution:
        """The distribution with all axes after the samples as event axes.

        :param lead: number of axes of f up to and with that of the samples.
        :raises TypeError: when y has the wrong dtype.
        :raises ValueError: when y has the wrong shape, or a value outside the support.
        """
        if y is not None:
            self.require_dtype(y)
        self.require_outputs(f, lead)
        d = self.distribution(f, noise)
        events = len(d.batch_shape) - lead
        is_plain = y is None or y.dim() == events + len(d.event_shape)
        if self.has_target_axis and events and d.batch_shape[-1] == 1 and is_plain:
            d, events = self.of_one_target(f, noise), events - 1
        expected = d.batch_shape[lead - 1 :] + d.event_shape
        if y is not None and y.shape != expected:
            raise ValueError(
                f"{type(self).__name__}: y has shape {tuple(y.shape)}; for a network output of shape "
                f"{tuple(f.shape[lead - 1 :])} it should have {tuple(expected)}"
            )
        return d.to_event(events) if events else d

    def check(self, y: Tensor, f: Tensor) -> None:
        """Raises when the values of y cannot have come from this likelihood. Reads values: call it outside loops.

        :param f: the network's output for these samples, ``[N, *output]``.
        """

    def describe(self) -> dict[str, object]:
        """The likelihood as JSON."""
        return {"class": type(self).__name__, **asdict(self)}


def from_description(description: dict[str, Any]) -> Likelihood:
    """The inverse of :meth:`Likelihood.describe`.

    :raises ValueError: when the description names no likelihood of this version.
    """
    arguments = dict(description)
    known = {c.__name__: c for c in (Categorical, Bernoulli, Gaussian, HeteroscedasticGaussian, Poisson)}
    cls = known.get(arguments.pop("class", ""))
    if cls is None or set(arguments) - {f.name for f in fields(cls)}:
        raise ValueError(f"unknown likelihood {description!r}; known are {', '.join(known)}")
    return cls(**arguments)


def _require_finite(y: Tensor, name: str) -> None:
    if not bool(torch.isfinite(y).all()):
        raise ValueError(f"{name}: y holds NaN or infinite values; drop or impute these samples")


@dataclass(frozen=True)
class Categorical(Likelihood):
    """``y ~ Categorical(softmax(f))``; f is ``[..., N, C]`` logits, y integers in ``0 ... C - 1``, ``[N]``."""

    kind = "classification"
    has_target_axis: ClassVar[bool] = False

    def distribution(self, f: Tensor, noise: Tensor | None = None) -> dist.TorchDistribution:
        return dist.Categorical(logits=f)

    def require_dtype(self, y: Tensor) -> None:
        if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            raise TypeError(
                f"Categorical: y has dtype {y.dtype}; class labels must be integers (y.long()), numbered from 0"
            )

    def require_outputs(self, f: Tensor, lead: int) -> None:
        if f.dim() == lead:
            raise ValueError(
                f"Categorical: the network's output has shape {tuple(f.shape[lead - 1 :])}, without an axis for the "
                "classes; end the network with one logit for each class"
            )

    def check(self, y: Tensor, f: Tensor) -> None:
        low, high = int(y.min()), int(y.max())
        if low < 0 or high >= f.shape[-1]:
            raise ValueError(
                f"Categorical: y holds label {low if low < 0 else high}, but the network has {f.shape[-1]} outputs; "
                f"labels must lie in 0 ... {f.shape[-1] - 1}"
            )


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """``y ~ Bernoulli(sigmoid(f))``; f is ``[..., N]`` or ``[..., N, D]`` logits, y of the same shape, 0 or 1."""

    kind = "classification"

    def distribution(self, f: Tensor, noise: Tensor | None = None) -> dist.TorchDistribution:
        return dist.Bernoulli(logits=f)

    def require_dtype(self, y: Tensor) -> None:
        if not y.is_floating_point():
            raise TypeError(f"Bernoulli: y has dtype {y.dtype}; give 0 and 1 as floating point (y.float())")

    def check(self, y: Tensor, f: Tensor) -> None:
        if not bool(((y == 0) | (y == 1)).all()):
            raise ValueError("Bernoulli: y holds values other than 0 and 1")


@dataclass(frozen=True)
class Gaussian(Likelihood):
    """``y ~ N(f, scale^2)``; f and y are ``[..., N]`` or ``[..., N, D]``, in the units of y.

    ``scale=None`` learns the noise: a latent site ``noise`` with the prior ``HalfCauchy(noise_prior_scale)``.
    """

    scale: float | None = None
    noise_prior_scale: float = 1.0
    kind = "regression"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("scale", "noise_prior_scale"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"Gaussian({name}={value!r}): expected a positive number, in the units of y")

    @property
    def learns_noise(self) -> bool:  # type: ignore[override]
        return self.scale is None

    def noise_prior(self, like: Tensor) -> dist.TorchDistribution:
        return dist.HalfCauchy(like.new_full((), self.noise_prior_scale))

    def distribution(self, f: Tensor, noise: Tensor | None = None) -> dist.TorchDistribution:
        if self.scale is not None:
            return dist.Normal(f, f.new_full((), self.scale))
        if noise is None:
            raise ValueError("Gaussian(scale=None) needs the latent noise scale")
        return dist.Normal(f, noise.reshape(noise.shape + (1,) * (f.dim() - noise.dim())))

    def require_dtype(self, y: Tensor) -> None:
        if not y.is_floating_point():
            raise TypeError(f"Gaussian: y has dtype {y.dtype}; a regression target must be floating point (y.float())")

    def check(self, y: Tensor, f: Tensor) -> None:
        _require_finite(y, "Gaussian")


@dataclass(frozen=True)
class HeteroscedasticGaussian(Likelihood):
    """``y ~ N(m, softplus(v)^2)``, f = [m, v] along the last axis: ``[..., N, 2 D]``; y is ``[N, D]`` or ``[N]``."""

    kind = "regression"

    def distribution(self, f: Tensor, noise: Tensor | None = None) -> dist.TorchDistribution:
        if f.shape[-1] % 2:
            raise ValueError(
                f"HeteroscedasticGaussian: the network's output has {f.shape[-1]} features; it needs an even number, "
                "a mean and an (unconstrained) scale for each target"
            )
        mean, raw = f.chunk(2, -1)
        return dist.Normal(mean, F.softplus(raw) + _SMALLEST_SCALE)

    def of_one_target(self, f: Tensor, noise: Tensor | None = None) -> dist.TorchDistribution:
        mean, raw = f.unbind(-1)
        return dist.Normal(mean, F.softplus(raw) + _SMALLEST_SCALE)

    def require_dtype(self, y: Tensor) -> None:
        if not y.is_floating_point():
            raise TypeError(f"HeteroscedasticGaussian: y has dtype {y.dtype}; expected floating point (y.float())")

    def require_outputs(self, f: Tensor, lead: int) -> None:
        if f.dim() == lead:
            raise ValueError(
                f"HeteroscedasticGaussian: the network's output has shape {tuple(f.shape[lead - 1 :])}, without an "
                "axis for mean and scale; end the network with two outputs for each target"
            )

    def check(self, y: Tensor, f: Tensor) -> None:
        _require_finite(y, "HeteroscedasticGaussian")


@dataclass(frozen=True)
class Poisson(Likelihood):
    """``y ~ Poisson(exp(f))``; f is ``[..., N]`` or ``[..., N, D]`` log rates, y counts of the same shape."""

    kind = "count"

    def distribution(self, f: Tensor, noise: Tensor | None = None) -> dist.TorchDistribution:
        return dist.Poisson(f.exp())

    def check(self, y: Tensor, f: Tensor) -> None:
        if not bool(((y >= 0) & (y == y.floor()) & torch.isfinite(y)).all()):
            raise ValueError("Poisson: y holds values that are no counts (negative, fractional, infinite or NaN)")
