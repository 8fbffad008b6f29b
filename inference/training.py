"""The loop of every engine that trains by gradients, and the optimiser that it works with.

An engine hands :func:`train` a :class:`~pyro_bnn.inference.checkpoint.TrainingRun` and a function that makes one step.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from pyro_bnn import display
from pyro_bnn.inference.batches import Minibatches
from pyro_bnn.inference.checkpoint import TrainingRun
from pyro_bnn.inference.progress import progress_bar
from pyro_bnn.sites import Program

#: What ``optim=`` takes, in every engine. See :func:`build_optimizer`.
Optim = str | type[Optimizer] | Callable[[list[dict[str, Any]]], Optimizer] | Optimizer | None


@dataclass
class FitState:
    """What a callback sees after each epoch.

    :param epoch: number of epochs that are done, over all runs of one checkpoint.
    :param step: number of steps that are done.
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
    """Goes through the data until ``run`` has ``epochs`` epochs, from the checkpoint on where there is one.

    :param step: one update on a batch.
    :param label: stands before the progress bar.
    :param describe: from the mean loss of an epoch to what stands behind the bar.
    :param callbacks: called after each epoch, all of them; one that returns True ends the training.
    :param checkpoint: file that is written after each epoch, and resumed from when it exists.
    :raises FloatingPointError: when a step does; see :func:`train_epoch`.
    """
    if checkpoint is not None:
        run.resume(checkpoint)
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
    """One pass over the data; the mean of its losses.

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
            run.restore()
            raise FloatingPointError(
                f"{error}. Model and guide are back at the end of epoch {run.remembered_epoch}"
            ) from (error.__cause__ or error)
        if run.scheduler is not None:
            run.scheduler.step()
        run.step += 1
        run.losses.append(loss)
    run.epoch += 1
    run.remember()
    return sum(run.losses[before:]) / (len(run.losses) - before)


def first_row(batches: Minibatches) -> object:
    """One row of x, from which a posterior knows what its inputs look like."""
    return pytree.tree_map(lambda t: t[:1] if isinstance(t, Tensor) and t.dim() else t, batches.first[0])


def require_epochs(epochs: int) -> None:
    """Refuses a run without epochs, before anything is set up."""
    if epochs < 1:
        raise ValueError(f"epochs={epochs!r}: expected at least 1")


# ------------------------------------------------------------------------------------------------- the optimiser

_NAMED: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {"lr": 1e-3}),
    "adam": (torch.optim.Adam, {"lr": 1e-3}),
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
}


def build_optimizer(
    optim: Optim, groups: list[dict[str, Any]], lr: float | None = None, *, default: str = "adamw"
) -> Optimizer:
    """The optimiser that ``optim=`` stands for, in every engine.

    ============================  =====================================================================================
    ``None``                      the engine's ``default``
    ``"adamw"``, ``"adam"``       of torch, with ``lr`` or 1e-3
    ``"sgd"``                     with Nesterov momentum 0.9, and ``lr`` or 0.1
    a class of ``torch.optim``    is called with the parameter groups and ``lr``; without ``lr`` it has its own default
    a function                    from parameter groups to an optimiser, as ``lambda groups: Adam(groups, lr=1e-2)``
    an optimiser                  as it is
    ============================  =====================================================================================

    :param groups: parameter groups as ``torch.optim`` takes them, ``[{"params": [...], ...}]``.
    :param lr: learning rate of a name or a class. The last two have their own.
    :raises ValueError: for another name, a rate that nothing would use, or an optimiser of other parameters.
    :raises TypeError: for anything else, or a function that returns no optimiser.
    """
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
            f"lr={lr!r} goes with the name or the class of an optimiser, but optim= sets a learning rate of its own: "
            "give the rate there, and leave lr out"
        )
    optimizer = optim if isinstance(optim, Optimizer) else optim(groups)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optim= must return a torch.optim.Optimizer, got {type(optimizer).__name__}")
    trained: list[Tensor] = [p for group in groups for p in group["params"]]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in held for p in trained):
        raise ValueError(
            "the optimiser holds none of the parameters that are to be trained: build it from those of this model and "
            "guide, or give a function of parameter groups such as lambda groups: torch.optim.Adam(groups, lr=1e-3)"
        )
    return optimizer
