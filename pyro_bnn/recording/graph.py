"""Records a function of tensors once as a graph of tensor operations, and replays it without its Python code.

A small network spends most of a step in Python and Pyro, which make the same decisions at every call. :func:`record`
makes them once; :func:`fill_shapes` and :func:`fold_constants` compute in advance what does not depend on the inputs,
and :func:`drop_identities` removes operations that change nothing. What is left is replayed by :func:`in_python`, which
calls one operation after the other, or by :func:`compiled`, which makes machine code of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg
from torch.overrides import TorchFunctionMode

#: operations that use the shape of their input but not its values
SHAPE_ONLY = tuple(getattr(torch.ops.aten, n).default for n in ("ones_like", "zeros_like", "full_like", "new_full"))


#: what reads the numbers of a tensor into Python
_READS = frozenset(
    getattr(Tensor, name)
    for name in ("item", "tolist", "numpy", "__array__", "__bool__", "__float__", "__int__", "__index__", "__complex__")
)
#: aten operations that are methods of a tensor by another name
_METHODS = {"_unsafe_view": "view"}


class NotRecordableError(Exception):
    """A function does what a graph of its operations cannot repeat."""


def record(function: Callable[..., Any], *inputs: Tensor, held: Sequence[Tensor] = ()) -> tuple[GraphModule, list[int]]:
    """The operations that ``function`` runs on these inputs, for other inputs of the same shapes.

    Everything else that the function reads becomes a constant. Results share no memory with inputs and constants, so
    that they may be written into; two results that are always equal may be one tensor.

    :param held: tensors that the function reads, and perhaps writes into, and that are no constants: parameters.
    :return: the graph, whose inputs are those of ``held`` that the function uses, by their indices in the second
        result, and then ``inputs``.
    :raises Exception: whatever the function raises while it is recorded, for example because it branches on values.
    """
    with _NoReads(held):
        traced = make_fx(function)(*inputs)
    used = _lift(traced, held)
    draw_in_memory_order(traced)
    if not writes_in_place(traced):  # a tensor that is written into is not a constant
        fill_shapes(traced)
        fold_constants(traced)
        drop_identities(traced)
    copy_shared_results(traced)
    traced.graph.eliminate_dead_code()
    return GraphModule(traced, traced.graph), used  # a new module drops unused constants


class _NoReads(TorchFunctionMode):
    """Refuses to read the numbers of some tensors, which would become constants without a word."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self._ids = {id(tensor) for tensor in tensors}

    def __torch_function__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS and id(args[0]) in self._ids:
            raise NotRecordableError("it reads a parameter or buffer as a number of Python, which may change")
        return func(*args, **(kwargs or {}))


def _lift(traced: GraphModule, held: Sequence[Tensor]) -> list[int]:
    """Makes inputs, before all others, of the constants that are in ``held``; returns their indices there."""
    index = {id(tensor): i for i, tensor in enumerate(held)}
    first = next(iter(traced.graph.nodes))
    inputs: dict[int, Node] = {}
    for node in list(traced.graph.nodes):
        own = index.get(id(getattr(traced, str(node.target), None))) if node.op == "get_attr" else None
        if own is None:
            continue
        if own not in inputs:
            with traced.graph.inserting_before(first):
                inputs[own] = traced.graph.placeholder(f"held_{own}")
            inputs[own].meta |= node.meta
        node.replace_all_uses_with(inputs[own])
        traced.graph.erase_node(node)
    return list(inputs)


def writes_in_place(traced: GraphModule) -> bool:
    """Whether an operation of the graph changes a tensor that it is given."""
    return any(isinstance(n.target, OpOverload) and n.target._schema.is_mutable for n in traced.graph.nodes)


def fill_shapes(traced: GraphModule) -> None:
    """Replaces ``ones_like`` and the like by constants: their results depend on the shape of the input alone."""
    for node in traced.graph.nodes:
        if node.target in SHAPE_ONLY:
            source = node.args[0]
            like = torch.empty(_value(source).shape, dtype=_value(source).dtype, device=_value(source).device)
            _replace(traced, node, node.target(like, *node.args[1:], **node.kwargs))


def fold_constants(traced: GraphModule) -> None:
    """Replaces operations that have only constants as inputs, and draw no random numbers, by their results."""
    for node in traced.graph.nodes:
        sources = node.all_input_nodes
        if (
            isinstance(node.target, OpOverload)
            and sources
            and all(source.op == "get_attr" for source in sources)
            and isinstance(_value(node), Tensor)
            and torch.Tag.nondeterministic_seeded not in node.target.tags
        ):
            args, kwargs = map_arg((node.args, node.kwargs), lambda source: getattr(traced, str(source.target)))
            _replace(traced, node, node.target(*args, **kwargs))


def drop_identities(traced: GraphModule) -> None:
    """Removes views to the shape that a tensor has, views that another view follows, and factors and powers of 1."""
    aten = torch.ops.aten
    for node in traced.graph.nodes:
        if node.target in (aten.view.default, aten.expand.default):
            source = node.args[0]
            if _value(source).shape == _value(node).shape:
                node.replace_all_uses_with(source)
            elif node.target is source.target is aten.view.default:
                node.replace_input_with(source, source.args[0])
        elif node.target in (aten.pow.Tensor_Scalar, aten.mul.Scalar, aten.mul.Tensor) and _is_one(node.args[1]):
            if _value(node.args[0]).dtype == _value(node).dtype:
                node.replace_all_uses_with(node.args[0])


