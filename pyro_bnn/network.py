"""Runs a user's network inside a probabilistic program, with different weights for each member or row."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree

from pyro_bnn.freed_memory import keep_freed_memory
from pyro_bnn.given.copying import copy_of
from pyro_bnn.given.fixed import padding_rows, with_row_of
from pyro_bnn.inputs import EXPECTED, Inputs, describe
from pyro_bnn.modes import RunningStatistics, undisturbed
from pyro_bnn.perturb import Layout, Perturb, Perturbation, Rank1Factors, Replacement, Use
from pyro_bnn.perturb.decisions import Decisions
from pyro_bnn.perturb.probe import (
    check_fold,
    find_consumed,
    find_layouts,
    require_rows,
)
from pyro_bnn.perturb.samples import batched, select_samples, unlike
from pyro_bnn.perturb.substitution import Pass, Strays, find_slots
from pyro_bnn.perturb.vectoriser import Vectoriser
from pyro_bnn.precision import asked, mixed_precision

Output = str | int | Callable[[Any], Tensor] | None

#: modules whose weights are neither products nor tables: they get no factors, and stay point estimates by default
NORMALISATIONS: tuple[type[nn.Module], ...] = (
    *(_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm),
)


#: number of input shapes for which a network keeps its findings; texts have hundreds of lengths
MAX_SHAPES = 256


def batch_size(x: Inputs, y: Tensor | None = None) -> int:
    """Number of samples: the leading size of y, else that of the first tensor in x (any nesting of dict and tuple).

    :raises TypeError: when there is no tensor.
    :raises ValueError: when x holds no tensor with as many samples as y.
    """
    leaves = [leaf for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor) and leaf.dim()]
    if not leaves:
        raise TypeError(
            f"x holds no tensor with a batch axis: got {describe(x)}; {EXPECTED}, or a dict or tuple of them"
        )
    if y is None:
        return int(leaves[0].shape[0])
    size = int(y.shape[0])
    if not any(leaf.shape[0] == size for leaf in leaves):
        raise ValueError(
            f"x and y disagree on the number of samples: y has {size}, x has {leaves[0].shape[0]}. Axis 0 must run "
            "over the samples in both."
        )
    return size


def is_product_weight(module: nn.Module, name: str, parameter: Tensor) -> bool:
    """Whether a parameter is, by the type of its module, the weight of a product, a convolution or an embedding."""
    if parameter.dim() < 2:
        return False
    if isinstance(module, nn.MultiheadAttention):
        return name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return name.startswith("weight")
    kinds = (nn.Linear, nn.modules.conv._ConvNd, nn.Bilinear, nn.Embedding)
    return name == "weight" and (isinstance(module, kinds) or (hasattr(module, "nf") and parameter.dim() == 2))


class Network(nn.Module):
    """The model's own copy of a network. Weight ties are kept; the user's module does not change.

    :param net: any module; called as ``net(x)``, ``net(*x)`` for a tuple or list, ``net(**x)`` for a dict. Wrappers
        such as ``torch.compile`` and ``nn.DataParallel`` are removed; see :mod:`pyro_bnn.given.copying`.
    :param output: the tensor to use when the network returns several: a key, an index, or a function. By default the
        ``logits`` of an output that has them, such as those of the transformers library.
    :param share: whether the parameters keep the storage of the given ones and take no gradient, instead of being
        copied. Buffers are copied.
    """

    def __init__(self, net: nn.Module, output: Output = None, share: bool = False) -> None:
        super().__init__()
        keep_freed_memory()
        self.net = copy_of(net, share)
        self.output = output
        self._slots = find_slots(self.net)
        self.register_load_state_dict_post_hook(_keep_ties)
        #: the rows of tables that keep their values whatever weights are given, see :mod:`pyro_bnn.given.fixed`
        self.padding = padding_rows(self.net)
        self._layouts: dict[object, dict[Use, Layout]] = {}
        self._activations: dict[object, int] = {}
        #: kinds of passes that were already checked for unsupported operations, as the check takes time
        self._inspected: set[tuple[bool, int | str]] = set()
        #: whether members that are folded into one batch would share a decision
        self._decides = False
        self._vectoriser = Vectoriser(f"the forward pass of {type(net).__name__}", "members")

    def parameters_by_name(self) -> dict[str, nn.Parameter]:
        """Every parameter once, tied ones under their first name. Cheaper than ``named_parameters``."""
        found: dict[str, Any] = {name: module._parameters[own] for name, [(module, own), *_] in self._slots.items()}
        return found

    def product_weights(self) -> list[str]:
        """Names of the weights of products, convolutions and embeddings, as far as module types show them."""
        found = {
            id(p)
            for module in self.net.modules()
            for name, p in module._parameters.items()
            if p is not None and is_product_weight(module, name, p)
        }
        return [name for name, p in self.net.named_parameters() if id(p) in found]

    def normalisation_parameters(self) -> set[str]:
        names = {
            id(p) for m in self.net.modules() if isinstance(m, NORMALISATIONS) for p in m.parameters(recurse=False)
        }
        return {name for name, p in self.net.named_parameters() if id(p) in names}

    def owner(self, name: str) -> nn.Module:
        return self.net.get_submodule(name.rpartition(".")[0])

    def biases_of(self, weights: Iterable[str]) -> list[str]:
        """The one-dimensional parameters of the modules that own these weights."""
        modules = {id(self.owner(w)): self.owner(w) for w in weights}.values()
        ids = {id(p) for m in modules for p in m._parameters.values() if p is not None and p.dim() == 1}
        return [name for name, p in self.net.named_parameters() if id(p) in ids]

    def forward(self, x: Inputs, weights: dict[str, Tensor] | None = None) -> Tensor:
        """The network's output tensor, with some of its parameters replaced by ``weights``.

        Gradients are with respect to these weights, also where the backward pass runs a part of the network again.

        :raises RuntimeError: when the network may rerun parts of itself in an unsupported way, or uses a parameter
            without going through the module that holds it.
        """
        return self._run(x, weights or {}, None)

    def _run(self, x: Inputs, weights: Mapping[str, Tensor], mode: Perturb | None) -> Tensor:
        args, kwargs = (
            ((), x) if isinstance(x, dict) else (tuple(x), {}) if isinstance(x, (tuple, list)) else ((x,), {})
        )
        this, training = Pass(self.net, self._slots, self.held(weights), mode), self.net.training
        strays: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if weights and (training, len(weights)) not in self._inspected:
            parameters = self.parameters_by_name()
            strays = Strays({id(parameters[name]): name for name in weights if name in parameters})
        with mixed_precision(asked()), strays, this.running():
            y = self._tensor(self.net(*args, **kwargs))
        if weights:
            self._inspected.add((training, len(weights)))
        if y.grad_fn is not None and (training, "graph") not in self._inspected:
            this.require_no_foreign_segments(y)
            self._inspected.add((training, "graph"))
        return y

    def _tensor(self, y: Any) -> Tensor:
        """Selects the output tensor from what the network returns."""
        if callable(self.output):
            y = self.output(y)
        elif self.output is not None:
            y = y[self.output] if not isinstance(self.output, str) or isinstance(y, dict) else getattr(y, self.output)
        elif not isinstance(y, Tensor):
            y = y["logits"] if isinstance(y, Mapping) and "logits" in y else getattr(y, "logits", y)
        if not isinstance(y, Tensor):
            raise TypeError(
                f"the network returns {type(y).__name__}, not a tensor; choose one tensor with `output=` "
                "(a key, an index, or a function)"
            )
        return y

    def held(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same ``{parameter: [*lead, *shape]}`` in which padding rows have the network's own values."""
        fixed = {name: self.net.get_parameter(name) for name in self.padding if name in weights}
        rows = {name: with_row_of(weights[name], own, self.padding[name]) for name, own in fixed.items()}
        return {**weights, **rows}

    def _padded(self) -> frozenset[int]:
        return frozenset(id(self.net.get_parameter(name)) for name in self.padding)

    def perturbed(self, x: Inputs, size: int, perturbations: dict[str, Perturbation], members: int) -> Tensor:
        """Every row of every member has weights of its own: ``[members, size, ...]``.

        Takes one pass, or one pass for each member if the network branches in Python on values that depend on its
        weights, as members may then take different branches.

        :param x: input with ``size`` samples.
        :param perturbations: by parameter name, each ``[members | 1, size | 1, n]``.
        """
        parameters = self.parameters_by_name()
        names = {id(parameters[name]): name for name in perturbations}
        layouts = self.layouts(x, size, perturbations.keys())
        if members > 1 and self._decides:
            return self._in_turn(
                lambda i: self.perturbed(x, size, {n: p.of_member(i) for n, p in perturbations.items()}, 1)[0], members
            )
        folded = x
        if members > 1:
            folded = pytree.tree_map(lambda t: t.repeat(members, *[1] * (t.dim() - 1)) if batched(t, size) else t, x)
        by_id = {i: perturbations[name] for i, name in names.items()}
        with no_fused_attention():
            y = self._run(folded, {}, Perturb(by_id, names, layouts, members, size, self._padded()))
        require_rows(y, members * size)
        return y.unflatten(0, (members, size))

    def layouts(self, x: Inputs, size: int, perturbed: Iterable[str]) -> dict[Use, Layout]:
        """The layouts for inputs of this shape, probed at its first occurrence. See :mod:`pyro_bnn.perturb.probe`."""
        # A network that sorts its samples looks regular as long as the samples are all equal.
        shapes, chosen_names = _shapes(x, size), tuple(perturbed)
        layouts = self._layouts.get((shapes, chosen_names, True))
        if layouts is not None:
            return layouts
        key = (shapes, chosen_names, unlike(x, size))
        if key not in self._layouts:
            parameters = self.parameters_by_name()
            chosen = {name: parameters[name].detach() for name in perturbed}
            names = {id(parameters[name]): name for name in perturbed}
            neutral = {id(parameters[name]): _neutral(p) for name, p in chosen.items()}
            with no_fused_attention():
                decisions = Decisions(parameters[name] for name in chosen)
                layouts = find_layouts(self, self.net, names, neutral, x, size, decisions)
                check_fold(
                    self, self.net, names, neutral, chosen, layouts, x, size, self._padded(), decides=decisions.found
                )
            if decisions.found and not self._decides:
                self._decides = True
                warnings.warn(
                    f"{type(self.net).__name__} makes decisions in Python (`if`, .item(), ...) on values that depend "
                    "on its random weights: members run one by one, because each may decide differently",
                    stacklevel=2,
                )
            _keep(self._layouts, key, layouts)
        return self._layouts[key]

    def activation_elements(self, x: Inputs, size: int) -> int:
        """Size of the largest tensor that a module computes for one sample, in elements, from one pass in eval mode."""
        key = ("activation", _shapes(x, size))
        if key not in self._activations:
            largest = [1]

            def note(module: nn.Module, args: object, result: object) -> None:
                largest.extend(t.numel() for t in pytree.tree_leaves((args, result)) if isinstance(t, Tensor))

            handles = [m.register_forward_hook(note) for m in self.net.modules()]
            try:
                with undisturbed(self.net):
                    self(select_samples(x, size, [0]))
            finally:
                for handle in handles:
                    handle.remove()
            _keep(self._activations, key, max(largest))
        return self._activations[key]

    def consumed(self, x: Inputs) -> set[str]:
        """The names of all parameters that some product, convolution or table look-up uses on this input."""
        with no_fused_attention():
            return find_consumed(self, self.net, x, batch_size(x))

    def explicit(self, x: Inputs, weights: dict[str, Tensor], chunk_size: int | None = None) -> Tensor:
        """Runs the network with one full set of weights for each member: ``[members, size, ...]``.

        :param weights: by parameter name, each ``[members, *shape]``.
        """
        return self.for_each(lambda own: self(x, own), weights, chunk_size)

    def for_each(
        self,
        run: Callable[[dict[str, Tensor]], Tensor],
        values: dict[str, Tensor],
        chunk_size: int | None = None,
    ) -> Tensor:
        """Applies ``run`` to the values of each member, ``[members, ...]``: vectorised, or in turn where necessary.

        Members run in turn if normalisation layers update their statistics, if recurrent layers use fused kernels,
        which cannot be vectorised, and after vectorisation has failed once for this network.

        :param run: a function that calls this network.
        :param values: by name, each ``[members, ...]``.
        :param chunk_size: how many members are vectorised at a time; ``None`` for all.
        """
        members = next(iter(values.values())).shape[0]
        if members == 1:
            return run({name: value.squeeze(0) for name, value in values.items()}).unsqueeze(0)

        def in_turn() -> Tensor:
            return self._in_turn(lambda i: run({name: value[i] for name, value in values.items()}), members)

        def at_once() -> Tensor:
            with no_fused_attention(), _without_vmap_in_buffers(self.net):
                result: Tensor = vmap(run, randomness="different", chunk_size=chunk_size)(values)
            return result

        if self._moving_layers() or any(isinstance(m, nn.RNNBase) for m in self.net.modules()):
            return in_turn()
        return self._vectoriser(at_once, in_turn, next(iter(values.values())))

    def in_turn(self) -> contextlib.AbstractContextManager[None]:
        """Inside, members run in turn: vectorised convolutions and attention are traced for one size of the batch."""
        return self._vectoriser.in_turn()

    def _moving_layers(self) -> list[nn.Module]:
        """The normalisation layers that update their statistics in a pass."""
        return [m for m in self.net.modules() if isinstance(m, _NormBase) and m.training and m.track_running_stats]

    def _in_turn(self, run: Callable[[int], Tensor], members: int) -> Tensor:
        """Stacks ``run(i)`` over the members i, ``[members, ...]``; statistics move once, to their mean."""
        statistics = RunningStatistics(self._moving_layers())
        outputs = []
        for member in range(members):
            with statistics.one_pass():
                outputs.append(run(member))
        statistics.average()
        return torch.stack(outputs)


