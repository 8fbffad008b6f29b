"""The page about one posterior, the page about several, and what they are made of."""

from __future__ import annotations

import json
import math
from base64 import b64decode
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from diagnostics.fake import FakePosterior, rows
from html_page import Reader, require_self_contained
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn.diagnostics.checking.findings import Finding
from pyro_bnn.diagnostics.pages.comparison import Candidate, best_of, comparison, differences, verdict
from pyro_bnn.diagnostics.pages.glossary import METRIC_FORMATS, MetricFormat, formats_of
from pyro_bnn.diagnostics.pages.report import report, summary
from pyro_bnn.diagnostics.scoring.metrics import evaluate
from pyro_bnn.diagnostics.scoring.scored import score

FINDINGS = [Finding("good", "accuracy", "It is <high>."), Finding("warning", "calibration", "Too certain.", "Mend it.")]
SETTINGS: dict[str, Any] = {"num_samples": 3, "batch_size": None, "seed": 0}


def network(outputs: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, outputs))


def posterior_of(likelihood: pb.likelihoods.Likelihood, outputs: int = 1) -> pb.Posterior:
    """Of two components, never trained, which is enough to be looked at."""
    model = pb.models.Rank1(network(outputs), likelihood, 30)
    return pb.Posterior(model, pb.models.Rank1Guide(model, components=2), losses=[3.0, 2.0, 1.5])


def point(outputs: int, likelihood: pb.likelihoods.Likelihood) -> pb.Posterior:
    model = pb.models.Dense(network(outputs), likelihood, 30)
    return pb.Posterior(model, pb.models.PointGuide(model))


def labelled(classes: int = 3, n: int = 30) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 1, generator=generator), torch.randint(classes, (n,), generator=generator)


def test_report_says_verdicts_then_numbers_then_shows_pictures(tmp_path: Path) -> None:
    """Proves the order, that all numbers are those of evaluate, and that the page needs nothing but itself."""
    likelihood = pb.likelihoods.Categorical()
    posterior, twin, data = posterior_of(likelihood, 3), point(3, likelihood), labelled()
    ood = 5 + torch.randn(20, 1)
    given: dict[str, Any] = {"title": "A <b> & c", "findings": FINDINGS, "settings": {"prior": "<none>", "epochs": 3}}
    path = report(posterior, data, path=tmp_path / "r.html", ood=ood, twin=twin, num_samples=3, seed=0, **given)
    assert path == tmp_path / "r.html" and list(tmp_path.iterdir()) == [path]
    html = path.read_text(encoding="utf-8")
    reader = require_self_contained(html)
    assert len(html) < 1_500_000
    order = [
        "1 warning, 1 good",
        "warning calibration",
        "good accuracy",
        "It is <high>.",
        "NLL",
        "Reliability",
        "<none>",
    ]
    places = [reader.text.index(text) for text in order]
    assert places == sorted(places) and "A <b> & c" in reader.text
    expected = {
        "Bayesian": evaluate(posterior, data, ood, num_samples=3, seed=0),
        "deterministic": evaluate(twin, data, ood, num_samples=3, seed=0),
    }
    assert reader.numbers() == {(name, of): value for of, found in expected.items() for name, value in found.items()}
    words = [image["alt"] for image in reader.all("img")]
    headings = [
        "Reliability",
        "Risk and coverage",
        "Out-of-distribution inputs",
        "Distances between members",
        "Training",
        "Forest of sites",
    ]
    assert [reader.text.index(heading) for heading in headings] and len(words) == len(headings)
    found = expected["Bayesian"]
    assert f"accuracy {found['accuracy']:.3f}" in words[0] and f"calibration error {found['ece']:.3f}" in words[0]
    assert f"Bayesian {found['aurc']:.4g}, deterministic {expected['deterministic']['aurc']:.4g}" in words[1]
    assert f"AUROC {found['ood_auroc']:.3f}" in words[2]
    assert "3 steps: 3 nats at the first, 1.5 on average over the last 1" in words[4]
    training = b64decode(reader.all("img")[4]["src"].partition(",")[2]).decode()
    assert "too few steps to tell" in training and "unknown" not in training


