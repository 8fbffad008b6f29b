"""The verdict on a loss, on curves whose ends are known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pyro_bnn.diagnostics.checking.training import loss_verdict


def curve(steps: int, rate: float, noise: float = 0.3, seed: int = 0) -> list[float]:
    """2 + 8 exp(-rate t) over t in [0, 1], with independent noise."""
    t = np.linspace(0, 1, steps)
    values: list[float] = (2 + 8 * np.exp(-rate * t) + noise * np.random.default_rng(seed).normal(size=steps)).tolist()
    return values


def test_a_loss_that_has_come_to_rest() -> None:
    """At a level of 1 % and with 100 curves, more than 6 false alarms have a probability below .1 %."""
    verdicts = [loss_verdict(curve(4000, 30.0, seed=seed)) for seed in range(100)]
    assert sum(verdict.state != "converged" for verdict in verdicts) <= 6
    assert verdicts[0].level == pytest.approx(2, abs=5 * 0.3 / math.sqrt(100))


def test_a_loss_that_still_falls() -> None:
    verdict = loss_verdict(curve(4000, 2.0))
    assert verdict.state == "falling"
    exact = 8 * (math.exp(-2.0) - math.exp(-1.0))  # from the middle to the end; a line through a bent curve is close
    assert verdict.change == pytest.approx(exact, rel=0.1)
    assert 0 < verdict.standard_error < 0.1


def test_a_loss_that_rises() -> None:
    assert loss_verdict(curve(4000, 2.0)[::-1]).state == "rising"


def test_a_slope_that_is_real_but_not_worth_going_on_for() -> None:
    """It falls by .5 % of the whole decrease over the second half, without noise."""
    t = np.linspace(0, 1, 4000)
    falls = np.where(t < 0.5, 10 - 16 * t, 2 - 0.04 * (2 * t - 1))
    assert loss_verdict(falls.tolist()).state == "converged"
    steeper = np.where(t < 0.5, 10 - 16 * t, 2 - 0.4 * (2 * t - 1))
    assert loss_verdict(steeper.tolist()).state == "falling"


def test_what_is_not_finite() -> None:
    assert loss_verdict([*curve(1000, 5.0), math.nan]).state == "diverged"
    assert loss_verdict([*curve(1000, 5.0), math.inf]).state == "diverged"
    once = curve(4000, 30.0)
    once[3000] = math.inf
    assert loss_verdict(once).state == "converged"


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_losses_that_were_not_finite_for_a_while(bad: float) -> None:
    falling = curve(4000, 2.0)
    start, late = list(falling), list(falling)
    start[:200] = [bad] * 200
    late[3000:3300] = [bad] * 300
    assert loss_verdict(start).state == "falling"
    assert loss_verdict(late).state == "diverged"


def test_a_bad_start_does_not_hide_a_fall() -> None:
    peak = curve(4000, 2.0)
    peak[:5] = [1e6] * 5
    assert loss_verdict(peak).state == "falling"


@pytest.mark.parametrize("steps", [20, 100, 200])
def test_a_run_that_blew_up_at_its_end_has_not_come_to_rest(steps: int) -> None:
    blown = curve(4000, 30.0)
    blown[-steps:] = [1e6] * steps
    assert loss_verdict(blown).state == "rising"


@pytest.mark.parametrize("size", [1e3, 1e6])
def test_a_spike_does_not_hide_a_fall_nor_is_it_a_rise(size: float) -> None:
    for at in (2700, 3990):
        falling, flat = curve(4000, 2.0), curve(4000, 30.0)
        falling[at] = flat[at] = size
        assert loss_verdict(falling).state == "falling"
        assert loss_verdict(flat).state == "converged"
    middle = curve(4000, 30.0)
    middle[2700:2900] = [size] * 200
    assert loss_verdict(middle).state == "converged"


def test_few_steps_say_nothing() -> None:
    verdict = loss_verdict(curve(399, 2.0))
    assert verdict.state == "unknown" and math.isnan(verdict.change)
    assert loss_verdict([3.0]).level == 3
    with pytest.raises(ValueError, match="losses is empty"):
        loss_verdict([])
