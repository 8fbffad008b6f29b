"""Every rule of `pyro_bnn.perturb` against the definition: one run for each row with W o (r s^T) in the network."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from explicit import (
    DRAWS,
    TOLERANCE,
    assert_exact,
    outer,
    parameters_of,
    perturb,
    relative,
    row_by_row,
    row_weights,
    sample,
)
from torch import Tensor, nn
from torch.func import functional_call

import pyro_bnn as pb
from pyro_bnn import perturb as rules
from pyro_bnn.network import Network
from pyro_bnn.perturb import Rank1Factors, Replacement

ROWS, MEMBERS = 3, 2


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randint(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# ---------------------------------------------------------------------------------------------- the definition


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 4), (6, 2, 3, 3), (2, 3, 2, 1, 2)])
def test_explicit_is_the_outer_product(shape: tuple[int, ...]) -> None:
    """Proves `Rank1Factors.explicit` by its equation, W[o, i, ...] r[o] s[i], for each of the four shapes of a draw."""
    weight = randn(*shape)
    for lead in DRAWS.values():
        r, s = randn(*lead(2, 3), shape[0], seed=1), randn(*lead(2, 3), shape[1], seed=2)
        for m in range(2):
            for b in range(3):
                one_r, one_s = r.expand(2, 3, -1)[m, b], s.expand(2, 3, -1)[m, b]
                expected = torch.einsum("oi...,o,i->oi...", weight, one_r, one_s)
                assert torch.allclose(Rank1Factors(r, s).explicit(weight, m, b), expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize(("out", "into", "groups"), [(6, 4, 2), (4, 4, 4), (8, 4, 4), (6, 9, 3)])
def test_explicit_numbers_the_channels_of_a_grouped_convolution_through_the_layer(
    out: int, into: int, groups: int
) -> None:
    """Proves that entry c of s belongs to channel c of the layer's input (of its output where it is transposed)."""
    x, r, s = randn(2, into, 5), randn(1, 1, out, seed=1), randn(1, 1, into, seed=2)
    weight = randn(out, into // groups, 3)
    explicit = Rank1Factors(r, s).explicit(weight, 0, 0)
    expected = F.conv1d(x * s[0, 0, :, None], weight, groups=groups) * r[0, 0, :, None]
    assert torch.allclose(F.conv1d(x, explicit, groups=groups), expected, rtol=1e-12, atol=1e-12)
    assert torch.allclose(explicit, outer(weight, r[0, 0], s[0, 0], groups), rtol=1e-15, atol=0)

    transposed = randn(into, out // groups, 3)
    explicit = Rank1Factors(s, r).explicit(transposed, 0, 0)
    expected = F.conv_transpose1d(x * s[0, 0, :, None], transposed, groups=groups) * r[0, 0, :, None]
    assert torch.allclose(F.conv_transpose1d(x, explicit, groups=groups), expected, rtol=1e-12, atol=1e-12)


def test_explicit_of_a_replacement_and_of_a_part() -> None:
    """Proves the same for a bias, which is replaced, and for the rows of a weight that is cut into parts."""
    value, bias = randn(2, 1, 4), randn(4, seed=1)
    assert torch.equal(Replacement(value).explicit(bias, 1, 2), value[1, 0])
    assert torch.equal(Replacement(value).narrow(1, 2).explicit(bias[1:3], 1, 2), value[1, 0, 1:3])
    factors, weight = Rank1Factors(randn(2, 3, 6), randn(2, 3, 4)), randn(6, 4, seed=1)
    assert torch.equal(factors.narrow(2, 3).explicit(weight[2:5], 1, 2), factors.explicit(weight, 1, 2)[2:5])
    assert torch.equal(factors.transposed().explicit(weight.t(), 1, 2), factors.explicit(weight, 1, 2).t())


# --------------------------------------------------------------------------------------------------- networks


class Function(nn.Module):
    """A network whose forward is a function of its parameters p and its inputs."""

    def __init__(self, forward: Callable[..., Tensor], **parameters: Tensor | nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, value in parameters.items():
            setattr(self, name, nn.Parameter(value) if isinstance(value, Tensor) else value)

    def forward(self, *x: Tensor) -> Tensor:
        return self.function(self, *x)


class Attention(nn.Module):
    """``nn.MultiheadAttention`` between batch-first input and output; 3-D masks come as [batch, heads, L, S]."""

    def __init__(self, options: dict[str, Any], arguments: dict[str, Any], form: str) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **options)
        self.first = options.get("batch_first", False)
        self.arguments, self.form = arguments, form

    def forward(self, *x: Tensor) -> Tensor:
        flip: Callable[[Tensor], Tensor] = (lambda t: t) if self.first else (lambda t: t.transpose(0, 1))
        inputs = [flip(t) for t in x[:3]]
        q, k, v = {"self": inputs[:1] * 3, "memory": [inputs[0], inputs[1], inputs[1]], "cross": inputs}[self.form]
        arguments = dict(self.arguments)
        if arguments.get("attn_mask") == "each":
            arguments["attn_mask"] = x[3].flatten(0, 1)
        if arguments.get("key_padding_mask") == "each":
            arguments["key_padding_mask"] = x[-1]
        y, weights = self.attention(q, k, v, **arguments)
        y = flip(y)
        return y if weights is None else torch.cat([y.flatten(1), weights.flatten(1)], 1)


class Recurrent(nn.Module):
    """A recurrent layer between batch-first input and output, with its final state."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.layer = getattr(nn, kind)(4, 5, **options)
        self.first, self.lstm = options.get("batch_first", False), kind == "LSTM"

    def forward(self, x: Tensor, *states: Tensor) -> Tensor:
        x = x if self.first else x.transpose(0, 1)
        h = tuple(s.transpose(0, 1).contiguous() for s in states)
        y, final = self.layer(x, None if not h else h if self.lstm else h[0])
        y = y if self.first else y.transpose(0, 1)
        finals = final if self.lstm else (final,)
        return torch.cat([y.flatten(1), *(f.transpose(0, 1).flatten(1) for f in finals)], 1)


class Packed(nn.Module):
    """Sequences of different lengths through packed recurrent layers: outputs and final state."""

    def __init__(self, kind: str, first: bool = True, layers: int = 1, **options: Any) -> None:
        super().__init__()
        width = 10 if options.get("bidirectional") else 5
        options |= {"batch_first": first}
        self.layers = nn.ModuleList([getattr(nn, kind)(width if i else 4, 5, **options) for i in range(layers)])
        self.first = first

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        x = x if self.first else x.transpose(0, 1)
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=self.first, enforce_sorted=False)
        finals = []
        for layer in self.layers:
            packed, final = layer(packed)
            finals += list(final) if isinstance(final, tuple) else [final]
            packed = packed._replace(data=packed.data.tanh())
        y, _ = nn.utils.rnn.pad_packed_sequence(packed, batch_first=True, total_length=7)
        return torch.cat([y.flatten(1), *(f.transpose(0, 1).flatten(1) for f in finals)], 1)


class Cell(nn.Module):
    """A recurrent cell over a sequence."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.cell = getattr(nn, kind)(4, 5, **options)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return torch.cat(state, 1) if isinstance(state, tuple) else state


Case = tuple[Callable[[], nn.Module], Any]
CASES: dict[str, Case] = {
    "linear": (lambda: nn.Linear(4, 3), randn(ROWS, 4)),
    "linear, no bias": (lambda: nn.Linear(4, 3, bias=False), randn(ROWS, 4)),
    "linear on sequences": (lambda: nn.Linear(4, 3), randn(ROWS, 5, 4)),
    "linear of one input": (lambda: nn.Linear(1, 1), randn(ROWS, 1)),
    "linear by keywords": (
        lambda: Function(lambda p, x: F.linear(weight=p.w, input=x, bias=p.b), w=randn(3, 4), b=randn(3)),
        randn(ROWS, 4),
    ),
    "linear, transposed weight": (lambda: Function(lambda p, x: F.linear(x, p.w.t()), w=randn(4, 3)), randn(ROWS, 4)),
    "linear, .T": (lambda: Function(lambda p, x: F.linear(x, p.w.T, p.b), w=randn(4, 3), b=randn(3)), randn(ROWS, 4)),
    "linear, .mT": (lambda: Function(lambda p, x: F.linear(x, p.w.mT), w=randn(4, 3)), randn(ROWS, 4)),
    "linear, copied weight": (
        lambda: Function(lambda p, x: F.linear(x, p.w.t().contiguous()), w=randn(4, 3)),
        randn(ROWS, 4),
    ),
    "linear, used twice": (lambda: Function(lambda p, x: p.l(p.l(x).tanh()), l=nn.Linear(4, 4)), randn(ROWS, 4)),
    "bilinear": (lambda: nn.Bilinear(4, 3, 5), (randn(ROWS, 4), randn(ROWS, 3, seed=1))),
    "bilinear on sequences": (
        lambda: nn.Bilinear(4, 3, 5, bias=False),
        (randn(ROWS, 2, 4), randn(ROWS, 2, 3, seed=1)),
    ),
    "bilinear of learned inputs": (
        lambda: Function(
            lambda p, x: x + p.l(p.tokens, p.q), l=nn.Bilinear(4, 3, 5), tokens=randn(2, 4), q=randn(2, 3)
        ),
        randn(ROWS, 2, 5),
    ),
    "x @ W": (lambda: Function(lambda p, x: x @ p.w, w=randn(4, 3)), randn(ROWS, 4)),
    "x @ W, sequences": (lambda: Function(lambda p, x: torch.matmul(x, p.w), w=randn(4, 3)), randn(ROWS, 5, 4)),
    "mm(x, W)": (lambda: Function(lambda p, x: torch.mm(x, p.w), w=randn(4, 3)), randn(ROWS, 4)),
    "x.matmul(W), by keyword": (lambda: Function(lambda p, x: x.matmul(other=p.w), w=randn(4, 3)), randn(ROWS, 4)),
    "x @ W.t()": (lambda: Function(lambda p, x: x @ p.w.t(), w=randn(3, 4)), randn(ROWS, 4)),
    "W @ x": (lambda: Function(lambda p, x: p.w @ x, w=randn(3, 4)), randn(ROWS, 4, 2)),
    "W.t() @ x": (lambda: Function(lambda p, x: p.w.t() @ x, w=randn(4, 3)), randn(ROWS, 4, 2)),
    "W @ x.t()": (lambda: Function(lambda p, x: (p.w @ x.t()).t(), w=randn(3, 4)), randn(ROWS, 4)),
    "W @ x.t(), sequences": (
        lambda: Function(lambda p, x: (p.w @ x.flatten(0, 1).t()).t().unflatten(0, (-1, 5)), w=randn(3, 4)),
        randn(ROWS, 5, 4),
    ),
    "W @ x.t(), sequences, time first": (
        lambda: Function(
            lambda p, x: (p.w @ x.transpose(0, 1).flatten(0, 1).t()).t().unflatten(0, (5, -1)).transpose(0, 1),
            w=randn(3, 4),
        ),
        randn(ROWS, 5, 4),
    ),
    "mm(W, x.t())": (lambda: Function(lambda p, x: torch.mm(p.w, x.t()).t(), w=randn(3, 4)), randn(ROWS, 4)),
    "addmm": (
        lambda: Function(lambda p, x: torch.addmm(p.b, x, p.w), w=randn(4, 3), b=randn(3)),
        randn(ROWS, 4),
    ),
    "embedding": (lambda: nn.Embedding(7, 4), randint(7, ROWS, 5)),
    "embedding of one index": (lambda: nn.Embedding(7, 4), randint(7, ROWS)),
    "embedding, padding_idx": (
        lambda: nn.Embedding(7, 4, padding_idx=2),
        torch.tensor([[0, 2, 3], [2, 5, 2], [1, 1, 6]]),
    ),
    "embedding, padding_idx of a row that is not zero": (
        lambda: nn.Embedding.from_pretrained(randn(7, 4), freeze=False, padding_idx=2),
        torch.tensor([[0, 2, 3], [2, 5, 2], [1, 1, 6]]),
    ),
    "embedding, time first": (
        lambda: Function(lambda p, i: p.e(i.t()).transpose(0, 1), e=nn.Embedding(7, 4)),
        randint(7, ROWS, 5),
    ),
    "embedding, flattened": (
        lambda: Function(lambda p, i: p.e(i.flatten()).unflatten(0, (-1, 5)), e=nn.Embedding(7, 4)),
        randint(7, ROWS, 5),
    ),
    "embedding, flattened with time first": (
        lambda: Function(lambda p, i: p.e(i.t().flatten()).unflatten(0, (5, -1)).transpose(0, 1), e=nn.Embedding(7, 4)),
        randint(7, ROWS, 5),
    ),
    "embedding of two axes": (lambda: nn.Embedding(7, 4), randint(7, ROWS, 2, 5)),
    "embedding of positions": (
        lambda: Function(lambda p, x: x + p.p(torch.arange(5)), p=nn.Embedding(5, 4)),
        randn(ROWS, 5, 4),
    ),
    "embedding of positions, batch of one": (
        lambda: Function(lambda p, x: x + p.p(torch.arange(5)[None]), p=nn.Embedding(5, 4)),
        randn(ROWS, 5, 4),
    ),
    "embedding of positions, expanded": (
        lambda: Function(lambda p, x: x + p.p(torch.arange(5).expand(x.shape[0], 5)), p=nn.Embedding(5, 4)),
        randn(ROWS, 5, 4),
    ),
    "linear on a learned input": (
        lambda: Function(lambda p, x: x + p.l(p.tokens), l=nn.Linear(4, 4), tokens=randn(5, 4)),
        randn(ROWS, 5, 4),
    ),
    "convolution of a learned input": (
        lambda: Function(lambda p, x: x + p.c(p.tokens), c=nn.Conv1d(2, 4, 3), tokens=randn(2, 7)),
        randn(ROWS, 4, 5),
    ),
}

for _i in (1, 2, 3):
    _conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[_i - 1]
    _back: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[_i - 1]
    _x = randn(ROWS, 4, *(6, 5, 5)[:_i])
    for _name, _options in {
        "plain": {"out_channels": 5, "kernel_size": 3},
        "no bias": {"out_channels": 5, "kernel_size": 2, "bias": False},
        "grouped": {"out_channels": 6, "kernel_size": 3, "groups": 2, "padding": 1},
        "depthwise": {"out_channels": 4, "kernel_size": 3, "groups": 4},
        "depthwise, multiplied": {"out_channels": 8, "kernel_size": 2, "groups": 4},
        "strided and dilated": {"out_channels": 3, "kernel_size": 2, "stride": 2, "dilation": 2, "padding": 1},
        "same": {"out_channels": 3, "kernel_size": 3, "padding": "same"},
        "circular": {"out_channels": 3, "kernel_size": 3, "padding": 1, "padding_mode": "circular"},
        "reflect": {"out_channels": 3, "kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
        "replicate": {"out_channels": 4, "kernel_size": 3, "padding": 2, "padding_mode": "replicate", "groups": 2},
    }.items():
        CASES[f"conv{_i}d, {_name}"] = (lambda m=_conv, o=_options: m(4, **o), _x)
    for _name, _options in {
        "plain": {"out_channels": 5, "kernel_size": 3},
        "no bias": {"out_channels": 5, "kernel_size": 2, "bias": False},
        "grouped": {"out_channels": 6, "kernel_size": 3, "groups": 2},
        "depthwise": {"out_channels": 4, "kernel_size": 3, "groups": 4},
        "output padding": {"out_channels": 6, "kernel_size": 3, "stride": 2, "output_padding": 1, "groups": 2},
        "dilated": {"out_channels": 3, "kernel_size": 2, "dilation": 2, "padding": 1},
    }.items():
        CASES[f"conv_transpose{_i}d, {_name}"] = (lambda m=_back, o=_options: m(4, **o), _x)
CASES["conv2d, kernel and stride by axis"] = (lambda: nn.Conv2d(4, 3, (3, 1), (1, 2), (0, 1)), randn(ROWS, 4, 6, 5))

_Q, _K, _V = randn(ROWS, 4, 8), randn(ROWS, 5, 8, seed=1), randn(ROWS, 5, 8, seed=2)
_PADDING = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0], [0, 0, 1, 0, 0]], dtype=torch.bool)
_MASK = torch.ones(4, 5, dtype=torch.bool).triu(2)
_MASKS = torch.stack([torch.stack([_MASK.roll(i, 1) & _MASK.roll(j, 0) for i in range(2)]) for j in range(ROWS)])
_SQUARE = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)
_PAST = torch.ones(4, 4, dtype=torch.bool).triu(1)


