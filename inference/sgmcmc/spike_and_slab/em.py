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

With several weights in a group no chain crosses from slab to spike by such steps, and where it starts decides what is
included. Two things carry it across. In warm-up the likelihood has the power

::

    b = b0^(1 - t),    t = min(1, step / (0.8 warm-up steps)),    b0 = .001

so that groups are chosen while the data speak softly; and at some steps whole groups are rescaled and accepted by
Metropolis (:mod:`~pyro_bnn.inference.sgmcmc.spike_and_slab.swaps`), which leaves the posterior invariant. theta and
sigma stay where they are while b moves, and the log odds of the slab are 2 nats above those of theta until b is 1: a
group that holds no effect leaves the slab at any b, but one that holds an effect can enter it only while b is small,
because rescaling the group rescales its effect. The rest of warm-up has the prior itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_bnn.entry import checks
from pyro_bnn.inference.sgmcmc.gradient import moving_statistics
from pyro_bnn.inference.sgmcmc.pruning import MagnitudeRule, Rule, RuleName
from pyro_bnn.inference.sgmcmc.spike_and_slab.kernel import SpikeAndSlabKernel
from pyro_bnn.inference.sgmcmc.spike_and_slab.swaps import ROWS, VISITS, Energy, Swaps, groups_per_sweep
from pyro_bnn.inputs import Data
from pyro_bnn.program.sites import Program

#: share of warm-up after which the likelihood has its full power
ANNEALED = 0.8
#: nats that are added to the log odds of the slab while the likelihood has less than its full power
LIFT = 2.0
#: power of the likelihood and steps between two sweeps of swaps by default, where swaps pay
POWER, SWAP_EVERY = 1e-3, 10
#: rounding, relative to an energy, within which two are the same
SAME = 1e-4


