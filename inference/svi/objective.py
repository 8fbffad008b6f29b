"""The loss of variational inference as a module, for :func:`~pyro_bnn.inference.fit` and for loops of one's own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.infer.autoguide import AutoGuide, AutoLaplaceApproximation
from pyro.params.param_store import StateDict
from torch import Tensor, nn

from pyro_bnn import display
from pyro_bnn.entry import checks
from pyro_bnn.entry.threads import one_at_a_time
from pyro_bnn.inference.batches import as_tensors
from pyro_bnn.inference.svi.elbo import MixtureELBO, ScaleLatents
from pyro_bnn.inference.training.requirements import first_row, require_programs, require_supports
from pyro_bnn.inputs import Inputs, inputs
from pyro_bnn.modes import keeping_modes, settle, training_mode
from pyro_bnn.posterior import Posterior
from pyro_bnn.precision import FullDensities, asked, full_precision, in_mixed_precision
from pyro_bnn.program.model import BayesianNetwork
from pyro_bnn.program.sites import Program
from pyro_bnn.randomness import device_of, forked


class Objective(nn.Module):
    """The negative ELBO of a model and its guide, in nats per datum: what training minimises::

        objective(x, y) = -(1/N) [ (N/B) sum_b log p(y_b | x_b, z) + log p(W) - beta KL(q || p) ]

    with ``beta = min(1, (step + 1) / kl_annealing)``. It is a module like any other, so that a loop of one's own,
    ``DistributedDataParallel``, Lightning or Accelerate can drive it::

        objective = pb.inference.Objective(model, guide)
        optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3)
        for x, y in loader:
            optimizer.zero_grad()
            objective(x, y).backward()
            optimizer.step()
        posterior = objective.posterior()

    ``objective.parameters()`` is all that trains: that of modules, and what functions declare by ``pyro.param``, which
    belongs to the objective and not to the store of the process. ``state_dict()`` has these, the buffers and ``step``.
    In eval mode beta is 1 and ``step`` stays: the loss of held-out data.

    ``DistributedDataParallel(objective)`` needs no ``find_unused_parameters``, unless the network leaves layers out at
    random: parameters that do not enter the first loss get a gradient of 0. Every process has draws of its own if it
    has a seed of its own, and the mean of the losses is that of the whole batch if all have batches of one size.

    Under ``torch.autocast`` networks run in half precision; draws, log densities and KL divergences do not. Call
    ``backward()`` outside of it, as Lightning and Accelerate do.

    :param model: a model of this package, or any Pyro model ``model(x, y)``.
    :param guide: a guide for the model.
    :param elbo: :class:`~pyro_bnn.inference.MixtureELBO` by default, or any ELBO of Pyro.
    :param kl_annealing: number of losses, computed in train mode, over which beta grows linearly to 1.
    :param num_data: N, for a model that does not know it.
    :param example: a batch ``(x, y)``, of one row if you like, for programs whose parameters exist only after a first
        call: guides of Pyro (``AutoNormal``) and functions with ``pyro.param``.
    :raises TypeError: for a model or guide that is not a program, or an ``elbo`` that is none.
    :raises ValueError: for an unknown N, an N other than that of the model, a missing ``example``, a guide whose values
        lie where the prior has no density, or programs without parameters; and when called with data that
        :func:`~pyro_bnn.inference.fit` refuses, or, under autocast, for a model that gives half precision to a
        distribution.
    """

    #: number of losses that were computed in train mode
    step: int

    def __init__(
        self,
        model: Program,
        guide: Program,
        *,
        elbo: ELBO | None = None,
        kl_annealing: float = 0.0,
        num_data: int | None = None,
        example: tuple[object, ...] | None = None,
    ) -> None:
        super().__init__()
        kl_annealing = checks.not_negative("kl_annealing", kl_annealing)
        num_data = checks.optional(checks.count, "num_data", num_data)
        require_trainable(model, guide, elbo)
        self.model, self.guide = model, guide
        self.elbo, self.kl_annealing, self.step = MixtureELBO() if elbo is None else elbo, kl_annealing, 0
        self.num_data = _number_of_data(model, num_data)
        self._store: StateDict = {"params": {}, "constraints": {}}
        #: whether a loss was computed: the first has its arguments validated
        self.has_begun = False
        self._is_open, self._is_declared = False, False
        self._idle: list[Tensor] | None = None  # those that no loss depends on; not known before one has a gradient
        self._example: object = None
        if example is not None:
            if not isinstance(example, (tuple, list)):
                raise TypeError(f"example must be a batch, the tuple (x, y), got {type(example).__name__}")
            batch = self._tensors(example, check=False)
            self._example = first_row(batch)
            self._declare(batch, may_add=True)
        elif _declares_late(guide):
            raise ValueError(
                "the guide has its parameters only after a first call: give a batch, example=(x, y), so that "
                "objective.parameters() is complete"
            )
        if not self.trained():
            raise ValueError("neither model nor guide has parameters to train")

    def __repr__(self) -> str:
        programs = {"model": display.name_of(self.model), "guide": display.name_of(self.guide)}
        return display.call(self, **programs, elbo=self.elbo, kl_annealing=self.kl_annealing, step=self.step)

    def trained(self) -> list[Tensor]:
        """The parameters that require a gradient and have elements: those of modules, then those of functions."""
        own = {id(p) for p in self.parameters(recurse=False)}
        in_order = sorted(self.parameters(), key=lambda p: id(p) in own)
        return [p for p in in_order if p.requires_grad and p.numel()]

    @property
    def beta(self) -> float:
        """The factor of the KL divergence in the next loss."""
        if not self.training or self.kl_annealing <= 0:
            return 1.0
        return min(1.0, (self.step + 1) / self.kl_annealing)

    # --------------------------------------------------------------------------------------------------- the loss

    def forward(self, *batch: object) -> Tensor:
        """The loss of a batch, a scalar in nats per datum.

        :param batch: x and y, as :func:`~pyro_bnn.inference.fit` takes them; of a model that is not of this package,
            all that it is to be called with.
        """
        first = not self.has_begun
        given = self._tensors(batch, check=first)
        if not self._is_declared:
            with forked(device_of(self.model)):  # a run that resumes has the draws that it would have had
                self._declare(given, may_add=False)
        return self.loss(*given)

    def loss(self, *batch: object, beta: float | Tensor | None = None) -> Tensor:
        """As ``objective(*batch)``, for tensors that were checked before and lie on the device of the model.

        :param beta: the factor of the KL divergence, by default that of this step.
        """
        # distributions validate their arguments in the first loss; later ones have the same shapes
        first = not self.has_begun and self.step == 0
        types = asked()
        model = in_mixed_precision(self.model, types)
        with one_at_a_time, self.store(), pyro.validation_enabled(first), training_mode(self.training):
            scaled = ScaleLatents(self.beta if beta is None else beta)
            with full_precision(), FullDensities() if types else contextlib.nullcontext(), scaled:
                loss: Tensor = self.elbo.differentiable_loss(model, self.guide, *batch)  # type: ignore[attr-defined]
        if self._idle is None and torch.is_grad_enabled() and _is_one_of_several():
            trained = self.trained()
            found = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
            self._idle = [p for p, gradient in zip(trained, found, strict=True) if gradient is None]
        for parameter in self._idle or ():
            loss = loss + 0.0 * parameter.sum()  # DistributedDataParallel waits for a gradient of each
        self.has_begun = True
        self.step += self.training
        return loss / self.num_data

    def _tensors(self, batch: tuple[object, ...], *, check: bool) -> tuple[object, ...]:
        if isinstance(self.model, BayesianNetwork) and len(batch) != 2:
            raise TypeError(f"objective(x, y) takes inputs and targets, not {len(batch)} arguments: objective(*batch)")
        return as_tensors(self.model, batch, check=check)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.step)  # safetensors, in which Accelerate saves, knows tensors only

    def set_extra_state(self, state: Tensor | dict[str, int]) -> None:
        self.step = int(state["step"] if isinstance(state, dict) else state)  # older states hold a dict

    # ------------------------------------------------------------------------------------- parameters of functions

    @contextlib.contextmanager
    def store(self) -> Iterator[StateDict]:
        """Inside, Pyro's parameter store is that of the objective."""
        if self._is_open:
            yield self._store
            return
        self._is_open = True
        try:
            with pyro.get_param_store().scope(self._store):
                yield self._store
        finally:
            self._is_open = False

    def _declare(self, example: tuple[object, ...], *, may_add: bool) -> None:
        """Calls both programs once; what they declare beside the parameters of modules becomes that of this module.

        :param may_add: whether there may be such parameters, or an optimiser may have been built without them.
        """
        programs = (self.model, self.guide)
        quiet = pyro.validation_enabled(False)  # the first loss validates, and reports
        with one_at_a_time, self.store(), torch.no_grad(), keeping_modes(*programs), training_mode(False), quiet:
            for module in programs:
                if isinstance(module, nn.Module):
                    module.eval()  # this call, which sets up an AutoGuide, must not move statistics
            with poutine.trace(param_only=True) as capture:
                draw = poutine.trace(self.guide).get_trace(*example)
                replayed = poutine.replay(self.model, trace=draw)  # an improper prior has no draws of its own
                prior = poutine.trace(replayed).get_trace(*example)
            sites: dict[str, Any] = dict(capture.trace.nodes)
            declared = {name: site["value"].unconstrained() for name, site in sites.items()}
        require_supports(prior, draw)
        owned = {id(p) for p in self.parameters()}
        for name, value in declared.items():
            if id(value) in owned:
                continue
            if not may_add:
                raise ValueError(
                    f"the parameter {name!r} is declared only when the programs are called, after an optimiser was "
                    "built from objective.parameters(): give a batch to the objective, example=(x, y)"
                )
            parameter = value if isinstance(value, nn.Parameter) else nn.Parameter(value.detach())
            self._store["params"][name] = parameter
            self.register_parameter(f"pyro.param {name}".replace(".", "/"), parameter)
        self._is_declared = True

    # ----------------------------------------------------------------------------------------------------- the end

    def posterior(self, *, losses: list[float] | None = None, example: Inputs = None) -> Posterior:
        """The posterior that was trained, with model and guide in eval mode.

        :param losses: those of every step, which the posterior keeps.
        :param example: one row of x, see :class:`~pyro_bnn.Posterior`; by default that of ``example`` of the objective.
        """
        example = self._example if example is None else example
        if isinstance(self.model, BayesianNetwork) and example is not None:
            example = inputs(example, self.model.like())  # the model may have moved since
        settle(self.model, self.guide)
        modules = isinstance(self.model, nn.Module) and isinstance(self.guide, nn.Module)
        store = None if modules else self._store
        return Posterior(self.model, self.guide, losses=losses or [], example=example, store=store)


