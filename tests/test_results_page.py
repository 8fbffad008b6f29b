"""The page of results is what its generator makes of the committed ones, and test rows choose no setting."""

from __future__ import annotations

import inspect
import math
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch

import pyro_bnn as pb
from pyro_bnn.command.fit import fit
from pyro_bnn.command.options import complete
from tests.benchmarks import measure as measuring
from tests.benchmarks.datasets import Table, uci, uci_gap
from tests.benchmarks.tables import figures, page
from tests.benchmarks.tables import uci as section
from tests.benchmarks.uci import methods, rows
from tests.benchmarks.uci.methods import METHODS, Method


def test_the_committed_page_is_what_the_generator_makes_of_the_committed_results() -> None:
    assert page.PAGE.read_text(encoding="utf-8") == page.page(), "run: python -m tests.benchmarks.tables"
    text = page.README.read_text(encoding="utf-8")
    assert text == page.readme(text), "run: python -m tests.benchmarks.tables"


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of 60 rows in the place of yacht, and a folder of its own for results."""
    r = np.random.default_rng(0)
    x = r.normal(size=(60, 3))
    (tmp_path / "uci").mkdir()
    mask = np.arange(60)[None] % 6 == np.arange(2)[:, None]
    np.savez(tmp_path / "uci" / "yacht.npz", x=x, y=x[:, 0] + 0.1 * r.normal(size=60), test_mask=mask)
    monkeypatch.setenv("PYRO_BNN_DATA", str(tmp_path))
    monkeypatch.setattr(measuring, "RESULTS", tmp_path / "results")


def mean_of_y(calls: list[int]) -> Any:
    """A fit that keeps how many rows it was given, and whose posterior is that of a network of no weights."""

    def fit(table: Table, settings: Any, seed: int, share: float) -> pb.Posterior:
        calls.append(len(table.x_train))
        if settings["scale"] > 2:
            raise FloatingPointError("it diverged")
        net = torch.nn.Linear(3, 1)
        torch.nn.init.zeros_(net.weight), torch.nn.init.zeros_(net.bias)
        model = pb.models.Dense(net, pb.likelihoods.Gaussian(settings["scale"]), len(table.x_train))
        draws = {site.name: torch.zeros(1, *site.shape) for site in model.sites()}
        return pb.Posterior.from_draws(model, draws)

    return fit


@pytest.mark.usefixtures("small")
def test_test_rows_choose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that settings are compared on a fifth of the training rows, and that one which diverges is not chosen."""
    calls: list[int] = []
    grid = tuple({"scale": scale} for scale in (1.0, 0.01, 3.0))
    monkeypatch.setitem(METHODS, "mean", Method(mean_of_y(calls), grid, 1))
    row = rows.measure("yacht", "split 1", "mean")
    assert calls == [40, 40, 40, 50]
    assert row["settings"] == {"scale": 1.0}
    assert row["validation"]["{'scale': 3.0}"] == math.inf
    table = uci("yacht", 1)
    expected = 0.5 * math.log(2 * math.pi) + 0.5 * float(table.y_test.square().mean()) + math.log(table.scale)
    assert row["nll"] == pytest.approx(expected, rel=1e-5)
    assert row["rmse"] == pytest.approx(table.scale * float(table.y_test.square().mean().sqrt()), rel=1e-5)
    inner = rows.for_validation(table, 1)
    seen = torch.cat([inner.x_train, inner.x_test])
    assert torch.equal(seen.sort(0).values, table.x_train.sort(0).values)
    rows.add("yacht", row)
    assert rows.known("yacht") == [row]


@pytest.mark.usefixtures("small")
def test_a_gap_is_the_middle_third_of_an_input() -> None:
    table = uci_gap("yacht", 2)
    inside, outside = table.x_test[:, 2], table.x_train[:, 2]
    assert len(inside) == 20
    assert not bool(((outside > inside.min()) & (outside < inside.max())).any())
    torch.testing.assert_close(table.x_train.mean(0), torch.zeros(3), atol=1e-6, rtol=0.0)


