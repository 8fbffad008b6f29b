"""Switches, words, functions and paths that are none are refused at the call by the name of the argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from entry import test_numbers as doors
from torch.utils.data import DataLoader, Subset, TensorDataset

import pyro_bnn as pb
from pyro_bnn import diagnostics, inference, likelihoods, models, priors

X, Y = doors.X, doors.Y


class Odd:
    def __repr__(self) -> str:
        return "<odd>"


def sample(**options: Any) -> object:
    return doors.sample(**options)


def to_arviz(**options: Any) -> object:
    return diagnostics.to_arviz(doors.posterior(), X, Y, num_samples=2, **options)


def swag(**options: Any) -> object:
    return inference.SWAG(doors.net(), doors.CATEGORICAL, 12).fit((X, Y), epochs=2, **({"progress": False} | options))


CALLS: list[tuple[Callable[..., object], str]] = [
    # switches
    (lambda **o: models.Rank1(doors.net(), doors.CATEGORICAL, 12, **o), "member_bias"),
    (doors.bella, "rank_stabilised"),
    (inference.ScaleLatents, "per_member"),
    (lambda **o: models.Rank1Guide(doors.rank1(), **o), "init_stratified"),
    (doors.svgd, "sequential"),
    (doors.sghmc, "capture"),
    (doors.fit, "progress"),
    (sample, "progress"),
    (swag, "progress"),
    (lambda **o: pb.Posterior.from_draws(doors.dense(), doors.dense_draws(), **o), "is_sampled"),
    (lambda **o: doors.spiky().sparsify(num_samples=2, **o), "shrink"),
    (lambda **o: doors.posterior().save("never", **o), "prior"),
    # functions
    (doors.fit, "callbacks"),
    (swag, "callbacks"),
    (doors.fit, "schedule"),
    (doors.svgd, "annealing"),
    (lambda **o: inference.DeepEnsemble(net=doors.net(), likelihood=doors.CATEGORICAL, num_data=12, **o), "build"),
    (lambda **o: models.Rank1Guide(doors.rank1(), **o), "init_means"),
    # paths
    *((call, name) for call, name in ((doors.fit, "checkpoint"), (sample, "stream"))),
    (doors.ensemble_fit, "checkpoint"),
    (lambda path: doors.posterior().save(path), "path"),
    (lambda path: pb.load(path, doors.net()), "path"),
    # words, and objects of a kind
    (models.MergeCodes, "how"),
    (doors.fit, "elbo"),
    (to_arviz, "groups"),
    (to_arviz, "sites"),
    (doors.sbc, "sites"),
    (doors.bella, "head_prior"),
    (doors.bella, "affine_prior"),
    (sample, "args"),
    (lambda **o: inference.multistep(1, ratio=0.5, **o), "milestones"),
    (lambda **o: models.Dense(doors.net(), doors.CATEGORICAL, 12, **o), "prefix"),
    (lambda **o: models.Dense(doors.net(), doors.CATEGORICAL, 12, **o), "output"),
]


@pytest.mark.parametrize("value", [3.7, Odd()], ids=["number", "object"])
@pytest.mark.parametrize(("call", "name"), CALLS, ids=[f"{name}-{i}" for i, (_, name) in enumerate(CALLS)])
def test_what_is_none_of_a_kind_is_refused_by_name(call: Callable[..., object], name: str, value: object) -> None:
    """Proves that the message has the argument, its value, and what was expected."""
    with pytest.raises(TypeError, match=f"(?s){name}={value!r}: expected"):
        call(**{name: value})


@pytest.mark.parametrize(
    ("call", "name"), [(models.MergeCodes, "how"), (doors.svgd, "sequential"), (doors.sghmc, "capture")]
)
def test_a_word_that_is_not_known_is_refused_with_those_that_are(call: Callable[..., object], name: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"{name}='nonsense': expected .*'"):
        call(**{name: "nonsense"})


@pytest.mark.parametrize(
    ("prior", "said"),
    [(priors.Normal, r"prior=Normal: expected an object .* as Normal\(\)"), (dist.Cauchy, "prior=Cauchy: expected")],
)
def test_a_class_is_no_prior(prior: Any, said: str) -> None:
    """Proves it of a prior alone and in a mapping; a class can be called, as a function of name and tensor can."""
    for given in (prior, {".*weight": prior, ".*": priors.Normal()}):
        with pytest.raises(TypeError, match=said):
            models.Dense(doors.net(), doors.CATEGORICAL, 12, prior=given)


def test_a_class_is_no_likelihood() -> None:
    with pytest.raises(TypeError, match=r"write Gaussian\(\)"):
        models.Dense(doors.net(), likelihoods.Gaussian, 12)  # type: ignore[arg-type]


def test_a_loader_without_samples_is_empty() -> None:
    """Proves that nobody is told to build the model with num_data=0."""
    with pytest.raises(ValueError, match="the loader is empty"):
        model = doors.dense()
        loader = DataLoader(Subset(TensorDataset(X, Y), []), 4)
        inference.fit(model, models.MeanFieldGuide(model), loader, epochs=1)


def test_a_schedule_that_makes_no_scheduler_is_refused() -> None:
    with pytest.raises(TypeError, match="schedule=.* returned None"):
        doors.fit(schedule=lambda optimizer, steps, epochs: None)


def test_sites_of_a_likelihood_are_not_asked_for_in_vain() -> None:
    """Proves that ``return_site=`` is refused where it would have no effect, and works for the function alone."""
    with pytest.raises(ValueError, match="return_site='obs' is for your own Pyro models"):
        doors.posterior().predict(X, return_site="obs")
    model = models.Dense(doors.net(), None)
    found = pb.Posterior(model, models.MeanFieldGuide(model)).predict(X, 3, return_site="0.weight").outputs
    assert found.shape[0] == 3 and torch.isfinite(found).all()
