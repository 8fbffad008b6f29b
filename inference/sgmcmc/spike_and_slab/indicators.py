"""Finds and checks the spike-and-slab sites of a model for SGHMC within EM, and defines their E-step and M-step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import Beta, InverseGamma
from torch import Tensor
from torch.distributions import TransformedDistribution
from torch.distributions.transforms import PowerTransform

from pyro_bnn.inference.potential import Potential
from pyro_bnn.inference.sgmcmc.pruning import SiteGroups
from pyro_bnn.priors import SpikeAndSlabDistribution
from pyro_bnn.randomness import device_of, forked

Densities = dict[str, SpikeAndSlabDistribution]


@dataclass
class SpikeAndSlabState(SiteGroups):
    """The state of one spike-and-slab site in a running chain: its groups, and the parameters of the M-step.

    :param name: name of the site.
    :param share: theta, the prior inclusion probability, ``[*lead]``.
    :param scale: sigma, the factor on the scales of spike and slab, ``[*lead]``; ``None`` for 1.
    :param share_prior: (a, b) of ``theta ~ Beta(a, b)``; ``None`` where theta is fixed.
    :param scale_prior: (c, r) of ``sigma^2 ~ InverseGamma(c, r)``; ``None`` where sigma is fixed.
    :param lift: nats by which the log odds of the slab are raised, while a chain looks for its groups.
    """

    name: str
    share: Tensor
    scale: Tensor | None
    share_prior: tuple[float, float] | None
    scale_prior: tuple[float, float] | None
    lift: float = 0.0

    def renew(self) -> None:
        """Gives the density the current theta, its log odds raised by ``lift``, and the current sigma."""
        share = (self.share.logit() + self.lift).sigmoid() if self.lift else self.share
        self.density = self.density.at(share, self.scale)

    def expect(self, rate: float, hard: bool, threshold: float | None) -> None:
        """The E-step, in place: ``included <- (1 - rate) included + rate P(slab | weights)``.

        :param rate: omega, in (0, 1].
        :param hard: whether to replace the probability by 1 where the slab is the likelier component and 0 elsewhere.
        :param threshold: if given, the probability is replaced by 1 where the mean square of the group is at least
            this number and 0 elsewhere.
        """
        if threshold is not None:
            found = self.density.mean_square(self.weights) >= threshold
        else:
            odds = self.density.log_odds(self.weights)
            found = odds >= 0 if hard else odds.sigmoid_()
        if rate == 1:
            self.included.copy_(found)
        else:
            self.included.lerp_(found.to(self.included), rate)

    def maximise(self, rate: float) -> None:
        """The M-step of :mod:`pyro_bnn.inference.sgmcmc.spike_and_slab.em`, by a part ``rate`` of the way."""
        over = tuple(range(-len(self.density.groups), 0))
        if self.share_prior is not None:
            a, b = self.share_prior
            count = self.density.groups.numel()
            best = (self.included.sum(over) + (a - 1)) / (count + a + b - 2)
            least = torch.finfo(best.dtype).eps  # with a or b = 1 the mode may be 0 or 1, which theta would never leave
            self.share.lerp_(best.clamp(least, 1 - least), rate)
        if self.scale_prior is not None and self.scale is not None:
            c, r = self.scale_prior
            n = self.kept.sum(over) * self.density.group_size + 2 * c + 2
            squares, absolutes = self.density.scale_statistics(self.weights, self.included)
            best = (absolutes + (absolutes**2 + 4 * n * (squares + 2 * r)).sqrt()) / (2 * n)
            self.scale.lerp_(best, rate)
        if self.share_prior is not None or self.scale_prior is not None:
            self.renew()


NO_SITE = "the model has no spike-and-slab site: give it a prior of pyro_bnn.priors.SpikeAndSlab, or use SGHMC"


def find_sites(
    potential: Potential, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[Densities, dict[str, Any], dict[str, Tensor]]:
    """Finds the spike-and-slab sites of a model, and the sites of their inclusion probabilities and scales.

    :return: the density of each spike-and-slab site; the prior of each site that is such a theta or sigma; and a value
        of each of these, drawn from the prior.
    :raises ValueError: when the model has no spike-and-slab site, or one to which the E- and M-step do not apply.
    """
    nodes: dict[str, Any] = potential.prior_trace().nodes
    found = {n: nodes[n]["fn"] for n in potential.shapes if isinstance(nodes[n]["fn"], SpikeAndSlabDistribution)}
    if not found:
        raise ValueError(NO_SITE)
    again: dict[str, Any] = potential.prior_trace().nodes
    held: dict[str, Tensor] = {}
    for name, density in found.items():
        if density.batch_shape.numel() != 1:
            raise ValueError(
                f"the spike-and-slab site {name!r} is in plates of shape {tuple(density.batch_shape)}: this kernel "
                "expects one weight for each site. Give each weight a site of its own, or use SGHMC"
            )
        if nodes[name]["mask"] is not None or float(nodes[name]["scale"]) != 1:
            raise ValueError(
                f"the prior of {name!r} is scaled or masked by a Pyro handler, which the E-step cannot take into "
                "account: remove the handler, or use SGHMC"
            )
        for what, suffix in (("inclusion", "inclusion"), ("scale", "tau")):
            own, other = getattr(density, what), getattr(again[name]["fn"], what)
            site = f"{name}_{suffix}"
            if own is not None and site in potential.shapes and _same(own, nodes[site]["value"]):
                held[site] = nodes[site]["value"]
            elif own is not None and not torch.equal(own, other):
                raise ValueError(
                    f"the {what} of {name!r} depends on another latent site: this kernel expects a latent site named "
                    f"{site!r} that is the {what} itself. Rename the site, or use SGHMC, which samples it"
                )
    _require_alone(potential, found, nodes, {site: again[site]["value"] for site in held}, args, kwargs)
    return found, {site: nodes[site]["fn"] for site in held}, held


def _require_alone(
    potential: Potential,
    found: Densities,
    nodes: dict[str, Any],
    other: dict[str, Tensor],
    args: tuple[object, ...],
    kwargs: dict[str, object],
) -> None:
    """Raises ValueError when any site but its own weight depends on a theta or sigma that is maximised over."""
    densities = []
    for values in ({}, other):
        latents = {name: nodes[name]["value"] for name in potential.shapes} | values
        with forked(device_of(potential.model)):  # the same dropout both times
            densities.append(potential.log_densities(latents, *args, **kwargs))
    for name, value in densities[0].items():
        if name not in found and name not in other and not _alike(value, densities[1][name]):
            raise ValueError(
                f"the site {name!r} depends on {', '.join(map(repr, other))}, over which this kernel maximises for the "
                "spike-and-slab weights alone: use SGHMC, which samples it"
            )


def spike_and_slab_state(
    name: str, density: SpikeAndSlabDistribution, hyper: dict[str, Any], weights: Tensor
) -> SpikeAndSlabState:
    """The state of a site at the start of a chain: all groups in the slab, theta and sigma at typical values.

    :param hyper: the priors of the sites that are a theta or sigma, by name of the site.
    :param weights: ``[*lead, *event]``, a view of the state of the chain.
    :raises ValueError: when one of these priors has no M-step in closed form.
    """
    lead = weights.shape[: weights.dim() - len(density.event_shape)]
    share_prior = scale_prior = None
    share = density.inclusion.reshape(()).expand(lead).clone()
    scale = None if density.scale is None else density.scale.reshape(()).expand(lead).clone()
    if (prior := hyper.get(f"{name}_inclusion")) is not None:
        share_prior = _numbers(prior, Beta, "concentration1", "concentration0", name=f"{name}_inclusion")
        if min(share_prior) < 1:
            raise ValueError(
                f"the prior of '{name}_inclusion' is Beta{share_prior}, which has no mode inside (0, 1): expected both "
                "numbers to be at least 1. Change the prior, or use SGHMC"
            )
        share.fill_(share_prior[0] / sum(share_prior))
    if (prior := hyper.get(f"{name}_tau")) is not None and scale is not None:
        transforms = getattr(_innermost(prior, TransformedDistribution), "transforms", [])
        if [type(t) for t in transforms] != [PowerTransform] or float(transforms[0].exponent) != 0.5:
            raise ValueError(
                f"the prior of '{name}_tau': expected that of the square root of an InverseGamma variance, as "
                "SpikeAndSlab(variance_prior=InverseGamma(...)).tau() returns"
            )
        scale_prior = _numbers(prior, InverseGamma, "concentration", "rate", name=f"{name}_tau")
        scale.fill_(math.sqrt(scale_prior[1] / scale_prior[0]))
    ones = density.inclusion.new_ones(lead + density.groups)
    site = SpikeAndSlabState(
        density=density,
        weights=weights,
        included=ones,
        kept=ones.bool(),
        probability=torch.zeros_like(ones),
        name=name,
        share=share,
        scale=scale,
        share_prior=share_prior,
        scale_prior=scale_prior,
    )
    site.renew()
    return site


def _alike(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, equal_nan=True)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.numel() == other.numel() and torch.equal(one.reshape(-1), other.reshape(-1))


def _innermost(prior: Any, family: Any) -> Any:
    """The distribution of the family inside the wrappers of plates and events; the innermost one if there is none."""
    while not isinstance(prior, family) and hasattr(prior, "base_dist"):
        prior = prior.base_dist
    return prior


def _numbers(prior: Any, family: Any, *names: str, name: str) -> tuple[float, float]:
    """The parameters called ``names`` of a prior of the family; ValueError for a prior of another family."""
    base = _innermost(prior, family)
    if not isinstance(base, family):
        raise ValueError(
            f"the prior of {name!r} is {type(base).__name__}: expected {family.__name__}, for which the M-step has a "
            "closed form. Change the prior, or use SGHMC"
        )
    first, second = (float(getattr(base, n).reshape(-1)[0]) for n in names)
    return first, second
