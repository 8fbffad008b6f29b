"""Labels that `ignore_index` masks: they count nowhere, and what is left is what masking by hand gives."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import pyro_bnn as pb
from pyro_bnn.diagnostics.checking.predictive_checks import Predicted
from pyro_bnn.diagnostics.scoring.scored import score
from pyro_bnn.distributed import ALONE
from pyro_bnn.inference.training.validation import Validation

N, T, C = 8, 5, 4
MASKED = pb.likelihoods.Categorical(class_dim=-1, ignore_index=-100)
WHOLE = pb.likelihoods.Categorical(class_dim=-1)


def rows(missing: float = 0.4) -> tuple[Tensor, Tensor]:
    """Inputs, and labels of which some are missing: all of row 0, none of row 1."""
    torch.manual_seed(0)
    x, y = torch.randn(N, T, 3), torch.randint(0, C, (N, T))
    there = torch.rand(N, T) > missing
    there[0], there[1] = False, True
    return x, y.masked_fill(~there, -100)


def posterior(likelihood: pb.likelihoods.Likelihood = MASKED, num_data: int = N) -> pb.Posterior:
    torch.manual_seed(1)
    model = pb.models.Dense(nn.Linear(3, C), likelihood, num_data)
    return pb.Posterior(model, pb.models.MeanFieldGuide(model, init_scale=0.5))


def by_hand(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """One row for each label that is there."""
    return x[y != -100], y[y != -100]


@pytest.mark.parametrize("shape", [(C,), (T, C), (2, T, C)])
@pytest.mark.parametrize("ignore_index", [-100, -1, 2, 255])
def test_log_probability_and_gradient_are_those_of_cross_entropy(shape: tuple[int, ...], ignore_index: int) -> None:
    """Proves it for several axes and for a mask that is a class, exactly 0 where a label is masked."""
    torch.manual_seed(0)
    likelihood = pb.likelihoods.Categorical(class_dim=-1, ignore_index=ignore_index)
    f = torch.randn(3, 2, N, *shape, dtype=torch.float64, requires_grad=True)
    y = torch.randint(0, C, (N, *shape[:-1])).masked_fill(torch.rand(N, *shape[:-1]) < 0.4, ignore_index)
    likelihood.check(y, f[0, 0])
    found = likelihood.given(f, y, lead=3).log_prob(y)
    assert found.shape == (3, 2, N)
    (gradient,) = torch.autograd.grad(found.sum(), f, retain_graph=True)
    many = y.expand(3, 2, *y.shape)
    loss = F.cross_entropy(f.reshape(-1, C), many.reshape(-1), ignore_index=ignore_index, reduction="sum")
    (expected,) = torch.autograd.grad(-loss, f)
    torch.testing.assert_close(found.sum(), -loss)
    torch.testing.assert_close(gradient, expected)
    assert bool((gradient[many == ignore_index] == 0).all())
    nothing = torch.full_like(y, ignore_index)
    assert bool((likelihood.given(f, nothing, lead=3).log_prob(nothing) == 0).all())


def test_a_label_that_is_no_class_stays_refused() -> None:
    f = torch.randn(N, C)
    with pytest.raises(ValueError, match=r"label -100.*Categorical\(ignore_index=-100\)"):
        pb.likelihoods.Categorical().check(torch.full((N,), -100), f)
    for label in (-1, C):
        with pytest.raises(ValueError, match=f"label {label}, .* must lie in 0 ... 3, or be ignore_index=-100"):
            MASKED.check(torch.tensor([0, -100, label]), f)
    with pytest.raises(ValueError, match="label -1"):
        x, y = rows()
        model = pb.models.Dense(nn.Linear(3, C), MASKED, N)
        pb.inference.fit(model, pb.models.MeanFieldGuide(model), (x, y.clamp_min(-1)), epochs=1, progress=False)


def test_a_masked_likelihood_is_saved(tmp_path: Path) -> None:
    one = posterior()
    one.save(tmp_path / "posterior")
    loaded = pb.load(tmp_path / "posterior", nn.Linear(3, C))
    assert loaded.model.likelihood == MASKED  # type: ignore[attr-defined]
    assert torch.equal(loaded.log_likelihood(*rows(), seed=0), one.log_likelihood(*rows(), seed=0))


@pytest.mark.parametrize("batch", [slice(None), slice(0, 1), slice(0, 4)])
def test_the_loss_is_that_of_the_labels_that_are_there(batch: slice) -> None:
    """Proves for batches, one without any label among them, that the loss is N/B times the sum over labels of their
    cross-entropy, minus the log prior, in nats per row; with its gradient."""
    x, y = (part[batch] for part in rows())
    torch.manual_seed(0)
    model = pb.models.Dense(nn.Linear(3, C).double(), MASKED, N, prior=pb.priors.Normal(0.0, 1.0))
    guide = pb.models.PointGuide(model)
    loss = pb.inference.Objective(model, guide)(x.double(), y)
    loss.backward()
    draw = pb.Posterior(model, guide).sample(1)
    w, b = (draw[name][0].clone().requires_grad_() for name in ("weight", "bias"))
    f = (x.double() @ w.T + b).reshape(-1, C)
    data = F.cross_entropy(f, y.reshape(-1), ignore_index=-100, reduction="sum") * N / len(x)
    expected = (data + sum((v.square() / 2 + math.log(2 * math.pi) / 2).sum() for v in (w, b))) / N
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    gradients = [p.grad.flatten() for p in guide.parameters() if p.grad is not None]
    assert torch.cat(gradients).sort().values.tolist() == pytest.approx(
        torch.cat([v.grad.flatten() for v in (w, b) if v.grad is not None]).sort().values.tolist(), rel=1e-5
    )


def test_minibatches_are_unbiased() -> None:
    """Proves that the mean loss of all batches of two rows, which weigh N/2, is that of all rows."""
    x, y = rows()
    model = pb.models.Dense(nn.Linear(3, C).double(), MASKED, N)
    objective = pb.inference.Objective(model, pb.models.PointGuide(model)).eval()
    with torch.no_grad():
        whole = float(objective(x.double(), y))
        parts = [float(objective(x[i : i + 2].double(), y[i : i + 2])) for i in range(0, N, 2)]
    assert sum(parts) / len(parts) == pytest.approx(whole, rel=1e-6)


def flat_scores(x: Tensor, y: Tensor, **options: Any) -> dict[str, Any]:
    return pb.diagnostics.evaluate(posterior(pb.likelihoods.Categorical()), by_hand(x, y), seed=0, **options)


@pytest.mark.parametrize("batch_size", [1, 3, N])
def test_scores_are_those_of_the_labels_that_are_there(batch_size: int) -> None:
    """Proves for every metric of `evaluate` but the NLL, which is of rows, that it is that of a data set with a row for
    each label, and for the NLL that it is the mean over rows with a label; batches without any label included."""
    x, y = rows()
    one = posterior()
    found = pb.diagnostics.evaluate(one, (x, y), batch_size=batch_size, seed=0)
    expected = flat_scores(x, y)
    log_prob = one.log_likelihood(x, y, seed=0).double()
    density = log_prob.logsumexp((0, 1)) - math.log(log_prob.shape[:2].numel())
    assert float(density[0]) == pytest.approx(0, abs=1e-12)
    expected["nll"] = -float(density[1:].mean())
    assert found == pytest.approx(expected, abs=1e-5)
    scored = score(one, (x, y), num_samples=None, batch_size=batch_size, seed=0)
    assert scored.nll.shape == (N - 1,) and scored.y.shape == scored.loss.shape == ((y != -100).sum(),)
    assert float(scored.nll.mean()) == pytest.approx(found["nll"], abs=1e-6)


def test_out_of_distribution_scores_leave_out_what_is_masked() -> None:
    """Proves that entropies of rows are means over their labels, inside and, where they come with labels, outside."""
    x, y = rows()
    far, far_y = 3 * torch.randn(N, T, 3), y.flip(0)
    one = posterior()
    found = pb.diagnostics.evaluate(one, (x, y), ood=(far, far_y), seed=0)
    means = []
    for inputs, labels in ((x, y), (far, far_y)):
        each, there = one.predict(inputs, seed=0).entropy, labels != -100
        means.append(torch.stack([row[at].mean() for row, at in zip(each, there, strict=True) if at.any()]))
    assert found["ood_auroc"] == pytest.approx(pb.diagnostics.auroc(*means))
    loader = DataLoader(list(zip(far, far_y, strict=True)), 3)
    assert pb.diagnostics.evaluate(one, (x, y), ood=loader, seed=0)["ood_auroc"] == found["ood_auroc"]
    without = pb.diagnostics.evaluate(one, (x, y), ood=far, seed=0)  # without labels all positions count
    assert without["ood_auroc"] == pytest.approx(
        pb.diagnostics.auroc(means[0], one.predict(far, seed=0).entropy.mean(1))
    )


def test_nothing_but_masks_is_refused_where_there_is_nothing_to_score() -> None:
    x, y = rows()
    nothing = torch.full_like(y, -100)
    one = posterior()
    assert bool((one.log_likelihood(x, nothing) == 0).all())
    for ask in (pb.diagnostics.evaluate, pb.diagnostics.scale_temperature):
        with pytest.raises(ValueError, match="no label but ignore_index"):
            ask(one, (x, nothing))  # type: ignore[operator]
    with pytest.raises(ValueError, match="ood holds no label but ignore_index"):
        pb.diagnostics.evaluate(one, (x, y), ood=(x, nothing))
    model = pb.models.Dense(nn.Linear(3, C), MASKED, N)
    with pytest.raises(ValueError, match="validation= holds no label"):
        pb.inference.fit(
            model, pb.models.MeanFieldGuide(model), (x, y), epochs=1, validation=(x, nothing), progress=False
        )


def test_validation_is_the_nll_of_evaluate() -> None:
    x, y = rows()
    model = pb.models.Dense(nn.Linear(3, C), MASKED, N)
    fitted = pb.Posterior(model, pb.models.PointGuide(model))
    for data in ((x, y), DataLoader(list(zip(x, y, strict=True)), 1)):
        found = Validation(data, model, ALONE).nll(fitted)
        assert found == pytest.approx(pb.diagnostics.evaluate(fitted, (x, y))["nll"], rel=1e-5)


def test_checks_count_labels() -> None:
    """Proves that accuracy, baseline and calibration are those of one row a label, and that a text may be longer in one
    batch than in another."""
    x, y = rows()
    one, flat = posterior(), posterior(pb.likelihoods.Categorical())
    found, expected, with_labels = Predicted("classification"), Predicted("classification"), 0
    for part in (slice(0, 3), slice(3, N)):
        length = T if part.start else 3
        cut = y[part].clone()
        cut[:, length:] = -100
        with_labels += int((cut != -100).any(1).sum())
        found.add(one.predict(x[part, :length], seed=0), cut[:, :length])
        expected.add(flat.predict(by_hand(x[part], cut)[0], seed=0), by_hand(x[part], cut)[1])
    assert found.rows == with_labels < N
    for name in ("hits", "expected", "variance"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-5)
    texts, others = [f.message for f in found.findings()], [f.message for f in expected.findings()]
    assert texts[0].split(";")[0] == others[0].split(";")[0]  # the accuracy
    assert texts[1] == others[1]  # the calibration
    assert pb.diagnostics.check(one, (x, y), seed=0)


def test_the_same_number_of_labels_in_every_row_weighs_as_before() -> None:
    """Proves that the standard error with weights is the plain one of row means where no label is masked."""
    x, _ = rows()
    y = torch.randint(0, C, (N, T))
    findings = []
    for likelihood in (MASKED, WHOLE):
        predicted = Predicted("classification")
        predicted.add(posterior(likelihood).predict(x, seed=0), y)
        findings.append([finding.message for finding in predicted.findings()])
    assert findings[0] == findings[1]


def test_temperature_conformal_sets_and_diversity_are_those_of_the_labels_that_are_there() -> None:
    x, y = rows()
    one, flat = posterior(), posterior(pb.likelihoods.Categorical())
    assert pb.diagnostics.diversity(one, (x, y), seed=0) == pytest.approx(
        pb.diagnostics.diversity(flat, by_hand(x, y), seed=0), abs=1e-5
    )
    same = pb.diagnostics.compare_to_reference(one, posterior(), (x, y), seed=0)
    assert same == {"agreement": 1.0, "total_variation": 0.0}
    # one label a row, so that sequences and labels have one NLL
    x1 = torch.randn(10 * N, 3)
    y1 = one.predict(x1[:, None]).mean[:, 0].argmax(-1)
    y1[::4], y1[1::4] = -100, torch.randint(0, C, (2 * 10,))
    single = posterior(pb.likelihoods.Categorical(ignore_index=-100))
    temperature = pb.diagnostics.scale_temperature(single, (x1, y1), seed=0).temperature
    assert temperature == pytest.approx(
        pb.diagnostics.scale_temperature(flat, by_hand(x1, y1), seed=0).temperature, rel=1e-3
    )
    sets = pb.diagnostics.ConformalSets(single, (x1, y1), level=0.8, seed=0)
    plain = pb.diagnostics.ConformalSets(flat, by_hand(x1, y1), level=0.8, seed=0)
    assert sets.num_rows == plain.num_rows == int((y1 != -100).sum())
    assert float(sets.threshold) == pytest.approx(float(plain.threshold), abs=1e-6)
    assert sets.evaluate((x1, y1)) == pytest.approx(plain.evaluate(by_hand(x1, y1)), abs=1e-6)


def test_arviz_has_what_is_masked_nowhere() -> None:
    """Proves that draws of y are masked where y is, and that a row without labels adds nothing to leave-one-out."""
    x, y = rows()
    one = posterior()
    data = pb.diagnostics.to_arviz(one, x, y, num_samples=20, seed=0)
    obs, observed = data["posterior_predictive"]["obs"].values, data["observed_data"]["obs"].values
    assert bool(((obs == -100) == (observed == -100)).all())
    assert bool((data["log_likelihood"]["obs"].values[:, :, 0] == 0).all())


@pytest.mark.parametrize("sampled", [True, False])
def test_leave_one_out_has_the_rows_with_labels(sampled: bool) -> None:
    """Proves that it is that of the data without the row that has none, whose ratios would have no tail."""
    x, y = rows()
    found = []
    for part in (slice(None), slice(1, None)):
        one = posterior(num_data=len(y[part]))
        if sampled:
            one = pb.Posterior.from_draws(one.model, one.draws(400, seed=0), num_chains=4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # k-hat is above 0.7
            found.append(pb.diagnostics.loo(one, x[part], y[part], num_samples=400, seed=0))
    assert found[0].n_data_points == found[1].n_data_points == N - 1
    assert math.isfinite(found[0].se) and bool((found[0].pareto_k.values < math.inf).all())
    for one, other in zip(found[0].pareto_k.values, found[1].pareto_k.values, strict=True):
        assert one == pytest.approx(other, abs=1e-3)


@pytest.mark.parametrize("name", ["Rank1", "Bella", "SpikeSlab", "WeightSharing"])
def test_every_model_trains_on_masked_labels(name: str) -> None:
    x, y = rows()
    model = getattr(pb.models, name)(nn.Linear(3, C), MASKED, N)
    guides = {"Rank1": pb.models.Rank1Guide, "Bella": pb.models.ParticleGuide}
    guide: Any = guides.get(name, pb.models.MeanFieldGuide)(model)
    fitted = pb.inference.fit(model, guide, (x, y), epochs=2, batch_size=1, progress=False, seed=0)
    assert all(math.isfinite(loss) for loss in fitted.losses)
    assert bool((fitted.log_likelihood(x, y)[..., 0] == 0).all())


def test_other_engines_train_on_masked_labels() -> None:
    """Proves that SGHMC, SVGD and an ensemble take them, and that the curvature of Laplace has the labels alone."""
    x, y = rows()
    model = pb.models.Dense(nn.Linear(3, C), MASKED, N)
    kernel = pb.inference.SGHMC(model, (x, y), step_size=0.01, friction=0.1, batch_size=2, thinning=2)
    chain = pb.inference.sample(kernel, num_samples=3, warmup_steps=2, progress=False)
    bella = pb.models.Bella(nn.Linear(3, C), MASKED, N)
    particles = pb.inference.SVGD(bella, pb.models.ParticleGuide(bella, 2)).fit((x, y), epochs=1, progress=False)
    ensemble = pb.inference.DeepEnsemble(nn.Linear(3, C), MASKED, N, num_networks=2).fit((x, y), epochs=1)
    for one in (chain, particles, ensemble):
        assert bool((one.log_likelihood(x, y)[..., 0] == 0).all())
    net, found = nn.Linear(3, C), []
    for likelihood, pair in ((MASKED, (x, y)), (pb.likelihoods.Categorical(), by_hand(x, y))):
        laplace = pb.inference.LastLayerLaplace(net, likelihood, len(pair[0]), prior=pb.priors.Normal(0.0, 1.0))
        found.append(laplace.fit(pair, epochs=0).guide.get_buffer("scale_tril"))  # type: ignore[attr-defined]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
