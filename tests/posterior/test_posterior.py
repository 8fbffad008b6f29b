"""Posterior, Prediction and storage: what they compute, against values worked out by hand, and what they refuse."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import safetensors.torch
import torch
from pyro.infer import MCMC, NUTS, Predictive
from pyro.infer.autoguide import AutoNormal
from scipy import optimize, stats
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn.likelihoods import Bernoulli, Categorical, Gaussian, Poisson
from pyro_bnn.models import Dense, MeanFieldGuide, PointGuide, Rank1, Rank1Guide

N = 24


def tiny(out: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, out)).double()


def data(out: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, 4, generator=generator, dtype=torch.float64)
    return x, (torch.arange(N) % out)


def rank1(**options: Any) -> pb.Posterior:
    model = Rank1(tiny(), Categorical(), N, **options)
    guide = Rank1Guide(model, components=3, init_dropout_rate=0.1)
    return pb.inference.fit(model, guide, data(), epochs=2, batch_size=10, progress=False, seed=0)


def dense() -> pb.Posterior:
    model = Dense(tiny(), Categorical(), N)
    guide = MeanFieldGuide(model, init_scale=0.3)
    return pb.inference.fit(model, guide, data(), epochs=2, batch_size=10, progress=False, seed=0)


def point() -> pb.Posterior:
    model = Dense(tiny(), Categorical(), N)
    return pb.inference.fit(model, PointGuide(model), data(), epochs=2, progress=False, seed=0)


# ------------------------------------------------------------------------------------------------- prediction


@pytest.mark.parametrize("make", [rank1, dense])
def test_a_draw_is_the_same_function_for_every_row_and_batch_size(make: Any) -> None:
    """Proves that cutting x into pieces, or asking for one row alone, changes no member's output."""
    posterior = make()
    x, _ = data()
    whole = posterior.predict(x, num_samples=5, seed=3).outputs
    for size in (1, 7, N):
        torch.testing.assert_close(posterior.predict(x, 5, batch_size=size, seed=3).outputs, whole)
    torch.testing.assert_close(posterior.predict(x[4:5], 5, seed=3).outputs, whole[:, :, 4:5])
    assert not torch.allclose(posterior.predict(x, 5, seed=4).outputs, whole)
    assert not torch.allclose(whole[0], whole[1])


def test_prediction_equals_the_network_with_the_explicit_weights_of_each_draw() -> None:
    """Proves that draws(seed) are those of predict(seed), and each output is net(x) with W o (r s^T) and biases."""
    posterior = rank1()
    x, _ = data()
    outputs = posterior.predict(x, 2, seed=5).outputs
    draws = posterior.draws(2, seed=5)
    net = posterior.model.network.net.eval()  # type: ignore[attr-defined]
    own = dict(net.named_parameters())
    for s in range(2):
        for k in range(3):
            weights = {}
            for layer in ("0", "3"):
                r, column = draws[f"{layer}.weight.r"][s, k], draws[f"{layer}.weight.s"][s, k]
                weights[f"{layer}.weight"] = own[f"{layer}.weight"] * torch.outer(r, column)
                weights[f"{layer}.bias"] = draws[f"{layer}.bias"][s, k]
            expected = torch.func.functional_call(net, weights, (x,))
            torch.testing.assert_close(outputs[s, k], expected, rtol=1e-10, atol=1e-12)


