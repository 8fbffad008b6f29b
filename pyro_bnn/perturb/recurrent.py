"""The rules for ``nn.LSTM``, ``nn.GRU``, ``nn.RNN`` and their cells.

The fused kernels take one weight for all rows, so the recurrence is written out here. The factors of a row are the
same at every time step: one draw for each sequence (Dusenberry et al. 2020, section 3.4; appendix C.3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from pyro_bnn.perturb.factors import Rank1Factors, Replacement
from pyro_bnn.perturb.layout import Layout
from pyro_bnn.perturb.low_rank import LowRankFactors
from pyro_bnn.perturb.mode import Call, Perturb, register

State = tuple[Tensor, ...]
Cell = Callable[[Tensor, Tensor, State], State]


def _lstm_cell(i: Tensor, h: Tensor, state: State) -> State:
    into, forget, new, out = (i + h).chunk(4, -1)
    c = torch.sigmoid(forget) * state[1] + torch.sigmoid(into) * torch.tanh(new)
    return torch.sigmoid(out) * torch.tanh(c), c


def _gru_cell(i: Tensor, h: Tensor, state: State) -> State:
    (ir, iz, new), (hr, hz, hn) = i.chunk(3, -1), h.chunk(3, -1)
    z = torch.sigmoid(iz + hz)
    return ((1 - z) * torch.tanh(new + torch.sigmoid(ir + hr) * hn) + z * state[0],)


def _tanh_cell(i: Tensor, h: Tensor, state: State) -> State:
    return (torch.tanh(i + h),)


def _relu_cell(i: Tensor, h: Tensor, state: State) -> State:
    return (torch.relu(i + h),)


class _Linear:
    """``x -> x W'^T + b'`` for the sequences of a batch, in the order in which the recurrence holds them."""

    def __init__(self, mode: Perturb, weight: Tensor, bias: Tensor | None, rows: Callable[[Tensor], Tensor]) -> None:
        self.weight = weight
        self.bias = None if bias is None else bias.unsqueeze(0)
        self.r: Tensor | None = None
        self.s: Tensor | None = None
        self.low_rank: tuple[Tensor, Tensor] | None = None
        factors = mode.perturbations.get(id(weight))
        if isinstance(factors, Rank1Factors):
            self.r, self.s = rows(factors.r).to(weight.dtype), rows(factors.s).to(weight.dtype)
        elif isinstance(factors, LowRankFactors):
            member = torch.arange(mode.fold.members, device=weight.device).view(-1, 1, 1)
            own = rows(member)[:, 0]  # the member of every sequence
            a, b = (f if f.shape[0] == 1 else f[own] for f in (factors.A, factors.B * factors.scale))
            self.low_rank = a.to(weight.dtype), b.to(weight.dtype)
        offset = mode.perturbations.get(id(bias)) if bias is not None else None
        if isinstance(offset, Replacement):
            self.bias = rows(offset.value).to(weight.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` is ``[..., sequences, features]``; the sequences that are still running come first."""
        n = x.shape[-2]
        y = F.linear(x if self.s is None else x * _first(self.s, n), self.weight)
        y = y if self.r is None else y * _first(self.r, n)
        if self.low_rank is not None:
            a, b = (_first(factor, n) for factor in self.low_rank)
            y = y + (b @ (a @ x.unsqueeze(-1))).squeeze(-1)
        return y if self.bias is None else y + _first(self.bias, n)

    def steps(self, steps: Sequence[Tensor]) -> Sequence[Tensor]:
        """All time steps, in one product when they hold the same sequences."""
        if steps[0].shape == steps[-1].shape:
            return self(torch.stack(list(steps))).unbind(0)
        return [self(step) for step in steps]


def _first(values: Tensor, n: int) -> Tensor:
    return values if values.shape[0] == 1 else values[:n]


def _run(steps: Sequence[Tensor], initial: State, into: _Linear, recur: _Linear, cell: Cell, project: _Linear | None,
         reverse: bool) -> tuple[list[Tensor], State]:  # fmt: skip
    """One layer in one direction. Steps shrink as the sequences, sorted by length, end."""
    outputs: list[Tensor] = []
    ended: list[State] = []
    state = tuple(s[: steps[-1].shape[0]] for s in initial) if reverse else initial
    inputs = into.steps(steps)
    for x in reversed(inputs) if reverse else inputs:
        n, held = x.shape[0], state[0].shape[0]
        if n < held:
            ended.append(tuple(s[n:] for s in state))
            state = tuple(s[:n] for s in state)
        elif n > held:
            state = tuple(torch.cat([s, s0[held:n]]) for s, s0 in zip(state, initial, strict=True))
        state = cell(x, recur(state[0]), state)
        if project is not None:
            state = (project(state[0]), *state[1:])
        outputs.append(state[0])
    if ended:
        state = tuple(torch.cat(parts) for parts in zip(state, *reversed(ended), strict=True))
    return (outputs[::-1] if reverse else outputs), state


