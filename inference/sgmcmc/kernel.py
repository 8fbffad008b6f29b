"""The base class of kernels that step on minibatches: Pyro's kernel interface, data, and checks for divergence."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any, Literal

import torch
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor, nn

from pyro_bnn.entry import checks
from pyro_bnn.inference.potential import Potential
from pyro_bnn.inference.sgmcmc.gradient import Gradient
from pyro_bnn.inference.sgmcmc.streams import Streams
from pyro_bnn.inputs import Data
from pyro_bnn.posterior.statistics import averaging
from pyro_bnn.program.model import BayesianNetwork
from pyro_bnn.program.sites import Program

#: number of minibatches over which the statistics of normalisation layers are averaged for a draw
STATISTICS_BATCHES = 16


class MinibatchKernel(MCMCKernel):
    """Base class of kernels for ``pyro.infer.MCMC`` and :func:`pyro_bnn.inference.sample` that step on minibatches.

    A subclass defines :meth:`update`, one step from a gradient. It sets its own options before it calls this
    constructor: a copy in another process is built from the attributes that exist at that point.

    After :meth:`setup` a kernel has ``theta``, the state as one buffer of unconstrained numbers, ``[dim]``, or
    ``[chains, dim]`` for vectorised chains; ``potential``, the energy U; ``gradient``, which computes its gradient;
    ``streams``, which deals minibatches; ``num_data``, N; and the counts ``steps``, ``draws`` and ``warmup_draws``.

    :param model, data, batch_size, num_data, thinning, check_every, capture, compile: see
        :class:`~pyro_bnn.inference.SGHMC`.
    """

    theta: Tensor

    def __init__(
        self,
        model: Program,
        data: Data = None,
        *,
        batch_size: int = 128,
        num_data: int | None = None,
        thinning: int = 1,
        check_every: int = 100,
        capture: bool | Literal["auto"] = "auto",
        compile: checks.Compile = False,
    ) -> None:
        batch_size = checks.count("batch_size", batch_size)
        thinning = checks.count("thinning", thinning)
        check_every = checks.count("check_every", check_every)
        num_data = checks.optional(checks.count, "num_data", num_data)
        self.model, self.data = model, data
        self.batch_size, self.thinning, self.check_every = batch_size, thinning, check_every
        self.capture, self.compile = checks.truth_or_auto("capture", capture), checks.compiling("compile", compile)
        if compile and capture is False:
            raise ValueError(
                f"compile={compile!r} with capture=False: expected capture='auto', as a recording is compiled"
            )
        self._asked_num_data = num_data
        self._users_start: dict[str, Tensor] | None = None
        self.chains: int | None = None
        #: number of the first chain, where other processes have those before it
        self.first_chain = 0
        super().__init__()
        self._options = tuple(vars(self))

    def __getstate__(self) -> dict[str, Any]:
        """The options that the kernel was built with: a process that receives it sets it up again."""
        return {
            name: value for name, value in vars(self).items() if name in (*self._options, "_options", "save_params")
        }

    # -------------------------------------------------------------------------------------- what a subclass defines

    def update(self, grad: Tensor, position: int) -> None:
        """Moves ``theta``, in place.

        :param grad: ``grad U`` at theta, ``[*chains, dim]``.
        :param position: number of the step within the draw, from 0 to ``thinning - 1``.
        """
        raise NotImplementedError(f"{type(self).__name__} must define update()")

    def force(self, *batch: object) -> Tensor:
        """``grad U`` at theta, ``[*chains, dim]``, in a buffer that the next call overwrites."""
        return self.gradient(*batch)

    def _make_potential(self, args: tuple[object, ...], kwargs: dict[str, object]) -> Potential:
        return Potential(self.model, *args, **kwargs)

    def _state(self, theta: Tensor) -> dict[str, Tensor]:
        """A draw, unconstrained, from the flat vector of its numbers."""
        return self.potential.split(theta)

    def state_was_set(self) -> None:
        """Called after a checkpoint gave the kernel its state: derives what follows from it."""

    def _total_energy(self) -> Tensor:
        """U at the last gradient, averaged over chains."""
        return self.gradient.energy.mean()

    def _remember(self) -> None:
        """Saves the parts of a good state other than theta."""

    def _recall(self) -> None:
        """Undoes what a diverged state changed other than theta, which has been restored before."""

    # ----------------------------------------------------------------------------------- the contract of a kernel

    def setup(self, warmup_steps: int, *args: object, **kwargs: object) -> None:
        """Prepares a new chain, and forgets any earlier one.

        :param warmup_steps: number of warm-up draws.
        :param args, kwargs: arguments of the model, for a kernel without data.
        :raises ValueError: for a model without latents or with a discrete one, or unknown N.
        """
        modules = self.model.modules() if isinstance(self.model, nn.Module) else ()
        self._modes = [(module, module.training) for module in modules]
        self.streams = Streams(self.model, self.data, batch_size=self.batch_size, arguments=args, chains=self.chains)
        kwargs = {} if self.streams.have_data else kwargs
        self.num_data = self._find_num_data()
        self.potential = self._make_potential(self.streams.first, kwargs)
        self.transforms = {name: t.inv for name, t in self.potential.transforms.items()}  # as Pyro's runner has them
        own = self.streams.differ
        self.gradient = Gradient(self.potential, kwargs, self.chains, own, self.capture, self.compile)
        self.theta = self.gradient.theta
        self.warmup_draws, self.draws, self.steps = warmup_steps, 0, 0
        self._energy = self.theta.new_zeros(())
        self._shown = math.nan
        self._last: dict[str, Tensor] | None = None
        self._set_up_update()
        rows = [self._starting_point(chain) for chain in range(self.chains or 1)]
        self._good = torch.stack(rows) if self.chains else rows[0]

    def _starting_point(self, chain: int) -> Tensor:
        """Where a chain starts, ``[dim]``."""
        return self.potential.start()

    def _set_up_update(self) -> None:
        """Allocates the buffers that :meth:`update` uses."""

    def _find_num_data(self) -> int:
        if self._asked_num_data is not None:
            return self._asked_num_data
        if isinstance(self.model, BayesianNetwork) and self.model.num_data is not None:
            return self.model.num_data
        if self.streams.num_data is None:
            raise ValueError(
                "num_data is missing: the loader's data set has no length. Give num_data=, the number of training "
                "samples, which scales the step and the noise"
            )
        return self.streams.num_data

    def cleanup(self) -> None:
        """Restores the train or eval mode of every module, and forgets the start that the user asked for."""
        self._users_start = None
        if hasattr(self, "streams"):
            self.streams.close()
        for module, training in getattr(self, "_modes", ()):
            module.training = training

    @property
    def initial_params(self) -> dict[str, Tensor]:
        """Where the chain starts, unconstrained: the network's own weights, and draws from the prior for other latents.

        Set it to start elsewhere, ``{site: [*chains, *shape]}``, with or without the axes of plates; latents that are
        left out start as before. Once the chain has moved, it is its last good state.
        """
        own = self._state(self._good.clone())
        if self._users_start is None:
            return own
        given = {name: self._placed(name, value, own) for name, value in self._users_start.items()}
        return own | given

    @initial_params.setter
    def initial_params(self, params: dict[str, Tensor]) -> None:
        self._users_start = params

    def _placed(self, name: str, value: Tensor, own: dict[str, Tensor]) -> Tensor:
        """A user's state of a latent, with the axes of plates."""
        if name not in own:
            raise ValueError(f"initial_params has {name!r}, which is no latent of the model: {', '.join(own)}")
        shape = own[name].shape
        if [size for size in value.shape if size != 1] != [size for size in shape if size != 1]:
            event = [size for size in shape[1 if self.chains else 0 :] if size != 1]
            chains = f"{self.chains} chains times " if self.chains else ""
            raise ValueError(f"initial_params has {name!r} of shape {tuple(value.shape)}, expected {chains}{event}")
        return value.reshape(shape)

    def begin_at(self, params: dict[str, Tensor]) -> None:
        """Starts the chain at a state, and resets everything else. :meth:`sample` calls this when needed.

        :param params: ``{site: unconstrained [*chains, *shape]}``.
        """
        with torch.no_grad():
            self.theta.copy_(self.potential.join(params))
            self._good.copy_(self.theta)
        self.gradient.energy = self.theta.new_zeros(())  # otherwise that of a diverged chain would remain

    @property
    def last_draw(self) -> dict[str, Tensor]:
        """The draw from which :meth:`sample` goes on without starting again; before the first, where it starts."""
        return self.initial_params if self._last is None else self._last

    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """The next draw, unconstrained.

        :param params: the previous draw; from any other state, the chain starts again.
        :raises FloatingPointError: when the chain diverges.
        """
        if params is not self._last:
            self.begin_at(params)
        for position in range(self.steps_per_draw):
            self.step(position)
        self.draws += 1
        if self.draws > self.warmup_draws:
            self._measure()
        self._last = self._state(self.theta.clone())
        return self._last

    def step(self, position: int = 0) -> None:
        """One step on the next minibatch. ``position`` is its number within the draw."""
        batch = self.streams.next()
        self.advance(position, *batch)
        self.steps += 1
        if self.steps % self.check_every == 0:
            self.check()
            self.gradient.verify(*batch)

    def advance(self, position: int, *batch: object) -> None:
        """Moves the chain by one step on a minibatch."""
        grad = self.force(*batch)
        with torch.no_grad():
            self.update(grad, position)

    @property
    def steps_per_draw(self) -> int:
        """Number of steps of the draw that is being made."""
        return self.thinning

    @property
    def is_warming_up(self) -> bool:
        """Whether the draw that is being made is one of warm-up."""
        return self.draws < self.warmup_draws

    def _ends_a_kept_draw(self, position: int) -> bool:
        return not self.is_warming_up and position == self.steps_per_draw - 1

    def _measure(self) -> None:
        """Adds a kept draw to the means that :meth:`diagnostics` reports."""
        self._energy += self._total_energy()

    def logging(self) -> OrderedDict[str, str]:
        """U / N in nats at the last check for divergence; a more recent value would have to wait for the device."""
        return OrderedDict([("U/N", f"{self._shown:.4f}")])

    def diagnostics(self) -> dict[str, Any]:
        """``steps``, and ``mean energy``: the mean of U in nats over kept draws."""
        self.check()
        return {"steps": self.steps, "mean energy": float(self._energy) / self._num_kept}

    @property
    def _num_kept(self) -> int:
        return max(1, self.draws - self.warmup_draws)

    # ------------------------------------------------------------------------------------------------- divergence

    def check(self) -> None:
        """Stops a chain that has diverged.

        It waits for the device, and therefore runs only every ``check_every`` steps and at the end.

        :raises FloatingPointError: when the state or its energy is not finite.
        """
        energy = self.gradient.energy.expand(self.theta.shape[:-1])
        finite = torch.isfinite(self.theta).all(-1) & torch.isfinite(energy)
        if bool(finite.all()):
            self._good.copy_(self.theta)
            self._remember()
            self._shown = float(energy.mean()) / self.num_data
            return
        bad = self.theta if self.chains is None else self.theta[~finite][0]
        site = self.potential.offending_site(bad, *self.streams.single(), **self.gradient.kwargs)
        with torch.no_grad():
            self.theta.copy_(self._good)
            self._recall()
        self._last = None  # the next sample() starts the chain again, with a new momentum
        raise FloatingPointError(
            f"the chain diverged within the {self.check_every} steps before step {self.steps}, first seen at the site "
            f"{site!r}. The kernel is back at its last good state (kernel.last_good()). A smaller step_size or more "
            "friction helps"
        )

    def last_good(self) -> dict[str, Tensor]:
        """The last state that was checked and found finite, in the model's own units."""
        return self.potential.constrain(self._state(self._good.clone()))

    # ------------------------------------------------------------------------------------------------ normalisation

    def moving_buffers(self) -> dict[str, Tensor]:
        """The buffers whose values :meth:`statistics` computes, by name."""
        layers = self.model.moving_layers() if isinstance(self.model, BayesianNetwork) else {}
        return {f"{n}.{name}": b for n, layer in layers.items() for name, b in layer.named_buffers()}

    def statistics(self) -> dict[str, Tensor]:
        """Statistics of normalisation layers at the current weights, by name of the buffer; empty without such layers.

        They are averages over ``STATISTICS_BATCHES`` minibatches, or all if there are fewer. The running statistics
        lag behind the moving weights, and therefore belong to no draw.
        """
        layers = self.model.moving_layers() if isinstance(self.model, BayesianNetwork) else {}
        if not layers:
            return {}
        with torch.no_grad(), averaging(layers.values()):
            for _ in range(min(STATISTICS_BATCHES, self.streams.steps)):
                self.potential(self.potential.split(self.theta), *self.streams.single(), **self.gradient.kwargs)
        return {name: buffer.clone() for name, buffer in self.moving_buffers().items()}
