"""Posteriors on disk: a folder with ``posterior.json`` (what it is) and ``tensors.safetensors`` (its numbers).

Nothing is pickled. The folder is written under another name and renamed when it is whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from pyro_bnn import likelihoods, priors
from pyro_bnn.files import replacing_folder
from pyro_bnn.guide import MixtureGuide
from pyro_bnn.model import BayesianNetwork
from pyro_bnn.posterior import older
from pyro_bnn.posterior.stored_draws import DrawsGuide
from pyro_bnn.priors import PriorLike
from pyro_bnn.randomness import forked
from pyro_bnn.registry import find_class, is_storable
from pyro_bnn.sites import Program

FORMAT = "pyro_bnn posterior"
VERSION = 2
_JSON, _TENSORS = "posterior.json", "tensors.safetensors"


class Stored(NamedTuple):
    """What a folder holds: the parts of a posterior."""

    model: BayesianNetwork
    guide: MixtureGuide | DrawsGuide
    losses: list[float]
    sampler: dict[str, float]


def write(
    path: str | os.PathLike[str],
    model: Program,
    guide: Program,
    *,
    losses: Sequence[float] = (),
    sampler: Mapping[str, float] = MappingProxyType({}),
    prior: bool = True,
) -> None:
    """Writes a model and its guide to the folder ``path``, which may hold an older posterior.

    :param losses, sampler: as of :class:`~pyro_bnn.Posterior`.
    :param prior: ``False`` leaves the prior out, and :func:`read` then needs ``prior=``.
    :raises TypeError: when model, guide, output or prior cannot be described in JSON; the message names the remedy.
    :raises FileExistsError: when ``path`` exists and is no posterior.
    """
    if not isinstance(model, BayesianNetwork) or not is_storable(type(model)):
        raise TypeError(
            f"only models of pyro_bnn can be saved, not {type(model).__name__}; save posterior.sample(n) with "
            "safetensors instead"
        )
    if not isinstance(guide, (MixtureGuide, DrawsGuide)) or not is_storable(type(guide)):
        raise TypeError(
            f"a guide of type {type(guide).__name__} cannot be saved; save draws of it: "
            "posterior.as_draws(n).save(path)"
        )
    description: dict[str, Any] = {"class": type(model).__name__, **model.arguments()}
    if callable(description["output"]):
        raise TypeError("output= is a function, which JSON cannot describe; give the network a forward that picks it")
    if prior:
        try:
            description["prior"] = priors.describe(model.prior)
        except TypeError as error:
            raise TypeError(
                f"{error}: use save(path, prior=False) and load(path, net, prior=...), or a class of pyro_bnn.priors"
            ) from None
    net = model.core().net
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors_of(model, guide).items()}
    parameters = {
        name: [str(value.dtype).removeprefix("torch."), *value.shape]
        for name, value in [*net.named_parameters(), *_kept_buffers(net)]
    }
    names: dict[str, Any] = {}
    if isinstance(guide, DrawsGuide):
        names = {"names": guide.names, "statistics": guide.statistics_names}
        names |= {"chains": guide.num_chains, "sampled": guide.is_sampled}
    arguments = guide.arguments() if isinstance(guide, MixtureGuide) else {}
    content = {
        "format": FORMAT,
        "version": VERSION,
        "model": description,
        "guide": {"class": type(guide).__name__, **arguments, **names},
        "network": parameters,
        "losses": list(losses),
        "sampler": dict(sampler),
    }
    path = Path(path)
    if path.exists() and not (path / _JSON).is_file():
        raise FileExistsError(f"{path} exists and is no posterior; choose another path or remove it")
    with replacing_folder(path) as temporary:
        safetensors.torch.save_file(tensors, temporary / _TENSORS)
        (temporary / _JSON).write_text(json.dumps(content, indent=1) + "\n")


def tensors_of(model: BayesianNetwork, guide: MixtureGuide | DrawsGuide) -> dict[str, Tensor]:
    """What is written as numbers: of the network, of the guide, and of the model beside these."""
    net = model.core().net
    implied = set(_implied(model, guide))
    network = {name: value for name, value in [*net.named_parameters(), *_kept_buffers(net)] if name not in implied}
    own = guide.tensors() if isinstance(guide, MixtureGuide) else dict(guide.named_buffers())
    parts = {"network": network, "guide": own, "model": model.tensors()}
    return {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}


def read(
    path: str | os.PathLike[str],
    net: nn.Module,
    *,
    prior: PriorLike | None = None,
    device: torch.device | str | None = None,
) -> Stored:
    """What :func:`write` wrote; the same ``seed`` gives the same predictions, bit for bit.

    :param net: a network of the same architecture; it is copied, its own weights do not matter.
    :param prior: the prior, when it was not saved.
    :param device: where to put it; by default where ``net`` is.
    :raises FileNotFoundError: when there is nothing at ``path``.
    :raises ValueError: when it is no posterior, is damaged, was written by a newer version, or is for another network.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no posterior at {path}")
    content = _read_json(path)
    tensors = _read_tensors(path)
    _require_same_network(content["network"], net, path)
    description = dict(content["model"])
    cls = find_class(description.pop("class"))
    if cls is None or not issubclass(cls, BayesianNetwork):
        raise ValueError(f"{path} holds a model of the class {content['model']['class']!r}, which is not registered")
    saved = description.pop("prior", None)
    if saved is None and prior is None:
        raise ValueError(f"{path} was saved without its prior: load(path, net, prior=...) with the prior of training")
    description["prior"] = prior if prior is not None else priors.from_description(saved)
    likelihood = description["likelihood"]
    description["likelihood"] = None if likelihood is None else likelihoods.from_description(likelihood)
    extra = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    if extra:
        description["tensors"] = extra
    try:
        model = cls.from_arguments(net, description)
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"the model in {path} is damaged or for another network ({error})") from error
    own = model.core().net
    implied = []
    for name, value in [*own.named_parameters(), *_kept_buffers(own)]:
        if f"network.{name}" in tensors:
            value.data = tensors[f"network.{name}"].to(value.device)
        else:
            implied.append((name, value))
    try:
        guide = _guide(dict(content["guide"]), model, tensors)
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"the guide in {path} is damaged or for another model ({error})") from error
    means = _implied(model, guide) if implied else {}
    for name, value in implied:
        if name not in means:
            raise ValueError(f"{path} is damaged: the values of {name!r} are missing; save the posterior again")
        value.data = means[name]
    if device is not None:
        model.to(device)
        guide.to(device)
    return Stored(model, guide, content["losses"], content.get("sampler", {}))


