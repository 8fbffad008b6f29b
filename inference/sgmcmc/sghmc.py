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
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from pyro_bnn import display
from pyro_bnn.inference.batches import Minibatches, minibatches
from pyro_bnn.inference.potential import Potential
from pyro_bnn.inference.sgmcmc.gradient import Gradient
from pyro_bnn.inference.sgmcmc.noise import Noise
from pyro_bnn.model import BayesianNetwork

Preconditioner = Literal["identity", "rmsprop", "adaptive"]
#: decay of the running second moment of "rmsprop", and its damping relative to the mean (Li et al. 2016)
RMSPROP_DECAY, RMSPROP_DAMPING = 0.99, 0.1
#: rate of the mirror descent of "adaptive" (Ke and Fan 2022)
ADAPTIVE_RATE = 0.1
#: minibatches over which the statistics of normalisation layers are averaged for a draw
STATISTICS_BATCHES = 16


class SGHMC(MCMCKernel):
    """A kernel for ``pyro.infer.MCMC`` and :func:`pyro_bnn.inference.sample`. The module's text has the equations.

    Every call of ``sample`` takes ``thinning`` steps, each on the next minibatch. A model that is called with a batch
    must scale it by N/B, as those of this package and every ``pyro.plate`` with a subsample do. Minibatch noise is not
    corrected for: it heats the chain, by the factor that :meth:`gradient_noise` reports, in proportion to h^2.

    :param model: a model of this package, or any Pyro model with continuous latents.
    :param data: a loader of (x, y), a dataset or the pair (x, y), with which ``model(x, y)`` is called; ``None`` for
        a model that takes the arguments of ``MCMC.run``, or draws subsamples of its own in plates.
    :param step_size: h. The learning rate on the mean loss is its square; halving it divides the bias by four.
    :param friction: in (0, 1]; 1 minus the momentum decay. 1 is Langevin dynamics (SGLD).
    :param temperature: T; 1 samples the posterior, whatever N is, and 0 is optimisation.
    :param preconditioner: ``"identity"``; ``"rmsprop"``, tau = mean(M) / M with ``M = sqrt(V) + 0.1 mean sqrt(V)`` and
        V the running second moment of the gradient; ``"adaptive"``, the tau in (0, 1) of Ke and Fan (2022) by mirror
        descent. Both adapt in warm-up alone.
    :param schedule: ``"constant"``, or ``"cyclical"`` (Zhang et al. 2020): the learning rate falls from h^2 to nearly 0
        along half a cosine in each cycle of ``thinning`` steps, and the one draw of a cycle is taken at its end.
    :param batch_size: for a dataset or a pair; a loader has its own.
    :param num_data: N; by default the model's, or the size of the data, or 1 without data.
    :param thinning: steps for each draw.
    :param check_every: steps between two checks for divergence, the only times that the device is waited for.
    :param capture: whether to record the gradient once as a graph of tensor operations and replay it, which spares
        small models most of their time; ``"auto"`` does so when the model is small and the recording proves right.
    :raises ValueError: for numbers out of range, a model without latents or with a discrete one, or unknown N.
    :raises FloatingPointError: when a chain diverges: it stops, names the site, and is back at its last good state.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        data: Any = None,
        *,
        step_size: float,
        friction: float,
        temperature: float = 1.0,
        preconditioner: Preconditioner = "identity",
        schedule: Literal["constant", "cyclical"] = "constant",
        batch_size: int = 128,
        num_data: int | None = None,
        thinning: int = 1,
        check_every: int = 100,
        capture: bool | Literal["auto"] = "auto",
    ) -> None:
        if not (step_size > 0 and math.isfinite(step_size)):
            raise ValueError(
                f"step_size={step_size!r}: expected a positive number (the square root of a learning rate)"
            )
        if not 0 < friction <= 1:
            raise ValueError(
                f"friction={friction!r}: expected a number in (0, 1]. It is 1 minus the decay of the momentum: 0.1 for "
                "a momentum of 0.9, 1 for Langevin dynamics"
            )
        if not (temperature >= 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature={temperature!r}: expected 1 for the posterior, and no negative number")
        if preconditioner not in ("identity", "rmsprop", "adaptive"):
            raise ValueError(f"preconditioner={preconditioner!r}: expected 'identity', 'rmsprop' or 'adaptive'")
        if schedule not in ("constant", "cyclical"):
            raise ValueError(f"schedule={schedule!r}: expected 'constant' or 'cyclical'")
        for name, count in (("thinning", thinning), ("check_every", check_every)):
            if not isinstance(count, int) or count < 1:
                raise ValueError(f"{name}={count!r}: expected a number of steps, at least 1")
        if num_data is not None and num_data < 1:
            raise ValueError(f"num_data={num_data!r}: expected the number of training samples, at least 1")
        self.model, self.data = model, data
        self.step_size, self.friction, self.temperature = step_size, friction, temperature
        self.preconditioner, self.schedule = preconditioner, schedule
        self.batch_size, self.thinning, self.check_every, self.capture = batch_size, thinning, check_every, capture
        self._asked_num_data = num_data
        self._users_start: dict[str, Tensor] | None = None
        self.chains: int | None = None
        super().__init__()
        self._options = tuple(vars(self))

    def __repr__(self) -> str:
        return display.call(self, model=display.name_of(self.model), **self.repr_arguments())

    def repr_arguments(self) -> dict[str, object]:
        """What the text of the kernel says beside its model, by name."""
        names = ("step_size", "friction", "temperature", "preconditioner", "schedule", "batch_size", "thinning")
        return {name: getattr(self, name) for name in names}

    def __getstate__(self) -> dict[str, Any]:
        """What the kernel was built with: a process that it is sent to sets it up again."""
        return {
            name: value for name, value in vars(self).items() if name in (*self._options, "_options", "save_params")
        }

    # ----------------------------------------------------------------------------------- the contract of a kernel

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Forgets everything of an earlier chain. ``warmup_steps`` counts draws."""
        modules = self.model.modules() if isinstance(self.model, nn.Module) else ()
        self._modes = [(module, module.training) for module in modules]
        if self.data is not None:
            self._batches: Minibatches | None = minibatches(self.model, self.data, self.batch_size)
            args, kwargs = self._batches.first, {}
        else:
            self._batches = None
        if self.chains and isinstance(self.data, DataLoader) and self.data.persistent_workers:
            raise ValueError(
                "every vectorised chain goes through the loader on its own, which persistent workers cannot serve: "
                "persistent_workers=False, or one chain at a time"
            )
        #: what is left of the epoch of every chain: batches dealt from one would not be independent between chains
        self._streams: list[Iterator[tuple[Any, ...]]] = [iter(()) for _ in range(self.chains or 1)]
        self._arguments = args
        self.num_data = self._find_num_data()
        self.potential = self._make_potential(args, kwargs)
        self.transforms = {name: t.inv for name, t in self.potential.transforms.items()}  # as Pyro's runner has them
        self._gradient = Gradient(self.potential, kwargs, self.chains, self._batches is not None, self.capture)
        self.theta = self._gradient.theta
        self.momentum = torch.zeros_like(self.theta)
        self._noise = Noise(self.theta)
        self._root = None if self.preconditioner == "identity" else torch.ones_like(self.theta)
        self._moment = torch.zeros_like(self.theta) if self.preconditioner == "rmsprop" else None
        self._dual = torch.zeros_like(self.theta) if self.preconditioner == "adaptive" else None
        self._previous_noise = torch.zeros_like(self.theta) if self.preconditioner == "adaptive" else None
        if self._dual is not None:
            self._root = self._dual.sigmoid().sqrt()
        self.warmup_draws, self.draws, self.steps = warmup_steps, 0, 0
        self._kinetic = self.theta.new_zeros(())
        self._configurational = self.theta.new_zeros(())
        self._origin = torch.zeros_like(self.theta)
        self._energy = self.theta.new_zeros(())
        self._shown = math.nan
        self._last: dict[str, Tensor] | None = None
        rows = [self.potential.start() for _ in range(self.chains or 1)]
        self._good = torch.stack(rows) if self.chains else rows[0]

    def _make_potential(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Potential:
        return Potential(self.model, *args, **kwargs)

    def cleanup(self) -> None:
        """Puts modules back into the modes they were in, and forgets where the user wanted to start."""
        self._users_start = None
        self._streams = [iter(()) for _ in getattr(self, "_streams", ())]
        for module, training in getattr(self, "_modes", ()):
            module.training = training

    @property
    def initial_params(self) -> dict[str, Tensor]:
        """Where the chain starts, unconstrained: a network at its own weights, other latents at draws of the prior.

        Of a chain that has moved, the last good state.
        """
        return self._state(self._good.clone()) if self._users_start is None else self._users_start

    @initial_params.setter
    def initial_params(self, params: dict[str, Tensor]) -> None:
        self._users_start = params

    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """The next draw, unconstrained."""
        if params is not self._last:
            self._begin_at(params)
        if self.draws == self.warmup_draws // 2:
            self._origin.copy_(self.theta)
        for i in range(self.thinning):
            self._step(i)
        self.draws += 1
        if self.draws > self.warmup_draws:
            self._kinetic += self._mean_product(self.momentum, self.momentum)
            self._energy += self._total_energy()
        self._last = self._state(self.theta.clone())
        return self._last

    def _state(self, theta: Tensor) -> dict[str, Tensor]:
        """A draw from the flat vector of unconstrained values."""
        return self.potential.split(theta)

    def _total_energy(self) -> Tensor:
        """U at the last gradient, averaged over chains."""
        return self._gradient.energy.mean()

    def logging(self) -> OrderedDict[str, str]:
        """U / N in nats at the last check for divergence: to show more would be to wait for the device."""
        return OrderedDict([("U/N", f"{self._shown:.4f}")])

    def diagnostics(self) -> dict[str, Any]:
        """Temperatures after warm-up, in units of T: means over draws and coordinates, whose expectations are known.

        ``kinetic``: mean of u^2, which is ``2 T / (2 - friction)`` up to O(h^2); ``configurational``: mean of
        ``(theta - theta_0) * grad U``, which is T for exact gradients and any theta_0 that later draws have forgotten,
        as grad U is 0 in the mean. The state half way through warm-up is near them, so that the mean varies little.
        """
        self.check()
        count = max(1, self.draws - self.warmup_draws)
        return {
            "steps": self.steps,
            "kinetic temperature": float(self._kinetic) / count,
            "configurational temperature": float(self._configurational) / count,
            "mean energy": float(self._energy) / count,
        }

    # ------------------------------------------------------------------------------------------------- one step

    def _step(self, position: int) -> None:
        """One update. ``position`` is that within the draw."""
        batch = self._next()
        grad = self._force(*batch)
        rate = 1.0
        if self.schedule == "cyclical":
            rate = 0.5 * (1 + math.cos(math.pi * position / self.thinning))
        with torch.no_grad():
            if self.draws < self.warmup_draws:
                self._adapt(grad)
            elif position == self.thinning - 1:
                self._configurational += self._mean_product(self.theta - self._origin, grad)
            self._move(grad, self.step_size * math.sqrt(rate))
        self.steps += 1
        if self.steps % self.check_every == 0:
            self.check()
            self._gradient.verify(*batch)

    def _force(self, *batch: Any) -> Tensor:
        """``grad U``, in a buffer of its own or one that the next call overwrites."""
        return self._gradient(*batch)

    def _move(self, grad: Tensor, step_size: float) -> None:
        """Momentum, then position."""
        scale = step_size / math.sqrt(self.num_data)
        self.momentum.mul_(1 - self.friction)
        if self._root is None:
            self.momentum.add_(grad, alpha=-scale)
        else:
            self.momentum.addcmul_(grad, self._root, value=-scale)
        if self.temperature > 0:
            self._shake(math.sqrt(2 * self.friction * self.temperature))
        self._restrict()
        if self._root is None:
            self.theta.add_(self.momentum, alpha=scale)
        else:
            self.theta.addcmul_(self.momentum, self._root, value=scale)

    def _shake(self, size: float) -> None:
        """Adds ``size`` times fresh N(0, I) to the momentum."""
        self._noise.add_to(self.momentum, size, kept=self._previous_noise)

    def _restrict(self) -> None:
        """Where a kernel takes out of the momentum what must not move."""

    def _mean_product(self, one: Tensor, other: Tensor) -> Tensor:
        """Over the coordinates that move."""
        return torch.dot(one.reshape(-1), other.reshape(-1)) / one.numel()

    def _adapt(self, grad: Tensor) -> None:
        """Moves the preconditioner; in warm-up alone, so that the chain has one stationary law afterwards."""
        n = self.num_data
        if self._moment is not None:
            self._moment.mul_(RMSPROP_DECAY).addcmul_(grad, grad, value=(1 - RMSPROP_DECAY) / n**2)
            mass = self._moment.sqrt()
            mass += RMSPROP_DAMPING * mass.mean(-1, keepdim=True) + torch.finfo(mass.dtype).tiny
            self._root = (mass.mean(-1, keepdim=True) / mass).sqrt_()
        if self._dual is not None and self._previous_noise is not None:
            spread = self.step_size**1.5 * math.sqrt(self.temperature / n)
            slope = self._previous_noise * grad * (spread / n) - 1 / (n * self._dual.sigmoid())
            self._root = self._dual.add_(slope, alpha=-ADAPTIVE_RATE).sigmoid().sqrt_()

    def _begin_at(self, params: dict[str, Tensor]) -> None:
        with torch.no_grad():
            self.theta.copy_(self.potential.join(params))
            self.momentum.normal_().mul_(math.sqrt(self.temperature))
            self._good.copy_(self.theta)
        self._gradient.energy = self.theta.new_zeros(())  # not that of a chain that diverged

    def check(self) -> None:
        """Stops a chain that has diverged: at every ``check_every`` steps and at the end. This waits for the device.

        :raises FloatingPointError: when the state or its energy is not finite.
        """
        energy = self._gradient.energy.expand(self.theta.shape[:-1])
        finite = torch.isfinite(self.theta).all(-1) & torch.isfinite(energy)
        if bool(finite.all()):
            self._good.copy_(self.theta)
            self._remember()
            self._shown = float(energy.mean()) / self.num_data
            return
        bad = self.theta if self.chains is None else self.theta[~finite][0]
        site = self.potential.offending_site(bad, *self._next_single(), **self._gradient.kwargs)
        with torch.no_grad():
            self.theta.copy_(self._good)
            self.momentum.zero_()
            self._recall()
        self._last = None  # the next sample() begins afresh, with a momentum of its own
        raise FloatingPointError(
            f"the chain diverged within the {self.check_every} steps before step {self.steps}, first seen at the site "
            f"{site!r}. The kernel is back at its last good state (kernel.last_good()). A smaller step_size or more "
            "friction helps"
        )

    def _remember(self) -> None:
        """Where a kernel keeps what belongs to a good state beside theta."""

    def _recall(self) -> None:
        """Takes back what a diverged state has left elsewhere: preconditioners that lost their numbers start anew."""
        for buffer in (self._moment, self._dual, self._previous_noise):
            if buffer is not None:
                buffer.nan_to_num_(0.0, 0.0, 0.0)
        if self._dual is not None:
            self._root = self._dual.sigmoid().sqrt()
        elif self._root is not None and not bool(torch.isfinite(self._root).all()):
            self._root = torch.ones_like(self._root)

    def last_good(self) -> dict[str, Tensor]:
        """The last state that was checked and found finite, in the model's own units."""
        return self.potential.constrain(self._state(self._good.clone()))

    def statistics(self) -> dict[str, Tensor]:
        """Statistics of normalisation layers at the present weights, by name of the buffer; none for other networks.

        Averages over ``STATISTICS_BATCHES`` minibatches, or all if there are fewer. What training has gathered lags
        behind weights that move, and belongs to no draw.
        """
        if not isinstance(self.model, BayesianNetwork):
            return {}
        layers = self.model.moving_layers()
        if not layers:
            return {}
        momenta = [layer.momentum for layer in layers.values()]
        for layer in layers.values():
            layer.reset_running_stats()
            layer.momentum = None  # a plain average
        with torch.no_grad():
            for _ in range(min(STATISTICS_BATCHES, self._batches.steps) if self._batches is not None else 1):
                self.potential(self.potential.split(self.theta), *self._next_single(), **self._gradient.kwargs)
        for layer, momentum in zip(layers.values(), momenta, strict=True):
            layer.momentum = momentum
        return {f"{n}.{name}": b.clone() for n, layer in layers.items() for name, b in layer.named_buffers()}

    # ------------------------------------------------------------------------------------------------ the data

    def _find_num_data(self) -> int:
        if self._asked_num_data is not None:
            return self._asked_num_data
        if isinstance(self.model, BayesianNetwork) and self.model.num_data is not None:
            return self.model.num_data
        if self._batches is None:
            return 1
        if self._batches.size is None:
            raise ValueError(
                "num_data is missing: the loader's data set has no length. Give num_data=, the number of training "
                "samples, which scales the step and the noise"
            )
        return self._batches.size

    def _next(self) -> tuple[Any, ...]:
        """The next minibatch, or one for every chain stacked on axis 0."""
        chains = self._gradient.chains
        if chains is None or self._batches is None:
            return self._next_single()
        each = [self._full_rows(chain) for chain in range(chains)]
        together = (
            pytree.tree_map(lambda *leaves: torch.stack(leaves) if isinstance(leaves[0], Tensor) else leaves[0], *parts)
            for parts in zip(*each, strict=True)
        )
        return self._batches.take(*together)

    def _next_single(self) -> tuple[Any, ...]:
        return self._arguments if self._batches is None else self._batches.take(*self._next_rows(0))

    def _next_rows(self, chain: int) -> tuple[Any, ...]:
        assert self._batches is not None
        while True:
            for rows in self._streams[chain]:
                return rows
            self._streams[chain] = self._batches.rows()

    def _full_rows(self, chain: int) -> tuple[Any, ...]:
        """Chains side by side need batches of one length; the shorter rest of a random order can be left out."""
        assert self._batches is not None
        while _length(batch := self._next_rows(chain)) != _length(self._batches.first):
            if not self._batches.shuffled:
                raise ValueError(
                    f"the loader gave a batch of {_length(batch)} samples after one of {_length(self._batches.first)}: "
                    "vectorised chains need batches of one length. Build the loader with drop_last=True and "
                    "shuffle=True, or run one chain at a time"
                )
        return batch

    def gradient_noise(self, num_batches: int = 20) -> dict[str, float]:
        """How much the noise of minibatches heats the chain at its present state.

        ``variance`` is that of the mean-loss gradient, averaged over coordinates, estimated from ``num_batches``
        minibatches; ``heating`` the factor ``1 + h^2 tau N variance / (2 friction T)`` by which it raises the
        temperature of a Gaussian (Stephan, Mandt, Blei 2017) whose batches are independent. Passes without replacement
        heat less, as the noise of one batch is made up for by the next; and the average over coordinates says little
        of functions that depend on a few noisy ones.
        """
        if num_batches < 2:
            raise ValueError(f"num_batches={num_batches!r}: a variance needs at least 2")
        if self.temperature == 0:
            raise ValueError("at temperature 0 there is nothing that minibatches could heat by a factor")
        mean, square = torch.zeros_like(self.theta), torch.zeros_like(self.theta)
        for i in range(num_batches):
            grad = self._gradient(*self._next()) / self.num_data
            delta = grad - mean
            mean += delta / (i + 1)
            square += delta * (grad - mean)
        variance = square / (num_batches - 1)
        tau = 1.0 if self._root is None else self._root.square()
        heat = self.step_size**2 * tau * variance * self.num_data / (2 * self.friction * self.temperature)
        return {"variance": float(variance.mean()), "heating": 1 + float(heat.mean())}


def _length(batch: tuple[Any, ...]) -> int:
    return next(len(t) for t in reversed(pytree.tree_leaves(batch)) if isinstance(t, Tensor) and t.dim())


class SGLD(SGHMC):
    """Stochastic-gradient Langevin dynamics (Welling and Teh 2011): :class:`SGHMC` with friction 1.

    ``theta <- theta - (h^2 / N) tau grad U + sqrt(2 h^2 tau T / N) xi``; the epsilon of the paper is ``2 h^2 / N``.
    """

    def __init__(self, model: Callable[..., Any], data: Any = None, *, step_size: float, **options: Any) -> None:
        if "friction" in options:
            raise ValueError("SGLD has friction 1 by definition; SGHMC takes friction=")
        super().__init__(model, data, step_size=step_size, friction=1.0, **options)
