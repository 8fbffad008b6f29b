"""The recipe of docs/spike_slab.md finds the inputs of small tables whose answer is known."""

from __future__ import annotations

import warnings

import pytest

from pyro_bnn.diagnostics import check
from tests.benchmarks.inclusion import fit, known_table, measured, simulated_table


def test_a_table_with_a_known_answer() -> None:
    """Proves that one short chain includes the two true inputs of ten alone, and that the others are not needed.

    By log evidence the answer is ahead of every other by 3.5 nats and more; without swaps all inputs are included.
    """
    table = known_table()
    x, y, n = table
    posterior = fit(table, 16, "tanh", 0, 250, 50, 1)
    found = measured(table, [0, 1], posterior, 0.0)
    assert found["exact"] and abs(found["pruned nll"] - found["nll"]) < 0.01
    said = {
        f.message: f.severity
        for f in check(posterior, (x[n:], y[n:]), x_train=x[:n], y_train=y[:n], num_samples=50)
        if f.topic == "inclusion"
    }
    assert list(said.values()) == ["good", "good"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_the_known_answer_by_four_chains(seed: int) -> None:
    found = measured(known_table(), [0, 1], fit(known_table(), 16, "tanh", seed, 750, 100, 4), 0.0)
    assert found["exact"] and found["pruned nll"] < 1.02 * found["nll"]


@pytest.mark.slow
def test_simulated_tables() -> None:
    """Proves on the first eight of the benchmark: true positives at least 15 of 16, and not more than one false one."""
    rows = []
    for seed in range(8):
        table, about = simulated_table(seed)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="chains differ")
            posterior = fit(table, about["hidden"], about["activation"], seed, 750, 100, 4)
            rows.append(measured(table, about["true"], posterior, 0.0))
    assert sum(row["true positives"] for row in rows) >= 7.5
    assert sum(row["exact"] for row in rows) >= 7