def test_a_tie_at_the_digits_of_a_published_figure_is_no_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that 2.826 is not below the published 2.83, and that a table without methods of ours does not count."""
    rows = {"protein": 2.826, "yacht": 1.17}
    found = {name: {section.BEST: {"split 0": {"nll": nll, "rmse": 9.0}}} for name, nll in rows.items()}
    monkeypatch.setattr(section, "columns", lambda kind: found | {"wine": {"one network": {}}})
    assert "NLL of 1 of 2 tables (yacht); RMSE of 0 of 2 tables (none)" in section.wins()


def test_the_best_of_ours_is_chosen_by_validation_alone() -> None:
    """Neither a lower NLL on test rows chooses, nor a baseline, nor half of a method where the whole is measured."""

    def one(method: str, validation: float, nll: float) -> dict[str, Any]:
        return {"part": "split 0", "method": method, "validation": {"": validation}, "nll": nll, "rmse": 1.0}

    found = section.of_parts([one("rank-1", 1.0, 3.0), one("SGHMC", 2.0, 0.0), one("ensemble of 5", 0.0, 0.0)], "split")
    assert found[section.BEST]["split 0"]["method"] == "rank-1"
    later = {**one("SGHMC", 2.0, 0.0), "part": "split 1"}  # where rank-1 was not measured
    found = section.of_parts([one("rank-1", 1.0, 3.0), one("SGHMC", 2.0, 0.0), later], "split")
    assert [row["method"] for row in found[section.BEST].values()] == ["rank-1", "SGHMC"]
    half = one("SGHMC, predicted noise", 0.0, 0.0)
    found = section.of_parts([half, {**half, "part": "split 1"}, one("SGHMC", 2.0, 0.0)], "split")
    assert [row["method"] for row in found[section.BEST].values()] == ["SGHMC", "SGHMC, predicted noise"]
    assert figures.mean_and_error([1.0, 3.0]) == (2.0, 1.0)
    assert figures.shown(math.inf, math.nan, 2) == "diverges"


@pytest.mark.parametrize(("size", "steps"), [(900, 5000), (9000, 20_000)])
def test_larger_tables_have_more_steps(size: int, steps: int) -> None:
    """Proves that the epochs of a training are those of the steps that the page names, to half an epoch."""
    x = torch.zeros(size, 1)
    table = Table(x, x, x, x, 1.0)
    of_epoch = math.ceil(size / methods.batch_size(table))
    assert abs(methods.epochs(table, 1.0) * of_epoch - steps) <= of_epoch / 2


def test_the_recipe_of_the_docs_runs() -> None:
    """The lines of docs/sghmc.md that users copy, with a few steps, for both noises."""
    text = (page.DOCS / "sghmc.md").read_text(encoding="utf-8")
    (lines,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "def chains" in block)
    for old, new in (
        ("compile=True", "compile=False"),
        ("50, 600", "4, 20"),
        ("num_samples=200", "num_samples=16"),
        ("smooth, bent = both(1.0), both(2.0)", "bent = both(2.0)"),
        ("epochs=200", "epochs=2, progress=False"),
    ):
        assert old in lines
        lines = lines.replace(old, new)
    torch.manual_seed(0)
    x = torch.randn(40, 3)
    names: dict[str, Any] = {"pb": pb, "torch": torch, "x": x, "y": x[:, :1] + 0.1 * torch.randn(40, 1)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        exec(lines, names)
    mean, density = names["predict"](names["bent"], x, names["y"])
    assert mean.shape == density.shape == (40,) and bool((mean.isfinite() & density.isfinite()).all())


@pytest.mark.usefixtures("small")
def test_a_row_of_other_settings_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that a row counts if its settings are today's best by what was tried, and is replaced if it does not."""
    of = {"part": "split 0", "method": "mean", "rmse": 1.0, "nll": 1.0}
    tried = {str({"scale": scale}): float(scale) for scale in (1.0, 2.0)}

    def grid(*scales: float) -> None:
        monkeypatch.setitem(METHODS, "mean", Method(mean_of_y([]), tuple({"scale": s} for s in scales), 1))

    rows.add("yacht", {**of, "settings": {"scale": 1.0}, "validation": tried})
    for scales, counts in {(1.0, 2.0): True, (1.0,): True, (2.0,): False, (1.0, 3.0): False}.items():
        grid(*scales)
        assert rows.is_measured("yacht", "split 0", "mean") == counts
        assert not rows.is_measured("yacht", "split 1", "mean")
    rows.add("yacht", {**of, "part": "split 1", "settings": {"scale": 2.0}, "validation": tried})
    rows.add("yacht", {**of, "settings": {"scale": 3.0}, "validation": {str({"scale": s}): s for s in (1.0, 3.0)}})
    assert [(row["part"], row["settings"]["scale"]) for row in rows.known("yacht")] == [
        ("split 1", 2.0),
        ("split 0", 3.0),
    ]
    assert rows.is_measured("yacht", "split 0", "mean")


def test_the_first_command_has_the_settings_that_are_best_for_the_deterministic_network() -> None:
    """Proves, of the committed results, that neither network of the first table has been favoured by its budget."""
    tried = [row for row in measuring.read_results("few_digits")["validation"] if row["method"] == "deterministic"]
    best = min(tried, key=lambda row: row["nll"])
    defaults = inspect.signature(fit).parameters
    task = pb.data.load(defaults["data"].default)
    given = {"data": task.name, "lr": 0.1, "seed": 0, "device": "cpu"}
    asked = complete("rank1", given | {"epochs": defaults["epochs"].default, "batch_size": None}, task)
    assert (asked.epochs, asked.batch_size) == (best["epochs"], best["batch_size"])


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_the_scale_is_that_of_the_first_layer_alone(scale: float) -> None:
    """Proves it of the model under that prior, by its trace."""
    x = torch.zeros(10, 3)
    net, likelihood, size = methods.given(Table(x, x[:, :1], x, x[:, :1], 1.0), {"likelihood": "heteroscedastic"})
    model = pb.models.Dense(net, likelihood, size, prior=methods.by_width(net, scale))
    nodes = pyro.poutine.trace(model).get_trace(x, x[:, :1]).nodes
    sizes = {site.name: nodes[site.name]["fn"].variance.sqrt().unique().item() for site in model.sites()}
    assert sizes == pytest.approx({"0.weight": scale, "0.bias": scale, "2.weight": 50**-0.5, "2.bias": 1.0})


