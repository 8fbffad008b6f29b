"""Recorded graphs: what each pass takes out of them, and that they replay the function that was recorded."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_bnn.recording.graph import (
    NotRecordableError,
    compiled,
    drop_identities,
    fill_shapes,
    fold_constants,
    in_python,
    record,
    writes_in_place,
)

#: what a function reads, which its graph holds as a constant, and what it is given
WEIGHTS = torch.tensor([1.0, 2.0, 3.0])
INPUT = torch.tensor([0.1, 0.2, 0.3])


def replayed_by_python(function: Any, *inputs: Tensor) -> Any:
    """The recording of a function, which is replayed one operation after the other."""
    return in_python(record(function, *inputs)[0])


def find_operations(function: Any, x: Tensor, *passes: Any) -> tuple[list[str], GraphModule]:
    """Names of the operations that some passes leave, in order, and the graph."""
    traced = make_fx(function)(x)
    for one in passes:
        one(traced)
    traced.graph.eliminate_dead_code()
    traced.graph.lint()
    traced.recompile()
    nodes = traced.graph.nodes
    return [n.target._schema.name.removeprefix("aten::") for n in nodes if n.op == "call_function"], traced


def test_operations_on_constants_are_done_once() -> None:
    """Proves that a chain of operations on constants is gone, and that what depends on the input stays."""

    def function(x: Tensor) -> Tensor:
        return x * (WEIGHTS.exp() + 1).sum()

    before, _ = find_operations(function, INPUT)
    after, traced = find_operations(function, INPUT, fold_constants)
    assert before == ["exp", "add", "sum", "mul"] and after == ["mul"]
    x = torch.tensor([0.5, -1.0, 2.0])
    assert torch.equal(traced(x), function(x))


def test_random_numbers_are_never_constants() -> None:
    """Proves that noise of the shape of a constant is drawn anew at every call."""
    after, traced = find_operations(lambda x: x + torch.rand_like(WEIGHTS), INPUT, fill_shapes, fold_constants)
    assert after == ["rand_like", "add"]
    assert not torch.equal(traced(WEIGHTS), traced(WEIGHTS))


def test_what_depends_on_a_shape_alone_is_a_constant() -> None:
    """Proves that ones of the input's shape are made once, and that operations on them can be folded then."""

    def function(x: Tensor) -> Tensor:
        return x + 2 * torch.ones_like(x) + x.new_full((3,), 0.5)

    assert find_operations(function, INPUT, fill_shapes)[0] == ["mul", "add", "add"]
    after, traced = find_operations(function, INPUT, fill_shapes, fold_constants)
    assert after == ["add", "add"]
    assert torch.equal(traced(WEIGHTS), WEIGHTS + 2.5)


def test_what_changes_nothing_is_left_out() -> None:
    """Proves that views to the same shape, all but the last of several views, factors and powers of 1 go."""

    def function(x: Tensor) -> Tensor:
        same = x.view(3).expand(3) ** 1 * 1
        return same.view(3, 1).view(1, 3).expand(2, 3) ** 2 * 3

    before, _ = find_operations(function, INPUT)
    after, traced = find_operations(function, INPUT, drop_identities)
    assert before == ["view", "expand", "pow", "mul", "view", "view", "expand", "pow", "mul"]
    assert after == ["view", "expand", "pow", "mul"]
    x = torch.tensor([0.5, -1.0, 2.0])
    assert torch.equal(traced(x), function(x))


def test_a_graph_that_writes_into_a_tensor_is_left_alone() -> None:
    """Proves that a buffer that the function fills at every call is not taken for the constant it begins as."""

    def function(x: Tensor) -> Tensor:
        buffer = torch.zeros_like(x)
        buffer[1:] = x[1:]
        return buffer + 1

    assert writes_in_place(make_fx(function)(WEIGHTS)) and not writes_in_place(make_fx(torch.exp)(WEIGHTS))
    replayed = replayed_by_python(function, WEIGHTS)
    for x in (WEIGHTS, -WEIGHTS, torch.zeros(3)):
        assert torch.equal(replayed(x), function(x))


