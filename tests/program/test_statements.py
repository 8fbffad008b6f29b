"""Traces without Pyro's messages are Pyro's own: the same nodes, draws, losses and gradients."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn import likelihoods
from pyro_bnn.inference import MixtureELBO, ScaleLatents, fit
from pyro_bnn.inference.stein.members import OneByOne
from pyro_bnn.inference.svi import elbo as elbo_file
from pyro_bnn.models import CodebookGuide, Dense, MeanFieldGuide, Rank1, Rank1Guide, WeightSharing
from pyro_bnn.posterior import draw_source
from pyro_bnn.priors import Cauchy, HierarchicalCauchy, Horseshoe, Normal, SpikeAndSlab
from pyro_bnn.program import statements
from pyro_bnn.program.guide import MixtureGuide
from pyro_bnn.program.statements import NotTraceableError, plate, sample, traced

ROWS = 6


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, 3, generator=generator), torch.randint(2, (ROWS,), generator=generator)


def numbers() -> tuple[Tensor, Tensor]:
    x, _ = data()
    return x, x[:, :2].sin()


def rank1(prior: Any = HierarchicalCauchy(), **options: Any) -> tuple[Any, Any]:
    model = Rank1(network(), likelihoods.Categorical(temperature=0.7), 20, prior=prior, **options)
    return model, Rank1Guide(model, 3)


def dense(prior: Any = Normal(), likelihood: Any = None, **options: Any) -> tuple[Any, Any]:
    model = Dense(network(), likelihood or likelihoods.Categorical(), 20, prior=prior, **options)
    return model, MeanFieldGuide(model, 2)


def codebook() -> tuple[Any, Any]:
    model = WeightSharing(network(), likelihoods.Categorical(), 20)
    return model, CodebookGuide(model, 4)


PROGRAMS = {
    "rank-1": rank1,
    "rank-1, flat prior of W": lambda: rank1(weight_prior=None),
    "rank-1, Cauchy": lambda: rank1(Cauchy(1.0, 0.2)),
    "rank-1, members further left": lambda: rank1(members_dim=-4, prefix="own"),
    "dense": dense,
    "dense, horseshoe": lambda: dense(Horseshoe()),
    "dense, learned inclusion": lambda: dense(SpikeAndSlab(0.01, 0.5, inclusion=dist.Beta(1, 3))),
    "dense, learned noise": lambda: dense(HierarchicalCauchy(), likelihoods.Gaussian()),
    "codebook": codebook,
}


def batch(model: Any) -> tuple[Tensor, Tensor]:
    return numbers() if isinstance(model.likelihood, likelihoods.Gaussian) else data()


def both(model: Any, guide: Any, elbo: Any, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The loss by traces of statements and by those of Pyro, and whether the first were taken."""
    losses = []
    with monkeypatch.context() as patched:
        for shortcut in (True, False):
            if not shortcut:
                patched.setattr(elbo_file, "_traces_of_statements", lambda *_: None)
            torch.manual_seed(3)
            with pyro.validation_enabled(False), pyro.get_param_store().scope():
                losses.append(elbo.differentiable_loss(model, guide, *batch(model)))
    return losses


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("elbo", [MixtureELBO(), MixtureELBO("sum", "mixture", num_particles=2)], ids=["mean", "sum"])
@pytest.mark.parametrize("programs", PROGRAMS.values(), ids=PROGRAMS)
def test_loss_and_gradients_are_those_of_the_traces_of_pyro(
    programs: Any, elbo: Any, train: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal to the last digit or two: only the order of sums and of factors of a scale may differ."""
    model, guide = programs()
    model.train(train)
    guide.train(train)
    for annealed in (1.0, 0.3):
        with ScaleLatents(annealed):
            short, long = both(model, guide, elbo, monkeypatch)
        torch.testing.assert_close(short, long, rtol=1e-6, atol=0)
        parameters = [p for p in [*model.parameters(), *guide.parameters()] if p.requires_grad and p.numel()]
        for own, other in zip(
            *(torch.autograd.grad(v, parameters, allow_unused=True) for v in (short, long)), strict=True
        ):
            assert (own is None) == (other is None)
            if own is not None and other is not None:
                torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("programs", PROGRAMS.values(), ids=PROGRAMS)
def test_nodes_are_those_of_pyro(programs: Any) -> None:
    """Names in order, values, shapes, scales, plates, and what was observed."""
    model, guide = programs()
    x, y = batch(model)
    torch.manual_seed(0)
    own_guide = traced(guide, (x, y), {})
    own_model = traced(model, (x, y), {}, own_guide)
    torch.manual_seed(0)
    with pyro.get_param_store().scope():
        guide_trace = poutine.trace(guide).get_trace(x, y)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(x, y)
    for own, pyros in ((own_guide, guide_trace), (own_model, model_trace)):
        sites = {
            name: site
            for name, site in pyros.nodes.items()
            if site["type"] == "sample" and not poutine.util.site_is_subsample(site)
        }
        assert list(own.nodes) == list(sites)
        for name, site in sites.items():
            node: Any = own.nodes[name]
            torch.testing.assert_close(node["value"], site["value"], rtol=0, atol=0)
            assert node["fn"].batch_shape == site["fn"].batch_shape
            assert node["fn"].event_shape == site["fn"].event_shape
            assert node["scale"] == pytest.approx(site["scale"], rel=1e-12)
            assert node["is_observed"] == site["is_observed"]
            frames, pyro_frames = ({(f.name, f.dim, f.size) for f in s["cond_indep_stack"]} for s in (node, site))
            assert frames == pyro_frames


def test_a_handler_of_the_user_gets_every_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """A conditioned site, a block, one's own messenger and validation are Pyro's own traces."""
    model, guide = rank1()
    asked = []
    monkeypatch.setattr(elbo_file, "traced", lambda *a, **k: asked.append(a))
    heard: set[str] = set()

    class Listener(poutine.messenger.Messenger):
        def _pyro_sample(self, msg: Any) -> None:
            heard.add(msg["name"])

    with pyro.validation_enabled(False), pyro.get_param_store().scope():
        with Listener():
            MixtureELBO().differentiable_loss(model, guide, *data())
        assert {"0.weight.s", "0.weight_tau", "obs", "weight_prior"} <= heard
        with poutine.block():
            MixtureELBO().differentiable_loss(model, guide, *data())
    with pyro.validation_enabled(True), pyro.get_param_store().scope():
        MixtureELBO().differentiable_loss(model, guide, *data())
    assert not asked


class Shifted(Dense):
    """A model of a user, with a statement of Pyro in it."""

    def sample_latents(self) -> dict[str, Tensor]:
        values = super().sample_latents()
        values["shift"] = pyro.sample("shift", dist.Normal(torch.zeros(()), torch.ones(())))
        return values


class ShiftedGuide(MeanFieldGuide):
    def forward(self, x: Any, y: Any = None) -> dict[str, Tensor]:
        values = super().forward(x, y)
        values["shift"] = pyro.sample("shift", dist.Normal(torch.full((), 0.5), torch.full((), 0.1)))
        return values


def test_statements_of_pyro_in_a_subclass_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that a site which only Pyro sees is not left out: its divergence is in the loss, at every call."""
    model = Shifted(network(), likelihoods.Categorical(), 20)
    guide = ShiftedGuide(model)
    monkeypatch.setattr(statements, "_not_traceable", set())
    with pytest.raises(NotTraceableError, match="shift"):
        traced(guide, data(), {})
    plain = Dense(network(), likelihoods.Categorical(), 20)
    plain_guide = MeanFieldGuide(plain)
    more = torch.distributions.kl_divergence(dist.Normal(0.5, 0.1), dist.Normal(0.0, 1.0))
    with pyro.validation_enabled(False), pyro.get_param_store().scope():
        for _ in range(2):
            torch.manual_seed(0)
            base = MixtureELBO().differentiable_loss(plain, plain_guide, *data())
            MixtureELBO().differentiable_loss(model, guide, *data())  # the class is known from here on
            torch.manual_seed(0)
            found = MixtureELBO().differentiable_loss(model, guide, *data())
            torch.testing.assert_close(found, base + more, rtol=1e-5, atol=0)
    assert ShiftedGuide in statements._not_traceable


def test_draws_of_a_guide_with_statements_of_pyro_are_those_of_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same at every call, and those of Pyro's own trace: what was drawn in vain does not count."""
    monkeypatch.setattr(statements, "_not_traceable", set())
    model = Shifted(network(), likelihoods.Categorical(), 20)
    guide = ShiftedGuide(model)
    x, _ = data()
    posterior = pb.Posterior(model.eval(), guide.eval())
    found = [posterior.draws(3, seed=5)["0.weight"] for _ in range(2)]
    monkeypatch.setattr(draw_source, "_traced", lambda draw, _: poutine.trace(draw).get_trace())
    for draws in found:
        assert torch.equal(draws, posterior.draws(3, seed=5)["0.weight"])


class Late(Dense):
    """Makes a statement of Pyro after the network has run, and counts its runs."""

    runs = 0

    def function(self, *args: Any) -> Tensor:
        self.__dict__["runs"] = self.runs + 1
        return super().function(*args)

    def forward(self, x: Any, y: Any = None) -> Tensor:
        f = super().forward(x, y)
        pyro.sample("late", dist.Delta(torch.zeros(())), obs=torch.zeros(()))
        return f


def test_a_program_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that such a class does not run its network twice in every step, for particles and objectives: it would
    take twice the time, and move the statistics of normalisation twice."""
    monkeypatch.setattr(statements, "_not_traceable", set())
    model = Late(network(), likelihoods.Categorical(), 20)
    guide = MixtureGuide(model, 2, family="point")
    particles = OneByOne(model, guide)
    with pyro.validation_enabled(False), pyro.get_param_store().scope():
        particles.backward(data())  # the first of two members is tried
        assert model.runs == 3
        particles.backward(data())
        assert model.runs == 5
        MixtureELBO().differentiable_loss(model, guide, *data())
        assert model.runs == 6


def test_training_takes_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """All steps but the first, which validates; and the weights are those of training by Pyro's traces."""
    calls = []
    generator = torch.Generator().manual_seed(2)
    whole = torch.randn(20, 3, generator=generator), torch.randint(2, (20,), generator=generator)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[0])
        return traced(*args, **kwargs)

    found = []
    for short in (True, False):
        model, guide = rank1()
        with monkeypatch.context() as patched:
            patched.setattr(elbo_file, "traced", counted)
            if not short:
                patched.setattr(elbo_file, "_traces_of_statements", lambda *_: None)
            fit(model, guide, whole, epochs=4, batch_size=20, progress=False, seed=0)
        found.append([p.detach().clone() for p in guide.parameters()])
    assert len(calls) == 2 * 3
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


def test_a_batch_that_does_not_fit_its_plates_is_refused() -> None:
    def program() -> None:
        with plate("members", 1, -2, torch.device("cpu"), count=3):
            sample("a", dist.Normal(torch.zeros(2, 1), 1.0))

    with pytest.raises(ValueError, match=r"site 'a' has the batch shape \(2, 1\).*plates, of the shape \(3, 1\)"):
        traced(program, (), {})
    with pytest.raises(ValueError, match=r"plate\('members'\) at site a"):
        poutine.trace(program).get_trace()
