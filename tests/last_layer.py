"""A random last layer, whose posterior has a closed form, and engines that are held against it in function space."""

from __future__ import annotations

import torch
from pyro.infer.autoguide import AutoLowRankMultivariateNormal
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn.inference import SGHMC, SVGD, AutoParticles, cosine, fit, sample
from pyro_bnn.models import Dense, MeanFieldGuide

ROWS, NOISE = 16, 0.3
LIKELIHOOD = pb.likelihoods.Gaussian(NOISE)
X = torch.linspace(-1, 1, ROWS)[:, None]
PROBES = torch.linspace(-1.5, 1.5, 21)[:, None]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1))


def last_layer() -> Dense:
    """The last layer alone is random, and the rest is frozen: otherwise `fit` trains it as point estimates."""
    model = Dense(network(), LIKELIHOOD, ROWS, select="2")
    model.requires_grad_(False)
    return model


def targets() -> Tensor:
    return torch.sin(2.5 * X) + NOISE * torch.randn(X.shape, generator=torch.Generator().manual_seed(1))


def features(x: Tensor) -> Tensor:
    """What the last layer sees, and a 1 for its bias."""
    with torch.no_grad():
        return torch.cat([network()[:2](x), torch.ones(len(x), 1)], 1).double()


def precision() -> Tensor:
    """Of the weights under the posterior, with the prior N(0, 1)."""
    seen = features(X)
    return seen.T @ seen / NOISE**2 + torch.eye(seen.shape[1])


def exact() -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the function at the probes, by Bayesian linear regression."""
    covariance, new = torch.linalg.inv(precision()), features(PROBES)
    mean = covariance @ features(X).T @ targets().double() / NOISE**2
    return (new @ mean)[:, 0], ((new @ covariance) * new).sum(1).sqrt()


def mean_field_ratio() -> float:
    """What the best factorised Normal has: variances 1 / precision_ii (Bishop 2006, 10.1.2), and the exact mean."""
    return float(((features(PROBES) ** 2 / precision().diagonal()).sum(1).sqrt() / exact()[1]).log().mean().exp())


def distance(posterior: pb.Posterior, num_samples: int | None) -> tuple[float, float]:
    """Root mean square difference of means in exact standard deviations, and the geometric mean ratio of deviations."""
    f = posterior.predict(PROBES, num_samples=num_samples, seed=0).outputs.double().reshape(-1, len(PROBES))
    mean, std = exact()
    return float(((f.mean(0) - mean) / std).square().mean().sqrt()), float((f.std(0) / std).log().mean().exp())


def by_mean_field(components: int, seed: int = 0) -> pb.Posterior:
    model = last_layer()
    torch.manual_seed(seed)
    guide = MeanFieldGuide(model, components)
    options = {"lr": 0.02, "schedule": cosine(), "batch_size": ROWS, "progress": False}
    return fit(model, guide, (X, targets()), epochs=1200, seed=seed, **options)


def by_low_rank_normal(epochs: int, seed: int = 0) -> pb.Posterior:
    model = last_layer()
    torch.manual_seed(seed)
    guide = AutoLowRankMultivariateNormal(model, rank=3, init_scale=0.1)
    options = {"lr": 0.02, "schedule": cosine(), "batch_size": ROWS, "progress": False}
    return fit(model, guide, (X, targets()), epochs=epochs, seed=seed, **options)


def by_sghmc(seed: int = 0) -> pb.Posterior:
    kernel = SGHMC(last_layer(), (X, targets()), step_size=0.02, friction=0.1, batch_size=ROWS, thinning=5)
    return sample(kernel, 1000, 200, 4, seed=seed, progress=False)


def by_svgd(particles: int, seed: int = 0) -> pb.Posterior:
    model = last_layer()
    torch.manual_seed(seed)
    engine = SVGD(model, AutoParticles(model, particles), lr=0.05)
    return engine.fit((X, targets()), epochs=800, batch_size=ROWS, seed=seed, progress=False)