@pytest.mark.parametrize(
    ("likelihood", "y", "names"),
    [
        (pb.likelihoods.Gaussian(scale=None), torch.randn(30), {"rmse", "crps", "coverage", "width"}),
        (pb.likelihoods.Poisson(), torch.arange(30) % 4, {"rmse", "crps", "coverage", "width"}),
        (pb.likelihoods.Bernoulli(), torch.arange(30) % 2.0, {"accuracy", "ece", "aurc"}),
    ],
    ids=["gaussian", "poisson", "bernoulli"],
)
def test_every_likelihood_has_a_report(
    tmp_path: Path, likelihood: pb.likelihoods.Likelihood, y: Tensor, names: set[str]
) -> None:
    """Proves that findings, numbers and pictures are found for each kind of target, from a posterior and data alone."""
    data = (torch.linspace(-2, 2, 30).unsqueeze(1), y)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyro_bnn.diagnostics.pages.report.check", lambda *_, **__: FINDINGS)
        path = report(posterior_of(likelihood), data, path=tmp_path / "r.html", num_samples=2, seed=0)
    reader = require_self_contained(path.read_text(encoding="utf-8"))
    found = evaluate(posterior_of(likelihood), data, num_samples=2, seed=0)
    assert reader.numbers() == {(name, "Bayesian"): value for name, value in found.items()} and names <= found.keys()
    continuous = likelihood.kind != "classification"
    assert ("Regression band" in reader.text) == continuous == ("Coverage of intervals" in reader.text)


def test_report_looks_for_itself_when_no_findings_are_given(tmp_path: Path) -> None:
    """Proves that the verdicts are those of check."""
    from pyro_bnn.diagnostics.checking.checks import check

    posterior, data = posterior_of(pb.likelihoods.Categorical(), 3), labelled()
    text = Reader(
        report(posterior, data, path=tmp_path / "r.html", num_samples=2, seed=0).read_text(encoding="utf-8")
    ).text
    found = check(posterior, data, num_samples=2, seed=0)
    assert found and all(finding.message in text for finding in found) and summary(found) in text


def test_report_shows_what_is_special_about_a_posterior(tmp_path: Path) -> None:
    """Proves that stored draws of a spike-and-slab network show inclusion, and a guide its own pictures, no wider than
    the others."""
    data, likelihood = labelled(), pb.likelihoods.Categorical()
    sparse = pb.models.SpikeSlab(network(3), likelihood, 30)
    draws = {site.name: torch.full((4, *site.shape), 0.5) for site in sparse.sites()}
    path = report(pb.Posterior.from_draws(sparse, draws), data, path=tmp_path / "a.html", findings=FINDINGS)
    reader = require_self_contained(path.read_text(encoding="utf-8"))
    assert "Inclusion" in reader.text and any(
        "inclusion probabilities of 24" in img["alt"] for img in reader.all("img")
    )
    shared = pb.models.WeightSharing(network(3), likelihood, 30)
    posterior = pb.Posterior(shared, pb.models.CodebookGuide(shared, codes=4))
    path = report(posterior, data, path=tmp_path / "b.html", findings=FINDINGS, num_samples=2, seed=0)
    images = require_self_contained(path.read_text(encoding="utf-8")).all("img")
    (plane,) = (image for image in images if "Plane of 4 codes" in image["alt"])
    assert plane["width"] == "480" and any("Weights of each code" in image["alt"] for image in images)


def test_report_of_chains_shows_whether_they_agree(tmp_path: Path) -> None:
    data, model = labelled(), pb.models.Dense(network(3), pb.likelihoods.Categorical(), 30)
    generator = torch.Generator().manual_seed(0)
    draws = {site.name: torch.randn(40, *site.shape, generator=generator) for site in model.sites()}
    path = report(pb.Posterior.from_draws(model, draws, num_chains=2), data, path=tmp_path / "a.html")
    reader = require_self_contained(path.read_text(encoding="utf-8"))
    assert any("R-hat of the function at 20 inputs" in image["alt"] for image in reader.all("img"))
    few = pb.Posterior.from_draws(model, {name: value[:6] for name, value in draws.items()}, num_chains=2)
    reader = require_self_contained(report(few, data, path=tmp_path / "b.html").read_text(encoding="utf-8"))
    assert "6 draws of 2 chains are too few" in reader.text


