"""Replaces weights of a network during one pass, and again whenever a part of that pass is rerun.

A weight is held in *slots*: entries of modules, several of them when it is shared. :class:`Pass` puts other tensors
into all slots of a weight and restores all of them afterwards, also after an error.

A part of a pass may run again after its end: gradient checkpointing (Chen et al. 2016, arXiv 1604.06174) keeps the
inputs of a segment, and runs it again in the backward pass for its activations; hooks run in the backward pass too.
At that time the network has its own weights again. A pass therefore watches for segments and hooks, and resumes
around each.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils import checkpoint as checkpointing

from pyro_bnn.perturb.mode import Perturb, tensors

#: a module, and the name under which it holds a parameter
Slot = tuple[nn.Module, str]
#: a dictionary, a key, and the value to put there
_Entry = tuple[dict[str, Any], str, object]


_FORWARD, _BACKWARD = ("_forward_hooks", "_forward_pre_hooks"), ("_backward_hooks", "_backward_pre_hooks")


def find_slots(net: nn.Module) -> dict[str, list[Slot]]:
    """The slots of every parameter, under the first of its names."""
    first = {id(p): name for name, p in net.named_parameters()}
    slots: dict[str, list[Slot]] = {name: [] for name in first.values()}
    for module in net.modules():
        for own, parameter in module._parameters.items():
            if parameter is not None:
                slots[first[id(parameter)]].append((module, own))
    return slots


class Pass:
    """One pass of a network: ``with Pass(...).running(): y = net(x)``.

    :param net: the network.
    :param slots: of its parameters, see :func:`find_slots`.
    :param weights: the tensors that replace parameters and buffers, by name.
    :param mode: the mode that rewrites the calls that consume weights, or ``None``.
    """

    def __init__(
        self,
        net: nn.Module,
        slots: Mapping[str, list[Slot]],
        weights: Mapping[str, Tensor],
        mode: Perturb | None = None,
    ) -> None:
        self.net, self.mode = net, mode
        self._forward_hooks: list[_Entry] | None = None
        self._entries: list[_Entry] = []
        for name, value in weights.items():
            if name not in slots:
                buffer = net.get_buffer(name)
                holders = [m._buffers for m in net.modules()]
                self._entries += [(held, own, value) for held in holders for own in held if held[own] is buffer]
            for module, own in slots.get(name, ()):
                self._entries.append((module._parameters, own, value))
                if isinstance(module, nn.RNNBase):  # it keeps a list of its weights, which must be restored too
                    known = vars(module)
                    self._entries += [(known, key, known[key]) for key in known if key.startswith("_flat_weight")]

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Inside, the network has the weights of this pass."""
        token = _current.set(self)
        hooks: list[_Entry] = []
        if torch.is_grad_enabled():
            hooks = self._backward_hooks()
            if self._forward_hooks is None:
                self._forward_hooks = [(entries, kind, own.copy()) for entries, kind, own in _hooks(self.net, _FORWARD)]
        try:
            with _watching_segments(), _replaced([*self._entries, *hooks]), self.mode or contextlib.nullcontext():
                yield
        finally:
            _current.reset(token)

    @contextlib.contextmanager
    def resumed(self, uses: Mapping[str, int]) -> Iterator[None]:
        """Inside, the pass continues from a point that it had reached before. Running statistics are not updated again.

        :param uses: how often each parameter had been used at that point.
        """
        moving = [m for m in self.net.modules() if isinstance(m, _NormBase) and m.training]
        buffers = [(m._buffers, name, b) for m in moving for name, b in m._buffers.items() if b is not None]
        copies = {id(b): b.clone() for _, _, b in buffers}
        with contextlib.ExitStack() as stack:
            if _current.get() is not self:  # otherwise the backward pass runs inside the pass
                stack.enter_context(self.running())
            stack.enter_context(_replaced([(entries, name, copies[id(b)]) for entries, name, b in buffers]))
            stack.enter_context(_replaced(self._forward_hooks or []))
            if self.mode is not None:
                stack.enter_context(self.mode.resumed(uses))
            yield

    def _backward_hooks(self) -> list[_Entry]:
        """The hooks for the backward pass, wrapped so that each resumes this pass."""
        return [
            (entries, kind, OrderedDict((key, functools.partial(self._run_hook, hook)) for key, hook in own.items()))
            for entries, kind, own in _hooks(self.net, _BACKWARD)
        ]

    def _run_hook(self, hook: Callable[..., Any], *args: Any) -> Any:
        with self.resumed({}):
            return hook(*args)

    def require_no_foreign_segments(self, y: Tensor) -> None:
        """Checks that only :func:`torch.utils.checkpoint.checkpoint` runs parts of this pass again.

        :param y: what the pass returned.
        :raises RuntimeError: when an autograd function of the network may run modules again in the backward pass.
        """
        modules = set(self.net.modules())
        seen, nodes = set(), [y.grad_fn]
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            function = getattr(type(node), "_forward_cls", None)
            if function is not None and not function.__module__.startswith(("torch.", "pyro_bnn.")):
                if any(_reaches(value, modules) for value in vars(node).values()):
                    raise RuntimeError(
                        f"the network calls {function.__qualname__}, an autograd function that keeps modules and may "
                        "run them again in the backward pass, where they no longer have the weights of this pass. Use "
                        "torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False) instead, which "
                        "pyro_bnn supports, or turn recomputation off"
                    )
            nodes.extend(parent for parent, _ in node.next_functions)