def _attend(options: dict[str, Any], arguments: dict[str, Any], form: str, *x: Tensor) -> Case:
    return lambda: Attention(options, arguments, form), (_Q, _K, _V, *x)


for _form in ("self", "memory", "cross"):
    for _first in (False, True):
        for _need in (False, True):
            _name = f"{_form}, batch_first={_first}, need_weights={_need}"
            CASES[f"attention, {_name}"] = _attend({"batch_first": _first}, {"need_weights": _need}, _form)
for _need in (False, True):
    _first, _arguments = not _need, {"need_weights": _need}
    for _name, _options, _form in (
        ("no bias", {"bias": False}, "self"),
        ("no bias", {"bias": False}, "cross"),
        ("bias_kv", {"add_bias_kv": True}, "cross"),
        ("zero_attn", {"add_zero_attn": True}, "self"),
        ("bias_kv and zero_attn", {"add_bias_kv": True, "add_zero_attn": True}, "memory"),
    ):
        CASES[f"attention, {_name}, {_form}, need_weights={_need}"] = _attend(
            _options | {"batch_first": _first}, _arguments, _form
        )
    for _name, _options in {
        "kdim and vdim": {"kdim": 6, "vdim": 3},
        "vdim": {"vdim": 3},
        "kdim, no bias": {"kdim": 6, "bias": False},
        "kdim and vdim, bias_kv": {"kdim": 6, "vdim": 3, "add_bias_kv": True},
    }.items():
        CASES[f"attention, {_name}, need_weights={_need}"] = (
            lambda o=_options | {"batch_first": _first}, a=_arguments: Attention(o, a, "cross"),
            (_Q, randn(ROWS, 5, _options.get("kdim", 8)), randn(ROWS, 5, _options.get("vdim", 8), seed=3)),
        )
    for _name, _mask, _x in (
        ("padding, bool", {"key_padding_mask": "each"}, (_PADDING,)),
        ("padding, float", {"key_padding_mask": "each"}, (-1.5 * _PADDING.double(),)),
        ("2-D mask, bool", {"attn_mask": _MASK}, ()),
        ("2-D mask, float", {"attn_mask": randn(4, 5, seed=4)}, ()),
        ("3-D mask, bool", {"attn_mask": "each"}, (_MASKS,)),
        ("3-D mask, float", {"attn_mask": "each"}, (randn(ROWS, 2, 4, 5, seed=5),)),
        ("2-D mask and padding", {"attn_mask": _MASK, "key_padding_mask": "each"}, (_PADDING,)),
        (
            "3-D mask and padding, float",
            {"attn_mask": "each", "key_padding_mask": "each"},
            (randn(ROWS, 2, 4, 5, seed=5), -1.5 * _PADDING.double()),
        ),
    ):
        for _options in ({}, {"add_bias_kv": True, "add_zero_attn": True}):
            _name_ = f"attention, {_name}{', bias_kv and zero_attn' if _options else ''}, need_weights={_need}"
            CASES[_name_] = _attend(_options | {"batch_first": _first}, _arguments | _mask, "memory", *_x)
    for _name, _mask in (("float", _SQUARE), ("bool", _PAST)):
        CASES[f"attention, causal, {_name}, need_weights={_need}"] = _attend(
            {"batch_first": _first}, _arguments | {"attn_mask": _mask, "is_causal": True}, "self"
        )
