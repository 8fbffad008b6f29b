"""Which of 1,000 inputs matter? Spike-and-slab columns of the first layer, by SGHMC within EM.

    python examples/variable_selection.py                                     # example 1: a regression on five inputs
    python examples/variable_selection.py --function additive --hidden 16 8 --warmup 1000
    python examples/variable_selection.py --function interaction --likelihood bernoulli

The inputs share a common part, x_j = (e + z_j) / sqrt(2) with standard normals, so that every two of them have a
correlation of 1/2. The functions of x are those on which nonlinear variable selection is compared (Sun, Song and Liang
2022, *JASA* 117; Ke and Fan 2022, arXiv 2210.12957). To try another one, add it to ``FUNCTIONS``.
"""

import argparse
import math
import time

import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pyro_bnn as pb

#: name: (function of the inputs, the inputs that it uses)
FUNCTIONS = {
    "tanh": (
        lambda x: (
            torch.tanh(2 * torch.tanh(2 * x[:, 0] - x[:, 1]))
            + 2 * torch.tanh(torch.tanh(x[:, 2] - 2 * x[:, 3]))
            - torch.tanh(2 * x[:, 4])
        ),
        [0, 1, 2, 3, 4],
    ),
    "additive": (
        lambda x: 5 * x[:, 1] / (1 + x[:, 0] ** 2) + 5 * torch.sin(x[:, 2] * x[:, 3]) + 2 * x[:, 4],
        [0, 1, 2, 3, 4],
    ),
    "interaction": (
        lambda x: torch.exp(x[:, 0]) + x[:, 1] ** 2 + 5 * torch.sin(x[:, 2] * x[:, 3]) - 3,
        [0, 1, 2, 3],
    ),
}


def simulate(function: str, likelihood: str, n: int, p: int) -> tuple[Tensor, Tensor]:
    """x ``[n, p]`` and y ``[n, 1]``: the function with N(0, 1) noise, or whether it is positive."""
    x = (torch.randn(n, 1) + torch.randn(n, p)) / math.sqrt(2)
    f = FUNCTIONS[function][0](x)[:, None]
    return x, f + torch.randn(n, 1) if likelihood == "gaussian" else (f > 0).float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--function", choices=FUNCTIONS, default="tanh")
    parser.add_argument("--likelihood", choices=["gaussian", "bernoulli"], default="gaussian")
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=10240, help="for training; a tenth as many for testing")
    parser.add_argument("--hidden", type=int, nargs="+", default=[5, 3])
    parser.add_argument("--warmup", type=int, default=400, help="draws, of 10 steps each")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--step-size", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    x, y = simulate(options.function, options.likelihood, options.rows + options.rows // 10, options.inputs)
    x_test, y_test, x, y = x[options.rows :], y[options.rows :], x[: options.rows], y[: options.rows]
    widths = [options.inputs, *options.hidden]
    layers = [part for a, b in zip(widths, widths[1:], strict=False) for part in (nn.Linear(a, b), nn.Tanh())]
    net = nn.Sequential(*layers, nn.Linear(widths[-1], 1))

    regression = options.likelihood == "gaussian"
    columns = pb.priors.SpikeAndSlab(0.1, 0.7, inclusion=dist.Beta(2.0, 50.0), group="input")
    model = pb.models.SpikeSlab(
        net,
        pb.likelihoods.Gaussian(scale=1.0) if regression else pb.likelihoods.Bernoulli(),
        options.rows,
        prior={r"0\.weight": columns, ".*": pb.priors.Normal(0.0, 1.0)},
    )
    kernel = pb.inference.SGHMCEM(
        model,
        (x, y),
        step_size=options.step_size,
        friction=0.1,
        batch_size=1024,
        thinning=10,
        prune="inclusion",
        prune_every=100,
    )
    start = time.perf_counter()
    posterior = pb.inference.sample(kernel, options.samples, options.warmup, seed=options.seed)
    probability = posterior.inclusion_probabilities()["0.weight"]
    chosen = (probability >= 0.5).nonzero().flatten().tolist()
    prediction = posterior.predict(x_test, options.samples)
    print(f"{time.perf_counter() - start:.0f} s")
    print(f"inputs with an inclusion probability of at least 1/2: {chosen}")
    print(f"inputs that the function uses:                        {FUNCTIONS[options.function][1]}")
    if regression:
        print(f"test MSE: {(prediction.mean.reshape(-1, 1) - y_test).square().mean():.4f} (the noise alone: 1)")
    else:
        print(f"test accuracy: {((prediction.mean.reshape(-1, 1) > 0.5) == (y_test > 0.5)).float().mean():.4f}")


if __name__ == "__main__":
    main()
