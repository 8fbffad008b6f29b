"""Deep ensembles: each network is what training it alone gives, and the posterior is their mixture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchvision.models import VisionTransformer

import pyro_bnn as pb
from pyro_bnn.inference.baselines.ensemble import DeepEnsemble
from pyro_bnn.likelihoods import Categorical, Gaussian
from pyro_bnn.models import Dense, PointGuide
from pyro_bnn.models.architectures import digits_cnn
from pyro_bnn.priors import Normal

N = 60


def inputs() -> Tensor:
    return torch.randn(N, 2, generator=torch.Generator().manual_seed(0))


def classes() -> Tensor:
    return (inputs()[:, 0] > 0).long() + (inputs()[:, 1] > 0.5).long()


def seeded(make: Any, seed: int = 1) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def normalised(seed: int = 1) -> Any:
    return seeded(lambda: nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)), seed)


def fitted(members: int = 3, net: nn.Module | None = None, seed: int | None = 0, **options: Any) -> pb.Posterior:
    ensemble = DeepEnsemble(net or normalised(), Categorical(), N, num_networks=members)
    options = {"epochs": 4, "lr": 2e-2, "batch_size": 20, "progress": False} | options
    return ensemble.fit((inputs(), classes()), seed=seed, **options)


def test_digits_are_classified_better_by_the_ensemble_than_by_its_networks() -> None:
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(labels)
    train, test = slice(0, 400), slice(400, 800)
    net = seeded(lambda: digits_cnn(width=4))
    ensemble = DeepEnsemble(net, Categorical(), 400, num_networks=4)
    posterior = ensemble.fit((x[train], y[train]), epochs=5, lr=2e-2, batch_size=50, progress=False, seed=0)
    result = pb.diagnostics.evaluate(posterior, (x[test], y[test]), num_samples=4)
    log_prob = posterior.log_likelihood(x[test], y[test], num_samples=4)
    assert result["accuracy"] > 0.8
    assert result["nll"] < float(-log_prob.mean((1, 2)).max())  # better than the best of them
    data = pb.diagnostics.to_arviz(posterior, x[test][:20], y[test][:20])
    assert data["log_likelihood"]["obs"].shape == (1, 4, 20)
    np.testing.assert_allclose(data["training"]["loss"], posterior.losses)


def test_frozen_parameters_are_those_of_the_given_network_in_all_networks() -> None:
    """Also with ``build``, whose networks start with other values there."""

    def make() -> nn.Sequential:
        net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3))
        net[0].requires_grad_(False)
        return net

    net, x = seeded(make), inputs()
    ensemble = DeepEnsemble(net, Categorical(), N, num_networks=3, build=make)
    posterior = ensemble.fit((x, classes()), epochs=200, lr=3e-2, progress=False, seed=0)
    draws = posterior.draws(3)
    assert set(draws) == {"2.weight", "2.bias"}
    outputs = posterior.predict(x, num_samples=3).outputs[:, 0]
    features = torch.tanh(net[0](x))
    for weight, bias, found in zip(draws["2.weight"], draws["2.bias"], outputs, strict=True):
        torch.testing.assert_close(found, nn.functional.linear(features, weight[0], bias[0]), rtol=1e-4, atol=1e-5)
        assert float((found.argmax(-1) == classes()).double().mean()) > 0.8  # it was trained on these features


def test_every_network_is_trained_as_if_it_were_alone() -> None:
    """With the same start and the same seeds, ``fit`` of a point gives the very same network."""
    starts = [normalised(5), normalised(6)]
    nets = iter(starts)
    ensemble = DeepEnsemble(
        normalised(), Categorical(), N, num_networks=2, prior=Normal(0.0, 0.3), build=lambda: next(nets)
    )
    options: dict[str, Any] = {"epochs": 3, "lr": 2e-2, "batch_size": N, "progress": False}
    posterior = ensemble.fit((inputs(), classes()), seed=0, **options)
    x = inputs()
    together = posterior.predict(x, num_samples=2, seed=0).outputs[:, 0]
    for start, outputs in zip(starts, together, strict=True):
        model = Dense(start, Categorical(), N, prior=Normal(0.0, 0.3), select=".*")
        alone = pb.inference.fit(model, PointGuide(model), (x, classes()), seed=9, **options)
        # one batch holds all rows, in another order
        torch.testing.assert_close(alone.predict(x, num_samples=1).outputs[0, 0], outputs, rtol=1e-3, atol=1e-4)


def test_networks_start_apart_and_the_given_one_stays() -> None:
    net = normalised()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    posterior = fitted(net=net, epochs=1, lr=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    weights = posterior.draws(3)["0.weight"][:, 0]
    for one, two in ((weights[0], weights[1]), (weights[0], weights[2]), (weights[0], before["0.weight"])):
        assert (one - two).abs().max() > 0.1
    # as nn.Linear starts: uniform in +- 1 / sqrt(fan in)
    assert weights.abs().max() < 2**-0.5 + 1e-3


def test_each_network_predicts_with_statistics_of_its_own() -> None:
    posterior = fitted()
    x = inputs()
    means = posterior.guide.statistics()["1.running_mean"]  # type: ignore[attr-defined]
    assert means.shape == (3, 8)
    assert (means[0] - means[1]).abs().max() > 1e-2
    net, draws = normalised(), posterior.draws(3)
    prediction = posterior.predict(x, num_samples=3)
    for i in range(3):
        state = {name: value[i, 0] for name, value in draws.items()}
        state |= {name: value[i] for name, value in posterior.guide.statistics().items()}  # type: ignore[attr-defined]
        net.load_state_dict(net.state_dict() | state)
        torch.testing.assert_close(net.eval()(x), prediction.outputs[i, 0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(prediction.probs, prediction.outputs[:, 0].softmax(-1).mean(0))


def test_on_disk_it_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    posterior = fitted()
    posterior.save(tmp_path / "run")
    loaded = pb.load(tmp_path / "run", normalised())
    assert loaded.num_stored == 3
    expected = posterior.predict(inputs(), num_samples=3).per_member
    assert torch.equal(loaded.predict(inputs(), num_samples=3).per_member, expected)
    assert torch.equal(posterior.as_draws(3).predict(inputs(), num_samples=3).per_member, expected)


def test_on_disk_its_networks_do_not_become_draws_of_a_sampler(tmp_path: Path) -> None:
    """Proves that leave-one-out refuses a loaded ensemble, and that draws of a sampler stay what they are."""
    posterior = fitted()
    posterior.save(tmp_path / "ensemble")
    loaded = pb.load(tmp_path / "ensemble", normalised())
    assert not posterior.is_sampled and not loaded.is_sampled
    with pytest.raises(ValueError, match="networks of an ensemble"):
        pb.diagnostics.loo(loaded, inputs(), torch.zeros(len(inputs()), dtype=torch.long))
    assert pb.Posterior.from_draws(posterior.model, posterior.draws(3)).is_sampled
    pb.Posterior.from_draws(posterior.model, posterior.draws(3)).save(tmp_path / "chain")
    assert pb.load(tmp_path / "chain", normalised()).is_sampled


def test_seeds_reproduce_and_leave_the_global_state_alone() -> None:
    before = torch.get_rng_state()
    one, two, other = fitted(), fitted(), fitted(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.draws(3)["3.weight"], two.draws(3)["3.weight"])
    assert not torch.equal(one.draws(3)["3.weight"], other.draws(3)["3.weight"])


def test_a_run_that_was_stopped_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "run.pt"
    whole = fitted(2)
    fitted(2, checkpoint=file, epochs=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run-0.pt", "run-1.pt"]
    resumed = fitted(2, checkpoint=file)
    for name, value in whole.draws(2).items():
        assert torch.equal(resumed.draws(2)[name], value)
    assert resumed.losses == whole.losses


def test_a_learned_noise_belongs_to_each_network() -> None:
    ensemble = DeepEnsemble(nn.Linear(2, 1), Gaussian(), N, num_networks=2)
    posterior = ensemble.fit((inputs(), inputs()[:, :1]), epochs=3, lr=0.1, progress=False, seed=0)
    assert posterior.draws(2)["noise"].shape == (2, 1)
    assert posterior.predict(inputs(), num_samples=2).interval()[0].shape == (N,)


def test_frozen_parameters_are_neither_reset_nor_trained() -> None:
    net = normalised()
    net[0].requires_grad_(False)
    posterior = fitted(net=net)
    assert "0.weight" not in posterior.draws(1)
    core = posterior.model.core().net  # type: ignore[attr-defined]
    assert torch.equal(core[0].weight, net[0].weight)


def test_vision_transformers_are_built_anew() -> None:
    """Class tokens and positions belong to modules that cannot reset them."""

    def transformer() -> nn.Module:
        return VisionTransformer(8, 4, 1, 2, 8, 16, num_classes=3)

    net = seeded(transformer)
    x, y = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
    options: dict[str, Any] = {"epochs": 1, "progress": False, "seed": 0}
    with pytest.raises(ValueError, match=r"cannot give 'class_token' a new starting value.*give build="):
        DeepEnsemble(net, Categorical(), 12).fit((x, y), **options)
    posterior = DeepEnsemble(net, Categorical(), 12, num_networks=2, build=transformer).fit((x, y), **options)
    weights = posterior.draws(2)["encoder.pos_embedding"][:, 0]
    assert not torch.equal(weights[0], weights[1])
    assert posterior.predict(x, num_samples=2).probs.shape == (12, 3)


def test_bad_input() -> None:
    net, data = normalised(), (inputs(), classes())
    with pytest.raises(ValueError, match="num_networks=0: expected a whole number"):
        DeepEnsemble(net, Categorical(), N, num_networks=0)
    with pytest.raises(TypeError, match=r"net must be a torch.nn.Module, got int"):
        DeepEnsemble(3, Categorical(), N)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_data=0"):
        DeepEnsemble(net, Categorical(), 0)
    with pytest.raises(ValueError, match="epochs=0: expected a whole number, at least 1"):
        fitted(epochs=0)
    with pytest.raises(TypeError, match="optim= is an optimiser, and every network needs one of its own"):
        fitted(optim=torch.optim.SGD(net.parameters(), 0.1))
    with pytest.raises(ValueError, match="is not of the architecture of net"):
        DeepEnsemble(net, Categorical(), N, build=lambda: nn.Linear(2, 3)).fit(data, epochs=1)
    with pytest.raises(ValueError, match="build= returned the network itself"):
        DeepEnsemble(net, Categorical(), N, build=lambda: net).fit(data, epochs=1)
    with pytest.raises(TypeError, match="build= must return a torch.nn.Module"):
        DeepEnsemble(net, Categorical(), N, build=lambda: None).fit(data, epochs=1)  # type: ignore[arg-type,return-value]
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        DeepEnsemble(nn.Flatten(), Categorical(), N)
    gated = nn.Linear(2, 3)  # resets its weight and bias alone
    gated.register_parameter("gate", nn.Parameter(torch.tensor([1.0, 2.0, 3.0])))
    with pytest.raises(ValueError, match="cannot give 'gate' a new starting value"):
        fitted(net=gated)


def test_a_network_made_from_the_random_state_that_it_is_reset_from_is_reset_all_the_same() -> None:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    torch.manual_seed(3)
    engine = DeepEnsemble(net, Gaussian(0.5), 20, num_networks=2)
    posterior = engine.fit((torch.zeros(20, 2).double(), torch.zeros(20).double()), epochs=1, lr=1e-9, progress=False)
    for name, own in net.named_parameters():
        first, second = posterior.draws(2)[name][:, 0]
        assert (first - second).abs().max() > 1e-3 and (first - own.reshape(first.shape)).abs().max() > 1e-3
