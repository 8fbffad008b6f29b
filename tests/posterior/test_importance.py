"""Which groups are included by each chain, and what they are worth: draws that are written down, densities by hand."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn.diagnostics import ScaledPosterior, plots
from pyro_bnn.posterior.draw_source import DrawSource
from pyro_bnn.posterior.importance import row_losses
from pyro_bnn.priors import SpikeAndSlab

NOISE = 0.5


def model(inputs: int = 3) -> pb.models.SpikeSlab:
    """A linear network: y = w x + noise, a column a weight."""
    torch.manual_seed(0)
    prior = SpikeAndSlab(0.05, 1.0, inclusion=0.5, group="input")
    return pb.models.SpikeSlab(nn.Linear(inputs, 1, bias=False), pb.likelihoods.Gaussian(NOISE), 40, prior=prior)


def posterior(weights: Tensor, chains: int = 1) -> pb.Posterior:
    """Of draws ``[n, inputs]``."""
    return pb.Posterior.from_draws(model(weights.shape[1]), {"weight": weights.reshape(len(weights), 1, 1, -1)}, chains)


def rows() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(40, 3)
    return x, x[:, :1] - 0.2 * x[:, 1:2] + NOISE * torch.randn(40, 1)


def log_predictive(weights: Tensor) -> np.ndarray:
    x, y = rows()
    density = stats.norm((x @ weights.T).numpy(), NOISE).logpdf(y.numpy())
    return special.logsumexp(density, 1) - math.log(len(weights))


def draws() -> Tensor:
    torch.manual_seed(2)
    return torch.tensor([1.0, -0.15, 0.0]) + 0.03 * torch.randn(12, 3)


def test_importance_is_the_loss_without_a_group() -> None:
    """Proves by SciPy that loss and error are those of rows whose predictive density has the column at 0."""
    weights = draws()
    found = posterior(weights).importance(*rows())["weight"]
    for j in range(3):
        without = weights.clone()
        without[:, j] = 0
        losses = log_predictive(weights) - log_predictive(without)
        assert float(found.loss[j]) == pytest.approx(losses.mean(), abs=1e-5)
        assert float(found.error[j]) == pytest.approx(losses.std(ddof=1) / 40**0.5, abs=1e-5)
    torch.testing.assert_close(found.inclusion, posterior(weights).inclusion_probabilities()["weight"])
    assert bool((found.inclusion[:1] > 0.99).all()) and float(found.inclusion[2]) < 0.2


def test_groups_below_a_probability_are_not_visited() -> None:
    weights = draws()
    found, all_of_them = (posterior(weights).importance(*rows(), least=least)["weight"] for least in (0.5, 0.0))
    skipped = all_of_them.inclusion < 0.5
    assert skipped.any() and torch.equal(found.loss.isnan(), skipped)
    torch.testing.assert_close(found.loss[~skipped], all_of_them.loss[~skipped])


def test_members_and_kernels() -> None:
    """Proves that a group of a convolution is put to 0 in every member, by a network with these weights."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(2, 1))
    prior = {r"0\.weight": SpikeAndSlab(0.05, 1.0, 0.5, "kernel"), ".*": pb.priors.Normal()}
    network = pb.models.SpikeSlab(net, pb.likelihoods.Gaussian(NOISE), 10, prior=prior)
    values = {site.name: torch.randn(3, 2, *site.shape) for site in network.sites()}
    x, y = torch.randn(10, 2, 3, 3), torch.randn(10, 1)
    whole = pb.Posterior.from_draws(network, values)
    found = whole.importance(x, y)["0.weight"]
    assert found.loss.shape == (2, 2)
    without = values["0.weight"].clone()
    without[:, :, 1, 0] = 0
    left = pb.Posterior.from_draws(network, values | {"0.weight": without})
    means = [p.log_likelihood(x, y, 3).flatten(0, 1).double().logsumexp(0).mean() for p in (whole, left)]
    assert float(found.loss[1, 0]) == pytest.approx(float(means[0] - means[1]), abs=1e-6)


