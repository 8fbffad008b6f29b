"""A user's network inside a probabilistic program: its parameters by name, its inputs by row, its weights by member."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils import _pytree as pytree

from pyro_bnn.inputs import EXPECTED, Inputs, describe
from pyro_bnn.modes import RunningStatistics, undisturbed
from pyro_bnn.perturb import Layout, Perturb, Perturbation, Rank1Factors, Replacement, Use
from pyro_bnn.perturb.probe import (
    batched,
    check_fold,
    find_consumed,
    find_layouts,
    require_rows,
    select_samples,
    unlike,
)

Output = str | int | Callable[[Any], Tensor] | None

#: modules whose weights are neither products nor tables: they get no factors, and stay point estimates by default
NORMALISATIONS: tuple[type[nn.Module], ...] = (
    *(nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm),
)


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
    """The model's own copy of a network. Weight ties are kept; the user's module is left alone.

    :param net: any module; called as ``net(x)``, ``net(*x)`` for a tuple or list, ``net(**x)`` for a dict.
    :param output: which tensor to take when the network returns more than one: a key, an index, or a function. By
        default the ``logits`` of an output that has them, as those of transformers.
    :param share: whether the parameters keep the storage of the given ones and take no gradient, instead of being
        copied. Buffers are copied.
    """

    def __init__(self, net: nn.Module, output: Output = None, share: bool = False) -> None:
        super().__init__()
        if not isinstance(net, nn.Module):
            raise TypeError(f"net must be a torch.nn.Module, got {type(net).__name__}")
        known = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in net.parameters()} if share else {}
        self.net = copy.deepcopy(net, known)
        self.output = output
        self._places = [
            (name, self.net.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
            for name, _ in self.net.named_parameters()
        ]
        self._layouts: dict[object, dict[Use, Layout]] = {}
        self._activations: dict[object, int] = {}

    def parameters_by_name(self) -> dict[str, nn.Parameter]:
        """Every parameter once, tied ones under their first name. Cheaper than ``named_parameters``."""
        found: dict[str, Any] = {name: module._parameters[own] for name, module, own in self._places}
        return found

    def product_weights(self) -> list[str]:
        """Names of the weights that products, convolutions and embeddings consume, as far as module types tell."""
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
        """The network's output tensor, with some of its parameters replaced by ``weights``."""
        args, kwargs = (
            ((), x) if isinstance(x, dict) else (tuple(x), {}) if isinstance(x, (tuple, list)) else ((x,), {})
        )
        y = functional_call(self.net, weights, args, kwargs) if weights else self.net(*args, **kwargs)
        if callable(self.output):
            y = self.output(y)
        elif self.output is not None:
            y = y[self.output] if not isinstance(self.output, str) or isinstance(y, dict) else getattr(y, self.output)
        elif not isinstance(y, Tensor):
            y = y["logits"] if isinstance(y, Mapping) and "logits" in y else getattr(y, "logits", y)
        if not isinstance(y, Tensor):
            raise TypeError(
                f"the network returns {type(y).__name__}, not a tensor; say which one is meant with `output=` "
                "(a key, an index, or a function)"
            )
        return y

    def perturbed(self, x: Inputs, size: int, perturbations: dict[str, Perturbation], members: int) -> Tensor:
        """One pass in which every row has weights of its own: ``[members, size, ...]``.

        :param x: input with ``size`` samples.
        :param perturbations: by parameter name, each ``[members | 1, size | 1, n]``.
        """
        parameters = self.parameters_by_name()
        names = {id(parameters[name]): name for name in perturbations}
        layouts = self.layouts(x, size, perturbations.keys())
        folded = x
        if members > 1:
            folded = pytree.tree_map(lambda t: t.repeat(members, *[1] * (t.dim() - 1)) if batched(t, size) else t, x)
        by_id = {i: perturbations[name] for i, name in names.items()}
        with no_fused_attention(), Perturb(by_id, names, layouts, members, size):
            y = self(folded)
        require_rows(y, members * size)
        return y.unflatten(0, (members, size))

    def layouts(self, x: Inputs, size: int, perturbed: Iterable[str]) -> dict[Use, Layout]:
        """The layouts for inputs of this shape, probed on first sight. See :mod:`pyro_bnn.perturb.probe`."""
        # A network that sorts its samples looks regular as long as nothing differs by which it could sort them.
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
                layouts = find_layouts(self, self.net, names, neutral, x, size)
                check_fold(self, self.net, names, neutral, chosen, layouts, x, size)
            self._layouts[key] = layouts
        return self._layouts[key]

    def activation_elements(self, x: Inputs, size: int) -> int:
        """Numbers in the largest tensor that a module makes of one sample, from one pass in eval mode."""
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
            self._activations[key] = max(largest)
        return self._activations[key]

    def consumed(self, x: Inputs) -> set[str]:
        """The names of all parameters that some product, convolution or table look-up uses on this input."""
        with no_fused_attention():
            return find_consumed(self, self.net, x, batch_size(x))

    def explicit(self, x: Inputs, weights: dict[str, Tensor], chunk_size: int | None = None) -> Tensor:
        """One whole set of weights for each member: ``[members, size, ...]``.

        :param weights: by parameter name, each ``[members, *shape]``.
        """
        members = next(iter(weights.values())).shape[0]
        if members == 1:
            return self(x, {n: w.squeeze(0) for n, w in weights.items()}).unsqueeze(0)
        if any(m.training or isinstance(m, nn.RNNBase) for m in self.net.modules()):
            # neither the statistics of a normalisation layer nor the fused recurrent kernels can be vectorised
            return self._in_turn(x, [{n: w[m] for n, w in weights.items()} for m in range(members)])
        with no_fused_attention():
            run = vmap(lambda w: self(x, w), randomness="different", chunk_size=chunk_size)
            result: Tensor = run(weights)
        return result

    def _in_turn(self, x: Inputs, weights: list[dict[str, Tensor]]) -> Tensor:
        norms = (m for m in self.net.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.training)
        statistics = RunningStatistics(norms)
        outputs = []
        for own in weights:
            with statistics.one_pass():
                outputs.append(self(x, own))
        statistics.average()
        return torch.stack(outputs)


def _shapes(x: Inputs, size: int) -> object:
    """What an input looks like apart from its number of samples, device and dtype."""
    leaves, spec = pytree.tree_flatten(x)
    shapes = tuple(
        (batched(t, size), t.shape[1:] if batched(t, size) else t.shape) if isinstance(t, Tensor) else None
        for t in leaves
    )
    return str(spec), shapes


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
