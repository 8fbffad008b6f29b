"""Posteriors of codebook guides on disk: they come back bit for bit, and damage is told."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from by_hand import chain
from coded_networks import PRIORS, N, data
from pyro.infer import Predictive
from safetensors.torch import load_file, save_file

import pyro_bnn as pb
from pyro_bnn import priors
from pyro_bnn.inference import fit
from pyro_bnn.likelihoods import Gaussian
from pyro_bnn.models import (
    CodebookGuide,
    WeightSharing,
)


@pytest.mark.parametrize("prior", ["normal", "hierarchical", "horseshoe", "student", "mixture", "own"])
@pytest.mark.parametrize("sampling", ["codebook", "mixture"])
def test_training_saving_and_loading(tmp_path: Any, sampling: str, prior: str) -> None:
    """Under every kind of prior the loss falls, and a saved posterior predicts bit for bit the same."""
    x, y = data()
    chosen: Any = {
        "normal": priors.Normal(),
        "hierarchical": priors.HierarchicalNormal(),
        "horseshoe": priors.Horseshoe(),
        "student": priors.StudentT(),
        "mixture": PRIORS["mixture"],
        "own": {r".*weight": priors.CodebookPrior(), ".*": priors.Normal()},
    }[prior]
    net = chain(2, 16, 8, 1).float()
    model = WeightSharing(net, Gaussian(), N, prior=chosen)
    guide = CodebookGuide(model, 12, sampling=sampling, blend=0.1, outliers=0.05)  # type: ignore[arg-type]
    posterior = fit(model, guide, (x.float(), y.float()), epochs=60, lr=0.02, batch_size=20, progress=False, seed=0)
    assert sum(posterior.losses[-15:]) < sum(posterior.losses[:15])
    posterior.save(tmp_path / "p")
    loaded = pb.load(tmp_path / "p", net)
    for a, b in ((posterior.sample(3, seed=1), loaded.sample(3, seed=1)), (posterior.draws(2, 4), loaded.draws(2, 4))):
        assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert torch.equal(
        posterior.predict(x.float(), 3, seed=0).per_member, loaded.predict(x.float(), 3, seed=0).per_member
    )
    assert isinstance(loaded.model, WeightSharing) and isinstance(loaded.guide, CodebookGuide)
    for name, mean in loaded.guide.means_of_network().items():
        assert torch.equal(mean, loaded.model.core().parameters_by_name()[name])
    draws = Predictive(model, guide=posterior.guide, num_samples=2)(x.float())["obs"]
    assert draws.shape[0] == 2 and bool(torch.isfinite(draws).all())
    # what was loaded trains on
    more = fit(loaded.model, loaded.guide, (x.float(), y.float()), epochs=1, progress=False)
    assert all(math.isfinite(v) for v in more.losses)


def test_draws_of_merged_pairs_are_the_same_after_loading(tmp_path: Any) -> None:
    """sampling="mixture": the choice between two codes that are one by now takes no random numbers."""
    x = data()[0].float()
    model = WeightSharing(chain(2, 16, 8, 1).float(), Gaussian(0.3), N)
    guide = CodebookGuide(model, 24, sampling="mixture", blend=0.3)
    fresh = copy.deepcopy(guide.book)
    guide.book.merge(tightness=3.0)
    pair = guide.book.pair
    closed = (pair[:, 0] == pair[:, 1]).double().mean()
    assert 0 < float(closed) < 1
    copied = CodebookGuide(model, fresh, sampling="mixture")
    copied.load_state_dict(guide.state_dict())
    posterior = pb.Posterior(model, guide)
    posterior.save(tmp_path / "p")
    expected = posterior.predict(x, 5, seed=0).per_member
    assert torch.equal(pb.load(tmp_path / "p", chain(2, 16, 8, 1).float()).predict(x, 5, seed=0).per_member, expected)
    assert torch.equal(pb.Posterior(model, copied).predict(x, 5, seed=0).per_member, expected)


def test_damaged_files(tmp_path: Any) -> None:
    net = chain(2, 16, 1).float()
    model = WeightSharing(net, Gaussian(0.3), N)
    guide = CodebookGuide(model, 6, blend=0.1, outliers=0.1, smallest=0)
    assert len(guide.book) == 6
    path = tmp_path / "p"
    pb.Posterior(model, guide).save(path)
    file = path / "tensors.safetensors"
    before = {key: value for key, value in json.loads((path / "posterior.json").read_text()).items() if key != "digest"}
    whole, text = file.read_bytes(), json.dumps(before | {"version": 2})  # the version before there were digests
    (path / "posterior.json").write_text(text)

    def damaged(change: Any) -> None:
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    def require(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            pb.load(path, net)
        file.write_bytes(whole)
        (path / "posterior.json").write_text(text)

    file.write_bytes(whole[:-7])
    require("truncated or damaged")
    damaged(lambda t: t.pop("guide.codebook.labels"))
    require("labels is missing")
    damaged(lambda t: t.update({"guide.codebook.labels": t["guide.codebook.labels"][:-1].clone()}))
    require("48 values of 3 bits take 18 bytes")
    damaged(lambda t: t["guide.codebook.labels"].fill_(255))
    require("labels outside of 0 to 5")
    damaged(lambda t: t["guide.codebook.between"].fill_(255))
    require("damaged")
    damaged(lambda t: t.update({"guide.codebook.rho": t["guide.codebook.rho"][:-1].clone()}))
    require(r"rho has shape \(5,\), expected \(6,\)")
    content = json.loads(text)
    content["guide"]["codebook"]["sites"][0][0] = "9.weight"
    (path / "posterior.json").write_text(json.dumps(content))
    require("'9.weight' is no random parameter of this one")
    with pytest.raises(ValueError, match="is for another network"):
        pb.load(path, chain(2, 17, 1).float())
