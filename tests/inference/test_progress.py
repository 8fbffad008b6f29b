"""What a progress bar leaves behind."""

from __future__ import annotations

import io
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from rich.console import Console

from pyro_bnn.diagnostics import sbc
from pyro_bnn.inference import SGHMC, sample
from pyro_bnn.inference.progress import progress_bar


def test_a_log_holds_the_last_state_of_the_bar() -> None:
    out = io.StringIO()
    with progress_bar("SVI", 3, console=Console(file=out, width=100)) as bar:
        for loss in (3.0, 2.0, 1.5):
            bar.advance(f"ELBO {-loss:.4f} nats/datum")
    assert "SVI" in out.getvalue() and "3/3 ELBO -1.5000 nats/datum" in out.getvalue()
    assert "-3.0000" not in out.getvalue()


def test_a_terminal_keeps_the_last_line() -> None:
    out = io.StringIO()
    with progress_bar("SVI", 2, console=Console(file=out, width=100, force_terminal=True)) as bar:
        bar.advance("U 2 nats/datum")
        bar.advance("U 1 nats/datum")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert "2/2 U 1 nats/datum" in plain.splitlines()[-1]


def test_a_saved_notebook_holds_a_line_of_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    """The live bar is a widget, which goes; without the widgets nothing but the line is shown, and no warning."""
    with progress_bar("SVGD", 4, done=1, console=Console(force_jupyter=True)) as bar:
        for _ in range(3):
            bar.advance("U 0.5 nats/datum")
    assert re.fullmatch(r"SVGD 4/4 U 0.5 nats/datum 0:00:0\d\n", capsys.readouterr().out)


def test_a_notebook_says_how_far_an_interrupted_run_came(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), progress_bar("SVI", 4, console=Console(force_jupyter=True)) as bar:
        bar.advance("ELBO -1 nats/datum")
        bar.advance()
        raise KeyboardInterrupt
    assert capsys.readouterr().out.startswith("SVI 2/4 ELBO -1 nats/datum")


@pytest.mark.parametrize("jupyter", [False, True])
def test_no_progress_shows_nothing(jupyter: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("SVI", 1, progress=False, console=Console(force_jupyter=jupyter)) as bar:
        bar.advance("ELBO -1 nats/datum")
    assert capsys.readouterr().out == ""


def normal(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
    mean = pyro.sample("mean", dist.Normal(torch.zeros(()), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(mean.expand(len(x)), 1.0), obs=y)


def test_chains_leave_their_last_state(capsys: pytest.CaptureFixture[str]) -> None:
    kernel = SGHMC(normal, (torch.zeros(20, 1), torch.zeros(20)), step_size=0.1, friction=0.3, batch_size=10)
    sample(kernel, 3, 2, seed=0)
    shown = " ".join(capsys.readouterr().out.split())
    assert "SGHMC" in shown and "5/5" in shown and all(name in shown for name in kernel.logging())


def test_simulation_based_calibration_counts_its_simulations(capsys: pytest.CaptureFixture[str]) -> None:
    sbc(normal, AutoNormal, torch.zeros(20, 1), simulations=2, draws=3, steps=10, seed=0)
    assert "SBC" in (shown := capsys.readouterr().out) and "2/2" in shown