CASES["attention, weights of each head"] = _attend({}, {"average_attn_weights": False}, "cross")
CASES["attention, learned queries"] = (
    lambda: Function(
        lambda p, x: p.a(p.q.expand(x.shape[0], -1, -1), x, x, need_weights=False)[0],
        a=nn.MultiheadAttention(8, 2, batch_first=True),
        q=randn(1, 3, 8),
    ),
    _K,
)


def _attend_by_function(p: Any, *x: Tensor, **options: Any) -> Tensor:
    """The function below ``nn.MultiheadAttention``: boolean masks reach it as they are, and so do ready keys."""
    q, k, v = (t.transpose(0, 1) for t in x[:3])
    arguments = (8, 2, p.into, p.into_bias, None, None, False, 0.0, p.out, p.out_bias)
    return F.multi_head_attention_forward(q, k, v, *arguments, **options)[0].transpose(0, 1)


_PROJECTIONS = {"into": randn(24, 8), "into_bias": randn(24), "out": randn(8, 8, seed=1), "out_bias": randn(8, seed=1)}
for _need in (False, True):
    CASES[f"attention by its function, bool masks, need_weights={_need}"] = (
        lambda n=_need: Function(
            lambda p, *x: _attend_by_function(p, *x, attn_mask=_MASK, key_padding_mask=x[3], need_weights=n),
            **_PROJECTIONS,
        ),
        (_Q, _K, _V, _PADDING),
    )
    CASES[f"attention by its function, static keys and values, need_weights={_need}"] = (
        lambda n=_need: Function(
            lambda p, *x: _attend_by_function(
                p, *x, static_k=x[3].flatten(0, 1), static_v=x[4].flatten(0, 1), need_weights=n
            ),
            **_PROJECTIONS,
        ),
        (_Q, _K, _V, randn(ROWS, 2, 5, 4, seed=6), randn(ROWS, 2, 5, 4, seed=7)),
    )

