"""Selects samples of an input, and marks one of them by changing its values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_bnn.inputs import Inputs

#: number of samples of an input that are searched for one that differs
_DONORS = 16


def batched(leaf: object, size: int) -> TypeGuard[Tensor]:
    """Whether a leaf of x carries the batch: a tensor whose leading axis has the batch's length."""
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == size


def _per_sample(leaf: object, size: int) -> TypeGuard[Tensor]:
    """Whether a leaf of x holds one integer for each sample, such as the lengths of sequences."""
    return batched(leaf, size) and leaf.dim() == 1 and not (leaf.is_floating_point() or leaf.is_complex())


def unlike(x: Inputs, size: int) -> bool:
    """Whether samples differ in a per-sample integer, by which a network may sort them."""
    return any(_per_sample(leaf, size) and bool((leaf != leaf[0]).any()) for leaf in pytree.tree_leaves(x))


def unlike_samples(x: Inputs, size: int, count: int) -> list[int]:
    """Indices of the first samples; if a per-sample integer differs, of the least, the greatest and the least again."""
    for leaf in pytree.tree_leaves(x):
        if _per_sample(leaf, size) and (leaf != leaf[0]).any():
            low, high = int(leaf.long().argmin()), int(leaf.long().argmax())
            return [low, high, low][:count]
    return [i % size for i in range(count)]


def select_samples(x: Inputs, size: int, index: list[int]) -> object:
    """The samples of x at ``index``, with finite numbers in place of NaN and infinity."""

    def pick(leaf: object) -> object:
        if not batched(leaf, size):
            return leaf
        rows = leaf.detach()[torch.tensor(index, device=leaf.device)]
        return torch.nan_to_num(rows) if rows.is_floating_point() else rows

    return pytree.tree_map(pick, x)


def markings(x: Any, size: int, base: Any, count: int) -> list[Callable[[int], Any]]:
    """Ways to change one sample of ``base`` alone, each ``sample -> input``; the one that networks accept most first.

    A network may check its input: that numbers are finite and in a range, that every sequence has its end. So a sample
    first gets the values of another sample of x; then NaN, which reaches furthest, and other integers: in all tensors,
    in those of floating point, in each alone; and at last its own values in another order.

    :param x: an input with ``size`` samples.
    :param base: ``count`` samples of it.
    """
    leaves = pytree.tree_leaves(base)
    all_ = {i for i, leaf in enumerate(leaves) if batched(leaf, count)}
    floats = {i for i in all_ if leaves[i].is_floating_point()}
    groups = [all_, floats, *({i} for i in sorted(all_))]
    groups = [group for i, group in enumerate(groups) if group and group not in groups[:i]]
    foreign = [lambda sample, group=group: _changed(base, group, sample, _foreign) for group in groups]
    return [
        lambda sample: _as_another(base, count, x, size, sample),
        *foreign,
        lambda sample: _changed(base, all_, sample, _reordered),
    ]


def _as_another(base: Any, count: int, x: Any, size: int, sample: int) -> Any:
    """``base`` where a sample has the values of another one of x: the first that differs in the most tensors."""
    rows = list(range(min(size, _DONORS)))
    own = [leaf[sample] for leaf in pytree.tree_leaves(base) if batched(leaf, count)]
    every = select_samples(x, size, rows)
    given = [leaf for leaf in pytree.tree_leaves(every) if batched(leaf, len(rows))]
    unlike_own = [sum(bool((leaf[row] != mine).any()) for leaf, mine in zip(given, own, strict=True)) for row in rows]
    donor = unlike_own.index(max(unlike_own))

    def put(leaf: Any, source: Any) -> Any:
        if not batched(leaf, count):
            return leaf
        changed = leaf.clone()
        changed[sample] = source[donor]
        return changed

    return pytree.tree_map(put, base, every)


def _changed(base: Any, which: set[int], sample: int, change: Callable[[Tensor, int], Tensor]) -> Any:
    leaves, spec = pytree.tree_flatten(base)
    for i in which:
        own, leaves[i] = leaves[i], leaves[i].clone()
        leaves[i][sample] = change(own, sample)
    return pytree.tree_unflatten(leaves, spec)


def _foreign(leaf: Tensor, sample: int) -> Tensor:
    if leaf.is_floating_point() or leaf.is_complex():
        return torch.full_like(leaf[sample], torch.nan)
    if leaf.dtype == torch.bool:
        return ~leaf[sample]
    values = torch.unique(leaf)  # each integer becomes the next one that occurs, so that all stay valid
    other = values.roll(-1) if len(values) > 1 else torch.where(values == 0, 1, 0).to(values.dtype)
    return other[torch.searchsorted(values, leaf[sample].contiguous())]


def _reordered(leaf: Tensor, sample: int) -> Tensor:
    return leaf[sample].flatten().roll(1).view_as(leaf[sample])
