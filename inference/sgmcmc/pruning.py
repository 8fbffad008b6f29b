"""Rules that decide which groups of weights are removed permanently while a chain warms up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pyro_bnn import display
from pyro_bnn.entry import checks
from pyro_bnn.priors import SpikeAndSlabDistribution
from pyro_bnn.sparsity.inclusion import keep_highest

__all__ = ["InclusionRule", "KeFanRule", "MagnitudeRule", "Rule", "SiteGroups"]


@dataclass
class SiteGroups:
    """The groups of one spike-and-slab site in the state of a kernel; ``lead`` is ``(chains,)`` or ``()``.

    :param density: the prior of the site, given its inclusion probability and scale.
    :param weights: ``[*lead, *event]``, a view of the state.
    :param included: probability of the slab for every group by the E-step, ``[*lead, *groups]``.
    :param kept: False for groups that were removed, ``[*lead, *groups]``.
    :param probability: mean of ``P(slab | weights)`` over the steps of the pruning phase so far, ``[*lead, *groups]``.
    """

    density: SpikeAndSlabDistribution
    weights: Tensor
    included: Tensor
    kept: Tensor
    probability: Tensor


class Rule:
    """Base class of pruning rules: a rule says which groups stay."""

    def __repr__(self) -> str:
        return display.call(self)

    def __call__(self, sites: Sequence[SiteGroups], progress: float) -> list[Tensor]:
        """True for groups that stay, ``[*lead, *groups]`` for each site.

        :param sites: the state of every spike-and-slab site.
        :param progress: the fraction of the pruning phase that has passed, in [0, 1].
        """
        raise NotImplementedError(f"{type(self).__name__} must define __call__()")


@dataclass(frozen=True)
class InclusionRule(Rule):
    """Keeps, at the end of warm-up, the groups whose posterior inclusion probability is at least ``threshold``.

    The probability is averaged over the pruning phase, because a single draw would remove every group that is in the
    spike at that moment. A threshold of 1/2 gives the median probability model (Barbieri and Berger 2004).

    :param threshold: a probability in (0, 1).
    :raises TypeError: when it is not a number.
    :raises ValueError: when it is not in (0, 1).
    """

    threshold: float = 0.5

    def __post_init__(self) -> None:
        checks.share("threshold", self.threshold)

    def __call__(self, sites: Sequence[SiteGroups], progress: float) -> list[Tensor]:
        return [site.kept if progress < 1 else site.probability >= self.threshold for site in sites]


@dataclass(frozen=True)
class MagnitudeRule(Rule):
    """Removes the groups with the lowest scores, over all sites together, until a fraction s of weights is gone::

        s = start + (sparsity - start) (1 - decay^(500 progress)),    and ``sparsity`` itself at the end

    (Deng et al. 2019, algorithm 1, with an exponent k / f that runs from 0 to 500 over the pruning phase). The score of
    a group is its mean square; with ``layer_adaptive`` its sum of squares, divided by that of all groups of the same
    site whose mean square is no smaller (LAMP: Lee et al. 2021, arXiv 2010.07611). Every site then keeps its largest
    group, and the scale of a layer does not count; docs/spike_slab.md says when that pays.

    :param sparsity: the final fraction of the weights of all spike-and-slab sites that are removed, in (0, 1).
    :param decay: in (0, 1); the smaller, the earlier groups are removed.
    :param start: the fraction at the beginning, for a chain that begins at pruned draws; from 0 to below ``sparsity``.
    :param layer_adaptive: whether scores are relative to those of the same site.
    :param regrow: after warm-up, at the start of every cycle, this fraction of as many weights as there are comes back:
        the removed groups whose gradients have the largest mean square. They start at 0, and after the ``exploration``
        of the cycle those with the lowest scores go. Every draw then has removed the fraction ``sparsity``, but not the
        same groups in every cycle (RigL: Evci et al. 2020, arXiv 1911.11134). 0 for groups that never come back, and
        one target for all draws.
    :raises TypeError: when one of these is not a number, or not a truth value.
    :raises ValueError: when one of these is out of range.
    """

    sparsity: float = 0.9
    decay: float = 0.99
    start: float = 0.0
    layer_adaptive: bool = False
    regrow: float = 0.0

    def __post_init__(self) -> None:
        checks.share("sparsity", self.sparsity)
        checks.share("decay", self.decay)
        checks.fraction("start", self.start)
        checks.truth("layer_adaptive", self.layer_adaptive)
        checks.fraction("regrow", self.regrow)
        if self.start >= self.sparsity:
            raise ValueError(f"start={self.start}: expected a fraction below sparsity={self.sparsity}")

    def share(self, progress: float) -> float:
        """s, the fraction of all weights to remove."""
        gone = 1.0 if progress >= 1 else 1 - self.decay ** (500 * progress)
        return self.start + (self.sparsity - self.start) * gone

    def __call__(self, sites: Sequence[SiteGroups], progress: float) -> list[Tensor]:
        scores = [site.density.mean_square(site.weights) for site in sites]
        densities = [site.density for site in sites]
        if self.layer_adaptive:
            scores = [_among_its_site(score, d) for score, d in zip(scores, densities, strict=True)]
        return keep_highest(scores, densities, self.share(progress))

    def regrown(self, sites: Sequence[SiteGroups], gradients: Sequence[Tensor]) -> list[Tensor]:
        """True for groups that are there once the removed ones with the largest gradients came back.

        :param gradients: of U at the weights of every site, ``[*lead, *event]``.
        """
        scores = [
            site.density.mean_square(gradient + site.density.loc).masked_fill(site.kept, torch.inf)
            for site, gradient in zip(sites, gradients, strict=True)
        ]
        share = self.sparsity - self.regrow * (1 - self.sparsity)
        return keep_highest(scores, [site.density for site in sites], share)


def _among_its_site(mean_square: Tensor, density: SpikeAndSlabDistribution) -> Tensor:
    """Each over the sum of those of the same site that are no smaller, ``[*lead, *groups]``; 0 where all are 0."""
    flat = mean_square.flatten(-len(density.groups))
    ordered, order = flat.sort(-1)
    tail = ordered.flip(-1).cumsum(-1).flip(-1)
    score = torch.zeros_like(flat).scatter_(-1, order, ordered / tail.clamp_min(torch.finfo(tail.dtype).tiny))
    return score.view_as(mean_square)


@dataclass(frozen=True)
class KeFanRule(Rule):
    """The rule of Ke and Fan's released code: a group of a matrix stays if its mean square is at least the threshold.

    In a convolution, a weight stays if the weights of its input channel and those of its output channel both have a
    range (largest minus smallest) of at least the threshold; a group stays if one of its weights does.

    :param hard_threshold: a positive number, in the units of squared weights, or of weights for convolutions.
    :raises TypeError: when it is not a number.
    :raises ValueError: when it is not positive.
    """

    hard_threshold: float = 1e-3

    def __post_init__(self) -> None:
        checks.positive("hard_threshold", self.hard_threshold)

    def __call__(self, sites: Sequence[SiteGroups], progress: float) -> list[Tensor]:
        return [self._of_channels(s) if len(s.density.event_shape) > 2 else self._of_groups(s) for s in sites]

    def _of_groups(self, site: SiteGroups) -> Tensor:
        return site.density.mean_square(site.weights) >= self.hard_threshold

    def _of_channels(self, site: SiteGroups) -> Tensor:
        axes = tuple(range(-len(site.density.event_shape), 0))
        stays = torch.ones_like(site.weights, dtype=torch.bool)
        for channel in axes[:2]:
            others = tuple(axis for axis in axes if axis != channel)
            spread = site.weights.amax(others, keepdim=True) - site.weights.amin(others, keepdim=True)
            stays &= spread >= self.hard_threshold
        within = site.density.axes
        return stays.amax(within) if within else stays  # a group goes when all its weights do


#: the rules, by the names that ``prune=`` accepts
RULES = {"inclusion": InclusionRule, "magnitude_schedule": MagnitudeRule, "ke_fan": KeFanRule}
RuleName = Literal["inclusion", "magnitude_schedule", "ke_fan"]


def rule(prune: Rule | str | None) -> Rule | None:
    """The rule that ``prune=`` names or is; ``None`` for none.

    :raises ValueError: for an unknown name.
    """
    if prune is None or isinstance(prune, Rule):
        return prune
    if prune not in RULES:
        raise ValueError(f"prune={prune!r}: expected None, a Rule, or one of {', '.join(map(repr, RULES))}")
    return RULES[prune]()
