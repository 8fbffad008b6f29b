"""The layers and sizes of a model and its guide, and the memory that training them needs."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import pyro
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_bnn import display
from pyro_bnn.entry import checks
from pyro_bnn.entry.threads import one_at_a_time
from pyro_bnn.inference.svi.elbo import MixtureELBO
from pyro_bnn.inputs import Inputs, inputs
from pyro_bnn.modes import training_mode, undisturbed
from pyro_bnn.network import batch_size as count_samples
from pyro_bnn.perturb.samples import select_samples
from pyro_bnn.posterior import Prediction, storage
from pyro_bnn.posterior.network_outputs import network_outputs
from pyro_bnn.posterior.stored_draws import DrawsGuide
from pyro_bnn.program.guide import MixtureGuide
from pyro_bnn.program.model import BayesianNetwork

if TYPE_CHECKING:
    import pandas as pd

#: batch sizes at which a step is measured; memory at other batch sizes is extrapolated linearly
_MEASURED = (2, 4)
#: name for what belongs to no layer: the noise, codes, parts of a guide that all layers share
_SHARED = "(shared)"


@dataclass(frozen=True)
class Layer:
    """One layer of a network.

    :param name: name of the module; ``(shared)`` for what belongs to no layer, such as the noise or a codebook.
    :param kind: type of the module.
    :param weight: shape of its weight: the first parameter with at least two axes, otherwise the first parameter.
    :param form: how this weight is random: dense, rank-1, low-rank or codebook. Point estimates are ``point`` if they
        are trained and ``frozen`` if not.
    :param prior: prior of its random parameters.
    :param parameters: number of parameters of the layer in the plain network.
    :param random: number of random values in the posterior, including scales.
    :param trainable: number of trained values, in the network and in the guide.
    :param total: number of values that network and guide hold, trained or not.
    """

    name: str
    kind: str
    weight: tuple[int, ...]
    form: str
    prior: str
    parameters: int
    random: int
    trainable: int
    total: int


@dataclass(frozen=True)
class TrainingMemory:
    """Memory in bytes that :func:`~pyro_bnn.inference.fit` needs at its peak, by part.

    :param parameters: parameters and buffers of model and guide.
    :param gradients: gradients of the trained parameters.
    :param optimizer: the two moments of AdamW.
    :param last_good: the copy that training restores if a loss is not finite.
    :param step: everything else at the peak of a step: draws of the guide, their densities, activations.
    """

    parameters: int
    gradients: int
    optimizer: int
    last_good: int
    step: int

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True)
class Summary:
    """The result of :func:`summary`.

    :param title: the model, its network and the guide.
    :param layers: one for each module with parameters, and one for what belongs to no layer.
    :param stored: size in bytes of the tensors that ``Posterior.save`` writes for model and guide; ``None`` without a
        guide, or with a guide of which only draws can be saved.
    :param memory: memory of training; ``None`` without ``example=``.
    :param batch_size: batch size for which the memory is estimated.
    """

    title: str
    layers: tuple[Layer, ...]
    stored: int | None
    memory: TrainingMemory | None
    batch_size: int

    @property
    def trainable(self) -> int:
        """Number of trained values."""
        return sum(layer.trainable for layer in self.layers)

    @property
    def total(self) -> int:
        """Number of values that network and guide hold."""
        return sum(layer.total for layer in self.layers)

    def to_dataframe(self) -> pd.DataFrame:
        """The layers, one per row."""
        import pandas as pd  # takes time to import

        return pd.DataFrame([asdict(layer) for layer in self.layers])

    def __repr__(self) -> str:
        return f"{display.text(f'Summary: {self.title}', self._fields())}\n\n{display.table(*self._table())}"

    def _repr_html_(self) -> str:
        return display.html_text(f"Summary: {self.title}", self._fields(), display.html_table(*self._table()))

    def _fields(self) -> dict[str, object]:
        memory, parts = self.memory, None
        if memory is not None:
            named = {f.name.replace("_", " "): getattr(memory, f.name) for f in fields(memory)}
            inside = ", ".join(f"{name} {display.size(count)}" for name, count in named.items())
            parts = f"about {display.size(memory.total)} at batches of {self.batch_size} ({inside})"
        return {"stored": None if self.stored is None else display.size(self.stored), "training": parts}

    def _table(self) -> tuple[list[str], list[list[str]]]:
        counts = ("parameters", "random", "trainable", "total")
        rows = [
            [layer.name, layer.kind, " x ".join(map(str, layer.weight)), layer.form, layer.prior]
            + [f"{getattr(layer, name):,}" for name in counts]
            for layer in self.layers
        ]
        sums = [f"{sum(getattr(layer, name) for layer in self.layers):,}" for name in counts]
        return ["layer", "type", "weight", "form", "prior", *counts], [*rows, ["all", "", "", "", "", *sums]]


@one_at_a_time
def summary(
    model: BayesianNetwork, guide: nn.Module | None = None, *, batch_size: int = 128, example: Inputs = None
) -> Summary:
    """Summarises the layers, forms, priors and sizes of a model, also of a guide, and the memory that training needs.

    The memory of a training step is measured: steps run on 2 and on 4 copies of the input, the bytes of all living
    tensors are counted, and the value at ``batch_size`` is extrapolated linearly. P is the size of all parameters and
    buffers, T that of the trained parameters, M that of the copy in reserve, F what is alive at the peak of the forward
    pass, and B at the peak of the backward pass, gradients included::

        peak = P + 2 T + M + max(F + T, B, M + T)

    The last term is for the moment when a new copy is made while the old one still exists. Parameters, gradients,
    random number generators and train or eval modes are restored.

    :param model: a model of this package.
    :param guide: a guide of this package, or any Pyro guide that is a module.
    :param batch_size: batch size for which memory is estimated.
    :param example: an input with one row or more; without it memory is not estimated.
    :raises TypeError: for a model that is not of this package, or a guide that is a function.
    :raises ValueError: for ``example=`` with no guide to train, or for a model without a likelihood.
    """
    if not isinstance(model, BayesianNetwork):
        raise TypeError(f"summary() takes a model of this package, which knows its layers, not {type(model).__name__}")
    if guide is not None and not isinstance(guide, nn.Module):
        raise TypeError(
            f"the guide is a {type(guide).__name__}, whose parameters cannot be listed: give one that is a module, "
            "such as those of this package and Pyro's AutoGuides, or leave it out"
        )
    batch_size = checks.count("batch_size", batch_size)
    memory = None
    if example is not None:
        if guide is None or isinstance(guide, DrawsGuide):
            raise ValueError("example= is for the memory of training, which needs a guide to train: give guide=")
        if model.likelihood is None:
            raise ValueError("a model without a likelihood has no loss to train: leave example= out")
        memory = _training_memory(model, guide, example, batch_size)
    stored = None
    if isinstance(guide, (MixtureGuide, DrawsGuide)):
        stored = sum(value.nbytes for value in storage.tensors_of(model, guide).values())
    title = f"{type(model).__name__} of {display.name_of(model.core().net)}"
    if guide is not None:
        title += f", {type(guide).__name__}"
    return Summary(title, tuple(_layers(model, guide)), stored, memory, batch_size)


# --------------------------------------------------------------------------------------------------- layers


def _layers(model: BayesianNetwork, guide: nn.Module | None) -> Iterator[Layer]:
    parameters = model.core().parameters_by_name()
    forms = model.forms() | (guide.forms() if isinstance(guide, MixtureGuide) else {})
    random = _by_parameter(parameters, model, {site.name: site.shape.numel() for site in model.sites()})
    trained, held = _of_guide(guide)
    trained, held = _by_parameter(parameters, model, trained), _by_parameter(parameters, model, held)
    used = _random_names(model)
    owners: dict[str, list[str]] = {}
    for name in parameters:
        owners.setdefault(name.rpartition(".")[0], []).append(name)
    priors: Mapping[str, object] = model.__dict__.get("priors", {})
    for owner, names in owners.items():
        module = model.core().net.get_submodule(owner)
        weight = next((n for n in names if parameters[n].dim() > 1), names[0])
        own = {
            display.argument(prior) for site, prior in priors.items() if _parameter_of(parameters, site) in set(names)
        }
        plain = sum(parameters[n].numel() for n in names)
        moved = sum(parameters[n].numel() for n in names if parameters[n].requires_grad and n not in used)
        yield Layer(
            name=owner or "(network)",
            kind=type(module).__name__,
            weight=tuple(parameters[weight].shape),
            form=forms[weight],
            prior=", ".join(sorted(own)),
            parameters=plain,
            random=sum(random[n] for n in names),
            trainable=moved + sum(trained[n] for n in names),
            total=plain + sum(held[n] for n in names),
        )
    if random[_SHARED] or held[_SHARED]:
        own = {display.argument(p) for site, p in priors.items() if _parameter_of(parameters, site) == _SHARED}
        prior = ", ".join(sorted(own))
        yield Layer(_SHARED, "", (), "", prior, 0, random[_SHARED], trained[_SHARED], held[_SHARED])


def _random_names(model: BayesianNetwork) -> set[str]:
    """Parameters of the network that are replaced by a site, so that their own values are not used."""
    sites = {site.name for site in model.sites()}
    return {name for name in model.core().parameters_by_name() if model.site(name) in sites}


def _of_guide(guide: nn.Module | None) -> tuple[dict[str, int], dict[str, int]]:
    """How many values a guide trains, and how many it holds, ``{site: count}``; ``""`` is for what has no site."""
    if guide is None:
        return {}, {}
    trained = sum(p.numel() for p in guide.parameters() if p.requires_grad)
    held = trained + sum(b.numel() for b in guide.buffers())
    if isinstance(guide, DrawsGuide):
        return {}, {name: value.numel() for name, value in guide.draws().items()}
    own = guide.numbers_of_sites() if isinstance(guide, MixtureGuide) else {}
    return own | {"": trained - sum(own.values())}, own | {"": held - sum(own.values())}


def _by_parameter(parameters: Mapping[str, Tensor], model: BayesianNetwork, counts: dict[str, int]) -> Counter[str]:
    """Sums the counts of sites by the parameters that the sites are for."""
    found: Counter[str] = Counter()
    prefix = f"{model.prefix}." if model.prefix else ""
    for site, count in counts.items():
        found[_parameter_of(parameters, site.removeprefix(prefix))] += count
    return found


def _parameter_of(parameters: Iterable[str], site: str) -> str:
    """The parameter that a site is for: ``fc.weight`` of ``fc.weight.s_lambda`` or ``fc.weight_tau``."""
    found = [name for name in parameters if site == name or site.startswith((f"{name}.", f"{name}_"))]
    return max(found, key=len, default=_SHARED)


# ------------------------------------------------------------------------------------------ memory of training


def _training_memory(model: BayesianNetwork, guide: nn.Module, example: Inputs, batch_size: int) -> TrainingMemory:
    example = inputs(example, model.like())
    size = count_samples(example)
    steps = []
    with ExitStack() as stack:
        stack.enter_context(pyro.get_param_store().scope())
        for program in (model, guide):
            stack.enter_context(undisturbed(program))
        for rows in (_MEASURED[0], *_MEASURED):  # the first step is not used: it also makes what later steps reuse
            x = select_samples(example, size, [0] * rows)
            steps.append(_measure(model, guide, x))
    forward, backward = (_at(batch_size, *bytes_) for bytes_ in zip(*(step[:2] for step in steps[1:]), strict=True))
    gradients = steps[0].gradients
    tensors = [t for program in (model, guide) for t in [*program.parameters(), *program.buffers()]]
    buffers = {id(b) for program in (model, guide) for b in program.buffers()}
    last_good = _bytes(t for t in tensors if t.requires_grad or id(t) in buffers)
    worst = max(forward + gradients, backward, last_good + gradients)
    return TrainingMemory(_bytes(tensors), gradients, 2 * gradients, last_good, worst - gradients)


class _Step(NamedTuple):
    """Additional bytes at the peak of a forward and of a backward pass, and bytes of all gradients."""

    forward: int
    backward: int
    gradients: int


def _measure(model: BayesianNetwork, guide: nn.Module, x: Inputs) -> _Step:
    """One step as :func:`~pyro_bnn.inference.fit` takes it, in train mode."""
    y = _labels(model, x)
    guide(x, y)  # an AutoGuide gets its parameters at its first call
    parameters = list({id(p): p for program in (model, guide) for p in program.parameters()}.values())
    before = [p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        with torch.enable_grad(), pyro.validation_enabled(False), training_mode(True), _Alive() as alive:
            loss = MixtureELBO().differentiable_loss(model, guide, x, y)
            forward, alive.most = alive.most, alive.now
            loss.backward()
        return _Step(forward, alive.most, _bytes(p.grad for p in parameters if p.grad is not None))
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient


def _labels(model: BayesianNetwork, x: Inputs) -> Tensor:
    """Possible labels, ``[N, ...]``, drawn from the likelihood with the network as it was given."""
    like = model.like()
    latents = {
        site.name: torch.as_tensor(site.center, dtype=like.dtype, device=like.device).expand(1, 1, *site.shape)
        for site in model.sites()
    }
    outputs = network_outputs(model, latents, x, 1)
    return Prediction(outputs, model.likelihood, latents.get(model.site("noise"))).sample()[0, 0]


class _Alive(TorchDispatchMode):
    """Counts the bytes of tensors that are created inside and still alive: ``now``, and ``most`` at the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        given = {_storage(t) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and _storage(tensor) not in given:
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return

        def free(_: object) -> None:
            self._storages.pop(key)
            self.now -= size

        self._storages[key] = weakref.ref(storage, free)
        self.now += size
        self.most = max(self.most, self.now)


def _storage(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of all storages, each counted once."""
    return sum({_storage(t): t.untyped_storage().nbytes() for t in tensors}.values())


def _at(batch_size: int, first: int, second: int) -> int:
    """The value at a batch size, extrapolated linearly from the two that were measured."""
    low, high = _MEASURED
    return max(0, round(first + (second - first) / (high - low) * (batch_size - low)))
