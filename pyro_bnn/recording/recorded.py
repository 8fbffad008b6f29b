"""A function of tensors, recorded once for each form of its inputs where that can be done."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pyro_bnn.entry.checks import Compile
from pyro_bnn.precision import asked
from pyro_bnn.recording.graph import NotRecordableError, compiled, in_python, record

#: Above this number of latent values, arithmetic takes most of the time of a step, and a graph saves little.
CAPTURE_SIZE = 2**17
#: Largest number of graphs, one for each form of batch; batches of further forms are computed without a graph.
MAX_GRAPHS = 8
#: what a graph and its function may differ by: relative to each number, in absolute terms, and relative to the largest
#: number of a tensor. Compiled, float32 sums in another order, and a gradient before a normalisation layer is a sum of
#: terms that cancel: a hundredth of the largest element was seen where float64 agrees to 1e-15.
TOLERANCES = {
    "replayed": (1e-4, 1e-5, 1e-5),
    "compiled": (1e-3, 1e-4, 2e-2),
    "compiled float64": (1e-6, 1e-9, 1e-7),
    "in half precision": (3e-2, 3e-2, 3e-2),
}
#: results of a function; ``None`` where it has none for what was asked
Results = tuple[Tensor | None, ...]


class _Graph(NamedTuple):
    """A graph, and the indices of the held tensors that it takes before the inputs."""

    replay: Callable[..., Results]
    used: list[int]


class Recorded:
    """Replays ``function(*inputs)``, tensors made of tensors and of anything else, as a graph of operations.

    All tensors among the inputs are inputs of the graph, so that it sees their present numbers, and so are the
    parameters and buffers of ``programs``; what the function reads elsewhere is a constant until :meth:`verify` finds
    that it has changed. There is one graph for each form of the inputs: their shapes, dtypes and structure, and
    whatever among them is no tensor.

    :param function: of any inputs; it gives a tuple of tensors.
    :param what: the function, for warnings.
    :param capture: ``True`` raises what forbids a recording, ``"auto"`` warns of it; ``False`` records nothing.
    :param compiles: whether ``torch.compile`` makes machine code of a recording, and CUDA graphs launch it.
    :param programs: modules whose parameters and buffers the function reads as they are now. It may write into
        buffers, and must not change numbers that a module keeps outside of tensors.
    :param verify_every: number of calls after which :meth:`verify` is made by itself; early on at 2, 4, 8, ... too.
        By default the caller makes it.
    :param silence: what the user can write to be spared the warning.
    """

    def __init__(
        self,
        function: Callable[..., Results],
        what: str,
        capture: bool | Literal["auto"],
        *,
        compiles: Compile = False,
        programs: Sequence[object] = (),
        verify_every: int | None = None,
        silence: str = "capture=False",
    ) -> None:
        self._function, self._what, self._silence = function, what, silence
        self.is_on = capture is not False
        self._insist, self._compiles = capture is True, compiles
        self._modules = list({id(m): m for p in programs if isinstance(p, nn.Module) for m in p.modules()}.values())
        self._graphs: dict[object, _Graph] = {}
        self._verify_every, self._calls = verify_every, 0

    def __len__(self) -> int:
        """How many forms of inputs have been recorded."""
        return len(self._graphs)

    def __call__(self, *inputs: object) -> Results | None:
        """The results, without a gradient; ``None`` for inputs that are not recorded."""
        if not self.is_on:
            return None
        self._calls += 1
        every = self._verify_every
        if every is not None and self._calls > 1 and (self._calls % every == 0 or self._calls & (self._calls - 1) == 0):
            self.verify(*inputs)
            if not self.is_on:
                return None
        leaves, spec = pytree.tree_flatten(inputs)
        held = self._held()
        graph = self._graph(leaves, spec, held)
        if graph is None:
            return None
        return _replay(graph, held, leaves)

    def verify(self, *inputs: object) -> None:
        """Compares the graph for these inputs with the function, which may have changed; drops graphs that differ."""
        if not self.is_on:
            return
        leaves, spec = pytree.tree_flatten(inputs)
        held = self._held()
        graph = self._graph(leaves, spec, held)
        if graph is not None:
            try:
                self._compare(graph, leaves, spec, held)
            except AssertionError as error:
                self._give_up(error, "is not what it was when it was recorded")

    def _held(self) -> list[Tensor]:
        """The parameters and buffers of all modules, each once."""
        own = (t for m in self._modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None)
        return list({id(t): t for t in own}.values())

    def _graph(self, leaves: list[object], spec: object, held: list[Tensor]) -> _Graph | None:
        """The graph for inputs of this form, recorded at the first one; ``None`` if it cannot be recorded."""
        if not all(t is None or isinstance(t, (Tensor, bool, int, float, str)) for t in leaves):
            return None
        key = (
            str(spec),
            *((t.shape, t.dtype) if isinstance(t, Tensor) else (type(t), t) for t in leaves),
            *((t.shape, t.dtype, t.requires_grad) for t in held),
            *asked().items(),
        )
        if key not in self._graphs and len(self._graphs) == MAX_GRAPHS:
            return None
        if key not in self._graphs:
            try:
                self._graphs[key] = self._record(leaves, spec, held)
            except Exception as error:
                self._give_up(error, "could not be compiled" if self._compiles else "could not be recorded as a graph")
        return self._graphs.get(key)

    def _give_up(self, error: Exception, why: str) -> None:
        if self._insist:
            raise error
        self.is_on = False
        self._graphs.clear()
        first_line = str(error).strip().partition("\n")[0]
        warnings.warn(
            f"{self._what} {why} ({type(error).__name__}: {first_line}); from now on it is computed from the model at "
            f"every step, which is slower for a small model. {self._silence} silences this",
            stacklevel=5,
        )

    def _of_tensors(self, leaves: list[Any], spec: Any) -> Callable[..., Results]:
        def run(*tensors: Tensor) -> Results:
            rest = iter(tensors)
            inputs = pytree.tree_unflatten([next(rest) if isinstance(t, Tensor) else t for t in leaves], spec)
            return self._function(*inputs)

        return run

    def _record(self, leaves: list[Any], spec: Any, held: list[Tensor]) -> _Graph:
        """The function as a graph of tensor operations, compared with the function itself before it is used."""
        run = self._of_tensors(leaves, spec)
        with _same_random_state(leaves, held), _same_buffers(held):
            run(*_copies(leaves))  # so that what the model builds once is not part of the graph
            before = self._of_python()
            traced, used = record(run, *_copies(leaves), held=held)
            if self._of_python() != before:
                raise NotRecordableError(
                    "each call draws random numbers of Python or NumPy, or changes a number that a module keeps "
                    "outside of tensors"
                )
        graph = _Graph(
            compiled(traced, self._compiles == "reduce-overhead") if self._compiles else in_python(traced), used
        )
        self._compare(graph, leaves, spec, held)
        return graph

    def _of_python(self) -> tuple[object, ...]:
        """The random states beside torch's, and the plain numbers that modules hold."""
        if not self._modules:
            return ()
        numbers = [{n: v for n, v in vars(m).items() if isinstance(v, (bool, int, float, str))} for m in self._modules]
        of_numpy: Any = np.random.get_state()  # noqa: NPY002  the state that legacy code of users moves
        return numbers, random.getstate(), of_numpy[1].tobytes(), of_numpy[2]

    def _compare(self, graph: _Graph, leaves: list[object], spec: object, held: list[Tensor]) -> None:
        def replay(*tensors: Tensor) -> Results:
            return _replay(graph, held, list(tensors))

        results = []
        for function in (replay, self._of_tensors(leaves, spec)):
            with _same_random_state(leaves, held), _same_buffers(held) as buffers:
                found = function(*_copies(leaves))
                results.append([*found, *(buffer.clone() for buffer in buffers)])
        for ours, true in zip(*results, strict=True):
            if true is None or ours is None:
                assert ours is true
                continue
            kind = "in half precision" if asked() else "compiled" if self._compiles else "replayed"
            if kind == "compiled" and true.dtype == torch.float64:
                kind = "compiled float64"
            relative, least, of_largest = TOLERANCES[kind]
            size = float(true.detach().nan_to_num().abs().max()) if true.numel() else 0.0
            atol = max(least, of_largest * size)
            torch.testing.assert_close(ours, true, rtol=relative, atol=atol, equal_nan=True)


def _replay(graph: _Graph, held: list[Tensor], leaves: list[object]) -> Results:
    with torch.no_grad():
        return graph.replay(*(held[i] for i in graph.used), *_tensors(leaves))


def _tensors(leaves: list[object]) -> list[Tensor]:
    return [t for t in leaves if isinstance(t, Tensor)]


def _copies(leaves: list[object]) -> list[Tensor]:
    """Of the tensors, for calls that are not the caller's: a network may write into its input."""
    return [tensor.detach().clone() for tensor in _tensors(leaves)]


def _same_random_state(leaves: list[object], held: list[Tensor]) -> AbstractContextManager[None]:
    device = next((t.device for t in (*_tensors(leaves), *held)), torch.device("cpu"))
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


@contextlib.contextmanager
def _same_buffers(held: list[Tensor]) -> Iterator[list[Tensor]]:
    """Restores the buffers, which are all that take no gradient."""
    buffers = [t for t in held if not isinstance(t, nn.Parameter)]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield buffers
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
