"""Minibatches of a data set, checked before anything trains on it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from pyro_bnn.distributed import Processes
from pyro_bnn.entry import checks
from pyro_bnn.given.next_tokens import require_next_tokens
from pyro_bnn.inputs import (
    LABELS,
    Data,
    Inputs,
    describe,
    inputs,
    integers_in,
    naming_shapes,
    require_finite,
    split,
    targets,
)
from pyro_bnn.modes import undisturbed
from pyro_bnn.network import batch_size as count_samples
from pyro_bnn.perturb.probe import rows_belong_together, takes
from pyro_bnn.perturb.samples import batched
from pyro_bnn.program.model import BayesianNetwork, like_of
from pyro_bnn.program.sites import Program


class Minibatches(NamedTuple):
    """The minibatches of a data set.

    :param rows: gives an iterator over one pass, in random order: what ``take`` makes the batches of.
    :param take: for data in memory, from the rows of one batch, ``[size]``, or of many side by side,
        ``[many, size]``; a loader's batches are taken as they are.
    :param steps: number of batches in a pass.
    :param size: number N of samples in the data set; ``None`` when it does not tell.
    :param first: a batch.
    :param shuffled: whether every pass is known to be in random order.
    :param divided: whether ``take`` gives the part of each batch that is this process's, of several.
    :param in_memory: whether ``take`` finds any rows by their indices.
    """

    rows: Callable[[], Iterator[tuple[object, ...]]]
    take: Callable[..., tuple[Any, ...]]
    steps: int
    size: int | None
    first: tuple[object, ...]
    shuffled: bool
    in_memory: bool = False
    divided: bool = False

    def epoch(self) -> Iterator[tuple[Any, ...]]:
        """The batches of one pass."""
        return (self.take(*rows) for rows in self.rows())


def minibatches(model: Program, data: Data, batch_size: int, *, together: Processes | None = None) -> Minibatches:
    """Checks a data set and splits it into minibatches with the device and dtype of the model.

    Several processes have the same batches as one would have, and each of them its part of every batch: of r processes
    process i has every r-th row, from row i. A loader with a ``DistributedSampler`` keeps its own batches, of which one
    of every process make one step.

    :param data: a loader or dataset of pairs (x, y) or of dicts with ``labels``; the pair (x, y) itself, or one such
        dict. :mod:`pyro_bnn.inputs` says what x and y may be.
    :param batch_size: for a dataset or data in memory; a loader has its own.
    :param together: processes that divide each batch; by default the batches are whole.
    :raises TypeError: for anything else, or labels of the wrong dtype.
    :raises ValueError: for empty or inconsistent data, labels outside the likelihood's range, NaN, or a size that is
        not the model's ``num_data``.
    """
    checks.count("batch_size", batch_size)
    if isinstance(data, (tuple, Mapping)):
        whole = _of_memory(model, data, batch_size)
        return whole if together is None or not together.are_several else _divided(whole, together, batch_size)
    loader = _loader(data, batch_size)
    if together is not None and together.are_several:
        return _of_loader(model, _dividing(loader, together))._replace(divided=True)
    return _of_loader(model, loader)


# ------------------------------------------------------------------------------------------------ data in memory


class _Memory:
    """All of x and y on the device of the model, from which batches are taken by the indices of their rows."""

    def __init__(self, x: Inputs, y: Tensor, batch_size: int) -> None:
        self.y, self.batch_size = y, batch_size
        self._leaves, self._structure = pytree.tree_flatten(x)

    def rows(self) -> Iterator[tuple[Tensor]]:
        order = torch.randperm(len(self.y), device=self.y.device)
        return ((index,) for index in order.split(self.batch_size))

    def take(self, index: Tensor) -> tuple[Inputs, Tensor]:
        def part(leaf: object) -> object:
            if batched(leaf, len(self.y)):
                return leaf[index]
            return leaf.expand(index.shape[:-1] + leaf.shape) if isinstance(leaf, Tensor) else leaf

        return pytree.tree_unflatten(map(part, self._leaves), self._structure), self.y[index]


def _of_memory(model: Program, data: Data, batch_size: int) -> Minibatches:
    pair, like = split(data), like_of(model)
    if pair is None:
        raise TypeError(
            f"data in memory must be (x, y) or a dict with {LABELS!r}, got {describe(data)}. Put all inputs of the "
            "network into x, as a dict or tuple"
        )
    x, y = inputs(pair[0], like), targets(pair[1], like)
    size = count_samples(x, y)
    if size == 0:
        raise ValueError("the data is empty: x and y have no samples")
    _check(model, x, y)
    memory = _Memory(x, y, batch_size)
    first = memory.take(torch.arange(min(batch_size, size), device=y.device))
    _require_num_data(model, size)
    return Minibatches(memory.rows, memory.take, -(-size // batch_size), size, first, shuffled=True, in_memory=True)


# --------------------------------------------------------------------------------------------- several processes


def _divided(whole: Minibatches, together: Processes, batch_size: int) -> Minibatches:
    """Batches of data in memory, of which this process takes its rows; all processes have one order."""
    assert whole.size is not None
    _require_rows_for_all(whole.size % batch_size or batch_size, together)
    _require_rows_for_all(min(batch_size, whole.size), together)

    def rows() -> Iterator[tuple[object, ...]]:
        seed = together.common_seed()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            indices = whole.rows()
        return ((index[together.rank :: together.size],) for (index,) in indices)  # type: ignore[index]

    return whole._replace(rows=rows, divided=True)


def _dividing(loader: DataLoader[object], together: Processes) -> DataLoader[object]:
    """A loader of the same batches that reads those rows of each which are of this process."""
    if isinstance(loader.sampler, DistributedSampler):
        return loader
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        raise TypeError(
            f"{together.size} processes train together, and rows of an {type(loader.dataset).__name__} cannot be read "
            "by their numbers: give a data set with __getitem__ and __len__, or a DataLoader with a DistributedSampler"
        )
    return DataLoader(
        loader.dataset,
        batch_sampler=_PartOfBatches(loader.batch_sampler, together),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )


class _PartOfBatches(Sampler[list[int]]):
    """Of every batch of another sampler the rows of this process; all processes draw the same batches.

    :param whole: gives the indices of whole batches.
    """

    def __init__(self, whole: Iterable[list[int]], together: Processes) -> None:
        self.whole, self.together = whole, together

    def __len__(self) -> int:
        return len(self.whole)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[int]]:
        seed = self.together.common_seed()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            batches = list(self.whole)
        for batch in batches:
            _require_rows_for_all(len(batch), self.together)
            yield batch[self.together.rank :: self.together.size]


def _require_rows_for_all(rows: int, together: Processes) -> None:
    if rows < together.size:
        raise ValueError(
            f"a batch has {rows} rows, and {together.size} processes divide it: choose another batch_size=, or a "
            "DataLoader with drop_last=True, so that each of them has a row of every batch"
        )


# ------------------------------------------------------------------------------------------------------ loaders


def _loader(data: Data, batch_size: int) -> DataLoader[object]:
    if isinstance(data, DataLoader):
        return data
    if not isinstance(data, Dataset):
        raise TypeError(
            f"data must be a DataLoader, a Dataset or a pair (x, y), got {type(data).__name__}. Labels go with their "
            "inputs: give (x, y)"
        )
    if isinstance(data, Sized) and len(data) == 0:
        raise ValueError("the data set is empty")
    return DataLoader(data, batch_size=batch_size, shuffle=True)


def _of_loader(model: Program, loader: DataLoader[object]) -> Minibatches:
    size, why = _size_of(loader)
    if size == 0:
        raise ValueError(f"the loader is empty{f': {why}' if why else ''}; give it at least one sample")
    if size is not None:
        _require_num_data(model, size, why)

    def batches() -> Iterator[tuple[object, ...]]:
        each = (_loaded(model, batch) for batch in loader)
        return each if size is not None else _counted(model, each)

    try:
        with torch.random.fork_rng([]):
            first = next(batches())
    except StopIteration:
        raise ValueError("the loader is empty: it gives no batch") from None
    try:
        steps = len(loader)
    except TypeError:
        raise TypeError(
            "the loader has no length, by which annealing and schedules count: give its data set a __len__"
        ) from None
    known = model.num_data if size is None and isinstance(model, BayesianNetwork) else size
    shuffled = isinstance(getattr(loader, "sampler", None), RandomSampler)
    return Minibatches(batches, lambda *batch: batch, steps, known, first, shuffled)


def _size_of(loader: DataLoader[object]) -> tuple[int | None, str]:
    """Number N of different samples that passes through a loader train on, and why where that is not all there are.

    What a sampler leaves out of every pass is no datum; what it leaves out of one pass and takes in another is.
    ``None`` where only a pass can tell: of an iterable data set, and of one whose items are batches.
    """
    if isinstance(loader.dataset, IterableDataset) or not isinstance(loader.dataset, Sized):
        return None, ""
    total = len(loader.dataset)
    sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    if isinstance(sampler, _PartOfBatches):  # the size is that of the whole
        sampler = sampler.whole
    if type(sampler) is not BatchSampler:  # its own kind of batches, or of indices
        if isinstance(sampler, (SequentialSampler, RandomSampler)):  # items that are batches
            return None, ""
        return _size_by_passing(sampler, total)
    rows, last = sampler.sampler, sampler.batch_size
    match rows:
        case SubsetRandomSampler():
            taken = len({int(i) for i in rows.indices})
            return taken, f"its SubsetRandomSampler takes {taken} of the {total} samples of its data set"
        case WeightedRandomSampler():
            positive = rows.weights[rows.weights > 0]
            taken = len(positive)
            if bool((positive != positive[:1]).any()):
                warnings.warn(
                    "the WeightedRandomSampler draws some samples more often than others: training counts the "
                    "likelihood of each by its share of the draws, so that the posterior is that of the data weighted "
                    "so. For the posterior of the data as they are, draw all samples alike (shuffle=True)",
                    stacklevel=4,
                )
            return taken, f"its WeightedRandomSampler gives {taken} of the {total} samples a weight above 0"
        case SequentialSampler():
            taken = total - total % last if sampler.drop_last and total >= last else total
            left = f"drop_last without shuffling leaves the same {total - taken} of {total} out of every pass"
            return taken, left if taken < total else ""
        case RandomSampler() | DistributedSampler():
            return total, ""
    return _size_by_passing(sampler, total)


def _size_by_passing(sampler: Any, total: int) -> tuple[int | None, str]:
    """Two passes over the indices of a sampler that is not torch's: the same samples twice are all that it takes."""
    with torch.random.fork_rng([]):
        one, other = ({int(i) for item in sampler for i in _indices(item)} for _ in range(2))
    if not one or one != other:
        return total, ""
    return len(one), f"its {type(sampler).__name__} takes {len(one)} of the {total} samples of its data set"


