"""The state that running a network changes: modes, running statistics, and which tensors take a gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from pyro_bnn.entry.threads import one_at_a_time
from pyro_bnn.precision import full_precision

_mode: ContextVar[bool | None] = ContextVar("mode", default=None)
_TABLES = (nn.Embedding, nn.EmbeddingBag)


@contextlib.contextmanager
def training_mode(train: bool) -> Iterator[None]:
    """Inside, every network and guide of this package that is called is first put into train or eval mode.

    Engines use it for programs that are plain functions, whose modules they cannot see.
    """
    token = _mode.set(train)
    try:
        yield
    finally:
        _mode.reset(token)


def enter_mode(module: nn.Module) -> None:
    """Sets the mode of a network or guide at the start of a call. See :func:`training_mode`."""
    train = _mode.get()
    if train is not None and module.training != train:
        module.train(train)


@contextlib.contextmanager
def keeping_modes(*programs: object) -> Iterator[None]:
    """Restores the modes of modules afterwards. A program that is not a module has none."""
    modules = [part for program in programs if isinstance(program, nn.Module) for part in program.modules()]
    modes = [(part, part.training) for part in modules]
    try:
        yield
    finally:
        for part, training in modes:
            if part.training != training:
                part.training = training


def settle(*programs: object) -> None:
    """Puts modules into eval mode, in which every engine leaves the programs that it returns."""
    for program in programs:
        # a tenth of the time of a prediction of a deep network would be spent on setting modes that are set
        if isinstance(program, nn.Module) and any(part.training for part in program.modules()):
            program.eval()


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Inside, every submodule is in eval mode; modes and buffers are restored afterwards."""
    with one_at_a_time, keeping_modes(module), _keeping_buffers(module):
        settle(module)
        yield


@contextlib.contextmanager
def _keeping_buffers(module: nn.Module) -> Iterator[None]:
    # Copies take the place of the buffers: a write into one of these, even of its old values, would invalidate the
    # graph of an earlier pass whose gradients are still to come, and a forward may also put new ones in their place.
    buffers = [(part, name, b) for part in module.modules() for name, b in part._buffers.items() if b is not None]
    copies = {id(buffer): buffer.clone() for _, _, buffer in buffers}
    try:
        for part, name, buffer in buffers:
            part._buffers[name] = copies[id(buffer)]
        yield
    finally:
        for part, name, buffer in buffers:
            part._buffers[name] = buffer


class RunningStatistics:
    """The running statistics of normalisation layers in a training step with several passes, one for each member.

    Every pass starts from the same statistics, which are updated once: to the mean of the results of the passes.

    :param layers: the layers whose statistics are updated.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._buffers = [(layer, name, b) for layer in layers for name, b in layer._buffers.items() if b is not None]
        self._ends: list[list[Tensor]] = []

    @contextlib.contextmanager
    def one_pass(self) -> Iterator[None]:
        """Inside, the layers update copies. See :func:`evaluating` for why they must not write to the buffers."""
        copies = {id(buffer): buffer.clone() for _, _, buffer in self._buffers}  # one, for layers that share it
        for layer, name, buffer in self._buffers:
            layer._buffers[name] = copies[id(buffer)]
        try:
            yield
            self._ends.append([layer.get_buffer(name) for layer, name, _ in self._buffers])
        finally:
            for layer, name, buffer in self._buffers:
                layer._buffers[name] = buffer

    def average(self) -> None:
        """Sets the statistics to their mean over all passes, and counts of batches to the count of one pass."""
        for (_, _, buffer), *ends in zip(self._buffers, *self._ends, strict=True):
            buffer.copy_(torch.stack(ends).mean(0) if buffer.is_floating_point() else ends[0])


@contextlib.contextmanager
def frozen(program: object) -> Iterator[None]:
    """Inside, a module is in eval mode without trainable parameters; afterwards all of its state is restored."""
    module = program if isinstance(program, nn.Module) else nn.Module()
    trained = [(p, p.requires_grad) for p in module.parameters()]
    with evaluating(module):
        module.requires_grad_(False)
        try:
            yield
        finally:
            for p, required in trained:
                p.requires_grad_(required)


@contextlib.contextmanager
def undisturbed(net: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, full precision; modes, buffers, tables with max_norm and random state are restored."""
    devices = {t.device for t in [*net.parameters(), *net.buffers()] if t.device.type == "cuda"}
    with contextlib.ExitStack() as stack:
        stack.enter_context(one_at_a_time)
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(torch.no_grad())
        stack.enter_context(full_precision())
        stack.enter_context(evaluating(net))
        stack.enter_context(_keeping_tables(net))
        yield


@contextlib.contextmanager
def _keeping_tables(net: nn.Module) -> Iterator[None]:
    """Restores the tables that every pass of the network writes to."""
    tables = [m.weight.data for m in net.modules() if isinstance(m, _TABLES) and m.max_norm is not None]
    values = [table.clone() for table in tables]
    try:
        yield
    finally:
        for table, value in zip(tables, values, strict=True):
            table.copy_(value)
