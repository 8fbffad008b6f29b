"""The statements of which models and guides are made: Pyro's own, and traces of them without a message for each.

``sample``, ``plate``, ``scale`` and ``factor`` of this file are Pyro's, so that every model and guide is an ordinary
Pyro program. Inside :func:`traced` they write the nodes of a trace themselves: a message costs about 25 microseconds,
for each site, in the guide and in the model, in every step of training. The trace is the one that
``poutine.trace(poutine.replay(program, given))`` gives, with the same draws.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn


class Handler(Protocol):
    """A handler of Pyro that changes the message of a ``sample`` statement."""

    def _pyro_sample(self, msg: Any) -> None: ...


_tracer: ContextVar[_Tracer | None] = ContextVar("tracer", default=None)


#: classes of models and guides that make statements of Pyro itself
_not_traceable: weakref.WeakSet[type] = weakref.WeakSet()


class NotTraceableError(Exception):
    """A program inside :func:`traced` makes a statement of Pyro itself, which only Pyro's own trace can record."""


def is_traced() -> bool:
    """Whether a statement of this file is recorded by :func:`traced`, or by a handler of Pyro."""
    return _tracer.get() is not None or poutine.runtime.am_i_wrapped()


def declares_parameters() -> bool:
    """Whether something listens to ``pyro.param``."""
    return _tracer.get() is None and poutine.runtime.am_i_wrapped()


def sample(
    name: str, fn: dist.TorchDistribution, obs: Tensor | None = None, infer: dict[str, Any] | None = None
) -> Tensor:
    """``pyro.sample(name, fn, obs=obs, infer=infer)``."""
    tracer = _tracer.get()
    if tracer is not None:
        return tracer.sample(name, fn, obs, infer or {})
    value: Tensor = pyro.sample(name, fn, obs=obs, infer=infer)  # type: ignore[arg-type]
    return value


def factor(name: str, value: Tensor) -> None:
    """``pyro.factor(name, value)``."""
    if _tracer.get() is None:
        pyro.factor(name, value)
    else:
        unit = dist.Unit(value)
        sample(name, unit, unit.sample(), {"is_auxiliary": True})


def scale(factor: float) -> contextlib.AbstractContextManager[object]:
    """``poutine.scale(scale=factor)``."""
    tracer = _tracer.get()
    return poutine.scale(scale=factor) if tracer is None else tracer.scaled(factor)


def plate(
    name: str, size: int | None, dim: int, device: torch.device, count: int | None = None
) -> contextlib.AbstractContextManager[object]:
    """``pyro.plate(name, size, dim=dim)``.

    :param count: number of rows that stand for all, ``subsample=arange(count)``; by default those of a replayed trace,
        or all.
    """
    tracer = _tracer.get()
    if tracer is not None:
        return tracer.plate(name, size, dim, count)
    rows: Any = {} if count is None else {"subsample_size": count, "subsample": torch.arange(count, device=device)}
    made: contextlib.AbstractContextManager[object] = pyro.plate(name, size, dim=dim, device=str(device), **rows)
    return made


def is_traceable(program: nn.Module) -> bool:
    """Whether :func:`traced` has met no statement of Pyro itself in a program of this class.

    Who asks first does not run it in vain: a network that ran would have moved its statistics.
    """
    return type(program) not in _not_traceable


def traced(
    program: Callable[..., object],
    args: tuple[object, ...],
    kwargs: dict[str, object],
    given: StatementTrace | None = None,
    handlers: Sequence[Handler] = (),
) -> StatementTrace:
    """The trace of a program of this package, without the nodes of plates.

    :param given: a trace whose draws and plates the program takes, as with ``poutine.replay``.
    :param handlers: handlers of Pyro, innermost first, which change the nodes and nothing else.
    :raises NotTraceableError: when the program makes a ``pyro.sample`` or ``pyro.plate`` statement of its own.
    """
    tracer = _Tracer(given, handlers)
    token = _tracer.set(tracer)
    try:
        with _Refusing():
            program(*args, **kwargs)
    except NotTraceableError:
        if isinstance(program, nn.Module):
            _not_traceable.add(type(program))
        raise
    finally:
        _tracer.reset(token)
    return tracer.trace


