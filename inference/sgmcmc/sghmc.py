"""Stochastic-gradient Hamiltonian Monte Carlo for any Pyro model with continuous latents.

With U the negative log joint density (nats), N the size of the data set, h the step size, tau the preconditioner
(one number for each coordinate), T the temperature and u the momentum in units in which it is N(0, T)::

    u     <- (1 - friction) u - (h / sqrt N) sqrt(tau) grad U + sqrt(2 friction T) xi,    xi ~ N(0, I)
    theta <- theta + (h / sqrt N) sqrt(tau) u

This is the symplectic Euler step of Wenzel et al. (ICML 2020, section 3 and appendix B; Chen, Fox and Guestrin, ICML
2014), whose learning rate on the mean loss U / N is h^2: at T = 0 it is SGD with momentum 1 - friction. Momentum moves
first, then the position, which keeps the error of the stationary variance at O(h^2): for U / N = a theta^2 / 2 it is
``T / (N a) / (1 - h^2 a tau / (2 (2 - friction)))``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_bnn import display
from pyro_bnn.entry import checks
from pyro_bnn.inference.sgmcmc.kernel import MinibatchKernel
from pyro_bnn.inference.sgmcmc.noise import Noise
from pyro_bnn.inference.sgmcmc.preconditioners import Preconditioner, Scales, preconditioner_for
from pyro_bnn.inference.sgmcmc.tuned.steps import TunedSteps
from pyro_bnn.inference.sgmcmc.tuned.tuner import Settings
from pyro_bnn.inputs import Data
from pyro_bnn.program.sites import Program


def sghmc_step(
    theta: Tensor,
    momentum: Tensor,
    grad: Tensor,
    add_noise: Callable[[Tensor, float], None],
    *,
    scale: float,
    friction: float,
    temperature: float,
    root: Tensor | None = None,
    mask: Tensor | None = None,
) -> None:
    """One step of the module's text, in place.

    :param theta, momentum, grad: state, u and grad U, all of one shape.
    :param add_noise: ``add_noise(u, size)`` adds ``size`` times fresh N(0, I).
    :param scale: ``h / sqrt N``.
    :param root: ``sqrt(tau)``; ``None`` for 1.
    :param mask: 0 for coordinates that are to stay where they are; ``None`` for none.
    """
    momentum.mul_(1 - friction)
    if root is None:
        momentum.add_(grad, alpha=-scale)
    else:
        momentum.addcmul_(grad, root, value=-scale)
    if temperature > 0:
        add_noise(momentum, math.sqrt(2 * friction * temperature))
    if mask is not None:
        momentum.mul_(mask)
    if root is None:
        theta.add_(momentum, alpha=scale)
    else:
        theta.addcmul_(momentum, root, value=scale)


#: steps for each draw of warm-up, while thinning is tuned
WARMUP_THINNING = 10


class SGHMC(MinibatchKernel):
    """Stochastic-gradient Hamiltonian Monte Carlo, a kernel for ``pyro.infer.MCMC`` and ``pyro_bnn.inference.sample``.

    With potential U (nats), preconditioner tau, momentum u and ``xi ~ N(0, I)``, one step on a minibatch is::

        u     <- (1 - friction) u - (h / sqrt N) sqrt(tau) grad U + sqrt(2 friction T) xi
        theta <- theta + (h / sqrt N) sqrt(tau) u

    Every draw takes ``thinning`` steps, each on the next minibatch. A model that is called with a batch must scale it
    by N/B, as the models of this package and every ``pyro.plate`` with a subsample do. Minibatch noise is not corrected
    for: it heats the chain in proportion to h^2, by the factor that :meth:`gradient_noise` reports.

    Source: Wenzel et al. (ICML 2020, section 3 and appendix B); Chen, Fox and Guestrin (ICML 2014).

    :param model: a model of this package, or any Pyro model with continuous latents.
    :param data: a loader of (x, y), a dataset or the pair (x, y), with which ``model(x, y)`` is called; ``None`` for
        a model that takes the arguments of ``MCMC.run``, or that draws subsamples itself, in plates.
    :param step_size: h. The learning rate on the mean loss is its square; halving it divides the bias by four. By
        default ``"auto"``: warm-up finds the step size and a scale for each coordinate, which are then frozen
        (:mod:`pyro_bnn.inference.sgmcmc.tuned.tuner`); the step size is in units of these scales. Where every step has
        the gradient of the whole data, the steps have a Metropolis test, which makes the chain exact
        (:mod:`pyro_bnn.inference.sgmcmc.tuned.metropolis`).
    :param friction: in (0, 1]; 1 minus the momentum decay. 1 is Langevin dynamics (SGLD). By default ``"auto"``, for
        ``step_size="auto"`` alone.
    :param temperature: T; 1 samples the posterior, whatever N is, and 0 is optimisation.
    :param preconditioner: ``"identity"``, ``"rmsprop"`` or ``"adaptive"``, with the tau of
        :mod:`pyro_bnn.inference.sgmcmc.preconditioners`. Preconditioners adapt only during warm-up. With
        ``step_size="auto"`` tau is N times the square of the scales that are tuned, and this must be left out.
    :param schedule: ``"constant"``, or ``"cyclical"`` (Zhang et al. 2020): the learning rate falls from h^2 to nearly 0
        along half a cosine in each cycle of ``draws_per_cycle`` draws.
    :param draws_per_cycle: number of draws, of ``thinning`` steps each, in a cycle; by default 1, at its end, where the
        step is smallest. More draws in a longer cycle cost no gradient and average more.
    :param exploration: number of steps at the beginning of each cycle before the first of its draws begins, where the
        learning rate is largest (the exploration stage of Zhang et al. 2020).
    :param batch_size: for a dataset or a pair; a loader has its own.
    :param num_data: N; by default that of the model, or the size of the data, or 1 without data.
    :param thinning: number of steps for each draw; by default 1, and for ``step_size="auto"`` 10 in warm-up and then
        four times as many as the momentum takes to forget itself.
    :param check_every: number of steps between checks for divergence, which are the only synchronisations with the
        device.
    :param capture: whether to record the gradient once as a graph of tensor operations and replay it, which saves small
        models most of their time; ``"auto"`` does so when the model is small and the recording is verified.
    :param compile: whether ``torch.compile`` makes machine code of the recording, of any size: some ten seconds for
        each form of minibatch, after which a step of a small model takes less. Where it cannot, it warns and goes on.
        ``"reduce-overhead"`` launches it by CUDA graphs.
    :raises ValueError: for numbers out of range, a model without latents or with a discrete one, unknown N, or fewer
        than 200 steps of warm-up for ``step_size="auto"``.
    :raises FloatingPointError: when a chain diverges; the message names the site, and the kernel returns to its last
        good state.
    """

    #: 1 for coordinates that move and 0 for others, of the shape of theta; ``None`` when all do
    mask: Tensor | None

    def __init__(
        self,
        model: Program,
        data: Data = None,
        *,
        step_size: float | Literal["auto"] = "auto",
        friction: float | Literal["auto"] = "auto",
        temperature: float = 1.0,
        preconditioner: Preconditioner = "identity",
        schedule: Literal["constant", "cyclical"] = "constant",
        draws_per_cycle: int = 1,
        exploration: int = 0,
        batch_size: int = 128,
        num_data: int | None = None,
        thinning: int | Literal["auto"] = "auto",
        check_every: int = 100,
        capture: bool | Literal["auto"] = "auto",
        compile: checks.Compile = False,
    ) -> None:
        is_tuned = isinstance(step_size, str) and step_size == "auto"
        if not is_tuned:
            checks.positive("step_size", step_size)
        checks.not_negative("temperature", temperature)
        if isinstance(friction, str) and friction == "auto":
            if not is_tuned:
                raise ValueError(
                    f"step_size={step_size!r} needs a friction: a number in (0, 1], such as 0.1. Or leave out both: "
                    "warm-up finds them"
                )
        elif not 0 < checks.finite("friction", friction) <= 1:
            raise ValueError(
                f"friction={friction!r}: expected a number in (0, 1]. It is 1 minus the decay of the momentum: 0.1 for "
                "a momentum of 0.9, 1 for Langevin dynamics"
            )
        if preconditioner not in ("identity", "rmsprop", "adaptive"):
            raise ValueError(f"preconditioner={preconditioner!r}: expected 'identity', 'rmsprop' or 'adaptive'")
        if schedule not in ("constant", "cyclical"):
            raise ValueError(f"schedule={schedule!r}: expected 'constant' or 'cyclical'")
        if checks.count("draws_per_cycle", draws_per_cycle) > 1 and schedule == "constant":
            raise ValueError(f"draws_per_cycle={draws_per_cycle} is for schedule='cyclical': leave it out")
        if checks.count("exploration", exploration, 0) and schedule == "constant":
            raise ValueError(f"exploration={exploration} is for schedule='cyclical': leave it out")
        if is_tuned:
            for name, given, only in (
                ("preconditioner", preconditioner, "identity"),
                ("schedule", schedule, "constant"),
            ):
                if given != only:
                    raise ValueError(
                        f"{name}={given!r} with step_size='auto': expected {only!r}, or give a step_size and a friction"
                    )
            if temperature == 0:
                raise ValueError(
                    "temperature=0 with step_size='auto': expected a positive temperature, or give a "
                    "step_size and a friction, because energy errors are measured relative to it"
                )
        self.is_tuned, self._tunes_thinning = is_tuned, is_tuned and thinning == "auto"
        self.step_size, self.friction, self.temperature = step_size, friction, temperature
        self.preconditioner, self.schedule = preconditioner, schedule
        self.draws_per_cycle, self.exploration = draws_per_cycle, exploration
        if isinstance(thinning, str) and thinning == "auto":
            thinning = WARMUP_THINNING if is_tuned else 1
        super().__init__(
            model,
            data,
            batch_size=batch_size,
            num_data=num_data,
            thinning=thinning,
            check_every=check_every,
            capture=capture,
            compile=compile,
        )

    def __repr__(self) -> str:
        return display.call(self, model=display.name_of(self.model), **self.repr_arguments())

    def repr_arguments(self) -> dict[str, object]:
        """What the text of the kernel says beside its model, by name."""
        names = ["step_size", "friction", "temperature", "preconditioner", "schedule"]
        names += ["draws_per_cycle"] if self.draws_per_cycle > 1 else []
        names += ["exploration"] if self.exploration else []
        return {name: getattr(self, name) for name in (*names, "batch_size", "thinning")}

    def _set_up_update(self) -> None:
        self.momentum = torch.zeros_like(self.theta)
        self.mask = None
        self.renew_noise()
        self._rule = (
            Scales(self.theta, self.num_data) if self.is_tuned else preconditioner_for(self.preconditioner, self.theta)
        )
        self._tuned: TunedSteps | None = None
        self._kinetic = self.theta.new_zeros(())
        self._configurational = self.theta.new_zeros(())
        self._origin = torch.zeros_like(self.theta)

    @property
    def settings(self) -> Settings:
        """What steps use now: the numbers that were given, or those that warm-up has found."""
        if self._tuned is not None:
            return self._tuned.settings
        assert not isinstance(self.step_size, str) and not isinstance(self.friction, str)
        return Settings(self.step_size, self.friction, self.thinning)

    def renew_noise(self) -> None:
        """Generators of noise for ``theta`` where it lies now, seeded from torch's own."""
        self._noise = Noise(self.theta)

    def setup(self, warmup_steps: int, *args: object, **kwargs: object) -> None:
        super().setup(warmup_steps, *args, **kwargs)
        if self.is_tuned:
            friction = None if isinstance(self.friction, str) else self.friction
            steps = warmup_steps * self.thinning
            self._tuned = TunedSteps(self, steps, friction, tunes_thinning=self._tunes_thinning)

    def _starting_point(self, chain: int) -> Tensor:
        """Every chain of a tuned kernel but the first starts at new weights, so that agreement means something."""
        if not self.is_tuned or self.first_chain + chain == 0:
            return self.potential.start()
        try:
            return self.potential.start(fresh=True)
        except ValueError as error:
            if self.first_chain + chain == 1:
                warnings.warn(
                    f"all chains start at the weights of the network ({error}): their agreement then says less. Set "
                    "kernel.initial_params to let them start elsewhere",
                    stacklevel=2,
                )
            return self.potential.start()

    def begin_at(self, params: dict[str, Tensor]) -> None:
        super().begin_at(params)
        with torch.no_grad():
            self.momentum.normal_().mul_(math.sqrt(self.temperature))
        if self._tuned is not None:
            self._tuned.forget()

    @property
    def steps_per_draw(self) -> int:
        return self.settings.thinning + (self.exploration if self._is_first_of_cycle else 0)

    @property
    def _is_first_of_cycle(self) -> bool:
        return self.draws % self.draws_per_cycle == 0

    def step_of_cycle(self, position: int) -> int:
        """Number of the step within its cycle, from the position within its draw."""
        before = self.draws % self.draws_per_cycle
        return position if before == 0 else self.exploration + before * self.thinning + position

    def steps_of(self, draws: int) -> int:
        """Number of steps that the first draws of a chain take."""
        return draws * self.thinning + -(-draws // self.draws_per_cycle) * self.exploration

    @property
    def preconditioner_scale(self) -> Tensor:
        """tau of every coordinate, of the shape of theta."""
        root = self._rule.root
        return torch.ones_like(self.theta) if root is None else root.square()

    # ------------------------------------------------------------------------------------------------- one step

    def advance(self, position: int, *batch: object) -> None:
        if self._tuned is None or not (self._tuned.is_exact or self.is_warming_up):
            super().advance(position, *batch)
            return
        with torch.no_grad():
            self._tuned.advance(position, *batch)

    def update(self, grad: Tensor, position: int) -> None:
        if position == 0:
            self.mark_origin()
        if self.is_warming_up:
            self._adapt(grad)
        else:
            self.measure_configuration(grad, position)
        rate = 1.0
        if self.schedule == "cyclical":
            part = self.step_of_cycle(position) / self.steps_of(self.draws_per_cycle)
            rate = 0.5 * (1 + math.cos(math.pi * part))
        self._move(grad, self.settings.step_size * math.sqrt(rate))

    def mark_origin(self) -> None:
        """Half way through warm-up, keeps the state from which the configurational temperature measures."""
        if self.draws == self.warmup_draws // 2:
            self._origin.copy_(self.theta)

    def measure_configuration(self, grad: Tensor, position: int) -> None:
        """Adds to the configurational temperature at the end of a kept draw, with grad U at theta."""
        if self._ends_a_kept_draw(position):
            self._configurational += mean_product(self.theta - self._origin, grad, self.mask)

    def set_scale(self, scale: Tensor) -> None:
        """:param scale: what warm-up has found for each coordinate, ``[dim]``."""
        assert isinstance(self._rule, Scales)
        self._rule.set(scale)

    def _adapt(self, grad: Tensor) -> None:
        """Moves the preconditioner; in warm-up alone, so that the chain has one stationary law afterwards."""
        self._rule.adapt(grad, step_size=self.settings.step_size, temperature=self.temperature, num_data=self.num_data)

    def _move(self, grad: Tensor, step_size: float) -> None:
        sghmc_step(
            self.theta,
            self.momentum,
            grad,
            self._add_noise,
            scale=step_size / math.sqrt(self.num_data),
            friction=self.settings.friction,
            temperature=self.temperature,
            root=self._rule.root,
            mask=self.mask,
        )

    def _add_noise(self, momentum: Tensor, size: float) -> None:
        self._noise.add_to(momentum, size, kept=self._rule.noise)

    def _recall(self) -> None:
        self.momentum.zero_()
        self._rule.recover()
        if self._tuned is not None:
            self._tuned.forget()

    # ------------------------------------------------------------------------------------------------- reports

    def _measure(self) -> None:
        super()._measure()
        self._kinetic += mean_product(self.momentum, self.momentum, self.mask)

    def diagnostics(self) -> dict[str, Any]:
        """Temperatures after warm-up, in units of T: means over draws and coordinates, with known expectations.

        ``kinetic temperature``: the mean of u^2, which should be ``2 T / (2 - friction)`` up to O(h^2).
        ``configurational temperature``: the mean of ``(theta - theta_0) * grad U``, which should be T for exact
        gradients and any theta_0 independent of the draws, because grad U has mean 0. Here theta_0 is the state half
        way through warm-up: it is close to the draws, which keeps the variance of the mean small. ``mean energy``: the
        mean of U, in nats.
        """
        found = super().diagnostics() | {
            "kinetic temperature": float(self._kinetic) / self._num_kept,
            "configurational temperature": float(self._configurational) / self._num_kept,
        }
        if self.is_tuned:
            found |= asdict(self.settings)
        if self._tuned is not None and self._tuned.is_exact:
            found["acceptance"] = self._tuned.acceptance
        return found

    @property
    def expected_kinetic_temperature(self) -> float:
        """The mean of u^2 of an exact chain: ``2 T / (2 - friction)``, and T for steps with a Metropolis test."""
        if self._tuned is not None and self._tuned.is_exact:
            return self.temperature
        return 2 * self.temperature / (2 - self.settings.friction)

    def gradient_noise(self, num_batches: int = 20) -> dict[str, float]:
        """Estimates how much minibatch noise heats the chain at its current state.

        ``variance`` is the variance of the mean-loss gradient, averaged over coordinates and estimated from
        ``num_batches`` minibatches; ``heating`` is the factor ``1 + h^2 tau N variance / (2 friction T)`` by which it
        raises the temperature for a Gaussian posterior and independent batches (Stephan, Mandt, Blei 2017). Passes
        without replacement heat less, because the noise of successive batches partly cancels. The average over
        coordinates says little about functions that depend on a few noisy coordinates.

        :raises ValueError: for fewer than two minibatches, or at temperature 0.
        """
        checks.count("num_batches", num_batches, 2)
        if self.temperature == 0:
            raise ValueError("temperature=0: expected a positive temperature, because heating is relative to it")
        mean, square = torch.zeros_like(self.theta), torch.zeros_like(self.theta)
        for i in range(num_batches):
            grad = self.gradient(*self.streams.next()) / self.num_data
            delta = grad - mean
            mean += delta / (i + 1)
            square += delta * (grad - mean)
        variance = square / (num_batches - 1)
        tau = self.preconditioner_scale
        heat = self.settings.step_size**2 * tau * variance * self.num_data
        heat /= 2 * self.settings.friction * self.temperature
        return {"variance": float(variance.mean()), "heating": 1 + float(heat.mean())}


class SGLD(SGHMC):
    """Stochastic-gradient Langevin dynamics (Welling and Teh 2011): :class:`SGHMC` with friction 1.

    ``theta <- theta - (h^2 / N) tau grad U + sqrt(2 h^2 tau T / N) xi``; the epsilon of the paper is ``2 h^2 / N``.
    """

    def __init__(self, model: Program, data: Data = None, *, step_size: float, **options: Any) -> None:
        checks.positive("step_size", step_size)
        if "friction" in options:
            raise ValueError("friction=: SGLD has friction 1 by definition; leave it out, or use SGHMC")
        super().__init__(model, data, step_size=step_size, friction=1.0, **options)


def mean_product(one: Tensor, other: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of ``one * other`` over coordinates that move, a scalar.

    :param mask: 1 for those that move and 0 for others.
    """
    if mask is None:
        return torch.dot(one.reshape(-1), other.reshape(-1)) / one.numel()
    return mean_product(one * mask, other) / mask.mean()