_SEQUENCE = randn(ROWS, 7, 4)
for _kind, _states in (("LSTM", 2), ("GRU", 1), ("RNN", 1)):
    for _name, _options in {
        "plain": {},
        "batch first": {"batch_first": True},
        "no bias": {"bias": False},
        "two layers": {"num_layers": 2, "batch_first": True},
        "two directions": {"bidirectional": True},
        "two layers and directions, no bias": {"num_layers": 2, "bidirectional": True, "bias": False},
        "dropout at zero": {"num_layers": 2, "dropout": 0.0},
    }.items():
        CASES[f"{_kind}, {_name}"] = (lambda k=_kind, o=_options: Recurrent(k, **o), _SEQUENCE)
    CASES[f"{_kind}, initial state"] = (
        lambda k=_kind: Recurrent(k, num_layers=2),
        (_SEQUENCE, *(randn(ROWS, 2, 5, seed=i + 1) for i in range(_states))),
    )
    for _name, _options in {
        "": {},
        ", time first": {"first": False},
        ", two layers and directions": {"num_layers": 2, "bidirectional": True},
        ", no bias": {"bias": False, "bidirectional": True},
        ", one after the other": {"layers": 2, "bidirectional": True},
    }.items():
        _lengths = torch.tensor([3, 7, 5])
        CASES[f"{_kind}, packed{_name}"] = (lambda k=_kind, o=_options: Packed(k, **o), (_SEQUENCE, _lengths))
    CASES[f"{_kind}Cell"] = (lambda k=_kind: Cell(f"{k}Cell"), _SEQUENCE)
    CASES[f"{_kind}Cell, no bias"] = (lambda k=_kind: Cell(f"{k}Cell", bias=False), _SEQUENCE)
