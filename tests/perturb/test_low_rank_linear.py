"""Linear layers with a summed weight for each member: equal to the separate term, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyro_bnn.likelihoods import Categorical
from pyro_bnn.models import Bella, ParticleGuide
from pyro_bnn.perturb.low_rank import LowRankFactors

INPUTS, OUTPUTS, RANK = 5, 7, 2


def factors(members: int) -> LowRankFactors:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(members, RANK, INPUTS, generator=generator, dtype=torch.float64)
    b = torch.randn(members, OUTPUTS, RANK, generator=generator, dtype=torch.float64)
    return LowRankFactors(a.requires_grad_(), b.requires_grad_(), 0.3)


class Attending(nn.Module):
    """Rows on the second axis in attention, on the first in the other layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.layer(x).mean(1))
        return y


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("members", [1, 3])
def test_both_ways_have_the_same_outputs_and_gradients(
    rows: int, members: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proves it for a network with attention, in float64, and that the number of rows decides which way is taken."""
    torch.manual_seed(0)
    model = Bella(Attending().double(), Categorical(), 50, rank=RANK)
    guide = ParticleGuide(model, members, init="gaussian", init_scale=0.3)
    x = torch.randn(rows, 4, 8, dtype=torch.float64)
    taken: list[bool] = []
    own = LowRankFactors.sums_for
    found: list[list[Tensor]] = []
    for way in (None, True, False):

        def decide(self: LowRankFactors, given: Tensor, way: bool | None = way) -> bool:
            taken.append(own(self, given))
            return taken[-1] if way is None else way

        monkeypatch.setattr(LowRankFactors, "sums_for", decide)
        with guide.every_member():
            latents = {name: value.detach().requires_grad_() for name, value in guide(x).items()}
        f = model.function(x, latents, rows)
        slopes = torch.autograd.grad(f.square().sum(), list(latents.values()))
        found.append([f, *slopes])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)
    assert any(taken) == (rows == 40)


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_everything(bias: bool) -> None:
    """Of the input, W, its bias and both factors, against differences; and under ``torch.func.vmap``."""
    from pyro_bnn.perturb.low_rank import _Linear

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 4, INPUTS, generator=generator, dtype=torch.float64, requires_grad=True)
    w = torch.randn(OUTPUTS, INPUTS, generator=generator, dtype=torch.float64, requires_grad=True)
    b = torch.randn(OUTPUTS, generator=generator, dtype=torch.float64, requires_grad=True) if bias else None
    own = factors(2)
    arguments: list[Any] = [x, w, b, own.A[0], own.B[0]]
    assert torch.autograd.gradcheck(_Linear.apply, arguments)
    both = torch.func.vmap(lambda a, c: _Linear.apply(x, w, b, a, c))(own.A, own.B)
    for i in range(2):
        expected = torch.nn.functional.linear(x, w + own.B[i] @ own.A[i], b)
        torch.testing.assert_close(both[i], expected)


def test_half_precision_keeps_the_term_apart() -> None:
    """W + scale B A in half precision would round the term away; and few rows are not worth the sums."""
    x = torch.randn(200, INPUTS)
    own = LowRankFactors(torch.randn(1, RANK, INPUTS), torch.randn(1, OUTPUTS, RANK), 1.0)
    assert own.sums_for(x)
    assert not own.sums_for(x[:2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not own.sums_for(x)