def _layers(call: Call, steps: Sequence[Tensor], initial: State, rows: Callable[[Tensor], Tensor], cell: Cell,
            train: bool) -> tuple[list[Tensor], State]:  # fmt: skip
    directions = 2 if call.bidirectional else 1
    blocks = call.num_layers * directions
    per_block = len(call.params) // blocks
    biases = call.has_biases
    finals: list[State] = []
    for layer in range(call.num_layers):
        sides: list[list[Tensor]] = []
        for direction in range(directions):
            block = layer * directions + direction
            weights = call.params[block * per_block : (block + 1) * per_block]
            b_in, b_rec = (weights[2], weights[3]) if biases else (None, None)
            projection = weights[-1] if per_block == (5 if biases else 3) else None
            outputs, final = _run(
                steps,
                tuple(s[block] for s in initial),
                _Linear(call.mode, weights[0], b_in, rows),
                _Linear(call.mode, weights[1], b_rec, rows),
                cell,
                None if projection is None else _Linear(call.mode, projection, None, rows),
                reverse=direction == 1,
            )
            sides.append(outputs)
            finals.append(final)
        steps = [torch.cat(parts, -1) for parts in zip(*sides, strict=True)]
        if call.dropout and train and layer + 1 < call.num_layers:
            steps = [F.dropout(step, call.dropout) for step in steps]
    return list(steps), tuple(torch.stack(parts) for parts in zip(*finals, strict=True))


def _perturbed(call: Call, tensors: Sequence[Tensor | None]) -> Tensor:
    return next(t for t in tensors if t is not None and call.perturbation(t) is not None)


def _aligned(mode: Perturb, layout: Layout, batch_dim: int) -> Callable[[Tensor], Tensor]:
    """Values of every row, in the order of the batch axis of the recurrence."""

    def rows(values: Tensor) -> Tensor:
        folded = mode.per_row(values)
        if folded.shape[0] == 1:
            return folded
        if layout.dim != batch_dim:
            raise ValueError(
                "a recurrent layer got an input whose batch axis does not hold the samples (or that does not depend "
                "on them): its rows cannot have weights of their own. Leave its weights out with `select=`."
            )
        return folded.view(1, -1, 1, folded.shape[-1]).expand(layout.outer, -1, layout.inner, -1).flatten(0, 2)

    return rows


def _packed(mode: Perturb, batch_sizes: Tensor) -> Callable[[Tensor], Tensor]:
    """Values of every row, in the order in which ``pack_padded_sequence`` sorted the sequences.

    ``batch_sizes`` identifies the order: it stays the same tensor when layers put other data into a ``PackedSequence``.
    """
    order = mode.reordered[id(batch_sizes)][1] if id(batch_sizes) in mode.reordered else None

    def rows(values: Tensor) -> Tensor:
        folded = mode.per_row(values)
        return folded if order is None or folded.shape[0] == 1 else folded[order]

    return rows


@register(Tensor.index_select, signature=("input", "dim", "index"), always=True, consumes=False)
def _watch_sort(call: Call) -> Tensor:
    result: Tensor = call.func(*call.args, **call.kwargs)
    # in a trace, sizes are symbols, and a comparison must not fix them
    if statically_known_true(call.index.numel() == call.mode.fold.members * call.mode.fold.rows):
        call.mode.reordered[id(result)] = (result, call.index)
    return result


@register(
    torch._C._VariableFunctions._pack_padded_sequence,
    signature=("input", "lengths", "batch_first"),
    always=True,
    consumes=False,
)
def _watch_pack(call: Call) -> tuple[Tensor, Tensor]:
    data, batch_sizes = call.func(*call.args, **call.kwargs)
    if id(call.input) in call.mode.reordered:
        call.mode.reordered[id(batch_sizes)] = (batch_sizes, call.mode.reordered[id(call.input)][1])
    return data, batch_sizes


def _register_recurrent(function: Any, cell: Cell, states: int) -> None:
    names = ("hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional")

    @register(function, signature=("input",))
    def _recurrent(call: Call) -> tuple[Tensor, ...]:
        packed = isinstance(call.args[1], Tensor) and isinstance(call.args[3], (list, tuple))
        signature = ("input", "batch_sizes", *names) if packed else ("input", *names, "batch_first")
        call.arguments = dict(zip(signature, call.args, strict=True))
        initial: State = tuple(call.hx) if states == 2 else (call.hx,)
        mode = call.mode
        if packed:
            steps = call.input.split(call.batch_sizes.tolist())
            outputs, final = _layers(call, steps, initial, _packed(mode, call.batch_sizes), cell, call.train)
            return (torch.cat(outputs), *final)
        layout = mode.locate(call.input, _perturbed(call, call.params))
        rows = _aligned(mode, layout, 0 if call.batch_first else 1)
        time = 1 if call.batch_first else 0
        outputs, final = _layers(call, call.input.unbind(time), initial, rows, cell, call.train)
        return (torch.stack(outputs, time), *final)


def _register_cell(function: Any, cell: Cell, states: int) -> None:
    weights = ("w_ih", "w_hh", "b_ih", "b_hh")

    @register(function, signature=("input", "hx", *weights), weights=weights)
    def _cell(call: Call) -> Tensor | State:
        b_ih, b_hh = call.arguments.get("b_ih"), call.arguments.get("b_hh")
        layout = call.mode.locate(call.input, _perturbed(call, (call.w_ih, call.w_hh, b_ih, b_hh)))
        rows = _aligned(call.mode, layout, 0)
        state: State = tuple(call.hx) if states == 2 else (call.hx,)
        into, recur = _Linear(call.mode, call.w_ih, b_ih, rows), _Linear(call.mode, call.w_hh, b_hh, rows)
        result = cell(into(call.input), recur(state[0]), state)
        return result if states == 2 else result[0]


for _name, _cell_function, _states in (
    ("lstm", _lstm_cell, 2),
    ("gru", _gru_cell, 1),
    ("rnn_tanh", _tanh_cell, 1),
    ("rnn_relu", _relu_cell, 1),
):
    _register_recurrent(getattr(torch, _name), _cell_function, _states)
    _register_cell(getattr(torch, f"{_name}_cell"), _cell_function, _states)