def test_metrics_of_an_older_run_still_make_a_report(tmp_path: Path) -> None:
    """Proves that metrics of other names, or none for one network, are shown as they are."""
    metrics = {
        "accuracy": 0.5,
        "own_score": 1 / 3,
        "ood_auroc": None,
        "compression": {"codes": 3},
        "deterministic": {"accuracy": 1},
    }
    data = labelled()
    path = report(
        posterior_of(pb.likelihoods.Categorical(), 3), data, path=tmp_path / "r.html", metrics=metrics, findings=[]
    )
    reader = Reader(path.read_text(encoding="utf-8"))
    shown = {("accuracy", "Bayesian"): 0.5, ("accuracy", "deterministic"): 1.0, ("own_score", "Bayesian"): 1 / 3}
    assert reader.numbers() == shown
    assert "own score" in reader.text and "0.3333" in reader.text and "Nothing was checked." in reader.text


def test_report_of_no_data_is_refused_and_leaves_no_page(tmp_path: Path) -> None:
    """Proves that empty data, and inputs from elsewhere beside a regression, end in a word and no file."""
    posterior, (x, y) = posterior_of(pb.likelihoods.Categorical(), 3), labelled()
    metrics, path = {"nll": 1.0}, tmp_path / "r.html"
    with pytest.raises(ValueError, match="data is empty"):
        report(posterior, (x[:0], y[:0]), path=path, metrics=metrics, findings=[])
    with pytest.raises(ValueError, match="ood is empty"):
        report(posterior, (x, y), path=path, ood=x[:0], metrics=metrics, findings=[])
    regression = posterior_of(pb.likelihoods.Gaussian(scale=0.5))
    with pytest.raises(ValueError, match="which a regression does not have"):
        report(regression, (x, x[:, 0]), path=path, ood=x, metrics=metrics, findings=[])
    assert not list(tmp_path.iterdir())


def test_pages_refuse_before_they_measure(tmp_path: Path) -> None:
    """Proves that a folder in place of a file, data that end after one pass, and a model are refused in words."""
    posterior, data = posterior_of(pb.likelihoods.Categorical(), 3), labelled()
    both = {name: Candidate(posterior, {"nll": 1.0}, 2) for name in ("a", "b")}
    for page in (report, comparison):
        of: Any = posterior if page is report else both
        with pytest.raises(IsADirectoryError, match="is a folder: give the name of a file, such as"):
            page(of, data, path=tmp_path)
        with pytest.raises(TypeError, match="data is read more than once, and a list_iterator is empty"):
            page(of, iter([data]), path=tmp_path / "r.html")
        with pytest.raises(TypeError, match="ood is read more than once"):
            page(of, data, ood=iter([data[0]]), path=tmp_path / "r.html")
    with pytest.raises(TypeError, match="expected a posterior, got Sequential"):
        report(network(3), data, path=tmp_path / "r.html")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_scores_of_data_average_to_the_metrics() -> None:
    """Proves that what pictures are made of is what evaluate measures, whatever the size of a batch."""
    posterior, data = posterior_of(pb.likelihoods.Categorical(), 3), labelled()
    found = evaluate(posterior, data, num_samples=3, seed=0)
    for size in (None, 7):
        scored = score(posterior, data, **(SETTINGS | {"batch_size": size}))
        assert scored.probs is not None and scored.probs.shape == (30, 3)
        assert float(scored.nll.mean()) == pytest.approx(found["nll"], abs=1e-7)
        assert 1 - float(scored.loss.mean()) == pytest.approx(found["accuracy"])
        assert torch.equal(scored.confidence, scored.probs.amax(-1).double())


