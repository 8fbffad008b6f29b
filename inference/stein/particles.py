"""The particles of any Pyro model: n values of all its latents, with the energy and gradient of each."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap

from pyro_bnn.inference.stein.autoparticles import AutoParticles


class Segment(NamedTuple):
    """Where a site lies: columns ``start`` to ``stop`` of one of the blocks ``[n, d]``."""

    name: str
    block: int
    start: int
    stop: int
    shape: torch.Size


class AnyParticles:
    """The particles of an :class:`AutoParticles`: one gradient of its potential, vectorised over them."""

    def __init__(self, guide: AutoParticles, sequential: bool, args: tuple[object, ...]) -> None:
        self.potential = guide.setup(*args)
        self.blocks: list[nn.Parameter] = [guide.theta]
        self.shared: list[nn.Parameter] = []
        self.segments: list[Segment] = []
        start = 0
        for name, shape in self.potential.shapes.items():
            self.segments.append(Segment(name, 0, start, start + shape.numel(), shape))
            start += shape.numel()
        self._in_turn = sequential

    def backward(self, args: tuple[object, ...], attraction: float = 1.0) -> Tensor:
        """Sets the gradient of the block to those of ``attraction * U``; U of each particle, ``[n]``."""
        (theta,) = self.blocks
        random = RandomState(theta)
        gradient = energies = None
        failure = None
        if not self._in_turn:
            try:
                both = vmap(grad_and_value(lambda row: self._energy(row, args)), randomness="same")
                gradient, energies = both(theta.detach())
            except Exception as error:  # the loop says whether the model or its vectorisation is at fault
                failure = error
        if gradient is None or energies is None:
            rows = []
            for row in theta.detach():
                random.restore()  # a plate that draws its subsample draws the same one for all
                leaf = row.clone().requires_grad_()
                energy = self._energy(leaf, args)
                rows.append((torch.autograd.grad(energy, leaf)[0], energy.detach()))
            gradient, energies = (torch.stack(part) for part in zip(*rows, strict=True))
        if failure is not None:
            self._in_turn = True
            first_line = str(failure).strip().partition("\n")[0]
            warnings.warn(
                f"the model could not be vectorised over particles ({type(failure).__name__}: {first_line}); from now "
                "on they run one by one. sequential=True silences this",
                stacklevel=4,
            )
        theta.grad = gradient.detach() * attraction
        return energies.detach()

    def _energy(self, row: Tensor, args: tuple[object, ...]) -> Tensor:
        return self.potential(self.potential.split(row), *args)

    def offending_site(self, particle: int, args: tuple[object, ...]) -> str:
        return self.potential.offending_site(self.blocks[0].detach()[particle], *args)


class RandomState:
    """The random state at its making, on the processor and on the device of ``like``."""

    def __init__(self, like: Tensor) -> None:
        self._state = torch.get_rng_state()
        self._device = like.device if like.is_cuda else None
        self._cuda = torch.cuda.get_rng_state(self._device) if self._device is not None else None

    def restore(self) -> None:
        torch.set_rng_state(self._state)
        if self._cuda is not None and self._device is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)