def _guide(
    description: dict[str, Any], model: BayesianNetwork, tensors: dict[str, Tensor]
) -> MixtureGuide | DrawsGuide:
    values = {name.removeprefix("guide."): v for name, v in tensors.items() if name.startswith("guide.")}
    device = model.like().device
    cls = find_class(description.pop("class"))
    if cls is DrawsGuide:
        names = description["names"]
        draws = {name: values[f"draws_{i}"].to(device) for i, name in enumerate(names)}
        kept = {name: values[f"statistics_{i}"].to(device) for i, name in enumerate(description["statistics"])}
        return DrawsGuide(draws, model, description["chains"], kept, description.get("sampled", True))
    if cls is None or not issubclass(cls, MixtureGuide):
        raise ValueError("the guide of this posterior is of a class that is not registered")
    with forked(device):  # starting values are drawn, then replaced
        return cls.from_tensors(model, description, values)


def _implied(model: BayesianNetwork, guide: nn.Module) -> dict[str, Tensor]:
    """Values of the parameters of the network that are not stored, as they follow from model and guide."""
    return model.implied_parameters() | (guide.means_of_network() if isinstance(guide, MixtureGuide) else {})


def _kept_buffers(net: nn.Module) -> list[tuple[str, Tensor]]:
    kept = net.state_dict().keys()
    return [(name, buffer) for name, buffer in net.named_buffers() if name in kept]


def _read_json(path: Path) -> dict[str, Any]:
    file = path / _JSON
    if not file.is_file():
        raise ValueError(f"{path} is not a posterior: it has no {_JSON}. Give the folder that posterior.save() wrote")
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); save the posterior again") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{file} is not a {FORMAT}")
    if content["version"] > VERSION:
        raise ValueError(
            f"{path} was written in format version {content['version']}; this pyro_bnn reads versions up to {VERSION}. "
            "Install a newer pyro_bnn"
        )
    return content if content["version"] == VERSION else older.from_version_1(content)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    file = path / _TENSORS
    if not file.is_file():
        raise ValueError(f"{path} is incomplete: {_TENSORS} is missing")
    try:
        return safetensors.torch.load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is truncated or damaged ({error}); save the posterior again") from None


def _require_same_network(saved: dict[str, list[Any]], net: nn.Module, path: Path) -> None:
    given = {name: list(value.shape) for name, value in [*net.named_parameters(), *_kept_buffers(net)]}
    for name, (_, *shape) in saved.items():
        if name not in given:
            raise ValueError(f"{path} is for another network: {name!r} of shape {shape} is not in the given one")
        if given[name] != shape:
            raise ValueError(
                f"{path} is for another network: {name!r} has shape {shape} there and {given[name]} in the given one"
            )
    extra = next((name for name in given if name not in saved), None)
    if extra is not None:
        raise ValueError(f"{path} is for another network: {extra!r} of the given one is not in it")
