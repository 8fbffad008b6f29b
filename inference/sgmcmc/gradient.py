"""Gradients of a potential into one contiguous buffer, for one chain or many at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree

from pyro_bnn.inference.potential import Potential
from pyro_bnn.inference.sgmcmc.graphs import record
from pyro_bnn.perturb.vectoriser import Vectoriser
from pyro_bnn.program.model import BayesianNetwork

#: Above this number of latent values, arithmetic takes most of the time of a step, and a graph saves little.
CAPTURE_SIZE = 2**17
#: Largest number of graphs, one for each form of batch; batches of further forms are computed without a graph.
MAX_GRAPHS = 8
#: ``(theta, *tensors of the batch) -> gradient, U``
Graph = Callable[..., tuple[Tensor, Tensor]]


class Gradient:
    """Computes ``grad U`` on a minibatch at ``theta``, a buffer that the caller updates in place.

    With one chain, every site is a view of ``theta``, and its gradient accumulates in a view of one buffer, so that no
    tensor is copied. Several chains, ``theta [chains, dim]``, are vectorised.

    :param potential: U.
    :param kwargs: keyword arguments of the model that never change.
    :param chains: number of chains; ``None`` for one chain without a chain axis.
    :param own_batches: whether every chain has a minibatch of its own, on axis 0 of every tensor.
    :param capture: see :class:`~pyro_bnn.inference.SGHMC`.
    :raises ValueError: for several chains of a network whose normalisation layers gather statistics.
    """

    def __init__(
        self,
        potential: Potential,
        kwargs: dict[str, object],
        chains: int | None,
        own_batches: bool,
        capture: bool | Literal["auto"],
    ) -> None:
        self.potential, self.chains, self.kwargs = potential, chains, kwargs
        self._own_batches = own_batches
        shape = (potential.dim,) if chains is None else (chains, potential.dim)
        self.theta = torch.zeros(shape, dtype=potential.like.dtype, device=potential.like.device)
        self.energy = self.theta.new_zeros(())
        moving = _moving_statistics(potential.model)
        if chains is not None and moving:
            raise ValueError(
                f"the layer {moving!r} gathers statistics while it trains, which vectorised chains cannot do: run one "
                "chain at a time (num_chains=1, with different seeds), or use a normalisation without statistics"
            )
        self._capture = potential.dim <= CAPTURE_SIZE and not moving if capture == "auto" else capture
        self._insist = capture is True
        self._vectoriser = Vectoriser("the model", "chains")
        self._graphs: dict[object, Graph] = {}
        self._buffer = torch.zeros_like(self.theta)
        self._leaves: dict[str, Tensor] = {}
        if chains is None:
            for (name, value), own in zip(
                potential.split(self.theta.detach()).items(), potential.split(self._buffer).values(), strict=True
            ):
                self._leaves[name] = value.detach().requires_grad_()
                self._leaves[name].grad = own

    @property
    def num_graphs(self) -> int:
        """Number of recorded graphs, one for each form of batch."""
        return len(self._graphs)

    def __call__(self, *batch: object) -> Tensor:
        """The gradient, in a buffer that the next call overwrites. Sets ``energy`` to U, one value for each chain."""
        if self._capture:
            leaves, spec = pytree.tree_flatten(batch)
            graph = self._graph(leaves, spec)
            if graph is not None:
                with torch.no_grad():
                    gradient, self.energy = graph(self.theta, *(t for t in leaves if isinstance(t, Tensor)))
                return self._buffer.copy_(gradient)
        return self._eager(*batch)

    def verify(self, *batch: object) -> None:
        """Compares the graph for this batch with the model, which may have changed; drops all graphs if they differ."""
        if not self._capture:
            return
        leaves, spec = pytree.tree_flatten(batch)
        graph = self._graph(leaves, spec)
        if graph is not None:
            try:
                self._compare(graph, leaves, spec)
            except AssertionError as error:
                self._give_up(error, "is not what it was when it was recorded")

    def _eager(self, *batch: object) -> Tensor:
        if self.chains is not None:
            gradient, self.energy = self._vectoriser(
                lambda: self._vectorised(self.theta, *batch), lambda: self._in_turn(*batch), self.theta
            )
            return self._buffer.copy_(gradient.detach())
        self._buffer.zero_()
        energy = self.potential(self._leaves, *batch, **self.kwargs)
        if energy.requires_grad:  # it does not if every density that depends on theta was left out
            energy.backward(inputs=list(self._leaves.values()))
        self.energy = energy.detach()
        return self._buffer

    def _in_turn(self, *batch: object) -> tuple[Tensor, Tensor]:
        """The gradient, one chain after the other."""
        found = []
        for i, row in enumerate(self.theta.detach()):
            leaf = row.clone().requires_grad_()
            own = pytree.tree_map(lambda t, i=i: t[i] if self._own_batches and isinstance(t, Tensor) else t, batch)
            energy = self.potential(self.potential.split(leaf), *own, **self.kwargs)
            found.append((torch.autograd.grad(energy, leaf)[0], energy.detach()))
        gradients, energies = (torch.stack(part) for part in zip(*found, strict=True))
        return gradients, energies

    def _vectorised(self, theta: Tensor, *batch: object) -> tuple[Tensor, Tensor]:
        def energy(row: Tensor, *own: object) -> Tensor:
            return self.potential(self.potential.split(row), *own, **self.kwargs)

        single = grad_and_value(energy)
        if self.chains is None:
            return single(theta, *batch)
        axis = 0 if self._own_batches else None
        axes = tuple(pytree.tree_map(lambda t: axis if isinstance(t, Tensor) else None, part) for part in batch)
        return vmap(single, in_dims=(0, *axes), randomness="different")(theta, *batch)

    def _graph(self, leaves: list[object], spec: object) -> Graph | None:
        """The graph for batches of this form, recorded at the first one; ``None`` if it cannot be recorded."""
        if not all(t is None or isinstance(t, (Tensor, bool, int, float, str)) for t in leaves):
            return None
        key = (str(spec), *((t.shape, t.dtype) if isinstance(t, Tensor) else (type(t), t) for t in leaves))
        if key not in self._graphs and len(self._graphs) == MAX_GRAPHS:
            return None
        if key not in self._graphs:
            try:
                self._graphs[key] = self._record(leaves, spec)
            except Exception as error:
                self._give_up(error, "could not be recorded as a graph")
        return self._graphs.get(key)

    def _give_up(self, error: Exception, why: str) -> None:
        if self._insist:
            raise error
        self._capture = False
        self._graphs.clear()
        first_line = str(error).strip().partition("\n")[0]
        warnings.warn(
            f"the gradient {why} ({type(error).__name__}: {first_line}); from now on it is computed from the model at "
            "every step, which is slower for a small model. capture=False silences this",
            stacklevel=4,
        )

    def _run(self, leaves: list[Any], spec: Any) -> Graph:
        def run(theta: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
            rest = iter(tensors)
            batch = pytree.tree_unflatten([next(rest) if isinstance(t, Tensor) else t for t in leaves], spec)
            return self._vectorised(theta, *batch)

        return run

    def _record(self, leaves: list[Any], spec: Any) -> Graph:
        """The gradient as a graph of tensor operations, compared with the gradient itself before it is used."""
        tensors = [t for t in leaves if isinstance(t, Tensor)]
        run = self._run(leaves, spec)
        with self._same_random_state():
            run(self.theta, *tensors)  # so that what the model builds once is not part of the graph
            graph = record(run, self.theta, *tensors)
        self._compare(graph, leaves, spec)
        return graph

    def _compare(self, graph: Graph, leaves: list[object], spec: object) -> None:
        tensors = [t for t in leaves if isinstance(t, Tensor)]
        results = []
        for function in (graph, self._run(leaves, spec)):
            with self._same_random_state(), torch.no_grad():
                results.append(function(self.theta, *tensors))
        # an element near zero may be a sum of large terms that cancel, and the graph sums in another order
        for ours, true in zip(*results, strict=True):
            size = float(true.nan_to_num().abs().max())
            torch.testing.assert_close(ours, true, rtol=1e-4, atol=1e-5 * max(1.0, size), equal_nan=True)

    def _same_random_state(self) -> AbstractContextManager[None]:
        return torch.random.fork_rng([self.theta.device] if self.theta.is_cuda else [])


def _moving_statistics(model: object) -> str | None:
    """The name of a layer whose running statistics move in training; ``None`` if there is none."""
    if isinstance(model, BayesianNetwork):
        return next(iter(model.moving_layers()), None)
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    return next((n for n, m in modules if isinstance(m, _NormBase) and m.track_running_stats), None)
