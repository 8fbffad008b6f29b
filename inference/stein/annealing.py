"""Annealing of SVGD: the power of the target, as a function of the step."""

from __future__ import annotations

from collections.abc import Callable

from pyro_bnn.entry import checks


def cyclical_annealing(total_steps: int, cycles: int = 10, power: float = 10.0) -> Callable[[int], float]:
    """A function gamma(t) for ``annealing=``: ``((t mod L + 1) / L)^power`` with ``L = total_steps / cycles``, then 1.

    At the start of a cycle, repulsion spreads the particles; towards its end, the target attracts them (D'Angelo &
    Fortuin, "Annealed Stein variational gradient descent", 2021).

    :param total_steps: length of all cycles together; at least one step for each cycle.
    :param cycles: number of cycles.
    :param power: the larger, the longer repulsion dominates a cycle.
    :raises ValueError: for numbers out of range.
    """
    checks.count("cycles", cycles)
    checks.count("total_steps", total_steps)
    checks.positive("power", power)
    if total_steps < cycles:
        raise ValueError(f"total_steps={total_steps!r}: expected at least one step for each of the {cycles} cycles")
    length = total_steps / cycles

    def gamma(step: int) -> float:
        return 1.0 if step >= total_steps else min(1.0, (step % length + 1) / length) ** power

    return gamma
