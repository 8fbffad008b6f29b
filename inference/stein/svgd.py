"""Stein variational gradient descent, repulsive ensembles, and the plain ensemble as their control."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Unpack

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from pyro_bnn import display
from pyro_bnn.distributed import processes
from pyro_bnn.entry import checks
from pyro_bnn.entry.threads import one_at_a_time
from pyro_bnn.inference.batches import minibatches
from pyro_bnn.inference.schedules import Schedule, scheduler_of
from pyro_bnn.inference.settings import settings_of
from pyro_bnn.inference.stein.autoparticles import AutoParticles
from pyro_bnn.inference.stein.groups import Group, divide
from pyro_bnn.inference.stein.interaction import force_in_outputs, interact
from pyro_bnn.inference.stein.kernels import RBF, Kernel
from pyro_bnn.inference.stein.members import MemberParticles, OneByOne, Together, prior_and_guide
from pyro_bnn.inference.stein.particles import AnyParticles
from pyro_bnn.inference.stein.turns import faster_in_turn
from pyro_bnn.inference.training.compiled import CompiledStep, compiled_step
from pyro_bnn.inference.training.loop import train
from pyro_bnn.inference.training.optimizers import Optim, build_optimizer
from pyro_bnn.inference.training.options import Training, checked, settings_of_loop
from pyro_bnn.inference.training.requirements import first_row, require_epochs, require_programs, require_supports
from pyro_bnn.inference.training.run import TrainingRun
from pyro_bnn.inputs import Data
from pyro_bnn.modes import keeping_modes, settle
from pyro_bnn.posterior import Posterior
from pyro_bnn.program.guide import MixtureGuide
from pyro_bnn.program.model import BayesianNetwork
from pyro_bnn.program.sites import Program
from pyro_bnn.randomness import device_of, forked, seeded

OfStep = float | Callable[[int], float]

_SPACES = ("factor", "product", "function")
_SCOPES = ("joint", "layer", "tensor")
_METHODS = ("svgd", "wgd", "ensemble")


class _Parts(NamedTuple):
    """What a step works with."""

    particles: AnyParticles | MemberParticles
    optimizer: Optimizer
    groups: list[Group]


class SVGD:
    """Particles that move along the gradient of ``log p`` and repel each other.

    With the energies ``U_i = -log p(data, z_i) - log |dz_i / dtheta_i|`` of the whole data set, in unconstrained
    coordinates theta, and a kernel k, particle i moves along ::

        "svgd"      phi_i = (1/n) sum_j [-gamma k_ij grad U_j + lambda grad_{theta_j} k(theta_j, theta_i)]
        "wgd"       phi_i = -gamma grad U_i - lambda (sum_j grad_{theta_i} k_ij) / (sum_j k_ij)
        "ensemble"  phi_i = -gamma grad U_i

    (Liu & Wang 2016; the kernel density estimate of D'Angelo & Fortuin 2021; a control without interaction). The
    optimiser gets ``-phi / num_data`` as the gradient, so that learning rates are those of a mean loss; this does not
    change fixed points. The prior is already part of U, so a weight decay of the optimiser would come on top of it.

    Under ``torchrun`` every process computes the energies and gradients of some particles on whole batches, and these
    are added up; all particles then move in every process alike.

    Memory is O(n dim + n^2). Network weights that all particles share are trained on the mean of U, without a kernel;
    other parameters of a model do not change.

    :param model: a model of this package, or any Pyro model with continuous latents.
    :param guide: a :class:`~pyro_bnn.program.guide.MixtureGuide` of points, or :class:`AutoParticles`; its particles
        are updated in place.
    :param optim: ``"adam"`` by default; see :func:`~pyro_bnn.inference.training.optimizers.build_optimizer` for other
        values. Particles are the rows of one tensor, so the optimiser must not mix rows.
    :param kernel: see :mod:`pyro_bnn.inference.stein.kernels`; by default ``RBF("median")``.
    :param space: the space of distances: ``"factor"`` for the coordinates theta; ``"product"`` for the low-rank
        products of the guide's ``pairs() -> [(site of A, site of B, scale)]`` and the coordinates outside pairs;
        ``"function"`` for the outputs of the network on the batch, with "wgd". By default ``"product"`` if there are
        pairs, else ``"factor"``.
    :param scope: ``"joint"`` for one kernel over all coordinates, ``"layer"`` for one per layer (the name of a site
        without its last dotted part), ``"tensor"`` for one per site or pair. By default ``"tensor"`` for networks and
        ``"joint"`` for other models: in thousands of dimensions a single kernel underestimates the variance
        (docs/bella.md has the figures), while several kernels lose dependence between their coordinates.
    :param repulsion: lambda, 1 for the posterior; a number or a function of the step.
    :param annealing: gamma, in (0, 1], a function of the step such as :func:`cyclical_annealing`; 1 by default.
    :param num_data: size N of the data set; by default that of the model, or of the data given to :meth:`fit`.
    :param sequential: run the model for one particle after the other, in the memory of one: the result is the same
        except for the noise of dropout. ``"auto"`` does so for networks on the CPU whose activations for all particles
        together exceed 32 MB, because allocating larger tensors costs more time than running them together saves.
    :param lr: learning rate, when ``optim`` is a name or a class; by default 1e-3, and 0.1 for "sgd".
    :raises ValueError: for numbers out of range, or options that cannot be combined.
    :raises TypeError: for a guide without particles, or a ``kernel`` that is not a kernel of this package.
    """

    def __init__(
        self,
        model: Program,
        guide: MixtureGuide | AutoParticles,
        optim: Optim = None,
        *,
        kernel: Kernel | None = None,
        space: Literal["factor", "product", "function"] | None = None,
        scope: Literal["joint", "layer", "tensor"] | None = None,
        method: Literal["svgd", "wgd", "ensemble"] = "svgd",
        repulsion: OfStep = 1.0,
        annealing: Callable[[int], float] | None = None,
        num_data: int | None = None,
        sequential: bool | Literal["auto"] = "auto",
        lr: float | None = None,
    ) -> None:
        require_programs(model, guide)
        pairs = getattr(guide, "pairs", None)
        if space is None:
            space = "factor" if pairs is None else "product"
        if scope is None:
            scope = "tensor" if isinstance(guide, MixtureGuide) and space != "function" else "joint"
        for name, value, known in (("space", space, _SPACES), ("scope", scope, _SCOPES), ("method", method, _METHODS)):
            if value not in known:
                raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, known))}")
        if not isinstance(guide, (MixtureGuide, AutoParticles)):
            raise TypeError(f"guide must be a MixtureGuide of points or AutoParticles, got {type(guide).__name__}")
        if isinstance(guide, MixtureGuide) and guide.family != "point":
            raise ValueError(f"particles are points: build the guide with family='point', not {guide.family!r}")
        if not callable(repulsion):
            _check_repulsion(repulsion)
        if num_data is None and isinstance(model, BayesianNetwork):
            num_data = model.num_data
        num_data = checks.optional(checks.count, "num_data", num_data)
        checks.optional(checks.positive, "lr", lr)
        self.kernel = RBF() if kernel is None else kernel
        if not isinstance(self.kernel, Kernel):
            raise TypeError(
                f"kernel={kernel!r}: expected a kernel of pyro_bnn.inference with its bandwidth, such as RBF('median') "
                "or IMQ(2.0), or an object of a subclass of Kernel"
            )
        if annealing is not None:
            checks.function("annealing", annealing)
        if method == "wgd" and not self.kernel.positive:
            raise ValueError(f"method='wgd' divides by a density: {self.kernel} is not positive everywhere")
        self._pairs: Any = pairs
        if space == "product" and pairs is None:
            raise ValueError(
                f"space='product' needs a guide with pairs(), but {type(guide).__name__} has none: use "
                "pyro_bnn.models.ParticleGuide with a pyro_bnn.models.Bella, or space='factor'"
            )
        if space == "function":
            if method == "svgd":
                raise ValueError("space='function': expected method='wgd', the only method that supports this space")
            if not (isinstance(model, BayesianNetwork) and isinstance(guide, MixtureGuide)) or scope != "joint":
                raise ValueError("space='function' needs a network and guide of this package, and scope='joint'")
        self.model, self.guide, self.optim, self.lr = model, guide, optim, lr
        self.space, self.scope, self.method = space, scope, method
        self.repulsion, self.annealing = repulsion, annealing
        self.num_data, self.sequential = num_data, checks.truth_or_auto("sequential", sequential)
        self._size = num_data
        self.steps = 0
        self._parts: _Parts | None = None
        self._compiled: CompiledStep | None = None

    @one_at_a_time
    def setup(self, *args: object) -> None:
        """Makes particles, kernels and optimiser, from what the model is called with; later calls change nothing."""
        self._set_up(args)

    @property
    def optimizer(self) -> Optimizer:
        """The optimiser of the particles.

        :raises RuntimeError: before the first step; see :meth:`setup`.
        """
        return self._parts_there.optimizer

    @property
    def _parts_there(self) -> _Parts:
        if self._parts is None:
            raise RuntimeError("there is no optimiser before the particles are set up: call setup(x, y), step or fit")
        return self._parts

    @property
    def num_kernels(self) -> int:
        """Number of kernels, one for each part into which ``scope`` divides the coordinates; 0 before :meth:`setup`."""
        return 0 if self._parts is None else len(self._parts.groups)

    def __repr__(self) -> str:
        programs = {"model": display.name_of(self.model), "guide": display.name_of(self.guide)}
        names = ("kernel", "space", "scope", "method", "repulsion", "annealing", "lr", "steps")
        return display.call(self, **programs, **{name: getattr(self, name) for name in names})

    @one_at_a_time
    def step(self, *args: object) -> float:
        """Makes one update of the particles and returns the mean of U over them before the update, in nats per datum.

        :param args: the arguments of the model, such as a minibatch.
        :raises FloatingPointError: when U or its gradient is not finite; no particle has moved then.
        """
        _, optimizer, _ = self._set_up(args)
        optimizer.zero_grad(set_to_none=True)
        energy = float(self._add_gradient(args, 1.0))
        self._interact_all()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        return energy

    def _add_gradient(self, args: tuple[object, ...], weight: Tensor | float, waits: bool = True) -> Tensor | float:
        """Adds ``weight gamma grad U / N`` to the gradient of each particle; returns the mean of U / N.

        :param waits: whether to look at the energies, which waits for their device.
        :raises FloatingPointError: when one of them is not finite.
        """
        particles, optimizer, _ = self._set_up(args)
        gamma = 1.0 if self.annealing is None else self.annealing(self.steps)
        if not 0 < gamma <= 1:
            raise ValueError(f"annealing gave {gamma!r} at step {self.steps}: expected a number in (0, 1]")
        size, parameters = self._size or 1, [*particles.blocks, *particles.shared]
        before = [parameter.grad for parameter in parameters]
        energies = self._energies(particles, args, gamma, weight)
        if waits and not bool(torch.isfinite(energies).all()):
            i = int((~torch.isfinite(energies)).nonzero()[0])
            optimizer.zero_grad(set_to_none=True)
            raise FloatingPointError(
                f"the energy of particle {i} became {float(energies[i])} at step {self.steps + 1}, the first site that "
                f"is not finite: {particles.offending_site(i, args)!r}. A smaller lr usually helps"
            )
        for parameter, gradient in zip(parameters, before, strict=True):
            if parameter.grad is not None:
                parameter.grad /= size
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)
        mean = energies.mean() / size
        return float(mean) if waits else mean

    def _energies(
        self, particles: AnyParticles | MemberParticles, args: tuple[object, ...], gamma: float, weight: Tensor | float
    ) -> Tensor:
        """The energies of all particles, whose gradients it sets."""
        if self._is_in_outputs and isinstance(particles, MemberParticles):
            return particles.backward(args, gamma, weight, force_in_outputs(self.kernel, self._strength()))
        if self._compiled is not None:
            for parameter in (*particles.blocks, *particles.shared):
                parameter.grad = None
            scalar = particles.blocks[0].detach().new_full
            factor = weight if isinstance(weight, Tensor) else scalar((), weight)
            found = self._compiled(scalar((), gamma), factor, *args)
            if found is not None:
                return found
        return particles.backward(args, gamma, weight)

    def _interact_all(self, waits: bool = True) -> None:
        """Turns the gradients of all particles into ``-phi / N``.

        :param waits: whether to look at them, which waits for their device.
        :raises FloatingPointError: when one is not finite; no particle has moved then.
        """
        particles, optimizer, groups = self._parts_there
        if self.space != "function" and self.method != "ensemble":
            strength, size = self._strength(), self._size or 1
            with torch.no_grad(), torch.autocast(particles.blocks[0].device.type, enabled=False):
                for group in groups:
                    interact(self.kernel, particles.blocks, group, strength / size, self.method)
        finite = [torch.isfinite(p.grad).all() for p in particles.blocks if p.grad is not None]
        if waits and not bool(torch.stack(finite).all()):
            optimizer.zero_grad(set_to_none=True)
            raise FloatingPointError(
                f"the gradient of the energies is not finite at step {self.steps + 1}, although the energies are; "
                "no particle has moved. A function of the model has no derivative at a particle, such as sqrt at 0"
            )

    def _strength(self) -> float:
        """lambda of this step."""
        strength = self.repulsion(self.steps) if callable(self.repulsion) else self.repulsion
        _check_repulsion(strength)
        return strength

    @property
    def _is_in_outputs(self) -> bool:
        """Whether particles repel each other by the outputs of the network."""
        return self.space == "function" and self.method == "wgd"

    @one_at_a_time
    def fit(
        self,
        data: Data,
        epochs: int,
        *,
        batch_size: int = 128,
        schedule: Schedule | None = None,
        seed: int | None = None,
        **training: Unpack[Training],
    ) -> Posterior:
        """Trains the particles from their current positions for ``epochs`` passes and returns the posterior.

        All particles see the same minibatch. The posterior has one member for each particle of a network, and one
        stored draw for each particle of any other model.

        :param data: data in the forms that :func:`~pyro_bnn.inference.fit` accepts.
        :param epochs: number of passes over the data.
        :param batch_size: for a dataset or a pair; a loader has its own.
        :param schedule: of the learning rate, see :mod:`pyro_bnn.inference.schedules`; constant by default.
        :param seed: makes the run reproducible and leaves the global random state unchanged.
        :param training: options of the loop, see :class:`~pyro_bnn.inference.Training`.
        :raises ValueError: for empty or inconsistent data, ``accumulate`` with repulsion in function space, whose
            kernel is one of a whole batch, or a checkpoint that is damaged or belongs to another run.
        :raises OSError: when the checkpoint cannot be written.
        :raises FloatingPointError: when an energy is not finite; the particles return to their state at the end of the
            last good epoch.
        """
        require_epochs(epochs)
        checks.seed("seed", seed)
        options = checked(training, "SVGD.fit")
        if options["accumulate"] > 1 and self._is_in_outputs:
            raise ValueError(
                f"accumulate={options['accumulate']} with space='function': expected 1, because particles repel each "
                "other by their outputs on a whole batch; give a larger batch_size"
            )
        batches = minibatches(self.model, data, batch_size)
        self._size = self.num_data or batches.size
        with contextlib.ExitStack() as stack:
            stack.enter_context(keeping_modes(self.model, self.guide))
            stack.enter_context(seeded(device_of(self.model), seed))
            particles, optimizer, _ = self._set_up(batches.first)
            settings: dict[str, str] = {}
            if options["checkpoint"] is not None:
                settings = self._settings(data, optimizer, batch_size, schedule, seed, options)
            rates = [group["lr"] for group in optimizer.param_groups]
            scheduler = scheduler_of(schedule, optimizer, -(-batches.steps // options["accumulate"]), epochs)
            if scheduler is not None:
                stack.callback(_restart_rates, optimizer, rates)
            parameters = [*particles.blocks, *particles.shared]
            self._begin_alike(parameters)
            run = TrainingRun(
                self.model, self.guide, parameters, optimizer, scheduler, self.steps, settings, processes()
            )
            self._compile(options, particles)
            stack.callback(setattr, self, "_compiled", None)
            try:
                train(run, batches, _Stein(self, first_row(batches.first)), options, epochs=epochs)
            except FloatingPointError:
                self._parts = None  # the rates may be those of the steps that went wrong
                self.steps = run.remembered_step
                raise
            self.steps = run.step
        settle(self.model, self.guide)
        return self._posterior(run.losses, first_row(batches.first))

    def _compile(self, options: Training, particles: AnyParticles | MemberParticles) -> None:
        """Energies and their gradients are compiled from here on, if so asked."""
        why = "particles repel each other by their outputs" if self._is_in_outputs else None
        blocks, programs = [*particles.blocks, *particles.shared], [self.model, self.guide]
        step: Callable[..., Tensor] = lambda gamma, weight, *args: particles.backward(args, gamma, weight)  # noqa: E731
        self._compiled = compiled_step(options, step, blocks, programs, processes(), why)

    def _begin_alike(self, parameters: Sequence[Tensor]) -> None:
        """Several processes start at the particles of the first."""
        together = processes()
        with torch.no_grad():
            for parameter in parameters:
                together.copy_from_first(parameter)

    def _posterior(self, losses: list[float], example: object) -> Posterior:
        if isinstance(self.guide, AutoParticles):
            posterior = Posterior.from_draws(self.model, self.guide.particles(), is_sampled=False)
            posterior.losses = list(losses)
            return posterior
        return Posterior(self.model, self.guide, losses=losses, example=example)

    def _settings(
        self,
        data: Any,
        optimizer: Optimizer,
        batch_size: int,
        schedule: Schedule | None,
        seed: int | None,
        loop: Training,
    ) -> dict[str, str]:
        own = ("kernel", "space", "scope", "method", "repulsion", "annealing", "num_data")
        options: dict[str, object] = {name: getattr(self, name) for name in own} | settings_of_loop(loop)
        size = {} if isinstance(data, DataLoader) else {"batch_size": batch_size}
        return settings_of(self.model, self.guide, optimizer, data, **options, **size, schedule=schedule, seed=seed)

    # --------------------------------------------------------------------------------------------------- parts

    def _set_up(self, args: tuple[object, ...]) -> _Parts:
        if self._parts is None:
            together = processes()
            particles: AnyParticles | MemberParticles
            if isinstance(self.guide, AutoParticles):
                particles = AnyParticles(self.guide, self.sequential is True, args, together)
            else:
                with forked(device_of(self.model)):  # the draw is no step of the run
                    require_supports(*prior_and_guide(self.model, self.guide, args))
                auto = self.sequential == "auto"
                in_turn = faster_in_turn(self.model, self.guide, args) if auto else self.sequential
                kind = OneByOne if together.are_several or in_turn else Together
                particles = kind(self.model, self.guide, together)
            pairs = self._pairs() if self.space == "product" else []
            groups = list(divide(particles.segments, pairs, self.scope))
            parameters = [{"params": [*particles.blocks, *particles.shared]}]
            optimizer = build_optimizer(self.optim, parameters, self.lr, default="adam")
            self._parts = _Parts(particles, optimizer, groups)
        return self._parts


def _check_repulsion(value: object) -> None:
    checks.not_negative("repulsion", value)


def _restart_rates(optimizer: Optimizer, rates: list[float]) -> None:
    """A schedule ends with its training: later steps have the rates from which it started."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = group.get("initial_lr", rate)


class _Stein:
    """Steps of the particles, for the loop that trains them."""

    def __init__(self, engine: SVGD, example: object) -> None:
        self._engine, self._example = engine, example
        self.label = engine.method.upper()

    def add_gradient(self, batch: tuple[object, ...], run: TrainingRun, weight: Tensor | float) -> Tensor | float:
        self._engine.steps = run.step
        return self._engine._add_gradient(batch, weight, run.waits)

    def direct(self, run: TrainingRun) -> None:
        self._engine._interact_all(run.waits)

    def describe(self, loss: float) -> str:
        return f"U {loss:.4f} nats/datum"

    def posterior(self) -> Posterior:
        return self._engine._posterior([], self._example)
