"""Runs a function with ``torch.func.vmap`` if possible, and otherwise one by one."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from pyro_bnn.randomness import RandomState

_Result = TypeVar("_Result")


class Vectoriser:
    """Runs a function vectorised until that fails for the first time, and one by one from then on.

    ``vmap`` fails at in-place writes, branches on values, boolean masks and ``.item()``, with exceptions of many types.
    So the type does not show whether the error is the function's own: if the run one by one fails too, it is, and that
    exception is raised. Running out of memory is never taken for a failure of ``vmap``.

    :param what: the function, for the warning.
    :param over: what it is vectorised over, in the plural.
    :param hint: how to silence the warning.
    """

    def __init__(self, what: str, over: str, hint: str = "") -> None:
        self.what, self.over, self.hint = what, over, hint
        self.has_failed = False

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """Inside, the function runs one by one."""
        before, self.has_failed = self.has_failed, True
        try:
            yield
        finally:
            self.has_failed = before

    def __call__(self, at_once: Callable[[], _Result], in_turn: Callable[[], _Result], like: Tensor) -> _Result:
        """The result, which both functions compute.

        :param at_once: the function, vectorised.
        :param in_turn: the function, one by one.
        :param like: a tensor on the device of the function.
        """
        if self.has_failed:
            return in_turn()
        random = RandomState(like)
        try:
            return at_once()
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            failure = error
        random.restore()
        result = in_turn()
        self.has_failed = True
        first_line = str(failure).strip().partition("\n")[0]
        warnings.warn(
            f"{self.what} could not be vectorised over {self.over} ({type(failure).__name__}: {first_line}); from now "
            f"on they run one by one, which gives the same results and takes longer{self.hint}",
            stacklevel=3,
        )
        return result