CASES["LSTM, projected"] = (
    lambda: Recurrent("LSTM", proj_size=3, num_layers=2, bidirectional=True, batch_first=True),
    _SEQUENCE,
)
CASES["LSTM, projected, packed, no bias"] = (
    lambda: Packed("LSTM", proj_size=3, bias=False),
    (_SEQUENCE, torch.tensor([3, 7, 5])),
)
CASES["LSTM, words of a text"] = (
    lambda: Function(lambda p, x: p.r(x.flatten(0, 1))[0].unflatten(0, (-1, 2)), r=nn.LSTM(4, 5, batch_first=True)),
    randn(ROWS, 2, 6, 4),
)
CASES["GRUCell, words of a text, text behind"] = (
    lambda: Function(
        lambda p, x: p.c(h := x.transpose(0, 1).flatten(0, 1), p.c(h)).unflatten(0, (4, -1)).transpose(0, 1),
        c=nn.GRUCell(4, 5),
    ),
    randn(ROWS, 4, 4),
)
CASES["RNN, relu"] = (lambda: Recurrent("RNN", nonlinearity="relu"), _SEQUENCE)
CASES["RNNCell, relu"] = (lambda: Cell("RNNCell", nonlinearity="relu"), _SEQUENCE)

#: parameters that are inputs or keys, not weights of a product
_SKIP = ("tokens", "q", "attention.bias_k", "attention.bias_v")


@pytest.mark.parametrize("draws", DRAWS)
@pytest.mark.parametrize("name", CASES)
def test_rule(name: str, draws: str) -> None:
    """Proves one rule in one form: every row of the folded pass is the network with that row's explicit weights."""
    make, x = CASES[name]
    assert_exact(make().double(), x, draws=draws, skip=_SKIP, members=MEMBERS, effects=draws == "row")


@pytest.mark.parametrize("draws", DRAWS)
def test_rule_of_conv1d_of_transformers(draws: str) -> None:
    """Proves the rule for the layer that GPT-2 is made of, which stores its weight as [in, out]."""
    layer = pytest.importorskip("transformers.pytorch_utils").Conv1D(5, 4)
    assert_exact(layer.double(), randn(ROWS, 6, 4), draws=draws)
    assert Network(layer).product_weights() == ["weight"]


@pytest.mark.parametrize(
    "mixed", [("shared", "row"), ("row", "shared"), ("member", "row"), ("shared", "member"), ("sample", "member")]
)
@pytest.mark.parametrize("name", ["linear", "conv2d, grouped", "embedding", "LSTM, plain", "linear on a learned input"])
def test_r_s_and_bias_of_different_shapes(name: str, mixed: tuple[str, str]) -> None:
    """Proves that r, s and the bias need not agree on whether they differ between members and between rows."""
    make, x = CASES[name]
    net = make().double()
    weights, biases = parameters_of(net, _SKIP)
    one, other = (perturb(net, weights, biases, MEMBERS, ROWS, draws) for draws in mixed)
    for bias in ("member", "shared", "row"):
        perturbations = {n: Rank1Factors(one[n].r, other[n].s) for n in weights}
        perturbations |= perturb(net, [], biases, MEMBERS, ROWS, bias, seed=1)
        assert_exact(net, x, perturbations=perturbations)


def test_some_parameters_only() -> None:
    """Proves that a weight or a bias alone can be perturbed, and each part of a layer with several weights."""
    for name in (
        "linear",
        "conv1d, grouped",
        "conv_transpose1d, grouped",
        "LSTM, two directions",
        "GRUCell",
        "attention, self, batch_first=True, need_weights=False",
        "attention, cross, batch_first=False, need_weights=True",
        "attention, kdim and vdim, need_weights=False",
    ):
        make, x = CASES[name]
        net = make().double()
        for parameter, _ in net.named_parameters():
            assert_exact(net, x, skip=[n for n, _ in net.named_parameters() if n != parameter])


def test_factors_of_one_group_serve_all_groups() -> None:
    """Proves the short form of s for grouped convolutions: one entry for each channel of a group."""
    for net in (nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 3, groups=2), nn.Conv2d(4, 8, 3, groups=4)):
        net = net.double()
        perturbations = perturb(net, ["weight"], ["bias"], MEMBERS, ROWS)
        factors = perturbations["weight"]
        assert isinstance(factors, Rank1Factors)
        perturbations["weight"] = Rank1Factors(factors.r, factors.s[..., : net.weight.shape[1]])
        assert_exact(net, randn(ROWS, 4, 5, 5), perturbations=perturbations)