def draw_in_memory_order(traced: GraphModule) -> None:
    """Draws the zeros of a dropout for a tensor with permuted axes in the order in which these lie in its memory.

    On a CPU ``t.bernoulli_()`` fills the memory of t from its beginning. A compiler that lays t out otherwise would
    give each element the draw of another. So a tensor with its axes in the order of memory is filled, and permuted.
    """
    aten = torch.ops.aten
    for node in traced.graph.nodes:
        if node.target is not aten.bernoulli_.float or _value(node).device.type != "cpu":
            continue
        value = _value(node)
        order = sorted(range(value.dim()), key=lambda axis: -value.stride()[axis])
        lengths = [value.shape[axis] for axis in order]
        is_dense = [value.stride()[axis] for axis in order] == [*torch.empty(lengths, device="meta").stride()]
        if value.is_contiguous() or not is_dense:
            continue
        with traced.graph.inserting_before(node):
            kind = {"dtype": value.dtype, "device": value.device}
            fresh = traced.graph.call_function(aten.empty.memory_format, (lengths,), kind)
            drawn = traced.graph.call_function(node.target, (fresh, *node.args[1:]), node.kwargs)
            back = [order.index(axis) for axis in range(value.dim())]
            permuted = traced.graph.call_function(aten.permute.default, (drawn, back))
        for made in (fresh, drawn):
            made.meta["val"] = torch.empty(lengths, dtype=value.dtype, device="meta")
        permuted.meta |= node.meta
        node.replace_all_uses_with(permuted)
        traced.graph.erase_node(node)


def copy_shared_results(traced: GraphModule) -> None:
    """Copies results that are inputs or constants, or views of these."""
    (output,) = traced.graph.find_nodes(op="output")
    for result in dict.fromkeys(output.all_input_nodes):
        source = result
        while isinstance(source.target, OpOverload) and _is_view(source.target):
            source = source.args[0]
        if source.op in ("placeholder", "get_attr"):
            with traced.graph.inserting_before(output):
                copied = traced.graph.call_function(torch.ops.aten.clone.default, (result,))
            copied.meta |= result.meta
            output.replace_input_with(result, copied)


def _is_view(operation: OpOverload) -> bool:
    """Whether the result of an operation shares the memory of its first argument."""
    returns = operation._schema.returns
    return len(returns) > 0 and returns[0].alias_info is not None


def _is_one(factor: object) -> bool:
    return isinstance(factor, (int, float)) and factor == 1


def in_python(traced: GraphModule) -> Callable[..., Any]:
    """The graph as one Python function.

    Operations are called as methods of tensors where they are, which takes a third of the time of ``torch.ops``.
    """
    for node in traced.graph.nodes:
        if not isinstance(node.target, OpOverload) or not node.args or not isinstance(node.args[0], Node):
            continue
        name = node.target.overloadpacket.__name__
        name = _METHODS.get(name, name)
        is_of_first = node.target._schema.arguments[0].name == "self"  # not so of where(condition, self, other)
        if is_of_first and hasattr(Tensor, name):
            node.op, node.target = "call_method", name
    traced.recompile()
    replay: Callable[..., Any] = traced.forward
    return replay


def compiled(traced: GraphModule, launches_graphs: bool = False) -> Callable[..., Any]:
    """The graph as machine code, which ``torch.compile`` makes in the first call: seconds to minutes.

    Random numbers are those of the operations themselves, and half precision rounds where they round.

    :param launches_graphs: whether a CUDA graph launches all of it at once. Its inputs are copied, and its results,
        whose memory the next call would write into.
    :raises NotRecordableError: for CUDA graphs of what is not on a CUDA device.
    :raises Exception: in the first call, what the compiler raises; without a C++ compiler it has nothing to work with.
    """
    options: dict[str, Any] = {"fallback_random": True, "emulate_precision_casts": True}
    if launches_graphs:
        _require_cuda(traced)
        options["triton.cudagraphs"] = True
    made: Callable[..., Any] = torch.compile(traced, dynamic=False, fullgraph=True, options=options)

    def launched(*inputs: Tensor) -> tuple[Tensor | None, ...]:
        torch.compiler.cudagraph_mark_step_begin()
        return tuple(None if result is None else result.clone() for result in made(*inputs))

    return launched if launches_graphs else made


def _require_cuda(traced: GraphModule) -> None:
    devices = {_value(node).device for node in traced.graph.find_nodes(op="placeholder")}
    if {device.type for device in devices} != {"cuda"}:
        names = " and ".join(sorted(map(str, devices)))
        raise NotRecordableError(f"CUDA graphs are for tensors on a CUDA device, and these are on {names}")


def _value(node: Node) -> Any:
    """The result of a node when it was recorded, as a tensor without values."""
    return node.meta.get("val")


def _replace(traced: GraphModule, node: Node, value: Tensor) -> None:
    """Replaces a node by a constant."""
    name = f"constant_of_{node.name}"
    traced.register_buffer(name, value, persistent=False)
    with traced.graph.inserting_before(node):
        constant = traced.graph.get_attr(name)
    constant.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(constant)
    traced.graph.erase_node(node)