def test_large_tables_may_have_another_grid() -> None:
    small, large = (torch.zeros(size, 1) for size in (methods.SMALL, methods.SMALL + 1))
    scales = [one.get("scale") for one in METHODS["SGHMC"].settings(Table(small, small, small, small, 1.0))]
    assert scales == [1.0, 2.0]
    for name, settings in {"SGHMC": methods.BOTH, "SGHMC, predicted noise": methods.ONE}.items():
        assert METHODS[name].settings(Table(large, large, large, large, 1.0)) == (settings,)


def test_draws_with_one_noise_are_those_of_a_network_that_predicts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves, in float64, that means and densities are the same, and that half of all draws are of either kind."""
    torch.manual_seed(0)
    x = torch.randn(20, 3, dtype=torch.float64)
    y = x[:, :1].sin()
    table, known = Table(x, y, x, y, 1.0), {}
    for likelihood in ("gaussian", methods.PREDICTED):
        net, kind, size = methods.given(table, {"likelihood": likelihood})
        model = pb.models.Dense(net.double(), kind, size)
        draws = {site.name: torch.randn(7, *site.shape, dtype=torch.float64).abs() for site in model.sites()}
        known[likelihood] = pb.Posterior.from_draws(model, draws)
    one, predicted = known["gaussian"], known[methods.PREDICTED]
    embedded = methods.predicting_one_noise(methods.weights_of(one))
    expected, found = (p.predict(x, num_samples=7) for p in (one, pb.Posterior.from_draws(predicted.model, embedded)))
    assert torch.allclose(expected.mean, found.mean)
    assert torch.allclose(expected.log_prob(y), found.log_prob(y), rtol=1e-4)  # but for the smallest scale, 1e-6

    monkeypatch.setattr(methods, "sghmc", lambda table, settings, seed, share: known[settings["likelihood"]])
    both = methods.weights_of(methods.of_both_noises(table, methods.BOTH, 0, 1.0))
    for name, value in methods.weights_of(predicted).items():
        assert torch.equal(both[name], torch.cat([value, embedded[name]]))


def test_a_difference_is_of_runs_with_the_same_seed() -> None:
    """Proves mean and error of the pairs, in either order of rows, and that only what is better by more is bold."""
    rows = [{"method": "control", "seed": seed, "nll": 10.0 * seed} for seed in (2, 1, 0, 3)]
    rows += [{"method": "ours", "seed": seed, "nll": 10.0 * seed + gap} for seed, gap in enumerate((-1.0, -3.0))]
    assert figures.difference(rows, "nll", "ours", "control", 1, False) == "**-2.0 ± 1.0**"
    assert figures.difference(rows, "nll", "ours", "control", 1, True) == "-2.0 ± 1.0"
    assert figures.difference(rows, "nll", "control", "ours", 1, True) == "**+2.0 ± 1.0**"
    even = [{**row, "nll": row["nll"] + (3.5 if row["method"] == "ours" and row["seed"] else 0.0)} for row in rows]
    assert figures.difference(even, "nll", "ours", "control", 2, False) == "-0.25 ± 0.75"
    assert figures.difference(rows[:5], "nll", "ours", "control", 1, False) == "-1.0"  # of one pair nothing is known


def test_fine_tuned_rows_of_other_settings_are_refused_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers", reason="it comes with the extra benchmarks")
    from tests.benchmarks import finetune

    monkeypatch.setattr(measuring, "RESULTS", tmp_path)
    settings = finetune.Settings(1, 1, 1, 1.0, 1.0, 1.0)
    for method in ("wgd", "ensemble"):
        finetune.add("resnet", settings, {"method": method, "seed": 0})
    assert [row["method"] for row in finetune.known("resnet", settings)] == ["ensemble", "wgd"]
    other = replace(settings, scale=2.0)
    with pytest.raises(ValueError, match="rows of resnet with other settings"):
        finetune.add("resnet", other, {"method": "svgd", "seed": 0})
    assert len(finetune.known("resnet", settings)) == 2


def test_means_over_other_splits_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that the best is bold where all have the same splits, and nothing where they have not."""

    def of(number: int, nll: float) -> dict[str, dict[str, float]]:
        return {f"split {i}": {"nll": nll + i} for i in range(number)}

    for number, bold in ((2, True), (1, False)):
        columns = {"wine": {"one network": of(2, 3.0), "rank-1": of(number, 1.0)}}
        monkeypatch.setattr(section, "columns", lambda kind, columns=columns: columns)
        assert ("**" in section.uci_table("nll", "split", {})) == bold
