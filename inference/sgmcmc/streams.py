"""The arguments with which a kernel calls its model at each step: minibatches of its data, or always the same ones."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from pyro_bnn.inference.batches import Minibatches, minibatches
from pyro_bnn.inference.training.requirements import require_rows_for_statistics
from pyro_bnn.inputs import Data
from pyro_bnn.program.sites import Program
from pyro_bnn.randomness import device_of, random_states, set_random_states


class Streams:
    """One stream of minibatches for each chain: with a shared stream, the chains would not be independent.

    :param model: the batches are checked against it, and moved to its device.
    :param data: a loader of (x, y), a dataset or the pair (x, y); ``None`` to call the model with ``arguments``.
    :param batch_size: for a dataset or a pair; a loader has its own.
    :param arguments: what the model is called with when there are no data.
    :param chains: number of vectorised chains; ``None`` for one chain without a chain axis.
    :raises ValueError: for several chains and a loader with persistent workers.
    """

    def __init__(
        self,
        model: Program,
        data: Data,
        *,
        batch_size: int = 128,
        arguments: tuple[object, ...] = (),
        chains: int | None = None,
    ) -> None:
        self.chains, self._arguments = chains, arguments
        self._batches: Minibatches | None = None if data is None else minibatches(model, data, batch_size)
        if self._batches is not None:
            require_rows_for_statistics(model, self._batches)
        if chains and isinstance(data, DataLoader) and data.persistent_workers:
            raise ValueError(
                "every vectorised chain iterates over the loader separately, which persistent workers do not support: "
                "build the loader with persistent_workers=False, or run one chain at a time"
            )
        self._passes: list[Iterator[tuple[object, ...]]] = [iter(()) for _ in range(chains or 1)]
        #: of every chain: the random states before its pass over the data, and the batches of it that were taken
        self._places: list[tuple[list[Tensor], int]] = [([], 0) for _ in range(chains or 1)]
        self._device = device_of(model)
        #: whether every batch is all rows, whose order is nothing to a sum over them
        self._is_whole = self._batches is not None and self._batches.in_memory and self._batches.steps == 1

    @property
    def first(self) -> tuple[object, ...]:
        """One minibatch, or the arguments."""
        return self._arguments if self._batches is None else self._batches.first

    @property
    def steps(self) -> int:
        """Batches in one pass over the data; 1 without data."""
        return 1 if self._batches is None else self._batches.steps

    @property
    def num_data(self) -> int | None:
        """Number N of samples; 1 without data, ``None`` when the data have no length."""
        return 1 if self._batches is None else self._batches.size

    @property
    def have_data(self) -> bool:
        """Whether :meth:`next` gives rows of data, and not the arguments of the model."""
        return self._batches is not None

    @property
    def differ(self) -> bool:
        """Whether chains have minibatches of their own, and not the arguments or all rows, which they share."""
        return self._batches is not None and not self._is_whole

    def next(self) -> tuple[object, ...]:
        """The next minibatch; with several chains that :meth:`differ` one for each, stacked on axis 0.

        :raises ValueError: with several chains, for a batch of another length from a loader that does not shuffle.
        """
        if self.chains is None or self._batches is None or self._is_whole:
            return self.single()
        each = [self._full_rows(self._batches, chain) for chain in range(self.chains)]
        together = (
            pytree.tree_map(lambda *leaves: torch.stack(leaves) if isinstance(leaves[0], Tensor) else leaves[0], *parts)
            for parts in zip(*each, strict=True)
        )
        return self._batches.take(*together)

    def single(self) -> tuple[object, ...]:
        """The next minibatch of the first chain alone."""
        if self._batches is None:
            return self._arguments
        if self._is_whole:  # taken anew, as a network may write into its input
            (rows,) = self.every_row(self._batches.size or 1)
            return rows
        return self._batches.take(*self._rows(self._batches, 0))

    @property
    def is_in_memory(self) -> bool:
        """Whether all rows can be had at once: data in memory, or the arguments where there are no data."""
        return self._batches is None or self._batches.in_memory

    def every_row(self, at_once: int) -> list[tuple[object, ...]]:
        """All rows in parts of at most ``at_once``; without data the arguments, once."""
        batches = self._batches
        if batches is None:
            return [self._arguments]
        assert batches.in_memory and batches.size is not None
        device = next(leaf.device for leaf in pytree.tree_leaves(batches.first) if isinstance(leaf, Tensor))
        return [batches.take(rows) for rows in torch.arange(batches.size, device=device).split(at_once)]

    def state(self) -> list[tuple[list[Tensor], int]]:
        """Where every chain is in its pass over the data."""
        return list(self._places)

    def set_state(self, state: list[tuple[list[Tensor], int]]) -> None:
        """Goes to where another run was. Random states are those of that run's passes afterwards."""
        if self._batches is None:
            return
        for chain, (before, taken) in enumerate(state):
            if before:
                set_random_states(self._device, before)
                self._passes[chain] = self._batches.rows()
                for _ in range(taken):
                    next(self._passes[chain])
            self._places[chain] = before, taken

    def close(self) -> None:
        """Ends all passes over the data, and with them the workers of a loader."""
        self._passes = [iter(()) for _ in self._passes]

    def _rows(self, batches: Minibatches, chain: int) -> tuple[object, ...]:
        while True:
            for rows in self._passes[chain]:
                before, taken = self._places[chain]
                self._places[chain] = before, taken + 1
                return rows
            self._places[chain] = random_states(self._device), 0
            self._passes[chain] = batches.rows()

    def _full_rows(self, batches: Minibatches, chain: int) -> tuple[object, ...]:
        """Vectorised chains need batches of one length, so the shorter last batch of a shuffled pass is skipped."""
        while _length(batch := self._rows(batches, chain)) != _length(batches.first):
            if not batches.shuffled:
                raise ValueError(
                    f"the loader gave a batch of {_length(batch)} samples after one of {_length(batches.first)}: "
                    "vectorised chains need batches of one length. Build the loader with drop_last=True and "
                    "shuffle=True, or run one chain at a time"
                )
        return batch


def _length(batch: tuple[object, ...]) -> int:
    return next(len(t) for t in reversed(pytree.tree_leaves(batch)) if isinstance(t, Tensor) and t.dim())
