"""Spike-and-slab posteriors by SGHMC within EM.

Every weight group g has an indicator: slab or spike (:mod:`pyro_bnn.priors.spike_and_slab`). The weights are sampled,
the indicators are replaced by what is expected of them, and the share theta of the slab and the scale sigma of both
components are maximised over (Ke and Fan 2022, arXiv 2210.12957; Deng et al. 2019; Rockova and George 2014)::

    E    p_g <- (1 - omega) p_g + omega P(slab | w_g, theta, sigma)
    M    theta <- (1 - omega) theta + omega (sum_g p_g + a - 1) / (#groups + a + b - 2)
         sigma <- (1 - omega) sigma + omega (B + sqrt(B^2 + 4 (n + 2 c + 2) (A + 2 r))) / (2 (n + 2 c + 2))
    w    one step of SGHMC in  -log p(data | w) + sum_g [p_g (-log slab(w_g)) + (1 - p_g) (-log spike(w_g))]

with theta ~ Beta(a, b), sigma^2 ~ InverseGamma(c, r), n weights and A, B as in
:meth:`~pyro_bnn.priors.SpikeAndSlabDistribution.scale_statistics`. By Fisher's identity the gradient of the last line
with omega = 1 is that of the collapsed prior, in which the indicators are summed out: while theta and sigma stay, the
chain has the posterior under the spike-and-slab prior itself as its target.
"""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_bnn.inference.potential import Potential
from pyro_bnn.inference.sgmcmc.mixtures import Mixture, find_sites, mixture
from pyro_bnn.inference.sgmcmc.pruning import Rule, RuleName, rule
from pyro_bnn.inference.sgmcmc.sghmc import ADAPTIVE_RATE, SGHMC