def _hooks(
    net: nn.Module, kinds: tuple[str, str]
) -> list[tuple[dict[str, Any], str, OrderedDict[int, Callable[..., Any]]]]:
    """Where modules have hooks: the attributes of the module, the kind, and the hooks."""
    return [(vars(m), kind, vars(m)[kind]) for m in net.modules() for kind in kinds if vars(m).get(kind)]


_current: ContextVar[Pass | None] = ContextVar("pass", default=None)


@contextlib.contextmanager
def _replaced(entries: Iterable[_Entry]) -> Iterator[None]:
    """Inside, entries of dictionaries have other values. Afterwards they are restored; one may be listed twice."""
    entries = list(entries)
    before = [(dictionary, key, dictionary[key]) for dictionary, key, _ in entries]
    try:
        for dictionary, key, value in entries:
            dictionary[key] = value
        yield
    finally:
        for dictionary, key, value in before:
            dictionary[key] = value


class Strays(TorchFunctionMode):
    """Refuses replaced parameters that the network uses by a reference outside all slots.

    :param names: of the replaced parameters, by ``id``.
    """

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names = names

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        stray = next((self.names[id(t)] for t in tensors((args, kwargs or {})) if id(t) in self.names), None)
        if stray is not None and getattr(func, "__name__", "") != "__get__":  # shape, dtype and device may be read
            raise RuntimeError(
                f"the network uses its parameter {stray!r} without reading it from its module (from a list, a dict "
                "or a closure), where no random weight can replace it: read it from the module in forward(), "
                "or leave it out with `select=`"
            )
        return func(*args, **(kwargs or {}))


class _Segment:
    """A function that runs within a pass, and perhaps again after its end.

    :param args: its arguments. When it runs again, a weight among them may be another tensor.
    """

    def __init__(self, owner: Pass, function: Callable[..., Any], args: Any) -> None:
        self._owner, self._function, self._is_first = owner, function, True
        mode = owner.mode
        self._uses = {} if mode is None else mode.uses()
        self._known = [] if mode is None else [(i, t) for i, t in enumerate(pytree.tree_leaves(args)) if mode.knows(t)]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._is_first:
            self._is_first = False
            return self._function(*args, **kwargs)
        mode = self._owner.mode
        with self._owner.resumed(self._uses):
            if mode is not None and self._known:
                given = pytree.tree_leaves((args, kwargs))
                for i, before in self._known:
                    mode.recognise(given[i], before)
            return self._function(*args, **kwargs)


_implementation: Callable[..., Any] = checkpointing._checkpoint_impl
_lock = threading.Lock()
_watchers = 0


@contextlib.contextmanager
def _watching_segments() -> Iterator[None]:
    """Inside, checkpointed segments go through :func:`_checkpoint`; torch offers no hook for them."""
    global _watchers
    module = vars(checkpointing)
    with _lock:
        _watchers += 1
        module["_checkpoint_impl"] = _checkpoint
    try:
        yield
    finally:
        with _lock:
            _watchers -= 1
            if not _watchers:
                module["_checkpoint_impl"] = _implementation


def _checkpoint(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], **options: Any) -> Any:
    """Stands in for what ``torch.utils.checkpoint.checkpoint`` calls, so that a segment that reruns resumes its pass.

    The non-reentrant variant is always used. The reentrant one returns the same gradients, but runs one backward pass
    for each segment, and only the first of these could go through the weights, which come from one draw.

    :raises RuntimeError: inside ``vmap``, which cannot keep what a segment needs for later.
    """
    owner = _current.get()
    if owner is None:
        return _implementation(function, args, kwargs, **options)
    transforms = torch._C._functorch.get_interpreter_stack() or []
    kinds = {transform.key() for transform in transforms}
    if not torch.is_grad_enabled() or kinds - {torch._C._functorch.TransformType.Vmap}:
        return function(*args, **kwargs)  # under gradient transforms no segment runs again
    if kinds:
        raise RuntimeError("gradient checkpointing runs a part of the network again after vmap has ended")
    segment = _Segment(owner, function, (args, kwargs))
    return _implementation(segment, args, kwargs, **{**options, "use_reentrant": False})


def _reaches(value: object, modules: set[nn.Module]) -> bool:
    """Whether a value is or holds one of the modules, or a function that does."""
    held: Iterable[object] = ()
    if isinstance(value, nn.Module):
        return value in modules
    if isinstance(value, types.MethodType):
        held = (value.__self__,)
    elif isinstance(value, functools.partial):
        held = (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, types.FunctionType):
        held = [cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType()]
    elif isinstance(value, (list, tuple)):
        held = value
    elif isinstance(value, dict):
        held = value.values()
    return any(_reaches(one, modules) for one in held)
