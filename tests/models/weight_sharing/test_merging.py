"""Codes that merge: labels, pairs and outliers follow, and so does training."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from by_hand import chain
from coded_networks import N, data, distributions, sharing
from torch import nn

import pyro_bnn as pb
from pyro_bnn.inference import fit
from pyro_bnn.likelihoods import Gaussian
from pyro_bnn.models import (
    Codebook,
    CodebookGuide,
    Dense,
    MeanFieldGuide,
    MergeCodes,
    WeightSharing,
)
from pyro_bnn.models.weight_sharing.deviations import rho_of
from pyro_bnn.models.weight_sharing.merge_schedule import absorb_outliers, merge_state
from pyro_bnn.models.weight_sharing.shared_normal import SharedNormal, code_length
from pyro_bnn.models.weight_sharing.storage.packed_codebook import describe_codebook, pack_codebook, unpack_codebook


@pytest.mark.parametrize("sampling", ["codebook", "mixture"])
def test_merged_codes_take_labels_and_pairs_along(sampling: str) -> None:
    """Every weight has the code that its code went into, at the moments of the two; compacting changes no weight."""
    _, guide = sharing(sampling, codes=20)
    book = guide.book
    before, codes, pair = book.in_plane(), book.codes().clone(), book.pair.clone()
    into = book.merge(tightness=4.0)
    alive = book.weights_per_code(soft=True) > 0
    assert 1 < int(alive.sum()) < 18
    special = torch.zeros(len(codes), dtype=torch.bool)
    special[book.outliers] = special[book.between] = True
    assert torch.equal(book.codes()[~special].long(), into[codes[~special].long()])
    assert torch.equal(book.pair.long(), into[pair.long()])
    for k in alive.nonzero().flatten().tolist():
        parts = (into == k) & (before.weights > 0)
        share = before.weights[parts] / before.weights[parts].sum()
        torch.testing.assert_close(
            book.means()[k].detach(), (share * before.means[parts, 0]).sum(), rtol=1e-9, atol=1e-12
        )
        torch.testing.assert_close(
            book.scales()[k].detach(), (share * before.means[parts, 1]).sum(), rtol=1e-9, atol=1e-12
        )
    one = {n: (d.mean, d.variance) for n, d in distributions(guide).items()}
    smaller = book.compact()
    closed = (book.pair[:, 0] == book.pair[:, 1]).sum()
    assert closed > 0 and len(smaller.between) == len(book.between) - int(closed)
    assert len(smaller) == int(alive.sum())
    soft = sampling == "mixture"
    lengths = []
    for own in (book, smaller):
        pi = own.log_shares(soft)
        lengths.append(sum(float(code_length(table, pi, 1.0).detach()) for table in own.tables(soft)))
    # a dead code counts as a thousandth of a weight in pi
    assert lengths[0] == pytest.approx(lengths[1], rel=1e-3)
    for (name, shape), table in zip(smaller.sites, smaller.tables(sampling == "mixture"), strict=True):
        d = SharedNormal(table, shape)
        assert torch.equal(d.mean, one[name][0]) and torch.equal(d.variance, one[name][1])


def test_merging_again_without_training_changes_nothing() -> None:
    """The units of merging are those of the first codes: fewer codes are farther apart, and do not merge for that."""
    _, guide = sharing(codes=30)
    book = guide.book
    units = book.units.clone()
    first = book.merge(tightness=4.0)
    same = torch.arange(len(book))
    assert 5 < int((book.weights_per_code() > 0).sum()) < len(book) - 3 and not torch.equal(first, same)
    assert torch.equal(book.merge(tightness=4.0), same)
    smaller = book.compact()
    assert torch.equal(smaller.units, units) and torch.equal(packed_and_back(smaller).units, units)
    assert torch.equal(smaller.merge(tightness=4.0), torch.arange(len(smaller)))


def packed_and_back(book: Codebook) -> Codebook:
    return unpack_codebook(describe_codebook(book), pack_codebook(book))


def test_outliers_return_to_a_code_that_costs_them_little() -> None:
    """By the divergence from the code to the outlier: a code's wide ellipse in the plane is no reason."""
    _, guide = sharing(outliers=0.1)
    book = guide.book
    assert len(book.outliers) >= 4
    with torch.no_grad():
        book.spread[3] *= 1e8
        book.outlier_loc[0], book.outlier_rho[0] = book.loc[3], book.rho[3]
        s = book.scales()[3]
        book.outlier_rho[1:4] = book.rho[3]
        book.outlier_loc[1] = 50.0
        others = book.loc.sort().values
        assert float(others.diff().min()) >= 0
        book.loc[3] = 100.0  # no other code is near
        book.outlier_loc[0], book.outlier_loc[2], book.outlier_loc[3] = 100.0, 100.0 + 0.9 * s, 100.0 + 1.1 * s
    absorb_outliers(book)
    new = book.labels[book.outliers]
    assert int(new[0]) == int(new[2]) == 3 and int(new[1]) >= len(book) and int(new[3]) >= len(book)
    assert len(book.compact().outliers) <= len(book.outliers) - 2


