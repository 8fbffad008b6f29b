"""Gradients of a potential into one contiguous buffer, for one chain or many at once."""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree

from pyro_bnn.entry.checks import Compile
from pyro_bnn.inference.potential import Potential
from pyro_bnn.perturb.vectoriser import Vectoriser
from pyro_bnn.program.model import BayesianNetwork
from pyro_bnn.recording.recorded import CAPTURE_SIZE, Recorded


class Gradient:
    """Computes ``grad U`` on a minibatch at ``theta``, a buffer that the caller updates in place.

    With one chain, every site is a view of ``theta``, and its gradient accumulates in a view of one buffer, so that no
    tensor is copied. Several chains, ``theta [chains, dim]``, are vectorised.

    ``power`` is the power of the likelihood in U, a number in a tensor that the caller may write into; ``None`` for 1.

    :param potential: U.
    :param kwargs: keyword arguments of the model that never change.
    :param chains: number of chains; ``None`` for one chain without a chain axis.
    :param own_batches: whether every chain has a minibatch of its own, on axis 0 of every tensor.
    :param capture, compile: see :class:`~pyro_bnn.inference.SGHMC`.
    :raises ValueError: for several chains of a network whose normalisation layers gather statistics.
    """

    def __init__(
        self,
        potential: Potential,
        kwargs: dict[str, object],
        chains: int | None,
        own_batches: bool,
        capture: bool | Literal["auto"],
        compile: Compile = False,
    ) -> None:
        self.potential, self.chains, self.kwargs = potential, chains, kwargs
        self._own_batches = own_batches
        shape = (potential.dim,) if chains is None else (chains, potential.dim)
        self.theta = torch.zeros(shape, dtype=potential.like.dtype, device=potential.like.device)
        self.energy = self.theta.new_zeros(())
        self.power: Tensor | None = None
        moving = moving_statistics(potential.model)
        if chains is not None and moving:
            raise ValueError(
                f"the layer {moving!r} gathers statistics while it trains, which vectorised chains cannot do: run one "
                "chain at a time (num_chains=1, with different seeds), or use a normalisation without statistics"
            )
        if moving and compile:
            warnings.warn(
                f"the gradient is not compiled, because the layer {moving!r} gathers statistics in each step. "
                "compile=False silences this",
                stacklevel=4,
            )
        if capture == "auto" and (moving or potential.dim > CAPTURE_SIZE and not compile):
            capture = False
        silence = "compile=False" if compile else "capture=False"
        self._recorded = Recorded(self._vectorised, "the gradient", capture, compiles=compile, silence=silence)
        self._vectoriser = Vectoriser("the model", "chains")
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
        return len(self._recorded)

    def __call__(self, *batch: object) -> Tensor:
        """The gradient, in a buffer that the next call overwrites. Sets ``energy`` to U, one value for each chain."""
        found = self._recorded(self.theta, self.power, *batch)
        if found is None:
            return self._eager(*batch)
        gradient, energy = found
        assert gradient is not None and energy is not None
        self.energy = energy
        return self._buffer.copy_(gradient)

    def verify(self, *batch: object) -> None:
        """Compares the graph for this batch with the model, which may have changed; drops all graphs if they differ."""
        self._recorded.verify(self.theta, self.power, *batch)

    def _eager(self, *batch: object) -> Tensor:
        if self.chains is not None:
            gradient, self.energy = self._vectoriser(
                lambda: self._vectorised(self.theta, self.power, *batch), lambda: self._in_turn(*batch), self.theta
            )
            return self._buffer.copy_(gradient.detach())
        self._buffer.zero_()
        energy = self.potential.energy(self._leaves, batch, self.kwargs, self.power)
        if energy.requires_grad:  # it does not if every density that depends on theta was left out
            energy.backward(inputs=list(self._leaves.values()))
        self.energy = energy.detach()
        return self._buffer

    def _in_turn(self, *batch: object) -> tuple[Tensor, Tensor]:
        """The gradient, one chain after the other."""
        found = []
        for i, row in enumerate(self.theta.detach()):
            leaf = row.clone().requires_grad_()
            # shared rows are copied, as a network may write into its input
            own = pytree.tree_map(
                lambda t, i=i: (t[i] if self._own_batches else t.clone()) if isinstance(t, Tensor) else t, batch
            )
            energy = self.potential.energy(self.potential.split(leaf), own, self.kwargs, self.power)
            found.append((torch.autograd.grad(energy, leaf)[0], energy.detach()))
        gradients, energies = (torch.stack(part) for part in zip(*found, strict=True))
        return gradients, energies

    def _vectorised(self, theta: Tensor, power: Tensor | None, *batch: object) -> tuple[Tensor, Tensor]:
        def energy(row: Tensor, *own: object) -> Tensor:
            return self.potential.energy(self.potential.split(row), own, self.kwargs, power)

        single = grad_and_value(energy)
        if self.chains is None:
            return single(theta, *batch)
        axis = 0 if self._own_batches else None
        axes = tuple(pytree.tree_map(lambda t: axis if isinstance(t, Tensor) else None, part) for part in batch)
        return vmap(single, in_dims=(0, *axes), randomness="different")(theta, *batch)


def moving_statistics(model: object) -> str | None:
    """The name of a layer whose running statistics move in training; ``None`` if there is none."""
    if isinstance(model, BayesianNetwork):
        return next(iter(model.moving_layers()), None)
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    return next((n for n, m in modules if isinstance(m, _NormBase) and m.track_running_stats), None)
