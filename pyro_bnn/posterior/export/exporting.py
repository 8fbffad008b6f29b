"""Exports a posterior: collects its draws, traces them on one input, and checks the module that results."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Iterable, Iterator

import pyro
import torch
from torch import Tensor, nn
from torch.export import Dim

from pyro_bnn import display
from pyro_bnn.entry import checks
from pyro_bnn.inputs import Inputs, inputs, naming_shapes, require_finite
from pyro_bnn.modes import frozen
from pyro_bnn.network import batch_size, no_fused_attention
from pyro_bnn.perturb.samples import unlike
from pyro_bnn.posterior import draw_source
from pyro_bnn.posterior.export.arguments import Arguments
from pyro_bnn.posterior.export.averaged import OUTPUTS, Averaged
from pyro_bnn.posterior.export.graph import plain_module
from pyro_bnn.program.model import BayesianNetwork


def export(
    source: draw_source.DrawSource,
    example: Inputs,
    draws: int | None,
    outputs: str | Iterable[str],
    seed: int | None,
) -> nn.Module:
    """See :meth:`~pyro_bnn.posterior.Posterior.export`, also for the errors."""
    model = source.model
    names = _require_outputs(outputs)
    checks.seed("seed", seed)
    if not isinstance(model, BayesianNetwork):
        raise TypeError(
            f"export() is for models of this package, which know their network, not {display.name_of(model)}: "
            "posterior.sample(n) gives values of its sites"
        )
    count = source.count(checks.optional(checks.count, "draws", draws))
    x = inputs(example, model.like(), "example")
    require_finite(x, "example")
    size = batch_size(x)
    if not size:
        raise ValueError("example is empty: give at least one row")
    arguments = Arguments.of(x, model.core().net, size)
    with _undisturbed(model), naming_shapes(x):
        with torch.no_grad():
            found, own = _draws_and_statistics(source, x, count, seed)
        row = model.core().activation_elements(x, size)
        step = max(1, draw_source.MAX_ELEMENTS // (row * source.num_members * size))
        averaged = Averaged(model, found, own, arguments, names, step)
        _require_known(model, averaged, arguments, size)
        module = plain_module(_traced(averaged, arguments), arguments, names, averaged.name_in_module)
        for rows in sorted({1, 2, size}):
            _require_equal(module, averaged, arguments.rows(rows), names)
        _require_unchanged(module)
    return module


@contextlib.contextmanager
def _undisturbed(model: BayesianNetwork) -> Iterator[None]:
    """Inside, the model runs as it predicts, in full precision, without checks of values, which no graph can show."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.autocast(model.like().device.type, enabled=False))
        stack.enter_context(frozen(model))
        stack.enter_context(pyro.validation_enabled(False))
        stack.enter_context(no_fused_attention())
        stack.enter_context(model.core().in_turn())
        yield


def _require_outputs(outputs: str | Iterable[str]) -> tuple[str, ...]:
    names = checks.names("outputs", outputs)
    for name in names:
        checks.choice("outputs", name, OUTPUTS)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"outputs={outputs!r}: expected at least one of {', '.join(map(repr, OUTPUTS))}, each once")
    return names


def _draws_and_statistics(
    source: draw_source.DrawSource, x: Inputs, count: int, seed: int | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """``{site: [n, members, *event]}``, and ``{buffer: [n, *shape]}`` of the buffers that differ between draws.

    The other buffers of the network then have the values that belong to all draws.
    """
    model = source.model
    assert isinstance(model, BayesianNetwork)
    parts: list[dict[str, Tensor]] = []
    held: list[dict[str, Tensor]] = []
    for group, index in source.indexed_groups(count, seed, example=x):
        for part in source.statistics.parts(model, group, index):
            buffers = {name: buffer.clone() for name, buffer in model.core().net.named_buffers()}
            held += [buffers] * len(next(iter(part.values())))
            parts.append(part)
    varying = [
        name for name, value in held[0].items() if not all(torch.equal(value, other[name]) for other in held[1:])
    ]
    draws = {site: torch.cat([part[site] for part in parts]) for site in parts[0]}
    return draws, {name: torch.stack([buffers[name] for buffers in held]) for name in varying}


def _require_known(model: BayesianNetwork, averaged: Averaged, arguments: Arguments, size: int) -> None:
    """Runs the program once: errors of the network and of the outputs come from here, and its layouts are found."""
    averaged(*arguments.example)
    folds = {"rank-1", "low-rank"} & set(model.forms().values())
    if (
        folds
        and not unlike(arguments.input(arguments.example), size)
        and any(t.dim() == 1 and not (t.is_floating_point() or t.is_complex()) for t in arguments.example)
    ):
        raise ValueError(
            "example has one integer for each sample, and the same in all of them: give samples that differ in it, as "
            "a network may sort its samples by such a number"
        )


def _traced(averaged: Averaged, arguments: Arguments) -> torch.export.ExportedProgram:
    """
    :raises RuntimeError: when the network cannot be traced for any number of samples.
    """
    fixed = {n for t in arguments.example for n in t.shape[1:]}
    size = next(n for n in itertools.count(3) if n not in fixed)  # unlike all other sizes, to be told from them
    batch = Dim("batch", min=1)
    try:
        with warnings.catch_warnings():
            # recurrent layers list their weights once more, and have their own list again afterwards
            warnings.filterwarnings("ignore", "The tensor attributes? .* assigned during export")
            return torch.export.export(
                averaged,
                arguments.rows(size),
                dynamic_shapes={"tensors": tuple({0: batch} for _ in arguments.example)},
                strict=False,
            )
    except Exception as error:
        reason = " ".join(str(error).strip().splitlines()[:2])
        raise RuntimeError(
            f"the network cannot be exported for any number of samples ({type(error).__name__}: {reason}). Branches on "
            "values and on the number of samples have no place in a graph: take them out of forward(), or use the "
            "plain networks of posterior.networks(n)"
        ) from error


def _require_equal(module: nn.Module, averaged: Averaged, tensors: tuple[Tensor, ...], names: tuple[str, ...]) -> None:
    """
    :raises RuntimeError: when the module and the program differ on these tensors.
    """
    results = module(*tensors)
    for name, expected in zip(names, averaged(*tensors), strict=True):
        scale = float(expected.abs().max()) if expected.numel() else 0.0
        tolerance = 10 * torch.finfo(expected.dtype).eps ** 0.75 * max(1.0, scale)
        if results[name].shape != expected.shape or not torch.allclose(
            results[name], expected, rtol=0, atol=tolerance, equal_nan=True
        ):
            raise RuntimeError(
                f"the exported module does not give the {name!r} of posterior.predict on {len(tensors[0])} samples: "
                "the network draws random numbers in eval mode, or depends on values or on the number of samples in a "
                "way that a graph cannot show. Take that out of forward()"
            )


def _require_unchanged(module: nn.Module) -> None:
    """
    :param module: a module that was just made and has run.
    :raises RuntimeError: when it has written into one of its tensors.
    """
    written = next((name for name, buffer in module.named_buffers() if buffer._version), None)
    if written is not None:
        raise RuntimeError(
            f"the network writes into its buffer {written.removeprefix('network.')!r} in eval mode, where predictions "
            "change nothing: take that out of forward(), or do it in training only"
        )
