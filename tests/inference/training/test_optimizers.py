"""What `optim=`, `lr=` and `schedule=` mean, in every engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from by_hand import chain
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn.inference import SVGD, AutoParticles, fit, multistep
from pyro_bnn.inference.training.optimizers import build_optimizer
from pyro_bnn.likelihoods import Gaussian
from pyro_bnn.models import Dense, MeanFieldGuide
from pyro_bnn.program.guide import MixtureGuide

N = 12


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 2, generator=generator, dtype=torch.float64)
    return x, x[:, :1]


def dense() -> Dense:
    return Dense(chain(2, 3, 1), Gaussian(0.5), N)


# ------------------------------------------------------------------------------------------------- the optimiser


def fitted(optim: Any, lr: float | None) -> Any:
    """The optimiser of ``fit``."""
    model, seen = dense(), []
    guide = MeanFieldGuide(model)
    if optim == "given":
        optim = torch.optim.RMSprop(guide.parameters(), lr=0.02)
    fit(model, guide, data(), epochs=1, optim=optim, lr=lr, callbacks=[lambda s: seen.append(s)], progress=False)
    return seen[0].optimizer


def stein(optim: Any, lr: float | None) -> Any:
    """The optimiser of ``SVGD`` for a network."""
    model = dense()
    guide = MixtureGuide(model, 2, family="point")
    if optim == "given":
        optim = torch.optim.RMSprop(guide.parameters(), lr=0.02)
    engine = SVGD(model, guide, optim, lr=lr)
    engine.fit(data(), 1, progress=False)
    return engine.optimizer


def stein_of_any_model(optim: Any, lr: float | None) -> Any:
    model = dense()
    guide = AutoParticles(model, 2)
    if optim == "given":
        guide.setup(*data())
        optim = torch.optim.RMSprop([guide.theta], lr=0.02)
    engine = SVGD(model, guide, optim, lr=lr)
    engine.step(*data())
    return engine.optimizer


def ensemble(optim: Any, lr: float | None) -> Any:
    seen: list[Any] = []
    engine = pb.inference.DeepEnsemble(chain(2, 3, 1), Gaussian(0.5), N, num_networks=2)
    engine.fit(data(), epochs=1, optim=optim, lr=lr, callbacks=[lambda s: seen.append(s.optimizer)], progress=False)
    assert type(seen[0]) is type(seen[1]) and seen[0] is not seen[1]
    return seen[1]


FORMS: list[Any] = [
    ("adamw", None, "AdamW", 1e-3),
    ("adam", None, "Adam", 1e-3),
    ("adam", 0.03, "Adam", 0.03),
    ("sgd", None, "SGD", 0.1),
    ("sgd", 1e-3, "SGD", 1e-3),
    (torch.optim.Adagrad, 0.03, "Adagrad", 0.03),
    (torch.optim.Adagrad, None, "Adagrad", 0.01),
    (lambda groups: torch.optim.NAdam(groups, lr=0.004), None, "NAdam", 0.004),
    ("given", None, "RMSprop", 0.02),
]


#: the networks of an ensemble cannot share an optimiser
EACH = [(engine, *form) for engine in (fitted, stein, stein_of_any_model) for form in FORMS]
EACH += [(ensemble, *form) for form in FORMS if form[0] != "given"]


@pytest.mark.parametrize(("engine", "optim", "lr", "name", "rate"), EACH)
def test_optim_means_the_same_in_every_engine(engine: Any, optim: Any, lr: Any, name: str, rate: float) -> None:
    found = engine(optim, lr)
    assert type(found).__name__ == name
    assert {group["lr"] for group in found.param_groups} == {rate}
    if name == "SGD":
        assert all(group["momentum"] == 0.9 and group["nesterov"] for group in found.param_groups)


def test_the_default_is_adamw_for_the_elbo_and_adam_for_particles() -> None:
    assert type(fitted(None, None)).__name__ == "AdamW" and type(stein(None, 0.02)).__name__ == "Adam"
    assert fitted(None, 0.02).param_groups[0]["lr"] == stein(None, 0.02).param_groups[0]["lr"] == 0.02
    assert stein(None, None).param_groups[0]["lr"] == 1e-3


BAD: list[Any] = [
    ("lion", None, ValueError, "optim='lion': expected 'adamw', 'adam', 'sgd', a class of torch.optim, a function"),
    (3, None, TypeError, "optim=3: expected a name, a class"),
    (dict, None, TypeError, "optim=<class 'dict'>: expected a name, a class"),
    (lambda groups: groups, None, TypeError, "optim= must return a torch.optim.Optimizer, got list"),
    (lambda groups: torch.optim.SGD(groups, lr=0.1), 0.2, ValueError, "lr=0.2 is for the name or the class"),
    ("given", 0.2, ValueError, "lr=0.2 is for the name or the class of an optimiser, but optim= sets"),
]


@pytest.mark.parametrize("engine", [fitted, stein, stein_of_any_model])
@pytest.mark.parametrize(("optim", "lr", "error", "message"), BAD)
def test_an_optim_that_means_nothing_is_refused(engine: Any, optim: Any, lr: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        engine(optim, lr)


def test_an_optimiser_of_other_parameters_is_refused() -> None:
    own, other = nn.Linear(1, 1), nn.Linear(1, 1)
    elsewhere = torch.optim.SGD(other.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="has none of the parameters to train"):
        build_optimizer(elsewhere, [{"params": [*own.parameters()]}])
    with pytest.raises(ValueError, match="has none of the parameters to train"):
        fitted(elsewhere, None)
    part = torch.optim.SGD([own.bias], lr=0.1)
    assert build_optimizer(part, [{"params": [*own.parameters()]}]) is part


@pytest.mark.parametrize(
    "layout", [lambda p: p, lambda p: p.t(), lambda p: p[:1], lambda p: p[:, ::2], lambda p: p[::2]]
)
def test_a_fused_optimiser_updates_as_another_or_is_refused(layout: Callable[[Tensor], Tensor]) -> None:
    """Proves it for parameters in any order of memory; of those with gaps torch would update what lies between."""
    weight, found = torch.arange(12.0).reshape(3, 4), []
    for fused in (False, True):
        storage = torch.zeros(3, 4)
        parameter = nn.Parameter(layout(storage))
        groups = [{"params": [parameter]}]
        try:
            optimizer = build_optimizer(
                lambda groups, fused=fused: torch.optim.Adam(groups, lr=0.1, fused=fused), groups
            )
        except ValueError as error:
            assert fused and "with gaps between its numbers" in str(error)
            assert layout(weight).untyped_storage().nbytes() > 4 * layout(weight).numel()
            return
        (parameter * layout(weight)).sum().backward()
        optimizer.step()
        found.append(storage)
    assert torch.allclose(*found)


def test_a_weight_decay_that_nothing_would_use_is_refused() -> None:
    model = dense()
    guide = MeanFieldGuide(model)
    own = torch.optim.AdamW(guide.parameters())
    with pytest.raises(ValueError, match=r"weight_decay=0.1: optim= is an optimiser, which sets its own"):
        fit(model, guide, data(), epochs=1, optim=own, weight_decay=0.1, progress=False)


# ------------------------------------------------------------------------------------------------------ schedules


def rates(schedule: Callable[..., Any], steps: int, epochs: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
    scheduler = schedule(optimizer, steps, epochs)
    found = []
    for _ in range(steps * epochs):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_multistep_warms_up_and_drops_at_every_milestone() -> None:
    assert rates(multistep(2, (3, 4), 0.1), 2, 5) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])
    assert rates(multistep(0, (0.5,), 0.5), 4, 1) == pytest.approx([1, 1, 0.5, 0.5])
    assert rates(multistep(0, (), 0.5), 2, 1) == [1, 1]
