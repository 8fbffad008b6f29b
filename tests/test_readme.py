"""The README does what it says: its first lines print what stands below them, and every other block runs."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_bnn as pb

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
N = 24


def test_the_first_lines_print_what_stands_below_them() -> None:
    """In a process of their own, as a reader runs them."""
    lines = BLOCKS[0][1]
    shown = re.search(r"It prints:\n\n```\n(.*?)```", README, re.DOTALL)
    assert shown is not None and len([line for line in lines.splitlines() if line]) <= 15
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == shown[1]


def names() -> dict[str, Any]:
    """What the other blocks take for granted: a network with a layer ``fc``, data of its form, and a posterior."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.fc = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(torch.relu(self.body(x)))

    net, likelihood = Net(), pb.likelihoods.Categorical()
    x, y = torch.randn(N, 4), torch.arange(N) % 2
    model = pb.models.Rank1(net, likelihood, N)
    posterior = pb.Posterior(model, pb.models.Rank1Guide(model, components=2))
    known: dict[str, Any] = {"pb": pb, "pyro": pyro, "dist": dist, "torch": torch, "nn": nn, "Normal": pb.priors.Normal}
    known |= {"net": net, "likelihood": likelihood, "n": N, "N": N, "x": x, "y": y, "posterior": posterior}
    return known | {"x_test": x, "y_test": y, "x_other": x * 9, "loc": torch.tensor(0.0), "scale": torch.tensor(1.0)}


@pytest.mark.parametrize(("title", "code"), BLOCKS[1:], ids=[title for title, _ in BLOCKS[1:]])
def test_every_other_block_runs(title: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With numbers of steps, codes and components that suit the little network."""
    monkeypatch.chdir(tmp_path)
    known = names()
    if "HalfNormal" in code:  # a regression with one output
        known |= {"net": nn.Linear(4, 1), "y": torch.randn(N)}
    smaller = {"epochs=100": "epochs=1", "epochs=10": "epochs=2", "stop=5": "stop=1", "codes=256": "codes=8"}
    for large, small in (smaller | {"thinning=200": "thinning=5", "num_samples=20": "num_samples=4"}).items():
        code = code.replace(large, small)
    with pyro.get_param_store().scope(), contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code, f"README.md, {title}", "exec"), known)


def test_every_link_leads_to_a_file() -> None:
    root = Path(__file__).parent.parent
    links = re.findall(r"\]\(([^)#:]+)[^)]*\)", README)
    assert links and not [link for link in links if not (root / link).exists()]
