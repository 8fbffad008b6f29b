"""Expectations under a Normal of what Cauchy distributions have in their log densities; ``e ~ N(0, 1)`` throughout.

:func:`expected_log` is what the divergence of a Normal from a Cauchy or Student's t needs, :func:`expected_softplus`
that of a LogNormal from a half-Cauchy.

With ``u = -d + i t``, the expectation is ``2 Re E log(u - s e)``, and it is analytic in the upper half plane of u. A
Moebius map takes that half plane to the unit disc, where what is left beside one logarithm is a power series with real
coefficients that fall faster than any power of their number::

    E log((d + s e)^2 + t^2) = log |u + i L s|^2 + 2 Re sum_n c_n Z^n,    Z = (u - i L s) / (u + i L s)

This is the expansion that Weideman (SIAM J. Numer. Anal. 31, 1497, 1994) gives for the derivative, the Faddeeva
function. The error is below 3e-8 for all d, s and t with 16 terms (float32), and below 2e-14 with 32 (float64).
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pyro_bnn.program.positive import in_cache

#: number of terms and L, by whether numbers have 64 bits
_SERIES = {False: (16, 4.9), True: (32, 6.6)}


@cache
def _coefficients(terms: int, width: float) -> tuple[float, ...]:
    """``c_0 ... c_terms``: the sine transform of the imaginary part on the boundary, u real and s = 1.

    There it is ``pi P(e > x) - arg(x + i L)`` with ``x = -L cot(angle / 2)``, and at infinity, Z = 1, the sum is 0.
    """
    points = 4096
    angle = (torch.arange(points, dtype=torch.float64) + 0.5) * (math.pi / points)
    x = -width / (angle / 2).tan()
    imaginary = math.pi * torch.special.ndtr(-x) - torch.atan2(torch.full_like(x, width), x)
    c = [2 / points * float((imaginary * (n * angle).sin()).sum()) for n in range(1, terms + 1)]
    return -math.fsum(c), *c


def expected_log(d: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """``E log((d + s e)^2 + t^2)``, e ~ N(0, 1), element by element.

    :param d, s, t: of shapes that broadcast; s and t positive.
    """
    value: Tensor = _ExpectedLog.apply(*torch.broadcast_tensors(d, s, t))
    return value


def _value_and_slopes(d: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The expectation and its derivatives by d, s and t.

    The series and its derivative are divided by ``(z - Z)(z - conj Z)``, with remainders ``b_0 + b_1 z``, so that all
    arithmetic is of real numbers, which are several times as fast as complex ones.
    """
    terms, width = _SERIES[d.dtype == torch.float64]
    c = _coefficients(terms, width)
    reach = width * s
    height = t + reach
    square = torch.addcmul(height * height, d, d)  # |V|^2 of V = u + i L s
    x, y = torch.addcmul((t - reach) * height, d, d) / square, 2 * d * reach / square  # Z = x + i y
    twice, minus = 2 * x, -torch.addcmul(x * x, y, y)
    b1, b2 = torch.full_like(x, c[-1]), torch.zeros_like(x)
    e1, e2 = b2, b2
    for each in reversed(c[1:-1]):
        e1, e2 = torch.addcmul(torch.addcmul(b2, minus, e2), twice, e1), e1
        b1, b2 = torch.addcmul((minus * b2).add_(each), twice, b1), b1
    series = torch.addcmul(x * b1, minus, b2) + c[0]
    real, imaginary = b1 - 2 * y * y * e1, 2 * y * torch.addcmul(torch.addcmul(b2, minus, e2), x, e1)
    # times 1 / V^2, V = -d + i height
    turn, lean = (d * d - height * height) / square / square, 2 * d * height / square / square
    real, imaginary = real * turn - imaginary * lean, real * lean + imaginary * turn
    return (
        square.log() + 2 * series,
        2 * d / square + 4 * reach * imaginary,
        2 * width * (height / square) + 4 * width * (t * real - d * imaginary),
        2 * height / square - 4 * reach * real,
    )


def expected_softplus(m: Tensor, s: Tensor) -> Tensor:
    """``E log(1 + exp(2 (m + s e)))``, element by element, by the trapezoidal rule with 97 points.

    The rule converges exponentially for analytic functions: the error is below 1e-6 for s up to 4, 2e-4 at 8 and 2e-3
    at 12 (in nats, where the expectation is about .8 s).

    :param m, s: of the same shape.
    """
    points = torch.linspace(-9, 9, 97, dtype=m.dtype, device=m.device)
    weights = torch.softmax(-points * points / 2, 0)
    values = torch.nn.functional.softplus(2 * torch.addcmul(m.unsqueeze(-1), s.unsqueeze(-1), points))
    return values @ weights


class _ExpectedLog(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, d: Tensor, s: Tensor, t: Tensor) -> Tensor:
        found = [torch.empty(d.shape, dtype=d.dtype, device=d.device) for _ in range(4)]
        for parts in zip(*map(in_cache, (d, s, t, *found)), strict=True):
            for result, part in zip(parts[3:], _value_and_slopes(*parts[:3]), strict=True):
                result.copy_(part)
        ctx.save_for_backward(d, s, t, *found[1:])
        return found[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d, s, t, *slopes = ctx.saved_tensors
        if torch.is_grad_enabled():  # for second derivatives
            slopes = list(_value_and_slopes(d, s, t)[1:])
        return tuple(
            grad * slope if needed else None for needed, slope in zip(ctx.needs_input_grad, slopes, strict=True)
        )
