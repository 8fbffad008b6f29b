"""Likelihoods: the distribution of y given the output f = net(x) of a network.

``f`` has the shape ``[..., N, *output]``: any number of member axes, then the samples. A likelihood turns it into a
Pyro distribution with batch shape ``[..., N]``; axes of y beyond the first (sequences, images, several targets) are
event axes. ``temperature=T`` raises the likelihood to the power 1/T; there is no other scaling.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_bnn.entry import checks
from pyro_bnn.registry import build_value, describe_value

__all__ = ["Bernoulli", "Categorical", "Gaussian", "HeteroscedasticGaussian", "Likelihood", "Poisson"]

_SMALLEST_SCALE = 1e-6  # keeps a heteroscedastic density bounded in float32
#: the label that ``F.cross_entropy`` and the collators of transformers give to what has none
_MISSING = -100


@dataclass(frozen=True)
class Likelihood:
    """Base class of likelihoods.

    :param temperature: T in ``p(y | f)^(1/T)``; 1 gives the Bayesian posterior.
    :raises TypeError: for a temperature that is not a number.
    :raises ValueError: for a temperature that is not positive.
    """

    temperature: float = field(default=1.0, kw_only=True)
    kind: ClassVar[Literal["classification", "regression", "count"]]
    #: whether there is a noise scale to learn, a latent site of the model
    learns_noise: ClassVar[bool] = False
    #: whether the last axis of y is over targets, so that y may omit it when there is only one target
    has_target_axis: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.positive("temperature", self.temperature)

    def distribution(self, f: Tensor, noise: Tensor | None = None) -> dist.TorchDistribution:
        """The distribution of y, whose batch shape is ``[..., N]`` when trailing axes of y are event axes.

        :param f: network output, ``[..., N, *output]``.
        :param noise: learned noise scale that broadcasts to ``[..., N]``, in the units of y; ``None`` without one.
        """
        raise NotImplementedError(f"{type(self).__name__} must define distribution()")

    def of_one_target(self, f: Tensor, noise: Tensor | None = None) -> dist.TorchDistribution:
        """The distribution where the last axis of y has length 1, without that axis."""
        return self.distribution(f.squeeze(-1), noise)

    def require_dtype(self, y: Tensor) -> None:
        """Checks the dtype of y.

        :raises TypeError: when it does not fit this likelihood.
        """

    def require_outputs(self, f: Tensor, lead: int) -> None:
        """Checks the shape of the network's output.

        :param lead: number of axes of f up to and including the axis of the samples.
        :raises ValueError: when it has too few axes.
        """

    def arranged(self, f: Tensor, y: Tensor | None, lead: int) -> Tensor:
        """The network's output with its axes in the order that :meth:`distribution` expects."""
        return f

    def given(self, f: Tensor, y: Tensor | None, noise: Tensor | None = None, lead: int = 1) -> dist.TorchDistribution:
        """The distribution with all axes after the samples as event axes.

        :param lead: number of axes of f up to and including the axis of the samples.
        :raises TypeError: when y has the wrong dtype.
        :raises ValueError: when y has the wrong shape, or a value outside the support.
        """
        if y is not None:
            self.require_dtype(y)
        self.require_outputs(f, lead)
        given, f = f, self.arranged(f, y, lead)
        d = self.distribution(f, noise)
        events = len(d.batch_shape) - lead
        is_plain = y is None or y.dim() == events + len(d.event_shape)
        if self.has_target_axis and events and d.batch_shape[-1] == 1 and is_plain:
            d, events = self.of_one_target(f, noise), events - 1
        expected = d.batch_shape[lead - 1 :] + d.event_shape
        if y is not None and y.shape != expected:
            raise ValueError(
                f"{type(self).__name__}: y has shape {tuple(y.shape)}; for a network output of shape "
                f"{tuple(given.shape[lead - 1 :])} it should have {tuple(expected)}"
            )
        return d.to_event(events) if events else d

    def check(self, y: Tensor, f: Tensor) -> None:
        """Checks that the values of y are in the support. It reads values, so call it outside loops.

        :param f: the network's output for these samples, ``[N, *output]``.
        :raises ValueError: when some are not.
        """

    def labelled(self, y: Tensor) -> Tensor | None:
        """Where y holds a target, booleans of its shape; ``None`` when it does so everywhere."""
        return None

    def describe(self) -> dict[str, Any]:
        """Describes the likelihood for JSON: the name of its class and its fields.

        :raises TypeError: for a class of your own that is not a dataclass of numbers, strings and tuples of these.
        """
        return describe_value(self, "likelihood")


