"""Runs a network with a different weight for every row of the batch, without changing its code.

Pyro intercepts ``pyro.sample``; this file intercepts the torch function that consumes a weight. :class:`Perturb` is a
:class:`torch.overrides.TorchFunctionMode` that knows, by identity, which parameters are perturbed and rewrites the
calls that consume them. With W' = W o (r s^T) (Dusenberry et al. 2020, eq. 1)

    F.linear(x, W', b) = F.linear(x * s, W) * r + b,

so W is used once, in one product, although every row has its own factors. *Members* (mixture components, particles,
posterior draws) are folded into the batch: row ``m * B + b`` of the folded batch is sample b seen by member m.

Which axis of a tensor inside the network is the batch, and which of its entries belong to which sample, differs from
call to call (sequence-first attention, windows, ``reshape(T * B, C)``). :mod:`pyro_bnn.perturb.probe` finds it once,
as one :class:`Layout` for each use of a weight.

A *rule* rewrites one torch function. New rules are added with :func:`register`::

    @pb.perturb.register(torch.mv, signature=("input", "vec"))
    def _mv(call): ...
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_bnn.perturb.factors import Perturbation, Rank1Factors, Replacement
from pyro_bnn.perturb.layout import Fold, Layout, Use
from pyro_bnn.perturb.low_rank import LowRankFactors, Shift, with_rows


class Perturb(TorchFunctionMode):
    """Rewrites the calls that consume perturbed parameters; ``with Perturb(...): y = net(folded_x)``.

    :param perturbations: perturbation by ``id`` of the parameter.
    :param names: parameter name by ``id``.
    :param layouts: the result of :func:`pyro_bnn.perturb.probe.find_layouts`.
    :param members: number of members M.
    :param rows: number of samples B in the batch; the folded batch has ``M * B`` rows.
    :param padded: tables, by ``id``, whose padding row is not perturbed.
    """

    def __init__(
        self,
        perturbations: dict[int, Perturbation],
        names: dict[int, str],
        layouts: dict[Use, Layout],
        members: int,
        rows: int,
        padded: frozenset[int] = frozenset(),
    ) -> None:
        super().__init__()
        self.padded = set(padded)
        self.perturbations = dict(perturbations)
        self.names = dict(names)
        self.layouts = layouts
        self.fold = Fold(members, rows)
        self._occurrences: dict[str, int] = {}
        self._derived: list[Tensor] = []
        #: by ``id`` of a tensor whose samples were reordered: the tensor, and the order
        self.reordered: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule = RULES.get(func)
        if rule is None or not (rule.always or any(id(t) in self.perturbations for t in tensors((args, kwargs)))):
            return func(*args, **kwargs)
        return rule.apply(Call(self, func, args, kwargs, rule.signature))

    def derive(self, tensor: Tensor, source: Tensor, perturbation: Perturbation) -> Tensor:
        """``tensor`` is a view or cast of the parameter ``source``: it gets the corresponding perturbation."""
        self.perturbations[id(tensor)] = perturbation
        self.names[id(tensor)] = self.names[id(source)]
        if id(source) in self.padded:
            self.padded.add(id(tensor))
        self._derived.append(tensor)  # keeps the id from being given to another tensor during this pass
        return tensor

    def uses(self) -> dict[str, int]:
        """Number of uses of each parameter so far."""
        return dict(self._occurrences)

    @contextlib.contextmanager
    def resumed(self, uses: Mapping[str, int]) -> Iterator[None]:
        """Inside, uses are counted from the point at which :meth:`uses` returned ``uses``."""
        reached, self._occurrences = self._occurrences, dict(uses)
        try:
            yield
        finally:
            self._occurrences = reached

    def knows(self, value: Any) -> bool:
        """Whether an object is a perturbed weight, or a tensor with reordered samples."""
        return id(value) in self.perturbations or id(value) in self.reordered

    def recognise(self, now: Tensor, before: Tensor) -> None:
        """From here on treats ``now`` like ``before``, which this mode :meth:`knows`."""
        if now is before:
            return
        if id(before) in self.perturbations:
            self.derive(now, before, self.perturbations[id(before)])
        if id(before) in self.reordered:
            self.reordered[id(now)] = now, self.reordered[id(before)][1]

    def locate(self, x: Tensor, parameter: Tensor) -> Layout:
        """The layout of ``x``, a tensor to which the perturbation of ``parameter`` is applied next; counts this use."""
        name = self.names[id(parameter)]
        occurrence = self._occurrences.get(name, 0)
        self._occurrences[name] = occurrence + 1
        return self.layout(x, Use(name, occurrence))

    def layout(self, x: Tensor, use: Use) -> Layout:
        try:
            layout = self.layouts[use]
        except KeyError:
            raise RuntimeError(
                f"the network used parameter {use.parameter!r} {use.occurrence + 1} times in this call, but "
                f"{use.occurrence} times when it was probed in eval mode on inputs of the same shape. How often a "
                "weight is used must not depend on the batch, its values or train()/eval(); leave the parameter out "
                "with `select=` or run the branch in both modes."
            ) from None
        if (
            layout.dim is not None
            and x.shape[layout.dim] != layout.outer * self.fold.members * self.fold.rows * layout.inner
        ):
            raise RuntimeError(
                f"use {use.occurrence + 1} of parameter {use.parameter!r} saw an input of shape {tuple(x.shape)}; the "
                f"probe says that axis {layout.dim} should have {layout.outer} x {self.fold.members * self.fold.rows} "
                f"rows x {layout.inner} entries. The network must treat every sample of the batch alike."
            )
        return layout

    def per_row(self, values: Tensor) -> Tensor:
        """``[members | 1, rows | 1, n] -> [members * rows, n]``, or ``[1, n]`` when all rows share one draw."""
        if values.shape[:2] == (1, 1):
            return values[0]
        if values.shape[:2] != self.fold:
            values = values.expand(*self.fold, -1)
        return values.flatten(0, 1)

    def combine(self, op: Callable[..., Tensor], x: Tensor, values: Tensor, dim: int, layout: Layout) -> Tensor:
        """``op(x, values)`` with every entry of ``x`` meeting the values of its own row along the axis ``dim``."""
        n = x.shape[dim]
        values = self.per_row(values).to(x.dtype)
        if values.shape[-1] != n:  # one factor for each channel of a group, shared by the groups
            values = values.repeat(1, n // values.shape[-1])
        dim, rows = dim % x.dim() - x.dim(), values.shape[0]
        if rows == 1:
            return op(x, values.view((n,) + (1,) * (-dim - 1)))
        if layout.dim is None:  # the same for all samples up to here
            x = x if x.dim() > -dim and x.shape[0] == 1 else x.unsqueeze(0)
            layout = Layout(0)
        assert layout.dim is not None
        behind = layout.dim - x.dim() > dim  # the rows come after the features, as in W @ x
        if behind:
            values = values.t()
        if layout.outer == layout.inner == 1:
            shape = shape_of(x.dim(), {layout.dim: rows, dim: n})
            return op(x, values if [*values.shape] == shape else values.reshape(shape))
        split = x.unflatten(layout.dim, (layout.outer, rows, layout.inner))
        shape = shape_of(split.dim(), {layout.dim + 1: rows, dim - 2 * behind: n})
        return op(split, values.reshape(shape)).flatten(layout.dim, layout.dim + 2)

    def product(
        self,
        op: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        dims: tuple[int, int],
        transposed: bool = False,
        weight_perturbation: Perturbation | None = None,
        bias_perturbation: Perturbation | None = None,
        layout: Layout | None = None,
        groups: int = 1,
        ungrouped: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None,
    ) -> Tensor:
        """``op(x, W', b')`` for a product ``op(x, W, b)`` that is linear in W.

        :param dims: the feature axis of ``x`` and that of the result, counted from the end.
        :param transposed: whether dimension 0 of the stored weight is the input side.
        :param groups: of a convolution; ``ungrouped`` is ``op`` with one group.
        """
        factors = weight_perturbation or self.perturbations.get(id(weight))
        offset = bias_perturbation or (self.perturbations.get(id(bias)) if bias is not None else None)
        if factors is None and offset is None:
            return op(x, weight, bias)
        if layout is None:
            layout = self.locate(x, weight if factors is not None else bias)  # type: ignore[arg-type]
        if isinstance(factors, (LowRankFactors, Shift)):
            shared = all(f.shape[0] == 1 for f in factors if isinstance(f, Tensor))
            own_bias, of_rows = bias if offset is None else None, shared or layout.dim is not None
            if op is F.linear and of_rows and isinstance(factors, LowRankFactors) and factors.sums_for(x):
                y = factors.linear(self.fold, x, weight, own_bias, layout)
            else:
                y = op(x, weight, own_bias)
                if not shared:
                    x, layout = with_rows(self.fold, x, layout)
                y = y + factors.term(self.fold, ungrouped or op, x, layout, dims, transposed, groups).to(y.dtype)
        elif factors is not None:
            assert isinstance(factors, Rank1Factors)
            if transposed:
                factors = factors.transposed()
            r, s = factors
            if (weight.shape[0] // groups if transposed else weight.shape[1]) == 1:
                # A factor of one input passes through the product, and x needs no gradient for it.
                y = op(x, weight, None)
                n = y.shape[dims[1]]
                r = r.repeat(1, 1, n // r.shape[-1]) * s.repeat_interleave(n // s.shape[-1], -1)
            else:
                y = op(self.combine(torch.mul, x, s, dims[0], layout), weight, None)
                if layout.dim is None and s.shape[:2] != (1, 1):
                    layout = Layout(0)  # the product just got an axis for the rows
            y = self.combine(torch.mul, y, r, dims[1], layout)
            if layout.dim is None and r.shape[:2] != (1, 1):
                layout = Layout(0)
            if offset is None and bias is not None:
                return y + bias.view((-1,) + (1,) * (-dims[1] - 1)).to(y.dtype)
        else:
            y = op(x, weight, None)
        if offset is not None:
            assert isinstance(offset, Replacement)
            y = self.combine(torch.add, y, offset.value, dims[1], layout)
        return y


def shape_of(ndim: int, sizes: dict[int, int]) -> list[int]:
    shape = [1] * ndim
    for dim, size in sizes.items():
        shape[dim] = size
    return shape


def tensors(values: Iterable[object]) -> Iterator[Tensor]:
    """The tensors among the arguments of a call, inside lists and tuples too."""
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list, dict)):
            yield from tensors(value)


class Call:
    """A call that consumes at least one perturbed parameter: its arguments by name, and the mode that caught it."""

    def __init__(
        self, mode: Perturb, func: Any, args: Any, kwargs: dict[str, object], signature: tuple[str, ...]
    ) -> None:
        self.mode, self.func, self.args, self.kwargs = mode, func, args, kwargs
        self.arguments = dict(zip(signature, args, strict=False)) | kwargs

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["arguments"][name]
        except KeyError:
            raise AttributeError(name) from None

    def perturbation(self, tensor: Tensor | None) -> Perturbation | None:
        return self.mode.perturbations.get(id(tensor)) if tensor is not None else None

    def rest(self, *names: str) -> dict[str, Any]:
        """The arguments except those named."""
        return {k: v for k, v in self.arguments.items() if k not in names}


class _Rule(NamedTuple):
    signature: tuple[str, ...]
    apply: Callable[[Call], Any]
    always: bool
    consumes: bool
    weights: tuple[str, ...] | None
    product: bool


#: the rule of each torch function that has one
RULES: dict[Any, _Rule] = {}


def register(
    *functions: object,
    signature: Sequence[str],
    weights: Sequence[str] | None = None,
    always: bool = False,
    consumes: bool = True,
    product: bool = True,
) -> Callable[[Callable[[Call], Any]], Callable[[Call], Any]]:
    """Registers a rule for torch functions.

    :param functions: the functions as :class:`~torch.overrides.TorchFunctionMode` sees them.
    :param signature: the names of their positional arguments, in order; the rule finds them as ``call.<name>``.
        An argument that was not given is missing (``getattr(call, name, default)``).
    :param weights: the arguments that may be perturbed; any of them by default. A parameter given as another argument
        (a learned input of a linear layer) is not a weight of this call.
    :param always: run the rule even when no argument is a perturbed parameter, for rules that only watch.
    :param consumes: whether the function consumes the weight; views and casts only pass it on.
    :param product: whether it is a product, a convolution or a table look-up, whose weights are random by default.
    :return: a decorator for the rule, which takes a :class:`Call` and returns what the function returns.
    """

    def decorate(rule: Callable[[Call], Any]) -> Callable[[Call], Any]:
        for function in functions:
            RULES[function] = _Rule(
                tuple(signature), rule, always, consumes, None if weights is None else tuple(weights), product
            )
        return rule

    return decorate


def consumed(function: Any, args: Any, kwargs: dict[str, object] | None) -> list[Tensor]:
    """The tensors that a call consumes as weights by the rule of its torch function; none when there is no rule."""
    rule = RULES.get(function)
    if rule is None or not rule.consumes:
        return []
    if rule.weights is None:
        return list(tensors((args, kwargs or {})))
    arguments = dict(zip(rule.signature, args, strict=False)) | (kwargs or {})
    return list(tensors([arguments.get(name) for name in rule.weights]))


def is_product(function: Any) -> bool:
    """Whether a torch function has a rule as a product, a convolution or a table look-up."""
    return function in RULES and RULES[function].product


def passes_on(function: Any) -> bool:
    """Whether a torch function has a rule that makes its result a view or cast of the weight."""
    return function in RULES and not RULES[function].consumes and not RULES[function].always