def test_factors_follow_the_dtype_of_the_network() -> None:
    """Proves that a pass keeps its dtype: half-way factors do not widen float32, nor a bias the result of autocast."""
    net = Network(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    x = randn(ROWS, 4).float()
    for biases in ([], ["2.bias"]):
        perturbations = perturb(net.net, ["0.weight", "2.weight"], biases, MEMBERS, ROWS)
        assert net.perturbed(x, ROWS, perturbations, MEMBERS).dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert net(x).dtype == net.perturbed(x, ROWS, perturbations, MEMBERS).dtype == torch.bfloat16


def test_a_cast_weight_keeps_its_factors() -> None:
    """Proves that a weight carries its factors into another precision (powers of two, which rounding leaves alone)."""
    for cast in (Tensor.double, lambda w: w.to(torch.float64), lambda w: w.type_as(randn(1))):
        net = Function(lambda p, x, c=cast: F.linear(x, c(p.w), c(p.b)), w=randn(3, 4).float(), b=randn(3).float())
        r, s = (torch.randint(-2, 3, (MEMBERS, ROWS, n)).double().exp2() for n in (3, 4))
        perturbations = {"w": Rank1Factors(r, s), "b": Replacement(randn(MEMBERS, 1, 3).float().double())}
        x = randn(ROWS, 4)
        folded = Network(net).perturbed(x, ROWS, perturbations, MEMBERS)
        assert folded.dtype == torch.float64
        assert relative(folded, row_by_row(net, x, ROWS, perturbations, MEMBERS)).max() <= TOLERANCE


# -------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("draws", DRAWS)
@pytest.mark.parametrize(
    "name",
    [
        *(
            "linear",
            "linear, used twice",
            "x @ W",
            "bilinear",
            "embedding",
            "embedding, padding_idx",
            "embedding, padding_idx of a row that is not zero",
        ),
        *("conv2d, grouped", "conv2d, depthwise", "conv1d, circular", "conv_transpose2d, grouped"),
        *("LSTM, two layers", "LSTM, packed, two layers and directions", "GRU, two directions", "GRUCell"),
        *(f"attention, {form}, batch_first=True, need_weights={need}" for form in ("self", "cross") for need in (0, 1)),
        "attention, kdim and vdim, bias_kv, need_weights=False",
    ],
)
def test_gradients(name: str, draws: str) -> None:
    """Proves that gradients of the network's parameters, of r, s and biases are those of the loop over rows."""
    make, x = CASES[name.replace("=0", "=False").replace("=1", "=True")]
    net = make().double()
    weights, biases = parameters_of(net, _SKIP)
    leaves: dict[str, list[Tensor]] = {}
    perturbations: dict[str, Any] = {}
    for n, p in perturb(net, weights, biases, MEMBERS, ROWS, draws).items():
        leaves[n] = [t.clone().requires_grad_() for t in p]
        perturbations[n] = type(p)(*leaves[n])
    network = Network(net)
    folded = network.perturbed(x, ROWS, perturbations, MEMBERS)
    expected = torch.stack(
        [
            functional_call(net, row_weights(net, perturbations, m, b), x_b if isinstance(x_b, tuple) else (x_b,))[0]
            for m in range(MEMBERS)
            for b in range(ROWS)
            for x_b in [sample(x, ROWS, b)]
        ]
    ).unflatten(0, (MEMBERS, ROWS))
    out = randn(*folded.shape, seed=9)
    flat = [t for pair in leaves.values() for t in pair]
    ours = torch.autograd.grad((folded * out).sum(), [*network.net.parameters(), *flat], allow_unused=True)
    loop = torch.autograd.grad((expected * out).sum(), [*net.parameters(), *flat], allow_unused=True)
    for parameter, a, b in zip([*dict(net.named_parameters()), *["factor"] * len(flat)], ours, loop, strict=True):
        assert (a is None) == (b is None), f"only one of the two passes used {parameter}"
        if a is not None and b is not None:
            assert b.any()
            assert (a - b).abs().max() <= TOLERANCE * b.abs().max(), f"gradient of {parameter}"
    assert all(g is not None for g in ours[-len(flat) :])


# ----------------------------------------------------------------------------------------- rules of the user's own


def test_a_registered_rule_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves the extension point: an operation without a rule is refused, and exact once its rule is registered."""
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))
    net = Function(lambda p, x: torch.einsum("bi,oi->bo", x, p.w) + torch.nn.functional.linear(x, p.w), w=randn(3, 4))
    x = randn(ROWS, 4)
    with pytest.raises(ValueError, match="parameter 'w' is random, but the network uses it in .*einsum.*no rule"):
        assert_exact(net, x)

    @pb.perturb.register(torch.einsum, signature=("equation", "x", "weight"), weights=("weight",))
    def _einsum(call: rules.Call) -> Tensor:
        equation: str = call.equation
        return call.mode.product(lambda x, w, b: torch.einsum(equation, x, w), call.x, call.weight, None, dims=(-1, -1))

    for draws in DRAWS:
        assert_exact(net, x, draws=draws)


def test_a_registered_rule_can_pass_a_weight_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves `consumes=False`: the result carries the perturbation to the operation that uses it up."""
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))
    net = Function(lambda p, x: F.linear(x, p.w.transpose(0, 1)), w=randn(4, 3))
    x = randn(ROWS, 4)
    with pytest.raises(ValueError, match="'w' is random, but the network uses it in .*transpose"):
        assert_exact(net, x)

    @pb.perturb.register(Tensor.transpose, signature=("input", "first", "second"), consumes=False)
    def _transpose(call: rules.Call) -> Tensor:
        perturbation = call.perturbation(call.input)
        assert isinstance(perturbation, Rank1Factors)
        return call.mode.derive(call.func(*call.args), call.input, perturbation.transposed())

    assert_exact(net, x)
    assert Network(net).consumed(x) == {"w"}


