"""The positive numbers of guides, against torch's softplus in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pyro_bnn.program.positive import inverse_softplus, positive

SIZES = (10, 5000)  # below and above the size from which on the package's own softplus is used


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_those_of_softplus_to_a_few_roundings(size: int, dtype: torch.dtype) -> None:
    """From where softplus(rho) is no more than the constant to where it is rho."""
    rho = torch.linspace(-15, 60, size, dtype=dtype, requires_grad=True)
    exact = rho.detach().double().requires_grad_()
    value, expected = positive(rho), F.softplus(exact) + 1e-7
    bound = 8 * torch.finfo(dtype).eps
    if dtype == torch.float64:
        bound = 1e-8  # torch's own takes softplus(rho) = rho from 20 on, where they differ by 2e-9
    assert torch.allclose(value.double(), expected, rtol=bound, atol=0)
    weight = torch.randn(size, dtype=dtype, generator=torch.Generator().manual_seed(0))
    (value * weight).sum().backward()
    (expected * weight).sum().backward()
    assert torch.allclose(rho.grad.double(), exact.grad, rtol=bound, atol=bound)


def test_what_is_tiny_is_not_rounded_away() -> None:
    rho = torch.linspace(-80, -15, 5000)
    added = positive(rho.double()) - 1e-7
    assert torch.allclose(added, rho.double().exp(), rtol=1e-6, atol=1e-22)


@pytest.mark.parametrize("size", SIZES)
def test_second_derivatives_are_right(size: int) -> None:
    rho = torch.linspace(-8, 8, size, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(positive(rho).sum(), rho, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), rho)
    s = torch.sigmoid(rho.detach())
    assert torch.allclose(second, s * (1 - s), atol=1e-14)


@pytest.mark.parametrize("size", SIZES)
def test_it_goes_through_transforms_of_functions(size: int) -> None:
    """Proves that vmap, forward-mode derivatives and gradients inside vmap are those of softplus."""
    rho = torch.linspace(-8, 30, 3 * size, dtype=torch.float64).reshape(size, 3)
    expected, slope = F.softplus(rho) + 1e-7, torch.sigmoid(rho)
    for dim in (0, 1):
        assert torch.allclose(torch.vmap(positive, dim, dim)(rho), expected, rtol=1e-8)
    value, tangent = torch.func.jvp(positive, (rho,), (2 * torch.ones_like(rho),))
    assert torch.allclose(value, expected, rtol=1e-8)
    assert torch.allclose(tangent, 2 * slope, rtol=1e-8)
    each = torch.vmap(torch.func.grad(lambda row: positive(row).sum()), 1, 1)(rho)
    assert torch.allclose(each, slope, rtol=1e-8)


@pytest.mark.parametrize("value", [1e-6, 1e-3, 0.1, 30.0])
def test_the_inverse_leads_back(value: float) -> None:
    found = positive(torch.tensor(inverse_softplus(value), dtype=torch.float64)) - 1e-7
    assert float(found) == pytest.approx(value, rel=1e-7)
