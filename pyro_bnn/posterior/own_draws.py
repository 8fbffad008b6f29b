"""Saves and loads draws of a user's own Pyro model: only its numbers, because JSON cannot describe a program.

Besides the draws, these are the parameters and buffers of a model that is a module, and the parameters of Pyro's store
with which a model that is a function was trained: predictions depend on both.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import constraints, transform_to

from pyro_bnn import display
from pyro_bnn.posterior.folder import MISFITS, contents, write_contents
from pyro_bnn.posterior.stored_draws import DrawsGuide
from pyro_bnn.program.model import BayesianNetwork
from pyro_bnn.program.sites import Program

#: the key that marks the description of a model from outside this package
PROGRAM = "program"


class StoredDraws(NamedTuple):
    """The contents of a folder.

    :param store: a state of Pyro's parameter store, for a model that was trained with one.
    """

    model: Program
    guide: DrawsGuide
    losses: list[float]
    sampler: dict[str, float]
    store: dict[str, dict[str, Any]] | None


def write_draws(
    path: str | os.PathLike[str],
    model: Program,
    guide: Program,
    store: Any,
    *,
    losses: Sequence[float] = (),
    sampler: Mapping[str, float] = MappingProxyType({}),
) -> None:
    """Writes draws to the folder ``path``, which may hold an older posterior.

    :param store: see :class:`~pyro_bnn.posterior.draw_source.DrawSource`.
    :raises TypeError: when a guide makes the draws.
    :raises FileExistsError: when ``path`` exists and is not a posterior.
    """
    if not isinstance(guide, DrawsGuide):
        raise TypeError(
            f"a guide of type {type(guide).__name__} for your own Pyro model cannot be saved; save draws from it: "
            "posterior.as_draws(n).save(path), which load(path, model=...) reads"
        )
    parameters = {} if store is None else _constrained(store)
    parts = {
        "guide": dict(guide.named_buffers()),
        "module": model.state_dict() if isinstance(model, nn.Module) else {},
        "parameter": {str(i): value for i, value in enumerate(parameters.values())},
    }
    tensors = {
        f"{part}.{name}": value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for part, values in parts.items()
        for name, value in values.items()
        if isinstance(value, Tensor)  # a module may keep other things in its state
    }
    description = {
        "model": {PROGRAM: display.name_of(model), "parameters": None if store is None else list(parameters)},
        "guide": {
            "names": guide.names,
            "statistics": guide.statistics_names,
            "chains": guide.num_chains,
            "sampled": guide.is_sampled,
        },
        "losses": list(losses),
        "sampler": dict(sampler),
    }
    write_contents(path, description, tensors)


def read_draws(path: str | os.PathLike[str], model: Program, *, device: torch.device | str | None) -> StoredDraws:
    """Reads what :func:`write_draws` wrote, for a program with the same sites.

    :param model: a module is copied, and the copy gets the saved parameters and buffers.
    :param device: the device of draws and module; by default that of the module, or the CPU.
    :raises TypeError: when the model is from this package, or is not a program.
    :raises FileNotFoundError: when there is nothing at ``path``.
    :raises ValueError: when it holds no draws of a user's own model, is damaged, or was written by a newer version.
    """
    path = Path(path)
    if isinstance(model, BayesianNetwork):
        raise TypeError("model= is for your own Pyro model; for a model of pyro_bnn give its network: load(path, net)")
    if not callable(model) or isinstance(model, type):
        raise TypeError(f"model={model!r}: expected the Pyro model that was saved, a function or a module")
    if not path.exists():
        raise FileNotFoundError(f"there is no posterior at {path}")
    content, tensors = contents(path)
    if not is_of_own_model(content):
        raise ValueError(
            f"{path} holds the posterior of a network: give a network of the same architecture, load(path, net)"
        )
    try:
        values = {name.removeprefix("guide."): v for name, v in tensors.items() if name.startswith("guide.")}
        state = {name.removeprefix("module."): v for name, v in tensors.items() if name.startswith("module.")}
        names, guide = content["model"]["parameters"], content["guide"]
        draws = {str(name): values[f"draws_{i}"] for i, name in enumerate(guide["names"])}
        statistics = {str(name): values[f"statistics_{i}"] for i, name in enumerate(guide["statistics"])}
        if len({value.shape[:2] for value in draws.values()}) != 1:
            raise ValueError("its sites do not have the same number of draws")
        found = DrawsGuide(draws, model, int(guide["chains"]), statistics, bool(guide["sampled"]))
        store = None if names is None else _state({n: tensors[f"parameter.{i}"] for i, n in enumerate(names)}, device)
        losses = [float(loss) for loss in content["losses"]]
        sampler = {str(name): float(value) for name, value in content["sampler"].items()}
    except MISFITS as error:
        raise ValueError(f"the posterior in {path} is damaged ({type(error).__name__}: {error})") from error
    model = _with_state(model, state, path)
    if isinstance(model, nn.Module):
        first = next(model.parameters(), None)
        device = first.device if device is None and first is not None else device
        model.to(device)
    found.to(device)
    return StoredDraws(model, found, losses, sampler, store)


def is_of_own_model(content: Mapping[str, Any]) -> bool:
    """Whether a description belongs to draws of a user's own model."""
    model = content.get("model")
    return isinstance(model, Mapping) and PROGRAM in model


def _with_state(model: Program, state: dict[str, Tensor], path: Path) -> Program:
    if not isinstance(model, nn.Module):
        if state:
            raise ValueError(
                f"{path} was saved with a model that is a module with the parameters {', '.join(sorted(state)[:3])}, "
                f"but {display.name_of(model)} is not a module: give the same model"
            )
        return model
    copied = copy.deepcopy(model)
    given = {name: tuple(value.shape) for name, value in copied.state_dict().items() if isinstance(value, Tensor)}
    saved = {name: tuple(value.shape) for name, value in state.items()}
    for name in sorted(given.keys() | saved.keys()):
        if given.get(name) != saved.get(name):
            raise ValueError(
                f"{path} is for another model: {name!r} has shape {saved.get(name)} there and {given.get(name)} in the "
                "given model (None: no tensor of this name)"
            )
    copied.load_state_dict(state, strict=False)
    return copied


def _constrained(store: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """Constrained values, as the program sees them: they are only read from now on, so no constraint is needed."""
    with torch.no_grad():
        return {
            name: transform_to(store["constraints"][name])(value.detach()) for name, value in store["params"].items()
        }


def _state(parameters: dict[str, Tensor], device: torch.device | str | None) -> dict[str, dict[str, Any]]:
    return {
        "params": {name: value.to(device) for name, value in parameters.items()},
        "constraints": dict.fromkeys(parameters, constraints.real),
    }
