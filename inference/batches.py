"""Minibatches of a data set, checked before anything trains on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, RandomSampler

from pyro_bnn.inputs import require_finite, to_device
from pyro_bnn.model import BayesianNetwork
from pyro_bnn.modes import undisturbed
from pyro_bnn.network import batch_size as count_samples
from pyro_bnn.perturb.probe import batched


class Minibatches(NamedTuple):
    """How to go through a data set.

    :param rows: gives an iterator over one pass, in random order: what ``take`` makes the batches of.
    :param take: for data in memory, from the rows of one batch, ``[size]``, or of many side by side,
        ``[many, size]``; a loader's batches are taken as they are.
    :param steps: number of batches in a pass.
    :param size: number N of samples in the data set; ``None`` when it does not tell.
    :param first: a batch.
    :param shuffled: whether every pass is known to be in random order.
    """

    rows: Callable[[], Iterator[tuple[Any, ...]]]
    take: Callable[..., tuple[Any, ...]]
    steps: int
    size: int | None
    first: tuple[Any, ...]
    shuffled: bool

    def epoch(self) -> Iterator[tuple[Any, ...]]:
        """The batches of one pass."""
        return (self.take(*rows) for rows in self.rows())


def minibatches(model: Callable[..., Any], data: Any, batch_size: int) -> Minibatches:
    """Checks a data set and says how to go through it; batches come on the device of the model.

    :param data: a loader of (x, y), a dataset, or the pair (x, y) itself; x may be a tensor, dict or tuple.
    :param batch_size: for a dataset or a pair; a loader has its own.
    :raises TypeError: for anything else, or labels of the wrong dtype.
    :raises ValueError: for empty or inconsistent data, labels outside the likelihood's range, NaN, or a size that is
        not the model's ``num_data``.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r}: expected at least 1")
    network = model if isinstance(model, BayesianNetwork) else None
    like = network.like() if network is not None else None
    if isinstance(data, tuple):
        if len(data) != 2 or not isinstance(data[1], Tensor):
            raise TypeError("data as a pair must be (x, y) with a tensor y")
        x, y = data
        size = count_samples(x, y)
        if size == 0:
            raise ValueError("the data is empty: x and y have no samples")
        _check(network, x, y)
        if like is not None:
            x, y = to_device(x, like), y.to(like.device)

        def take(index: Tensor) -> tuple[Any, Tensor]:
            def part(leaf: Any) -> Any:
                if batched(leaf, size):
                    return leaf[index]
                return leaf.expand(index.shape[:-1] + leaf.shape) if isinstance(leaf, Tensor) else leaf

            return pytree.tree_map(part, x), y[index]

        def rows() -> Iterator[tuple[Tensor]]:
            return ((index,) for index in torch.randperm(size, device=y.device).split(batch_size))

        first = take(torch.arange(min(batch_size, size), device=y.device))
        _require_num_data(network, size)
        return Minibatches(rows, take, -(-size // batch_size), size, first, shuffled=True)
    if isinstance(data, DataLoader):
        loader: Iterable[Any] = data
    elif isinstance(data, Dataset):
        if isinstance(data, Sized) and len(data) == 0:
            raise ValueError("the data set is empty")
        loader = DataLoader(data, batch_size=batch_size, shuffle=True)
    else:
        raise TypeError(f"data must be a DataLoader, a Dataset or a pair (x, y), got {type(data).__name__}")
    dataset = getattr(loader, "dataset", None)
    if isinstance(dataset, Sized) and not getattr(loader, "drop_last", False):
        _require_num_data(network, len(dataset))

    def loaded() -> Iterator[tuple[Any, ...]]:
        for batch in loader:
            if network is not None:
                if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                    raise TypeError("the loader must give pairs (x, y)")
                _check(network, batch[0], batch[1])
            yield tuple(to_device(part, like) for part in batch) if like is not None else tuple(batch)

    try:
        with torch.random.fork_rng([]):
            first = next(loaded())
    except StopIteration:
        raise ValueError("the loader is empty: it gives no batch") from None
    try:
        steps = len(loader)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(
            "the loader has no length, by which annealing and schedules count: give its data set a __len__"
        ) from None
    known = len(dataset) if isinstance(dataset, Sized) else None
    if network is not None and network.num_data:
        known = network.num_data
    shuffled = isinstance(getattr(loader, "sampler", None), RandomSampler)
    return Minibatches(loaded, lambda *batch: batch, steps, known, first, shuffled)


def _require_num_data(network: BayesianNetwork | None, size: int) -> None:
    if network is not None and network.num_data is not None and network.num_data != size:
        raise ValueError(
            f"the model was built with num_data={network.num_data}, but the data has {size} samples: the likelihood "
            "would be scaled wrongly. Build the model with the size of the training set"
        )


def _check(network: BayesianNetwork | None, x: Any, y: Tensor) -> None:
    """Everything about a batch that would otherwise train silently on nonsense."""
    count_samples(x, y)
    require_finite(x)
    if network is None or network.likelihood is None:
        return
    size = y.shape[0]
    row = pytree.tree_map(lambda t: t[:1] if batched(t, size) else t, to_device(x, network.like()))
    key = tuple(t.shape for t in pytree.tree_leaves(row) if isinstance(t, Tensor))  # sequences differ in length
    examples = network.__dict__.setdefault("_output_examples", {})
    if key not in examples:
        with undisturbed(network.core().net):
            examples[key] = network.core()(row)
    f = examples[key]
    noise = f.new_ones(()) if network.likelihood.learns_noise else None
    with pyro.validation_enabled(False):  # NaN in the output is not what is wrong with the data
        network.likelihood.given(f.expand(size, *f.shape[1:]), y.to(f.device), noise)
    network.likelihood.check(y, f)
