"""What version 1 of the format wrote means in version 2 what it meant then."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pyro_bnn as pb
from pyro_bnn.posterior.older import from_version_1
from pyro_bnn.priors import CodebookPrior, GaussianMixture, Laplace, Normal, SpikeAndSlab, from_description
from pyro_bnn.priors.spike_and_slab import InverseGammaHyperprior

NETWORK = {"fc.weight": ["float32", 3, 2], "fc.bias": ["float32", 3], "bias.scale": ["float32", 3]}
NORMAL = {"class": "Normal", "loc": None, "scale": 0.1}


def translated(prior: Any, network: Any = NETWORK, **model: Any) -> Any:
    content = {"version": 1, "network": network, "model": {"class": "Dense", "prior": prior, **model}}
    found = from_version_1(content)
    assert found["version"] == 2 and content["version"] == 1
    return from_description(found["model"]["prior"])


def test_a_mixture_without_components_was_the_codebook() -> None:
    numbers = {"slab": 0.5, "concentration": 3.0, "rate": 1e-3}
    old = {"class": "GaussianMixture", "locs": None, "scales": None, "weights": None, **numbers}
    assert translated(old) == CodebookPrior(0.5, 3.0, 1e-3)
    assert translated({"patterns": [[".*weight", old], [".*", NORMAL]]})[".*weight"] == CodebookPrior(0.5, 3.0, 1e-3)
    fixed = old | {"locs": [0.0, 1.0], "scales": [0.1, 0.2], "weights": [0.5, 0.5]}
    assert translated(fixed) == GaussianMixture([0.0, 1.0], [0.1, 0.2])


def test_the_scale_of_a_spike_and_slab_was_the_prior_of_a_variance() -> None:
    old = {"class": "SpikeAndSlab", "spike_scale": 0.1, "slab_scale": 1.0, "inclusion": {"a": 2.0, "b": 2.0}}
    old |= {"group": "weight", "spike": "normal", "scale": {"concentration": 3.0, "rate": 2.0}, "loc": None}
    assert translated(old) == SpikeAndSlab(0.1, 1.0, variance_prior=InverseGammaHyperprior(3.0, 2.0))
    assert translated(old | {"scale": None}) == SpikeAndSlab(0.1, 1.0)


@pytest.mark.parametrize(("rank", "alpha", "stabilised"), [(4, 16.0, False), (2, 3.0, False), (9, 8.0, True)])
def test_a_normal_of_a_bella_was_that_of_the_product(rank: int, alpha: float, stabilised: bool) -> None:
    """Alone and in a mapping; other priors, and that of a head, were of what they are of now."""
    own = {"class": "Bella", "rank": rank, "alpha": alpha, "rank_stabilised": stabilised, "head": []}
    model = pb.models.Bella(nn.Linear(2, 3), None, rank=rank, alpha=alpha, rank_stabilised=stabilised)
    assert translated(NORMAL, **own) == model.priors["weight.A"] == model.priors["weight.B"]
    laplace = {"class": "Laplace", "loc": None, "scale": 1.0}
    found = translated({"patterns": [["fc.*A", laplace], [".*", NORMAL]]}, **own)
    assert list(found.values()) == [Laplace(), model.priors["weight.A"]]
    content = {"version": 1, "network": NETWORK, "model": own | {"prior": NORMAL, "head_prior": NORMAL}}
    assert from_version_1(content)["model"]["head_prior"] == NORMAL
    assert from_version_1(content)["model"]["head"] is None
    assert (
        from_description(from_version_1(content | {"model": own | {"prior": laplace}})["model"]["prior"]) == Laplace()
    )


def test_a_pattern_that_now_names_a_module_too_still_means_the_names_it_matched() -> None:
    """ "bias" is now the module of "bias.scale", which the last pattern had; other patterns stay as they are."""
    patterns = [
        ["fc", NORMAL],
        [".*bias", {**NORMAL, "scale": 2.0}],
        ["fc.*", {**NORMAL, "scale": 3.0}],
        [".*", NORMAL],
    ]
    found = translated({"patterns": patterns})
    layers = nn.ModuleDict({"fc": nn.Linear(2, 3), "bias": nn.ParameterDict({"scale": nn.Parameter(torch.ones(3))})})
    scales = {name: prior.scale for name, prior in pb.models.Dense(layers, None, prior=found).priors.items()}
    assert scales == {"fc.weight": 3.0, "fc.bias": 2.0, "bias.scale": 0.1}
    assert [*found][2:] == ["fc.*", ".*"]
    now = {pattern: from_description(one) for pattern, one in patterns}
    changed = {name: p.scale for name, p in pb.models.Dense(layers, None, prior=now).priors.items()}  # type: ignore[arg-type]
    assert changed == {"fc.weight": 0.1, "fc.bias": 0.1, "bias.scale": 2.0}


def test_a_posterior_without_its_prior_needs_no_translation() -> None:
    content = {"version": 1, "network": NETWORK, "model": {"class": "Dense"}}
    assert from_version_1(content) == content | {"version": 2}


def test_what_is_written_now_is_of_version_3_and_is_read_as_it_stands(tmp_path: Path) -> None:
    net = nn.Linear(2, 3)
    model = pb.models.Bella(net, pb.likelihoods.Categorical(), 5, product_scale=0.3)
    pb.Posterior(model, pb.models.ParticleGuide(model, 2)).save(tmp_path / "p")
    content = json.loads((tmp_path / "p" / "posterior.json").read_text())
    assert content["version"] == 3
    loaded: Any = pb.load(tmp_path / "p", net).model
    assert loaded.priors == model.priors
    assert loaded.priors["weight.A"] == Normal(0.0, math.sqrt(0.3 / (4 * 2)))
