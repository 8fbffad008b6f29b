"""The spike-and-slab sites of a model as SGHMC within EM sees them: found, checked, and with their E- and M-step."""

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
    """A spike-and-slab site as a chain goes on: its groups, with what is maximised over.

    :param name: of the site.
    :param share: theta, ``[*lead]``.
    :param scale: sigma, ``[*lead]``; ``None`` for 1.
    :param share_prior, scale_prior: (a, b) and (c, r), where the model has such sites.
    """

    name: str
    share: Tensor
    scale: Tensor | None
    share_prior: tuple[float, float] | None
    scale_prior: tuple[float, float] | None

    def renew(self) -> None:
        """Gives the density the present rate and scale."""
        self.density = self.density.at(self.share, self.scale)

    def expect(self, rate: float, hard: bool, threshold: float | None) -> None:
        """The E-step: ``p <- (1 - rate) p + rate P(slab | weights)``, in ``included``.

        ``hard`` takes the likelier component, or the slab from a mean square of ``threshold`` on.
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
        """The M-step of :mod:`pyro_bnn.inference.sgmcmc.em`, by the share ``rate`` of the way."""
        over = tuple(range(-len(self.density.groups), 0))
        if self.share_prior is not None:
            a, b = self.share_prior
            count = self.density.groups.numel()
            best = (self.included.sum(over) + (a - 1)) / (count + a + b - 2)
            least = torch.finfo(best.dtype).eps  # where a or b is 1 the mode may be 0 or 1, and would stay there
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
    """The spike-and-slab sites of a model; the priors of their rates and scales that are sites; values of these.

    :raises ValueError: when there is none, or one that an E-step cannot follow.
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
                f"the spike-and-slab site {name!r} lies in plates of {tuple(density.batch_shape)}: this kernel takes "
                "one weight a site. Give each its own name, or use SGHMC"
            )
        if nodes[name]["mask"] is not None or float(nodes[name]["scale"]) != 1:
            raise ValueError(
                f"the prior of {name!r} is scaled or masked by a handler, which an E-step cannot follow: use SGHMC"
            )
        for what, suffix in (("inclusion", "inclusion"), ("scale", "tau")):
            own, other = getattr(density, what), getattr(again[name]["fn"], what)
            site = f"{name}_{suffix}"
            if own is not None and site in potential.shapes and _same(own, nodes[site]["value"]):
                held[site] = nodes[site]["value"]
            elif own is not None and not torch.equal(own, other):
                raise ValueError(
                    f"the {what} of {name!r} depends on another latent site, while this kernel maximises over a site "
                    f"named {site!r} that is its value: name it so, or use SGHMC, which samples it"
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
    """Nothing but its own weight may depend on a rate or scale that is maximised over."""
    densities = []
    for values in ({}, other):
        latents = {name: nodes[name]["value"] for name in potential.shapes} | values
        with forked(device_of(potential.model)):  # dropout, the same twice
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
    """The site as a chain begins: all groups in the slab, rate and scale at typical values of their priors.

    :param hyper: priors of rates and scales, by site.
    :param weights: ``[*lead, *event]``, a view of the state.
    """
    lead = weights.shape[: weights.dim() - len(density.event_shape)]
    share_prior = scale_prior = None
    share = density.inclusion.reshape(()).expand(lead).clone()
    scale = None if density.scale is None else density.scale.reshape(()).expand(lead).clone()
    if (prior := hyper.get(f"{name}_inclusion")) is not None:
        share_prior = _numbers(prior, Beta, "concentration1", "concentration0", name=f"{name}_inclusion")
        if min(share_prior) < 1:
            raise ValueError(f"the prior Beta{share_prior} of {name!r}_inclusion has no mode inside (0, 1)")
        share.fill_(share_prior[0] / sum(share_prior))
    if (prior := hyper.get(f"{name}_tau")) is not None and scale is not None:
        transforms = getattr(_innermost(prior, TransformedDistribution), "transforms", [])
        if [type(t) for t in transforms] != [PowerTransform] or float(transforms[0].exponent) != 0.5:
            raise ValueError(
                f"the prior of '{name}_tau' must be that of the root of an InverseGamma variance, as "
                "SpikeAndSlab(variance_prior=InverseGamma(...)).tau() is"
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
    """The distribution of the family under whatever plates expanded it."""
    while not isinstance(prior, family) and hasattr(prior, "base_dist"):
        prior = prior.base_dist
    return prior


def _numbers(prior: Any, family: Any, *names: str, name: str) -> tuple[float, float]:
    """The two parameters of a distribution that belongs to the family."""
    base = _innermost(prior, family)
    if not isinstance(base, family):
        raise ValueError(
            f"the prior of {name!r} is {type(base).__name__}: this kernel maximises under {family.__name__}"
        )
    first, second = (float(getattr(base, n).reshape(-1)[0]) for n in names)
    return first, second