def _keep_ties(network: Network, keys: object) -> None:
    """Restores ties: loading a state with ``assign=True`` puts separate parameters where one was shared."""
    for [(module, own), *others] in network._slots.values():
        for other, name in others:
            other._parameters[name] = module._parameters[own]


@contextlib.contextmanager
def _without_vmap_in_buffers(net: nn.Module) -> Iterator[None]:
    """Inside, ``vmap`` must leave no tensor of its own in a buffer, as these are invalid after it.

    :raises RuntimeError: when the network put one there; the buffer is restored.
    """
    before = [(m._buffers, name, buffer) for m in net.modules() for name, buffer in m._buffers.items()]
    changed = None
    try:
        yield
    finally:
        for buffers, name, buffer in before:
            now = buffers.get(name)
            if now is not buffer and now is not None and torch._C._functorch.is_functorch_wrapped_tensor(now):
                buffers[name], changed = buffer, name
    if changed is not None:
        raise RuntimeError(f"it writes a value of each member into the one buffer {changed!r}")


def _shapes(x: Inputs, size: int) -> object:
    """What an input looks like apart from its number of samples, device and dtype."""
    leaves, spec = pytree.tree_flatten(x)
    shapes = tuple(
        (batched(t, size), t.shape[1:] if batched(t, size) else t.shape) if isinstance(t, Tensor) else None
        for t in leaves
    )
    return str(spec), shapes


def _keep(known: dict[Any, Any], key: Any, value: Any) -> None:
    """Stores a finding for a shape, and drops the oldest beyond ``MAX_SHAPES``."""
    known[key] = value
    while len(known) > MAX_SHAPES:
        del known[next(iter(known))]


def _neutral(parameter: Tensor) -> Perturbation:
    if parameter.dim() == 1:
        return Replacement(parameter[None, None])
    one = parameter.new_ones((1, 1, 1))
    return Rank1Factors(one.expand(1, 1, parameter.shape[0]), one.expand(1, 1, parameter.shape[1]))


@contextlib.contextmanager
def no_fused_attention() -> Iterator[None]:
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
