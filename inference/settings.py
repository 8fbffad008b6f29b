"""Describes the settings of a training run as text, which checkpoints store and compare."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from pyro_bnn import display
from pyro_bnn.files import digest_of
from pyro_bnn.inputs import inputs, split, targets
from pyro_bnn.program.model import BayesianNetwork, like_of

#: characters of a digest, enough to tell two runs of one person apart
_SHORT = 16
#: forms in which a parameter that is not trained counts: those of others are drawn, whatever the network has
_KEPT = ("frozen", "low-rank", "rank-1", "point")


def settings_of(
    model: Callable[..., Any], guide: Callable[..., Any], optimizer: Optimizer, data: Any, **engine: object
) -> dict[str, str]:
    """``{setting: value}`` of everything that determines the result of training.

    :param optimizer: before a schedule changes its rates.
    :param data: as the engine was given it; tensors, arrays and frames count with all their numbers, a loader with the
        class and the size of its data set.
    :param engine: the options of the engine, by name.
    """
    found: dict[str, object] = {"model": display.name_of(model), "guide": display.name_of(guide)}
    found |= _of_model(model) | _of_optimizer(optimizer) | _of_data(model, data) | engine
    return {name: words(value) for name, value in found.items()}


def settings_of_chain(model: Callable[..., Any], data: Any, **engine: object) -> dict[str, str]:
    """As :func:`settings_of`, for a chain: ``{setting: value}`` of everything that determines its draws.

    :param engine: the options of the kernel and of the run, by name.
    """
    found = {"model": display.name_of(model)} | _of_model(model) | _of_data(model, data) | engine
    return {name: words(value) for name, value in found.items()}


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """``lr was 0.01 and is 0.5``, for every setting that both have and that is not the same.

    One that only one of them has is an option that another version of torch or of this package knows.
    """
    return [
        f"{name} was {before[name]} and is {value}"
        for name, value in now.items()
        if name in before and before[name] != value
    ]


def _of_model(model: Callable[..., Any]) -> dict[str, object]:
    if not isinstance(model, BayesianNetwork):
        return {}
    options: Mapping[str, object]
    try:
        options = model.arguments()
    except TypeError:  # a function, which JSON cannot describe
        options = model.repr_fields()
    found: dict[str, object] = {name: value for name, value in options.items() if name != "likelihood"}
    found |= {"likelihood": model.likelihood, "prior": model.prior}
    forms = model.forms()
    frozen = {name: p for name, p in model.core().net.named_parameters() if not p.requires_grad}
    kept = {name: p for name, p in frozen.items() if forms.get(name, "frozen") in _KEPT}
    return found | ({"frozen weights": kept} if kept else {})


def _of_optimizer(optimizer: Optimizer) -> dict[str, object]:
    found: dict[str, object] = {"optim": type(optimizer).__name__}
    groups: list[dict[str, Any]] = optimizer.param_groups
    for name in dict.fromkeys(key for group in groups for key in group if key not in ("params", "initial_lr")):
        # a rate is the one from which a schedule starts, wherever an earlier one has left it
        values = [group.get("initial_lr", group["lr"]) if name == "lr" else group.get(name) for group in groups]
        found[name] = values[0] if all(value == values[0] for value in values) else values
    return found


def _of_data(model: Callable[..., Any], data: Any) -> dict[str, object]:
    if isinstance(data, (tuple, Mapping)):
        pair, like = split(data), like_of(model)
        return {} if pair is None else {"data": [inputs(pair[0], like), targets(pair[1], like)]}
    found: dict[str, object] = {}
    dataset = data
    if isinstance(data, DataLoader):
        dataset = data.dataset
        found |= {"batch_size": data.batch_size, "drop_last": data.drop_last}
    held = list(dataset.tensors) if isinstance(dataset, TensorDataset) else None
    size = len(dataset) if isinstance(dataset, Sized) else None
    return {"data": [type(dataset), size, held]} | found


def words(value: object, depth: int = 4) -> str:
    """An option as text that is the same in every process: tensors and functions by their digests, never addresses."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} {digest_of({'': value})[:_SHORT]}"
    if isinstance(value, float):
        return repr(float(value))  # and not that of a number of NumPy
    if value is None or isinstance(value, (bool, int, complex, str, torch.dtype, torch.device)):
        return repr(value)
    if isinstance(value, type) or depth == 0:
        return display.name_of(value)
    inner = functools.partial(words, depth=depth - 1)
    if isinstance(value, Mapping):
        if value and all(isinstance(one, Tensor) for one in value.values()):
            return f"{len(value)} tensors {digest_of({str(name): one for name, one in value.items()})[:_SHORT]}"
        return "{" + ", ".join(f"{inner(key)}: {inner(one)}" for key, one in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(inner, value)) + "]"
    if isinstance(value, functools.partial):
        return f"partial({inner(value.func)}, {inner(value.args)}, {inner(value.keywords)})"
    if is_dataclass(value):
        return _call(value, {field.name: getattr(value, field.name) for field in fields(value)}, inner)
    if isinstance(value, torch.distributions.Distribution):
        return _call(value, {name: value.__dict__.get(name) for name in sorted(value.arg_constraints)}, inner)
    if (code := getattr(value, "__code__", None)) is not None:
        return _function(value, code, inner)
    if isinstance(value, nn.Module):
        return display.name_of(value)
    held = {name: one for name, one in sorted(getattr(value, "__dict__", {}).items()) if _is_plain(one)}
    return _call(value, held, inner)


def _call(value: object, arguments: Mapping[str, object], inner: Callable[[object], str]) -> str:
    return f"{type(value).__name__}({', '.join(f'{name}={inner(one)}' for name, one in arguments.items())})"


def _function(function: Any, code: Any, inner: Callable[[object], str]) -> str:
    """Its name, what it closes over, and a digest of what it does, which a function of this package needs not."""
    cells: Sequence[Any] = function.__closure__ or ()
    bound = {name: inner(cell.cell_contents) for name, cell in zip(code.co_freevars, cells, strict=True)}
    name = function.__qualname__.replace(".<locals>", "")
    text = f"{name}({', '.join(f'{argument}={value}' for argument, value in bound.items())})"
    if str(function.__module__).partition(".")[0] == "pyro_bnn":
        return text
    constants = [one for one in code.co_consts if _is_plain(one)]
    does = repr((code.co_code.hex(), constants, code.co_names, inner(function.__defaults__)))
    return f"{text} {hashlib.sha256(does.encode()).hexdigest()[:_SHORT]}"


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))
