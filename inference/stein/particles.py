"""The particles of any Pyro model: n values of all its latents, with the energy and gradient of each."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap

from pyro_bnn.distributed import ALONE, Processes
from pyro_bnn.inference.stein.autoparticles import AutoParticles
from pyro_bnn.perturb.vectoriser import Vectoriser
from pyro_bnn.randomness import RandomState


class Segment(NamedTuple):
    """The place of a site: columns ``start`` to ``stop`` of one of the blocks ``[n, d]``."""

    name: str
    block: int
    start: int
    stop: int
    shape: torch.Size


class AnyParticles:
    """The particles of an :class:`AutoParticles`, with one gradient of its potential that is vectorised over them.

    :param sequential: whether to run the particles one after the other instead.
    :param args: the arguments of the model.
    :param together: processes that divide the particles.
    """

    def __init__(
        self, guide: AutoParticles, sequential: bool, args: tuple[object, ...], together: Processes = ALONE
    ) -> None:
        self.together = together
        self.potential = guide.setup(*args)
        self.blocks: list[nn.Parameter] = [guide.theta]
        self.shared: list[nn.Parameter] = []
        self.segments: list[Segment] = []
        start = 0
        for name, shape in self.potential.shapes.items():
            self.segments.append(Segment(name, 0, start, start + shape.numel(), shape))
            start += shape.numel()
        self._in_turn = sequential
        self._vectoriser = Vectoriser("the model", "particles", ". sequential=True silences this")

    def backward(
        self, args: tuple[object, ...], attraction: Tensor | float = 1.0, weight: Tensor | float = 1.0
    ) -> Tensor:
        """Sets the gradient of the block to that of ``weight attraction U``; returns U of each in nats, ``[n]``."""
        (block,) = self.blocks
        mine = slice(self.together.rank, None, self.together.size)
        theta = block.detach()[mine]
        random = RandomState(theta)

        def at_once() -> tuple[Tensor, Tensor]:
            both = vmap(grad_and_value(lambda row: self._energy(row, args)), randomness="same")
            gradients, energies = both(theta)
            return gradients, energies

        def in_turn() -> tuple[Tensor, Tensor]:
            rows = []
            for row in theta:
                random.restore()  # so that a plate draws the same subsample for all particles
                leaf = row.clone().requires_grad_()
                energy = self._energy(leaf, args)
                rows.append((torch.autograd.grad(energy, leaf)[0], energy.detach()))
            gradients, energies = (torch.stack(part) for part in zip(*rows, strict=True))
            return gradients, energies

        gradients, found = torch.zeros_like(block), theta.new_zeros(len(block))
        if len(theta):
            gradient, energies = in_turn() if self._in_turn else self._vectoriser(at_once, in_turn, theta)
            gradients[mine], found[mine] = gradient.detach() * (attraction * weight), energies.detach()
        self.together.sum_(gradients, found)
        block.grad = gradients
        return found

    def _energy(self, row: Tensor, args: tuple[object, ...]) -> Tensor:
        return self.potential(self.potential.split(row), *args)

    def offending_site(self, particle: int, args: tuple[object, ...]) -> str:
        return self.potential.offending_site(self.blocks[0].detach()[particle], *args)
