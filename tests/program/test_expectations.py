"""Expectations under a Normal, against integrals by mpmath, and their derivatives against differences."""

from __future__ import annotations

import math
from typing import Any

import mpmath as mp
import pytest
import torch
from torch import Tensor

from pyro_bnn.program.expectations import expected_log, expected_softplus


def integral(function: Any, *breaks: float) -> float:
    """``E function(e)``, split where the function bends."""
    points = sorted({-14.0, -4.0, 0.0, 4.0, 14.0, *(b for b in breaks if abs(b) < 14)})
    return float(mp.quad(lambda e: function(e) * mp.exp(-e * e / 2) / mp.sqrt(2 * mp.pi), points))


def cases(count: int) -> list[tuple[float, float, float]]:
    """Distances, deviations and widths over seven powers of ten, in float32, so that both precisions have the same."""
    generator = torch.Generator().manual_seed(0)
    power = 7 * torch.rand(count, 3, generator=generator) - 4
    sign = torch.randn(count, generator=generator).sign()
    d, s, t = (10**power).unbind(1)
    return [(float(a), float(b), float(c)) for a, b, c in zip(sign * d, s, t, strict=True)] + [(0.0, 0.3, 2.0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logarithm_of_a_square_has_the_stated_error(dtype: torch.dtype) -> None:
    given = cases(40)
    found = expected_log(*torch.tensor(given, dtype=dtype).unbind(1))
    for (d, s, t), value in zip(given, found.tolist(), strict=True):
        centre, near = -d / s, t / s
        exact = integral(
            lambda e, d=d, s=s, t=t: mp.log((d + s * e) ** 2 + mp.mpf(t) ** 2),
            *(centre + k * near for k in (-5, -1, 0, 1, 5)),
        )
        if dtype == torch.float64:
            assert value == pytest.approx(exact, abs=2e-13)
        else:  # 3e-8 of the series, and the rounding of numbers of this size
            assert value == pytest.approx(exact, abs=3e-8 + 8 * 6e-8 * (1 + abs(exact)))


def test_logarithm_of_a_square_has_its_derivatives() -> None:
    """First and second ones, of which training takes only the first: a Laplace approximation takes both."""
    given = torch.tensor(cases(12), dtype=torch.float64)
    given = given.abs().log().clamp(-2, 2).exp() * torch.where(given < 0, -1.0, 1.0)
    arguments = [column.clone().requires_grad_() for column in given.unbind(1)]
    assert torch.autograd.gradcheck(expected_log, arguments)
    assert torch.autograd.gradgradcheck(expected_log, arguments)


def test_parts_of_a_large_tensor_are_those_of_a_small_one() -> None:
    """More elements than one part has, a width that is broadcast and needs a gradient, and a deviation that needs
    none."""
    torch.manual_seed(0)
    d = torch.randn(3, 70_000, dtype=torch.float64, requires_grad=True)
    t = torch.rand(3, 1, dtype=torch.float64).add(0.1).requires_grad_()
    s = torch.rand(70_000, dtype=torch.float64)
    value = expected_log(d, s, t)
    value.sum().backward()
    assert value.shape == d.shape and s.grad is None
    columns = torch.tensor([0, 65_535, 65_536, 69_999])
    few: list[Tensor] = [v.detach()[..., columns].requires_grad_() for v in (d, s)]
    width = t.detach().clone().requires_grad_()
    alone = expected_log(few[0], few[1], width)
    torch.testing.assert_close(value[:, columns], alone, rtol=0, atol=0)
    alone.sum().backward()
    assert d.grad is not None and few[0].grad is not None and t.grad is not None
    torch.testing.assert_close(d.grad[:, columns], few[0].grad, rtol=0, atol=0)
    slope = torch.autograd.grad(expected_log(d, s, width).sum(), width)[0]
    torch.testing.assert_close(t.grad, slope, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("s", "error"), [(0.05, 1e-9), (0.5, 1e-9), (2.0, 1e-7), (4.0, 1e-6), (8.0, 2.5e-4), (12.0, 2.5e-3)]
)
def test_softplus_has_the_stated_error(s: float, error: float) -> None:
    m = torch.tensor([-3.0, -0.25, 0.0, 0.75, 4.0], dtype=torch.float64)
    found = expected_softplus(m, torch.full_like(m, s))
    for mean, value in zip(m.tolist(), found.tolist(), strict=True):
        exact = integral(lambda e, m=mean: mp.log1p(mp.exp(2 * (m + s * e))), -mean / s)
        assert value == pytest.approx(exact, abs=error)
    assert math.isclose(float(expected_softplus(torch.tensor(50.0), torch.tensor(1.0))), 100.0, rel_tol=1e-6)
