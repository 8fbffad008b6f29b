"""Codebook guides: what is coded, training under all priors, and what a guide refuses."""

from __future__ import annotations

import math
import time
from typing import Any

import pyro
import pytest
import torch
import torchvision
from by_hand import chain
from coded_networks import N, data, sharing
from pyro import poutine
from pyro.infer import SVI, TraceMeanField_ELBO
from torch import nn

import pyro_bnn as pb
from pyro_bnn import priors
from pyro_bnn.inference import fit
from pyro_bnn.likelihoods import Categorical as Classes
from pyro_bnn.likelihoods import Gaussian
from pyro_bnn.models import (
    CodebookGuide,
    Dense,
    MeanFieldGuide,
    WeightSharing,
    architectures,
)


def test_as_many_codes_as_weights_are_the_mean_field() -> None:
    """A codebook of a mean field with a code for each weight has its means and deviations."""
    model = WeightSharing(chain(2, 8, 1), Gaussian(0.3), N)
    field = MeanFieldGuide(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in field.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    guide = CodebookGuide.from_mean_field(model, field, 24, blend=0.0, outliers=0.0, iterations=1)
    traces = [poutine.trace(g).get_trace(data()[0]).nodes for g in (guide, field)]
    for site in model.sites():
        ours, theirs = (t[site.name]["fn"] for t in traces)
        torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(ours.variance, theirs.variance, rtol=1e-6, atol=1e-12)


def test_what_is_coded() -> None:
    """Weights of products by default; biases and others stay factorised, and normalisation layers points."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))
    model = WeightSharing(net, Classes(), 10)
    guide = CodebookGuide(model, 8)
    assert [n for n, _ in guide.book.sites] == ["0.weight", "3.weight"]
    assert list(guide.coordinates()) == ["0.bias", "3.bias"]
    every = CodebookGuide(model, 8, coded=".*")
    assert [n for n, _ in every.book.sites] == ["0.weight", "0.bias", "3.weight", "3.bias"]
    assert len(every.loc) == 0 and every.member_biases() == []
    with pytest.raises(ValueError, match="no random parameter is the weight of a linear layer"):
        CodebookGuide(WeightSharing(net, Classes(), 10, select=".*bias"), 2)


def test_a_zero_code_and_constrained_entropy() -> None:
    """The mean of code 0 stays 0 in training, where others move; a rate leaves fewer bits in the labels."""
    x, y = data()
    model, guide = sharing(zero=True, codes=16)
    before = guide.book.means().detach().clone()
    fit(model, guide, (x, y), epochs=5, lr=0.05, progress=False, seed=0)
    after = guide.book.means().detach()
    assert float(after[0]) == float(before[0]) == 0.0 and (after[1:] != before[1:]).all()
    assert guide.compression_report()["trainable"] == 2 * len(guide.book) + 2 * len(guide.book.outliers) - 1
    free, constrained = (sharing(codes=16, rate=rate)[1].compression_report() for rate in (0.0, 10.0))
    assert constrained["label_entropy"] < free["label_entropy"] - 0.2


def test_a_codebook_guide_has_pictures_of_its_codes_and_other_guides_have_none() -> None:
    model, guide = sharing()
    plane, usage = guide.figures()
    assert plane.startswith("Plane of") and usage.startswith("Weights of each code")
    assert MeanFieldGuide(model).figures() == {}


def test_users_own_svi() -> None:
    x, y = data()
    model, guide = sharing(prior=priors.Normal())
    pyro.set_rng_seed(0)
    before = guide.book.loc.detach().clone()
    with pyro.get_param_store().scope():
        engine = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), TraceMeanField_ELBO())
        losses = [engine.step(x, y) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10]) and not torch.equal(before, guide.book.loc)


def test_prefix_and_dense_models() -> None:
    x, y = data()
    model = Dense(chain(2, 8, 1), Gaussian(0.3), N, prefix="one")
    guide = CodebookGuide(model, 5)
    assert [n for n, _ in guide.book.sites] == ["one.0.weight", "one.2.weight"]
    assert all(math.isfinite(v) for v in fit(model, guide, (x, y), epochs=2, progress=False).losses)


NETWORKS: dict[str, Any] = {
    "resnet": lambda: (architectures.resnet18(3), torch.randn(4, 3, 16, 16)),
    "vit": lambda: (torchvision.models.vit_b_16(image_size=32, num_classes=3), torch.randn(4, 3, 32, 32)),
}


@pytest.mark.slow
def test_a_residual_network_with_batch_normalisation() -> None:
    """One global codebook over all convolutions; statistics move in training and not in prediction."""
    torch.manual_seed(0)
    net, x = NETWORKS["resnet"]()
    y = torch.tensor([0, 1, 2, 0])
    model = WeightSharing(net, Classes(), 4)
    guide = CodebookGuide(model, 32, init_scale=1e-3, iterations=3)
    report = guide.compression_report()
    assert report["weights"] == sum(p.numel() for p in net.parameters() if p.dim() > 1) > 1e7
    assert report["per_trainable"] > 50 and report["of_mean_field"] < 0.2 and report["of_network"] < 0.4
    posterior = fit(model, guide, (x, y), epochs=2, batch_size=4, progress=False, seed=0)
    before = {n: b.clone() for n, b in model.core().net.named_buffers()}
    assert int(before["bn1.num_batches_tracked"]) == 2
    assert bool(torch.isfinite(posterior.predict(x, 2).probs).all())
    assert all(torch.equal(b, before[n]) for n, b in model.core().net.named_buffers())


@pytest.mark.slow
def test_a_vision_transformer() -> None:
    torch.manual_seed(0)
    net, x = NETWORKS["vit"]()
    model = WeightSharing(net, Classes(), 4)
    start = time.perf_counter()
    guide = CodebookGuide(model, 64, init_scale=1e-3, iterations=3)
    assert time.perf_counter() - start < 600
    names = [n for n, _ in guide.book.sites]
    assert len(names) == 50 and "encoder.layers.encoder_layer_0.self_attention.in_proj_weight" in names
    posterior = fit(model, guide, (x, torch.tensor([0, 1, 2, 0])), epochs=1, batch_size=4, progress=False, seed=0)
    assert bool(torch.isfinite(posterior.predict(x, 1).probs).all())


def test_bad_input() -> None:
    model = WeightSharing(chain(2, 4, 1), Gaussian(0.3), N)
    for codes, message in ((13, "codes=13, but there are only 12 weights"), (0, "codes=0: expected a whole number")):
        with pytest.raises(ValueError, match=message):
            CodebookGuide(model, codes, blend=0.0, outliers=0.0)
    with pytest.raises(ValueError, match="sampling='paper': expected one of 'codebook', 'mixture'"):
        CodebookGuide(model, 3, sampling="paper")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="init_scale=0"):
        CodebookGuide(model, 3, init_scale=0)
    with pytest.raises(ValueError, match="outliers=1.5: expected a number in"):
        CodebookGuide(model, 3, outliers=1.5)
    with pytest.raises(TypeError, match=r"takes a pyro_bnn.models.WeightSharing, got Rank1"):
        CodebookGuide(pb.models.Rank1(chain(2, 1), Gaussian(0.3), N), 3)  # type: ignore[arg-type]
    field = MeanFieldGuide(model, 2)
    with pytest.raises(ValueError, match="mixture of 2 components"):
        CodebookGuide.from_mean_field(model, field, 3)
    other = WeightSharing(chain(2, 5, 1), Gaussian(0.3), N)
    with pytest.raises(ValueError, match="the guide is for another model: it has no site '0.weight'"):
        CodebookGuide.from_mean_field(other, MeanFieldGuide(model), 3)
    with pytest.raises(ValueError, match=r"for another network: '0.weight' has shape \(4, 2\) there and \(5, 2\)"):
        CodebookGuide(other, CodebookGuide(model, 3).book)
    net = chain(2, 4, 1)
    with torch.no_grad():
        net[2].weight[0, 1] = math.nan
    with pytest.raises(ValueError, match="'2.weight' holds 1 NaN or infinite values"):
        CodebookGuide(WeightSharing(net, Gaussian(0.3), N), 3)
    with pytest.raises(RuntimeError, match="build a CodebookGuide for this model first"):
        WeightSharing(net, Gaussian(0.3), N, prior=priors.CodebookPrior())(data()[0])
    with pytest.raises(ValueError, match="the prior of '0.bias' is a CodebookPrior"):
        CodebookGuide(WeightSharing(chain(2, 4, 1), Gaussian(0.3), N, prior=priors.CodebookPrior()), 3)
    own = {r".*weight": priors.CodebookPrior(), ".*": priors.Normal()}
    model, first = sharing(prior=own)
    CodebookGuide(model, 5)
    with pytest.raises(ValueError, match="is the codebook of another guide"):
        fit(model, first, data(), epochs=1, progress=False)


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_constant_weights_and_one_code(value: float) -> None:
    """All weights alike take one code, and no more; and one code does for any network."""
    net = chain(2, 4, 1)
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(value)
    model = WeightSharing(net, Gaussian(0.3), N)
    with pytest.raises(ValueError, match="codes=2, but only 1 distinct"):
        CodebookGuide(model, 2)
    for own in (model, WeightSharing(chain(2, 4, 1), Gaussian(0.3), N)):
        guide = CodebookGuide(own, 1, outliers=0.0)
        assert len(guide.book) == 1 and guide.compression_report()["label_bits"] == 0
        losses = fit(own, guide, data(), epochs=2, progress=False).losses
        assert all(math.isfinite(v) for v in losses)
