"""Whole runs on a device that is not the processor: the same numbers, and nothing that mixes the two.

What is handed in (data, foreign inputs, examples) stays on the processor, as users have it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from arviz_names import groups
from pretend_device import DEVICE, PretendDevice, PretendTensor
from pyro.infer import NUTS
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn import diagnostics as dg
from pyro_bnn.inference import SGHMC, SGHMCEM, SVGD, SWAG, DeepEnsemble, LastLayerLaplace, MCDropout, fit, sample
from pyro_bnn.models import (
    Bella,
    CodebookGuide,
    Dense,
    MeanFieldGuide,
    MergeCodes,
    ParticleGuide,
    Rank1,
    Rank1Guide,
    WeightSharing,
)

N, CLASSES = 40, 3
RUN: dict[str, Any] = {"epochs": 2, "batch_size": 10, "seed": 0, "progress": False}
DRAW: dict[str, Any] = {"num_samples": 4, "warmup_steps": 4, "seed": 0, "progress": False}
#: gradients are not recorded as graphs, which would hold the values of tensors that are not of PyTorch's own class
STEPS: dict[str, Any] = {"batch_size": 10, "step_size": 0.03, "friction": 0.1, "capture": False}
Data = tuple[Tensor, Tensor]


def data() -> Data:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(N) % CLASSES
    return torch.randn(N, 1, 6, 6, generator=generator) + 0.5 * y[:, None, None, None], y


def mlp(out: int = CLASSES) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 6), nn.ReLU(), nn.Dropout(0.1), nn.Linear(6, out))


def convolutional() -> nn.Module:
    torch.manual_seed(1)
    parts = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*parts, nn.Linear(4, CLASSES))


def dense(net: nn.Module, prior: Any = None) -> Dense:
    return Dense(net, pb.likelihoods.Categorical(), N, prior=prior or pb.priors.Normal())


def rank1(net: nn.Module, xy: Data) -> pb.Posterior:
    model = Rank1(net, pb.likelihoods.Categorical(), N)
    return fit(model, Rank1Guide(model, components=2), xy, **RUN)


def hierarchical(net: nn.Module, xy: Data) -> pb.Posterior:
    model = dense(net, pb.priors.HierarchicalNormal())
    return fit(model, MeanFieldGuide(model), xy, **RUN)


def autoguide(net: nn.Module, xy: Data) -> pb.Posterior:
    model = dense(net)
    return fit(model, AutoNormal(model), xy, **RUN)


def codebook(net: nn.Module, xy: Data) -> pb.Posterior:
    model = WeightSharing(net, pb.likelihoods.Categorical(), N)
    field = MeanFieldGuide(model)
    fit(model, field, xy, **RUN)
    guide = CodebookGuide.from_mean_field(model, field, codes=8)
    posterior = fit(model, guide, xy, callbacks=[MergeCodes(start=1, stop=2, tightness=1.0)], **RUN)
    assert guide.compression_report()["codes"] < 8
    return posterior


def bella(net: nn.Module, xy: Data) -> pb.Posterior:
    model = Bella(net, pb.likelihoods.Categorical(), N, head="5")
    return SVGD(model, ParticleGuide(model, 3)).fit(xy, **RUN)


def sghmc(net: nn.Module, xy: Data) -> pb.Posterior:
    return sample(SGHMC(dense(net), xy, preconditioner="adaptive", **STEPS), num_chains=2, **DRAW)


def spike_slab(net: nn.Module, xy: Data) -> pb.Posterior:
    return sample(SGHMCEM(dense(net, pb.priors.SpikeAndSlab()), xy, **STEPS), **DRAW)


def nuts(net: nn.Module, xy: Data) -> pb.Posterior:
    return sample(NUTS(dense(net), max_tree_depth=2), args=xy, **DRAW)


def ensemble(net: nn.Module, xy: Data) -> pb.Posterior:
    return DeepEnsemble(net, pb.likelihoods.Categorical(), N, num_networks=2).fit(xy, **RUN)


def dropout(net: nn.Module, xy: Data) -> pb.Posterior:
    return MCDropout(net, pb.likelihoods.Categorical(), N).fit(xy, **RUN)


def laplace(net: nn.Module, xy: Data) -> pb.Posterior:
    return LastLayerLaplace(net, pb.likelihoods.Categorical(), N).fit(xy, **RUN)


def swag(net: nn.Module, xy: Data) -> pb.Posterior:
    return SWAG(net, pb.likelihoods.Categorical(), N, rank=2).fit(xy, num_samples=3, **RUN | {"epochs": 3})


ENGINES: dict[str, tuple[Callable[[nn.Module, Data], pb.Posterior], Callable[[], nn.Module]]] = {
    "rank1": (rank1, convolutional),
    "hierarchical": (hierarchical, convolutional),
    "autoguide": (autoguide, convolutional),
    "codebook": (codebook, mlp),
    "bella": (bella, convolutional),
    "sghmc": (sghmc, mlp),
    "spike_slab": (spike_slab, convolutional),
    "nuts": (nuts, mlp),
    "ensemble": (ensemble, convolutional),
    "dropout": (dropout, mlp),
    "laplace": (laplace, convolutional),
    "swag": (swag, convolutional),
}


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_and_all_diagnostics_give_the_numbers_of_the_processor(engine: str, tmp_path: Path) -> None:
    """Proves that training, draws, prediction and diagnostics need no tensor of the processor beside the data."""
    train, build = ENGINES[engine]
    x, y = data()
    ood = torch.rand(20, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    reference = train(build(), (x, y))
    expected = dg.evaluate(reference, (x, y), ood=ood, seed=0)
    with PretendDevice():
        xy = (x.to(DEVICE), y.to(DEVICE)) if engine == "nuts" else (x, y)  # Pyro's kernels take data as they are
        posterior = train(build().to(DEVICE), xy)
        assert {value.device for value in posterior.draws(1).values()} == {DEVICE}
        assert dg.evaluate(posterior, (x, y), ood=ood, seed=0) == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert dg.check(posterior, (x, y), x_train=x, y_train=y, ood=ood)
        assert {"posterior", "log_likelihood"} <= set(groups(dg.to_arviz(posterior, x, y, probes=x[:2])))
        assert set(dg.diversity(posterior, (x, y))) >= {"disagreement"}
        if posterior.num_chains > 1:
            assert dg.convergence(posterior, x[:2])["rhat"].shape == (2, CLASSES)
        assert dg.compare_to_reference(posterior, posterior, (x, y))["agreement"] == 1
        if engine == "ensemble":
            held = posterior.predict(x).probs.argmax(-1).cpu()
            held[::4] = (held[::4] + 1) % CLASSES  # most predictions are right, not all
            assert dg.scale_temperature(posterior, (x, held)).predict(x).probs.device == DEVICE
        assert dg.ConformalSets(posterior, (x, y), level=0.8).predict(x[:2]).device == DEVICE
        before = posterior.predict(x, num_samples=1, seed=1).probs
        (posterior if engine != "autoguide" else posterior.as_draws(1, 1)).save(tmp_path / "posterior")
        again = pb.load(tmp_path / "posterior", build().to(DEVICE))
        assert torch.allclose(again.predict(x, num_samples=1, seed=1).probs, before, atol=1e-6)
        if engine == "spike_slab":
            sparse = posterior.sparsify(0.3, example=x[:1])
            assert sparse.posterior.predict(x).probs.device == DEVICE
        if engine not in ("ensemble", "dropout", "laplace", "swag"):
            assert dg.check_prior(posterior.model, x)


LOOP: dict[str, Any] = {"accumulate": 2, "clip_norm": 1.0, "patience": 5}


def in_parts_svi(net: nn.Module, xy: Data, path: Path) -> None:
    model = Rank1(net, pb.likelihoods.Categorical(), N)
    guide = Rank1Guide(model, components=2)
    checkpoint = pb.inference.Checkpoint(path / "run.pt", steps=1, keep=2)
    fit(model, guide, xy, validation=xy, checkpoint=checkpoint, log=pb.inference.CSVLog(path / "log.csv"), **LOOP | RUN)


def in_parts_svgd(net: nn.Module, xy: Data, path: Path) -> None:
    model = Bella(net, pb.likelihoods.Categorical(), N, head="5")
    SVGD(model, ParticleGuide(model, 3)).fit(xy, validation=xy, checkpoint=path / "run.pt", **LOOP | RUN)


def in_parts_swag(net: nn.Module, xy: Data, path: Path) -> None:
    engine = SWAG(net, pb.likelihoods.Categorical(), N, rank=2)
    engine.fit(xy, num_samples=3, checkpoint=path / "run.pt", **RUN | {"epochs": 3})


def in_parts_chain(net: nn.Module, xy: Data, path: Path) -> None:
    kernel = SGHMCEM(dense(net, pb.priors.SpikeAndSlab()), xy, **STEPS)
    sample(kernel, checkpoint=pb.inference.Checkpoint(path / "run.pt", epochs=1), **DRAW)


@pytest.mark.parametrize("run", [in_parts_svi, in_parts_svgd, in_parts_swag, in_parts_chain])
def test_checkpoints_and_options_of_the_loop_on_another_device(run: Any, tmp_path: Path) -> None:
    """Proves that validation, accumulation, clipping, logs and checkpoints need no tensor of the processor, and that a
    file of the processor goes on there and back: nothing is left to train in it."""
    with PretendDevice():
        run(convolutional().to(DEVICE), data(), tmp_path)
        run(convolutional().to(DEVICE), data(), tmp_path)
    run(convolutional(), data(), tmp_path)


@pytest.mark.parametrize(
    "likelihood",
    [
        pb.likelihoods.Gaussian(),
        pb.likelihoods.HeteroscedasticGaussian(),
        pb.likelihoods.Poisson(),
        pb.likelihoods.Bernoulli(),
    ],
    ids=lambda likelihood: type(likelihood).__name__,
)
def test_every_likelihood_on_another_device(likelihood: Any, tmp_path: Path) -> None:
    x, labels = data()
    y = (labels > 0).float()[:, None]

    def run(net: nn.Module) -> dict[str, float]:
        model = Dense(net, likelihood, N)
        posterior = fit(model, MeanFieldGuide(model), (x, y), **RUN)
        assert dg.check_prior(model, x, y)
        dg.report(posterior, (x, y), path=tmp_path / "report.html")
        found = dg.evaluate(posterior, (x, y), seed=0)
        if likelihood.kind != "classification":
            low, high = dg.ConformalIntervals(posterior, (x, y), level=0.8, seed=0).predict(x)
            found["conformal"] = float((high - low).sum())
        return found

    expected = run(mlp(2 if isinstance(likelihood, pb.likelihoods.HeteroscedasticGaussian) else 1))
    with PretendDevice():
        net = mlp(2 if isinstance(likelihood, pb.likelihoods.HeteroscedasticGaussian) else 1).to(DEVICE)
        assert run(net) == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("form", [Rank1, Bella])
def test_masked_labels_and_whole_texts_on_another_device(form: Any) -> None:
    """Proves that no step of it, from training to sums over tokens, mixes tensors of two devices."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(5, (N, 4), generator=generator)
    mask = torch.arange(4) < torch.randint(1, 5, (N, 1), generator=generator)
    y = pb.data.next_token_labels(torch.cat([x[:, :1], x], 1), torch.cat([mask[:, :1], mask], 1))[:, :-1]

    def run(net: nn.Module) -> dict[str, float]:
        model = form(net, pb.likelihoods.Categorical(class_dim=-1, ignore_index=-100), N)
        torch.manual_seed(0)
        if form is Bella:
            posterior = SVGD(model, ParticleGuide(model, 3)).fit((x, y), **RUN)
        else:
            posterior = fit(model, Rank1Guide(model, 2), (x, y), **RUN, validation=(x, y))
        texts = posterior.predict(x, 3, seed=0).sequences(y != -100)
        sums = {"entropy": texts.entropy, "epistemic": texts.epistemic, "log_prob": texts.log_prob(y)}
        sums["by_token"] = texts.per_token.log_prob_by_token(y)
        found = dg.evaluate(posterior, (x, y), (x, y), num_samples=3, seed=0)
        assert dg.check(posterior, (x, y), num_samples=3, seed=0)
        return found | {name: float(value.sum()) for name, value in sums.items()}

    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(5, 6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
    expected = run(net)
    with PretendDevice():
        assert run(net.to(DEVICE)) == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_simulation_based_calibration_on_another_device() -> None:
    x = torch.randn(10, 2, generator=torch.Generator().manual_seed(0))

    def run(net: nn.Module) -> dict[str, Tensor]:
        model = Dense(net, pb.likelihoods.Gaussian(scale=0.5), 10)
        result = dg.sbc(model, MeanFieldGuide, x, simulations=3, draws=9, steps=5, progress=False, seed=0)
        return {name: rank.cpu() for name, rank in result.ranks.items()}

    torch.manual_seed(0)
    net = nn.Linear(2, 1)
    expected = run(net)
    with PretendDevice():
        found = run(net.to(DEVICE))
    assert all(torch.equal(found[name], ranks) for name, ranks in expected.items())


def test_the_pretended_device_refuses_what_a_real_one_refuses() -> None:
    """Proves that the tests above can fail."""
    with PretendDevice():
        there, here = torch.arange(3.0, device=DEVICE), torch.arange(3.0)
        assert isinstance(there, PretendTensor) and there.tolist() == [0, 1, 2] and float(there.sum()) == 3
        assert torch.equal((there + 1).cpu(), here + 1) and torch.equal(there[[2, 0]].cpu(), here[[2, 0]])
        assert (there * torch.tensor(2.0)).device == DEVICE  # a number of the processor is taken
        for mixture in (lambda: there + here, lambda: torch.cat((here, there)), lambda: here[there.long()]):
            with pytest.raises(RuntimeError, match="expected all tensors on the same device"):
                mixture()
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(2, device=DEVICE, generator=torch.Generator())
        with pytest.raises(RuntimeError):
            there.numpy()
