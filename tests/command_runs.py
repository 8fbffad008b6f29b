"""Commands as tests give them, and what is in the folders of their runs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import Result
from typer.testing import CliRunner

from pyro_bnn.command.cli import app


def run(*arguments: object, expect: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == expect, result.output
    return result


def metrics_of(folder: Path, name: str = "metrics.json") -> dict[str, Any]:
    """The scores, without the digest that the file has of them."""
    return {key: value for key, value in json.loads((folder / name).read_text()).items() if key != "digest"}


def without_seconds(metrics: dict[str, Any]) -> dict[str, Any]:
    return {
        key: without_seconds(value) if isinstance(value, dict) else value
        for key, value in metrics.items()
        if key != "seconds"
    }


def small_npz(path: Path, rows: int = 48) -> Path:
    x = np.random.default_rng(0).normal(size=(rows, 2))
    y = (x[:, 0] > 0).astype(int)
    np.savez(path, x_train=x, y_train=y, x_test=x[:20], y_test=y[:20])
    return path
