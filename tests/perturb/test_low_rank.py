"""Low-rank factors against explicit weights W + scale B A: every rule, whole networks, gradients, both modes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from explicit import (
    TOLERANCE,
    assert_exact,
    parameters_of,
    perturb,
    perturb_low_rank,
    relative,
    row_by_row,
)
from perturb.layer_cases import CASES, MEMBERS, ROWS, SKIPPED, randn
from perturb.whole_networks import (
    ARCHITECTURES,
    NAMES,
    SEQUENCES,
    Subject,
    calibrate,
    looped,
    norm_parameters,
    randomise,
    without_noise,
)
from torch import nn

from pyro_bnn.network import Network
from pyro_bnn.perturb import LowRankFactors, Replacement


def randn_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_explicit_is_the_sum() -> None:
    """Proves `LowRankFactors.explicit` by its equation, with its transpose and its parts."""
    weight, a, b = randn_of(4, 3, 2, 2), randn_of(2, 5, 3, 2, 2, seed=1), randn_of(1, 4, 5, seed=2)
    factors = LowRankFactors(a, b, 0.3)
    expected = weight + 0.3 * torch.einsum("or,rikl->oikl", b[0], a[1])
    assert torch.allclose(factors.explicit(weight, 1, 0), expected, rtol=1e-13, atol=0)
    assert torch.allclose(factors.narrow(1, 2).explicit(weight[1:3], 1, 0), expected[1:3], rtol=1e-13, atol=0)
    matrix = LowRankFactors(a[:, :, :, 0, 0], b, 0.3)
    turned = matrix.transposed().explicit(weight[:, :, 0, 0].t(), 1, 0)
    assert torch.allclose(turned, matrix.explicit(weight[:, :, 0, 0], 1, 0).t(), rtol=1e-13, atol=0)


def unsupported(name: str) -> bool:
    return name.startswith("bilinear")


@pytest.mark.parametrize("members", [MEMBERS, 1])
@pytest.mark.parametrize("name", [name for name in CASES if not unsupported(name)])
def test_rule(name: str, members: int) -> None:
    """Proves one rule in one form, with factors of every member's own and with factors that all share."""
    make, x = CASES[name]
    net = make().double()
    weights, biases = parameters_of(net, SKIPPED)
    for rank in (1, 3):
        perturbations = perturb_low_rank(net, weights, members, rank)
        shifts: Any = perturb(net, [], biases, MEMBERS, ROWS, "member")
        if "relu" in name:  # which must not end in zeros alone
            shifts = {n: Replacement(p.value.abs() + 2) for n, p in shifts.items()}
        perturbations |= shifts
        assert_exact(net, x, members=MEMBERS, perturbations=perturbations, effects=rank == 3 and members > 1)


@pytest.mark.parametrize("name", [name for name in CASES if unsupported(name)])
def test_what_has_no_rule_is_refused(name: str) -> None:
    make, x = CASES[name]
    net = make().double()
    weights, _ = parameters_of(net, SKIPPED)
    with pytest.raises(ValueError, match="no low-rank rule"):
        Network(net).perturbed(x, ROWS, perturb_low_rank(net, weights, MEMBERS), MEMBERS)


def test_rule_of_conv1d_of_transformers() -> None:
    layer = pytest.importorskip("transformers.pytorch_utils").Conv1D(5, 4).double()
    assert_exact(layer, randn(ROWS, 6, 4), perturbations=perturb_low_rank(layer, ["weight"], 2))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", SEQUENCES)
def test_sequence_network(name: str, mode: str) -> None:
    """Proves networks whose batch is not simply the first axis, whose weights are shared, or are their own."""
    torch.manual_seed(0)
    make, x = SEQUENCES[name]
    net = without_noise(randomise(make().double())).train(mode == "train")
    weights, _ = parameters_of(net, norm_parameters(net))
    assert_exact(net, x, perturbations=perturb_low_rank(net, weights, 2), effects=mode == "eval")


@pytest.mark.parametrize("name", NAMES)
def test_architecture(name: str) -> None:
    """Proves a torchvision architecture in eval mode, depthwise convolutions included; every factor has an effect."""
    torch.manual_seed(0)
    make, pixels = ARCHITECTURES[name]
    net = without_noise(calibrate(randomise(without_noise(make().double())), (3, pixels, pixels))).eval()
    network = Network(net)
    weights = network.product_weights()
    perturbations = perturb_low_rank(net, weights, 2, scale=0.3)
    leaves = {n: LowRankFactors(p.A.requires_grad_(), p.B.requires_grad_(), p.scale) for n, p in perturbations.items()}  # type: ignore[union-attr]
    x = randn_of(2, 3, pixels, pixels)
    folded = network.perturbed(x, 2, leaves, 2)
    gradients = torch.autograd.grad(folded.abs().sum(), [t for p in leaves.values() for t in (p.A, p.B)])
    assert min(float(g.abs().amax()) for g in gradients) > 1e-9
    with torch.no_grad():
        expected = row_by_row(net, x, 2, perturbations, 2)
    assert relative(folded.detach(), expected).max() <= TOLERANCE


def test_batch_normalisation_in_train_mode() -> None:
    """Proves that members share the statistics of the folded batch, and that they move as in a loop over rows."""
    torch.manual_seed(0)
    net = calibrate(randomise(ARCHITECTURES["resnet18"][0]().double()), (3, 32, 32)).train()
    network = Network(net)
    perturbations = perturb_low_rank(net, network.product_weights(), 2, scale=0.3)
    perturbations |= {n: Replacement(network.parameters_by_name()[n].detach().expand(2, 1, -1)) for n in ("fc.bias",)}
    subject = Subject(net, randn_of(2, 3, 32, 32), perturbations)
    with torch.no_grad():
        folded = network.perturbed(subject.x, 2, perturbations, 2)
        reference = looped(subject)
        expected = reference(subject.x.repeat(2, 1, 1, 1)).unflatten(0, (2, 2))
    assert relative(folded, expected).max() <= TOLERANCE
    for name, buffer in reference.named_buffers():
        assert torch.allclose(network.net.get_buffer(name).double(), buffer.double(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "name",
    ["linear", "embedding", "LSTM, plain", *(n for n in CASES if n.startswith(("conv1d", "conv2d", "conv_tra")))],
)
def test_gradients(name: str) -> None:
    """Proves the gradients of A, B, the shared parameters and the input, against those through explicit weights."""
    make, x = CASES[name]
    net = make().double()
    weights, _ = parameters_of(net, SKIPPED)
    perturbations: Any = perturb_low_rank(net, weights, MEMBERS)
    network = Network(net)
    own = network.parameters_by_name()
    leaves = [t.requires_grad_() for p in perturbations.values() for t in (p.A, p.B)] + list(own.values())
    if x.is_floating_point():
        x = x.clone().requires_grad_()
        leaves.append(x)
    y = network.perturbed(x, ROWS, perturbations, MEMBERS)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=y.dtype)
    ours = torch.autograd.grad((y * direction).sum(), leaves)
    explicit = [
        torch.func.functional_call(net, dict(own) | {n: p.explicit(own[n], m, 0) for n, p in perturbations.items()}, x)
        for m in range(MEMBERS)
    ]
    expected = torch.autograd.grad((torch.stack(explicit) * direction).sum(), leaves)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
        assert bool(one.any())


def test_factors_follow_the_dtype_of_the_network() -> None:
    net = nn.Linear(4, 3)
    perturbations = perturb_low_rank(net, ["weight"], 2)
    assert Network(net).perturbed(torch.randn(5, 4), 5, perturbations, 2).dtype == torch.float32
