"""Records a function of tensors once as a graph of tensor operations, and replays it without its Python code.

A small network spends most of a step in Python and Pyro, which make the same decisions at every call. :func:`record`
makes them once; :func:`fill_shapes` and :func:`fold_constants` compute in advance what does not depend on the inputs,
:func:`drop_identities` removes operations that change nothing, and :func:`script` replays the rest without Python's
cost for each operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

#: operations that use the shape of their input but not its values
SHAPE_ONLY = tuple(getattr(torch.ops.aten, n).default for n in ("ones_like", "zeros_like", "full_like", "new_full"))


def record(function: Callable[..., Any], *inputs: Tensor) -> Callable[..., Any]:
    """The operations that ``function`` runs on these inputs, as a function of other inputs of the same shapes.

    Everything else that the function reads becomes a constant. Results may share memory with inputs and constants:
    copy them before writing into them.

    :raises Exception: whatever the function raises while it is recorded, for example because it branches on values.
    """
    traced = make_fx(function)(*inputs)
    if not writes_in_place(traced):  # a tensor that is written into is not a constant
        fill_shapes(traced)
        fold_constants(traced)
        drop_identities(traced)
    traced.graph.eliminate_dead_code()
    return script(GraphModule(traced, traced.graph), inputs)  # a new module drops unused constants


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
    """Removes views to the shape that a tensor already has, views that another view follows, and powers of 1."""
    aten = torch.ops.aten
    for node in traced.graph.nodes:
        if node.target in (aten.view.default, aten.expand.default):
            source = node.args[0]
            if _value(source).shape == _value(node).shape:
                node.replace_all_uses_with(source)
            elif node.target is source.target is aten.view.default:
                node.replace_input_with(source, source.args[0])
        elif node.target is aten.pow.Tensor_Scalar and node.args[1] == 1:
            node.replace_all_uses_with(node.args[0])


def script(traced: GraphModule, inputs: tuple[Tensor, ...]) -> Callable[..., Any]:
    """The graph as TorchScript, which spends about 1 microsecond on an operation where Python spends 5.

    PyTorch deprecates ``torch.jit.trace`` in favour of ``torch.compile``, which needs a C++ compiler and half a minute
    for each graph, and sums in another order. PyTorch keeps the result of ``torch.jit.trace`` until the process ends,
    2 MB for each graph; the two functions that it calls are used here directly, because their result is freed with the
    last reference to it. TorchScript has no gradient of a convolution: such graphs stay in Python.
    """
    try:
        graph, *_ = torch._C._create_graph_by_tracing(traced, inputs, lambda value: "", True, False, None, [])
    except RuntimeError:
        return traced
    replay: Callable[..., Any] = torch._C._create_function_from_graph("replay", graph)
    return replay


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