class SGHMCEM(SGHMC):
    """:class:`~pyro_bnn.inference.SGHMC` for models with spike-and-slab sites. The module's text has the equations.

    In ``mode="invariant"`` the E-step comes before every step. Rate, scales and masks adapt in warm-up alone and are
    frozen then, so that the draws have one target: the posterior under the collapsed prior with these rates and scales,
    on the weights that are left. ``mode="paper"`` is the update of the released code of Ke and Fan, constants and
    order: a hard switch and pruning once every ``em_every`` steps, for ever, and between them, with T' = sqrt(T / N), C
    the step size, L = U / N without the spike-and-slab prior, d_g = p_g / v1 + (1 - p_g) / v0 and beta = 1 - friction::

        rho <- rho - 0.1 (T'^2 C^3 d tau / N + T' C^1.5 xi grad L - 1 / (N tau)),        tau = sigmoid(rho)
        m   <- beta m - C^2 (grad L + d w / N) + sqrt(2 + 2 beta^2) C^1.5 T' xi,         xi ~ N(0, I), new
        w   <- (w + tau m) mask

    It has no Gibbs law: its variance goes to 0 with C and depends on tau, and no temperature is reported. Rates and
    scales stay where they start, at a / (a + b) and sqrt(r / c).

    Every site whose prior is a :class:`~pyro_bnn.priors.SpikeAndSlab` takes part, in any Pyro model; the sites
    ``<site>_inclusion`` and ``<site>_tau`` are maximised over, and constant in the draws. Removed groups are exactly at
    the centre (0) in every draw, and do not count in the temperatures.

    :param model, data, options: as for :class:`~pyro_bnn.inference.SGHMC`.
    :param mode: ``"invariant"`` or ``"paper"``.
    :param e_step: ``"soft"`` probabilities, or ``"hard"``: the likelier component, whose target is the prior
        ``prod_g max(theta slab, (1 - theta) spike)``. The paper's mode is hard.
    :param soft_threshold: with a hard step, the mean square of a group from which on it is in the slab, in place of
        what the prior implies.
    :param rate: omega in warm-up, a number in (0, 1] or a function of the step; 1 is plain EM.
    :param em_start: steps before the first E-step, in which all groups are in the slab.
    :param em_every: steps from one E- and M-step to the next in warm-up; by default 1, in the paper's mode one pass
        over the data.
    :param prune: ``None``, ``"inclusion"``, ``"magnitude schedule"``, ``"paper"`` or a rule of
        :mod:`pyro_bnn.inference.sgmcmc.pruning`.
    :param prune_start: steps before the first pruning; by default half of warm-up, in the paper's mode ``em_start``.
    :param prune_every: steps from one pruning to the next; by default one pass over the data.
    :raises ValueError: for a model without spike-and-slab sites, one whose rate is tied to other latents, and what
        :class:`~pyro_bnn.inference.SGHMC` raises.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        data: Any = None,
        *,
        step_size: float,
        friction: float,
        mode: Literal["invariant", "paper"] = "invariant",
        e_step: Literal["soft", "hard"] | None = None,
        soft_threshold: float | None = None,
        rate: float | Callable[[int], float] = 1.0,
        em_start: int = 0,
        em_every: int | None = None,
        prune: RuleName | Rule | None = None,
        prune_start: int | None = None,
        prune_every: int | None = None,
        **options: Any,
    ) -> None:
        if mode not in ("invariant", "paper"):
            raise ValueError(f"mode={mode!r}: expected 'invariant' or 'paper'")
        if e_step not in (None, "soft", "hard") or (mode == "paper" and e_step == "soft"):
            raise ValueError(f"e_step={e_step!r}: expected 'soft' or 'hard'; mode='paper' has a hard one")
        self.mode, self.hard = mode, mode == "paper" or e_step == "hard"
        if soft_threshold is not None and not (self.hard and soft_threshold > 0):
            raise ValueError(f"soft_threshold={soft_threshold!r}: expected a positive number, with e_step='hard'")
        if not callable(rate) and not 0 < rate <= 1:
            raise ValueError(f"rate={rate!r}: expected a number in (0, 1], or a function of the step")
        for name, count, least in (
            ("em_start", em_start, 0),
            ("em_every", em_every, 1),
            ("prune_start", prune_start, 0),
            ("prune_every", prune_every, 1),
        ):
            if count is not None and (not isinstance(count, int) or count < least):
                raise ValueError(f"{name}={count!r}: expected a number of steps, at least {least}")
        if mode == "paper" and prune is not None and not em_start and prune_start is None:
            raise ValueError(
                "mode='paper' prunes from the first step on, when the weights are those of initialisation: give "
                "em_start= or prune_start= (the released code waits 50 passes over the data)"
            )
        if mode == "paper" and options.setdefault("preconditioner", "adaptive") != "adaptive":
            raise ValueError(f"preconditioner={options['preconditioner']!r}: mode='paper' has its own, 'adaptive'")
        self.soft_threshold, self.rate, self.prune = soft_threshold, rate, rule(prune)
        self.em_start, self.em_every, self.prune_start, self.prune_every = em_start, em_every, prune_start, prune_every
        super().__init__(model, data, step_size=step_size, friction=friction, **options)

    def repr_arguments(self) -> dict[str, object]:
        own = {"mode": self.mode, "e_step": "hard" if self.hard else "soft", "rate": self.rate, "prune": self.prune}
        return super().repr_arguments() | own

    # ----------------------------------------------------------------------------------------------- the model

    def _make_potential(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Potential:
        potential = super()._make_potential(args, kwargs)
        self._densities, self._hyper, held = find_sites(potential, args, kwargs)
        potential.leave_out(held, self._densities)
        return potential

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        self._sites: list[Mixture] = []
        super().setup(warmup_steps, *args, **kwargs)
        views = self.potential.split(self.theta)
        self._sites = [
            mixture(name, density, self._hyper, views[name].view(self.theta.shape[:-1] + density.event_shape))
            for name, density in self._densities.items()
        ]
        self._mask: Tensor | None = None
        self._alive, self._shown_kept = self.theta.new_ones(()), 1.0
        self._prior_energy: Any = 0.0
        self._seen = 0  # E-steps of the pruning phase
        steps = self._batches.steps if self._batches is not None else 1
        self._em_every = self.em_every or (steps if self.mode == "paper" else 1)
        self._prune_every = self.prune_every or steps
        self._warmup_steps = warmup_steps * self.thinning
        start = self.em_start if self.mode == "paper" else max(self.em_start, self._warmup_steps // 2)
        self._prune_start = start if self.prune_start is None else self.prune_start
        late = {"em_start": self.em_start if self.em_start else -1}
        late |= {"prune_start": self._prune_start} if self.prune is not None else {}
        for what, step in late.items():
            if self.mode == "invariant" and step >= self._warmup_steps:
                raise ValueError(
                    f"{what}={step} lies after warm-up, which has {self._warmup_steps} steps (draws times thinning), "
                    "and rates and masks adapt in warm-up alone: more warmup_steps, or an earlier start"
                )
        if self.mode == "paper":
            self._precision = torch.zeros_like(self.theta)
            self._precision_views = self._views(self._precision)
            if any(site.density.spike != "normal" or site.density.loc for site in self._sites):
                raise ValueError(
                    "mode='paper' has Normal spikes around 0: SpikeAndSlab(spike='normal', loc=None) on weights, or "
                    "mode='invariant'"
                )

    # ----------------------------------------------------------------------------------------------- the state

    def _views(self, flat: Tensor) -> list[Tensor]:
        """What belongs to each spike-and-slab site in a buffer like theta, ``[*lead, *event]``."""
        parts = self.potential.split(flat)
        return [parts[name].view(flat.shape[:-1] + d.event_shape) for name, d in self._densities.items()]

    def _hyper_values(self) -> Iterator[tuple[str, Tensor]]:
        """The sites that are maximised over, ``[*lead]``."""
        for site in self._sites:
            for suffix, value in (("inclusion", site.share), ("tau", site.scale)):
                if value is not None and f"{site.name}_{suffix}" in self._hyper:
                    yield f"{site.name}_{suffix}", value

    def _state(self, theta: Tensor) -> dict[str, Tensor]:
        state = self.potential.split(theta)
        for name, value in self._hyper_values():
            inside = value.reshape(value.shape + (1,) * self.potential.held[name].dim())
            state[name] = self.potential.transforms[name].inv(inside)
        return state

    @property
    def initial_params(self) -> dict[str, Tensor]:
        """Where the chain starts, unconstrained; sites that are maximised over may be left out."""
        own = self._state(self._good.clone())
        return own if self._users_start is None else {name: own[name] for name in self._hyper} | self._users_start

    @initial_params.setter
    def initial_params(self, params: dict[str, Tensor]) -> None:
        self._users_start = params

    def _begin_at(self, params: dict[str, Tensor]) -> None:
        super()._begin_at(params)
        with torch.no_grad():
            for name, value in self._hyper_values():
                if name in params:
                    value.copy_(self.potential.transforms[name](params[name]).reshape(value.shape))
            for site in self._sites:
                site.renew()
            if self.mode == "paper":
                assert self._previous_noise is not None
                self.momentum.normal_().mul_(1e-3)
                self._previous_noise.normal_()
                self._write_precision()
            self._write_mask()
            self._good.copy_(self.theta)
        self._remember()

    def _remember(self) -> None:
        self._good_rates = [
            (site.share.clone(), None if site.scale is None else site.scale.clone(), site.kept.clone())
            for site in self._sites
        ]

    def _recall(self) -> None:
        super()._recall()
        for site, (share, scale, kept) in zip(self._sites, self._good_rates, strict=True):
            site.share.copy_(share)
            site.kept.copy_(kept)
            site.probability.nan_to_num_(0.0)
            if site.scale is not None and scale is not None:
                site.scale.copy_(scale)
            site.renew()
        self._write_mask()
        if self.steps > self.em_start:
            self._expect(1.0)

    def _step(self, position: int) -> None:
        since = self.steps - self.em_start
        warm = self.draws < self.warmup_draws
        with torch.no_grad():
            if self.mode == "paper":
                if since >= 0 and since % self._em_every == 0:
                    self._expect(1.0)
                    self._write_precision()
                if self._prunes_now():
                    self._remove()
            elif not warm:
                self._expect(1.0)
            elif since >= 0 and since % self._em_every == 0:
                rate = self._rate_now()
                self._expect(rate)
                for site in self._sites:
                    site.maximise(rate)
            if self.mode == "invariant" and warm and self._prunes_now():
                self._remove()
        self._wants_energy = not warm and position == self.thinning - 1
        super()._step(position)

    def _rate_now(self) -> float:
        rate = self.rate(self.steps) if callable(self.rate) else self.rate
        if not 0 < rate <= 1:
            raise ValueError(f"rate= gave {rate!r} at step {self.steps}: expected a number in (0, 1]")
        return rate

    def _expect(self, rate: float) -> None:
        for site in self._sites:
            site.expect(rate, self.hard, self.soft_threshold)
            if self._mask is not None:
                site.included.mul_(site.kept)
        adapting = self.mode == "paper" or self.draws < self.warmup_draws
        if self.prune is not None and adapting and self._prune_start <= self.steps:
            self._seen += 1
            for site in self._sites:
                site.probability.lerp_(site.included, 1 / self._seen)

    def _prunes_now(self) -> bool:
        since = self.steps - self._prune_start
        last = self.mode == "invariant" and self.steps == self._warmup_steps - 1
        return self.prune is not None and since >= 0 and (since % self._prune_every == 0 or last)

    def _remove(self) -> None:
        assert self.prune is not None
        self.check()  # numbers that are none would be below every threshold, and go for good
        phase = self._warmup_steps - 1 - self._prune_start
        progress = min(1.0, (self.steps - self._prune_start) / phase) if phase > 0 else 1.0
        for site, stays in zip(self._sites, self.prune(self._sites, progress), strict=True):
            site.kept &= stays
            site.included.mul_(site.kept)
            if not bool(site.kept.any()):
                warnings.warn(f"every group of {site.name!r} is removed: the network is cut there", stacklevel=6)
        self._mask = torch.ones_like(self.theta) if self._mask is None else self._mask
        self._write_mask()
        self._good.copy_(self.theta)
        self._remember()

    def _write_mask(self) -> None:
        """Puts what was removed to the centre and to rest."""
        if self._mask is None:
            return
        for site, mask in zip(self._sites, self._views(self._mask), strict=True):
            mask.copy_(site.density.within_groups(site.kept))
            site.weights.sub_(site.density.loc).mul_(mask).add_(site.density.loc)
        self.momentum.mul_(self._mask)
        self._alive = self._mask.mean()

    def _restrict(self) -> None:
        if self._mask is not None:
            self.momentum.mul_(self._mask)

    def _mean_product(self, one: Tensor, other: Tensor) -> Tensor:
        if self._mask is None:
            return super()._mean_product(one, other)
        return super()._mean_product(one * self._mask, other) / self._alive

    # ------------------------------------------------------------------------------------------------- one step

    def _force(self, *batch: Any) -> Tensor:
        grad = super()._force(*batch)
        if self.mode == "invariant":
            with torch.no_grad():
                for site, own in zip(self._sites, self._views(grad), strict=True):
                    site.density.add_force_(own, site.weights, site.included)
        if self._wants_energy:  # at the same weights as that of the rest
            with torch.no_grad():
                self._prior_energy = -sum(site.density.log_prob(site.weights).mean() for site in self._sites)
        return grad

    def _total_energy(self) -> Tensor:
        return super()._total_energy() + self._prior_energy

    def _adapt(self, grad: Tensor) -> None:
        if self.mode == "invariant":
            super()._adapt(grad)

    def _write_precision(self) -> None:
        """d of every weight, in the paper's mode; 0 for other latents, whose prior is in the loss."""
        for site, out in zip(self._sites, self._precision_views, strict=True):
            out.zero_()
            site.density.add_force_(out, torch.ones_like(out), site.included)

    def _move(self, grad: Tensor, step_size: float) -> None:
        if self.mode == "invariant":
            super()._move(grad, step_size)
            return
        assert self._dual is not None and self._previous_noise is not None and self._root is not None
        n, beta = self.num_data, 1 - self.friction
        spread = step_size**1.5 * math.sqrt(self.temperature / n)  # T' C^1.5
        tau = self._root.square()
        slope = (self._precision * tau).mul_(spread**2 / n)
        slope.addcmul_(self._previous_noise, grad, value=spread / n).sub_(1 / (n * tau))
        tau = self._dual.add_(slope, alpha=-ADAPTIVE_RATE).sigmoid()
        self._root = tau.sqrt()
        self.momentum.mul_(beta).add_(grad, alpha=-(step_size**2) / n)
        self.momentum.addcmul_(self._precision, self.theta, value=-(step_size**2) / n)
        self._shake(math.sqrt(2 + 2 * beta**2) * spread)
        self._restrict()
        self.theta.addcmul_(tau, self.momentum)

    # ------------------------------------------------------------------------------------------------- reports

    def logging(self) -> OrderedDict[str, str]:
        return OrderedDict([*super().logging().items(), ("kept", f"{self._shown_kept:.1%}")])

    def check(self) -> None:
        super().check()
        self._shown_kept = 1.0 if self._mask is None else float(self._alive)

    def diagnostics(self) -> dict[str, Any]:
        """As of SGHMC, with the share of the slab, the scale, and the share of groups that are kept of every site.

        The energy leaves out the densities of what is maximised over.
        """
        found = super().diagnostics()
        if self.mode == "paper":
            del found["kinetic temperature"], found["configurational temperature"]
        for site in self._sites:
            found[f"{site.name}: inclusion rate"] = site.share.tolist()
            if site.scale is not None:
                found[f"{site.name}: scale"] = site.scale.tolist()
            found[f"{site.name}: kept"] = site.kept.flatten(-len(site.density.groups)).double().mean(-1).tolist()
        return found
