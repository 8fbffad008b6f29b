"""The section of both pages about corrupted data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from html_page import require_self_contained
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn.data.corruptions import table_shift
from pyro_bnn.diagnostics import Shift, evaluate
from pyro_bnn.diagnostics.pages.comparison import Candidate, comparison
from pyro_bnn.diagnostics.pages.report import report
from pyro_bnn.diagnostics.pages.shifts import shift_in, shift_section

DRAWN: dict[str, Any] = {"num_samples": 2, "seed": 0}


def point(seed: int) -> pb.Posterior:
    torch.manual_seed(seed)
    model = pb.models.Dense(nn.Linear(2, 3), pb.likelihoods.Categorical(), 30)
    return pb.Posterior(model, pb.models.PointGuide(model))


def labelled() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(30, 2, generator=generator), torch.randint(3, (30,), generator=generator)


def shift_of(first: float = 0.0, rows: int = 7, kinds: tuple[str, ...] = ("noise", "fog")) -> Shift:
    values = {kind: {"rmse": [first + i + s for s in range(5)], "nll": [1.0] * 5} for i, kind in enumerate(kinds)}
    return Shift(values, {"rmse": first, "nll": 0.5}, rows, 4)


def test_report_measures_a_shift_that_is_asked_for(tmp_path: Path) -> None:
    """Proves that the tables hold what evaluate gives for both networks, and that without shift= there is none."""
    posterior, twin, data = point(0), point(1), labelled()
    shift = table_shift(data[0])
    path = report(posterior, data, path=tmp_path / "r.html", shift=shift, twin=twin, findings=[], **DRAWN)
    reader = require_self_contained(path.read_text(encoding="utf-8"))
    shown = reader.numbers(of_shift=True)
    for label, of in (("Bayesian", posterior), ("deterministic", twin)):
        found = evaluate(of, data, shift=shift, **DRAWN)
        assert reader.numbers()["cNLL", label] == shown["shift_nll_mean", label] == found["cNLL"]
        assert shown["shift_ece_missing", label] == found["shift"].mean_of("missing", "ece")
    assert reader.text.index("Metrics") < reader.text.index("Distribution shift") < reader.text.index("Pictures")
    path = report(posterior, data, path=tmp_path / "r.html", findings=[], **DRAWN)
    assert "Distribution shift" not in path.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="metrics= are given, so shift= has no effect"):
        report(posterior, data, path=tmp_path / "r.html", metrics={"nll": 1.0}, shift=shift)


def test_comparison_shows_the_shift_among_the_metrics(tmp_path: Path) -> None:
    """Proves that what evaluate returned is enough, and that the best of a row is marked."""
    data = labelled()
    metrics = {name: evaluate(point(i), data, shift=table_shift(data[0]), **DRAWN) for i, name in enumerate("ab")}
    candidates = {name: Candidate(point(i), metrics[name], 2) for i, name in enumerate("ab")}
    comparison(candidates, data, path=tmp_path / "c.html", seed=0)
    shown = require_self_contained((tmp_path / "c.html").read_text(encoding="utf-8")).numbers(of_shift=True)
    assert {label for _, label in shown} == {"a", "b"} and len(shown) == 2 * 3 * 4
    assert shown["shift_accuracy_noise", "b"] == metrics["b"]["shift"].mean_of("noise", "accuracy")


def test_networks_that_cannot_be_compared_are_named() -> None:
    """Proves that other rows, other kinds and no shift at all leave a network out, and that the note says which."""
    shifts = {"a": shift_of(), "b": shift_of(1.0), "c": shift_of(rows=8), "d": shift_of(kinds=("noise",)), "e": None}
    section = shift_section(shifts)
    assert section is not None
    assert "7 test rows" in section.note and "a 4, b 4." in section.note
    assert section.note.endswith("Not measured on these data: c, d, e.")
    rmse, _ = section.tables
    assert [head.text for head in rmse.columns] == ["corruption", "a", "b"]
    assert [head.text for head, _ in rmse.rows] == ["clean", "noise", "fog", "mean"]
    cells: Any = rmse.rows[1][1]
    assert [(cell.value, cell.best) for cell in cells] == [(2.0, True), (3.0, False)]
    assert "a 0.500 without corruption and 1.000 at severity 5" in section.pictures[0].alt
    assert shift_section({"e": None}) is None and shift_section({}) is None


def test_a_shift_among_metrics_is_that_of_evaluate_or_of_a_file() -> None:
    shift = shift_of()
    assert shift_in({"shift": shift}) is shift and shift_in({"nll": 1.0}) is None
    assert shift_in({"shift": shift.to_json()}) == shift
    for wrong in (3, {}, {"noise": 1.0}, "images"):
        with pytest.raises(ValueError, match="is not what evaluate"):
            shift_in({"shift": wrong})
