"""The base class of kernels for spike-and-slab sites: the state of each site, pruning, and diagnostics."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pyro_bnn import priors
from pyro_bnn.entry import checks
from pyro_bnn.inference.potential import Potential
from pyro_bnn.inference.sgmcmc.pruning import MagnitudeRule, Rule, RuleName, rule
from pyro_bnn.inference.sgmcmc.sghmc import SGHMC
from pyro_bnn.inference.sgmcmc.spike_and_slab.indicators import (
    NO_SITE,
    SpikeAndSlabState,
    find_sites,
    spike_and_slab_state,
)
from pyro_bnn.inputs import Data
from pyro_bnn.program.model import BayesianNetwork
from pyro_bnn.program.sites import Program

#: priors that are known not to be a spike and slab; a class of your own or a distribution may be one
_WITHOUT_SPIKE = {
    value
    for value in map(vars(priors).get, priors.__all__)
    if isinstance(value, type) and issubclass(value, priors.Prior) and value not in (priors.Prior, priors.SpikeAndSlab)
}


class SpikeAndSlabKernel(SGHMC):
    """Base class of kernels that replace the indicators of spike-and-slab sites by their expectations.

    A subclass defines :meth:`update_indicators`, which runs the E-step, the M-step and pruning when they are due.

    Every site whose prior is a :class:`~pyro_bnn.priors.SpikeAndSlab` takes part, in any Pyro model. The sites
    ``<site>_inclusion`` and ``<site>_tau`` are optimised or fixed, and constant in the draws. Removed groups are
    exactly at the centre (0) in every draw, and do not count in the temperatures.

    After :meth:`setup` a kernel has ``sites``, the state of each spike-and-slab site
    (:class:`~pyro_bnn.inference.sgmcmc.spike_and_slab.indicators.SpikeAndSlabState`).

    :param model, data, step_size, friction, options: as for :class:`~pyro_bnn.inference.SGHMC`.
    :param hard: whether the E-step takes the likelier component instead of probabilities.
    :param soft_threshold: with a hard step, a group is in the slab if its mean square is at least this number.
    :param em_start, em_every, prune, prune_start, prune_every: see the subclasses.
    :raises ValueError: for numbers out of range, and for a model without such a site: here if the classes of its priors
        show it, otherwise when sampling starts.
    """

    sites: list[SpikeAndSlabState]

    def __init__(
        self,
        model: Program,
        data: Data = None,
        *,
        step_size: float,
        friction: float,
        hard: bool,
        soft_threshold: float | None = None,
        em_start: int = 0,
        em_every: int | None = None,
        prune: RuleName | Rule | None = None,
        prune_start: int | None = None,
        prune_every: int | None = None,
        **options: Any,
    ) -> None:
        checks.positive("step_size", step_size)
        if soft_threshold is not None and not (checks.positive("soft_threshold", soft_threshold) and hard):
            raise ValueError(f"soft_threshold={soft_threshold!r}: expected a positive number, with e_step='hard'")
        for name, count, least in (
            ("em_start", em_start, 0),
            ("em_every", em_every, 1),
            ("prune_start", prune_start, 0),
            ("prune_every", prune_every, 1),
        ):
            if count is not None:
                checks.count(name, count, least)
        if isinstance(prune, MagnitudeRule) and prune.regrow and not options.get("exploration"):
            raise ValueError(
                f"prune={prune!r}: groups come back at the start of a cycle and go again before its first draw. "
                "Give schedule='cyclical' and exploration=, the steps between"
            )
        given = vars(model).get("priors", {}) if isinstance(model, BayesianNetwork) else {}
        if given and {type(prior) for prior in given.values()} <= _WITHOUT_SPIKE:
            raise ValueError(NO_SITE)
        self.hard, self.soft_threshold, self.prune = hard, soft_threshold, rule(prune)
        self.em_start, self.em_every, self.prune_start, self.prune_every = em_start, em_every, prune_start, prune_every
        super().__init__(model, data, step_size=step_size, friction=friction, **options)

    # -------------------------------------------------------------------------------------- what a subclass defines

    def update_indicators(self) -> None:
        """Runs before each step of the weights: the E-step, the M-step and pruning, each when it is due."""
        raise NotImplementedError(f"{type(self).__name__} must define update_indicators()")

    @property
    def is_adapting(self) -> bool:
        """Whether inclusion probabilities are averaged for pruning, and groups may be removed."""
        return True

    # ----------------------------------------------------------------------------------------------- setup

    def _make_potential(self, args: tuple[object, ...], kwargs: dict[str, object]) -> Potential:
        potential = super()._make_potential(args, kwargs)
        self._densities, self._hyper, held = find_sites(potential, args, kwargs)
        potential.leave_out(held, self._densities)
        return potential

    def setup(self, warmup_steps: int, *args: object, **kwargs: object) -> None:
        super().setup(warmup_steps, *args, **kwargs)
        self.sites = [
            spike_and_slab_state(name, density, self._hyper, weights)
            for (name, density), weights in zip(self._densities.items(), self.views(self.theta), strict=True)
        ]
        self._shown_kept = 1.0
        self._prior_energy: Any = 0.0
        self._averaged = 0  # number of E-steps in the pruning phase so far
        self._warmup_steps = self.steps_of(warmup_steps)
        self._set_up_moves()
        self._prune_every = self.prune_every or self.streams.steps
        self._prune_start = self._default_prune_start() if self.prune_start is None else self.prune_start

    def _set_up_moves(self) -> None:
        """What a subclass does beside its steps, once the sites and the length of warm-up are known."""

    def _default_prune_start(self) -> int:
        return self.em_start

    def views(self, flat: Tensor) -> list[Tensor]:
        """The part of each spike-and-slab site in a buffer like theta, as views ``[*chains, *event]``."""
        parts = self.potential.split(flat)
        return [parts[name].view(flat.shape[:-1] + d.event_shape) for name, d in self._densities.items()]

    # ----------------------------------------------------------------------------------------------- the state

    def _hyper_values(self) -> Iterator[tuple[str, Tensor]]:
        """Names and values ``[*chains]`` of the latent sites that are a theta or sigma."""
        for site in self.sites:
            for suffix, value in (("inclusion", site.share), ("tau", site.scale)):
                if value is not None and f"{site.name}_{suffix}" in self._hyper:
                    yield f"{site.name}_{suffix}", value

    def _state(self, theta: Tensor) -> dict[str, Tensor]:
        state = super()._state(theta)
        for name, value in self._hyper_values():
            inside = value.reshape(value.shape + (1,) * self.potential.held[name].dim())
            state[name] = self.potential.transforms[name].inv(inside)
        return state

    def begin_at(self, params: dict[str, Tensor]) -> None:
        super().begin_at(params)
        with torch.no_grad():
            for name, value in self._hyper_values():
                if name in params:
                    value.copy_(self.potential.transforms[name](params[name]).reshape(value.shape))
            for site in self.sites:
                site.renew()
            self.write_mask()
            self._good.copy_(self.theta)
        self._remember()

    def _remember(self) -> None:
        self._good_rates = [
            (site.share.clone(), None if site.scale is None else site.scale.clone(), site.kept.clone())
            for site in self.sites
        ]

    def _recall(self) -> None:
        super()._recall()
        for site, (share, scale, kept) in zip(self.sites, self._good_rates, strict=True):
            site.share.copy_(share)
            site.kept.copy_(kept)
            site.probability.nan_to_num_(0.0)
            if site.scale is not None and scale is not None:
                site.scale.copy_(scale)
            site.renew()
        self.write_mask()
        if self.steps > self.em_start:
            self.expect(1.0)

    def state_was_set(self) -> None:
        super().state_was_set()
        for site in self.sites:
            site.renew()

    # ----------------------------------------------------------------------------------------------- E-step, removal

    def step(self, position: int = 0) -> None:
        with torch.no_grad():
            self.update_indicators()
        super().step(position)

    def expect(self, rate: float) -> None:
        """The E-step of all sites; in the pruning phase also updates the mean of the inclusion probabilities.

        :param rate: omega, in (0, 1].
        """
        for site in self.sites:
            site.expect(rate, self.hard, self.soft_threshold)
            if self.mask is not None:
                site.included.mul_(site.kept)
        if self.prune is not None and self.is_adapting and self._prune_start <= self.steps:
            self._averaged += 1
            for site in self.sites:
                site.probability.lerp_(site.included, 1 / self._averaged)

    def _prunes_now(self) -> bool:
        since = self.steps - self._prune_start
        return self.prune is not None and self.is_adapting and since >= 0 and since % self._prune_every == 0

    def remove(self) -> None:
        """Removes the groups that the rule ``prune`` does not keep."""
        assert self.prune is not None
        self.check()  # NaN would be below every threshold, and be removed permanently
        phase = self._warmup_steps - 1 - self._prune_start
        progress = min(1.0, (self.steps - self._prune_start) / phase) if phase > 0 else 1.0
        found = self.prune(self.sites, progress)
        self._keep([site.kept & stays for site, stays in zip(self.sites, found, strict=True)])

    def _keep(self, kept: list[Tensor]) -> None:
        """Sets which groups are there; all others are removed."""
        for site, stays in zip(self.sites, kept, strict=True):
            site.kept.copy_(stays)
            site.included.mul_(site.kept)
            if not bool(site.kept.any()):
                warnings.warn(f"every group of {site.name!r} has been removed: the network is cut there", stacklevel=6)
        self.mask = torch.ones_like(self.theta) if self.mask is None else self.mask
        self.write_mask()
        self._good.copy_(self.theta)
        self._remember()

    def write_mask(self) -> None:
        """Sets removed weights to the centre, and their momentum to 0."""
        if self.mask is None:
            return
        for site, mask in zip(self.sites, self.views(self.mask), strict=True):
            mask.copy_(site.density.within_groups(site.kept))
            site.weights.sub_(site.density.loc).mul_(mask).add_(site.density.loc)
        self.momentum.mul_(self.mask)

    # ------------------------------------------------------------------------------------------------- reports

    def update(self, grad: Tensor, position: int) -> None:
        if self._ends_a_kept_draw(position):  # at the same weights as the gradient and the rest of U
            self._prior_energy = -sum(site.density.log_prob(site.weights).mean() for site in self.sites)
        super().update(grad, position)

    def _total_energy(self) -> Tensor:
        return super()._total_energy() + self._prior_energy

    def logging(self) -> OrderedDict[str, str]:
        return OrderedDict([*super().logging().items(), ("kept", f"{self._shown_kept:.1%}")])

    def check(self) -> None:
        super().check()
        self._shown_kept = 1.0 if self.mask is None else float(self.mask.mean())

    def diagnostics(self) -> dict[str, Any]:
        """The diagnostics of SGHMC, and of every site the inclusion rate theta, the scale sigma and the fraction kept.

        ``mean energy`` leaves out the prior densities of theta and sigma.
        """
        found = super().diagnostics()
        for site in self.sites:
            found[f"{site.name}: inclusion rate"] = site.share.tolist()
            if site.scale is not None:
                found[f"{site.name}: scale"] = site.scale.tolist()
            found[f"{site.name}: kept"] = site.kept.flatten(-len(site.density.groups)).double().mean(-1).tolist()
        return found