# ----------------------------------------------------------------------------------------------------- refusals


def refuse(net: nn.Module, x: Any, error: type[Exception], message: str, skip: tuple[str, ...] = ()) -> None:
    """Perturbing the network fails with the message, and leaves its state as it was."""
    network = Network(net.double().train())
    before = copy.deepcopy(network.net.state_dict())
    size = (x[0] if isinstance(x, tuple) else x).shape[0]
    perturbations = perturb(net, *parameters_of(net, skip), MEMBERS, size)
    with pytest.raises(error, match=message):
        network.perturbed(x, size, perturbations, MEMBERS)
    after = network.net.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(module.training for module in network.net.modules())


def test_a_parameter_that_is_never_used_is_refused() -> None:
    """Proves that a random weight which the forward pass does not reach is an error that names it."""
    net = Function(lambda p, x: p.used(x), used=nn.Linear(4, 3), idle=nn.Linear(4, 3))
    refuse(net, randn(ROWS, 4), ValueError, "'idle.bias' is random, but .* never used it .*1 others: idle.weight")
    turned = Function(lambda p, x: (p.used(x), p.idle.t())[0], used=nn.Linear(4, 3), idle=randn(3, 4))
    refuse(turned, randn(ROWS, 4), ValueError, "'idle' is random, but .* never used it")


@pytest.mark.parametrize(
    ("forward", "operation"),
    [
        (lambda p, x: x * p.w, "torch.Tensor.mul"),
        (lambda p, x: F.linear(x, p.w.reshape(3, 4)), "torch.Tensor.reshape"),
        (lambda p, x: F.linear(x, p.w[:2]), "torch.Tensor.__getitem__"),
        (lambda p, x: F.linear(x, p.w.detach()), "torch.Tensor.detach"),
        (lambda p, x: F.linear(x, p.w.data), "torch.Tensor.data"),
        (lambda p, x: F.linear(x, p.w) + p.w.sum(), "torch.Tensor.sum"),
        (lambda p, x: F.linear(x, p.w) + p.w.t().norm(), "torch.Tensor.norm"),
        (lambda p, x: F.linear(p.w, x).t() + F.linear(x, p.w), "torch.nn.functional.linear"),
    ],
)
def test_a_use_without_a_rule_is_refused(forward: Callable[..., Tensor], operation: str) -> None:
    """Proves that every use of a random weight must have a rule, also beside a use that has one; both are named."""
    x = randn(4, 4) if operation != "torch.Tensor.mul" else randn(4, 3, 4)
    refuse(
        Function(forward, w=randn(3, 4)), x, ValueError, f"'w' is random, .* in {re.escape(operation)}, which has no"
    )


def test_a_bias_without_a_rule_is_refused() -> None:
    """Proves the same for a vector, such as a gain beside a weight."""
    net = Function(lambda p, x: F.linear(x, p.w) * p.gain, w=randn(3, 4), gain=randn(3))
    refuse(net, randn(ROWS, 4), ValueError, "'gain' is random, .*Tensor.mul.*member_bias=False")


def test_reading_shape_or_dtype_is_no_use() -> None:
    """Proves that a network may make tensors like a weight, and ask for its shape, dtype and device."""

    def forward(p: Any, x: Tensor) -> Tensor:
        like = torch.zeros_like(p.w).sum() + p.w.new_ones(p.w.shape[0]) + x.type_as(p.w).sum() * 0
        return F.linear(x.to(p.w.dtype).to(p.w.device).to(p.w), p.w) + like

    assert_exact(Function(forward, w=randn(3, 4)), randn(ROWS, 4))


