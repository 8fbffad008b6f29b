"""The example scripts find what was put into their data."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=900, cwd=EXAMPLES)
    assert done.returncode == 0, done.stderr
    return done.stdout


def found(output: str) -> tuple[list[int], list[int]]:
    """The inputs that were chosen, and those that the function uses."""
    first, second = (re.search(f"{label}.*: *(.*)", output) for label in ("at least 1/2", "function uses"))
    assert first and second
    return [int(i) for i in re.findall(r"\d+", first[1])], [int(i) for i in re.findall(r"\d+", second[1])]


def test_variables_are_selected() -> None:
    """A tenth of the inputs of example 1, in regression: exactly the five that matter."""
    chosen, used = found(run("variable_selection.py", "--inputs", "100", "--rows", "4096", "--warmup", "250"))
    assert chosen == used == [0, 1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["0", "1", "2"])
def test_example_1(seed: str) -> None:
    """p = 1000, n = 10240: exact support, and a test MSE of at most 1.15 where the noise alone has 1."""
    output = run("variable_selection.py", "--seed", seed)
    chosen, used = found(output)
    assert chosen == used == [0, 1, 2, 3, 4]
    error = re.search(r"MSE: ([\d.]+)", output)
    assert error and float(error[1]) <= 1.15


@pytest.mark.slow
def test_the_same_script_classifies() -> None:
    chosen, used = found(run("variable_selection.py", "--function", "interaction", "--likelihood", "bernoulli"))
    assert chosen == used == [0, 1, 2, 3]
