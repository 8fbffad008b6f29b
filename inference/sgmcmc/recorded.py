"""A function of the state and of a minibatch, recorded once for each form of batch where that can be done."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_bnn.inference.sgmcmc.graphs import record

#: Above this number of latent values, arithmetic takes most of the time of a step, and a graph saves little.
CAPTURE_SIZE = 2**17
#: Largest number of graphs, one for each form of batch; batches of further forms are computed without a graph.
MAX_GRAPHS = 8
Tensors = tuple[Tensor, ...]
#: ``(theta, *tensors among the inputs) -> results``
Graph = Callable[..., Tensors]


class Recorded:
    """Replays ``function(theta, *inputs)``, tensors made of a state and of anything else, as a graph of operations.

    All tensors among the inputs are inputs of the graph, so that it sees their present numbers; what the function reads
    elsewhere is a constant until :meth:`verify` finds that it has changed.

    :param function: of theta and any inputs; it gives a tuple of tensors.
    :param what: the function, for warnings.
    :param capture: ``True`` raises what forbids a recording, ``"auto"`` warns of it; ``False`` records nothing.
    """

    def __init__(self, function: Callable[..., Tensors], what: str, capture: bool | Literal["auto"]) -> None:
        self._function, self._what = function, what
        self.is_on = capture is not False
        self._insist = capture is True
        self._graphs: dict[object, Graph] = {}

    def __len__(self) -> int:
        """How many forms of inputs have been recorded."""
        return len(self._graphs)

    def __call__(self, theta: Tensor, *inputs: object) -> Tensors | None:
        """The results, without a gradient; ``None`` for inputs that are not recorded."""
        if not self.is_on:
            return None
        leaves, spec = pytree.tree_flatten(inputs)
        graph = self._graph(theta, leaves, spec)
        if graph is None:
            return None
        with torch.no_grad():
            return graph(theta, *_tensors(leaves))

    def verify(self, theta: Tensor, *inputs: object) -> None:
        """Compares the graph for these inputs with the function, which may have changed; drops graphs that differ."""
        if not self.is_on:
            return
        leaves, spec = pytree.tree_flatten(inputs)
        graph = self._graph(theta, leaves, spec)
        if graph is not None:
            try:
                self._compare(graph, theta, leaves, spec)
            except AssertionError as error:
                self._give_up(error, "is not what it was when it was recorded")

    def _graph(self, theta: Tensor, leaves: list[object], spec: object) -> Graph | None:
        """The graph for inputs of this form, recorded at the first one; ``None`` if it cannot be recorded."""
        if not all(t is None or isinstance(t, (Tensor, bool, int, float, str)) for t in leaves):
            return None
        key = (str(spec), *((t.shape, t.dtype) if isinstance(t, Tensor) else (type(t), t) for t in leaves))
        if key not in self._graphs and len(self._graphs) == MAX_GRAPHS:
            return None
        if key not in self._graphs:
            try:
                self._graphs[key] = self._record(theta, leaves, spec)
            except Exception as error:
                self._give_up(error, "could not be recorded as a graph")
        return self._graphs.get(key)

    def _give_up(self, error: Exception, why: str) -> None:
        if self._insist:
            raise error
        self.is_on = False
        self._graphs.clear()
        first_line = str(error).strip().partition("\n")[0]
        warnings.warn(
            f"{self._what} {why} ({type(error).__name__}: {first_line}); from now on it is computed from the model at "
            "every step, which is slower for a small model. capture=False silences this",
            stacklevel=5,
        )

    def _of_tensors(self, leaves: list[Any], spec: Any) -> Graph:
        def run(theta: Tensor, *tensors: Tensor) -> Tensors:
            rest = iter(tensors)
            inputs = pytree.tree_unflatten([next(rest) if isinstance(t, Tensor) else t for t in leaves], spec)
            return self._function(theta, *inputs)

        return run

    def _record(self, theta: Tensor, leaves: list[Any], spec: Any) -> Graph:
        """The function as a graph of tensor operations, compared with the function itself before it is used."""
        run = self._of_tensors(leaves, spec)
        with _same_random_state(theta):
            run(theta, *_tensors(leaves))  # so that what the model builds once is not part of the graph
            graph = record(run, theta, *_tensors(leaves))
        self._compare(graph, theta, leaves, spec)
        return graph

    def _compare(self, graph: Graph, theta: Tensor, leaves: list[object], spec: object) -> None:
        results = []
        for function in (graph, self._of_tensors(leaves, spec)):
            with _same_random_state(theta), torch.no_grad():
                results.append(function(theta, *_tensors(leaves)))
        # an element near zero may be a sum of large terms that cancel, and the graph sums in another order
        for ours, true in zip(*results, strict=True):
            size = float(true.nan_to_num().abs().max())
            torch.testing.assert_close(ours, true, rtol=1e-4, atol=1e-5 * max(1.0, size), equal_nan=True)


def _tensors(leaves: list[object]) -> list[Tensor]:
    return [t for t in leaves if isinstance(t, Tensor)]


def _same_random_state(like: Tensor) -> AbstractContextManager[None]:
    return torch.random.fork_rng([like.device] if like.is_cuda else [])
