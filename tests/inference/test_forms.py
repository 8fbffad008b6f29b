"""Forms and engines: engines agree on a model with an exact posterior, and a pair that cannot be is refused."""

from collections.abc import Callable

import pyro.distributions as dist
import pytest
import torch
from last_layer import (
    LIKELIHOOD,
    ROWS,
    X,
    by_low_rank_normal,
    by_mean_field,
    by_sghmc,
    by_svgd,
    distance,
    last_layer,
    mean_field_ratio,
    network,
    targets,
)

import pyro_bnn as pb
from pyro_bnn.inference import SGHMCEM, SVGD, SWAG, AutoParticles, DeepEnsemble, LastLayerLaplace, sample
from pyro_bnn.models import (
    Bella,
    CodebookGuide,
    Dense,
    ParticleGuide,
    Rank1,
    Rank1Guide,
    SharedWeights,
    WeightSharing,
)


def shared() -> SharedWeights:
    model = WeightSharing(network(), LIKELIHOOD, ROWS)
    guide = CodebookGuide.from_network(model, codes=4, outliers=0.0, blend=0.0, smallest=0, seed=0)
    return SharedWeights(network(), LIKELIHOOD, ROWS, codebook=guide.book)


FORMS: dict[str, Callable[[], pb.models.Dense | Rank1 | Bella | SharedWeights]] = {
    "dense": lambda: Dense(network(), LIKELIHOOD, ROWS),
    "rank-1": lambda: Rank1(network(), LIKELIHOOD, ROWS),
    "low-rank": lambda: Bella(network(), LIKELIHOOD, ROWS, rank=1),
    "last layer": last_layer,
    "codebook": shared,
}


def test_sghmc_of_the_last_layer_has_the_exact_posterior() -> None:
    """Proves that SGHMC has means and deviations of the closed form, within the error of some 400 independent draws."""
    off, ratio = distance(by_sghmc(), 4000)
    assert off < 0.15  # 3 / sqrt(400)
    assert 0.9 < ratio < 1.11  # 3 / sqrt(2 * 400)


def test_laplace_of_the_last_layer_has_the_exact_covariance() -> None:
    """Proves the deviations of the closed form, as the log posterior is quadratic; the mean is the given network's."""
    engine = LastLayerLaplace(network(), LIKELIHOOD, ROWS, prior=pb.priors.Normal(0.0, 1.0))
    torch.manual_seed(0)
    _, ratio = distance(engine.fit((X, targets())), 4000)
    assert 0.95 < ratio < 1.05  # 4000 independent draws: 4 / sqrt(2 * 4000)


@pytest.mark.parametrize("components", [1, 3])
def test_mean_field_of_the_last_layer_has_the_deviations_of_the_best_factorised_normal(components: int) -> None:
    """Proves the optimum of the bound: a deviation that is too large by a known ratio, and the exact mean.

    Of the mean 0.02 is the error of 4000 draws; the rest is what the optimiser leaves along two directions in which the
    posterior is 17 times as wide as in the others (0.06 to 0.10 over seeds, `python -m tests.benchmarks.forms`).
    """
    off, ratio = distance(by_mean_field(components), 4000)
    assert off < 0.25
    assert abs(ratio / mean_field_ratio() - 1) < 0.1


def test_svgd_of_the_last_layer_has_the_mean_and_too_small_a_deviation() -> None:
    """Proves that 20 particles are at the exact mean, with about half of the deviation (0.50 as measured)."""
    off, ratio = distance(by_svgd(20), None)
    assert off < 0.1
    assert 0.35 < ratio < 0.7


@pytest.mark.slow
def test_a_low_rank_normal_of_the_last_layer_comes_near_the_exact_posterior() -> None:
    """Proves that Pyro's AutoLowRankMultivariateNormal, which holds the exact covariance, is on its way to it.

    Its mean is there within the error of 4000 draws and of the last steps; its deviations, 1.24 times the exact ones
    after 3,000 steps, come nearer with more steps. The best factorised Normal has 1.31.
    """
    found = [distance(by_low_rank_normal(steps), 4000) for steps in (3000, 10_000)]
    assert all(off < 0.15 for off, _ in found)
    assert 1.0 < found[1][1] < found[0][1] < mean_field_ratio()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("baseline", [SWAG, DeepEnsemble, LastLayerLaplace])
def test_a_baseline_refuses_a_model_and_names_what_serves(
    form: str, baseline: type[SWAG | DeepEnsemble | LastLayerLaplace]
) -> None:
    """Proves that an engine for plain networks takes no form of weights, and says which engines take one."""
    with pytest.raises(TypeError, match=r"expected a plain network.*MeanFieldGuide.*SGHMC.*AutoParticles"):
        baseline(FORMS[form](), LIKELIHOOD, ROWS)


@pytest.mark.parametrize("form", FORMS)
def test_a_guide_of_another_form_is_refused_with_one_that_serves(form: str) -> None:
    """Proves that the guides that belong to one form name it and a guide for the others."""
    model = FORMS[form]()
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
    model = FORMS[form]()
    with pytest.raises(ValueError, match=r"needs a guide with pairs\(\).*use pyro_bnn.models.ParticleGuide"):
        SVGD(model, AutoParticles(model, 3), space="product")


@pytest.mark.parametrize("form", FORMS)
def test_sghmc_within_em_refuses_a_form_without_spike_and_slab(form: str) -> None:
    """Proves that the kernel is refused where it is made when no prior can be one, and that SGHMC is named."""
    with pytest.raises(ValueError, match=r"no spike-and-slab site: .*or use SGHMC"):
        SGHMCEM(FORMS[form](), (X, targets()), step_size=0.01, friction=0.1, batch_size=ROWS)


def test_sghmc_within_em_refuses_distributions_without_a_spike_when_it_starts() -> None:
    """Proves that a prior whose class does not tell is looked at with the model, and refused in the same words."""
    model = Dense(network(), LIKELIHOOD, ROWS, prior=lambda name, w: dist.Normal(0.0, 1.0).expand(w.shape))
    kernel = SGHMCEM(model, (X, targets()), step_size=0.01, friction=0.1, batch_size=ROWS)
    with pytest.raises(ValueError, match=r"no spike-and-slab site: .*or use SGHMC"):
        sample(kernel, 2, 2, progress=False)