def test_distribution_function_at_y_is_that_of_the_prediction() -> None:
    """Proves it against the closed form for one Gaussian, and that counts split their jump: F is uniform over data."""
    y = torch.linspace(-2, 2, 9, dtype=torch.float64)
    fake: Any = FakePosterior(torch.zeros(4, 1, 9, dtype=torch.float64), pb.likelihoods.Gaussian(scale=1.0))
    found = score(fake, (rows(9), y), **SETTINGS)
    assert found.pit is not None
    draws = 400
    assert torch.allclose(found.pit, dist.Normal(0.0, 1.0).cdf(y), atol=4 * math.sqrt(0.25 / draws))
    assert torch.equal(found.confidence, torch.full((9,), -1.0, dtype=torch.float64))
    assert torch.allclose(found.loss, y.square())
    n = 4000
    rates = torch.full((3, 1, n), 2.0, dtype=torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        counts = torch.poisson(rates[0, 0])
    fake = FakePosterior(rates, pb.likelihoods.Poisson())
    pit = score(fake, (rows(n), counts), **SETTINGS).pit
    assert pit is not None
    edges = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    share = (pit[:, None] <= edges).double().mean(0)
    assert float((share - edges).abs().max()) < 4 * math.sqrt(0.25 / n) + 0.005


def test_paired_differences_are_those_worked_by_hand() -> None:
    """Proves mean and standard error, that the best has exactly none, and that unpaired data are refused."""
    nll = {"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor([2.0, 2.0, 5.0]), "c": torch.tensor([1.1, 2.0, 3.0])}
    found = differences(nll)
    assert (found["a"].mean, found["a"].se, str(found["a"])) == (0.0, 0.0, "best")
    assert found["b"].mean == pytest.approx(1.0) and found["b"].se == pytest.approx(1 / math.sqrt(3))
    assert str(found["b"]) == "1.0000 ± 0.5774"
    assert verdict(found) == (
        "By test NLL a is best; b, c are within two standard errors of it, so these data cannot tell them apart."
    )
    assert "by more than two standard errors" in verdict(differences({"a": nll["a"], "b": nll["a"] + 1}))
    with pytest.raises(ValueError, match="expected the same data"):
        differences({"a": nll["a"], "b": nll["b"][:2]})


@pytest.mark.parametrize(
    ("better", "values", "expected"),
    [
        ("higher", [0.1, None, 0.3], 0.3),
        ("lower", [0.1, None, 0.3], 0.1),
        ("near 0.95", [0.99, 0.93, 0.5], 0.93),
        ("lower", [0.2, 0.2], None),
        ("lower", [None, 0.2], None),
        ("", [0.1, 0.3], None),
    ],
)
def test_best_value_is_found_in_its_direction(better: str, values: list[float | None], expected: float | None) -> None:
    """Proves that up, down and near a level are told apart, and that nothing is best where all are alike."""
    assert best_of(MetricFormat("m", better=better), values) == expected


def test_glossary_knows_every_metric_there_is() -> None:
    """Proves that no metric of evaluate goes without a name and a way to be written."""
    data = labelled()
    classes = evaluate(posterior_of(pb.likelihoods.Categorical(), 3), data, data[0] + 9, num_samples=2, seed=0)
    numbers = evaluate(posterior_of(pb.likelihoods.Gaussian()), (data[0], data[0][:, 0]), num_samples=2, seed=0)
    assert classes.keys() | numbers.keys() <= METRIC_FORMATS.keys()
    named = [name for name, _ in formats_of({"x": 1, "nll": 2, "b": True, "none": None}, {"accuracy": 1.0})]
    assert named == ["accuracy", "nll", "x"]
    assert METRIC_FORMATS["trainable_parameters"].text(12345) == "12,345" and METRIC_FORMATS["nll"].text(None) == "–"


def test_comparison_shows_every_number_and_marks_the_best(tmp_path: Path) -> None:
    """Proves that all candidates stand in one table with what each measured, and that pictures show each of them."""
    likelihood, data, ood = pb.likelihoods.Categorical(), labelled(), torch.randn(9, 1) + 4
    both = {"one <1>": posterior_of(likelihood, 3), "two": point(3, likelihood)}
    metrics = {name: evaluate(of, data, ood, num_samples=2, seed=0) for name, of in both.items()}
    candidates = {name: Candidate(of, metrics[name], 2, f"kind of {name}") for name, of in both.items()}
    gaps = comparison(candidates, data, path=tmp_path / "c.html", ood=ood, seed=0, settings={"epochs": 3})
    reader = require_self_contained((tmp_path / "c.html").read_text(encoding="utf-8"))
    expected = {(name, of): value for of, found in metrics.items() for name, value in found.items()}
    expected |= {("nll_difference", of): gap.mean for of, gap in gaps.items()}
    assert reader.numbers() == expected
    assert abs(gaps["two"].mean - gaps["one <1>"].mean) == pytest.approx(
        abs(metrics["two"]["nll"] - metrics["one <1>"]["nll"]), abs=1e-6
    )
    words = json.dumps([image["alt"] for image in reader.all("img")])
    assert len(reader.all("img")) == 5 and "one <1> " in words and "kind of one <1>" in reader.text
    for name in ("Reliability: one <1>", "Reliability: two", "Out-of-distribution inputs: two", "higher is better"):
        assert name in reader.text
    merits = [name for name, shown in formats_of(*metrics.values()) if shown.better]
    assert 1 <= len(reader.all("strong")) <= 2 * len(merits)
    with pytest.raises(ValueError, match="at least two posteriors, got 1"):
        comparison({"one": candidates["two"]}, data, path=tmp_path / "d.html")
