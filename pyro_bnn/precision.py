"""Mixed precision by ``torch.autocast``: networks run in the type that it asks for, densities in that of parameters.

A log density is a sum over all weights or all rows of a batch, and bfloat16 has 8 significant bits: a sum of 1,000
equal terms is off by up to two of them there, and a noise scale of 0.1 is 0.1001. Networks bear it, because their
products are summed in single precision before they are rounded.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Distribution

_NARROW = (torch.float16, torch.bfloat16)


@functools.cache
def _kinds() -> tuple[str, ...]:
    """The kinds of devices of this machine."""
    accelerator = torch.accelerator.current_accelerator()
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)


def asked() -> dict[str, torch.dtype]:
    """The types that ``torch.autocast`` asks for here, by kind of device; empty where it is off."""
    return {kind: torch.get_autocast_dtype(kind) for kind in _kinds() if torch.is_autocast_enabled(kind)}


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Inside, autocast is off."""
    with contextlib.ExitStack() as stack:
        for kind in asked():
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextlib.contextmanager
def mixed_precision(types: Mapping[str, torch.dtype]) -> Iterator[None]:
    """Inside, autocast is on with these types, and keeps no converted weights.

    Autocast converts a weight once in its outermost context and keeps the result there. A loop of training inside of
    one such context would go on with the weights of its first step, and where the first pass is one without gradients,
    such as the probe of a network, with a constant.

    :param types: see :func:`asked`.
    """
    with contextlib.ExitStack() as stack:
        for kind, dtype in types.items():
            stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=False))
        yield


def in_mixed_precision(program: Callable[..., Any], types: Mapping[str, torch.dtype]) -> Callable[..., Any]:
    """The program, run in :func:`mixed_precision`, for an engine that computes densities in full precision around it.

    :param types: see :func:`asked`; with none of them, the program itself.
    """
    if not types:
        return program

    def run(*args: object, **kwargs: object) -> Any:
        with mixed_precision(types):
            return program(*args, **kwargs)

    return run


def widened(f: Tensor, like: Tensor) -> Tensor:
    """``f``, which a network returned, in the type of its parameters ``like`` where that has more digits."""
    return f.to(torch.promote_types(f.dtype, like.dtype))


class FullDensities(Messenger):
    """Refuses distributions whose log densities would be in half precision although autocast is meant for networks.

    :raises ValueError: when a program inside gives one to ``pyro.sample``; the message names the site.
    """

    def _pyro_post_sample(self, msg: Any) -> None:
        require_full(msg["name"], msg["fn"])


def require_full(site: str, distribution: object) -> None:
    """Refuses a distribution that has a parameter in half precision.

    :raises ValueError: names the site and the parameter.
    """
    for name, value in vars(distribution).items():
        if isinstance(value, Distribution):
            require_full(site, value)
        elif isinstance(value, Tensor) and value.dtype in _NARROW:
            raise ValueError(
                f"the site {site!r} is a {type(distribution).__name__} whose {name} has the dtype {value.dtype} "
                "under torch.autocast, and its log density would have as few digits: expected float32. Convert what "
                "the network returns before you give it to the distribution, f.float()"
            )
