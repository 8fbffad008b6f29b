"""The loop of every engine that trains by gradients, and the optimiser that it works with.

An engine hands :func:`train` a :class:`~pyro_bnn.inference.checkpoint.TrainingRun` and a function that makes one step.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import constraints
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from pyro_bnn import display
from pyro_bnn.entry import checks
from pyro_bnn.inference.batches import Minibatches
from pyro_bnn.inference.checkpoint import TrainingRun
from pyro_bnn.inference.progress import progress_bar
from pyro_bnn.modes import undisturbed
from pyro_bnn.program.guide import MixtureGuide
from pyro_bnn.program.model import BayesianNetwork
from pyro_bnn.program.sites import Program

#: What ``optim=`` takes, in every engine. See :func:`build_optimizer`.
Optim = str | type[Optimizer] | Callable[[list[dict[str, Any]]], Optimizer] | Optimizer | None


@dataclass
class FitState:
    """The state of training that callbacks get after each epoch.

    :param epoch: number of completed epochs, including those before an interruption.
    :param step: number of completed steps.
    :param loss: mean loss per datum of this epoch, in nats: the negative ELBO of ``fit``, the energy of ``SVGD``.
    :param losses: the same for every step so far.
    """

    epoch: int
    step: int
    loss: float
    model: Program
    guide: Program
    optimizer: Optimizer
    losses: list[float] = field(default_factory=list)

    def __repr__(self) -> str:
        programs = {"model": display.name_of(self.model), "guide": display.name_of(self.guide)}
        return display.call(self, epoch=self.epoch, step=self.step, loss=self.loss, **programs)


#: by which torch's message is known
_ONE_VALUE = "Expected more than 1 value per channel"

#: one that returns True ends the training
Callback = Callable[[FitState], bool | None]

#: ``(batch, run) -> loss``: one update, or a ``FloatingPointError`` that says why there can be none
Step = Callable[[tuple[object, ...], TrainingRun], float]


# ------------------------------------------------------------------------------------------------------ the loop


def train(
    run: TrainingRun,
    batches: Minibatches,
    step: Step,
    *,
    epochs: int,
    label: str,
    describe: Callable[[float], str],
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
) -> None:
    """Trains until ``run`` has completed ``epochs`` epochs, starting from the checkpoint if there is one.

    :param step: one update on a batch.
    :param label: text before the progress bar.
    :param describe: turns the mean loss of an epoch into the text after the bar.
    :param callbacks: all are called after each epoch; one that returns True ends the training.
    :param checkpoint: a file that is written after each epoch; if it exists, training resumes from it.
    :raises FloatingPointError: when a step does; see :func:`train_epoch`.
    :raises ValueError: when the checkpoint is damaged, or that of a run with other settings or more epochs.
    :raises OSError: when the checkpoint cannot be written.
    """
    callbacks = checks.functions("callbacks", callbacks)
    checks.truth("progress", progress)
    require_rows_for_statistics(run.model, batches)
    if checkpoint is not None:
        checkpoint = checks.path("checkpoint", checkpoint)
        run.resume(checkpoint, epochs)
    run.remember()
    with progress_bar(label, epochs, done=run.epoch, progress=progress) as bar:
        while run.epoch < epochs:
            loss = train_epoch(run, batches, step)
            bar.advance(describe(loss))
            if checkpoint is not None:
                run.write(checkpoint)
            state = FitState(run.epoch, run.step, loss, run.model, run.guide, run.optimizer, run.losses)
            stop = [callback(state) for callback in callbacks]
            if any(stop):
                break


def train_epoch(run: TrainingRun, batches: Minibatches, step: Step) -> float:
    """Makes one pass over the data and returns the mean loss.

    :raises FloatingPointError: when a step does; ``run`` is back in its last good state.
    """
    for program in (run.model, run.guide):
        if isinstance(program, nn.Module):
            program.train()
    before = len(run.losses)
    for batch in batches.epoch():
        try:
            loss = step(batch, run)
        except FloatingPointError as error:
            raise _back(run, error) from (error.__cause__ or error)
        if run.scheduler is not None:
            run.scheduler.step()
        run.step += 1
        run.losses.append(loss)
    run.epoch += 1
    wrong = run.not_finite()
    if wrong is not None:  # the last update of the epoch, after which no loss was computed
        raise _back(run, FloatingPointError(f"{wrong} became NaN or infinite at step {run.step}. A smaller lr helps"))
    run.remember()
    return sum(run.losses[before:]) / (len(run.losses) - before)


def _back(run: TrainingRun, error: FloatingPointError) -> FloatingPointError:
    """Restores the last good state of a run that diverged, and adds this to the error message."""
    run.restore()
    return FloatingPointError(f"{error}. Model and guide are back at the end of epoch {run.remembered_epoch}")


def first_row(batch: tuple[object, ...]) -> object:
    """One row of x, as the example input of a posterior."""
    return pytree.tree_map(lambda t: t[:1] if isinstance(t, Tensor) and t.dim() else t, batch[0])


def require_rows_for_statistics(model: Program, batches: Minibatches) -> None:
    """Refuses data whose last batch has one row where batch normalisation needs several, before anything trains.

    Whether it does depends on what else a layer averages over, so that one row is run as in training.

    :raises ValueError: when torch refuses it.
    """
    if not isinstance(model, BayesianNetwork) or batches.size is None or not model.moving_layers():
        return
    y = batches.first[-1]
    rows = len(y) if isinstance(y, Tensor) else 0
    if batches.size - (batches.steps - 1) * rows != 1:
        return
    net = model.core().net
    try:
        with undisturbed(net):
            net.train()
            model.core()(first_row(batches.first))
    except ValueError as error:
        if _ONE_VALUE not in str(error):
            raise
        raise ValueError(
            f"the last batch of every pass has one row, because {batches.size} rows are split into batches of {rows}, "
            f"and batch normalisation cannot compute a variance from one row ({error}). Choose another batch_size=, or "
            "a DataLoader with shuffle=True and drop_last=True"
        ) from error


def require_epochs(epochs: int) -> None:
    """Refuses a run without epochs, before anything is set up."""
    checks.count("epochs", epochs)


def require_programs(model: object, guide: object) -> None:
    """Refuses a model and a guide that are swapped, or are not programs.

    :raises TypeError: see above.
    """
    if isinstance(model, (MixtureGuide, AutoGuide)) or isinstance(guide, BayesianNetwork):
        raise TypeError(
            f"model={type(model).__name__}, guide={type(guide).__name__}: expected the model first and then its guide"
        )
    for name, program in (("model", model), ("guide", guide)):
        if not callable(program):
            raise TypeError(f"{name}={program!r}: expected a Pyro program, a module or a function")


def require_supports(model: poutine.Trace, guide: poutine.Trace) -> None:
    """Refuses a guide whose values lie where the prior has no density: no learning rate could fix that.

    :param model: its trace at the draw of the guide.
    :raises ValueError: names the first such site.
    """
    priors: dict[str, Any] = model.nodes
    own: dict[str, Any] = guide.nodes
    for name, site in own.items():
        prior = priors.get(name)
        if site["type"] != "sample" or prior is None or prior["type"] != "sample" or site_is_subsample(site):
            continue
        low, high = _bounds(prior["fn"].support)
        point = isinstance(_base(site["fn"]), dist.Delta)
        value: Tensor = site["value"]
        least, most = (
            (float(value.detach().min()), float(value.detach().max())) if point else _bounds(site["fn"].support)
        )
        if least < low or most > high:
            found = "points" if point else f"a {type(_base(site['fn'])).__name__} on"
            raise ValueError(
                f"the supports of the site {name!r} differ: its prior, a {type(_base(prior['fn'])).__name__}, has no "
                f"density outside of [{low:g}, {high:g}], but the guide has {found} [{least:g}, {most:g}]. "
                "Give the site a prior on all numbers, or take a guide that follows the prior's support, such as "
                "pyro.infer.autoguide.AutoNormal"
            )


def _base(fn: Any) -> Any:
    """The distribution inside of an ``Independent`` and the like."""
    while isinstance(fn, (torch.distributions.Independent, dist.MaskedDistribution, dist.ExpandedDistribution)):
        fn = fn.base_dist
    return fn


def _bounds(support: Any) -> tuple[float, float]:
    """The least and the largest number of a support, as far as it says."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    low, high = getattr(support, "lower_bound", -math.inf), getattr(support, "upper_bound", math.inf)
    return float(torch.as_tensor(low).min()), float(torch.as_tensor(high).max())