def _indices(item: Any) -> list[Any]:
    return (
        item.tolist()
        if isinstance(item, Tensor) and item.dim()
        else list(item)
        if isinstance(item, Iterable)
        else [item]
    )


def _counted(model: Program, batches: Iterator[tuple[object, ...]]) -> Iterator[tuple[object, ...]]:
    """The batches of a pass, which is refused at its end if it had not as many samples as the model was told."""
    seen = 0
    for batch in batches:
        yield batch
        if isinstance(model, BayesianNetwork):
            x, y = batch
            seen += count_samples(x, y if isinstance(y, Tensor) else None)
    if seen:
        _require_num_data(model, seen, "that is how many came in one pass, which nothing tells before")


def _loaded(model: Program, batch: object) -> tuple[object, ...]:
    """``(x, y)`` of one batch; of a model that is not of this package, all that it is to be called with."""
    pair = split(batch)
    parts = batch if pair is None else pair
    if not isinstance(parts, (tuple, list)) or (pair is None and isinstance(model, BayesianNetwork)):
        raise TypeError(f"the loader must give pairs (x, y) or dicts with {LABELS!r}, got {describe(batch)}")
    return as_tensors(model, parts)


def as_tensors(model: Program, parts: Sequence[object], *, check: bool = True) -> tuple[object, ...]:
    """What a model is called with, as tensors; those of a network of this package on its device, in its dtype.

    :param parts: of a network of this package x and y.
    :param check: whether to look for what would train silently on nonsense.
    """
    if not isinstance(model, BayesianNetwork):
        return tuple(inputs(part, None, f"part {i} of a batch") for i, part in enumerate(parts))
    x, y = inputs(parts[0], model.like()), targets(parts[1], model.like())
    if check:
        _check(model, x, y)
    return x, y


