"""log p of point-estimated weights: the sum of the log densities of all elements, small and large tensors alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_bnn.priors import Laplace, Normal, StudentT
from pyro_bnn.program.positive import LARGE
from pyro_bnn.program.sites import log_density

SMALL, BIG = (3, 4), (70, 1000)  # two parts in the cache
PRIORS = [Normal(), Normal(0.3, 0.7), Laplace(0.1, 0.5), StudentT(4.0)]


def weights() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    assert torch.Size(SMALL).numel() < LARGE < torch.Size(BIG).numel()
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in (SMALL, BIG)]


def written_out(prior: Any, values: list[Tensor]) -> Tensor:
    parts = [prior.elements(0.0, v.detach(), None).log_prob(v).sum() for v in values]
    return torch.stack(parts).sum()


@pytest.mark.parametrize("prior", PRIORS, ids=repr)
def test_values_and_gradients(prior: Any) -> None:
    values = weights()
    own, other = log_density(prior, values), written_out(prior, values)
    torch.testing.assert_close(own, other, rtol=1e-12, atol=0)
    slopes = [torch.autograd.grad(3 * v, values, create_graph=True) for v in (own, other)]
    for one, two in zip(*slopes, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    twice = [torch.autograd.grad(sum((s * s).sum() for s in pair), values) for pair in slopes]
    for one, two in zip(*twice, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("prior", PRIORS[:2], ids=repr)
def test_transforms_of_functions(prior: Any) -> None:
    """Under vmap, and forward mode."""
    value = weights()[1].detach()
    stacked = torch.stack([value, 2 * value])
    each = torch.func.vmap(lambda v: log_density(prior, [v]))(stacked)
    for i in range(2):
        torch.testing.assert_close(each[i], written_out(prior, [stacked[i]]), rtol=1e-12, atol=0)
    tangent = torch.ones_like(value)
    found = torch.func.jvp(lambda v: log_density(prior, [v]), (value,), (tangent,))[1]
    exact = torch.func.jvp(lambda v: written_out(prior, [v]), (value,), (tangent,))[1]
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-9)