class Twice(nn.Module):
    """Its layer reads x in two calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x) + self.layer(x)
        return out


#: a network, the shape of a row, the weight that is asked about, and the axis of x that its columns multiply, if any
READS: dict[str, tuple[nn.Module, tuple[int, ...], str, int | None]] = {
    "rows": (nn.Sequential(nn.Linear(3, 1)), (3,), "0.weight", 1),
    "sequences": (nn.Sequential(nn.Linear(3, 1), nn.Flatten(), nn.Linear(3, 1)), (3, 3), "0.weight", 2),
    "channels": (nn.Sequential(nn.Conv2d(3, 2, 2), nn.Flatten(), nn.Linear(8, 1)), (3, 3, 3), "0.weight", 1),
    "groups of channels": (
        nn.Sequential(nn.Conv2d(4, 2, 3, groups=2), nn.Flatten(), nn.Linear(2, 1)),
        (4, 3, 3),
        "0.weight",
        None,
    ),
    "a later layer": (nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)), (3,), "2.weight", None),
    "two calls": (Twice(), (3,), "layer.weight", None),
}


@pytest.mark.parametrize("kind", READS)
def test_an_input_is_shuffled_along_the_axis_that_the_layer_reads(kind: str) -> None:
    """Proves that the loss is that of x with one of its features in another order, and where no feature of x is what
    the columns multiply, that of columns at 0."""
    net, shape, name, axis = READS[kind]
    torch.manual_seed(4)
    prior = {name.replace(".", r"\."): SpikeAndSlab(0.05, 1.0, 0.5, "input"), ".*": pb.priors.Normal()}
    network = pb.models.SpikeSlab(net, pb.likelihoods.Gaussian(NOISE), 10, prior=prior)
    values = {site.name: torch.randn(3, 1, *site.shape) for site in network.sites()}
    x, order = torch.randn(10, *shape), torch.randperm(10)
    y = torch.randn_like(net(x))
    whole = pb.Posterior.from_draws(network, values)
    chosen = torch.ones(net.get_parameter(name).shape[1], dtype=torch.bool)
    (losses,) = row_losses(
        DrawSource(network, whole.draw_source.as_stored(3)), x, y, {name: chosen}, order=order
    ).values()

    def density(posterior: pb.Posterior, rows: Tensor) -> Tensor:
        return posterior.log_likelihood(rows, y, 3).flatten(0, 1).double().logsumexp(0)

    for j in range(len(chosen)):
        if axis is None:
            without = values[name].clone()
            without[:, :, :, j] = 0
            other = density(pb.Posterior.from_draws(network, values | {name: without}), x)
        else:
            moved = x.clone()
            moved.select(axis, j).copy_(x.select(axis, j)[order])
            other = density(whole, moved)
        torch.testing.assert_close(losses[j], density(whole, x) - other, rtol=1e-4, atol=1e-5)


def test_a_scaled_posterior_names_the_one_that_has_importance() -> None:
    prior = SpikeAndSlab(0.05, 1.0, inclusion=0.5, group="input")
    network = pb.models.SpikeSlab(nn.Linear(3, 1, bias=False), pb.likelihoods.Bernoulli(), 40, prior=prior)
    plain = pb.Posterior.from_draws(network, {"weight": draws().reshape(12, 1, 1, 3)})
    with pytest.raises(TypeError, match=r"scaled\.posterior\.importance"):
        ScaledPosterior(plain, 2.0).importance(*rows())


def test_every_chain_has_its_own_inclusion() -> None:
    """Proves that probabilities are those of each chain's draws, and the error that of their mean."""
    torch.manual_seed(3)
    weights = 0.2 * torch.randn(4 * 6, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these chains differ
        found = posterior(weights, 4).inclusion_by_chain()["weight"]
        together = posterior(weights, 4).inclusion_probabilities()["weight"]
    for c in range(4):
        alone = posterior(weights[6 * c : 6 * c + 6]).inclusion_probabilities()["weight"]
        torch.testing.assert_close(found.probability[c], alone)
    torch.testing.assert_close(found.error, found.probability.std(0) / 2)
    torch.testing.assert_close(together, found.probability.mean(0))
    one = posterior(weights).inclusion_by_chain()["weight"]
    assert one.probability.shape == (1, 3) and bool(one.error.isnan().all())


def test_chains_that_do_not_agree_are_told() -> None:
    """Proves that a group that is in by one chain and out by another warns, and that chains that agree do not."""
    weights = draws()
    apart = weights.clone()
    apart[6:, 1] = 1.0
    apart[:6, 1] = 0.0
    with pytest.warns(UserWarning, match=r"chains differ by more than 0\.5 .* \(1 of 3 of 'weight'\)"):
        posterior(apart, 2).inclusion_probabilities()
    with pytest.warns(UserWarning, match="chains differ"):
        posterior(apart, 2).inclusion_by_chain()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights[:, 1] = 0.0
        posterior(weights, 2).inclusion_probabilities()


def test_pruning_says_what_it_costs() -> None:
    """Proves that the excess is that of the NLL by SciPy, and that it warns when the spike holds a real effect."""
    x, y = rows()
    weights = draws()
    weights[:, 0] = 0.08  # in the spike by its size, and half of the effect that y has
    assert float(posterior(weights).inclusion_probabilities()["weight"][0]) < 0.5
    y = 0.08 * x[:, :1] * 20 - 0.15 * x[:, 1:2]
    with pytest.warns(UserWarning, match="NLL of the data grows by"):
        small = posterior(weights).sparsify(shrink=False, data=(x, y))
    assert small.excess is not None and small.excess > 0.05


def test_pruning_that_costs_nothing_is_silent() -> None:
    x, y = rows()
    weights = draws()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = posterior(weights).sparsify(shrink=False, data=(x, y))
        assert posterior(weights).sparsify(shrink=False).excess is None
    without = weights * (posterior(weights).inclusion_probabilities()["weight"] >= 0.5)
    expected = float((log_predictive(weights) - log_predictive(without)).mean())
    assert small.excess == pytest.approx(expected, abs=1e-5)


def test_data_that_are_no_pair_are_refused() -> None:
    with pytest.raises(TypeError, match="the pair"):
        posterior(draws()).sparsify(shrink=False, data=rows()[0])  # type: ignore[arg-type]


def test_the_plot_shows_losses_with_their_errors() -> None:
    found = posterior(draws()).importance(*rows())
    (axes,) = plots.plot_importance(found).axes
    inside, outside = axes.get_lines()[:2]
    shown = sorted([*zip(*inside.get_data(), strict=True), *zip(*outside.get_data(), strict=True)])
    assert [height for _, height in shown] == pytest.approx(found["weight"].loss.tolist())
    assert len(inside.get_xdata()) == int((found["weight"].inclusion >= 0.5).sum())
    with pytest.raises(ValueError, match="empty"):
        plots.plot_importance({})
    with pytest.raises(ValueError, match="smaller least"):
        plots.plot_importance(posterior(torch.zeros(4, 3)).importance(*rows(), least=1.0))
