"""Minibatch stochastic variational inference with ``torch.optim``."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, Unpack

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from pyro_bnn.distributed import Processes, processes
from pyro_bnn.entry import checks
from pyro_bnn.entry.threads import one_at_a_time
from pyro_bnn.inference.batches import minibatches
from pyro_bnn.inference.schedules import Schedule, scheduler_of
from pyro_bnn.inference.settings import settings_of
from pyro_bnn.inference.svi.objective import Objective, require_trainable
from pyro_bnn.inference.training.compiled import compiled_step
from pyro_bnn.inference.training.loop import rows_of, train
from pyro_bnn.inference.training.optimizers import Optim, build_optimizer
from pyro_bnn.inference.training.options import Training, checked, settings_of_loop
from pyro_bnn.inference.training.requirements import require_epochs
from pyro_bnn.inference.training.run import TrainingRun
from pyro_bnn.inputs import Data
from pyro_bnn.modes import keeping_modes
from pyro_bnn.posterior import Posterior
from pyro_bnn.precision import full_precision
from pyro_bnn.program.guide import MixtureGuide
from pyro_bnn.program.model import BayesianNetwork
from pyro_bnn.program.sites import Program
from pyro_bnn.randomness import device_of, seeded


@one_at_a_time
def fit(
    model: Program,
    guide: Program,
    data: Data,
    *,
    epochs: int,
    batch_size: int = 128,
    optim: Optim = None,
    lr: float | None = None,
    weight_decay: float = 0.0,
    decay: Literal["weights", "all"] = "weights",
    schedule: Schedule | None = None,
    kl_annealing: float = 0.0,
    elbo: ELBO | None = None,
    seed: int | None = None,
    **training: Unpack[Training],
) -> Posterior:
    """Maximises the evidence lower bound (ELBO) over minibatches and returns the posterior.

    The loss of a step is the negative ELBO divided by the size of the data set, in nats per datum::

        -(1/N) [ (N/B) sum_b log p(y_b | x_b, z) + log p(W) - beta * KL(q || p) ],   beta = min(1, step / annealing)

    The parameters of the modules are trained in place; the user's parameter store does not change.

    :param model: a model of this package, or any Pyro model ``model(x, y)``.
    :param guide: a guide for the model.
    :param data: a loader or dataset of pairs (x, y) or of dicts with ``labels``, or such a pair or dict itself;
        :mod:`pyro_bnn.inputs` describes the accepted types of x and y.
    :param epochs: passes over the data.
    :param batch_size: for a dataset or a pair; a loader has its own.
    :param optim: ``"adamw"`` (default), ``"adam"``, ``"sgd"``, a class of ``torch.optim``, a function from parameter
        groups to an optimiser, or an optimiser; see :func:`~pyro_bnn.inference.training.optimizers.build_optimizer`.
    :param lr: learning rate, when ``optim`` is a name or a class; by default 1e-3, and 0.1 for "sgd".
    :param weight_decay: weight decay, unless ``optim`` is an optimiser. 0 by default, because models have priors over
        their weights.
    :param decay: the parameters with weight decay: ``"weights"`` for the point-estimated weights W of the model, or
        ``"all"`` for all parameters of the network and the biases of its members. Factors never have weight decay.
    :param schedule: see :mod:`pyro_bnn.inference.schedules`; constant by default.
    :param kl_annealing: epochs over which the weight of the KL divergence grows linearly, step by step, to 1.
    :param elbo: the objective, :class:`~pyro_bnn.inference.MixtureELBO` by default, or any ELBO of Pyro.
    :param seed: makes the run reproducible and leaves the global random state unchanged.
    :param training: options of the loop, which all engines share: ``validation``, ``patience``, ``precision``,
        ``accumulate``, ``clip_norm``, ``callbacks``, ``log``, ``log_every``, ``max_steps``, ``max_time``, ``compile``,
        ``progress`` and ``checkpoint``; see :class:`~pyro_bnn.inference.Training`.
    :raises TypeError: for a model or guide that is not a program, labels of the wrong type, or an ``optim`` or ``elbo``
        of the wrong type.
    :raises ValueError: for empty or inconsistent data, labels outside the likelihood's range, NaN in the data, options
        out of range, or a checkpoint that is damaged or belongs to a run with other settings.
    :raises OSError: when the checkpoint cannot be written; model and guide keep what was trained so far.
    :raises FloatingPointError: when the loss is not finite; the message names the step and the site, and model and
        guide return to their state at the end of the last good epoch.
    """
    require_epochs(epochs)
    checks.optional(checks.positive, "lr", lr)
    checks.not_negative("weight_decay", weight_decay)
    checks.not_negative("kl_annealing", kl_annealing)
    checks.seed("seed", seed)
    options = checked(training, "fit")
    require_trainable(model, guide, elbo)
    together = processes()
    batches = minibatches(model, data, batch_size, together=together)
    with contextlib.ExitStack() as stack:
        stack.enter_context(keeping_modes(model, guide))
        stack.enter_context(seeded(device_of(model), together.own_seed(seed)))
        knows = isinstance(model, BayesianNetwork) and model.num_data is not None
        size = None if knows else batches.size or 1
        steps = -(-batches.steps // options["accumulate"])
        annealing = kl_annealing * steps
        objective = Objective(
            model, guide, elbo=elbo, kl_annealing=annealing, num_data=size, example=batches.first
        ).train()
        stack.enter_context(objective.store())
        parameters = objective.trained()
        optimizer = _optimizer(optim, parameters, model, guide, lr, weight_decay, decay)
        settings: dict[str, str] = {}
        if options["checkpoint"] is not None:
            own: dict[str, Any] = {"schedule": schedule, "kl_annealing": kl_annealing, "elbo": objective.elbo}
            own |= {} if isinstance(data, DataLoader) else {"batch_size": batch_size}
            own |= settings_of_loop(options)
            settings = settings_of(model, guide, optimizer, data, **own, method="SVI", seed=seed)
        scheduler = scheduler_of(schedule, optimizer, steps, epochs)
        run = TrainingRun(model, guide, parameters, optimizer, scheduler, settings=settings, together=together)
        train(run, batches, _SVI(objective, together, options), options, epochs=epochs)
    return objective.posterior(losses=run.losses)


class _SVI:
    """Steps along the gradient of the objective.

    In several processes ``DistributedDataParallel`` averages gradients. The loss of each, of B_i rows, counts by its
    share of the batch, so that the average is the gradient for all of its rows.
    """

    label = "SVI"

    def __init__(self, objective: Objective, together: Processes, options: Training) -> None:
        self.objective, self.together = objective, together
        self.loss: Callable[..., Tensor] = objective.loss
        if together.are_several:
            self.loss = DistributedDataParallel(objective, broadcast_buffers=False)
        self.compiled = compiled_step(options, self._differentiate, objective.trained(), [objective], together)

    def add_gradient(self, batch: tuple[object, ...], run: TrainingRun, weight: Tensor | float) -> Tensor | float:
        model, guide, objective = run.model, run.guide, self.objective
        objective.step = run.step
        cause = None
        try:
            compiled = self._compiled_loss(batch, run, weight)
            loss = self.loss(*batch) if compiled is None else compiled
            if not run.waits:
                if compiled is None:
                    self._add(loss, weight)
                return loss.detach()
            value = float(loss.detach())
        except ValueError as error:  # validation stops at NaN, but not only there
            if _offending_site(model, guide, batch) is None:
                raise
            value, cause = math.nan, error
        value, weight = self._of_all(value, batch, weight)
        if not math.isfinite(value):
            site = _offending_site(model, guide, batch) or _without_site(run.parameters)
            raise FloatingPointError(
                f"the loss became {value} at step {run.step + 1} (epoch {run.epoch + 1}), {site}. A smaller lr, "
                "clip_norm= or a longer kl_annealing usually helps"
            ) from cause
        if compiled is None:
            self._add(loss, weight)
        return value

    def _compiled_loss(self, batch: tuple[object, ...], run: TrainingRun, weight: Tensor | float) -> Tensor | None:
        """The loss, with its gradient added; ``None`` for a first step, which validates, and where none is compiled."""
        if self.compiled is None or not self.objective.has_begun:
            return None
        like = run.parameters[0]
        numbers = (
            like.new_full((), self.objective.beta) if self.objective.kl_annealing else None,
            weight if isinstance(weight, Tensor) else None if weight == 1.0 else like.new_full((), weight),
        )
        return self.compiled(*numbers, *batch, is_first_of_epoch=run.batch == 0)

    def _differentiate(self, beta: Tensor | None, weight: Tensor | None, *batch: object) -> Tensor:
        step = self.objective.step
        loss = self.objective.loss(*batch, beta=beta)
        self.objective.step = step
        self._add(loss, 1.0 if weight is None else weight)
        return loss

    @staticmethod
    def _add(loss: Tensor, weight: Tensor | float) -> None:
        with full_precision():  # autocast is for the pass forward
            (loss if isinstance(weight, float) and weight == 1.0 else weight * loss).backward()

    def _of_all(self, loss: float, batch: tuple[object, ...], weight: Tensor | float) -> tuple[float, Tensor | float]:
        """The loss of all rows of a batch, and by what that of this process is to be multiplied."""
        if not self.together.are_several:
            return loss, weight
        rows = rows_of(batch)
        total, count = self.together.total([loss * rows, rows])
        return total / count, weight * rows * self.together.size / count

    def direct(self, run: TrainingRun) -> None:
        """The optimiser gets the gradient itself."""

    def describe(self, loss: float) -> str:
        return f"ELBO {-loss:.4f} nats/datum"

    def posterior(self) -> Posterior:
        return self.objective.posterior()


def _optimizer(
    optim: Optim,
    parameters: list[Tensor],
    model: Program,
    guide: Program,
    lr: float | None,
    weight_decay: float,
    decay: str,
) -> Optimizer:
    if decay not in ("weights", "all"):
        raise ValueError(f"decay={decay!r}: expected 'weights' or 'all'")
    if isinstance(optim, Optimizer) and weight_decay:
        raise ValueError(
            f"weight_decay={weight_decay!r}: optim= is an optimiser, which sets its own; leave it out here"
        )
    biases = guide.member_biases() if isinstance(guide, MixtureGuide) else []
    chosen: Iterable[Tensor] = ()
    if isinstance(model, BayesianNetwork):
        chosen = model.decayed() if decay == "weights" else [*model.parameters(), *biases]
    ids = {id(p) for p in chosen}
    groups = [
        {"params": [p for p in parameters if id(p) in ids], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in ids], "weight_decay": 0.0},
    ]
    return build_optimizer(optim, [g for g in groups if g["params"]], lr)


def _offending_site(model: Program, guide: Program, batch: tuple[object, ...]) -> str | None:
    """The first site whose log density is not finite."""
    with torch.no_grad(), pyro.validation_enabled(False):
        guide_trace = poutine.trace(guide).get_trace(*batch)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*batch)
        for trace, program in ((guide_trace, "guide"), (model_trace, "model")):
            trace.compute_log_prob()
            for name, site in trace.nodes.items():
                if site["type"] == "sample" and not bool(torch.isfinite(site["log_prob_sum"])):
                    return f"where the site {name!r} of the {program} has log density {float(site['log_prob_sum'])}"
    return None


def _without_site(parameters: list[Tensor]) -> str:
    if not all(bool(torch.isfinite(p).all()) for p in parameters):
        return "where a parameter is not finite after the last update"
    return "where no site is at fault on a second look: the draws of this step were"
