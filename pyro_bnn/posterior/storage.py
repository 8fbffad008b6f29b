"""Saves and loads posteriors of networks: how ``posterior.json`` describes model and guide, and which tensors are kept.

Nothing is pickled. ``folder`` writes and reads the two files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyro_bnn import likelihoods, priors
from pyro_bnn.given.copying import unwrapped
from pyro_bnn.likelihoods import Likelihood
from pyro_bnn.posterior.folder import MISFITS, contents, write_contents
from pyro_bnn.posterior.own_draws import is_of_own_model
from pyro_bnn.posterior.stored_draws import DrawsGuide
from pyro_bnn.priors import PriorLike
from pyro_bnn.program.guide import MixtureGuide
from pyro_bnn.program.model import BayesianNetwork
from pyro_bnn.program.sites import Program
from pyro_bnn.randomness import forked
from pyro_bnn.registry import find_class, is_storable

_REGISTER = "a class of your own needs the decorator pyro_bnn.storable, and its module must be imported before you load"


class Stored(NamedTuple):
    """The contents of a folder: the parts of a posterior."""

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

    :param losses, sampler: see :class:`~pyro_bnn.Posterior`.
    :param prior: ``False`` leaves the prior out, and :func:`read` then needs ``prior=``.
    :raises TypeError: when model, guide, output or prior cannot be described in JSON; the message names the remedy.
    :raises FileExistsError: when ``path`` exists and is not a posterior.
    """
    if not isinstance(model, BayesianNetwork) or not is_storable(type(model)):
        raise TypeError(
            f"only models of pyro_bnn can be saved, not {type(model).__name__}: decorate your own class with "
            "pyro_bnn.storable, or save posterior.sample(n) with safetensors instead"
        )
    if not isinstance(guide, (MixtureGuide, DrawsGuide)) or not is_storable(type(guide)):
        raise TypeError(
            f"a guide of type {type(guide).__name__} cannot be saved; save draws from it: "
            "posterior.as_draws(n).save(path), or decorate your own class with pyro_bnn.storable"
        )
    description: dict[str, Any] = {"class": type(model).__name__, **model.arguments()}
    if callable(description["output"]):
        raise TypeError(
            "output= is a function, which JSON cannot describe; let the network's forward return this output"
        )
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
    write_contents(
        path,
        {
            "model": description,
            "guide": {"class": type(guide).__name__, **arguments, **names},
            "network": parameters,
            "losses": list(losses),
            "sampler": dict(sampler),
        },
        tensors,
    )


def tensors_of(model: BayesianNetwork, guide: MixtureGuide | DrawsGuide) -> dict[str, Tensor]:
    """The tensors to save: those of the network, of the guide, and the model's other ones."""
    net = model.core().net
    implied = _implied(model, guide).keys() - model.core().padding.keys()  # a row of these is not random
    network = {name: value for name, value in [*net.named_parameters(), *_kept_buffers(net)] if name not in implied}
    own = guide.tensors() if isinstance(guide, MixtureGuide) else dict(guide.named_buffers())
    parts = {"network": network, "guide": own, "model": model.tensors()}
    return {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}


def read(
    path: str | os.PathLike[str],
    net: nn.Module,
    *,
    prior: PriorLike | None = None,
    likelihood: Likelihood | None = None,
    device: torch.device | str | None = None,
) -> Stored:
    """Reads what :func:`write` wrote; the same ``seed`` gives the same predictions, bit for bit.

    :param net: a network of the same architecture; it is copied, and its weights do not matter.
    :param prior: the prior, if it was not saved; otherwise replaces the saved one.
    :param likelihood: replaces the saved likelihood, for example when its class is no longer available.
    :param device: the device of the posterior; by default that of ``net``.
    :raises FileNotFoundError: when there is nothing at ``path``.
    :raises ValueError: when the folder is not a posterior, is damaged, was written by a newer version, or is for
        another network.
    """
    path, net = Path(path), unwrapped(net)
    if not path.exists():
        raise FileNotFoundError(f"there is no posterior at {path}")
    content, tensors = contents(path)
    if is_of_own_model(content):
        raise ValueError(f"{path} holds draws of your own Pyro model, not of a network: use load(path, model=...)")
    try:
        _require_same_network(content["network"], net, path)
        model = _model(content["model"], net, tensors, prior, likelihood, path)
        _take_network(model, content["network"], tensors, path)
        guide = _guide(dict(content["guide"]), model, tensors)
        _take_implied(model, guide, tensors, path)
        losses = [float(loss) for loss in content["losses"]]
        sampler = {str(name): float(value) for name, value in content.get("sampler", {}).items()}
    except MISFITS as error:
        raise ValueError(
            f"the posterior in {path} is damaged or for another network ({type(error).__name__}: {error})"
        ) from error
    if device is not None:
        model.to(device)
        guide.to(device)
    return Stored(model, guide, losses, sampler)