def _is_one_of_several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def require_trainable(model: object, guide: object, elbo: object) -> None:
    """Refuses what has no ELBO to maximise.

    :raises TypeError: for a model and guide that are swapped or no programs, a guide that is only a mode, and an
        ``elbo`` that is none.
    """
    if elbo is not None and not isinstance(elbo, ELBO):
        raise TypeError(f"elbo={elbo!r}: expected pyro_bnn.inference.MixtureELBO() or an ELBO of pyro.infer")
    require_programs(model, guide)
    if isinstance(guide, AutoLaplaceApproximation):
        raise TypeError(
            "guide=AutoLaplaceApproximation: training finds only its mode, so its posterior would have no spread. "
            "Train an AutoMultivariateNormal here; or train it with pyro.infer.SVI and use "
            "pyro_bnn.Posterior(model, guide.laplace_approximation(x, y))"
        )


def _number_of_data(model: Program, given: int | None) -> int:
    own = model.num_data if isinstance(model, BayesianNetwork) else None
    if own is not None and given not in (None, own):
        raise ValueError(f"num_data={given}, but the model was built with num_data={own}: leave it out here")
    number = own if given is None else given
    if number is None:
        raise ValueError(
            "num_data is missing: the loss is one per datum. Give num_data=, the number of training samples, by which "
            "the model scales its likelihood"
        )
    return number


def _declares_late(guide: Program) -> bool:
    """Whether a guide has no parameters before it was called."""
    if isinstance(guide, AutoGuide):
        return guide.prototype_trace is None
    return not isinstance(guide, nn.Module) or not list(guide.parameters())