# ------------------------------------------------------------------------------------------------------- checks


def _require_num_data(model: Program, size: int, why: str = "") -> None:
    if isinstance(model, BayesianNetwork) and model.num_data is not None and model.num_data != size:
        raise ValueError(
            f"the model was built with num_data={model.num_data}, but the data has {size} samples"
            f"{f' ({why})' if why else ''}: the likelihood would be scaled wrongly. Build the model with the size of "
            f"the training set, num_data={size}"
        )


def _check(model: Program, x: Inputs, y: Tensor) -> None:
    """Everything about a batch that would otherwise train silently on nonsense."""
    size = count_samples(x, y)
    require_finite(x)
    if not isinstance(model, BayesianNetwork) or model.likelihood is None:
        return
    f = _output_of_first(model, x, size)
    noise = f.new_ones(()) if model.likelihood.learns_noise else None
    with pyro.validation_enabled(False):  # NaN in the output is not what is wrong with the data
        model.likelihood.given(f.expand(size, *f.shape[1:]), y, noise)
    model.likelihood.check(y, f)
    require_next_tokens(model.core().net, x, y, model.likelihood.labelled(y))


def _output_of_first(network: BayesianNetwork, x: Inputs, size: int) -> Tensor:
    """The output for the first sample of x, computed once for inputs of one shape."""
    row = pytree.tree_map(lambda t: t[[0, 0]] if batched(t, size) else t, x)  # two: .squeeze() would drop the axis
    key = tuple(t.shape for t in pytree.tree_leaves(row) if isinstance(t, Tensor))  # sequences differ in length
    examples: dict[object, Tensor] = network.__dict__.setdefault("_output_examples", {})
    if key not in examples:
        try:
            with undisturbed(network.core().net), naming_shapes(x):
                examples[key] = network.core()(row)[:1]
        except Exception as error:
            if takes(network.core(), x):
                raise rows_belong_together(error) from error
            if dtypes := integers_in(row):
                error.add_note(
                    f"x holds integers ({', '.join(dtypes)}), which stay integers, as indices of embeddings must. A "
                    "network that takes numbers needs floats: x.astype('float32') of an array, x.float() of a tensor"
                )
            raise
    return examples[key]