def test_inputs_and_keys_that_are_parameters_are_no_weights() -> None:
    """Proves that learned inputs of a layer, and the keys that attention adds, are not taken for its weights."""
    tokens = CASES["linear on a learned input"]
    assert Network(tokens[0]().double()).consumed(tokens[1]) == {"l.weight", "l.bias"}
    attention = Attention({"add_bias_kv": True, "batch_first": True}, {}, "self").double()
    names = {f"attention.{n}" for n in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")}
    assert Network(attention).consumed((_Q, _K, _V)) == names
    x = _Q.float()
    for net in (tokens[0]().float(), attention.float()):
        inputs = (x, x, x) if net is attention else randn(ROWS, 5, 4).float()
        for example in (None, inputs):
            pb.models.Rank1(net, None, prior=pb.priors.Normal(), example=example)(inputs)
    refuse(attention.double(), (_Q, _K, _V), ValueError, "'attention.bias_k' is random, .*multi_head_attention_forward")


@pytest.mark.parametrize("use", ["values", "mode"])
def test_a_number_of_uses_that_depends_on_the_batch_is_refused(use: str) -> None:
    """Proves that a weight used once more than in the probe is an error that names it and the remedy."""

    def forward(p: nn.Module, x: Tensor, n: Tensor) -> Tensor:
        for _ in range(int(n.max())) if use == "values" else range(2 if p.training else 1):
            x = p.l(x)
        return x

    net = Network(Function(forward, l=nn.Linear(4, 4)).double().train(use == "mode"))
    perturbations = perturb(net.net, ["l.weight"], ["l.bias"], MEMBERS, ROWS)
    x = randn(ROWS, 4)
    with pytest.raises(RuntimeError, match="used parameter 'l.weight' 2 times in this call, but 1 times when it was"):
        net.perturbed((x, torch.tensor([1, 1, 1])), ROWS, perturbations, MEMBERS)
        net.perturbed((x, torch.tensor([2, 2, 2])), ROWS, perturbations, MEMBERS)


def test_a_network_that_mixes_its_rows_is_refused() -> None:
    """Proves that rows which see each other are refused, whether that shows before, between or after the weights."""
    x = randn(ROWS, 4)
    layers: dict[str, nn.Module] = {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}
    before = Function(lambda p, x: p.b(p.a(x - x.mean(0))), **layers)
    refuse(before, x, RuntimeError, "cannot be told apart where parameter 'a.weight' is used")
    between = Function(lambda p, x: p.b(p.a(x).flip(0)), **layers)
    refuse(between, x, RuntimeError, "cannot be told apart where parameter 'b.weight' is used")
    after = Function(lambda p, x: p.a(x) - p.a(x).mean(0) + p.b(x), **layers)
    refuse(after, x, RuntimeError, "own for 'a.weight', .* do not give .*treats the rows of a batch differently")
    norm = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 4))
    refuse(norm, x, RuntimeError, "cannot be told apart where parameter '2.weight'", skip=("1.weight", "1.bias"))


@pytest.mark.parametrize("gate", [torch.zeros(1), torch.zeros(()), torch.full((4,), 1e-9)])
def test_nothing_hides_behind_a_closed_gate(gate: Tensor) -> None:
    """Proves that the check of the fold opens gates, gains and layers that start at or near zero, and closes them."""
    net = Function(
        lambda p, x: p.a(x) + p.gate * (p.b(x) - p.b(x).mean(0)), a=nn.Linear(4, 4), b=nn.Linear(4, 4), gate=gate
    )
    refuse(net, randn(ROWS, 4), RuntimeError, "own for .*'b.weight', .* do not give", skip=("gate",))


def test_rows_that_are_left_out_are_refused() -> None:
    """Proves that a network which sends only some of its rows through a weight is refused, also if not at first."""

    def forward(p: Any, x: Tensor) -> Tensor:
        chosen = ~(x[:, 0] < 0)
        return x.masked_scatter(chosen[:, None].expand_as(x), p.l(x[chosen]))

    network = Network(Function(forward, l=nn.Linear(4, 4)).double())
    perturbations = perturb(network.net, ["l.weight"], ["l.bias"], MEMBERS, ROWS)
    x = randn(ROWS, 4).abs()
    network.perturbed(x, ROWS, perturbations, MEMBERS)
    with pytest.raises(RuntimeError, match=r"'l.weight' saw an input of shape \(4, 4\).* 1 x 6 rows x 1 entries"):
        network.perturbed(x * torch.tensor([[1.0], [-1.0], [1.0]]), ROWS, perturbations, MEMBERS)


def test_rows_in_another_order_are_refused() -> None:
    """Proves that a network which sorts its samples is refused, as soon as they differ by what it sorts."""

    def forward(p: Any, x: Tensor, lengths: Tensor) -> Tensor:
        lengths, order = lengths.sort(descending=True, stable=True)
        packed = nn.utils.rnn.pack_padded_sequence(x[order], lengths, batch_first=True)
        return p.layer(packed)[1][0][order.argsort()]

    net = Function(forward, layer=nn.GRU(4, 5, batch_first=True)).double()
    network = Network(net)
    perturbations = perturb(net, *parameters_of(net), MEMBERS, ROWS)
    equal = (_SEQUENCE, torch.tensor([7, 7, 7]))
    expected = row_by_row(net, equal, ROWS, perturbations, MEMBERS)
    assert relative(network.perturbed(equal, ROWS, perturbations, MEMBERS), expected).max() < TOLERANCE
    for lengths in ([3, 7, 5], [7, 7, 5], [7, 5, 3]):
        with pytest.raises(RuntimeError, match="'layer.weight_hh_l0', .* do not give"):
            network.perturbed((_SEQUENCE, torch.tensor(lengths)), ROWS, perturbations, MEMBERS)


def test_what_has_no_rank1_form_is_refused() -> None:
    """Proves the messages for forms that cannot have weights of their own in each row."""
    refuse(nn.Embedding(7, 4, max_norm=1.0), randint(7, ROWS, 5), ValueError, "'weight' has max_norm")
    scaled = Function(lambda p, x: torch.addmm(p.b, x, p.w, beta=2), w=randn(4, 3), b=randn(3))
    refuse(scaled, randn(ROWS, 4), TypeError, "torch.addmm with beta or alpha has no rule")
    attend = Function(lambda p, x: p.a(x, x, x)[0], a=nn.MultiheadAttention(4, 2))
    refuse(attend, randn(ROWS, 4), ValueError, r"unbatched query of shape \(3, 4\)")
    sequences = Function(lambda p, x: p.r(x)[0], r=nn.GRU(4, 5))
    refuse(sequences, randn(ROWS, 6, 4), ValueError, "recurrent layer got an input whose batch axis does not hold")
    packed = Function(
        lambda p, x, n: p.r(nn.utils.rnn.pack_padded_sequence(x, n, batch_first=True))[1][0],
        r=nn.GRU(4, 5, batch_first=True),
    )
    refuse(packed, (_SEQUENCE, torch.tensor([7, 5, 3])), RuntimeError, "enforce_sorted=False")
