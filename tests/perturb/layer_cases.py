"""Small networks, one for each rule and each way to call it, with an input for each."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS, MEMBERS = 3, 2


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randint(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(0))


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
    CASES[f"conv{_i}d of one channel"] = (lambda m=_conv: m(1, 3, 2), _x[:, :1])
    CASES[f"conv_transpose{_i}d of one channel"] = (lambda m=_back: m(1, 3, 2), _x[:, :1])
CASES["conv2d, kernel and stride by axis"] = (lambda: nn.Conv2d(4, 3, (3, 1), (1, 2), (0, 1)), randn(ROWS, 4, 6, 5))

QUERY, KEY, VALUE = randn(ROWS, 4, 8), randn(ROWS, 5, 8, seed=1), randn(ROWS, 5, 8, seed=2)
_PADDING = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0], [0, 0, 1, 0, 0]], dtype=torch.bool)
_MASK = torch.ones(4, 5, dtype=torch.bool).triu(2)
_MASKS = torch.stack([torch.stack([_MASK.roll(i, 1) & _MASK.roll(j, 0) for i in range(2)]) for j in range(ROWS)])
_SQUARE = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)
_PAST = torch.ones(4, 4, dtype=torch.bool).triu(1)


def _attend(options: dict[str, Any], arguments: dict[str, Any], form: str, *x: Tensor) -> Case:
    return lambda: Attention(options, arguments, form), (QUERY, KEY, VALUE, *x)


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
            (QUERY, randn(ROWS, 5, _options.get("kdim", 8)), randn(ROWS, 5, _options.get("vdim", 8), seed=3)),
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
    KEY,
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
        (QUERY, KEY, VALUE, _PADDING),
    )
    CASES[f"attention by its function, static keys and values, need_weights={_need}"] = (
        lambda n=_need: Function(
            lambda p, *x: _attend_by_function(
                p, *x, static_k=x[3].flatten(0, 1), static_v=x[4].flatten(0, 1), need_weights=n
            ),
            **_PROJECTIONS,
        ),
        (QUERY, KEY, VALUE, randn(ROWS, 2, 5, 4, seed=6), randn(ROWS, 2, 5, 4, seed=7)),
    )

SEQUENCE = randn(ROWS, 7, 4)
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
        CASES[f"{_kind}, {_name}"] = (lambda k=_kind, o=_options: Recurrent(k, **o), SEQUENCE)
    CASES[f"{_kind}, initial state"] = (
        lambda k=_kind: Recurrent(k, num_layers=2),
        (SEQUENCE, *(randn(ROWS, 2, 5, seed=i + 1) for i in range(_states))),
    )
    for _name, _options in {
        "": {},
        ", time first": {"first": False},
        ", two layers and directions": {"num_layers": 2, "bidirectional": True},
        ", no bias": {"bias": False, "bidirectional": True},
        ", one after the other": {"layers": 2, "bidirectional": True},
    }.items():
        _lengths = torch.tensor([3, 7, 5])
        CASES[f"{_kind}, packed{_name}"] = (lambda k=_kind, o=_options: Packed(k, **o), (SEQUENCE, _lengths))
    CASES[f"{_kind}Cell"] = (lambda k=_kind: Cell(f"{k}Cell"), SEQUENCE)
    CASES[f"{_kind}Cell, no bias"] = (lambda k=_kind: Cell(f"{k}Cell", bias=False), SEQUENCE)
CASES["LSTM, projected"] = (
    lambda: Recurrent("LSTM", proj_size=3, num_layers=2, bidirectional=True, batch_first=True),
    SEQUENCE,
)
CASES["LSTM, projected, packed, no bias"] = (
    lambda: Packed("LSTM", proj_size=3, bias=False),
    (SEQUENCE, torch.tensor([3, 7, 5])),
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
CASES["RNN, relu"] = (lambda: Recurrent("RNN", nonlinearity="relu"), SEQUENCE)
CASES["RNNCell, relu"] = (lambda: Cell("RNNCell", nonlinearity="relu"), SEQUENCE)

#: parameters that are inputs or keys, not weights of a product
SKIPPED = ("tokens", "q", "attention.bias_k", "attention.bias_v")