def test_large_networks_are_drawn_in_groups_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that draws, predict and sample agree when the memory budget cuts them into groups."""
    posterior = dense()
    monkeypatch.setattr("pyro_bnn.posterior.draw_source.MAX_ELEMENTS", 100)
    x, _ = data()
    outputs = posterior.predict(x, 5, seed=1).outputs
    groups = list(posterior.draw_source.groups(5, seed=1))
    assert len(groups) > 1
    again = pb.Posterior.from_draws(posterior.model, {k: v[:, 0] for k, v in posterior.draws(5, seed=1).items()})
    torch.testing.assert_close(again.predict(x, 5).outputs, outputs)


def test_prediction_leaves_random_state_buffers_and_mode_alone() -> None:
    """Proves that a seeded prediction has no side effects."""
    posterior = rank1()
    model = posterior.model
    assert isinstance(model, Rank1)
    model.train()
    state, buffers = torch.get_rng_state(), [b.clone() for b in model.buffers()]
    posterior.predict(data()[0], seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))
    assert all(module.training for module in model.modules())


def test_classification_averages_probabilities_and_splits_entropy() -> None:
    """Proves mean of softmax (not softmax of mean), entropy, and its two parts, against sums written out."""
    torch.manual_seed(0)
    f = 3 * torch.randn(5, 2, 4, 3, dtype=torch.float64)
    prediction = pb.Prediction(f, Categorical())
    p = f.softmax(-1)
    mean = p.mean((0, 1))
    total = -(mean * mean.log()).sum(-1)
    expected = -(p * p.log()).sum(-1).mean((0, 1))
    torch.testing.assert_close(prediction.probs, mean)
    torch.testing.assert_close(prediction.entropy, total)
    torch.testing.assert_close(prediction.aleatoric, expected)
    torch.testing.assert_close(prediction.mutual_information, total - expected)
    y = torch.tensor([0, 1, 2, 0])
    torch.testing.assert_close(prediction.log_prob(y), p.log()[..., range(4), y])
    with pytest.raises(TypeError, match=r"use \.probs and \.entropy"):
        prediction.interval()


def test_bernoulli_entropy() -> None:
    """Proves the two-class entropy of averaged probabilities, finite where they are 0 or 1."""
    f = torch.tensor([[[0.3, -800.0]], [[2.0, -800.0]]], dtype=torch.float64)
    prediction = pb.Prediction(f, Bernoulli())
    p = float(f[:, 0, 0].sigmoid().mean())
    assert float(prediction.entropy[0]) == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p))
    assert float(prediction.entropy[1]) == 0


def test_gaussian_moments_and_interval_against_scipy() -> None:
    """Proves the law of total variance, and quantiles of the mixture found by scipy's root finder."""
    torch.manual_seed(0)
    f = torch.randn(3, 2, 2, 1, dtype=torch.float64) * 2
    noise = torch.rand(3, 2, 1, dtype=torch.float64) + 0.2
    prediction = pb.Prediction(f, Gaussian(), noise.squeeze(-1))
    means, scales = f[..., 0].reshape(6, 2).numpy(), noise.reshape(6).numpy()
    torch.testing.assert_close(prediction.epistemic, torch.tensor(means.var(0)))
    torch.testing.assert_close(prediction.aleatoric, torch.tensor([(scales**2).mean()] * 2))
    low, high = prediction.interval(0.9)
    for i in range(2):
        for q, value in ((0.05, low[i]), (0.95, high[i])):
            root = optimize.brentq(lambda v: stats.norm.cdf(v, means[:, i], scales).mean() - q, -50, 50)  # noqa: B023
            assert float(value) == pytest.approx(root, abs=1e-6)
    y = torch.tensor([0.1, -0.4], dtype=torch.float64)
    expected = stats.norm.logpdf(y.numpy(), means, scales[:, None]).reshape(3, 2, 2)
    torch.testing.assert_close(prediction.log_prob(y), torch.tensor(expected))
    with pytest.raises(TypeError, match="probs is not defined"):
        _ = prediction.probs
    with pytest.raises(ValueError, match=r"level=1.0: expected a number in \(0, 1\)"):
        prediction.interval(1.0)


def test_poisson_interval_is_the_smallest_count_that_reaches_the_level() -> None:
    """Proves integer quantiles of a mixture of Poissons by summing scipy's distribution function."""
    f = torch.log(torch.tensor([[[3.0, 40.0]], [[9.0, 2.0]]], dtype=torch.float64))
    low, high = pb.Prediction(f, Poisson()).interval(0.8)
    rates = f.exp()[:, 0].numpy()
    for i in range(2):
        for q, value in ((0.1, low[i]), (0.9, high[i])):
            cdf = [stats.poisson.cdf(k, rates[:, i]).mean() for k in range(200)]
            assert int(value) == next(k for k, c in enumerate(cdf) if c >= q)


