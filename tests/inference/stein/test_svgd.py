"""SVGD against closed forms, brute force and independent runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive
from scipy import integrate, stats
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn.inference.potential import Potential
from pyro_bnn.inference.schedules import cosine
from pyro_bnn.inference.stein.annealing import cyclical_annealing
from pyro_bnn.inference.stein.autoparticles import AutoParticles
from pyro_bnn.inference.stein.kernels import IMQ, RBF, Kernel, KernelSum, LinearKernel, ScaledMedian
from pyro_bnn.inference.stein.svgd import SVGD
from pyro_bnn.models import Dense, Rank1
from pyro_bnn.program.guide import MixtureGuide

DOUBLE = torch.float64
Method = Literal["svgd", "wgd", "ensemble"]


def converge(engine: SVGD, *args: Any, schedule: tuple[tuple[float, int], ...] = ((0.1, 300), (0.01, 200))) -> None:
    engine.setup(*args)
    for lr, steps in schedule:
        engine.optimizer.param_groups[0]["lr"] = lr
        for _ in range(steps):
            engine.step(*args)


def gaussian(scales: Tensor) -> Any:
    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros_like(scales), scales).to_event(1))

    return model


# ------------------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize(("n", "bound"), [(50, 0.15), (200, 0.07)])
def test_variances_of_a_gaussian(n: int, bound: float) -> None:
    """Proves at the fixed point of the published rule that variances come out within 15 % of the target at n = 50 and
    7 % at n = 200: what is missing shrinks with n."""
    scales = torch.tensor([1.0, 2.0], dtype=DOUBLE)
    torch.manual_seed(0)
    guide = AutoParticles(gaussian(scales), n)
    converge(SVGD(gaussian(scales), guide))
    z = guide.particles()["z"]
    assert float(z.mean(0).abs().max()) < 0.02
    ratio = z.var(0, correction=0) / scales.square()
    assert float((ratio - 1).abs().max()) < bound


@pytest.mark.slow
def test_a_wide_kernel_keeps_the_variance_of_fifteen_dimensions() -> None:
    """Proves that 200 particles recover .36 of the variance of a Gaussian with the median rule, and .9 of it with five
    times its bandwidth."""
    scales = torch.ones(15, dtype=DOUBLE)
    found = []
    for factor in (1.0, 5.0):
        torch.manual_seed(0)
        guide = AutoParticles(gaussian(scales), 200)
        converge(SVGD(gaussian(scales), guide, kernel=RBF(ScaledMedian(factor))))
        found.append(float(guide.particles()["z"].var(0, correction=0).mean()))
    assert 0.3 < found[0] < 0.42 and found[1] > 0.9


@pytest.mark.parametrize("h", [pytest.param(0.5, marks=pytest.mark.slow), 1.0])
def test_the_fixed_point_of_wgd(h: float) -> None:
    """Proves that "wgd" makes its density estimate meet the target, variance + h / 2 = 1, within 5 % at n = 200; the
    particles themselves are too narrow by design."""
    scales = torch.ones(2, dtype=DOUBLE)
    torch.manual_seed(0)
    guide = AutoParticles(gaussian(scales), 200)
    converge(SVGD(gaussian(scales), guide, kernel=RBF(h), method="wgd"))
    found = guide.particles()["z"].var(0, correction=0)
    assert float((found + h / 2 - 1).abs().max()) < 0.05
    assert float(found.max()) < 1 - 0.4 * h


COVARIANCE = torch.tensor([[1.0, 1.2], [1.2, 2.25]], dtype=DOUBLE)
MEAN = torch.tensor([1.0, -2.0], dtype=DOUBLE)


def correlated() -> None:
    pyro.sample("z", dist.MultivariateNormal(MEAN, COVARIANCE))


@pytest.mark.parametrize(
    "space",
    [
        RBF(),
        pytest.param(IMQ(), marks=pytest.mark.slow),
        pytest.param(KernelSum([RBF(ScaledMedian(0.5)), LinearKernel()]), marks=pytest.mark.slow),
    ],
)
def test_moments_of_a_correlated_gaussian(space: Kernel) -> None:
    """Proves means and covariances within 7 % at n = 200 for every family of kernels, from one small cloud."""
    torch.manual_seed(0)
    guide = AutoParticles(correlated, 200, init="small")
    converge(SVGD(correlated, guide, kernel=space), schedule=((0.1, 300), (0.03, 200), (0.01, 200)))
    z = guide.particles()["z"]
    assert float((z.mean(0) - MEAN).abs().max()) < 0.03
    assert float((z.T.cov(correction=0) / COVARIANCE - 1).abs().max()) < 0.07


def test_the_linear_kernel_is_exact_for_a_gaussian() -> None:
    """Proves that five particles under the linear kernel have mean and covariance of the target (Liu & Wang 2018)."""
    torch.manual_seed(0)
    guide = AutoParticles(correlated, 5, init="small")
    converge(SVGD(correlated, guide, kernel=LinearKernel()), schedule=((0.1, 500), (0.01, 300), (0.001, 300)))
    z = guide.particles()["z"]
    torch.testing.assert_close(z.mean(0), MEAN, rtol=1e-4, atol=0)
    torch.testing.assert_close(z.T.cov(correction=0), COVARIANCE, rtol=1e-4, atol=0)


def banana() -> None:
    a = pyro.sample("a", dist.Normal(torch.zeros((), dtype=DOUBLE), 1.0))
    pyro.sample("b", dist.Normal(0.5 * a.square(), 0.5))


def moment(function: Any) -> float:
    """An expectation under the banana, by quadrature."""

    def integrand(b: float, a: float) -> float:
        return float(function(a, b)) * math.exp(-a * a / 2 - 2 * (b - a * a / 2) ** 2) / math.pi

    return float(integrate.dblquad(integrand, -6, 6, lambda a: a * a / 2 - 3, lambda a: a * a / 2 + 3)[0])


def moments_of_banana(kernel: Kernel, n: int) -> Tensor:
    """Means of b and a^2 and the variance of b that n particles find, as parts of the exact ones."""
    torch.manual_seed(0)
    guide = AutoParticles(banana, n)
    converge(SVGD(banana, guide, kernel=kernel), schedule=((0.1, 300), (0.03, 200), (0.01, 200)))
    a, b = guide.particles().values()
    assert abs(float(a.mean())) < 0.01
    mean = moment(lambda a, b: b)
    exact = [mean, moment(lambda a, b: a * a), moment(lambda a, b: (b - mean) ** 2)]
    return torch.stack([b.mean(), a.square().mean(), b.var(correction=0)]) / torch.tensor(exact, dtype=DOUBLE)


@pytest.mark.slow
def test_moments_of_a_banana() -> None:
    """Proves moments of a curved target, over two sites, within 7 % of quadrature at n = 200: all of them with the
    heavy-tailed kernel, and the first two with RBF. Its variance of b, a fourth moment of a, is 16 % short at n = 200;
    what is missing shrinks with n, so that it belongs to n particles and not to the steps taken."""
    assert float((moments_of_banana(IMQ(), 200) - 1).abs().max()) < 0.07
    few, many = moments_of_banana(RBF(), 50), moments_of_banana(RBF(), 200)
    assert float((many[:2] - 1).abs().max()) < 0.07
    assert 0.8 < float(many[2]) < 1
    assert bool(((1 - many) < 0.6 * (1 - few)).all())


@pytest.mark.parametrize("start", ["prior", pytest.param("one place", marks=pytest.mark.slow), "one place, annealed"])
def test_both_modes_are_covered(start: str) -> None:
    """Proves that 200 particles find two modes with their own means and widths, wherever they start; and their weights
    from a broad start or with annealing. The score does not tell the weights of modes apart: without either, more
    particles stay in the mode that they started next to."""
    modes = dist.Normal(torch.tensor([-2.0, 2.0], dtype=DOUBLE), 0.7)
    mixture = dist.MixtureSameFamily(dist.Categorical(torch.ones(2, dtype=DOUBLE)), modes)
    base = dist.Normal(torch.tensor(0.0, dtype=DOUBLE), 3.0)

    def model() -> None:
        z = pyro.sample("z", base)
        pyro.factor("modes", mixture.log_prob(z) - base.log_prob(z))

    torch.manual_seed(0)
    near = {"z": 0.5 + 0.5 * torch.randn(200, dtype=DOUBLE)}
    guide = AutoParticles(model, 200, init="prior" if start == "prior" else near)
    annealing = cyclical_annealing(600, 3, 2.0) if "annealed" in start else None
    converge(SVGD(model, guide, annealing=annealing), schedule=((0.1, 600), (0.01, 200)))
    z = guide.particles()["z"]
    share = float((z > 0).double().mean())
    assert share == pytest.approx(0.5, abs=0.07) if start != "one place" else 0.25 < share < 0.75
    for mode in (z[z > 0], -z[z < 0]):
        assert float(mode.mean()) == pytest.approx(2.0, rel=0.02)
        assert float(mode.std()) == pytest.approx(0.7, rel=0.05)


def in_sites(count: int, scales: Tensor) -> Any:
    def model() -> None:
        for i, part in enumerate(scales.chunk(count)):
            pyro.sample(f"layer{i}.z", dist.Normal(torch.zeros_like(part), part).to_event(1))

    return model


@pytest.mark.parametrize("method", ["svgd", "wgd"])
def test_how_a_target_is_written_changes_nothing(method: Method) -> None:
    """Proves that one Gaussian of 20 numbers as one site, two and twenty gives the same particles."""
    scales = torch.linspace(0.5, 2.0, 20, dtype=DOUBLE)
    torch.manual_seed(0)
    start = torch.randn(7, 20, dtype=DOUBLE)
    found = []
    for count in (1, 2, 20):
        model = in_sites(count, scales)
        init = {f"layer{i}.z": part for i, part in enumerate(start.chunk(count, 1))}
        guide = AutoParticles(model, 7, init=init)
        converge(SVGD(model, guide, method=method), schedule=((0.1, 100),))
        found.append(torch.cat(list(guide.particles().values()), 1))
    assert float((found[0] - start).abs().max()) > 0.1
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-6)


def test_one_particle_is_the_mode() -> None:
    """Proves that a single particle finds the mode of the unconstrained density, whatever the method."""

    def model() -> None:
        pyro.sample("z", dist.Gamma(torch.tensor(3.0, dtype=DOUBLE), 2.0))

    for method in ("svgd", "wgd", "ensemble"):
        guide = AutoParticles(model, 1)
        converge(SVGD(model, guide, method=method))  # type: ignore[arg-type]
        assert float(guide.particles()["z"]) == pytest.approx(1.5, rel=1e-4)  # of log z: 3 / 2, not 2 / 2


def test_constrained_sites_have_their_jacobians() -> None:
    """Proves a conjugate Poisson rate and LogNormal, whose means and standard deviations come out within 5 %: an
    error in the Jacobian would move them by 7 %."""
    counts = torch.tensor([0.0, 2.0, 1.0, 1.0, 0.0, 2.0, 1.0], dtype=DOUBLE)

    def model(y: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(torch.tensor(7.0, dtype=DOUBLE), 7.0))
        pyro.sample("size", dist.LogNormal(torch.tensor(0.3, dtype=DOUBLE), 0.4))
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Poisson(rate), obs=y)

    torch.manual_seed(0)
    guide = AutoParticles(model, 200)
    converge(SVGD(model, guide), counts)
    found = guide.particles()
    for name, exact in (("rate", stats.gamma(14, scale=1 / 14)), ("size", stats.lognorm(0.4, scale=math.exp(0.3)))):
        assert float(found[name].mean()) == pytest.approx(exact.mean(), rel=0.02)
        assert float(found[name].std(correction=0)) == pytest.approx(exact.std(), rel=0.05)


class Regression:
    """y = x b + noise with b ~ N(0, I): the posterior is Normal, with precision I + x'x / s^2."""

    def __init__(self, size: int = 200) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(size, 2, generator=generator, dtype=DOUBLE)
        noise = torch.randn(size, generator=generator, dtype=DOUBLE)
        self.y = self.x @ torch.tensor([1.0, -0.5], dtype=DOUBLE) + 0.8 * noise
        self.covariance = (torch.eye(2, dtype=DOUBLE) + self.x.T @ self.x / 0.64).inverse()
        self.mean = self.covariance @ self.x.T @ self.y / 0.64

    def __call__(self, x: Tensor, y: Tensor) -> None:
        b = pyro.sample("b", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
        with pyro.plate("data", len(self.y), subsample_size=len(x), subsample=torch.arange(len(x))):
            pyro.sample("obs", dist.Normal(x @ b, 0.8), obs=y)

    def subsampling(self) -> None:
        """The same with a subsample that the plate draws for itself."""
        b = pyro.sample("b", dist.Normal(torch.zeros(2, dtype=self.x.dtype), 1.0).to_event(1))
        with pyro.plate("data", len(self.y), subsample_size=50) as index:
            pyro.sample("obs", dist.Normal(self.x[index] @ b, 0.8), obs=self.y[index])


@pytest.mark.parametrize("own", [False, True], ids=["batches", "plate"])
def test_minibatches_have_the_scale_of_the_data(own: bool) -> None:
    """Proves N/B: from minibatches of a quarter of the data, the mean of the posterior, and its variances within 15 %
    at n = 50; unscaled batches would give four times as much."""
    problem = Regression()
    torch.manual_seed(0)
    model = problem.subsampling if own else problem
    guide = AutoParticles(model, 50)
    engine = SVGD(model, guide, num_data=200)
    schedule = ((0.03, 300), (0.003, 400), (0.0005, 400))
    if own:
        converge(engine, schedule=schedule)
    else:
        engine.setup(problem.x[:50], problem.y[:50])
        for lr, steps in schedule:
            engine.optimizer.param_groups[0]["lr"] = lr
            posterior = engine.fit((problem.x, problem.y), steps // 4, batch_size=50, progress=False, seed=0)
        assert posterior.num_stored == 50
        assert torch.equal(posterior.draws(50)["b"][:, 0], guide.particles()["b"])
        assert len(posterior.losses) == 400
    b = guide.particles()["b"]
    assert ((b.mean(0) - problem.mean).abs() < 0.2 * problem.covariance.diagonal().sqrt()).all()
    assert float((b.var(0, correction=0) / problem.covariance.diagonal() - 1).abs().max()) < 0.15


# --------------------------------------------------------------------------------------- networks and brute force


def network(prior: Any = None) -> tuple[Dense, Tensor, Tensor]:
    torch.manual_seed(3)
    x = torch.randn(12, 4, dtype=DOUBLE)
    y = torch.sin(x[:, :1]) + 0.1 * torch.randn(12, 1, dtype=DOUBLE)
    net = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    likelihood = pb.likelihoods.Gaussian()
    return Dense(net, likelihood, 12, prior=prior or pb.priors.HierarchicalCauchy(1.0)), x, y


class Paired(MixtureGuide):
    """Particles of :func:`network`, the first two weights of which are a low-rank product."""

    def pairs(self) -> list[tuple[str, str, float]]:
        return [("0.weight", "1.weight", 0.7)]


def spread(model: Any, n: int, kind: type[MixtureGuide] = MixtureGuide) -> MixtureGuide:
    """Particles at random places."""
    guide = kind(model, n, family="point")
    torch.manual_seed(5)
    with torch.no_grad():
        for p in guide.parameters():
            p += 0.3 * torch.randn_like(p)
    return guide


def coordinates(guide: MixtureGuide) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in guide.coordinates().items()}


def flat(values: dict[str, Tensor], i: int) -> Tensor:
    return torch.cat([v[i].flatten() for v in values.values()])


def energies(model: Any, values: dict[str, Tensor], *args: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """U of each particle and its gradients from the potential of the model, particle by particle."""
    potential = Potential(model, *args)
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    n = len(next(iter(values.values())))
    found = [
        potential({name: v[i].reshape(potential.shapes[name]) for name, v in leaves.items()}, *args) for i in range(n)
    ]
    torch.stack(found).sum().backward()
    return torch.stack(found).detach(), {name: v.grad for name, v in leaves.items() if v.grad is not None}


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("kind", [Dense, Rank1])
def test_energies_are_those_of_each_particle_alone(kind: Any, sequential: bool) -> None:
    """Proves that a members plate, weighed by 1/n in Pyro, gives each particle its whole energy and gradient, with the
    Jacobians of scales (tau, noise) and shares, on a minibatch with N/B, against :class:`Potential`."""
    _, x, y = network()
    net = nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    prior = pb.priors.SpikeAndSlab(0.1, 0.3) if kind is Dense else pb.priors.HierarchicalCauchy(1.0)
    model = kind(net, pb.likelihoods.Gaussian(), 24, prior=prior)
    guide = spread(model, 3)
    before = coordinates(guide)
    truth, gradients = energies(model, before, x, y)  # before the step moves weights that all particles share
    engine = SVGD(model, guide, torch.optim.SGD, lr=1.0, method="ensemble", sequential=sequential)
    mean = engine.step(x, y)
    assert mean == pytest.approx(float(truth.mean()) / 24, rel=1e-12)
    after = coordinates(guide)
    for name, gradient in gradients.items():
        torch.testing.assert_close(before[name] - after[name], gradient / 24, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("sequential", [False, True])
def test_a_network_inside_of_a_larger_model(sequential: bool) -> None:
    """Proves the energies of particles of a network whose observation the user wrote, with a prefix and N/B."""
    _, x, y = network()
    net = nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    inner = Dense(net, None, prior=pb.priors.HierarchicalCauchy(1.0), prefix="f")

    def model(x: Tensor, y: Tensor) -> None:
        f = inner(x)
        with inner.members_plate(), pyro.plate("data", 24, subsample=torch.arange(len(x)), dim=-1):
            pyro.sample("obs", dist.StudentT(4.0, f.squeeze(-1), 0.5), obs=y[:, 0])

    guide = spread(inner, 3)
    truth, _ = energies(model, coordinates(guide), x, y)
    found = SVGD(model, guide, num_data=24, sequential=sequential).step(x, y)
    assert found == pytest.approx(float(truth.mean()) / 24, rel=1e-12)


@pytest.mark.parametrize("scope", ["joint", "layer", "tensor"])
@pytest.mark.parametrize("space", ["factor", "product"])
@pytest.mark.parametrize("method", ["svgd", "wgd"])
def test_a_step_is_the_published_formula(method: Method, space: Any, scope: Any) -> None:
    """Proves one step of SGD against two loops over particles and autograd through explicit vectors, in every space
    and scope, with a repulsion and an annealing factor that differ from 1."""
    model, x, y = network()
    n, gamma, strength = 4, 0.6, 1.7
    guide = spread(model, n, Paired)
    before = coordinates(guide)
    kernel = RBF(2.3)
    engine = SVGD(
        model,
        guide,
        lambda p: torch.optim.SGD(p, lr=1.0),
        kernel=kernel,
        space=space,
        scope=scope,
        method=method,
        repulsion=lambda step: strength,
        annealing=lambda step: gamma,
    )
    engine.step(x, y)
    _, gradients = energies(model, before, x, y)
    pair = {"0.weight", "1.weight"}

    def group(name: str) -> str:
        if scope == "joint":
            return ""
        if space == "product" and name in pair:
            name = "0.weight"
        return name if scope == "tensor" else name.rpartition(".")[0] or name

    groups: dict[str, list[str]] = {}
    for name in before:
        groups.setdefault(group(name), []).append(name)
    assert engine.num_kernels == len(groups) and (len(groups) == 1) == (scope == "joint")
    after = coordinates(guide)
    for names in groups.values():

        def embed(values: list[Tensor], names: list[str] = names) -> Tensor:
            own = dict(zip(names, values, strict=True))
            alone = [v.flatten() for name, v in own.items() if space == "factor" or name not in pair]
            product = [] if len(alone) == len(own) else [0.7 * (own["1.weight"] @ own["0.weight"]).flatten()]
            return torch.cat(alone + product)

        def k(i: int, j: int, names: list[str] = names) -> tuple[Tensor, tuple[Tensor, ...]]:
            """k(theta_i, theta_j) and its gradient in the first."""
            leaves = [before[name][i].clone().requires_grad_() for name in names]
            value = (-(embed(leaves) - embed([before[name][j] for name in names])).square().sum() / 2.3).exp()
            return value.detach(), torch.autograd.grad(value, leaves)

        for i in range(n):
            for number, name in enumerate(names):
                g = gradients[name]
                if method == "svgd":
                    terms = [-gamma * k(i, j)[0] * g[j] + strength * k(j, i)[1][number] for j in range(n)]
                    phi = torch.stack(terms).mean(0)
                else:
                    total = torch.stack([k(i, j)[0] for j in range(n)]).sum()
                    force = torch.stack([k(i, j)[1][number] for j in range(n)]).sum(0)
                    phi = -gamma * g[i] - strength * force / total
                torch.testing.assert_close(after[name][i] - before[name][i], phi / 12, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("sequential", [False, True])
def test_repulsion_in_function_space(sequential: bool) -> None:
    """Proves the pulled-back repulsion between outputs on the batch against autograd through the network."""
    model, x, y = network()
    guide = spread(model, 3)
    before = coordinates(guide)
    options: dict[str, Any] = {"method": "wgd", "space": "function", "repulsion": 2.0, "sequential": sequential}
    SVGD(model, guide, torch.optim.SGD, lr=1.0, kernel=RBF(5.0), **options).step(x, y)
    _, gradients = energies(model, before, x, y)
    names = [name for name in before if name[-6:] in ("weight", "0.bias", "1.bias", "3.bias")]
    leaves = {name: before[name].clone().requires_grad_() for name in names}
    net = model.core()
    f = torch.stack([net(x, {name: v[i] for name, v in leaves.items()}).flatten() for i in range(3)])
    k = (-(f[:, None] - f.detach()).square().sum(-1) / 5.0).exp()
    force = torch.autograd.grad(k.sum(1).log().sum(), list(leaves.values()))
    after = coordinates(guide)
    for name, pushed in zip(names, force, strict=True):
        phi = -gradients[name] - 2.0 * pushed
        torch.testing.assert_close(after[name] - before[name], phi / 12, rtol=1e-8, atol=1e-10)
    with model.recording_outputs() as outputs:
        model(x, y)
    assert len(outputs) == 1, "the engine has left the model as it was"


@pytest.mark.parametrize("sequential", [False, True])
def test_the_ensemble_is_independent_runs(sequential: bool) -> None:
    """Proves that the control is n runs of one particle each from the same starts, with the same batches: exactly, in
    every bit, when particles run one by one, and but for rounding when they run together."""
    model, x, y = network()
    together = spread(model, 3)
    starts = [p.detach().clone() for p in together.parameters()]
    options: dict[str, Any] = {"epochs": 3, "batch_size": 5, "progress": False, "seed": 1}
    SVGD(model, together, lr=0.05, method="ensemble", sequential=sequential).fit((x, y), **options)
    for i in range(3):
        alone = MixtureGuide(model, 1, family="point")
        with torch.no_grad():
            for p, start in zip(alone.parameters(), starts, strict=True):
                p.copy_(start[i : i + 1])
        SVGD(model, alone, lr=0.05, method="ensemble", sequential=sequential).fit((x, y), **options)
        for ours, single, start in zip(together.parameters(), alone.parameters(), starts, strict=True):
            assert not torch.equal(single, start[i : i + 1])
            tolerance = 0.0 if sequential else 1e-10
            torch.testing.assert_close(ours[i : i + 1], single, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("method", ["svgd", "wgd", "ensemble"])
def test_one_by_one_is_the_same_as_together(method: Method) -> None:
    """Proves ``sequential=True`` for networks and other models, also where a plate draws its subsample."""
    results = []
    for sequential in (False, True):
        model, x, y = network()
        guide = spread(model, 3)
        engine = SVGD(model, guide, lr=0.01, method=method, sequential=sequential)
        engine.fit((x, y), 4, batch_size=5, progress=False, seed=0)
        problem = Regression()
        torch.manual_seed(1)
        particles = AutoParticles(problem.subsampling, 4)
        converge(SVGD(problem.subsampling, particles, method=method, sequential=sequential), schedule=((0.01, 20),))
        results.append([*guide.parameters(), particles.theta])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


def test_shared_weights_follow_the_mean_energy() -> None:
    """Proves that weights which all particles share, the W of a rank-1 network, take the gradient of the mean of U, and
    that repulsion in function space does not touch them."""
    _, x, y = network()
    net = nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    moves = []
    for options in ({"method": "ensemble"}, {"method": "wgd", "space": "function"}, {"sequential": True}):
        model = Rank1(net, pb.likelihoods.Gaussian(0.5), 12)
        guide = spread(model, 3)
        before = [p.detach().clone() for p in model.parameters()]
        values = coordinates(guide)
        SVGD(model, guide, torch.optim.SGD, lr=1.0, **options).step(x, y)  # type: ignore[arg-type]
        moves.append([p.detach() - b for p, b in zip(model.parameters(), before, strict=True)])
    reference = Rank1(net, pb.likelihoods.Gaussian(0.5), 12)
    potential = Potential(reference, x, y)
    for i in range(3):
        own = {name: v[i].reshape(potential.shapes[name]) for name, v in values.items()}
        (potential(own, x, y) / 36).backward()
    assert any(p.grad is not None for p in reference.parameters())
    for move in moves:
        for ours, p in zip(move, reference.parameters(), strict=True):
            torch.testing.assert_close(ours, torch.zeros_like(p) if p.grad is None else -p.grad)


# ------------------------------------------------------------------------------------------------- the contract


def test_a_network_gives_a_posterior_with_a_member_for_each_particle(tmp_path: Path) -> None:
    """Proves that predictions are those of the particles, and that a run that is stopped and resumed is the same."""
    found = []
    for stops in ((6,), (2, 6)):
        for epochs in stops:
            model, x, y = network()
            guide = spread(model, 4)
            posterior = SVGD(model, guide, lr=0.01).fit(
                (x, y), epochs, batch_size=5, progress=False, seed=0, checkpoint=tmp_path / f"{len(stops)}.pt"
            )
        assert posterior.num_members == 4 and len(posterior.losses) == 18
        found.append(posterior.predict(x, 1).outputs)
    assert found[0].shape == (1, 4, 12, 1)
    assert torch.equal(found[0], found[1])
    assert float(found[0].std(1).min()) > 0


def test_a_schedule_moves_the_learning_rate_and_is_resumed_with_the_run(tmp_path: Path) -> None:
    """Proves that rates are those of the cosine, that a stopped run goes on along it, and that it ends with the run."""
    found, rates = [], []

    def note(state: Any) -> None:
        rates.append(state.optimizer.param_groups[0]["lr"])

    for stops in ((6,), (2, 6)):
        rates.clear()
        for stop in stops:
            model, x, y = network()
            guide = spread(model, 4)
            engine = SVGD(model, guide, lr=0.01)
            ending = [note, lambda state, stop=stop: state.epoch == stop]
            engine.fit(
                (x, y),
                6,
                batch_size=5,
                schedule=cosine(),
                callbacks=ending,
                progress=False,
                seed=0,
                checkpoint=tmp_path / f"{len(stops)}.pt",
            )
        assert rates == pytest.approx([0.005 * (1 + math.cos(math.pi * epoch / 6)) for epoch in range(1, 7)])
        assert engine.optimizer.param_groups[0]["lr"] == 0.01
        found.append(torch.cat([v.flatten() for v in guide.coordinates().values()]))
    assert torch.equal(found[0], found[1])


def test_callbacks_end_the_training_and_the_seed_is_private() -> None:
    model, x, y = network()
    torch.manual_seed(9)
    expected = torch.rand(1)
    torch.manual_seed(9)
    seen = []

    def callback(state: Any) -> bool:
        seen.append((state.epoch, state.step, state.loss))
        return state.epoch == 2

    SVGD(model, spread(model, 2)).fit((x, y), 5, batch_size=6, callbacks=[callback], progress=False, seed=0)
    torch.manual_seed(9)
    SVGD(model, MixtureGuide(model, 2, family="point")).fit((x, y), 1, progress=False, seed=0)
    assert torch.equal(torch.rand(1), expected)
    assert [s[:2] for s in seen] == [(1, 2), (2, 4)] and all(math.isfinite(s[2]) for s in seen)


def test_the_users_parameter_store_stays() -> None:
    """Proves that entries of the user's stay, and none of ours is added."""
    pyro.param("mine", torch.ones(2))
    try:
        model, x, y = network()
        SVGD(model, spread(model, 2)).fit((x, y), 1, progress=False)
        problem = Regression()
        SVGD(problem, AutoParticles(problem, 2)).fit((problem.x, problem.y), 1, progress=False)
        assert list(pyro.get_param_store().keys()) == ["mine"]
    finally:
        pyro.clear_param_store()


def test_particles_as_a_guide() -> None:
    """Proves that a call gives one particle, whole, in the plates of the model, for Pyro's own tools."""

    def model() -> None:
        scale = pyro.sample("scale", dist.Gamma(3.0, 2.0))
        with pyro.plate("groups", 3):
            pyro.sample("z", dist.Normal(0.0, scale))

    torch.manual_seed(0)
    guide = AutoParticles(model, 4)
    with pytest.raises(RuntimeError, match="do not exist before the first call"):
        guide.particles()
    draws = Predictive(model, guide=guide, num_samples=40)()
    particles = guide.particles()
    assert particles["z"].shape == (4, 3)
    match = (draws["z"][:, None] == particles["z"]).all(-1)
    assert bool(match.any(1).all()) and len(match.nonzero()[:, 1].unique()) == 4
    index = match.double().argmax(1)
    assert torch.equal(draws["scale"].flatten(), particles["scale"][index])
    pyro.clear_param_store()


def test_networks_start_at_draws_of_their_priors() -> None:
    """Proves that particles of a network differ at the start in every site, and that "small" ones are near 0."""
    model, x, y = network()
    guide = AutoParticles(model, 3)
    engine = SVGD(model, guide)
    assert math.isfinite(engine.step(x, y))
    assert all(float(v.std(0).min()) > 0 for v in guide.particles().values())
    small = AutoParticles(model, 200, init="small")
    small.setup(x, y)
    assert float(small.theta.detach().std()) == pytest.approx(0.1, rel=0.02)
    posterior = engine.fit((x, y), 1, progress=False)
    assert posterior.num_stored == 3 and posterior.predict(x, 3).outputs.shape == (3, 1, 12, 1)


def test_a_model_that_cannot_be_vectorised_runs_one_by_one() -> None:
    """Proves the fall-back, with one warning, and the same result as ``sequential=True``."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=DOUBLE), 1.0).to_event(1))
        if float(z[0].detach()) > 0:  # control flow
            pyro.factor("more", -z.square().sum())

    results = []
    for sequential in (False, True):
        torch.manual_seed(0)
        guide = AutoParticles(model, 5)
        engine = SVGD(model, guide, sequential=sequential)
        if sequential:
            engine.step()
        else:
            with pytest.warns(UserWarning, match="could not be vectorised over particles") as warned:
                engine.step()
            assert len([w for w in warned if "vectorised" in str(w.message)]) == 1
        engine.step()
        results.append(guide.particles()["z"])
    assert torch.equal(*results)


def test_autocast_leaves_the_kernel_alone() -> None:
    """Proves that under autocast the update is computed in the precision of the particles."""
    scales = torch.linspace(0.5, 2.0, 30)
    results = []
    for enabled in (False, True):
        torch.manual_seed(0)
        guide = AutoParticles(gaussian(scales), 6)
        engine = SVGD(gaussian(scales), guide)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            engine.step()
        results.append(guide.particles()["z"])
    assert torch.equal(*results)


def test_cyclical_annealing() -> None:
    """Proves the ramps, their range, and 1 after the last cycle."""
    gamma = cyclical_annealing(100, cycles=4, power=2.0)
    values = [gamma(t) for t in range(130)]
    assert all(0 < v <= 1 for v in values)
    assert values[24] == values[49] == values[99] == values[129] == 1.0
    assert values[25] == pytest.approx(1 / 625) and values[12] == pytest.approx((13 / 25) ** 2)


# ----------------------------------------------------------------------------------------------------- bad input


def test_energies_that_are_not_finite_name_the_particle() -> None:
    """Proves that nothing moves, the message names particle and site, and ``fit`` goes back to the last good epoch."""
    model, x, y = network()
    guide = spread(model, 3)
    with torch.no_grad():
        guide.coordinates()["3.weight"][1] = math.nan
    before = [p.detach().clone() for p in guide.parameters()]
    with pytest.raises(FloatingPointError, match=r"particle 1 became nan at step 1, .* '3.weight'"):
        SVGD(model, guide).step(x, y)
    for p, start in zip(guide.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), start, rtol=0, atol=0, equal_nan=True)
    problem = Regression()
    particles = AutoParticles(problem, 2)
    engine = SVGD(problem, particles, lambda p: torch.optim.SGD(p, lr=1e200), num_data=1)
    with pytest.raises(FloatingPointError, match=r"energy of particle \d .* 'b'.* back at the end of epoch 0"):
        engine.fit((problem.x, problem.y), 20, progress=False, seed=0)
    assert bool(torch.isfinite(particles.theta).all())


@pytest.mark.parametrize("kernel", [RBF, "median", 2.0, lambda d: d])
def test_a_kernel_that_is_none_is_refused_with_the_remedy(kernel: Any) -> None:
    model, _, _ = network()
    with pytest.raises(TypeError, match=r"expected a kernel of pyro_bnn.inference .* such as RBF\('median'\)"):
        SVGD(model, MixtureGuide(model, 2, family="point"), kernel=kernel)


def test_the_set_up_gives_the_optimiser_and_the_kernels() -> None:
    model, x, y = network()
    engine = SVGD(model, spread(model, 2), lr=0.02)
    with pytest.raises(RuntimeError, match=r"no optimiser before the particles are set up: call setup\(x, y\)"):
        engine.optimizer  # noqa: B018
    assert engine.num_kernels == 0
    engine.setup(x, y)
    optimizer = engine.optimizer
    assert optimizer.param_groups[0]["lr"] == 0.02 and engine.steps == 0
    assert engine.num_kernels == len(model.sites())
    engine.setup(x, y)
    engine.step(x, y)
    assert engine.optimizer is optimizer and engine.steps == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "stein"}, "method='stein': expected one of 'svgd', 'wgd', 'ensemble'"),
        ({"space": "weights"}, "space='weights'"),
        ({"scope": "global"}, "scope='global'"),
        ({"repulsion": -1.0}, "repulsion=-1.0"),
        ({"repulsion": math.nan}, "repulsion=nan"),
        ({"num_data": 0}, "num_data=0"),
        ({"space": "product"}, r"needs a guide with pairs\(\)"),
        ({"space": "function"}, "expected method='wgd'"),
        ({"space": "function", "method": "wgd", "scope": "layer"}, "scope='joint'"),
        ({"kernel": LinearKernel(), "method": "wgd"}, "divides by a density"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    model, _, _ = network()
    with pytest.raises(ValueError, match=message):
        SVGD(model, MixtureGuide(model, 2, family="point"), **options)


def test_programs_that_do_not_fit() -> None:
    """Proves that each thing that cannot work says so before anything moves."""
    model, x, y = network()

    def discrete() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("k", dist.Bernoulli(0.5))

    normal = gaussian(torch.ones(2))
    with pytest.raises(ValueError, match="num_particles=0"):
        AutoParticles(normal, 0)
    with pytest.raises(ValueError, match="init='zero'"):
        AutoParticles(normal, init="zero")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'w', which is not a latent site"):
        AutoParticles(normal, init={"w": torch.zeros(5, 2)}).setup()
    with pytest.raises(ValueError, match=r"init of 'z' has shape \(4, 2\): expected \(5, 2\)"):
        AutoParticles(normal, init={"z": torch.zeros(4, 2)}).setup()
    with pytest.raises(ValueError, match="starts outside the support"):
        positive = lambda: pyro.sample("z", dist.Gamma(2.0, 1.0))  # noqa: E731
        AutoParticles(positive, 2, init={"z": torch.tensor([1.0, -1.0])}).setup()
    with pytest.raises(ValueError, match="latent site 'k' is discrete"):
        SVGD(discrete, AutoParticles(discrete, 2)).step()
    with pytest.raises(ValueError, match="family='point', not 'normal'"):
        SVGD(model, MixtureGuide(model, 2))
    with pytest.raises(TypeError, match="MixtureGuide of points or AutoParticles"):
        SVGD(model, pyro.infer.autoguide.AutoDelta(model))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="annealing gave 0.0 at step 0"):
        SVGD(normal, AutoParticles(normal, 2), annealing=lambda step: 0.0).step()
    with pytest.raises(ValueError, match="repulsion=-2"):
        SVGD(normal, AutoParticles(normal, 2), repulsion=lambda step: -2).step()
    with pytest.raises(ValueError, match="epochs=0"):
        SVGD(model, MixtureGuide(model, 2, family="point")).fit((x, y), 0)
    for options in ({"cycles": 0}, {"total_steps": 2, "cycles": 3}, {"power": 0.0}):
        with pytest.raises(ValueError, match="expected"):
            cyclical_annealing(**({"total_steps": 10} | options))  # type: ignore[arg-type]


def test_gradients_that_are_not_finite_move_nothing() -> None:
    """Proves that a root at 0, finite with an infinite derivative, stops the step before anything has moved."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=DOUBLE), 1.0).to_event(1))
        pyro.factor("root", (z - z.detach()).abs().sum().sqrt() * 0 + (z - z.detach()).square().sum().sqrt())

    guide = AutoParticles(model, 3)
    engine = SVGD(model, guide, num_data=1)
    guide.setup()
    before = guide.theta.detach().clone()
    with pytest.raises(FloatingPointError, match="gradient of the energies is not finite"):
        engine.step()
    assert torch.equal(guide.theta, before) and engine.steps == 0


def test_a_second_try_after_a_divergence_begins_anew() -> None:
    """Proves that neither the momentum of the steps that went wrong nor their learning rate is left."""
    x = torch.randn(40, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    y = x.sum(1, keepdim=True)
    torch.manual_seed(0)
    net = torch.nn.Linear(2, 1).double()
    model = pb.models.Dense(net, pb.likelihoods.Gaussian(scale=0.1), 40)
    guide = MixtureGuide(model, 2, family="point")
    rate = 1e3
    engine = SVGD(model, guide, lambda groups: torch.optim.SGD(groups, lr=rate, momentum=0.9))
    with pytest.raises(FloatingPointError, match="back at the end of epoch 0"):
        engine.fit((x, y), 2, batch_size=1, progress=False, seed=0)
    rate = 1e-4
    losses = engine.fit((x, y), 20, batch_size=10, progress=False, seed=0).losses
    assert losses[-1] < losses[0]


def test_statistics_move_once_for_all_particles() -> None:
    """Proves that batch normalisation one by one ends where it ends together: at the mean over particles."""
    ends = []
    for sequential in (False, True):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1)).double()
        model = pb.models.Dense(net, pb.likelihoods.Gaussian(scale=0.1), 20)
        guide = MixtureGuide(model, 3, family="point")
        with torch.no_grad():
            for value in guide.coordinates().values():
                value.add_(0.5 * torch.randn_like(value))
        x = torch.randn(20, 2, dtype=DOUBLE)
        for _ in range(3):
            SVGD(model, guide, sequential=sequential).step(x, x[:, :1])
        ends.append({n: b.clone() for n, b in model.core().net.named_buffers()})
    assert int(ends[0]["1.num_batches_tracked"]) == 3
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value)
