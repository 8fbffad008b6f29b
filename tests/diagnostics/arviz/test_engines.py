"""Every engine's posterior in ArviZ: all groups, what ArviZ computes and draws of them, their files and their sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import arviz
import matplotlib
import numpy as np
import pytest
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn.diagnostics.checking.checks import check
from pyro_bnn.models.architectures import resnet18

pytestmark = pytest.mark.filterwarnings("ignore")

N = 60
OLD = arviz.__version__.startswith("0.")


@pytest.fixture(autouse=True)
def _no_windows() -> Iterator[None]:
    matplotlib.use("Agg")
    yield
    matplotlib.pyplot.close("all")


def data() -> tuple[Tensor, Tensor]:
    x = torch.randn(N, 2, generator=torch.Generator().manual_seed(0))
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()


def network(dropout: float = 0.0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(2, 12), nn.Tanh(), nn.Dropout(dropout), nn.Linear(12, 3))


LIKELIHOOD = pb.likelihoods.Categorical()


def svi() -> pb.Posterior:
    model = pb.models.Rank1(network(), LIKELIHOOD, N)
    return pb.inference.fit(model, pb.models.Rank1Guide(model, components=2), data(), epochs=3, progress=False, seed=0)


def codebook() -> pb.Posterior:
    model = pb.models.WeightSharing(network(), LIKELIHOOD, N)
    guide = pb.models.CodebookGuide.from_network(model, codes=4)
    return pb.inference.fit(model, guide, data(), epochs=3, progress=False, seed=0)


def svgd() -> pb.Posterior:
    model = pb.models.Bella(network(), LIKELIHOOD, N, rank=1)
    engine = pb.inference.SVGD(model, pb.models.ParticleGuide(model, 4), lr=1e-2)
    return engine.fit(data(), 3, progress=False, seed=0)


def sghmc() -> pb.Posterior:
    model = pb.models.Dense(network(), LIKELIHOOD, N)
    kernel = pb.inference.SGHMC(model, data(), step_size=0.05, friction=0.2, batch_size=N)
    return pb.inference.sample(kernel, 30, 10, num_chains=2, progress=False, seed=0)


def sghmc_within_em() -> pb.Posterior:
    model = pb.models.SpikeSlab(network(), LIKELIHOOD, N)
    kernel = pb.inference.SGHMCEM(model, data(), step_size=0.05, friction=0.2, batch_size=N)
    return pb.inference.sample(kernel, 30, 10, progress=False, seed=0)


def nuts() -> pb.Posterior:
    model = pb.models.Dense(network(), LIKELIHOOD, N).eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mcmc = MCMC(NUTS(model, max_tree_depth=3), 30, 10, disable_progbar=True)
        mcmc.run(*data())
    return pb.Posterior.from_mcmc(mcmc, model)


def ensemble() -> pb.Posterior:
    return pb.inference.DeepEnsemble(network(), LIKELIHOOD, N, num_networks=4).fit(
        data(), epochs=3, progress=False, seed=0
    )


def laplace() -> pb.Posterior:
    return pb.inference.LastLayerLaplace(network(), LIKELIHOOD, N).fit(data(), epochs=3, progress=False, seed=0)


def swag() -> pb.Posterior:
    engine = pb.inference.SWAG(network(), LIKELIHOOD, N, rank=3)
    return engine.fit(data(), epochs=5, progress=False, seed=0)


def dropout() -> pb.Posterior:
    return pb.inference.MCDropout(network(0.2), LIKELIHOOD, N).fit(data(), epochs=3, progress=False, seed=0)


ENGINES: list[Callable[[], pb.Posterior]] = [
    *(svi, codebook, svgd, sghmc, sghmc_within_em, nuts),
    *(ensemble, laplace, swag, dropout),
]


@pytest.fixture(scope="module")
def exported() -> Callable[[Any], tuple[pb.Posterior, Any]]:
    """The posterior and the ArviZ object of an engine, each made once."""
    made: dict[Any, tuple[pb.Posterior, Any]] = {}

    def make(engine: Any) -> tuple[pb.Posterior, Any]:
        if engine not in made:
            posterior = engine()
            made[engine] = (
                posterior,
                pb.diagnostics.to_arviz(posterior, *data(), probes=data()[0][:3], num_samples=draws(posterior), seed=0),
            )
        return made[engine]

    return make


def draws(posterior: pb.Posterior) -> int:
    return posterior.num_stored or (1 if posterior.is_deterministic else 30)


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.__name__)
def test_all_groups_of_every_engine(engine: Any, exported: Any, tmp_path: Path) -> None:
    posterior, idata = exported(engine)
    for group in (
        "posterior",
        "posterior_predictive",
        "log_likelihood",
        "sample_stats",
        "observed_data",
        "constant_data",
    ):
        assert idata[group].data_vars, group
    functions = draws(posterior) * posterior.num_members // posterior.num_chains
    assert idata["log_likelihood"]["obs"].shape == (posterior.num_chains, functions, N)
    assert idata["posterior"]["function"].dims[-2:] == ("probe", "class")
    has_density = engine in (svi, codebook, laplace, dropout)  # of dropout, the probability of its masks
    assert ("log_q" in idata["sample_stats"]) == has_density == ("log_p" in idata["sample_stats"])
    assert np.isfinite(idata["sample_stats"]["lp"]).all()
    path = tmp_path / "posterior.nc"
    idata.to_netcdf(str(path))
    loaded = arviz.from_netcdf(str(path))
    np.testing.assert_array_equal(loaded["log_likelihood"]["obs"], idata["log_likelihood"]["obs"])
    np.testing.assert_array_equal(loaded["posterior"]["function"], idata["posterior"]["function"])


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.__name__)
def test_arviz_runs_on_every_engine(engine: Any, exported: Any) -> None:
    posterior, idata = exported(engine)
    summary = arviz.summary(idata, var_names=["function"])
    assert len(summary) == 3 * 3 * posterior.num_members
    if OLD or idata["log_likelihood"].sizes["draw"] >= 30:  # the tail of four particles has no shape
        assert arviz.loo(idata).n_data_points == N
    arviz.plot_trace(idata, var_names=["function"])
    arviz.plot_forest(idata)
    arviz.plot_ppc(idata, num_pp_samples=3) if OLD else arviz.plot_ppc_dist(idata, num_samples=3)


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.__name__)
def test_the_second_line_of_arviz_computes_the_same(engine: Any, exported: Any) -> None:
    """arviz-stats stands beside ArviZ 0.23 where ArviZ 1 cannot be installed."""
    stats = pytest.importorskip("arviz_stats")
    _, idata = exported(engine)
    tree = idata.to_datatree() if OLD else idata
    summary = stats.summary(tree, var_names=["function"], round_to="none")
    np.testing.assert_allclose(
        summary["mean"], tree["posterior"]["function"].mean(("chain", "draw")).values.ravel(), rtol=1e-4
    )
    if tree["log_likelihood"].sizes["draw"] < 30:
        return  # the tail of four particles has no shape
    found = stats.loo(tree)
    assert found.n_data_points == N
    if OLD:
        assert found.elpd == pytest.approx(arviz.loo(idata).elpd_loo, rel=0.05)


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.__name__)
def test_the_second_line_of_arviz_draws_it(engine: Any, exported: Any) -> None:
    """Its version 0.8, the last for Python 3.11, does not run with a current xarray or matplotlib."""
    plots = pytest.importorskip("arviz_plots", minversion="1")
    _, tree = exported(engine)
    plots.plot_trace_dist(tree, var_names=["function"], backend="matplotlib")
    plots.plot_forest(tree, var_names=["function"], backend="matplotlib")
    plots.plot_ppc_dist(tree, num_samples=3, backend="matplotlib")


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.__name__)
def test_every_engine_is_scored_and_checked(engine: Any, exported: Any) -> None:
    posterior, _ = exported(engine)
    count = min(draws(posterior), 8)
    metrics = pb.diagnostics.evaluate(posterior, data(), ood=10 * data()[0], num_samples=count)
    assert all(np.isfinite(value) for value in metrics.values())
    found = check(posterior, data(), num_samples=count, metrics=metrics)
    topics = {finding.topic for finding in found}
    assert {"accuracy", "calibration", "spread", "out of domain"} <= topics
    assert ("sampler" in topics) == (engine in (sghmc, sghmc_within_em, nuts))
    assert ("convergence" in topics) == (engine in (sghmc, sghmc_within_em, nuts))


def test_the_size_of_a_large_network_is_bounded() -> None:
    """11 million weights, of which a few hundred numbers a draw go to ArviZ, and nothing else is ever held at once."""
    torch.manual_seed(0)
    model = pb.models.Dense(resnet18(10), LIKELIHOOD, 50)
    posterior = pb.Posterior(model, pb.models.MeanFieldGuide(model))
    x, y = torch.randn(4, 3, 32, 32), torch.randint(10, (4,))
    idata = pb.diagnostics.to_arviz(posterior, x, y, probes=x[:2], num_samples=3)
    sizes = {
        group: sum(v.size for v in idata[group].data_vars.values())
        for group in ("posterior", "sample_stats", "function")
    }
    layers = len(model.sites())
    assert sizes["posterior"] == 3 * (2 * layers + 2 * 10)
    assert sizes["sample_stats"] == 2 * 3 and sizes["function"] == 3 * 4 * 10
    with pytest.raises(ValueError, match="more than max_values"):
        pb.diagnostics.to_arviz(posterior, groups="posterior", sites=".*weight", num_samples=3)
