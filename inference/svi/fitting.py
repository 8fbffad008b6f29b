"""Minibatch stochastic variational inference with ``torch.optim``."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset

from pyro_bnn import display
from pyro_bnn.guide import MixtureGuide
from pyro_bnn.inference import checkpoint as checkpoints
from pyro_bnn.inference.batches import minibatches
from pyro_bnn.inference.schedules import Schedule
from pyro_bnn.inference.svi.elbo import MixtureELBO, ScaleLatents
from pyro_bnn.model import BayesianNetwork
from pyro_bnn.modes import training_mode
from pyro_bnn.posterior import Posterior
from pyro_bnn.randomness import device_of, seeded

Optim = str | Optimizer | Callable[[list[dict[str, Any]]], Optimizer] | None


@dataclass
class FitState:
    """What a callback sees after each epoch.

    :param loss: mean negative ELBO per datum of this epoch, in nats.
    :param losses: the same for every step so far.
    """

    epoch: int
    step: int
    loss: float
    model: Callable[..., Any]
    guide: Callable[..., Any]
    optimizer: Optimizer
    losses: list[float] = field(default_factory=list)

    def __repr__(self) -> str:
        programs = {"model": display.name_of(self.model), "guide": display.name_of(self.guide)}
        return display.call(self, epoch=self.epoch, step=self.step, loss=self.loss, **programs)


def fit(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: DataLoader[Any] | Dataset[Any] | tuple[Any, Tensor],
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
    clip_norm: float | None = None,
    callbacks: Sequence[Callable[[FitState], bool | None]] = (),
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    seed: int | None = None,
) -> Posterior:
    """Maximises the ELBO over minibatches, and returns the posterior.

    The loss of a step is the negative ELBO divided by the size of the data set, in nats per datum::

        -(1/N) [ (N/B) sum_b log p(y_b | x_b, z) + log p(W) - beta * KL(q || p) ],   beta = min(1, step / annealing)

    Parameters are those of the modules, trained in place; the user's parameter store is left as it was.

    :param model: a model of this package, or any Pyro model ``model(x, y)``.
    :param guide: a guide for it.
    :param data: a loader of (x, y), a dataset, or the pair (x, y) itself; x may be a tensor, dict or tuple.
    :param epochs: passes over the data.
    :param batch_size: for a dataset or a pair; a loader has its own.
    :param optim: ``"adamw"`` (default), ``"sgd"`` (Nesterov momentum 0.9), an optimiser, or a function from parameter
        groups to one.
    :param lr: learning rate; 1e-3 for AdamW and 0.1 for SGD by default.
    :param weight_decay: of the named optimisers. The model's ``weight_prior`` makes it 0 by default.
    :param decay: what it applies to: ``"weights"``, the W of the model alone, or ``"all"`` parameters of the network
        with the biases of its members. Never the factors.
    :param schedule: see :mod:`pyro_bnn.inference.schedules`; constant by default.
    :param kl_annealing: epochs over which the weight of the KL divergence grows linearly, step by step, to 1.
    :param elbo: the objective, :class:`~pyro_bnn.inference.MixtureELBO` by default, or any ELBO of Pyro.
    :param clip_norm: largest norm of the whole gradient.
    :param callbacks: called with a :class:`FitState` after each epoch; one that returns True ends the training.
    :param checkpoint: file that is written after each epoch, and resumed from when it exists.
    :param seed: makes the run reproducible, and leaves the global random state alone.
    :raises ValueError: for empty or inconsistent data, labels outside the likelihood's range, or NaN in the data.
    :raises FloatingPointError: when the loss is not finite; the message names the step and the site, and model and
        guide are as they were at the end of the last good epoch.
    """
    if epochs < 1:
        raise ValueError(f"epochs={epochs!r}: expected at least 1")
    batches = minibatches(model, data, batch_size)
    steps, size, first = batches.steps, batches.size, batches.first
    objective = MixtureELBO() if elbo is None else elbo
    bar = Progress(
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[elbo]}")),
        *(TimeElapsedColumn(), TimeRemainingColumn()),
        disable=not progress,
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(seeded(device_of(model), seed))
        store = stack.enter_context(pyro.get_param_store().scope())
        parameters = _initialise(model, guide, first)
        optimizer = _optimizer(optim, parameters, model, guide, lr, weight_decay, decay)
        scheduler = schedule(optimizer, steps, epochs) if schedule is not None else None
        run = TrainingRun(model, guide, parameters, optimizer, scheduler)
        if checkpoint is not None:
            run.resume(checkpoint)
        run.remember()
        stack.enter_context(bar)
        task = bar.add_task("SVI", total=epochs, completed=run.epoch, elbo="")
        while run.epoch < epochs:
            _train_mode(model, guide)
            total = 0.0
            before = run.step
            for batch in batches.epoch():
                beta = min(1.0, (run.step + 1) / (steps * kl_annealing)) if kl_annealing > 0 else 1.0
                cause = None
                try:
                    # distributions validate their arguments on the first step; later ones have the same shapes
                    with pyro.validation_enabled(run.step == 0), training_mode(True), ScaleLatents(beta):
                        loss = objective.differentiable_loss(model, guide, *batch) / (size or 1)  # type: ignore[attr-defined]
                    value = float(loss.detach())
                except ValueError as error:  # validation stops at NaN, but not only there
                    if _offending_site(model, guide, batch) is None:
                        raise
                    value, cause = math.nan, error
                if not math.isfinite(value):
                    site = _offending_site(model, guide, batch) or _without_site(parameters)
                    run.restore()
                    raise FloatingPointError(
                        f"the loss became {value} at step {run.step + 1} (epoch {run.epoch + 1}), {site}. Model and "
                        f"guide are back at the end of epoch {run.remembered_epoch}. A smaller lr, clip_norm= or a "
                        "longer kl_annealing usually helps"
                    ) from cause
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                if clip_norm is not None:
                    nn.utils.clip_grad_norm_(parameters, clip_norm)
                optimizer.step()
                if scheduler is not None:
                    scheduler.step()
                run.step += 1
                run.losses.append(value)
                total += value
            run.epoch += 1
            run.remember()
            mean = total / (run.step - before)
            bar.update(task, completed=run.epoch, elbo=f"ELBO {-mean:.4f} nats/datum")
            if checkpoint is not None:
                run.write(checkpoint)
            state = FitState(run.epoch, run.step, mean, model, guide, optimizer, run.losses)
            stop = [callback(state) for callback in callbacks]
            if any(stop):
                break
        example = pytree.tree_map(lambda t: t[:1] if isinstance(t, Tensor) and t.dim() else t, first[0])
        modules = isinstance(model, nn.Module) and isinstance(guide, nn.Module)
        return Posterior(model, guide, losses=run.losses, example=example, store=None if modules else store)


# ------------------------------------------------------------------------------------------------ parameters


def _initialise(model: Callable[..., Any], guide: Callable[..., Any], first: tuple[Any, ...]) -> list[Tensor]:
    """All trainable parameters: those of modules, and those that functions declare with ``pyro.param``."""
    modules = [program for program in (model, guide) if isinstance(program, nn.Module)]
    for module in modules:
        module.eval()  # this first call, which sets up an AutoGuide, must not move statistics
    quiet = pyro.validation_enabled(False)  # the first step validates, and reports
    with torch.no_grad(), training_mode(False), quiet, poutine.trace(param_only=True) as capture:
        draw = poutine.trace(guide).get_trace(*first)
        poutine.replay(model, trace=draw)(*first)  # an improper prior has no draws of its own
    sites: list[Any] = list(capture.trace.nodes.values())
    declared = [site["value"].unconstrained() for site in sites]
    owned = [p for module in modules for p in module.parameters()]
    unique = {id(p): p for p in (*owned, *declared) if p.requires_grad and p.numel()}
    if not unique:
        raise ValueError("neither model nor guide has parameters to train")
    return list(unique.values())


def _optimizer(
    optim: Optim,
    parameters: list[Tensor],
    model: Callable[..., Any],
    guide: Callable[..., Any],
    lr: float | None,
    weight_decay: float,
    decay: str,
) -> Optimizer:
    if isinstance(optim, Optimizer):
        return optim
    if decay not in ("weights", "all"):
        raise ValueError(f"decay={decay!r}: expected 'weights' or 'all'")
    points = guide.points() if isinstance(guide, MixtureGuide) else []
    chosen: Iterable[Tensor] = ()
    if isinstance(model, BayesianNetwork):
        chosen = model.decayed() if decay == "weights" else [*model.parameters(), *points]
    ids = {id(p) for p in chosen}
    groups = [
        {"params": [p for p in parameters if id(p) in ids], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in ids], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if callable(optim):
        return optim(groups)
    if optim in (None, "adamw"):
        return torch.optim.AdamW(groups, lr=1e-3 if lr is None else lr)
    if optim == "sgd":
        return torch.optim.SGD(groups, lr=0.1 if lr is None else lr, momentum=0.9, nesterov=True)
    raise ValueError(f"optim={optim!r}: expected 'adamw', 'sgd', an optimiser or a function of parameter groups")


def _train_mode(model: Callable[..., Any], guide: Callable[..., Any]) -> None:
    for program in (model, guide):
        if isinstance(program, nn.Module):
            program.train()


def _offending_site(model: Callable[..., Any], guide: Callable[..., Any], batch: tuple[Any, ...]) -> str | None:
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


# --------------------------------------------------------------------------------------------- state of a run


class TrainingRun:
    """Everything that changes during training."""

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        parameters: list[Tensor],
        optimizer: Optimizer,
        scheduler: LRScheduler | None,
    ) -> None:
        self.parameters, self.optimizer, self.scheduler = parameters, optimizer, scheduler
        self.buffers = [b for program in (model, guide) if isinstance(program, nn.Module) for b in program.buffers()]
        self.epoch = self.step = 0
        self.losses: list[float] = []
        self._good: list[Tensor] = []
        self.remembered_epoch = 0

    def remember(self) -> None:
        """Keeps this state as the last good one, if it is."""
        values = [*self.parameters, *self.buffers]
        if all(bool(torch.isfinite(v).all()) for v in values):
            self._good = [v.detach().clone() for v in values]
            self.remembered_epoch = self.epoch

    def restore(self) -> None:
        with torch.no_grad():
            for value, good in zip([*self.parameters, *self.buffers], self._good, strict=True):
                value.copy_(good)

    def write(self, path: str | os.PathLike[str]) -> None:
        cuda = {p.device for p in self.parameters if p.is_cuda}
        checkpoints.write(
            path,
            {
                "epoch": self.epoch,
                "step": self.step,
                "losses": self.losses,
                "values": [v.detach() for v in (*self.parameters, *self.buffers)],
                "optimizer": self.optimizer.state_dict(),
                "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
                "random": torch.get_rng_state(),
                "cuda_random": [torch.cuda.get_rng_state(d) for d in sorted(cuda, key=str)],
            },
        )

    def resume(self, path: str | os.PathLike[str]) -> None:
        state = checkpoints.read(path)
        if state is None:
            return
        values = [*self.parameters, *self.buffers]
        if [v.shape for v in values] != [v.shape for v in state["values"]]:
            raise ValueError(
                f"{path} is the checkpoint of another model or guide (its tensors have other shapes); remove it to "
                "start afresh"
            )
        with torch.no_grad():
            for value, saved in zip(values, state["values"], strict=True):
                value.copy_(saved)
        self.epoch, self.step, self.losses = state["epoch"], state["step"], list(state["losses"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None and state["scheduler"] is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["random"])
        for device, saved in zip(
            sorted({p.device for p in self.parameters if p.is_cuda}, key=str), state["cuda_random"], strict=True
        ):
            torch.cuda.set_rng_state(saved, device)
