"""Forms of random weights on a tiny regression: their densities written by hand, and engines on each of them.

A 1-3-1 tanh network with 16 rows. Hidden units can be permuted and change sign, and the factors of a product too, so
that only values of the function are compared. For a random last layer they have a closed form, and for all forms
draws of the prior that are weighted by their likelihood (``references/weighted_forms.json``).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from pyro.infer import NUTS
from pyro.infer.autoguide import AutoLowRankMultivariateNormal
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn.inference import SGHMC, SVGD, AutoParticles, cosine, fit, sample
from pyro_bnn.models import Bella, CodebookGuide, Dense, MeanFieldGuide, Rank1, SharedWeights, WeightSharing
from pyro_bnn.priors import Normal

Values = dict[str, Tensor]
Moments = tuple[Tensor, Tensor]

REFERENCE = Path(__file__).parent / "references" / "weighted_forms.json"
ROWS, NOISE = 16, 0.3
LIKELIHOOD = pb.likelihoods.Gaussian(NOISE)
X = torch.linspace(-1, 1, ROWS)[:, None]
PROBES = torch.linspace(-1.5, 1.5, 21)[:, None]
#: of the prior of factors around 1
SPREAD = 1.0
#: standard deviation of the factors of a product
FACTOR = 0.7
#: the code of each weight, of ``0.weight`` and then of ``2.weight``
LABELS = (3, 0, 2, 0, 1, 3)
#: what the codes are around, in their order
LEVELS = (-0.5, 1.5, 0.5, -1.5)
#: which weights are what in the network
NAMES = ("0.weight", "0.bias", "2.weight", "2.bias")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1))


def targets() -> Tensor:
    return torch.sin(2.5 * X) + NOISE * torch.randn(X.shape, generator=torch.Generator().manual_seed(1))


@functools.cache
def given() -> Values:
    """The weights of the given network, in float64; made once, as making them sets the seed of torch."""
    return {name: value.detach().double() for name, value in network().named_parameters()}


@functools.cache
def _data() -> tuple[Tensor, Tensor]:
    return X.double(), targets()[:, 0].double()


def function(weights: Values, x: Tensor) -> Tensor:
    """``[..., n]``: values of the network at the rows of x, for weights with any leading axes."""
    hidden = torch.tanh(x @ weights["0.weight"].mT + weights["0.bias"].unsqueeze(-2))
    return (hidden @ weights["2.weight"].mT + weights["2.bias"].unsqueeze(-2)).squeeze(-1)


def dense_weights(values: Values) -> Values:
    return values


def last_layer_weights(values: Values) -> Values:
    return given() | values


def rank1_weights(values: Values) -> Values:
    """W' = W o (r s^T), and biases of their own."""
    own = {n: v for n, v in values.items() if n.endswith("bias")}
    for name in ("0.weight", "2.weight"):
        r, s = values[f"{name}.r"], values[f"{name}.s"]
        own[name] = given()[name] * r.unsqueeze(-1) * s.unsqueeze(-2)
    return own


def low_rank_weights(values: Values) -> Values:
    """W' = W + scale B A with the scale alpha / rank = 4 of rank 1; biases are given."""
    return given() | {n: given()[n] + 4 * values[f"{n}.B"] @ values[f"{n}.A"] for n in ("0.weight", "2.weight")}


def shared_weights(values: Values) -> Values:
    """Each weight has the value of its code."""
    coded = values["codes"][..., list(LABELS)]
    own = {n: v for n, v in values.items() if n != "codes"}
    return own | {"0.weight": coded[..., :3].unsqueeze(-1), "2.weight": coded[..., 3:].unsqueeze(-2)}


def shared_model() -> SharedWeights:
    """A network of 6 weights and 4 codes, with the labels above."""
    with torch.no_grad():
        net = network()
        weights = torch.tensor(LEVELS)[list(LABELS)]
        net[0].weight.copy_(weights[:3, None])
        net[2].weight.copy_(weights[None, 3:])
    model = WeightSharing(net, LIKELIHOOD, ROWS)
    guide = CodebookGuide.from_network(model, codes=4, outliers=0.0, blend=0.0, smallest=0, seed=0)
    return SharedWeights(net, LIKELIHOOD, ROWS, codebook=guide.book, prior=Normal(0.0, 1.0))


def rank1_model() -> Rank1:
    return Rank1(network(), LIKELIHOOD, ROWS, prior=Normal(1.0, SPREAD), weight_prior=Normal(0.0, 1.0))


@dataclass(frozen=True)
class Form:
    """A form of random weights.

    :param model: makes the model, whose other weights are frozen as they are given.
    :param weights: from values of its sites, with any leading axes, to the weights of the network.
    :param priors: mean and standard deviation of the elements of each site.
    """

    model: Callable[[], Dense | Rank1 | Bella | SharedWeights]
    weights: Callable[[Values], Values]
    priors: dict[str, tuple[float, float]]

    def frozen(self) -> Dense | Rank1 | Bella | SharedWeights:
        model = self.model()
        model.requires_grad_(False)
        return model

    def shapes(self) -> dict[str, torch.Size]:
        return {site.name: site.shape for site in self.model().sites()}

    def potential(self, values: Values) -> Tensor:
        """The negative log joint density of one draw without its constants, in nats."""
        prior = sum(((values[n] - mean) / std).square().sum() / 2 for n, (mean, std) in self.priors.items())
        return self.misfit(values) + prior

    def misfit(self, values: Values) -> Tensor:
        """The negative log likelihood without its constants, in nats, ``[...]`` for values with leading axes."""
        x, y = _data()
        return (y - function(self.weights(values), x)).square().sum(-1) / (2 * NOISE**2)