def from_description(description: dict[str, Any]) -> Likelihood:
    """The inverse of :meth:`Likelihood.describe`.

    :raises ValueError: when the description does not name a known likelihood.
    """
    if description.get("class") == "Categorical":
        description = {"class_dim": -1, **description}  # the defaults that older versions did not write
    return build_value(description, Likelihood, "likelihood")


def _require_finite(y: Tensor, name: str) -> None:
    if not bool(torch.isfinite(y).all()):
        raise ValueError(f"{name}: y holds NaN or infinite values; drop or impute these samples")


@dataclass(frozen=True)
class Categorical(Likelihood):
    """``y ~ Categorical(softmax(f))``; f is ``[..., N, C]`` logits, y integers in ``0 ... C - 1``, ``[N]``.

    Each sample may have many labels: for sequences, y ``[N, T]`` with logits ``[N, T, C]``; for segmented images, y
    ``[N, H, W]`` with logits ``[N, C, H, W]`` and ``class_dim=1``, as in ``F.cross_entropy``. Predicted probabilities
    always have the classes on the last axis.

    With ``ignore_index`` labels may be missing, as where a sequence is padded or a prompt is given::

        log p(y_n | f_n) = sum_{t: y_nt != ignore_index} log softmax(f_nt)[y_nt]

    A masked label adds exactly 0 to this sum and to its gradient, as in ``F.cross_entropy``, and no score counts it. A
    row stays one datum, whatever number of labels it has: ``num_data`` and the scale of minibatches count all rows, and
    a row without labels has a log-likelihood of 0. Scores average over the labels that are there, or, where a datum is
    a row, over the rows with at least one.

    :param class_dim: the class axis of the network's output, counted from the axis of the samples (0) or from the end.
        ``None`` means the last axis; labels that would also fit axis 1 are then refused as ambiguous.
    :param ignore_index: the label that means that there is none, such as the -100 of ``F.cross_entropy`` and of
        transformers; it may also be a class, such as the token for padding. ``None``: every label counts, and -100 is
        refused like any other number that is no class.
    :param temperature: see :class:`Likelihood`.
    :raises TypeError: for a temperature or an ``ignore_index`` that is not a number.
    :raises ValueError: for axis 0, a ``class_dim`` or ``ignore_index`` that is not a whole number, or a temperature
        that is not positive.
    """

    class_dim: int | None = field(default=None, kw_only=True)
    ignore_index: int | None = field(default=None, kw_only=True)
    kind = "classification"
    has_target_axis: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.class_dim is not None and (
            not isinstance(self.class_dim, int) or isinstance(self.class_dim, bool) or self.class_dim == 0
        ):
            raise ValueError(
                f"class_dim={self.class_dim!r}: expected the axis of the classes in the network's output, 1 for "
                "[N, C, ...] or -1 for [N, ..., C]; axis 0 is over the samples"
            )
        object.__setattr__(self, "ignore_index", checks.optional(checks.label, "ignore_index", self.ignore_index))

    def arranged(self, f: Tensor, y: Tensor | None, lead: int) -> Tensor:
        """Classes last.

        :raises ValueError: when the output has no such axis, or nothing tells which axis it is.
        """
        output = f.shape[lead - 1 :]
        last, second = output[:-1], output[:1] + output[2:]
        if self.class_dim is not None:
            axis = self.class_dim % len(output) if self.class_dim < 0 else self.class_dim
            if not -len(output) < self.class_dim < len(output):
                raise ValueError(
                    f"Categorical(class_dim={self.class_dim}): the network's output has shape {tuple(output)}, without "
                    "such an axis after the axis of the samples"
                )
            return f.movedim(lead - 1 + axis, -1)
        if y is not None and len(output) > 2 and y.shape == second:
            which = "its classes may be on axis 1 or on the last one" if second == last else "its classes are on axis 1"
            raise ValueError(
                f"Categorical: y has shape {tuple(y.shape)} and the network's output {tuple(output)}: {which}. Say "
                "which: Categorical(class_dim=1) for [N, C, ...], as F.cross_entropy takes them, or class_dim=-1 for "
                "[N, ..., C]"
            )
        return f

    def distribution(self, f: Tensor, noise: Tensor | None = None) -> dist.TorchDistribution:
        return dist.Categorical(logits=f) if self.ignore_index is None else _MaskedCategorical(f, self.ignore_index)

    def labelled(self, y: Tensor) -> Tensor | None:
        return None if self.ignore_index is None else y != self.ignore_index

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
        there = self.labelled(y)
        if not (labels := y if there is None else y[there]).numel():
            return
        low, high, classes = int(labels.min()), int(labels.max()), self.arranged(f, None, 1).shape[-1]
        if low < 0 or high >= classes:
            masked = f", or be ignore_index={self.ignore_index}" if self.ignore_index is not None else ""
            if self.ignore_index is None and low == _MISSING:
                masked = f". Where {_MISSING} means that a label is missing, write Categorical(ignore_index={_MISSING})"
            raise ValueError(
                f"Categorical: y holds label {low if low < 0 else high}, but the network has {classes} outputs; "
                f"labels must lie in 0 ... {classes - 1}{masked}"
            )


