"""The spike-and-slab prior of a first layer whose inputs are selected."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import pytest
import torch

from pyro_bnn.priors import SpikeAndSlab


def test_scales_come_from_the_rows_and_the_rate_from_the_inputs() -> None:
    prior = SpikeAndSlab.for_inputs(20, 400, expected=3)
    assert prior == SpikeAndSlab(0.5 / math.sqrt(400), 1.0, inclusion=3 / 20, group="input")
    assert SpikeAndSlab.for_inputs(10, 220).inclusion == 0.2


@pytest.mark.parametrize(
    ("inputs", "rows", "expected"),
    [(1, 10, 0.5), (5, 0, 2), (5, 10, 5), (5, 10, 0), (5.5, 9, 2)],
)
def test_numbers_out_of_range_are_refused(inputs: Any, rows: Any, expected: Any) -> None:
    with pytest.raises(ValueError, match="expected"):
        SpikeAndSlab.for_inputs(inputs, rows, expected)


def test_scales_from_weight_decays_pull_as_hard_as_these() -> None:
    """Proves by autograd that the prior of a weight far out, and at 0, has the gradient of N times its weight decay."""
    n = 5000
    prior = SpikeAndSlab.from_weight_decay(n, 1e-2, 1e-4)
    density = prior.elements(0.0, torch.zeros(1, dtype=torch.float64), None)
    for size, decay in ((5.0, 1e-4), (1e-6, (1e-2 * 10 + 1e-4) / 11)):  # at 0 the spike is ten times as dense
        w = torch.tensor([size], dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(-density.log_prob(w) / n, w)
        assert float(gradient) == pytest.approx(decay * size, rel=1e-4)
    with pytest.raises(ValueError, match="the larger"):
        SpikeAndSlab.from_weight_decay(n, 1e-4, 1e-4)


@pytest.mark.parametrize("prior", [SpikeAndSlab.for_inputs(10, 220), SpikeAndSlab(0.1, 0.7, 0.5, "input", loc=0.3)])
def test_the_threshold_is_the_norm_of_a_column_at_even_odds(prior: SpikeAndSlab) -> None:
    """Proves that columns in any direction have log odds 0 at this norm, and are in the slab beyond it."""
    torch.manual_seed(0)
    direction = torch.randn(16, 4, dtype=torch.float64)
    direction /= direction.norm(dim=0)
    for factor, sign in ((1.0, 0), (0.99, -1), (1.01, 1)):
        w = (prior.loc or 0.0) + factor * prior.threshold(16) * direction
        odds = prior.elements(0.0, w, None).log_odds(w)
        if sign == 0:
            torch.testing.assert_close(odds, torch.zeros_like(odds), atol=1e-6, rtol=0)
        assert sign == 0 or bool((sign * odds > 0).all())


def test_thresholds_of_the_documentation() -> None:
    """Proves the numbers of docs/spike_slab.md."""
    rate = dist.Beta(2.0, 50.0)
    found = [SpikeAndSlab(spike, 0.7, rate, "input").threshold(16) for spike in (0.1, 0.05, 0.02)]
    assert found == pytest.approx([0.84, 0.48, 0.22], abs=0.005)
    assert SpikeAndSlab.for_inputs(10, 220).threshold(16) == pytest.approx(0.36, abs=0.005)
    assert SpikeAndSlab(0.5, 1.0, 0.99).threshold(1) == 0
    with pytest.raises(ValueError, match="Laplace"):
        SpikeAndSlab(0.1, 1.0, 0.5, spike="laplace").threshold(4)
