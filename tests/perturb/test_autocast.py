"""Every rule under ``torch.autocast``: float32 factors meet activations of half precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from explicit import DRAWS, parameters_of, perturb, perturb_low_rank
from perturb.layer_cases import CASES, MEMBERS, ROWS, SKIPPED
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pyro_bnn.network import Network
from pyro_bnn.perturb import LowRankFactors, Perturbation, Rank1Factors, Replacement

#: unit roundoff of bfloat16, 8 significant bits
ROUNDOFF = 2.0**-8
#: without networks that hold masks of float64, which torch refuses in float32, and without most of the convolutions
#: over one and three axes, whose rule is that of two axes
NAMES = [
    name
    for name in CASES
    if not ("2-D mask, float" in name or "causal, float" in name)
    and not (("1d," in name or "3d," in name) and "plain" not in name)
]


def single(values: Any) -> Any:
    return pytree.tree_map(lambda v: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v, values)


def leaves_of(perturbations: dict[str, Perturbation]) -> tuple[dict[str, Perturbation], list[Tensor]]:
    """The same perturbations in float32, whose tensors are leaves, and these."""
    found: list[Tensor] = []

    def leaf(value: Tensor) -> Tensor:
        found.append(value.detach().float().requires_grad_())
        return found[-1]

    own: dict[str, Perturbation] = {}
    for name, p in perturbations.items():
        if isinstance(p, LowRankFactors):
            own[name] = LowRankFactors(leaf(p.A), leaf(p.B), p.scale)
        elif isinstance(p, Rank1Factors):
            own[name] = Rank1Factors(leaf(p.r), leaf(p.s))
        else:
            assert isinstance(p, Replacement)
            own[name] = Replacement(leaf(p.value))
    return own, found


def run(net: Network, x: Any, perturbations: dict[str, Perturbation], half: bool) -> tuple[Tensor, list[Tensor]]:
    """The folded output, and the gradients of a weighted sum of it by factors and parameters."""
    own, leaves = leaves_of(perturbations)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        y = net.perturbed(x, ROWS, own, MEMBERS)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    by = [*leaves, *(p for p in net.parameters() if p.requires_grad)]
    gradients = torch.autograd.grad((y.float() * weights).sum(), by, materialize_grads=True)
    assert [g.dtype for g in gradients] == [torch.float32] * len(by)
    return y.detach().float(), list(gradients)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def case(name: str, kind: str) -> tuple[Network, Any, dict[str, Perturbation]]:
    torch.manual_seed(0)
    make, x = CASES[name]
    net = make().float()
    weights, biases = parameters_of(net, SKIPPED)
    if kind == "low-rank":
        return Network(net), single(x), perturb_low_rank(net, weights, MEMBERS)
    return Network(net), single(x), perturb(net, weights, biases, MEMBERS, ROWS, kind, sizes=(0.7, 1.3), signs=False)


@pytest.mark.parametrize("kind", ["row", "low-rank"])
@pytest.mark.parametrize("name", NAMES)
def test_a_rule_rounds_as_often_as_the_layer_does(name: str, kind: str) -> None:
    """Proves that no rule fails on mixed types, that its output is that of float32 up to a few roundings (a layer makes
    about three, a recurrent one three at each step), and that gradients have the type of their parameters. The gradient
    has more roundings, and a sharp softmax multiplies them: its bound is eight times that."""
    if kind == "low-rank" and name.startswith("bilinear"):
        pytest.skip("bilinear layers have no low-rank rule")
    net, x, perturbations = case(name, kind)
    (full, exact), (half, rounded) = (run(net, x, perturbations, on) for on in (False, True))
    assert relative(half, full) <= 4 * ROUNDOFF
    for gradient, expected in zip(rounded, exact, strict=True):
        if expected.norm() > 1e-4:  # a bias under a softmax has none
            assert relative(gradient, expected) <= 32 * ROUNDOFF


def test_the_comparison_sees_a_factor_that_is_lost() -> None:
    """Proves that the bound of the test above is small against what a perturbation does."""
    net, x, perturbations = case("linear", "row")
    plain = net(x).detach()
    assert relative(run(net, x, perturbations, half=True)[0], plain.expand(MEMBERS, *plain.shape)) > 20 * ROUNDOFF


@pytest.mark.parametrize("layer", ["batch", "batch, evaluated", "group", "layer", "instance", "rms"])
@pytest.mark.parametrize("draws", DRAWS)
def test_gains_and_biases_of_members_meet_activations_of_half_precision(layer: str, draws: str) -> None:
    """Proves the same for normalisation layers behind a convolution, whose statistics stay in float32."""
    torch.manual_seed(0)
    norm = {
        "batch": nn.BatchNorm2d(6),
        "batch, evaluated": nn.BatchNorm2d(6).eval(),
        "group": nn.GroupNorm(2, 6),
        "layer": nn.LayerNorm(5),
        "instance": nn.InstanceNorm2d(6, affine=True),
        "rms": nn.RMSNorm(5),
    }[layer]
    net, x = Network(nn.Sequential(nn.Conv2d(2, 6, 2), norm)), torch.randn(ROWS, 2, 6, 6)
    names = [n for n, p in net.net.named_parameters() if p.dim() == 1]
    perturbations = perturb(net.net, ["0.weight"], names, MEMBERS, ROWS, draws, sizes=(0.7, 1.3), signs=False)
    (full, _), (half, _) = (run(net, x, perturbations, on) for on in (False, True))
    assert relative(half, full) <= 4 * ROUNDOFF
    assert all(b.dtype == torch.float32 for n, b in net.named_buffers() if "running" in n)


def test_a_pass_sees_the_weights_of_now_inside_of_one_autocast() -> None:
    """Proves that weights which change inside of one autocast context are used as they are: autocast itself keeps those
    of the first pass, and a first pass without gradients would leave the second without."""
    net = Network(nn.Linear(4, 3))
    x = torch.randn(ROWS, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            first = net(x)
        assert torch.autograd.grad(net(x).float().sum(), net.net.weight)[0].norm() > 0
        with torch.no_grad():
            net.net.weight.mul_(-1)
            net.net.bias.mul_(-1)
        assert torch.equal(net(x), -first)
