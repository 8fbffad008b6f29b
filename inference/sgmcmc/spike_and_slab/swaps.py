"""Moves of whole weight groups between spike and slab, accepted by Metropolis.

A gradient moves every weight of a group by a little, and between spike and slab lie weights that neither component
likes: the barrier grows with the number of weights in a group, until no chain crosses it. A swap crosses at once. With
``L = log(slab scale / spike scale)`` it rescales a group g of \\|g\\| weights about their centre::

    w_g <- loc + e^s (w_g - loc),     s = L or -L, each with probability 1/4, else s ~ Uniform(-L, L)

and accepts with probability min(1, r),

::

    log r = (U_b(w) - U_b(w')) / T + (log p(w'_g) - log p(w_g)) / T + |g| s

with p the collapsed prior of the group, and U_b all that is left of the energy, the likelihood of **all rows** to the
power b of annealing included. The proposals s and -s are equally likely, and ``|g| s`` is the log Jacobian of the
scaling: by the rule of Metropolis, Hastings and Green (Biometrika 1995) the move leaves ``exp(-U_b / T)`` invariant.
The temperature divides energies but not the Jacobian, which is the volume of the map and no energy. Momenta stay as
they are: they are independent of the weights.

A sweep visits a few groups, chosen afresh at random and whatever the state, which keeps detailed balance: as many that
they cost no more than the gradients between two sweeps (:func:`groups_per_sweep`). With many inputs and rows that is a
few groups in a thousand, and a chain visits each group only a few times: there swaps stop to pay, and prior scales or
rows have to tell the groups apart instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Literal

import torch
from torch import Tensor
from torch.func import vmap

from pyro_bnn.entry.checks import Compile
from pyro_bnn.inference.potential import Potential
from pyro_bnn.inference.sgmcmc.spike_and_slab.indicators import SpikeAndSlabState
from pyro_bnn.perturb.vectoriser import Vectoriser
from pyro_bnn.priors import SpikeAndSlabDistribution
from pyro_bnn.recording.recorded import CAPTURE_SIZE, Recorded

#: rows in one call of the model
ROWS = 8192
#: a gradient costs as much as this many energies
GRADIENT = 3
#: a call of the model costs as much as this many multiplications, however small it is
CALL = 2_000_000
#: visits of every group during warm-up from which on swaps are made by default
VISITS = 10


class Energy:
    """U of all rows, ``[*chains]``: the mean over parts of the data, each weighed by its share of the rows.

    :param parts: arguments of the model for each part of the data. The model scales its likelihood by N / B.
    :param shares: the share of the rows in each part.
    :param power: b, which may be written into; ``None`` for 1.
    :param capture, compile: see :class:`~pyro_bnn.inference.SGHMC`.
    """

    def __init__(
        self,
        potential: Potential,
        parts: Sequence[tuple[object, ...]],
        shares: Sequence[float],
        kwargs: dict[str, object],
        power: Tensor | None,
        capture: bool | Literal["auto"],
        compile: Compile = False,
    ) -> None:
        self.potential, self.parts, self.shares, self.kwargs, self.power = potential, parts, shares, kwargs, power
        if capture == "auto" and potential.dim > CAPTURE_SIZE and not compile:
            capture = False
        silence = "compile=False" if compile else "capture=False"
        what = "the energy of all rows"
        self._recorded = Recorded(self._of_chains, what, capture, compiles=compile, silence=silence)
        self._vectoriser = Vectoriser("the model", "chains")

    def __call__(self, theta: Tensor) -> Tensor:
        """U at ``[*chains, dim]``."""
        found = self._recorded(theta, self.power)
        if found is None:
            with torch.no_grad():
                found = self._vectoriser(
                    lambda: self._of_chains(theta, self.power), lambda: self._in_turn(theta), theta
                )
        (energies,) = found
        assert energies is not None
        return energies

    def verify(self, theta: Tensor) -> None:
        """Compares the recording with the model, which may have changed since."""
        self._recorded.verify(theta, self.power)

    def of_parts(
        self, row: Tensor, parts: Sequence[tuple[object, ...]], shares: Sequence[float], power: Tensor | None = None
    ) -> Tensor:
        """U of one chain, ``[dim]``, on other parts of the data."""
        values, total = self.potential.split(row), row.new_zeros(())
        for part, share in zip(parts, shares, strict=True):
            total = total + share * self.potential.energy(values, part, self.kwargs, power)
        return total

    def _of_chains(self, theta: Tensor, power: Tensor | None) -> tuple[Tensor]:
        def one(row: Tensor) -> Tensor:
            return self.of_parts(row, self.parts, self.shares, power)

        return (one(theta) if theta.dim() == 1 else vmap(one, randomness="different")(theta),)

    def _in_turn(self, theta: Tensor) -> tuple[Tensor]:
        return (torch.stack([self._of_chains(row, self.power)[0] for row in theta]),)


@dataclass
class Group:
    """One group: the number of its site, and where its weights are in an event."""

    site: int
    where: tuple[slice[int | None], ...]


class Swaps:
    """Sweeps over groups of the sites that have several weights in a group.

    :param theta: the state of the kernel, ``[*chains, dim]``, which sweeps write into.
    :param sites: whose weights are views of theta.
    :param energy: U without the prior of these sites.
    :param count: number of groups in a sweep.
    """

    def __init__(
        self,
        theta: Tensor,
        sites: Sequence[SpikeAndSlabState],
        energy: Energy,
        count: int,
        temperature: float,
    ) -> None:
        self.theta, self.sites, self.energy, self.temperature = theta, sites, energy, temperature
        self.count = count
        self._of_site: dict[int, tuple[SpikeAndSlabDistribution, SpikeAndSlabDistribution]] = {}
        self._accepted = theta.new_zeros(())
        self._visits = 0
        self.renew()

    def renew(self) -> None:
        """Leaves out the groups that every chain has removed."""
        self._groups = [
            Group(i, site.density.one_group(index))
            for i, site in enumerate(self.sites)
            if site.density.group_size > 1
            for index in _in_some_chain(site).nonzero().flatten().tolist()
        ]

    @property
    def acceptance(self) -> float:
        """Share of the swaps that were accepted, over all chains."""
        return float(self._accepted) / max(1, self._visits)

    def sweep(self) -> None:
        """Visits ``count`` groups in random order, or all if there are fewer."""
        order = torch.randperm(len(self._groups))[: self.count].tolist()
        if not order:
            return
        energy = self.energy(self.theta)
        for i in order:
            energy = self._visit(self._groups[i], energy)

    def _visit(self, group: Group, energy: Tensor) -> Tensor:
        """Swaps one group, in every chain on its own, and returns the energy then."""
        site = self.sites[group.site]
        density = self._one(group.site)
        loc = site.density.loc
        centre = loc[group.where] if isinstance(loc, Tensor) and loc.dim() else loc
        index: tuple[EllipsisType | slice[int | None], ...] = (..., *group.where)
        weights = site.weights[index]  # a view
        before = weights - centre
        lead = energy.shape
        width = math.log(site.density.slab_scale / site.density.spike_scale)
        kind, size = torch.rand((2, *lead), dtype=energy.dtype, device=energy.device)
        size = 2 * size - 1
        stretch = width * torch.where(kind < 0.5, size, size.sign())
        after = before * self._per_weight(stretch.exp(), before)
        prior = density.log_prob(torch.stack([after, before]))
        old = weights.clone()
        weights.copy_(after + centre)
        proposed = self.energy(self.theta)
        change = (energy - proposed + prior[0] - prior[1]) / self.temperature + density.event_shape.numel() * stretch
        accepted = torch.rand_like(energy).log() < change
        weights.copy_(torch.where(self._per_weight(accepted, before), weights, old))
        self._accepted += accepted.to(energy.dtype).mean()
        self._visits += 1
        return torch.where(accepted, proposed, energy)

    def _per_weight(self, value: Tensor, weights: Tensor) -> Tensor:
        return value.reshape(value.shape + (1,) * (weights.dim() - value.dim()))

    def _one(self, site: int) -> SpikeAndSlabDistribution:
        """The density of one group at the present rate and scale."""
        present = self.sites[site].density
        known = self._of_site.get(site)
        if known is None or known[0] is not present:
            known = self._of_site[site] = present, present.of_one_group()
        return known[1]


def _in_some_chain(site: SpikeAndSlabState) -> Tensor:
    """True for groups that are kept in some chain, flat."""
    lead = site.kept.dim() - len(site.density.groups)
    kept = site.kept.flatten(lead)
    return kept.any(0) if lead else kept


def groups_per_sweep(groups: int, dim: int, rows: int, batch: int, every: int) -> int:
    """How many groups a sweep may visit so that it costs about as much as ``every`` gradients.

    A pass over n rows of a network of ``dim`` weights costs ``n dim + CALL`` multiplications, a gradient ``GRADIENT``
    times that of its batch, a visit one pass over all rows; the sweep itself begins with one.

    :return: at least 1, at most ``groups``.
    """
    gradients = every * GRADIENT * (batch * dim + CALL)
    return max(1, min(groups, gradients // (rows * dim + CALL) - 1))
