"""Which prior a site has: what users may give as ``prior=``, and how it is written to JSON."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from pyro_bnn.priors.families import Prior
from pyro_bnn.registry import build_value, describe_value
from pyro_bnn.selection import pattern_matches


class _Fixed(Prior):
    """A Pyro distribution as a prior: a scalar one for every element, or one with the shape of the site."""

    def __init__(self, name: str, distribution: dist.TorchDistribution) -> None:
        self.name, self.distribution = name, distribution

    def __repr__(self) -> str:
        return repr(self.distribution)

    def elements(self, center: float | Tensor, like: Tensor, scale: Tensor | None) -> dist.TorchDistribution:
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


def _moved(value: object, like: Tensor) -> Any:
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
            moved.__dict__[name] = None if name == "_inv" else _moved(part, like)  # transforms make new inverses
        return moved
    return value


PriorLike = (
    Prior
    | dist.TorchDistribution
    | Callable[[str, Tensor], dist.TorchDistribution]
    | Mapping[str, "Prior | dist.TorchDistribution | Callable[[str, Tensor], dist.TorchDistribution]"]
)


def resolve(prior: PriorLike, names: tuple[str, ...], like: Tensor, is_weight: bool = False) -> Prior:
    """The prior of one site.

    :param prior: what the user gave as ``prior=``.
    :param names: the names that a pattern may match, the most specific first (``fc.weight.s``, ``fc.weight``); it may
        also match a module that they are in (``fc``), see :func:`~pyro_bnn.selection.pattern_matches`.
    :param like: a tensor with the shape of the site.
    :param is_weight: whether the site is a parameter of the network, which has a given value.
    :raises ValueError: when a mapping has no pattern for the site, or an invalid one, or a distribution does not have
        its shape, or the prior is around given weights and the site is none.
    :raises TypeError: when the prior is not of a type in ``PriorLike``, or a function returns something else.
    """
    if isinstance(prior, Mapping):
        for pattern, one in prior.items():
            if any(pattern_matches(pattern, name) for name in names):
                return resolve(one, names, like, is_weight)
        raise ValueError(
            f"no pattern of the prior matches {names[0]!r} (patterns: {', '.join(map(repr, prior))}); a pattern "
            "must match its whole name, or that of a module that it is in. Add a last pattern '.*' for all others."
        )
    if isinstance(prior, type):
        raise TypeError(f"prior={prior.__name__}: expected an object and not its class, as {prior.__name__}() is")
    if isinstance(prior, Prior):
        if prior.is_pretrained and not is_weight:
            raise ValueError(
                f"the prior of {names[0]!r} is {prior!r}, around weights of the given network, but {names[0]!r} is no "
                "weight of it: use a prior with a location of its own, such as Normal()"
            )
        prior.require_fit(names[0], like)
        return prior
    if isinstance(prior, TorchDistributionMixin):
        fixed = _Fixed(names[0], prior)
    elif callable(prior):
        result = prior(names[0], like)
        if isinstance(result, Prior):
            return resolve(result, names, like, is_weight)
        if not isinstance(result, TorchDistributionMixin):
            raise TypeError(f"the prior function returned {type(result).__name__} for {names[0]!r}, not a distribution")
        fixed = _Fixed(names[0], result)
    else:
        raise TypeError(
            f"prior={prior!r}: expected an object of pyro_bnn.priors, such as Normal(), a Pyro distribution, a "
            f"function (name, tensor) -> distribution or a mapping of patterns to these, not {type(prior).__name__}"
        )
    fixed.elements(0.0, like, None)  # a wrong shape is an error where the prior is given, not where it is used
    return fixed


def describe(prior: PriorLike | None) -> Any:
    """The prior as JSON.

    :raises TypeError: for a function or a Pyro distribution, which JSON cannot describe, and for a class of your own
        that is not a dataclass of numbers.
    """
    if prior is None:
        return None
    if isinstance(prior, Mapping):
        return {"patterns": [[pattern, describe(one)] for pattern, one in prior.items()]}
    if isinstance(prior, Prior):
        return describe_value(prior, "prior")
    kind = type(prior).__name__ if isinstance(prior, TorchDistributionMixin) else "a function"
    raise TypeError(f"a prior given as {kind} cannot be written to JSON")


def from_description(description: Any) -> PriorLike | None:
    """The inverse of :func:`describe`.

    :raises ValueError: when the description names an unknown class of prior, or one without these fields.
    """
    if description is None:
        return None
    if isinstance(description, dict) and "patterns" in description:
        return {pattern: from_description(one) for pattern, one in description["patterns"]}  # type: ignore[misc]
    return build_value(description, Prior, "prior")