def test_a_recording_replays_the_function_at_other_inputs() -> None:
    """Proves that only constants are kept: several results, with and without the input in them."""

    def function(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return (x @ y).tanh() * WEIGHTS.sum(), WEIGHTS.cumsum(0)

    generator = torch.Generator().manual_seed(0)
    replayed = replayed_by_python(function, torch.zeros(2, 3), torch.zeros(3, 2))
    for _ in range(3):
        x, y = torch.randn(2, 3, generator=generator), torch.randn(3, 2, generator=generator)
        for ours, true in zip(replayed(x, y), function(x, y), strict=True):
            assert torch.equal(ours, true)


def test_a_factor_of_one_that_makes_another_type_stays() -> None:
    """Proves that integers times 1.0, which are floats, do not stay integers."""
    integers = torch.arange(3)
    after, traced = find_operations(lambda x: x * 1.0, integers, drop_identities)
    assert after == ["mul"] and traced(integers).dtype == torch.float32


def test_constants_that_are_not_used_are_not_kept() -> None:
    """Proves that a recording does not hold what was folded on the way."""
    traced, _ = record(lambda x: x + (WEIGHTS.expand(50, 3) * 2).sum(), WEIGHTS)
    assert sum(value.numel() for value in traced.buffers()) <= 3


def test_results_may_be_written_into() -> None:
    """Proves that no result is an input, a constant, a held tensor or a view of one."""
    parameter = torch.ones(3)

    def function(x: Tensor) -> tuple[Tensor, ...]:
        return x, x.view(3, 1), WEIGHTS * 1, WEIGHTS.expand(2, 3), parameter, parameter[:2], x.exp().view(1, 3)

    traced, used = record(function, INPUT, held=[parameter])
    assert used == [0]
    x = torch.tensor([0.5, -1.0, 2.0])
    for _ in range(2):
        results = in_python(traced)(parameter, x)
        for result, true in zip(results, function(x), strict=True):
            assert torch.equal(result, true)
        for result in results:
            result.mul_(3)
    assert torch.equal(parameter, torch.ones(3)) and WEIGHTS[0] == 1 and x[0] == 0.5


def test_dropout_of_permuted_tensors_is_that_of_their_memory() -> None:
    """Proves that a seed drops the elements that torch drops, whatever a compiler makes of the layout."""
    aten = torch.ops.aten

    def function(x: Tensor) -> tuple[Tensor, ...]:
        return torch.nn.functional.dropout(x.permute(2, 0, 1), 0.3), torch.nn.functional.dropout(x, 0.3)

    x = torch.rand(3, 4, 5)
    traced, _ = record(function, x)
    filled = [n.args[0].target for n in traced.graph.nodes if n.target is aten.bernoulli_.float]
    assert filled == [aten.empty.memory_format, aten.empty_like.default]
    torch.manual_seed(0)
    ours = in_python(traced)(x)
    torch.manual_seed(0)
    for one, true in zip(ours, function(x), strict=True):
        assert torch.equal(one, true)


def test_held_tensors_are_inputs() -> None:
    """Proves that a graph has the present numbers of parameters, in their order, and writes into buffers."""
    first, unused, second, buffer = (torch.full((3,), float(i)) for i in range(4))

    def function(x: Tensor) -> Tensor:
        buffer.add_(1)
        return second * x + first

    traced, used = record(function, INPUT, held=[first, unused, second, buffer])
    assert sorted(used) == [0, 2, 3] and buffer[0] == 4
    held = [torch.tensor([7.0]), None, torch.tensor([2.0]), torch.zeros(3)]
    assert torch.allclose(in_python(traced)(*(held[i] for i in used), WEIGHTS), 2 * WEIGHTS + 7)
    assert torch.equal(held[3], torch.ones(3))  # type: ignore[arg-type]


@pytest.mark.parametrize("read", [Tensor.item, float, bool, Tensor.tolist], ids=["item", "float", "bool", "tolist"])
def test_a_held_tensor_that_is_read_is_refused(read: Any) -> None:
    """Proves that the number of a parameter cannot become a constant of a graph, although that of a constant may."""
    scale = torch.tensor(2.0)

    def function(x: Tensor) -> Tensor:
        number = read(scale)
        return x * number

    with pytest.raises(NotRecordableError, match="as a number of Python"):
        record(function, INPUT, held=[scale])
    assert torch.equal(replayed_by_python(function, INPUT)(WEIGHTS), function(WEIGHTS))


def test_results_of_a_cuda_graph_are_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that CUDA graphs are asked for, and that results outlive a next call, which writes into their memory."""
    asked: dict[str, Any] = {}

    def compiler(traced: Any, options: dict[str, Any], **_: Any) -> Callable[..., Any]:
        asked.update(options)
        memory = torch.zeros(3)

        def launch(x: Tensor) -> tuple[Tensor, None]:
            return memory.copy_(2 * x), None

        return launch

    with FakeTensorMode():
        traced = make_fx(lambda x: (2 * x, None))(torch.empty(3, device="cuda"))
    monkeypatch.setattr("torch.compile", compiler)
    launched = compiled(traced, launches_graphs=True)
    (first, nothing), _ = launched(torch.ones(3)), launched(torch.zeros(3))
    assert asked["triton.cudagraphs"]
    assert nothing is None
    torch.testing.assert_close(first, torch.full((3,), 2.0))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory of the process as Linux tells it")
def test_a_recording_that_nobody_holds_takes_no_memory() -> None:
    """Proves that memory is flat over recordings."""

    def deep(x: Tensor) -> Tensor:
        for _ in range(100):
            x = (x * 1.01).sin()
        return x

    def used() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    sizes = []
    for _ in range(9):
        with torch.no_grad():
            replayed = replayed_by_python(deep, INPUT)
            for _ in range(3):
                replayed(INPUT)
        del replayed
        sizes.append(used())
    assert sizes[-1] - sizes[2] < 3 * 2**20  # six recordings


def test_recording_warns_of_nothing() -> None:
    """Proves that no word of PyTorch on its tracers reaches the user, and other warnings still do."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record(lambda x: x * 2, WEIGHTS)
        with pytest.raises(UserWarning, match="the user's own"):
            record(lambda x: warnings.warn("the user's own", stacklevel=1), WEIGHTS)


def test_operations_whose_method_has_another_order_are_replayed() -> None:
    """Proves it for ``where``, a method of its second argument."""
    x = torch.tensor([-1.0, 2.0, -3.0])
    assert torch.equal(replayed_by_python(lambda x: torch.where(x > 0, x, -2 * x), INPUT)(x), torch.tensor([2.0, 2, 6]))


def test_the_gradient_of_a_convolution_is_replayed() -> None:
    """Proves it for an operation that is no method of a tensor."""
    kernel = torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(0))

    def loss(x: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(x, kernel).square().sum()

    gradient = torch.func.grad(loss)
    x = torch.randn(1, 1, 5, 5, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(replayed_by_python(gradient, x)(2 * x), gradient(2 * x))