def _model(
    description: Mapping[str, Any],
    net: nn.Module,
    tensors: Mapping[str, Tensor],
    prior: PriorLike | None,
    likelihood: Likelihood | None,
    path: Path,
) -> BayesianNetwork:
    arguments = dict(description)
    name = arguments.pop("class")
    cls = find_class(name)
    if cls is None or not issubclass(cls, BayesianNetwork):
        raise ValueError(f"{path} holds a model of the class {name!r}, which is not registered: {_REGISTER}")
    saved = arguments.pop("prior", None)
    if saved is None and prior is None:
        raise ValueError(
            f"{path} was saved without its prior: use load(path, net, prior=...) with the prior of training"
        )
    arguments["prior"] = prior if prior is not None else priors.from_description(saved)
    if likelihood is not None:
        arguments["likelihood"] = likelihood
    elif arguments["likelihood"] is not None:
        arguments["likelihood"] = likelihoods.from_description(arguments["likelihood"])
    if not isinstance(arguments["output"], (int, str, NoneType)):
        raise ValueError(f"output={arguments['output']!r} is no key or index of an output")
    extra = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    if extra:
        arguments["tensors"] = extra
    return cls.from_arguments(net, arguments)


def _take_network(
    model: BayesianNetwork, saved: Mapping[str, list[Any]], tensors: Mapping[str, Tensor], path: Path
) -> None:
    """Gives the network the stored values of its parameters and buffers, with their original shapes and dtypes."""
    net = model.core().net
    for name, value in [*net.named_parameters(), *_kept_buffers(net)]:
        stored = tensors.get(f"network.{name}")
        if stored is None:
            continue
        dtype, *shape = saved[name]
        if str(stored.dtype) != f"torch.{dtype}" or list(stored.shape) != shape:
            raise ValueError(
                f"{path} is damaged: {name!r} is {stored.dtype} of shape {list(stored.shape)}, expected {dtype} of "
                f"shape {shape}"
            )
        value.data = stored.to(value.device)


def _take_implied(
    model: BayesianNetwork, guide: MixtureGuide | DrawsGuide, tensors: Mapping[str, Tensor], path: Path
) -> None:
    """Gives the network the values that are not stored because they follow from model and guide."""
    net = model.core().net
    left = {n: v for n, v in [*net.named_parameters(), *_kept_buffers(net)] if f"network.{n}" not in tensors}
    means = _implied(model, guide) if left else {}
    for name, value in left.items():
        if name not in means:
            raise ValueError(f"{path} is damaged: the values of {name!r} are missing; save the posterior again")
        value.data = means[name]


def _guide(
    description: dict[str, Any], model: BayesianNetwork, tensors: Mapping[str, Tensor]
) -> MixtureGuide | DrawsGuide:
    values = {name.removeprefix("guide."): v for name, v in tensors.items() if name.startswith("guide.")}
    device = model.like().device
    name = description.pop("class")
    cls = find_class(name)
    if cls is DrawsGuide:
        return _draws(description, values, model)
    if cls is None or not issubclass(cls, MixtureGuide):
        raise ValueError(f"its guide is of the class {name!r}, which is not registered: {_REGISTER}")
    leading = {len(value) for value in values.values() if value.dim()}
    for count in ("components", "particles"):
        if count in description and leading and description[count] not in leading:
            raise ValueError(f"its guide has {count}={description[count]!r}, but no numbers of so many")
    with forked(device):  # starting values are drawn, then replaced
        return cls.from_tensors(model, description, values)


def _draws(description: Mapping[str, Any], values: Mapping[str, Tensor], model: BayesianNetwork) -> DrawsGuide:
    device = model.like().device
    draws = {name: values[f"draws_{i}"].to(device) for i, name in enumerate(description["names"])}
    sites = {site.name: list(site.shape) for site in model.sites()}
    if draws.keys() != sites.keys():
        raise ValueError(f"its draws are of the sites {sorted(draws)}, expected {sorted(sites)}")
    for name, value in draws.items():
        lead = list(next(iter(draws.values())).shape[:2])
        if list(value.shape) != lead + sites[name]:
            raise ValueError(f"the draws of {name!r} have shape {list(value.shape)}, expected {lead + sites[name]}")
    kept = {name: values[f"statistics_{i}"].to(device) for i, name in enumerate(description["statistics"])}
    buffers = dict(model.core().net.named_buffers())
    for name, value in kept.items():
        if name not in buffers or value.shape[1:] != buffers[name].shape:
            raise ValueError(f"the network has no buffer {name!r} of shape {list(value.shape[1:])}")
    return DrawsGuide(draws, model, description["chains"], kept, description.get("sampled", True))


def _implied(model: BayesianNetwork, guide: nn.Module) -> dict[str, Tensor]:
    """Values of those network parameters that are not stored because they follow from model and guide."""
    implied = model.implied_parameters() | (guide.means_of_network() if isinstance(guide, MixtureGuide) else {})
    pretrained = {name for name, prior in getattr(model, "priors", {}).items() if prior.is_pretrained}
    return {name: value for name, value in implied.items() if name not in pretrained}


def _kept_buffers(net: nn.Module) -> list[tuple[str, Tensor]]:
    kept = net.state_dict().keys()
    return [(name, buffer) for name, buffer in net.named_buffers() if name in kept]


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