FORMS = {
    "dense": Form(
        lambda: Dense(network(), LIKELIHOOD, ROWS, prior=Normal(0.0, 1.0)), dense_weights, dict.fromkeys(NAMES, (0, 1))
    ),
    "rank-1": Form(
        rank1_model,
        rank1_weights,
        {f"{i}.weight.{factor}": (1, SPREAD) for i in (0, 2) for factor in "rs"} | {"0.bias": (0, 1), "2.bias": (0, 1)},
    ),
    "low-rank": Form(
        lambda: Bella(network(), LIKELIHOOD, ROWS, rank=1, prior=Normal(0.0, FACTOR)),
        low_rank_weights,
        {f"{i}.weight.{factor}": (0, FACTOR) for i in (0, 2) for factor in "AB"},
    ),
    "last layer": Form(
        lambda: Dense(network(), LIKELIHOOD, ROWS, prior=Normal(0.0, 1.0), select="2"),
        last_layer_weights,
        {"2.weight": (0, 1), "2.bias": (0, 1)},
    ),
    "codebook": Form(shared_model, shared_weights, {"codes": (0, 1), "0.bias": (0, 1), "2.bias": (0, 1)}),
}


# ----------------------------------------------------------------------------------------------------- references


def features(x: Tensor) -> Tensor:
    """What the last layer sees, and a 1 for its bias."""
    with torch.no_grad():
        return torch.cat([network()[:2](x), torch.ones(len(x), 1)], 1).double()


def precision() -> Tensor:
    """Of the weights under the posterior, with the prior N(0, 1)."""
    seen = features(X)
    return seen.T @ seen / NOISE**2 + torch.eye(seen.shape[1])


def exact_last_layer() -> Moments:
    """Mean and standard deviation of the function at the probes, by Bayesian linear regression."""
    covariance, new = torch.linalg.inv(precision()), features(PROBES)
    mean = covariance @ features(X).T @ targets().double() / NOISE**2
    return (new @ mean)[:, 0], ((new @ covariance) * new).sum(1).sqrt()


def mean_field_ratio() -> float:
    """What the best factorised Normal has: variances 1 / precision_ii (Bishop 2006, 10.1.2), and the exact mean."""
    return float(
        ((features(PROBES) ** 2 / precision().diagonal()).sum(1).sqrt() / exact_last_layer()[1]).log().mean().exp()
    )


def reference(form: str) -> Moments:
    """Mean and standard deviation of the function at the probes, ``[21]`` each."""
    if form == "last layer":
        return exact_last_layer()
    found = json.loads(REFERENCE.read_text())["forms"][form]
    return torch.tensor(found["mean"]).double(), torch.tensor(found["std"]).double()


# ------------------------------------------------------------------------------------------------------- engines

TRAINING = {"lr": 0.02, "schedule": cosine(), "batch_size": ROWS, "progress": False}
DATA = X, targets()


def by_mean_field(form: str, components: int, seed: int = 0, epochs: int = 1000) -> pb.Posterior:
    model = FORMS[form].frozen()
    torch.manual_seed(seed)
    return fit(model, MeanFieldGuide(model, components), DATA, epochs=epochs, seed=seed, **TRAINING)


def by_low_rank_normal(form: str, seed: int = 0, epochs: int = 2000) -> pb.Posterior:
    model = FORMS[form].frozen()
    torch.manual_seed(seed)
    guide = AutoLowRankMultivariateNormal(model, rank=3, init_scale=0.1)
    return fit(model, guide, DATA, epochs=epochs, seed=seed, **TRAINING)


def by_sghmc(form: str, seed: int = 0, draws: int = 600) -> pb.Posterior:
    kernel = SGHMC(FORMS[form].frozen(), DATA, step_size=0.02, friction=0.1, batch_size=ROWS, thinning=8)
    return sample(kernel, draws, 200, 4, seed=seed, progress=False)


def by_svgd(form: str, particles: int, seed: int = 0) -> pb.Posterior:
    model = FORMS[form].frozen()
    torch.manual_seed(seed)
    engine = SVGD(model, AutoParticles(model, particles), lr=0.05)
    return engine.fit(DATA, epochs=800, batch_size=ROWS, seed=seed, progress=False)


def by_nuts(form: str, seed: int = 0, draws: int = 150) -> pb.Posterior:
    """Pyro's NUTS on the model as it is, which takes some hundredths of a second a gradient."""
    model = FORMS[form].frozen().eval()
    return sample(NUTS(model, max_tree_depth=4), draws, 80, args=DATA, seed=seed, progress=False)


def moments(posterior: pb.Posterior, num_samples: int | None) -> Moments:
    """Mean and standard deviation of the function at the probes, ``[21]`` each."""
    f = posterior.predict(PROBES, num_samples=num_samples, seed=0).outputs.double().reshape(-1, len(PROBES))
    return f.mean(0), f.std(0)


def distance(found: Moments, true: Moments) -> tuple[float, float]:
    """Root mean square difference of means in standard deviations of the reference, and the geometric mean ratio of
    standard deviations to those of the reference."""
    (mean, std), (true_mean, true_std) = found, true
    return float(((mean - true_mean) / true_std).square().mean().sqrt()), float((std / true_std).log().mean().exp())