class SGHMCEM(SpikeAndSlabKernel):
    """:class:`~pyro_bnn.inference.SGHMC` within EM, for models with spike-and-slab sites.

    The documentation of the module ``pyro_bnn.inference.sgmcmc.spike_and_slab.em`` has the equations. Inclusion rates,
    scales, masks and the power of the likelihood move only during warm-up and are then frozen, while the E-step
    precedes every step. All draws therefore have one target: the posterior under the collapsed prior with these rates
    and scales, on the remaining weights. (A rule that lets groups come back, ``MagnitudeRule(regrow=)``, gives that up
    for better predictions.) The update that Ke and Fan released is another algorithm,
    :class:`~pyro_bnn.inference.KeFanSGHMC`.

    Every site whose prior is a :class:`~pyro_bnn.priors.SpikeAndSlab` takes part, in any Pyro model; the sites
    ``<site>_inclusion`` and ``<site>_tau`` are optimised and constant in the draws. Removed groups are exactly at
    the centre (0) in every draw, and do not count in the temperatures.

    Source: Ke and Fan 2022 (arXiv 2210.12957); Deng et al. 2019; Rockova and George 2014.

    :param model, data, step_size, friction, options: as for :class:`~pyro_bnn.inference.SGHMC`.
    :param e_step: ``"soft"`` probabilities, or ``"hard"``: the likelier component, whose target is the prior
        ``prod_g max(theta slab, (1 - theta) spike)``.
    :param soft_threshold: with a hard step, a group is in the slab if its mean square is at least this number, which
        replaces the threshold that the prior implies.
    :param rate: omega during warm-up, a number in (0, 1] or a function of the step; 1 is plain EM.
    :param em_start: number of steps before the first E-step, in which all groups are in the slab.
    :param em_every: number of steps between E- and M-steps during warm-up; by default 1.
    :param prune: ``None``, ``"inclusion"``, ``"magnitude_schedule"``, ``"ke_fan"`` or a rule of
        :mod:`pyro_bnn.inference.sgmcmc.pruning`.
    :param prune_start: number of steps before the first pruning; by default half of warm-up, or when the likelihood
        has its full power.
    :param prune_every: number of steps between prunings; by default one pass over the data.
    :param anneal: b0, the power of the likelihood at the first step, in (0, 1); ``None`` for full power throughout.
        Annealing forgets where the chain starts, a trained network too. ``"auto"`` is .001 where there are swaps.
    :param swap_every: number of steps between two sweeps of swaps; 0 or ``None`` for no swaps. They need a soft E-step,
        a temperature above 0, and a likelihood that is the sum over rows in memory: data as ``(x, y)``, no layer that
        looks at the whole batch, nothing random in the model. ``"auto"`` is 10 where that is so, groups have several
        weights, and sweeps that cost no more than the gradients between them visit every group ten times in warm-up
        (:func:`~pyro_bnn.inference.sgmcmc.spike_and_slab.swaps.groups_per_sweep`); otherwise there are none.
    :raises ValueError: for a model without spike-and-slab sites, an inclusion rate that depends on other latents, an
        ``em_start`` or ``prune_start`` after warm-up or a ``prune_start`` before the likelihood has its full power,
        swaps that cannot be made, and in the cases of :class:`~pyro_bnn.inference.SGHMC`.
    """

    def __init__(
        self,
        model: Program,
        data: Data = None,
        *,
        step_size: float,
        friction: float,
        e_step: Literal["soft", "hard"] = "soft",
        soft_threshold: float | None = None,
        rate: float | Callable[[int], float] = 1.0,
        em_start: int = 0,
        em_every: int = 1,
        prune: RuleName | Rule | None = None,
        prune_start: int | None = None,
        prune_every: int | None = None,
        anneal: float | Literal["auto"] | None = "auto",
        swap_every: int | Literal["auto"] | None = "auto",
        **options: Any,
    ) -> None:
        if e_step not in ("soft", "hard"):
            raise ValueError(f"e_step={e_step!r}: expected 'soft' or 'hard'")
        if not callable(rate):
            checks.share_or_all_of_it("rate", rate)
        self.rate = rate
        self.anneal = anneal if anneal == "auto" else checks.optional(checks.share, "anneal", anneal)
        self.swap_every: int | Literal["auto"] = 0
        if swap_every is not None:
            self.swap_every = "auto" if swap_every == "auto" else checks.count("swap_every", swap_every, 0)
        super().__init__(
            model,
            data,
            step_size=step_size,
            friction=friction,
            hard=e_step == "hard",
            soft_threshold=soft_threshold,
            em_start=em_start,
            em_every=em_every,
            prune=prune,
            prune_start=prune_start,
            prune_every=prune_every,
            **options,
        )

    def repr_arguments(self) -> dict[str, object]:
        e_step = "hard" if self.hard else "soft"
        return super().repr_arguments() | {
            "e_step": e_step,
            "rate": self.rate,
            "anneal": self.anneal,
            "swap_every": self.swap_every,
        }

    def setup(self, warmup_steps: int, *args: object, **kwargs: object) -> None:
        super().setup(warmup_steps, *args, **kwargs)
        late = {"em_start": self.em_start if self.em_start else -1}
        late |= {"prune_start": self._prune_start} if self.prune is not None else {}
        for what, step in late.items():
            if step >= self._warmup_steps:
                raise ValueError(
                    f"{what}={step} lies after warm-up, which has {self._warmup_steps} steps (draws times thinning), "
                    "but rates and masks adapt only during warm-up: use more warmup_steps or an earlier start"
                )

        if self.prune is not None and self._prune_start < self._anneal_steps:
            raise ValueError(
                f"prune_start={self._prune_start} lies before step {self._anneal_steps:.0f}, at which the likelihood "
                "has its full power: what is removed before is judged by less than the data. Leave prune_start out, or "
                "give anneal=None"
            )

    def _set_up_moves(self) -> None:
        self.swaps, self._swap_every = self._make_swaps()
        power = self.anneal if self.anneal != "auto" else POWER if self.swaps is not None else None
        self._anneal_steps = 0.0
        if power is None or self._warmup_steps == 0:
            if self.anneal not in ("auto", None):
                raise ValueError(f"anneal={self.anneal}: there is no warm-up to anneal in; give warmup_steps")
            return
        self._anneal_steps, self._first_power = ANNEALED * self._warmup_steps, power
        self.gradient.power = self.theta.new_full((), power)
        for site in self.sites:
            site.lift = LIFT
            site.renew()
        if self.swaps is not None:
            self.swaps.energy.power = self.gradient.power

    def _make_swaps(self) -> tuple[Swaps | None, int]:
        """The swaps and the number of steps between two sweeps; see ``swap_every``."""
        asked = self.swap_every != "auto"
        every = SWAP_EVERY if self.swap_every == "auto" else self.swap_every
        if every == 0:
            return None, 0
        rows = self.num_data if self.streams.have_data else 1
        groups = sum(site.density.groups.numel() for site in self.sites if site.density.group_size > 1)
        count = groups_per_sweep(groups, self.potential.dim, rows, min(self.batch_size, rows), every)
        reason = self._why_no_swaps()
        if not asked and (reason is not None or count * self._warmup_steps < VISITS * groups * every):
            return None, 0
        if reason is None:
            parts = self.streams.every_row(ROWS)
            shares = [min(ROWS, rows - i * ROWS) / rows for i in range(len(parts))]
            energy = Energy(self.potential, parts, shares, self.gradient.kwargs, None, self.capture, self.compile)
            reason = self._why_no_energy(energy, rows)
        if reason is None:
            return Swaps(self.theta, self.sites, energy, count, self.temperature), every
        if asked:
            raise ValueError(f"swap_every={self.swap_every}: {reason}; give swap_every=None for no swaps")
        return None, 0

    def _why_no_swaps(self) -> str | None:
        if self.hard:
            return "swaps are for e_step='soft': a hard step has another prior"
        if self.temperature == 0:
            return "swaps need a temperature above 0"
        if all(site.density.group_size == 1 for site in self.sites):
            return "groups of one weight cross by themselves: swaps are for groups of several weights"
        if not self.streams.is_in_memory:
            return "swaps need all rows in memory, and a loader deals them: give data=(x, y)"
        if (layer := moving_statistics(self.model)) is not None:
            return f"the layer {layer!r} looks at the whole batch, so that the likelihood is no sum over rows"
        return None

    def _why_no_energy(self, energy: Energy, rows: int) -> str | None:
        """Whether the energy is the same twice, and that of all rows the mean of those of halves."""
        row = self._good if self.chains is None else self._good[0]
        with torch.no_grad():
            first, second = (float(energy.of_parts(row, energy.parts, energy.shares)) for _ in range(2))
            if not math.isclose(first, second, rel_tol=SAME, abs_tol=SAME):
                return "the model gives another likelihood at each call (dropout, or plates that draw subsamples)"
            if rows > 1:
                half = self.streams.every_row(rows - rows // 2)
                in_halves = float(energy.of_parts(row, half, [1 - rows // 2 / rows, rows // 2 / rows]))
                if not math.isclose(first, in_halves, rel_tol=SAME, abs_tol=SAME):
                    return "the likelihood is no sum over rows that the model scales by N / B"
        return None

    def _default_prune_start(self) -> int:
        return max(self.em_start, self._warmup_steps // 2, math.ceil(self._anneal_steps))

    @property
    def is_adapting(self) -> bool:
        return self.is_warming_up

    @property
    def is_annealing(self) -> bool:
        """Whether the likelihood has less than its full power at the present step."""
        return self.steps < self._anneal_steps

    def step(self, position: int = 0) -> None:
        if self.gradient.power is not None and self.steps <= math.ceil(self._anneal_steps):
            time = min(1.0, self.steps / self._anneal_steps)
            self.gradient.power.fill_(self._first_power ** (1 - time))
            if time == 1:
                for site in self.sites:
                    site.lift = 0.0
                    site.renew()
        if self.swaps is not None and self.steps >= self.em_start and self.steps % self._swap_every == 0:
            self.swaps.sweep()
        if self._regrows and self.step_of_cycle(position) == self.exploration:
            assert self.prune is not None
            with torch.no_grad():
                self.check()
                self._keep(self.prune(self.sites, 1.0))
        super().step(position)

    @property
    def _regrows(self) -> bool:
        """Whether groups come back at the start of this cycle, and go again when it has been explored."""
        rule = self.prune
        return isinstance(rule, MagnitudeRule) and rule.regrow > 0 and not self.is_warming_up

    def update(self, grad: Tensor, position: int) -> None:
        if self._regrows and self.step_of_cycle(position) == 0:
            assert isinstance(self.prune, MagnitudeRule)
            self._keep(self.prune.regrown(self.sites, self.views(grad)))
        super().update(grad, position)

    def update_indicators(self) -> None:
        since = self.steps - self.em_start
        if not self.is_warming_up:
            self.expect(1.0)
        elif since >= 0 and since % (self.em_every or 1) == 0:
            rate = self._rate_now()
            self.expect(rate)
            if not self.is_annealing:
                for site in self.sites:
                    site.maximise(rate)
        if self._prunes_now():
            self.remove()

    def _rate_now(self) -> float:
        rate = self.rate(self.steps) if callable(self.rate) else self.rate
        if not 0 < rate <= 1:
            raise ValueError(f"rate= gave {rate!r} at step {self.steps}: expected a number in (0, 1]")
        return rate

    def _prunes_now(self) -> bool:
        last = self.prune is not None and self.steps == self._warmup_steps - 1  # when a schedule has to be at its end
        return super()._prunes_now() or (last and self.steps >= self._prune_start)

    def write_mask(self) -> None:
        super().write_mask()
        if self.swaps is not None:
            self.swaps.renew()

    def state_was_set(self) -> None:
        super().state_was_set()
        if self.swaps is not None:
            self.swaps.renew()

    def check(self) -> None:
        super().check()
        if self.swaps is not None:
            self.swaps.energy.verify(self.theta)

    def diagnostics(self) -> dict[str, Any]:
        """As of other kernels for these sites, with the share of swaps that were accepted."""
        found = super().diagnostics()
        return found if self.swaps is None else found | {"swaps accepted": self.swaps.acceptance}

    def force(self, *batch: object) -> Tensor:
        """``grad U`` with the indicators replaced by their expectations: that of the collapsed prior."""
        grad = super().force(*batch)
        with torch.no_grad():
            for site, own in zip(self.sites, self.views(grad), strict=True):
                site.density.add_force_(own, site.weights, site.included)
        return grad
