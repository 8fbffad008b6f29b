"""The spike-and-slab sampler that Ke and Fan released with arXiv 2210.12957 (2022), constants and order.

A hard switch of the indicators and pruning come once every ``em_every`` steps, for ever. Between them, with
``T' = sqrt(T / N)``, C the step size, L = U / N without the spike-and-slab prior, ``d_g = p_g / v1 + (1 - p_g) / v0``
and beta = 1 - friction::

    rho <- rho - 0.1 (T'^2 C^3 d tau / N + T' C^1.5 xi grad L - 1 / (N tau)),        tau = sigmoid(rho)
    m   <- beta m - C^2 (grad L + d w / N) + sqrt(2 + 2 beta^2) C^1.5 T' xi,         xi ~ N(0, I), new
    w   <- (w + tau m) mask

It has no Gibbs law: its variance goes to 0 with C and depends on tau, and no temperature is reported. Rates and scales
stay where they start, at a / (a + b) and sqrt(r / c).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_bnn.inference.sgmcmc.preconditioners import MirrorDescent
from pyro_bnn.inference.sgmcmc.pruning import Rule, RuleName
from pyro_bnn.inference.sgmcmc.spike_and_slab.kernel import SpikeAndSlabKernel
from pyro_bnn.inputs import Data
from pyro_bnn.program.sites import Program

#: standard deviation of the momentum with which a chain begins
INITIAL_MOMENTUM = 1e-3


def ke_fan_step(
    theta: Tensor,
    momentum: Tensor,
    grad: Tensor,
    precision: Tensor,
    rule: MirrorDescent,
    add_noise: Callable[[Tensor, float], None],
    *,
    step_size: float,
    friction: float,
    temperature: float,
    num_data: int,
    mask: Tensor | None = None,
) -> None:
    """One step of the module's text, in place.

    :param theta, momentum, grad, precision: w, m, N grad L and d, all of one shape.
    :param rule: rho, tau, and the noise xi of the step before.
    :param add_noise: ``add_noise(m, size)`` adds ``size`` times fresh N(0, I), and leaves these in ``rule.noise``.
    :param mask: 0 for weights that are removed; ``None`` for none.
    """
    beta, spread = 1 - friction, step_size**1.5 * math.sqrt(temperature / num_data)  # T' C^1.5
    tau = rule.root.square()
    slope = (precision * tau).mul_(spread**2 / num_data)
    slope.addcmul_(rule.noise, grad, value=spread / num_data).sub_(1 / (num_data * tau))
    rule.descend(slope)
    momentum.mul_(beta).add_(grad, alpha=-(step_size**2) / num_data)
    momentum.addcmul_(precision, theta, value=-(step_size**2) / num_data)
    add_noise(momentum, math.sqrt(2 + 2 * beta**2) * spread)
    if mask is not None:
        momentum.mul_(mask)
    theta.addcmul_(rule.tau, momentum)


class KeFanSGHMC(SpikeAndSlabKernel):
    """The update of Ke and Fan's released code for spike-and-slab sites.

    The documentation of the module ``pyro_bnn.inference.sgmcmc.spike_and_slab.ke_fan`` has the equations. To sample the
    posterior under the spike-and-slab prior itself, use :class:`~pyro_bnn.inference.SGHMCEM`.

    :param model, data: as for :class:`~pyro_bnn.inference.SGHMC`. Spikes must be Normal and centred at 0.
    :param step_size: C.
    :param friction: in (0, 1]; 1 minus beta.
    :param soft_threshold: a group is in the slab if its mean square is at least this number, which replaces the
        threshold that the prior implies.
    :param em_start: number of steps before the first update of the indicators, in which all groups are in the slab.
    :param em_every: number of steps between updates of the indicators; by default one pass over the data.
    :param prune: ``None``, ``"ke_fan"`` as in the released code, ``"inclusion"``, ``"magnitude_schedule"`` or a rule of
        :mod:`pyro_bnn.inference.sgmcmc.pruning`.
    :param prune_start: number of steps before the first pruning; by default ``em_start``.
    :param prune_every: number of steps between prunings; by default one pass over the data.
    :param options: ``temperature`` T, ``schedule``, ``draws_per_cycle``, ``batch_size``, ``num_data``, ``thinning``,
        ``check_every`` and ``capture``, as for :class:`~pyro_bnn.inference.SGHMC`.
    :raises ValueError: for a preconditioner, pruning from the first step on, a spike that is not Normal around 0, and
        in the cases of :class:`~pyro_bnn.inference.SGHMCEM`.
    """

    _rule: MirrorDescent

    def __init__(
        self,
        model: Program,
        data: Data = None,
        *,
        step_size: float,
        friction: float,
        soft_threshold: float | None = None,
        em_start: int = 0,
        em_every: int | None = None,
        prune: RuleName | Rule | None = None,
        prune_start: int | None = None,
        prune_every: int | None = None,
        **options: Any,
    ) -> None:
        if "preconditioner" in options:
            raise ValueError(f"preconditioner={options['preconditioner']!r}: KeFanSGHMC has its own; leave it out")
        if prune is not None and not em_start and prune_start is None:
            raise ValueError(
                "KeFanSGHMC would prune from the first step on, when the weights have their initial values: give "
                "em_start= or prune_start= (the released code waits 50 passes over the data)"
            )
        super().__init__(
            model,
            data,
            step_size=step_size,
            friction=friction,
            hard=True,
            soft_threshold=soft_threshold,
            em_start=em_start,
            em_every=em_every,
            prune=prune,
            prune_start=prune_start,
            prune_every=prune_every,
            preconditioner="adaptive",
            **options,
        )

    def setup(self, warmup_steps: int, *args: object, **kwargs: object) -> None:
        super().setup(warmup_steps, *args, **kwargs)
        if any(site.density.spike != "normal" or site.density.loc for site in self.sites):
            raise ValueError(
                "KeFanSGHMC needs Normal spikes around 0: use SpikeAndSlab(spike='normal', loc=None) on weights, or "
                "SGHMCEM for other spikes"
            )
        self._em_every = self.em_every or self.streams.steps
        self._precision = torch.zeros_like(self.theta)

    def begin_at(self, params: dict[str, Tensor]) -> None:
        super().begin_at(params)
        with torch.no_grad():
            self.momentum.normal_().mul_(INITIAL_MOMENTUM)
            self._rule.noise.normal_()
            self._write_precision()

    def update_indicators(self) -> None:
        since = self.steps - self.em_start
        if since >= 0 and since % self._em_every == 0:
            self.expect(1.0)
            self._write_precision()
        if self._prunes_now():
            self.remove()

    def _write_precision(self) -> None:
        """d of every weight; 0 for other latents, whose prior is in the loss."""
        for site, out in zip(self.sites, self.views(self._precision), strict=True):
            out.zero_()
            site.density.add_force_(out, torch.ones_like(out), site.included)

    def _adapt(self, grad: Tensor) -> None:
        """The preconditioner moves with the step, for ever."""

    def _move(self, grad: Tensor, step_size: float) -> None:
        ke_fan_step(
            self.theta,
            self.momentum,
            grad,
            self._precision,
            self._rule,
            self._add_noise,
            step_size=step_size,
            friction=self.settings.friction,
            temperature=self.temperature,
            num_data=self.num_data,
            mask=self.mask,
        )

    def diagnostics(self) -> dict[str, Any]:
        """As of :class:`~pyro_bnn.inference.SGHMCEM`, without temperatures: the sampler has none."""
        return {name: value for name, value in super().diagnostics().items() if not name.endswith(" temperature")}
