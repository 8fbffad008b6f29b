"""The spike-and-slab prior of a first layer whose inputs are selected."""

from __future__ import annotations

import math
from typing import Any

import pytest

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
