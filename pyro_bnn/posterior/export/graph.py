"""Turns a traced program into a plain module: a graph of torch operations, and the tensors that they use."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from pyro_bnn.posterior.export.arguments import Arguments, Expected

_CHECKS = (torch.ops.aten._assert_tensor_metadata.default,)
_GRAD_MODE = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST = torch.ops.higher_order.wrap_with_autocast


class AveragedNetwork(fx.GraphModule):
    """A posterior as one function, ``{output: tensor}``, made of torch operations; see :meth:`Posterior.export`."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the arguments."""
        return tuple(str(node.target) for node in self.graph.nodes if node.op == "placeholder")

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the results."""
        (results,) = next(node for node in self.graph.nodes if node.op == "output").args
        assert isinstance(results, dict)
        return tuple(results)

    def __repr__(self) -> str:
        numbers = sum(tensor.numel() for tensor in self.buffers())
        return f"AveragedNetwork({', '.join(self.inputs)}) -> {{{', '.join(self.outputs)}}}, {numbers:,} numbers"

    __str__ = __repr__

    def __reduce__(self) -> Any:
        raise TypeError(
            "an exported module is not pickled, as pickles of graphs lose parts: save torch.export.export(module, ...) "
            "with torch.export.save, or write torch.onnx.export(module, ..., dynamo=True)"
        )


def plain_module(
    program: ExportedProgram, arguments: Arguments, outputs: Sequence[str], name_of: Callable[[str], str]
) -> AveragedNetwork:
    """The module of a traced program, with copies of the tensors that it uses, each once.

    :param outputs: the names of its results.
    :param name_of: gives what a tensor is called, by its name in the program.
    """
    graph = fx.Graph()
    held: dict[str, Any] = {"expected": Expected(arguments)}
    copied: dict[fx.Node, Any] = {}
    first: dict[int, fx.Node] = {}  # a tensor with several names, such as a tied weight, is held once
    inputs = iter(arguments.names)
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    kinds = list(zip(placeholders, program.graph_signature.input_specs, strict=True))
    for node, spec in kinds:
        if spec.kind is InputKind.USER_INPUT:
            copied[node] = graph.placeholder(next(inputs))
    graph.call_module("expected", tuple(copied.values()))
    for node, spec in kinds:
        if spec.kind is InputKind.USER_INPUT or not node.users:
            continue
        assert spec.target is not None
        value = program.state_dict.get(spec.target, program.constants.get(spec.target))
        assert isinstance(value, Tensor)
        if id(value) not in first:
            name = name_of(spec.target)
            held[name] = value.detach().clone(memory_format=torch.contiguous_format)
            first[id(value)] = graph.get_attr(name)
        copied[node] = first[id(value)]
    results = _copy(program.graph_module, graph, copied, held)
    graph.output(dict(zip(outputs, results, strict=True)))
    whole = fx.GraphModule(held, graph)
    whole.graph.eliminate_dead_code()
    used = {str(node.target) for node in whole.graph.nodes if node.op in ("get_attr", "call_module")}
    made = AveragedNetwork({name: value for name, value in held.items() if name in used}, whole.graph)
    return made.eval()


def _copy(module: fx.GraphModule, graph: fx.Graph, copied: dict[fx.Node, Any], held: dict[str, Any]) -> Sequence[Any]:
    """Copies the operations of a traced module and returns its results.

    A block in which only gradients are off, or autocast, was traced as a module of its own: it is copied in line.

    :param copied: by node of the module, the node of the graph; complete for its placeholders.
    :param held: gets the modules that stay separate.
    """
    for node in module.graph.nodes:
        if node.op == "output":
            results: Sequence[Any] = fx.map_arg(node.args[0], copied.__getitem__)
            return results
        if node.op == "placeholder" or node.target in _CHECKS:
            continue
        if _in_line(node):
            at = next(i for i, arg in enumerate(node.args) if isinstance(arg, fx.Node))
            block = module.get_submodule(node.args[at].target)
            assert isinstance(block, fx.GraphModule)
            own = [one for one in block.graph.nodes if one.op == "placeholder"]
            given = [copied[arg] for arg in node.args[at + 1 :]]
            copied[node] = _copy(block, graph, dict(zip(own, given, strict=True)), held)
        elif node.target is operator.getitem and isinstance(copied[node.args[0]], Sequence):
            copied[node] = copied[node.args[0]][node.args[1]]  # one of the results of such a block
        elif node.op == "get_attr":
            if not all(_in_line(user) for user in node.users):
                name = f"blocks.{len(held)}"
                held[name] = getattr(module, str(node.target))
                copied[node] = graph.get_attr(name)
        else:
            copied[node] = graph.node_copy(node, copied.__getitem__)
            copied[node].meta.clear()  # sizes of the example, and paths of the machine
    raise AssertionError("a traced module returns its results")


def _in_line(node: fx.Node) -> bool:
    return node.target is _GRAD_MODE or node.target is _AUTOCAST and node.args[2] is False
