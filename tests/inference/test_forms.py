"""Forms and engines: engines agree on a model with an exact posterior, and a pair that cannot be is refused."""

import json

import pyro.distributions as dist
import pytest
import torch
from forms import (
    DATA,
    FORMS,
    LIKELIHOOD,
    REFERENCE,
    ROWS,
    Form,
    X,
    by_low_rank_normal,
    by_mean_field,
    by_nuts,
    by_sghmc,
    by_svgd,
    distance,
    mean_field_ratio,
    moments,
    network,
    reference,
    targets,
)
from pyro import poutine

import pyro_bnn as pb
from pyro_bnn.inference import SGHMCEM, SVGD, SWAG, AutoParticles, DeepEnsemble, LastLayerLaplace, sample
from pyro_bnn.models import (
    CodebookGuide,
    Dense,
    ParticleGuide,
    Rank1Guide,
)


def off(posterior: pb.Posterior, form: str, num_samples: int | None) -> tuple[float, float]:
    return distance(moments(posterior, num_samples), reference(form))


# ---------------------------------------------------------------------------------------------------- references


@pytest.mark.parametrize("form", FORMS)
def test_the_density_of_the_reference_is_that_of_the_model(form: str) -> None:
    """Proves that the log joint densities of model and formula differ by a constant, over draws of all sites."""
    own: Form = FORMS[form]
    model, shapes = own.frozen().double(), own.shapes()
    assert shapes.keys() == own.priors.keys()
    found = []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        values = {n: 0.2 + torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
        plated = {n: v.reshape((1, 1) + v.shape) for n, v in values.items()}
        trace = poutine.trace(poutine.condition(model, data=plated)).get_trace(X.double(), targets().double())
        found.append(float(trace.log_prob_sum() + own.potential(values)))
    assert max(found) - min(found) < 1e-9 * max(map(abs, found))


@pytest.mark.parametrize("form", FORMS)
def test_the_reference_agrees_with_nuts_and_with_a_closed_form(form: str) -> None:
    """Proves of the committed reference that it is worth thousands of independent draws, that short chains of NUTS are
    where it is, within the error that their effective sample size leaves, and that for a last layer it is exact."""
    record = json.loads(REFERENCE.read_text())["forms"][form]
    nuts, draws = record["nuts"], record["independent_draws"]
    assert draws >= 3000
    smallest = min(nuts["worst_ess"].values())
    assert nuts["off"] < 4 / smallest**0.5 and abs(nuts["ratio"] - 1) < 4 / (2 * smallest) ** 0.5
    if form == "last layer":
        weighted = torch.tensor(record["mean"]).double(), torch.tensor(record["std"]).double()
        error, ratio = distance(weighted, reference(form))
        assert error < 4 / draws**0.5 and abs(ratio - 1) < 4 / (2 * draws) ** 0.5


# ------------------------------------------------------------------------------------------- a closed form, quickly


def test_sghmc_of_the_last_layer_has_the_exact_posterior() -> None:
    """Proves that SGHMC has means and deviations of the closed form, within the error of some 400 independent draws."""
    error, ratio = off(by_sghmc("last layer"), "last layer", 2400)
    assert error < 0.15  # 3 / sqrt(400)
    assert 0.9 < ratio < 1.11  # 3 / sqrt(2 * 400)


def test_laplace_of_the_last_layer_has_the_exact_covariance() -> None:
    """Proves the deviations of the closed form, as the log posterior is quadratic; the mean is the given network's."""
    engine = LastLayerLaplace(network(), LIKELIHOOD, ROWS, prior=pb.priors.Normal(0.0, 1.0))
    torch.manual_seed(0)
    _, ratio = off(engine.fit(DATA), "last layer", 4000)
    assert 0.95 < ratio < 1.05  # 4000 independent draws: 4 / sqrt(2 * 4000)


@pytest.mark.parametrize("components", [1, 3])
def test_mean_field_of_the_last_layer_has_the_deviations_of_the_best_factorised_normal(components: int) -> None:
    """Proves the optimum of the bound: a deviation that is too large by a known ratio, and the exact mean.

    Of the mean 0.02 is the error of 4000 draws; the rest is what the optimiser leaves along two directions in which the
    posterior is 17 times as wide as in the others (0.06 to 0.10 over seeds, `python -m tests.benchmarks.forms`).
    """
    error, ratio = off(by_mean_field("last layer", components), "last layer", 4000)
    assert error < 0.25
    assert abs(ratio / mean_field_ratio() - 1) < 0.1


def test_svgd_of_the_last_layer_has_the_mean_and_too_small_a_deviation() -> None:
    """Proves that 20 particles are at the exact mean, with about half of the deviation (0.50 as measured)."""
    error, ratio = off(by_svgd("last layer", 20), "last layer", None)
    assert error < 0.1
    assert 0.35 < ratio < 0.7


@pytest.mark.slow
def test_a_low_rank_normal_of_the_last_layer_comes_near_the_exact_posterior() -> None:
    """Proves that Pyro's AutoLowRankMultivariateNormal, which holds the exact covariance, is on its way to it.

    Its mean is there within the error of 4000 draws and of the last steps; its deviations, 1.24 times the exact ones
    after 3,000 steps, come nearer with more steps. The best factorised Normal has 1.31.
    """
    found = [off(by_low_rank_normal("last layer", epochs=steps), "last layer", 4000) for steps in (3000, 10_000)]
    assert all(error < 0.15 for error, _ in found)
    assert 1.0 < found[1][1] < found[0][1] < mean_field_ratio()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("baseline", [SWAG, DeepEnsemble, LastLayerLaplace])
def test_a_baseline_refuses_a_model_and_names_what_serves(
    form: str, baseline: type[SWAG | DeepEnsemble | LastLayerLaplace]
) -> None:
    """Proves that an engine for plain networks takes no form of weights, and says which engines take one."""
    with pytest.raises(TypeError, match=r"expected a plain network.*MeanFieldGuide.*SGHMC.*AutoParticles"):
        baseline(FORMS[form].model(), LIKELIHOOD, ROWS)


@pytest.mark.parametrize("form", FORMS)
def test_a_guide_of_another_form_is_refused_with_one_that_serves(form: str) -> None:
    """Proves that the guides that belong to one form name it and a guide for the others."""
    model = FORMS[form].model()
    if form != "rank-1":
        with pytest.raises(TypeError, match=r"takes a pyro_bnn.models.Rank1, got .*use pyro_bnn.models.MeanFieldGuide"):
            Rank1Guide(model)  # type: ignore[arg-type]
    if form != "low-rank":
        with pytest.raises(TypeError, match=r"takes a pyro_bnn.models.Bella, .*use pyro_bnn.inference.AutoParticles"):
            ParticleGuide(model)  # type: ignore[arg-type]
    if form in ("rank-1", "low-rank"):
        with pytest.raises(TypeError, match=r"takes a pyro_bnn.models.WeightSharing, .*models.MeanFieldGuide"):
            CodebookGuide(model)  # type: ignore[arg-type]
    if form == "codebook":
        with pytest.raises(TypeError, match=r"use the guide model.shared_guide\(\)"):
            CodebookGuide(model)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", FORMS)
def test_a_space_of_products_is_refused_without_pairs(form: str) -> None:
    """Proves that SVGD on products of factors names the guide that has them."""
    model = FORMS[form].model()
    with pytest.raises(ValueError, match=r"needs a guide with pairs\(\).*use pyro_bnn.models.ParticleGuide"):
        SVGD(model, AutoParticles(model, 3), space="product")


@pytest.mark.parametrize("form", FORMS)
def test_sghmc_within_em_refuses_a_form_without_spike_and_slab(form: str) -> None:
    """Proves that the kernel is refused where it is made when no prior can be one, and that SGHMC is named."""
    with pytest.raises(ValueError, match=r"no spike-and-slab site: .*or use SGHMC"):
        SGHMCEM(FORMS[form].model(), DATA, step_size=0.01, friction=0.1, batch_size=ROWS)


def test_sghmc_within_em_refuses_distributions_without_a_spike_when_it_starts() -> None:
    """Proves that a prior whose class does not tell is looked at with the model, and refused in the same words."""
    model = Dense(network(), LIKELIHOOD, ROWS, prior=lambda name, w: dist.Normal(0.0, 1.0).expand(w.shape))
    kernel = SGHMCEM(model, DATA, step_size=0.01, friction=0.1, batch_size=ROWS)
    with pytest.raises(ValueError, match=r"no spike-and-slab site: .*or use SGHMC"):
        sample(kernel, 2, 2, progress=False)


# --------------------------------------------------------------------------------------- all forms x all engines

#: engine, draws of each member that are looked at, the most that the mean may be off by, and the least and greatest
#: ratio of the standard deviation. Samplers are off by the error of some 100 (NUTS) and 300 (SGHMC) independent draws,
#: three or four times; what is approximate by more than that, as `python -m tests.benchmarks.forms` has measured it.
ENGINES = {
    "NUTS": (by_nuts, 150, 0.5, 0.7, 1.4),
    "SGHMC": (by_sghmc, 2400, 0.6, 0.85, 1.2),
    "mean field": (lambda form: by_mean_field(form, 1), 2400, 1.0, 0.6, 1.6),
    "mixture": (lambda form: by_mean_field(form, 3), 2400, 1.0, 0.6, 1.6),
    "low-rank Normal": (by_low_rank_normal, 2400, 0.6, 0.6, 1.6),
    "SVGD": (lambda form: by_svgd(form, 20), None, 0.8, 0.05, 0.9),
}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("form", FORMS)
def test_an_engine_is_within_its_bounds_on_every_form(form: str, engine: str) -> None:
    """Proves it for the function at 21 probes, inside and outside the data, against draws of the exact posterior."""
    infer, draws, most, least, greatest = ENGINES[engine]
    error, ratio = off(infer(form), form, draws)
    assert error < most
    assert least < ratio < greatest
