"""Branches that a network takes in Python on values that depend on its weights, such as ``if h.sum() > 0``.

Such a decision is made once for a whole pass. Members folded into one batch would share it, although each of them alone
might decide differently; and two passes can be compared only if they make the same decisions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_bnn.perturb.mode import tensors

#: functions that convert a tensor to a Python number, a list or an array
_TO_PYTHON: frozenset[Callable[..., object]] = frozenset(
    {
        *(Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__complex__, Tensor.__index__, Tensor.item),
        *(Tensor.__contains__, Tensor.is_nonzero, torch.is_nonzero),
        *(Tensor.equal, torch.equal, Tensor.allclose, torch.allclose),
        *(Tensor.tolist, Tensor.numpy, Tensor.__array__),
    }
)


class _Decision(NamedTuple):
    function: Callable[..., object]
    shape: torch.Size
    value: object
    is_of_weights: bool


class Decisions(TorchFunctionMode):
    """Records the decisions of the pass inside, by tracking weights and everything that is computed from them.

    :param weights: the tensors to track.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        #: whether a decision depends on the weights
        self.found = False
        self._made: list[_Decision] = []
        #: kept alive, so that no other tensor gets an ``id`` that is in it
        self._of_weights = {id(weight): weight for weight in weights}

    def __torch_function__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        takes_part = any(id(t) in self._of_weights for t in tensors((args, kwargs)))
        result = func(*args, **kwargs)
        if func in _TO_PYTHON:
            self._made.append(_Decision(func, _shape(args, kwargs), copy.copy(result), takes_part))
        if takes_part:
            self.found |= func in _TO_PYTHON
            written = args[:1] if func is Tensor.__setitem__ else ()
            self._of_weights |= {id(t): t for t in tensors((result, written))}
        return result

    def again(self) -> TorchFunctionMode:
        """A mode in which a pass repeats the recorded decisions that depend on the weights."""
        return _Again(self._made)


class _Again(TorchFunctionMode):
    def __init__(self, made: list[_Decision]) -> None:
        super().__init__()
        self._left = iter(made)

    def __torch_function__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = next(self._left, None) if func in _TO_PYTHON else None
        if (
            before is not None
            and before.is_of_weights
            and (before.function, before.shape) == (func, _shape(args, kwargs))
        ):
            return copy.copy(before.value)
        return func(*args, **kwargs)


def _shape(args: object, kwargs: object) -> torch.Size:
    return next(tensors((args, kwargs))).shape