def test_absorbing_outliers_after_a_merger() -> None:
    """Dead codes take none, labels are those of all K codes, and what has returned once does not move again."""
    _, guide = sharing(codes=30, outliers=0.1)
    book = guide.book
    into = book.merge(tightness=4.0)
    dead = (into != torch.arange(len(into))).nonzero().flatten()
    k = int((into == torch.arange(len(into))).nonzero()[-1])
    assert len(dead) > 2 and int(dead[0]) < k  # so that places among living codes are not labels
    with torch.no_grad():
        book.loc[k], book.outlier_loc[:] = 90.0, 200.0
        book.outlier_loc[0], book.outlier_loc[1] = 90.0, float(book.loc[dead[0]])
        book.loc[dead[0]] = book.outlier_loc[1] = 70.0
        book.outlier_rho[1] = book.rho[dead[0]]
        s = book.scales()[k]
        # KL(code || outlier) of an outlier that is broader: log 2 + 1/8 - 1/2 = .32; the other way round it is .81
        book.outlier_rho[0] = rho_of(2 * s)
        book.outlier_loc[2], book.outlier_rho[2] = 90.0, rho_of(s / 2)  # and here .81
    assert absorb_outliers(book) == 1
    new = book.labels[book.outliers]
    assert int(new[0]) == k and (new[1:] >= len(book)).all()
    with torch.no_grad():
        book.loc[0] = 90.0
        book.rho[0] = book.outlier_rho[0]
    assert absorb_outliers(book) == 0 and int(book.labels[book.outliers[0]]) == k


@pytest.mark.parametrize("optim", ["sgd", "adamw"])
def test_the_state_of_the_optimiser_follows_a_merger(optim: str) -> None:
    """Momentum is that of codes that were one from the start; root mean squares add up, and others stay as they are."""
    p = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    merged = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    kinds: Any = {
        "sgd": lambda q: torch.optim.SGD([q], lr=0.1, momentum=0.9),
        "adamw": lambda q: torch.optim.AdamW([q]),
    }
    ours, theirs = kinds[optim](p), kinds[optim](merged)
    into = torch.tensor([0, 1, 2, 1, 4])
    torch.manual_seed(0)
    for _ in range(4):
        p.grad = torch.randn(5, dtype=torch.float64)
        sums = torch.zeros(5, dtype=torch.float64).index_add_(0, into, p.grad)
        merged.grad = sums[[0, 1, 2, 4]]
        ours.step()
        theirs.step()
    old = {n: v.clone() for n, v in ours.state[p].items()}
    merge_state(ours, p, into)
    key = "momentum_buffer" if optim == "sgd" else "exp_avg"
    state = ours.state[p]
    torch.testing.assert_close(state[key][[0, 1, 2, 4]], theirs.state[merged][key])
    assert float(state[key][3]) == 0.0
    if optim == "adamw":
        square = (old["exp_avg_sq"][1].sqrt() + old["exp_avg_sq"][3].sqrt()) ** 2
        torch.testing.assert_close(state["exp_avg_sq"][1], square)
        assert torch.equal(state["exp_avg_sq"][[0, 2, 4]], old["exp_avg_sq"][[0, 2, 4]])
        assert float(square) >= float(theirs.state[merged]["exp_avg_sq"][1])
        assert float(state["step"]) == 4


@pytest.mark.parametrize("sampling", ["codebook", "mixture"])
def test_merging_on_a_schedule(sampling: Any, tmp_path: Any) -> None:
    """Codes merge at the epochs asked for; training goes on, resumes from a checkpoint, and fewer codes are stored."""
    x, y = (v.float() for v in data())

    def train(epochs: int, checkpoint: Any = None) -> tuple[Any, MergeCodes]:
        model = WeightSharing(chain(2, 16, 8, 1).float(), Gaussian(0.3), N)
        guide = CodebookGuide(model, 24, sampling=sampling, blend=0.05, outliers=0.05, seed=0)
        merge = MergeCodes(start=2, stop=6, every=2, tightness=2.0)
        posterior = fit(
            model,
            guide,
            (x, y),
            epochs=epochs,
            callbacks=[merge],
            checkpoint=checkpoint,
            seed=0,
            progress=False,
            lr=0.01,
        )
        return posterior, merge

    posterior, merge = train(9)
    assert [epoch for epoch, _, _ in merge.history] == [2, 4, 6]
    left = merge.history[-1][1]
    report = posterior.guide.compression_report()
    assert report["codes"] == left < len(posterior.guide.book)
    posterior.save(tmp_path / "p")
    loaded = pb.load(tmp_path / "p", chain(2, 16, 8, 1).float())
    assert len(loaded.guide.book) == left  # type: ignore[attr-defined]
    assert torch.equal(posterior.predict(x, 2, seed=0).per_member, loaded.predict(x, 2, seed=0).per_member)
    train(5, tmp_path / "run")
    resumed, later = train(9, tmp_path / "run")
    assert later.history == merge.history and resumed.losses == posterior.losses
    with pytest.raises(ValueError, match="stop=2: expected a whole number, at least 3"):
        MergeCodes(start=3, stop=2)
    dense = Dense(chain(2, 1).float(), Gaussian(0.3), N)
    with pytest.raises(TypeError, match="MergeCodes is for a CodebookGuide, the guide is a MeanFieldGuide"):
        fit(dense, MeanFieldGuide(dense), (x, y), epochs=1, callbacks=[MergeCodes()], progress=False)


def test_a_gradient_keeps_codes_apart() -> None:
    x, y = (v.float() for v in data())
    counts = []
    for limit in (math.inf, 1e-9):
        model = WeightSharing(chain(2, 16, 8, 1).float(), Gaussian(0.3), N)
        guide = CodebookGuide(model, 24)
        fit(
            model,
            guide,
            (x, y),
            epochs=1,
            callbacks=[MergeCodes(tightness=4.0, gradient_limit=limit)],
            progress=False,
            seed=0,
        )
        counts.append(guide.compression_report()["codes"])
    assert counts[0] < counts[1] == len(guide.book)
    guide.zero_grad(set_to_none=True)
    with pytest.raises(RuntimeError, match="gradient_limit needs the gradient of the last step, which was cleared"):
        MergeCodes(gradient_limit=1.0)(SimpleNamespace(guide=guide, epoch=1, model=model, optimizer=None))
