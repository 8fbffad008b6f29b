"""Weights that share values: the model, its guide, and what comes back from a file."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from by_hand import chain
from coded_networks import N, data, sharing
from pyro import poutine
from safetensors.torch import load_file
from torch import nn
from torch.distributions import Normal, kl_divergence

import pyro_bnn as pb
from pyro_bnn import priors
from pyro_bnn.inference import MixtureELBO, fit
from pyro_bnn.likelihoods import Gaussian
from pyro_bnn.models import (
    Codebook,
    CodebookGuide,
    MeanFieldGuide,
    SharedWeights,
    WeightSharing,
)


def shared_by(source: Codebook) -> SharedWeights:
    return SharedWeights(chain(2, 16, 8, 1), Gaussian(0.3), N, codebook=source, prior=priors.Normal(0.0, 0.7))


def test_the_function_is_that_of_weights_put_together_by_hand() -> None:
    x, y = data()
    source = sharing()[1].book
    model = shared_by(source)
    assert [s.name for s in model.sites()] == ["codes", "outliers", "0.bias", "2.bias", "4.bias"]
    draw = poutine.trace(model.shared_guide()).get_trace(x, y).nodes
    z, o = draw["codes"]["value"].flatten(), draw["outliers"]["value"].flatten()
    weights = []
    out, mid = source.outliers.tolist(), source.between.tolist()
    for i, code in enumerate(source.codes().tolist()):
        if i in out:
            weights.append(o[out.index(i)])
        elif i in mid:
            j = mid.index(i)
            (a, b), t = source.pair[j].tolist(), source.alpha[j]
            weights.append(t * z[a] + (1 - t) * z[b])
        else:
            weights.append(z[code])
    flat, state, start = torch.stack(weights), {}, 0
    for name, shape in source.sites:
        state[name] = flat[start : start + shape.numel()].view(shape)
        start += shape.numel()
    state |= {n: draw[n]["value"].reshape(-1) for n in ("0.bias", "2.bias", "4.bias")}
    f = model.function(x, {n: draw[n]["value"] for n in (s.name for s in model.sites())}, N)
    by_hand = torch.func.functional_call(chain(2, 16, 8, 1), state, (x,))
    torch.testing.assert_close(f[0], by_hand, rtol=1e-10, atol=1e-12)


def test_the_guide_of_the_paper_starts_at_the_spread_of_the_codes_in_the_plane() -> None:
    """And, given another guide, at its biases."""
    x, y = data()
    _, start = sharing()
    model = shared_by(start.book)
    q = poutine.trace(model.shared_guide()).get_trace(x, y).nodes["codes"]["fn"]
    torch.testing.assert_close(q.variance.flatten(), start.book.spread[:, 0, 0], rtol=1e-6, atol=1e-14)
    with torch.no_grad():
        for values in (start.coordinates(), start.widths()):
            values["2.bias"].fill_(0.25)
    guide = model.shared_guide(start)
    assert bool((guide.coordinates()["2.bias"] == 0.25).all()) and bool((guide.widths()["2.bias"] == 0.25).all())


def test_each_code_has_one_divergence() -> None:
    """The objective by hand, at one draw."""
    x, y = data()
    model = shared_by(sharing()[1].book)
    guide = model.shared_guide()
    torch.manual_seed(0)
    loss = MixtureELBO().differentiable_loss(model.eval(), guide, x, y)
    torch.manual_seed(0)
    draw = poutine.trace(guide).get_trace(x, y).nodes
    f = model.function(x, {n: draw[n]["value"] for n in (s.name for s in model.sites())}, N)
    kl = 0.0
    for site in model.sites():
        normal = draw[site.name]["fn"]
        p = Normal(torch.zeros_like(normal.mean), 0.7)
        kl = kl + kl_divergence(Normal(normal.mean, normal.variance.sqrt()), p).sum()
    torch.testing.assert_close(loss, kl - Normal(f[0, :, 0], 0.3).log_prob(y).sum())


def trained(path: Path) -> pb.Posterior:
    x, y = data()
    model = shared_by(sharing()[1].book)
    posterior = fit(model, model.shared_guide(), (x, y), epochs=30, lr=0.01, progress=False, seed=0)
    posterior.save(path)
    return posterior


def test_what_was_trained_comes_back_from_a_file_without_the_coded_weights(tmp_path: Path) -> None:
    x, _ = data()
    posterior = trained(tmp_path / "p")
    assert sum(posterior.losses[-5:]) < sum(posterior.losses[:5])
    names = [n for n in load_file(tmp_path / "p" / "tensors.safetensors") if n.startswith("network.")]
    assert names == ["network.0.bias", "network.2.bias", "network.4.bias"]
    loaded = pb.load(tmp_path / "p", chain(2, 16, 8, 1))
    assert isinstance(loaded.model, SharedWeights) and isinstance(loaded.guide, MeanFieldGuide)
    assert torch.equal(posterior.predict(x, 3, seed=0).per_member, loaded.predict(x, 3, seed=0).per_member)


def test_a_file_that_calls_it_weight_sharing_with_shared_loads_as_shared_weights(tmp_path: Path) -> None:
    x, _ = data()
    posterior = trained(tmp_path / "p")
    file = tmp_path / "p" / "posterior.json"
    content = json.loads(file.read_text())
    content["version"] = 1
    del content["digest"], content["tensors"]
    content["model"] |= {"class": "WeightSharing", "shared": content["model"].pop("codebook")}
    file.write_text(json.dumps(content))
    loaded = pb.load(tmp_path / "p", chain(2, 16, 8, 1))
    assert type(loaded.model) is SharedWeights
    assert torch.equal(posterior.predict(x, 3, seed=0).per_member, loaded.predict(x, 3, seed=0).per_member)


def test_the_same_model_of_another_network_shares_the_same_weights() -> None:
    model = shared_by(sharing()[1].book)
    other = model.on(chain(2, 16, 8, 1))
    assert other.prior == model.prior and [s.name for s in other.sites()] == [s.name for s in model.sites()]
    assert torch.equal(other.book.labels, model.book.labels) and torch.equal(other.book.pair, model.book.pair)


def test_what_shared_weights_refuse() -> None:
    source, net = sharing()[1].book, chain(2, 16, 8, 1)
    with pytest.raises(TypeError, match="use the guide model.shared_guide"):
        CodebookGuide(shared_by(source), 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"is a property of the model: SharedWeights\(..., codebook=guide.book\)"):
        CodebookGuide(WeightSharing(net, Gaussian(0.3), N), 3, sampling="shared")  # type: ignore[arg-type]
    assert not hasattr(WeightSharing(net, Gaussian(0.3), N), "shared_guide")
    with pytest.raises(ValueError, match="the codebook is for another network"):
        SharedWeights(chain(2, 5, 1), Gaussian(0.3), N, codebook=source)
    with pytest.raises(
        ValueError, match=r"the prior of 'codes' is a CodebookPrior, whose components are the codes themselves"
    ):
        SharedWeights(
            net, Gaussian(0.3), N, codebook=source, prior={"codes": priors.CodebookPrior(), ".*": priors.Normal()}
        )
    named = nn.Sequential(OrderedDict({"first": nn.Linear(2, 1).double()}))
    named.register_parameter("codes", nn.Parameter(torch.zeros(3, dtype=torch.float64)))
    with pytest.raises(ValueError, match="a parameter of its own named 'codes'"):
        SharedWeights(named, Gaussian(0.3), N, codebook=source)