class StatementTrace(poutine.Trace):
    """A trace of :func:`traced`, with the number of rows of each plate."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}


class _Refusing(Messenger):
    def _process_message(self, msg: Any) -> None:
        if msg["type"] == "sample":
            raise NotTraceableError(msg["name"])


class _Plate(NamedTuple):
    frame: CondIndepStackFrame
    scale: float
    tracer: _Tracer

    def __enter__(self) -> None:
        self.tracer.enter((self.frame,), self.scale)

    def __exit__(self, *_: object) -> None:
        self.tracer.leave()


class _Tracer:
    """What surrounds a statement: plates, innermost first, with their batch shape, and the product of all scales."""

    def __init__(self, given: StatementTrace | None, handlers: Sequence[Handler]) -> None:
        self.trace, self.given, self.handlers = StatementTrace(), given, handlers
        self.frames: tuple[CondIndepStackFrame, ...] = ()
        self.batch: tuple[int, ...] = ()
        self.scale = 1.0
        self._outer: list[tuple[tuple[CondIndepStackFrame, ...], tuple[int, ...], float]] = []

    def plate(self, name: str, size: int | None, dim: int, count: int | None) -> _Plate:
        if count is None:
            count = size if self.given is None else self.given.counts.get(name, size)
        assert count is not None
        self.trace.counts[name] = count
        return _Plate(CondIndepStackFrame(name, dim, count, 0), 1.0 if size is None else size / count, self)

    def enter(self, frames: tuple[CondIndepStackFrame, ...], scale: float) -> None:
        self._outer.append((self.frames, self.batch, self.scale))
        self.frames = frames + self.frames
        sizes = {frame.dim: frame.size for frame in self.frames if frame.dim is not None}
        self.batch = tuple(sizes.get(dim, 1) for dim in range(min(sizes), 0)) if sizes else ()
        self.scale *= scale

    def leave(self) -> None:
        self.frames, self.batch, self.scale = self._outer.pop()

    @contextlib.contextmanager
    def scaled(self, scale: float) -> Iterator[None]:
        self.enter((), scale)
        try:
            yield
        finally:
            self.leave()

    def sample(self, name: str, fn: dist.TorchDistribution, obs: Tensor | None, infer: dict[str, Any]) -> Tensor:
        batch = self._batch_of(name, fn.batch_shape)
        if batch != fn.batch_shape:
            fn = fn.expand(batch)
        value = obs
        if value is None and self.given is not None and name in self.given.nodes:
            value = self.given.nodes[name]["value"]
        if value is None:
            value = fn()
        node = {
            "type": "sample",
            "name": name,
            "fn": fn,
            "is_observed": obs is not None,
            "args": (),
            "kwargs": {},
            "value": value,
            "infer": infer,
            "scale": self.scale,
            "mask": None,
            "cond_indep_stack": self.frames,
            "done": True,
            "stop": False,
            "continuation": None,
        }
        for handler in self.handlers:
            handler._pyro_sample(node)
        self.trace.add_node(name, **node)
        return value

    def _batch_of(self, name: str, own: torch.Size) -> tuple[int, ...]:
        """The batch shape of a site: that of the plates, and of the distribution where there is no plate."""
        missing = len(self.batch) - len(own)
        shape = [*own[: max(0, -missing)], *self.batch]
        for i, n in enumerate(own[max(0, -missing) :], max(0, missing) - len(shape)):
            if n not in (1, shape[i]):
                if shape[i] != 1:
                    raise ValueError(
                        f"the site {name!r} has the batch shape {tuple(own)}, which does not fit its plates, of the "
                        f"shape {tuple(self.batch)}"
                    )
                shape[i] = n
        return tuple(shape)
