"""All that changes while a kernel runs, as plain values: what a checkpoint of a chain holds.

A kernel that was set up in the same way and is given these values goes on with the same numbers. What is neither known
to change nor known to stay is an error, so that nothing is forgotten silently.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from pyro.ops.dual_averaging import DualAveraging
from torch import Tensor, nn

from pyro_bnn.inference.potential import Potential
from pyro_bnn.inference.sgmcmc.kernel import MinibatchKernel
from pyro_bnn.inference.sgmcmc.streams import Streams
from pyro_bnn.inference.sgmcmc.tuned.tuner import ByAcceptance, ByEnergyError
from pyro_bnn.perturb.vectoriser import Vectoriser
from pyro_bnn.recording.recorded import Recorded

#: whose attributes are part of the state
_OURS = ("pyro_bnn.inference.sgmcmc", "pyro.ops.")
#: what setup makes, and what is derived from the rest
_MADE = (
    *(Potential, Recorded, Vectoriser, Streams, nn.Module, ThreadPoolExecutor, torch.Size, torch.device, torch.dtype),
    *(torch.distributions.Distribution, torch.distributions.Transform),
)
_MADE_NAMES = {"parts", "shares", "kwargs", "transforms", "_buffer", "_leaves", "_modes", "_groups", "_of_site"}
_MADE_NAMES |= {"_densities", "_hyper"}
#: classes of which the state may hold another one than setup made
_KINDS: dict[str, type] = {kind.__name__: kind for kind in (ByEnergyError, ByAcceptance, DualAveraging)}
_PLAIN = (bool, int, float, str, type(None))


def state_of(kernel: MinibatchKernel) -> dict[str, Any]:
    """The state of a kernel between two draws.

    :raises TypeError: for a kernel that holds what this module does not know.
    """
    return {"kernel": _Reader().attributes(kernel), "streams": kernel.streams.state()}


def set_state(kernel: MinibatchKernel, state: dict[str, Any]) -> None:
    """Gives a kernel that was set up the state of another; random states are set afterwards.

    :raises KeyError, TypeError: for the state of another kernel.
    """
    kernel.streams.set_state(state["streams"])
    with torch.no_grad():
        _Writer(kernel.theta.device).attributes(kernel, state["kernel"])
    kernel.state_was_set()


def _changing(owner: Any) -> dict[str, Any]:
    """The attributes of an object that are neither options of the kernel nor made by setup."""
    options = owner._options if isinstance(owner, MinibatchKernel) else ()
    return {
        name: value
        for name, value in vars(owner).items()
        if name not in options and name not in _MADE_NAMES and name != "_options" and not isinstance(value, _MADE)
    }


def _is_ours(value: object) -> bool:
    return type(value).__module__.startswith(_OURS)


class _Reader:
    def __init__(self) -> None:
        self._seen: set[int] = set()

    def attributes(self, owner: object) -> dict[str, Any]:
        self._seen.add(id(owner))
        found = {name: self._value(value, name) for name, value in _changing(owner).items() if not _is_function(value)}
        return found | {"class": type(owner).__name__}

    def _value(self, value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            return value.detach().clone()
        if isinstance(value, _PLAIN):
            return value
        if isinstance(value, torch.Generator):
            return value.get_state()
        if isinstance(value, dict):
            return {key: self._value(one, name) for key, one in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._value(one, name) for one in value)
        if _is_ours(value):
            return None if id(value) in self._seen else self.attributes(value)
        raise TypeError(f"a checkpoint of this kernel cannot hold {name!r}, which is a {type(value).__name__}")


class _Writer:
    """Writes into the tensors that are there, because others are views of them or hold them too."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def attributes(self, owner: Any, saved: dict[str, Any]) -> None:
        for name, value in saved.items():
            if name != "class":
                setattr(owner, name, self._value(getattr(owner, name, None), value))

    def _value(self, current: Any, saved: Any) -> Any:
        if isinstance(current, torch.Generator):
            current.set_state(saved)
            return current
        if isinstance(saved, Tensor):
            if isinstance(current, Tensor) and current.shape == saved.shape and 0 not in current.stride():
                return current.copy_(saved)
            return saved.to(self._device)
        if isinstance(saved, dict) and "class" in saved:
            kind = _KINDS.get(saved["class"])
            if current is None or (kind is not None and type(current) is not kind):
                if kind is None:
                    raise TypeError(f"the state holds a {saved['class']}, which this kernel does not have")
                current = object.__new__(kind)
            self.attributes(current, saved)
            return current
        if isinstance(saved, dict):
            own = current if isinstance(current, dict) else {}
            return {key: self._value(own.get(key), value) for key, value in saved.items()}
        if isinstance(saved, (list, tuple)):
            same = isinstance(current, (list, tuple)) and len(current) == len(saved)
            return type(saved)(
                self._value(c, s) for c, s in zip(current if same else [None] * len(saved), saved, strict=True)
            )
        return current if saved is None and _is_ours(current) else saved


def _is_function(value: object) -> bool:
    return isinstance(value, Callable) and not _is_ours(value)  # type: ignore[arg-type]