class _MaskedCategorical(dist.Categorical):
    """A Categorical that holds ``ignore_index`` for possible too, with a log density of 0."""

    def __init__(self, logits: Tensor, ignore_index: int, validate_args: bool | None = None) -> None:
        self.ignore_index = ignore_index
        super().__init__(logits=logits, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> _MaskedCategorical:
        new = self._get_checked_instance(_MaskedCategorical, _instance)
        new.ignore_index = self.ignore_index
        expanded: _MaskedCategorical = super().expand(batch_shape, _instance=new)
        return expanded

    def log_prob(self, value: Tensor) -> Tensor:
        missing = value == self.ignore_index
        log_prob: Tensor = super().log_prob(value.masked_fill(missing, 0))
        return log_prob.masked_fill(missing, 0.0)


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """``y ~ Bernoulli(sigmoid(f))``; f is ``[..., N]`` or ``[..., N, D]`` logits, y of the same shape, 0 or 1.

    y has a floating-point dtype.

    :param temperature: see :class:`Likelihood`.
    :raises TypeError: for a temperature that is not a number.
    :raises ValueError: for a temperature that is not positive.
    """

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

    :param scale: standard deviation of the noise, in the units of y; ``None`` to learn one for all targets.
    :param noise_prior_scale: median of the prior of the learned noise, in the units of y.
    :param temperature: see :class:`Likelihood`.
    :raises TypeError: for a parameter that is not a number.
    :raises ValueError: for a parameter that is not positive.
    """

    scale: float | None = None
    noise_prior_scale: float = 1.0
    kind = "regression"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.optional(checks.positive, "scale", self.scale)
        checks.positive("noise_prior_scale", self.noise_prior_scale)

    @property
    def learns_noise(self) -> bool:  # type: ignore[override]
        return self.scale is None

    def noise_prior(self, like: Tensor) -> dist.TorchDistribution:
        """The prior of the learned noise scale, on the device and with the dtype of ``like``."""
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
    """``y ~ N(m, softplus(v)^2)``, f = [m, v] along the last axis: ``[..., N, 2 D]``; y is ``[N, D]`` or ``[N]``.

    f holds the means m of all D targets first, in the units of y, then their v. 1e-6 is added to the standard deviation
    softplus(v), so that the density stays bounded.

    :param temperature: see :class:`Likelihood`.
    :raises TypeError: for a temperature that is not a number.
    :raises ValueError: for a temperature that is not positive.
    """

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
    """``y ~ Poisson(exp(f))``; f is ``[..., N]`` or ``[..., N, D]`` log rates, y counts of the same shape.

    :param temperature: see :class:`Likelihood`.
    :raises TypeError: for a temperature that is not a number.
    :raises ValueError: for a temperature that is not positive.
    """

    kind = "count"

    def distribution(self, f: Tensor, noise: Tensor | None = None) -> dist.TorchDistribution:
        return dist.Poisson(f.exp())

    def check(self, y: Tensor, f: Tensor) -> None:
        if not bool(((y >= 0) & (y == y.floor()) & torch.isfinite(y)).all()):
            raise ValueError("Poisson: y holds values that are not counts (negative, fractional, infinite or NaN)")
