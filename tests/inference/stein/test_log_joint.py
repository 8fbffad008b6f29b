"""The log joint density of particles by statements is that of Pyro's traces: values, gradients, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyro_bnn.inference import SVGD
from pyro_bnn.inference.stein.members import MemberParticles, OneByOne, Together
from pyro_bnn.likelihoods import Categorical, Gaussian
from pyro_bnn.models import Bella, Dense, ParticleGuide, Rank1
from pyro_bnn.priors import Horseshoe, Laplace, Normal
from pyro_bnn.program.guide import MixtureGuide
from pyro_bnn.program.model import BayesianNetwork

ROWS = 6


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2)).double()


def batch(model: Any) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, 3, generator=generator, dtype=torch.float64)
    return x, (x[:, :2].sin() if isinstance(model.likelihood, Gaussian) else torch.arange(ROWS) % 2)


def bella(**options: Any) -> tuple[BayesianNetwork, MixtureGuide]:
    model = Bella(net(), Categorical(temperature=0.6), 20, rank=2, **options)
    return model, ParticleGuide(model, 3, init_scale=0.2)


def points(model: BayesianNetwork) -> tuple[BayesianNetwork, MixtureGuide]:
    guide = MixtureGuide(model, 3, family="point")
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model, guide


TWO_PRIORS = {"0.*": Normal(0.5, 2.0), ".*": Normal()}
PROGRAMS = {
    "bella": bella,
    "bella, head and affine": lambda: bella(head="3", affine=True),
    "bella, members further left": lambda: bella(members_dim=-3, prefix="own"),
    "dense, Laplace": lambda: points(Dense(net(), Categorical(), 20, prior=Laplace(0.0, 0.5))),
    "dense, horseshoe": lambda: points(Dense(net(), Gaussian(), 20, prior=Horseshoe())),
    "rank-1": lambda: points(Rank1(net(), Categorical(), 20)),
    "dense, two priors": lambda: points(
        Dense(net(), Categorical(), 20, prior={"0.*": Normal(0.5, 2.0), ".*": Normal()})
    ),
}


@pytest.mark.parametrize("kind", [Together, OneByOne])
@pytest.mark.parametrize("programs", PROGRAMS.values(), ids=PROGRAMS)
def test_energies_and_gradients_are_those_of_pyro(programs: Any, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for way in ("statements", "Pyro"):
        model, guide = programs()
        if way == "Pyro":
            monkeypatch.setattr(MemberParticles, "_log_joint", lambda *_: None)
        particles = kind(model, guide)
        energies = particles.backward(batch(model), 0.7, force=lambda f: f.cos())
        assert energies.shape == (3,)
        found.append([energies, *(p.grad for p in (*particles.blocks, *particles.shared) if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 1
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-11)


def test_a_site_without_particles_is_refused() -> None:
    """Proves that the way by statements says so too."""
    _, guide = bella()
    more = Bella(net(), Categorical(), 20, rank=2, head="3")
    with pytest.raises(ValueError, match="no particles of the latent site"):
        Together(more, guide).backward(batch(more))


def test_training_is_that_of_pyro(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten steps of SVGD on products end at the same particles."""
    found = []
    for way in ("statements", "Pyro"):
        model, guide = bella()
        if way == "Pyro":
            monkeypatch.setattr(MemberParticles, "_log_joint", lambda *_: None)
        x, y = batch(model)
        engine = SVGD(model, guide)
        for _ in range(10):
            engine.step(x, y)
        found.append([block.parameter.detach().clone() for block in guide.blocks()])
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    ("inputs", "outputs", "rows", "in_turn"),
    [(64, 4096, 300, True), (64, 4096, 4, False), (2048, 4096, 300, False), (64, 4096, 3000, True)],
    ids=["large activations", "few rows", "larger weights", "more than the allocator keeps"],
)
def test_which_way_auto_takes_on_a_processor(inputs: int, outputs: int, rows: int, in_turn: bool) -> None:
    """One particle after the other where activations exceed a cache and the weights, or what the allocator keeps."""
    model = Bella(nn.Sequential(nn.Linear(inputs, outputs), nn.Linear(outputs, 2)), Categorical(), rows, rank=2)
    args = (torch.randn(rows, inputs), torch.arange(rows) % 2)
    for sequential, expected in (("auto", in_turn), (not in_turn, not in_turn)):
        engine = SVGD(model, ParticleGuide(model, 2), sequential=sequential)
        engine.setup(*args)
        assert isinstance(engine._parts_there.particles, OneByOne) is expected
