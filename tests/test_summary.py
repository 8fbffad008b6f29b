"""The summary of a model and its guide: counts against those by hand, bytes against files, memory against peaks."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn

import pyro_bnn as pb
from pyro_bnn.likelihoods import Categorical, Gaussian
from pyro_bnn.models import Bella, CodebookGuide, Dense, MeanFieldGuide, ParticleGuide, Rank1, Rank1Guide, WeightSharing
from pyro_bnn.priors import HierarchicalNormal, Normal

N = 16


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(32, 3))


def rank1() -> tuple[Any, Any]:
    model = Rank1(network(), Categorical(), N)
    return model, Rank1Guide(model, 2)


def dense() -> tuple[Any, Any]:
    model = Dense(network(), Gaussian(), N, prior={"3.weight": HierarchicalNormal(), ".*": Normal()})
    return model, MeanFieldGuide(model, 3)


def bella() -> tuple[Any, Any]:
    model = Bella(network(), Categorical(), N, rank=2, head="3")
    return model, ParticleGuide(model, 2)


def codebook() -> tuple[Any, Any]:
    model = WeightSharing(network(), Categorical(), N)
    return model, CodebookGuide(model, 4)


def draws() -> tuple[Any, Any]:
    model, guide = dense()
    posterior = pb.Posterior(model, guide).as_draws(5, seed=0)
    return posterior.model, posterior.guide


def layers(summary: pb.Summary, *columns: str) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in summary.to_dataframe()[["name", *columns]].itertuples(index=False)]


def test_every_layer_of_a_rank_1_network_is_counted() -> None:
    summary = pb.summary(*rank1())
    assert layers(summary, "kind", "weight", "form") == [
        ("0", "Conv2d", (2, 1, 3, 3), "rank-1"),
        ("1", "BatchNorm2d", (2,), "point"),
        ("3", "Linear", (3, 32), "rank-1"),
    ]
    # s, r, bias and the layer's tau; W, and two components of location and width (but one number for a bias)
    convolution, linear = (1 + 2 + 1) * 2 * 2 + 2 * 2, (32 + 3 + 1) * 2 * 2 + 3 * 2
    assert layers(summary, "parameters", "random", "trainable", "total") == [
        ("0", 20, 6, 18 + convolution, 20 + convolution),
        ("1", 4, 0, 4, 4),
        ("3", 99, 39, 96 + linear, 99 + linear),
    ]
    assert summary.trainable == 118 + convolution + linear and summary.total == 123 + convolution + linear


def test_scales_count_for_their_layer_and_the_noise_for_none() -> None:
    summary = pb.summary(*dense())
    assert layers(summary, "form", "random", "trainable", "total") == [
        ("0", "dense", 20, 120, 140),
        ("1", "point", 0, 4, 4),
        ("3", "dense", 100, 600, 699),
        ("(shared)", "", 1, 6, 6),
    ]
    assert "HierarchicalNormal" in summary.layers[2].prior and "Normal(loc=None" in summary.layers[2].prior


def test_a_model_alone_has_no_numbers_of_a_guide() -> None:
    summary = pb.summary(Dense(network(), Categorical(), N))
    assert layers(summary, "random", "trainable", "total") == [("0", 20, 0, 20), ("1", 0, 4, 4), ("3", 99, 0, 99)]
    assert summary.stored is None and summary.memory is None


def test_frozen_weights_are_held_and_not_trained() -> None:
    summary = pb.summary(*bella())
    # A [2, 9] and B [2, 2] of two particles; the head is each particle's own
    assert layers(summary, "form", "trainable", "total") == [
        ("0", "low-rank", 44, 64),
        ("1", "frozen", 0, 4),
        ("3", "dense", 198, 297),
    ]


def test_weights_that_share_gaussians_have_the_form_of_a_codebook() -> None:
    summary = pb.summary(*codebook())
    assert [layer.form for layer in summary.layers] == ["codebook", "point", "codebook", ""]
    assert summary.layers[-1].trainable >= 8  # means and deviations of four codes, and outliers


@pytest.mark.parametrize("make", [rank1, dense, bella, codebook, draws], ids=lambda f: f.__name__)
def test_the_bytes_of_a_posterior_are_those_of_its_file(make: Callable[[], Any], tmp_path: Path) -> None:
    model, guide = make()
    pb.Posterior(model, guide).save(tmp_path / "saved")
    content = (tmp_path / "saved" / "tensors.safetensors").read_bytes()
    (header,) = struct.unpack("<Q", content[:8])
    assert pb.summary(model, guide).stored == len(content) - 8 - header


def test_memory_of_training_has_its_parts_and_grows_with_the_batch() -> None:
    model = Dense(nn.Sequential(nn.Linear(50, 40), nn.Tanh(), nn.Linear(40, 2)), Categorical(), 1000)
    guide, x = MeanFieldGuide(model), torch.randn(1, 50)
    numbers = 51 * 40 + 41 * 2
    memory = [pb.summary(model, guide, batch_size=size, example=x).memory for size in (10_000, 20_000, 30_000)]
    assert all(
        m is not None
        and (m.parameters, m.gradients, m.optimizer, m.last_good)
        == (4 * 3 * numbers, 4 * 2 * numbers, 4 * 4 * numbers, 4 * 2 * numbers)
        for m in memory
    )
    small, middle, large = (m.step for m in memory if m is not None)
    assert small > 4 * 2 * numbers  # a draw and the widths that it was made with, at least
    assert middle - small >= 10_000 * 4 * (40 + 2) and middle - small == pytest.approx(large - middle, rel=0.01)
    assert all(m is not None and m.total > m.parameters + m.gradients + m.optimizer for m in memory)


@pytest.mark.parametrize("make", [rank1, dense], ids=lambda f: f.__name__)
def test_a_summary_leaves_no_trace(make: Callable[[], Any]) -> None:
    model, guide = make()
    model.train()
    x = torch.randn(2, 1, 6, 6)
    for parameter in guide.parameters():
        parameter.grad = torch.ones_like(parameter)
    state = {n: t.clone() for program in (model, guide) for n, t in program.state_dict().items()}
    random = torch.get_rng_state()
    pb.summary(model, guide, batch_size=8, example=x)
    assert all(torch.equal(t, state[n]) for program in (model, guide) for n, t in program.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(bool((p.grad == 1).all()) for p in guide.parameters())
    assert all(p.grad is None for p in model.parameters()) and model.training


def test_an_autoguide_has_a_memory_of_training_and_a_row_of_its_own() -> None:
    model = Dense(nn.Linear(3, 2), Categorical(), N)
    summary = pb.summary(model, guide := AutoNormal(model), example=torch.randn(1, 3))
    assert summary.memory is not None and summary.stored is None
    assert summary.layers[-1].trainable == sum(p.numel() for p in guide.parameters()) == 16
    assert "about" in repr(summary) and "<table>" in summary._repr_html_()


def test_what_cannot_be_summed_up_is_refused() -> None:
    def program(x: Any, y: Any = None) -> None: ...

    model = Dense(nn.Linear(3, 2), Categorical(), N)
    x = torch.randn(1, 3)
    with pytest.raises(TypeError, match="model of this package"):
        pb.summary(program)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="guide is a function"):
        pb.summary(model, program)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs a guide to train"):
        pb.summary(model, example=x)
    with pytest.raises(ValueError, match="batch_size=0"):
        pb.summary(model, MeanFieldGuide(model), batch_size=0)
    alone = Dense(nn.Linear(3, 2), None)
    with pytest.raises(ValueError, match="without a likelihood"):
        pb.summary(alone, MeanFieldGuide(alone), example=x)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ResNet-18, rank-1", "ResNet-18, mean field", "transformer, rank-1"])
def test_the_memory_of_training_is_within_a_quarter_of_the_measured_peak(name: str) -> None:
    from tests.benchmarks.summary_memory import CASES, compare

    full = next(case for case in CASES if case.startswith(name))
    assert 0.75 < compare(full)["ratio"] < 1.25
