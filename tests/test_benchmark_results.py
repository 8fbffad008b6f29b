"""Committed results of benchmarks say what code made them, when, where and with which seeds."""

import json
import re
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks import compression, measure
from tests.benchmarks.datasets import Images

FILES = sorted(measure.RESULTS.glob("*.json"))


def require_provenance(content: dict[str, Any]) -> None:
    assert {"cpu", "threads", "cores", "gpu", "python", "torch", "pyro"} <= set(content["machine"])
    assert content["provenance"], "at least one run has made the rows"
    for record in content["provenance"].values():
        assert {"commit", "dirty", "date", "version", "seeds"} <= set(record)
        assert record["commit"] is None or re.fullmatch("[0-9a-f]{40}", record["commit"])
        assert record["dirty"] in (True, False, None)
        assert datetime.fromisoformat(record["date"]).tzinfo is not None
        assert re.fullmatch(r"\d+\.\d+\.\d+\S*", record["version"])
        assert record["seeds"] and all(isinstance(seed, int) for seed in record["seeds"])


def test_there_are_results() -> None:
    assert len(FILES) >= 12


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_committed_results_say_where_they_come_from(path: Path) -> None:
    content = json.loads(path.read_text())
    require_provenance(content)
    for record in content["provenance"].values():
        assert record["commit"] is not None, "results that are committed were made in a checkout"


def test_a_new_result_says_where_it_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that a run writes its own record, and that one of some rows keeps the records of the others."""
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    measure.report("some", [{"step": "one", "seconds": 1.0}], seeds=range(2))
    content = json.loads((tmp_path / "some.json").read_text())
    require_provenance(content)
    assert content["rows"] == [{"step": "one", "seconds": 1.0}]
    record = content["provenance"][measure.ALL_ROWS]
    assert record["seeds"] == [0, 1] and record["version"] == version("pyro-bnn")
    measure.write_results("some", {"rows": []}, seeds=[7], part="digits", keep=True)
    both = json.loads((tmp_path / "some.json").read_text())["provenance"]
    assert both[measure.ALL_ROWS] == record and both["digits"]["seeds"] == [7]
    measure.report("some", [], seeds=[3])
    assert set(json.loads((tmp_path / "some.json").read_text())["provenance"]) == {measure.ALL_ROWS}


@pytest.mark.slow
@pytest.mark.parametrize("network", ["lenet5", "resnet"])
def test_every_row_of_the_compression_of_networks_is_made(
    network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a few images and epochs: all ways to codes run, and a second run takes the rows from the first."""
    torch.manual_seed(0)
    few = Images(torch.randn(64, 1, 28, 28), torch.arange(64) % 10, torch.randn(32, 1, 28, 28), torch.arange(32) % 10)
    monkeypatch.setattr(compression, "images", lambda name: few)
    monkeypatch.setattr(compression, "RUNS", tmp_path)
    settings = compression.Settings(
        images=64,
        epochs=1,
        field_epochs=1,
        code_epochs=1,
        codes=8,
        frontier_codes=8,
        rates=(0.5,),
        temperature=0.5,
        cold_rates=(1.0,),
    )
    for _ in range(2):
        study = compression.Study("mnist", network, settings, False, [])
        study.methods()
        study.frontier()
        study.around()
        rows = list(compression.with_ratios(list(study.rows.values())))
        assert {"deterministic", "shared", "frontier 0.5", "mean-field around the network"} <= set(study.rows)
        assert study.rows["cold frontier 1"]["temperature"] == 0.5
        assert study.rows["cold mean-field"]["nll"] != study.rows["mean-field"]["nll"]
        assert all(row["ratio"] > 0 and 0 <= row["accuracy"] <= 1 for row in rows)
        monkeypatch.setattr(compression.Study, "fit", None)  # nothing is trained again
