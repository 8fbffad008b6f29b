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

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_bnn.entry import checks
from pyro_bnn.inference.sgmcmc.pruning import Rule, RuleName
from pyro_bnn.inference.sgmcmc.spike_and_slab import SpikeAndSlabKernel
from pyro_bnn.inputs import Data
from pyro_bnn.program.sites import Program


class SGHMCEM(SpikeAndSlabKernel):
    """:class:`~pyro_bnn.inference.SGHMC` within EM, for models with spike-and-slab sites.

    The documentation of the module ``pyro_bnn.inference.sgmcmc.em`` has the equations. Inclusion rates, scales and
    masks adapt only during warm-up and are then frozen, while the E-step precedes every step. All draws therefore have
    one target: the posterior under the collapsed prior with these rates and scales, on the remaining weights. The
    update that Ke and Fan released is another algorithm, :class:`~pyro_bnn.inference.KeFanSGHMC`.

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
    :param prune_start: number of steps before the first pruning; by default half of warm-up.
    :param prune_every: number of steps between prunings; by default one pass over the data.
    :raises ValueError: for a model without spike-and-slab sites, an inclusion rate that depends on other latents, an
        ``em_start`` or ``prune_start`` after warm-up, and in the cases of :class:`~pyro_bnn.inference.SGHMC`.
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
        **options: Any,
    ) -> None:
        if e_step not in ("soft", "hard"):
            raise ValueError(f"e_step={e_step!r}: expected 'soft' or 'hard'")
        if not callable(rate):
            checks.share_or_all_of_it("rate", rate)
        self.rate = rate
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
        return super().repr_arguments() | {"e_step": e_step, "rate": self.rate}

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

    def _default_prune_start(self) -> int:
        return max(self.em_start, self._warmup_steps // 2)

    @property
    def is_adapting(self) -> bool:
        return self.is_warming_up

    def update_indicators(self) -> None:
        since = self.steps - self.em_start
        if not self.is_warming_up:
            self.expect(1.0)
        elif since >= 0 and since % (self.em_every or 1) == 0:
            rate = self._rate_now()
            self.expect(rate)
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

    def force(self, *batch: object) -> Tensor:
        """``grad U`` with the indicators replaced by their expectations: that of the collapsed prior."""
        grad = super().force(*batch)
        with torch.no_grad():
            for site, own in zip(self.sites, self.views(grad), strict=True):
                site.density.add_force_(own, site.weights, site.included)
        return grad
