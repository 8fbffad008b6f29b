"""What all engines that train by gradients take: :class:`Training`, one word for one thing."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from typing import Any, TypedDict, get_type_hints

from pyro_bnn.entry import checks
from pyro_bnn.inference.checkpoint import Checkpoint
from pyro_bnn.inference.training.callbacks import AnyCallback
from pyro_bnn.inference.training.logs import Log
from pyro_bnn.inference.training.precision import Half
from pyro_bnn.inputs import Data


class Training(TypedDict, total=False):
    """Options of the loop, which ``fit``, ``SVGD.fit``, ``DeepEnsemble.fit``, ``SWAG.fit`` and others share.

    :param validation: data as :func:`~pyro_bnn.diagnostics.evaluate` takes them. After every epoch the NLL of
        their predictions is computed, and at the end model and guide return to the epoch where it was least.
    :param patience: end the training after so many epochs without a better NLL on ``validation``.
    :param precision: ``"bf16"`` or ``"fp16"`` runs the network in 16 bits, under ``torch.autocast``; parameters,
        KL divergences, kernels and log densities stay in float32. fp16 scales the loss, see
        :class:`~pyro_bnn.inference.training.precision.Precision`.
    :param accumulate: k, for one step from the gradients of k batches, each weighted by its rows: that of one batch as
        large as all of them, in less memory. Layers that normalise by the batch still see every batch alone.
    :param clip_norm: largest norm of the gradient over all parameters; larger gradients are scaled down to it.
    :param callbacks: functions, called with a :class:`~pyro_bnn.inference.FitState` after each epoch, or objects, see
        :class:`~pyro_bnn.inference.Callback`; one that returns True ends the training.
    :param log: gets numbers of every epoch: ``loss``, ``learning_rate``, ``steps_per_second``, ``validation_nll``. A
        function ``(values, step)``, a run of Weights & Biases, ``mlflow``, TensorBoard's ``SummaryWriter``, a logger of
        Lightning, or :class:`~pyro_bnn.inference.CSVLog`.
    :param log_every: log ``step_loss`` and ``learning_rate`` after so many steps too.
    :param max_steps: end after so many steps, also within an epoch; those before an interruption count.
    :param max_time: end after so many seconds of this call, also within an epoch.
    :param compile: whether ``torch.compile`` makes machine code of a step, loss and gradient, once for each form of
        batch: seconds for a small network, minutes for a large one, and a C++ compiler is needed. Draws are the same
        and results equal but for rounding. Where it cannot, it warns, and steps are those of the model itself; see
        :class:`~pyro_bnn.inference.training.compiled.CompiledStep`. ``"reduce-overhead"`` launches it by CUDA graphs.
    :param progress: whether to show a progress bar.
    :param checkpoint: a file, or a :class:`~pyro_bnn.inference.Checkpoint`, which says how often to write and how many
        to keep. If the file exists, the run resumes from it, to the same bits on the CPU; it must have the same
        settings, except that it may have more epochs. Ctrl-C and SIGTERM write it before the process ends.
    """

    validation: Data
    patience: int | None
    precision: Half | None
    accumulate: int
    clip_norm: float | None
    callbacks: Sequence[AnyCallback]
    log: Log | None
    log_every: int | None
    max_steps: int | None
    max_time: float | None
    compile: checks.Compile
    progress: bool
    checkpoint: str | os.PathLike[str] | Checkpoint | None


def checked(training: Training, engine: str) -> Training:
    """All options, with defaults for those that were not given.

    :param engine: that was called, for the message.
    :raises TypeError: for an option that does not exist, or one of a wrong type.
    :raises ValueError: for a number out of range, or ``patience`` without ``validation``.
    """
    known = [*get_type_hints(Training)]
    for name in training:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f": did you mean {near[0]}=?" if near else f", which knows {', '.join(known)}"
            raise TypeError(f"{name}= is no option of {engine}{hint}")
    defaults: Training = {
        "validation": None,
        "patience": None,
        "precision": None,
        "accumulate": 1,
        "clip_norm": None,
        "callbacks": (),
        "log": None,
        "log_every": None,
        "max_steps": None,
        "max_time": None,
        "compile": False,
        "progress": True,
        "checkpoint": None,
    }
    options: Training = {**defaults, **training}
    checks.count("accumulate", options["accumulate"])
    checks.optional(checks.positive, "clip_norm", options["clip_norm"])
    checks.truth("progress", options["progress"])
    checks.compiling("compile", options["compile"])
    checks.optional(checks.positive, "max_time", options["max_time"])
    for name in ("patience", "log_every", "max_steps"):
        checks.optional(checks.count, name, training.get(name))
    if options["patience"] is not None and options["validation"] is None:
        raise ValueError(f"patience={options['patience']}: expected validation= too, the data that it looks at")
    Checkpoint.of(options["checkpoint"])
    return options


def settings_of_loop(training: Training) -> dict[str, Any]:
    """Those options that change what training finds, by name, for a checkpoint to know."""
    names = ("validation", "precision", "accumulate", "clip_norm")
    return {name: training.get(name) for name in names}
