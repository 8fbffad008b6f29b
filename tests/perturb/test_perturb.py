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
from perturb.layer_cases import (
    CASES,
    KEY,
    MEMBERS,
    QUERY,
    ROWS,
    SEQUENCE,
    SKIPPED,
    VALUE,
    Attention,
    Function,
    randint,
    randn,
)
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

import pyro_bnn as pb
from pyro_bnn.network import Network
from pyro_bnn.perturb import Call, Rank1Factors, Replacement, mode


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


@pytest.mark.parametrize("draws", DRAWS)
@pytest.mark.parametrize("name", CASES)
def test_rule(name: str, draws: str) -> None:
    """Proves one rule in one form: every row of the folded pass is the network with that row's explicit weights."""
    make, x = CASES[name]
    assert_exact(make().double(), x, draws=draws, skip=SKIPPED, members=MEMBERS, effects=draws == "row")


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
    weights, biases = parameters_of(net, SKIPPED)
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


class _Gradients(TorchDispatchMode):
    """Records for which arguments the gradient of a convolution is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[list[bool]] = []

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution_backward.default:
            self.masks.append(args[-1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("channels", "groups", "wanted"), [(1, 1, False), (3, 3, False), (3, 1, True)])
def test_factors_of_one_input_need_no_gradient_of_the_images(channels: int, groups: int, wanted: bool) -> None:
    """Proves that s of one channel (of a group) is applied to the result: images get no gradient."""
    net = nn.Conv2d(channels, 6, 3, groups=groups).double()
    perturbations = perturb(net, ["weight"], ["bias"], MEMBERS, ROWS)
    leaves = [t.requires_grad_() for p in perturbations.values() for t in p]
    y = Network(net).perturbed(randn(ROWS, channels, 5, 5), ROWS, perturbations, MEMBERS)
    with _Gradients() as seen:
        gradients = torch.autograd.grad(y.square().sum(), leaves)
    assert any(mask[0] for mask in seen.masks) is wanted
    assert all(bool(gradient.any()) for gradient in gradients)


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
    weights, biases = parameters_of(net, SKIPPED)
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
    monkeypatch.setattr(mode, "RULES", dict(mode.RULES))
    net = Function(lambda p, x: torch.einsum("bi,oi->bo", x, p.w) + torch.nn.functional.linear(x, p.w), w=randn(3, 4))
    x = randn(ROWS, 4)
    with pytest.raises(ValueError, match="parameter 'w' is random, but the network uses it in .*einsum.*no rule"):
        assert_exact(net, x)

    @pb.perturb.register(torch.einsum, signature=("equation", "x", "weight"), weights=("weight",))
    def _einsum(call: Call) -> Tensor:
        equation: str = call.equation
        return call.mode.product(lambda x, w, b: torch.einsum(equation, x, w), call.x, call.weight, None, dims=(-1, -1))

    for draws in DRAWS:
        assert_exact(net, x, draws=draws)


def test_a_registered_rule_can_pass_a_weight_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves `consumes=False`: the result carries the perturbation to the operation that uses it up."""
    monkeypatch.setattr(mode, "RULES", dict(mode.RULES))
    net = Function(lambda p, x: F.linear(x, p.w.transpose(0, 1)), w=randn(4, 3))
    x = randn(ROWS, 4)
    with pytest.raises(ValueError, match="'w' is random, but the network uses it in .*transpose"):
        assert_exact(net, x)

    @pb.perturb.register(Tensor.transpose, signature=("input", "first", "second"), consumes=False)
    def _transpose(call: Call) -> Tensor:
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
    assert Network(attention).consumed((QUERY, KEY, VALUE)) == names
    x = QUERY.float()
    for net in (tokens[0]().float(), attention.float()):
        inputs = (x, x, x) if net is attention else randn(ROWS, 5, 4).float()
        for example in (None, inputs):
            pb.models.Rank1(net, None, prior=pb.priors.Normal(), example=example)(inputs)
    refuse(
        attention.double(),
        (QUERY, KEY, VALUE),
        ValueError,
        "'attention.bias_k' is random, .*multi_head_attention_forward",
    )


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
    equal = (SEQUENCE, torch.tensor([7, 7, 7]))
    expected = row_by_row(net, equal, ROWS, perturbations, MEMBERS)
    assert relative(network.perturbed(equal, ROWS, perturbations, MEMBERS), expected).max() < TOLERANCE
    for lengths in ([3, 7, 5], [7, 7, 5], [7, 5, 3]):
        with pytest.raises(RuntimeError, match="'layer.weight_hh_l0', .* do not give"):
            network.perturbed((SEQUENCE, torch.tensor(lengths)), ROWS, perturbations, MEMBERS)


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
    refuse(packed, (SEQUENCE, torch.tensor([7, 5, 3])), RuntimeError, "enforce_sorted=False")