def test_log_likelihood_is_that_of_each_member() -> None:
    posterior = rank1()
    x, y = data()
    logits = posterior.predict(x, 4, seed=2).outputs
    expected = logits.log_softmax(-1)[..., range(N), y]
    torch.testing.assert_close(posterior.log_likelihood(x, y, 4, seed=2), expected)


def test_sample_takes_whole_draws_of_random_members() -> None:
    """Proves that all sites of one draw come from the same member, and that every member occurs."""
    posterior = rank1()
    guide = posterior.guide
    assert isinstance(guide, Rank1Guide)
    sample = posterior.sample(60, seed=0)
    biases = sample["0.bias"]
    points = guide.point[0].detach()[:, :6]
    member = (biases[:, None] == points).all(-1).int().argmax(-1)
    torch.testing.assert_close(biases, points[member])
    torch.testing.assert_close(sample["3.bias"], guide.point[0].detach()[member, 6:])
    assert set(member.tolist()) == {0, 1, 2}
    assert sample["0.weight.s"].shape == (60, 4) and sample["0.weight_tau"].shape == (60,)


def test_statistics_of_each_draw_on_request() -> None:
    """Proves that the refreshed statistics are those of the draw's own activations over the loader."""
    posterior = dense()
    x, _ = data()
    posterior.recompute_statistics([(x[:12],), (x[12:],)])
    outputs = posterior.predict(x, 2, seed=0).outputs
    draws = posterior.draws(2, seed=0)
    for s in range(2):
        w = {name: value[s, 0] for name, value in draws.items()}
        h = x @ w["0.weight"].T + w["0.bias"]
        halves = h.reshape(2, 12, 6)
        mean, variance = halves.mean(1).mean(0), halves.var(1).mean(0)
        norm = posterior.model.network.net[1]  # type: ignore[attr-defined]
        z = torch.tanh((h - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias)
        torch.testing.assert_close(outputs[s, 0], z @ w["3.weight"].T + w["3.bias"])
    posterior.recompute_statistics(None)
    assert not torch.allclose(posterior.predict(x, 2, seed=0).outputs, outputs)


def test_points_predict_once_however_many_draws_are_asked_for() -> None:
    """Proves that equal draws are not made again, so that members do not differ by rounding."""
    x, _ = data()
    one = point().predict(x, num_samples=16)
    assert one.outputs.shape[0] == 1 and float(one.epistemic.max()) == 0
    assert torch.equal(one.outputs, point().predict(x).outputs)
    assert [dense().draw_source.count(n) for n in (None, 5, 40)] == [16, 5, 40]
    assert dense().as_draws(3).draw_source.count() == 3
    with pytest.raises(ValueError, match="expected a whole number, at least 1"):
        point().predict(x, num_samples=0)


def test_bad_requests() -> None:
    posterior = rank1()
    x, y = data()
    with pytest.raises(ValueError, match="1 NaN or infinite"):
        posterior.predict(x.index_put((torch.tensor(2), torch.tensor(1)), torch.tensor(math.nan).double()))
    with pytest.raises(ValueError, match="expected a whole number, at least 1"):
        posterior.predict(x, num_samples=0)
    with pytest.raises(ValueError, match="batch_size=0"):
        posterior.predict(x, batch_size=0)
    with pytest.raises(ValueError, match="only 3 draws are stored"):
        posterior.as_draws(3).predict(x, num_samples=4)
    with pytest.raises(ValueError, match="disagree on the number of samples"):
        posterior.log_likelihood(x, y[:5])


# --------------------------------------------------------------------------------------------- other engines


def test_posterior_of_nuts_and_of_an_autoguide() -> None:
    """Proves that draws of NUTS predict as the network with these weights does, and that guides go to Predictive."""
    x, y = data()
    pyro.set_rng_seed(0)
    model = Rank1(tiny(), Categorical(), N).eval()
    mcmc = MCMC(NUTS(model, max_tree_depth=3), num_samples=6, warmup_steps=4, disable_progbar=True)
    mcmc.run(x, y)
    posterior = pb.Posterior.from_mcmc(mcmc, model)
    assert posterior.num_members == 1 and posterior.num_stored == 6
    told = mcmc.diagnostics()
    assert posterior.sampler["divergences"] == len(told["divergences"]["chain 0"])
    assert posterior.sampler["acceptance rate"] == told["acceptance rate"]["chain 0"]
    outputs = posterior.predict(x, 6).outputs
    with torch.no_grad():
        traced = [
            model.function(x, {k: v[i] for k, v in mcmc.get_samples().items()}, N).reshape(N, 3) for i in range(6)
        ]
    torch.testing.assert_close(outputs[:, 0], torch.stack(traced))
    for parallel in (False, True):
        predictive = Predictive(model, guide=posterior.guide, num_samples=4, parallel=parallel)
        assert predictive(x)["obs"].shape == (4, 1, N)
    auto = pb.inference.fit(model, AutoNormal(model), (x, y), epochs=1, progress=False, seed=0)
    assert auto.predict(x, 5, seed=0).probs.shape == (N, 3)
    with pytest.raises(TypeError, match="as_draws"):
        auto.save("never-written")


def test_models_of_other_packages() -> None:
    """Proves prediction and log likelihood of a plain Pyro model with a function guide that uses pyro.param."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, generator=generator)
    y = 2 * x + 0.1 * torch.randn(50, generator=generator)

    def model(x: Tensor, y: Tensor | None = None) -> Tensor:
        slope = pyro.sample("slope", dist.Normal(0.0, 10.0))
        with pyro.plate("data", 50, subsample_size=len(x)):
            mean = pyro.deterministic("mean", slope * x)
            return pyro.sample("obs", dist.Normal(mean, 0.1), obs=y)

    def guide(x: Tensor, y: Tensor | None = None) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        pyro.sample("slope", dist.Normal(loc, 0.01))

    before = dict(pyro.get_param_store().items())
    posterior = pb.inference.fit(model, guide, (x, y), epochs=200, lr=0.05, progress=False, seed=0)
    assert dict(pyro.get_param_store().items()) == before
    # the exact posterior has mean 2 up to 0.1 / sqrt(sum x^2) = 0.014
    prediction = posterior.predict(x, 50, seed=0, return_site="mean")
    assert (prediction.mean - 2 * x).abs().max() < 0.1 * x.abs().max()
    assert posterior.log_likelihood(x, y, 8, seed=0).shape == (8, 1, 50)
    with pytest.raises(ValueError, match="return_site"):
        posterior.predict(x)
    with pytest.raises(ValueError, match="no site 'nothing'"):
        posterior.predict(x, return_site="nothing")
    with pytest.raises(TypeError, match="as_draws"):
        posterior.save("never-written")


# ------------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("make", [rank1, dense, point, lambda: rank1().as_draws(4, seed=0)])
def test_a_loaded_posterior_predicts_bit_for_bit_the_same(make: Any, tmp_path: Path) -> None:
    """Proves that guide, W, buffers and draws survive, and that the network given to load is not changed."""
    posterior = make()
    x, _ = data()
    posterior.save(tmp_path / "posterior")
    net = tiny()
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    loaded = pb.load(tmp_path / "posterior", net)
    assert torch.equal(loaded.predict(x, 4, seed=7).outputs, posterior.predict(x, 4, seed=7).outputs)
    assert loaded.losses == posterior.losses and loaded.num_members == posterior.num_members
    assert not any(p.any() for p in net.parameters())
    assert sorted(f.name for f in tmp_path.iterdir()) == ["posterior"]
    posterior.save(tmp_path / "posterior")  # over the older one


def test_tied_weights_stay_tied_through_a_file(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 3)
            self.out = nn.Linear(3, 5, bias=False)
            self.out.weight = self.table.weight

        def forward(self, i: Tensor) -> Tensor:
            return self.out(self.table(i))

    model = Rank1(Tied(), Categorical(), 10)
    posterior = pb.Posterior(model, Rank1Guide(model, 2))
    posterior.save(tmp_path / "p")
    loaded = pb.load(tmp_path / "p", Tied())
    net = loaded.model.network.net  # type: ignore[attr-defined]
    assert net.out.weight is net.table.weight
    i = torch.arange(5)
    assert torch.equal(loaded.predict(i, 2, seed=0).outputs, posterior.predict(i, 2, seed=0).outputs)


def edit(path: Path, **changes: Any) -> None:
    file = path / "posterior.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_bad_files_are_refused_with_the_reason(tmp_path: Path) -> None:
    posterior = point()
    path = tmp_path / "p"
    with pytest.raises(FileNotFoundError, match="no posterior at"):
        pb.load(path, tiny())
    posterior.save(path)
    with pytest.raises(ValueError, match=r"another network: '3\.weight' has shape \[3, 6\] there and \[2, 6\]"):
        pb.load(path, tiny(out=2))
    with pytest.raises(ValueError, match=r"'0\.weight' of shape \[6, 4\] is not in the given one"):
        pb.load(path, nn.Module())
    with pytest.raises(ValueError, match=r"'4\.weight' of the given one is not in it"):
        pb.load(path, tiny().append(nn.Linear(3, 3)))
    edit(path, version=99)
    with pytest.raises(ValueError, match="format version 99"):
        pb.load(path, tiny())
    edit(path, version=1, format="something else")
    with pytest.raises(ValueError, match="is not a pyro_bnn posterior"):
        pb.load(path, tiny())
    (path / "posterior.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        pb.load(path, tiny())
    (path / "posterior.json").unlink()
    with pytest.raises(ValueError, match="is not a posterior"):
        pb.load(path, tiny())
    with pytest.raises(FileExistsError, match="is not a posterior"):
        posterior.save(path)
    other = tmp_path / "q"
    posterior.save(other)
    tensors = other / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-9])
    with pytest.raises(ValueError, match="truncated or damaged"):
        pb.load(other, tiny())
    tensors.unlink()
    with pytest.raises(ValueError, match="incomplete"):
        pb.load(other, tiny())


def test_an_interrupted_save_leaves_the_older_posterior(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    posterior = point()
    posterior.save(tmp_path / "p")
    before = (tmp_path / "p" / "tensors.safetensors").read_bytes()

    def fail(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        dense().save(tmp_path / "p")
    assert (tmp_path / "p" / "tensors.safetensors").read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == ["p"]


def test_a_prior_that_json_cannot_describe(tmp_path: Path) -> None:
    """Proves that such a prior is refused, and that both remedies of the message work."""
    prior = {".*": lambda name, tensor: dist.Normal(torch.ones_like(tensor), 0.1)}
    posterior = rank1(prior=prior)
    with pytest.raises(TypeError, match=r"save\(path, prior=False\)"):
        posterior.save(tmp_path / "p")
    posterior.save(tmp_path / "p", prior=False)
    with pytest.raises(ValueError, match="without its prior"):
        pb.load(tmp_path / "p", tiny())
    x, _ = data()
    loaded = pb.load(tmp_path / "p", tiny(), prior=prior)
    assert torch.equal(loaded.predict(x, 2, seed=0).outputs, posterior.predict(x, 2, seed=0).outputs)
    with pytest.raises(TypeError, match="output= is a function"):
        model = Rank1(tiny(), Categorical(), N, output=lambda y: y)
        pb.Posterior(model, Rank1Guide(model)).save(tmp_path / "q")
