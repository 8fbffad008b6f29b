"""The ArviZ object: its names and dimensions, what ArviZ makes of it, its size, its file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import scipy.stats
import torch
import xarray as xr
from arviz_names import groups
from diagnostics.fake import FakePosterior, rows
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn import likelihoods
from pyro_bnn.diagnostics import to_arviz

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("error:left out")]

N, CLASSES, DRAWS, MEMBERS = 40, 3, 30, 4


@pytest.fixture(autouse=True)
def _no_windows() -> Iterator[None]:
    matplotlib.use("Agg")
    yield
    matplotlib.pyplot.close("all")


@pytest.fixture(scope="module")
def az() -> Any:
    return pytest.importorskip("arviz")


def sites(draws: int = DRAWS, members: int = MEMBERS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = {"fc.weight_tau": (), "fc.weight.s": (5,), "fc.weight.r": (3,), "out.weight": (3, 2), "noise": ()}
    return {name: torch.rand(draws, members, *shape, generator=generator) for name, shape in shapes.items()}


def classifier(members: int = MEMBERS, **settings: Any) -> FakePosterior:
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(DRAWS, members, N, CLASSES, generator=generator, dtype=torch.float64) / 4
    return FakePosterior(
        logits.softmax(-1), likelihoods.Categorical(), sites=sites(members=members), losses=[3.0, 2.0, 1.5], **settings
    )


def labels() -> Tensor:
    return torch.randint(CLASSES, (N,), generator=torch.Generator().manual_seed(7))


def export(posterior: FakePosterior | None = None, **settings: Any) -> Any:
    settings = {"num_samples": DRAWS, "seed": 0} | settings
    return to_arviz(posterior or classifier(), rows(N), labels(), **settings)


def test_groups_variables_and_dimensions() -> None:
    data = export()
    assert set(groups(data)) == {
        *(
            "posterior",
            "posterior_predictive",
            "log_likelihood",
            "observed_data",
            "constant_data",
            "function",
            "training",
        )
    }
    found = {
        f"{group}/{name}": dict(zip(array.dims, array.shape, strict=True))
        for group in groups(data)
        for name, array in data[group].data_vars.items()
    }
    sampled = {"chain": 1, "draw": DRAWS, "member": MEMBERS}
    enumerated = {"chain": 1, "draw": DRAWS * MEMBERS, "obs_id": N}
    factors = [f"weight.{factor}_{summary}" for factor in "sr" for summary in ("mean", "sd")]
    assert found == {
        "posterior/noise": sampled,
        **{f"posterior/{name}": sampled | {"layer": 1} for name in ("weight_tau", *factors)},
        **{f"posterior/weight_{name}": sampled | {f"weight_{name}_layer": 1} for name in ("mean", "sd")},
        "posterior_predictive/obs": enumerated,
        "function/probs": enumerated | {"class": CLASSES},
        "log_likelihood/obs": enumerated,
        "observed_data/obs": {"obs_id": N},
        "constant_data/x": {"obs_id": N},
        "training/loss": {"step": 3},
    }
    for group in groups(data):
        for dim, size in data[group].sizes.items():
            if not str(dim).endswith("layer"):
                assert data[group].coords[dim].values.tolist() == list(range(size))
    assert data["posterior"].coords["layer"].values.tolist() == ["fc"]
    assert data["posterior"].coords["weight_sd_layer"].values.tolist() == ["out"]


def test_values() -> None:
    posterior, y = classifier(), labels()
    data = export(posterior)
    given = sites()
    stored = data["posterior"]
    np.testing.assert_array_equal(stored["weight_tau"].sel(layer="fc")[0], given["fc.weight_tau"])
    np.testing.assert_allclose(stored["weight.s_mean"].sel(layer="fc")[0], given["fc.weight.s"].mean(-1), rtol=1e-6)
    flat = given["out.weight"].flatten(2).numpy()
    np.testing.assert_allclose(stored["weight_sd"].sel(weight_sd_layer="out")[0], flat.std(-1), rtol=1e-5)
    expected = posterior.table.log()[:, :, torch.arange(N), y].reshape(DRAWS * MEMBERS, N)
    np.testing.assert_allclose(data["log_likelihood"]["obs"][0], expected, rtol=1e-12)
    assert data["log_likelihood"]["obs"].dtype == np.float64
    np.testing.assert_array_equal(data["function"]["probs"][0], posterior.table.flatten(0, 1))
    members = data["log_likelihood"]["obs"].coords["member"]
    np.testing.assert_array_equal(members, np.tile(np.arange(MEMBERS), DRAWS))
    third = data["log_likelihood"]["obs"][0].values[members.values == 2]
    np.testing.assert_allclose(third, expected.reshape(DRAWS, MEMBERS, N)[:, 2])
    np.testing.assert_array_equal(data["observed_data"]["obs"], y)
    np.testing.assert_array_equal(data["training"]["loss"], [3.0, 2.0, 1.5])


def test_one_member_has_no_dimension_of_its_own() -> None:
    data = export(classifier(members=1))
    assert data["posterior"]["weight_tau"].dims == ("chain", "draw", "layer")
    assert data["posterior"]["noise"].dims == ("chain", "draw")
    assert data["log_likelihood"]["obs"].shape == (1, DRAWS, N)


def test_loo_counts_rows_not_rows_times_members(az: Any) -> None:
    posterior = classifier()
    result = az.loo(export(posterior), pointwise=True)
    assert result.n_data_points == N
    assert result.n_samples == DRAWS * MEMBERS
    pointwise = result.loo_i if hasattr(result, "loo_i") else result.elpd_i
    assert pointwise.shape == (N,)
    # Weak logits: leaving one datum out changes little, so that LOO is near the log of the mean density.
    density = posterior.table[:, :, torch.arange(N), labels()].mean((0, 1))
    elpd = result.elpd_loo if hasattr(result, "elpd_loo") else result.elpd
    assert float(elpd) == pytest.approx(float(density.log().sum()), abs=0.1 * N)
    assert float(elpd) < float(density.log().sum())


def test_loo_equals_that_of_the_members_run_together(az: Any) -> None:
    """The members as one long run of draws, which is what they are, give the same LOO."""
    posterior = classifier()
    joined = FakePosterior(
        posterior.table.flatten(0, 1).unsqueeze(1), likelihoods.Categorical(), sites={"a": torch.rand(120, 1)}
    )
    first, second = az.loo(export(posterior)), az.loo(export(joined, num_samples=DRAWS * MEMBERS))
    assert str(first) == str(second)


def test_arviz_runs_on_it(az: Any) -> None:
    data = export()
    summary = az.summary(data)
    assert len(summary) == 8 * MEMBERS
    assert "weight_tau[0, fc]" in summary.index
    az.plot_trace(data)
    az.plot_forest(data)
    az.plot_ppc(data) if hasattr(az, "plot_ppc") else az.plot_ppc_dist(data)


@pytest.mark.parametrize("kind", ["gaussian", "poisson"])
def test_predictive_checks_of_numbers(az: Any, kind: str) -> None:
    data = regression(kind)
    az.loo(data)
    az.plot_ppc(data) if hasattr(az, "plot_ppc") else az.plot_ppc_dist(data)
    assert "mean" in data["function"]


def regression(kind: str = "gaussian", outputs: tuple[int, ...] = (), **settings: Any) -> Any:
    generator = torch.Generator().manual_seed(8)
    table = 1 + torch.rand(DRAWS, MEMBERS, N, *outputs, generator=generator, dtype=torch.float64)
    likelihood = likelihoods.Gaussian(scale=0.5) if kind == "gaussian" else likelihoods.Poisson()
    posterior = FakePosterior(table, likelihood, scale=0.5, sites=sites())
    y = torch.poisson(table.mean((0, 1)), generator=generator)
    return to_arviz(posterior, rows(N), y, num_samples=DRAWS, **settings)


def test_several_outputs() -> None:
    data = regression(outputs=(2,))
    assert data["log_likelihood"]["obs"].dims == ("chain", "draw", "obs_id")
    assert data["posterior_predictive"]["obs"].dims == ("chain", "draw", "obs_id", "output")
    assert data["function"]["mean"].dims == ("chain", "draw", "obs_id", "output")
    assert data["observed_data"]["obs"].dims == ("obs_id", "output")


def test_one_output_has_no_dimension_of_its_own() -> None:
    data = regression(outputs=(1,))
    for group, name in (("posterior_predictive", "obs"), ("function", "mean"), ("observed_data", "obs")):
        assert data[group][name].dims[-1] == "obs_id"


def test_predictive_draws_follow_the_predictive_distribution() -> None:
    table = torch.zeros(400, 1, 300)
    posterior = FakePosterior(table, likelihoods.Gaussian(scale=1.0), sites={"a": torch.rand(400, 1)})
    data = to_arviz(posterior, rows(300), torch.zeros(300), num_samples=400, batch_size=100)
    drawn = data["posterior_predictive"]["obs"][0].values
    assert scipy.stats.kstest(drawn.flatten(), "norm").pvalue > 1e-3
    # Every batch has noise of its own: the rows of two batches are not copies of each other.
    correlation = np.corrcoef(drawn[:, :100].flatten(), drawn[:, 100:200].flatten())[0, 1]
    assert abs(correlation) < 0.03


def test_the_result_does_not_depend_on_the_batches() -> None:
    whole, parts = export(batch_size=N), export(batch_size=7)
    for group, name in (("log_likelihood", "obs"), ("function", "probs")):
        np.testing.assert_allclose(whole[group][name], parts[group][name], rtol=1e-12)


def test_the_same_seed_gives_the_same() -> None:
    first, second, other = export(seed=3), export(seed=3), export(seed=4)
    obs = [data["posterior_predictive"]["obs"].values for data in (first, second, other)]
    assert (obs[0] == obs[1]).all()
    assert (obs[0] != obs[2]).any()


def test_whole_sites_by_name_and_by_pattern() -> None:
    data = export(sites=["fc.weight.s", r"out\..*"])["posterior"]
    assert data["fc.weight.s"].dims == ("chain", "draw", "member", "fc.weight.s_dim_0")
    assert data["out.weight"].shape == (1, DRAWS, MEMBERS, 3, 2)
    assert "weight.s_mean" not in data and "weight.r_mean" in data
    assert "fc.weight.r" in export(sites=r"fc.*")["posterior"]


def test_a_name_is_taken_literally_before_it_is_a_pattern() -> None:
    posterior = classifier()
    posterior.sites = {"a.b": torch.rand(DRAWS, 1, 2), "acb": torch.rand(DRAWS, 1, 2)}
    data = to_arviz(posterior, sites="a.b", groups="posterior", num_samples=DRAWS)["posterior"]
    assert set(data.data_vars) == {"a.b", "acb_mean", "acb_sd"}


def test_what_layers_share_lies_along_one_dimension() -> None:
    """Parameters of one name in several layers, some of which lack it, and one at the root of the network."""
    posterior = classifier(members=1)
    layers = ["stem", "layer1.0.conv1", "layer1.0.conv2"]
    posterior.sites = {f"{layer}.weight.s": torch.full((DRAWS, 1, 4), float(i)) for i, layer in enumerate(layers)}
    posterior.sites |= {f"{layer}.weight.s_tau": torch.full((DRAWS, 1), float(i)) for i, layer in enumerate(layers)}
    posterior.sites |= {"layer1.0.conv2.bias": torch.ones(DRAWS, 1, 4), "class_token": torch.ones(DRAWS, 1, 4)}
    data = to_arviz(posterior, groups="posterior", num_samples=DRAWS)["posterior"]
    assert data["weight.s_mean"].dims == data["weight.s_tau"].dims == ("chain", "draw", "layer")
    assert data.coords["layer"].values.tolist() == layers
    for name in ("weight.s_mean", "weight.s_tau"):
        np.testing.assert_array_equal(data[name][0, 0], [0, 1, 2])
    assert data["bias_mean"].dims[-1] == "bias_mean_layer"
    assert data.coords["bias_mean_layer"].values.tolist() == ["layer1.0.conv2"]
    assert data["class_token_sd"].dims == ("chain", "draw")


@pytest.mark.parametrize("site", ["fc.weight", "nothing", "["])
def test_an_unknown_site_names_those_there_are(site: str) -> None:
    with pytest.raises(ValueError, match=r"fc\.weight_tau, fc\.weight\.s, fc\.weight\.r, out\.weight, noise"):
        export(sites=[site])


def test_slashes_in_names_make_no_groups() -> None:
    posterior = classifier()
    posterior.sites = {"outer/inner": torch.rand(DRAWS, 1, 2)}
    data = to_arviz(posterior, groups="posterior", sites="outer/inner", num_samples=DRAWS)
    assert data["posterior"]["outer.inner"].dims[-1] == "outer.inner_dim_0"


def test_a_million_weights_become_two_numbers() -> None:
    posterior = classifier(members=1)
    posterior.sites = {"big.weight": torch.rand(DRAWS, 1, 1000, 1000), "empty": torch.rand(DRAWS, 1, 0)}
    data = to_arviz(posterior, groups="posterior", num_samples=DRAWS)
    assert set(data["posterior"].data_vars) == {"weight_mean", "weight_sd"}
    with pytest.raises(
        ValueError, match=r"max_values=10,000,000.*posterior/big\.weight with 30,000,000.*or a larger max_values"
    ):
        to_arviz(posterior, groups="posterior", sites="big.weight", num_samples=DRAWS)


def size(data: Any) -> int:
    return sum(array.size for group in groups(data) for array in data[group].data_vars.values())


def test_what_was_not_asked_for_by_name_is_left_out_first() -> None:
    full = size(export())
    assert size(export(max_values=full)) == full
    probs = DRAWS * MEMBERS * N * CLASSES
    with pytest.warns(UserWarning, match=rf"left out.*max_values={full - 1:,}.*constant_data/x \({N}\)"):
        data = export(max_values=full - 1)
    assert "constant_data" not in groups(data)
    assert data.attrs["left_out"] == "constant_data/x"
    with pytest.warns(UserWarning, match=rf"function/probs \({probs:,}\)"):
        data = export(max_values=full - N - 1)
    assert "function" not in groups(data)  # and without it, x fits
    assert "constant_data" in groups(data)
    assert size(data) <= full - N - 1
    with pytest.raises(ValueError, match=r"the largest: .*log_likelihood/obs with 4,800.*Give fewer rows of x"):
        export(max_values=2 * DRAWS * MEMBERS * N)


def test_a_result_that_is_too_large_is_refused_before_anything_is_predicted() -> None:
    posterior = classifier()
    with pytest.raises(ValueError, match="max_values=1,000 "):
        export(posterior, max_values=1000)
    assert posterior.calls == []


def test_files_hold_everything(az: Any, tmp_path: Path) -> None:
    data = export(sites=["fc.weight.s"])
    path = tmp_path / "posterior.nc"
    data.to_netcdf(str(path))
    loaded = az.from_netcdf(str(path))
    assert set(groups(loaded)) == set(groups(data))
    for group in groups(data):
        one, two = (xr.Dataset(dict(tree[group].data_vars)) for tree in (data, loaded))
        xr.testing.assert_equal(one, two)
    assert loaded.attrs["inference_library"] == "pyro_bnn"
    assert loaded.attrs["members"] == MEMBERS
    assert az.loo(loaded).n_data_points == N


def test_groups_can_be_chosen() -> None:
    assert groups(export(groups=("log_likelihood",))) == ["log_likelihood"]
    assert groups(to_arviz(classifier(), groups="posterior", num_samples=DRAWS)) == ["posterior"]
    predictive = to_arviz(classifier(), rows(N), groups=("posterior_predictive",), num_samples=DRAWS)
    assert predictive["posterior_predictive"]["obs"].shape == (1, DRAWS * MEMBERS, N)


def test_inputs_that_are_no_single_tensor() -> None:
    posterior, y = classifier(), labels()
    table = {"rows": rows(N), "image": torch.rand(N, 2, 2, dtype=torch.float32).bfloat16()}
    data = to_arviz(posterior, table, y, num_samples=DRAWS)["constant_data"]
    assert data["x_rows"].dims == ("obs_id",)
    assert data["x_image"].dims == ("obs_id", "x_image_dim_1", "x_image_dim_2")
    data = to_arviz(posterior, (rows(N), torch.rand(N, 3)), y, num_samples=DRAWS)["constant_data"]
    assert set(data.data_vars) == {"x_0", "x_1"}


def test_errors() -> None:
    posterior, x, y = classifier(), rows(N), labels()
    with pytest.raises(ValueError, match="unknown group 'prior'; groups= takes any of posterior, "):
        to_arviz(posterior, x, y, groups=("prior",))
    with pytest.raises(
        ValueError, match="y is missing, and log_likelihood and observed_data cannot be made without it"
    ):
        to_arviz(posterior, x)
    with pytest.raises(ValueError, match="x is missing, and posterior_predictive and"):
        to_arviz(posterior)
    with pytest.raises(ValueError, match="x and y disagree on the number of samples"):
        to_arviz(posterior, x, y[:-1])
    with pytest.raises(ValueError, match="x has no rows"):
        to_arviz(posterior, x[:0], y[:0])
    with pytest.raises(ValueError, match="label 7, but the network has 3 outputs"):
        to_arviz(posterior, x, torch.full((N,), 7))
    function = pb.models.Dense(nn.Linear(1, 1), None)
    with pytest.raises(ValueError, match="need a likelihood of pyro_bnn"):
        to_arviz(pb.Posterior(function, pb.models.MeanFieldGuide(function)), torch.zeros(3, 1), torch.zeros(3, 1))
    posterior.table[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="predicts NaN"):
        to_arviz(posterior, x, y)


def test_arrays_are_data_and_strings_and_models_are_none() -> None:
    posterior, x, y = classifier(), rows(N), labels()
    ours, theirs = to_arviz(posterior, x.numpy(), y.numpy()), to_arviz(posterior, x, y)
    assert ours["observed_data"].equals(theirs["observed_data"])
    assert ours["log_likelihood"].equals(theirs["log_likelihood"])
    with pytest.raises(TypeError, match="y is str; expected tensors, NumPy arrays"):
        to_arviz(posterior, x, "y")
    with pytest.raises(TypeError, match="x holds no tensor with a batch axis: got str"):
        to_arviz(posterior, "x", y)
    with pytest.raises(TypeError, match="expected a posterior, got Linear"):
        to_arviz(nn.Linear(2, 2), x, y)  # type: ignore[arg-type]


def test_points_are_stored_once_however_many_draws_are_asked_for() -> None:
    model = pb.models.Dense(nn.Linear(2, 3), likelihoods.Categorical(), N)
    point = pb.Posterior(model, pb.models.PointGuide(model))
    tree = to_arviz(point, torch.randn(N, 2), torch.arange(N) % 3, num_samples=7)
    assert {tree[group].sizes["draw"] for group in ("posterior", "log_likelihood", "sample_stats")} == {1}