# ------------------------------------------------------------------------------------------------- the optimiser

_NAMED: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {"lr": 1e-3}),
    "adam": (torch.optim.Adam, {"lr": 1e-3}),
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
}


def build_optimizer(
    optim: Optim, groups: list[dict[str, Any]], lr: float | None = None, *, default: str = "adamw"
) -> Optimizer:
    """Builds the optimiser for the option ``optim=`` of every engine.

    ============================  =====================================================================================
    ``None``                      the engine's ``default``
    ``"adamw"``, ``"adam"``       of torch, with ``lr`` or 1e-3
    ``"sgd"``                     with Nesterov momentum 0.9, and ``lr`` or 0.1
    a class of ``torch.optim``    is called with the parameter groups and ``lr``; without ``lr`` it has its own default
    a function                    from parameter groups to an optimiser, as ``lambda groups: Adam(groups, lr=1e-2)``
    an optimiser                  as it is
    ============================  =====================================================================================

    :param groups: parameter groups as ``torch.optim`` takes them, ``[{"params": [...], ...}]``.
    :param lr: learning rate, for a name or a class; functions and optimisers set their own.
    :raises ValueError: for an unknown name, an ``lr`` that would not be used, or an optimiser of other parameters.
    :raises TypeError: for anything else, or a function that does not return an optimiser.
    """
    checks.optional(checks.positive, "lr", lr)
    optim = default if optim is None else optim
    rate: dict[str, Any] = {} if lr is None else {"lr": lr}
    if isinstance(optim, str):
        if optim not in _NAMED:
            raise ValueError(
                f"optim={optim!r}: expected {', '.join(map(repr, _NAMED))}, a class of torch.optim, a function of "
                "parameter groups or an optimiser"
            )
        kind, options = _NAMED[optim]
        return kind(groups, **(options | rate))
    if isinstance(optim, type) and issubclass(optim, Optimizer):
        return optim(groups, **rate)
    if isinstance(optim, type) or not (isinstance(optim, Optimizer) or callable(optim)):
        raise TypeError(
            f"optim={optim!r}: expected a name, a class of torch.optim, a function of parameter groups or an optimiser"
        )
    if rate:
        raise ValueError(
            f"lr={lr!r} is for the name or the class of an optimiser, but optim= sets its own learning rate: set the "
            "rate there and leave lr out"
        )
    optimizer = optim if isinstance(optim, Optimizer) else optim(groups)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optim= must return a torch.optim.Optimizer, got {type(optimizer).__name__}")
    trained: list[Tensor] = [p for group in groups for p in group["params"]]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in held for p in trained):
        raise ValueError(
            "the optimiser has none of the parameters to train: build it from the parameters of this model and guide, "
            "or give a function of parameter groups such as lambda groups: torch.optim.Adam(groups, lr=1e-3)"
        )
    return optimizer
