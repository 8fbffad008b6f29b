"""A reference for samplers, in function space: NUTS on a 13-50-1 regression network whose potential is written by hand.

``python -m tests.references.nuts_13_50_1`` writes ``nuts_13_50_1.json`` next to this file. Nothing of ``pyro_bnn`` is
used here: the problem, its potential and the network are closed formulas in float64, and NUTS is Pyro's.

The data are Friedman's (1991) first function, of which 5 of 13 inputs matter; inputs and targets are standardised.
Half of the 100 probe inputs are from the same design and half from a cube 1.5 times as wide, where the posterior is
wider. Hidden units can be permuted and change sign, so that only function values can be compared between chains.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import arviz
import numpy as np
import pyro
import torch
from pyro.infer import MCMC, NUTS
from sklearn.datasets import make_friedman1
from torch import Tensor

PATH = Path(__file__).with_suffix(".json")
NUM_DATA, INPUTS, HIDDEN, PROBES, INSIDE = 200, 13, 50, 100, 50
#: known noise of the standardised target, about that of the data
NOISE = 0.3
#: standard deviation of the prior of every element, and the shapes, by the names of ``nn.Sequential``'s parameters
PRIOR = {"0.weight": INPUTS**-0.5, "0.bias": 1.0, "2.weight": HIDDEN**-0.5, "2.bias": 1.0}
SHAPES = {"0.weight": (HIDDEN, INPUTS), "0.bias": (HIDDEN,), "2.weight": (1, HIDDEN), "2.bias": (1,)}
ACCEPTANCE, DEPTH = 0.8, 10
#: chains start at draws of the prior of this many times its scale
DISPERSION = 1.5


class Problem(NamedTuple):
    """Inputs ``[200, 13]``, targets ``[200]``, probe inputs ``[100, 13]``; noiseless targets of the first 50 probes."""

    x: Tensor
    y: Tensor
    probes: Tensor
    truth: Tensor


def problem() -> Problem:
    """The data, in units in which those of training have mean 0 and standard deviation 1."""
    x, y = make_friedman1(NUM_DATA, n_features=INPUTS, noise=1.5, random_state=0)
    probes, truth = make_friedman1(PROBES, n_features=INPUTS, noise=0.0, random_state=1)
    probes[INSIDE:] = 1.5 * probes[INSIDE:] - 0.25
    center, deviation = x.mean(0), x.std(0)
    standard = (x - center) / deviation, (y - y.mean()) / y.std(), (probes - center) / deviation
    return Problem(*map(torch.as_tensor, (*standard, (truth[:INSIDE] - y.mean()) / y.std())))


def network(values: dict[str, Tensor], x: Tensor) -> Tensor:
    """``[..., n]``: function values at the rows of x, for parameters with any leading axes."""
    hidden = torch.tanh(x @ values["0.weight"].mT + values["0.bias"].unsqueeze(-2))
    return (hidden @ values["2.weight"].mT + values["2.bias"].unsqueeze(-2)).squeeze(-1)


def potential(values: dict[str, Tensor], data: Problem) -> Tensor:
    """The negative log joint density without its constants, in nats."""
    misfit = (data.y - network(values, data.x)).square().sum() / (2 * NOISE**2)
    return misfit + sum(value.square().sum() / (2 * PRIOR[name] ** 2) for name, value in values.items())


def fingerprint(data: Problem) -> list[float]:
    """Two numbers that no change of data, probes, priors, noise or network leaves as they are."""
    values = {name: torch.linspace(-1, 1, math.prod(shape)).double().reshape(shape) for name, shape in SHAPES.items()}
    return [float(potential(values, data)), float(network(values, data.probes).square().sum())]


class Chain(NamedTuple):
    """Function values ``[draws, 100]`` at the probes, their mean ``[200]`` at the training inputs, and how it went."""

    probes: np.ndarray
    fitted: np.ndarray
    divergences: int
    step_size: float
    seconds: float


def chain(job: tuple[int, int, int]) -> Chain:
    """Runs the chain of a seed."""
    seed, warmup, draws = job
    begin = time.process_time()
    torch.set_num_threads(1)
    pyro.set_rng_seed(seed)
    data = problem()
    start = {name: DISPERSION * PRIOR[name] * torch.randn(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    kernel = NUTS(
        potential_fn=lambda values: potential(values, data), target_accept_prob=ACCEPTANCE, max_tree_depth=DEPTH
    )
    mcmc = MCMC(kernel, draws, warmup, initial_params=start, disable_progbar=seed != 1)
    mcmc.run()
    values = mcmc.get_samples()
    divergences = len(mcmc.diagnostics()["divergences"]["chain 0"])
    probes, fitted = network(values, data.probes), network(values, data.x).mean(0)
    seconds = time.process_time() - begin
    return Chain(probes.numpy(), fitted.numpy(), divergences, float(kernel.step_size), seconds)


def agreement(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> dict[str, float]:
    """How two laws of the function values agree, from means and standard deviations ``[100]`` of each.

    ``correlation`` of the standard deviations; ``mean``, the mean absolute difference of the means in units of the
    pooled standard deviation; ``ratio``, the mean ratio of the standard deviations, to which a correlation is blind.
    """
    (mean, deviation), (other_mean, other_deviation) = one, other
    pooled = ((deviation.square() + other_deviation.square()) / 2).sqrt()
    return {
        "correlation": float(torch.corrcoef(torch.stack([deviation, other_deviation]))[0, 1]),
        "mean": float(((mean - other_mean) / pooled).abs().mean()),
        "ratio": float((deviation / other_deviation).mean()),
    }


def error(prediction: Tensor, target: Tensor) -> float:
    return float((prediction - target).square().mean().sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chains", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=300)
    parser.add_argument("--draws", type=int, default=900)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=PATH)
    options = parser.parse_args()
    jobs = [(seed, options.warmup, options.draws) for seed in range(1, options.chains + 1)]
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        chains = list(pool.map(chain, jobs))

    data = problem()
    values = np.stack([one.probes for one in chains])
    fitted = torch.as_tensor(np.mean([one.fitted for one in chains], 0))
    half = options.chains // 2
    moments = {
        name: (torch.as_tensor(part.mean((0, 1))), torch.as_tensor(part.std((0, 1))))
        for name, part in {"all": values, "first": values[:half], "second": values[half:]}.items()
    }
    slope = torch.linalg.lstsq(data.x, data.y.unsqueeze(-1)).solution.squeeze(-1)  # both have mean 0
    dataset = arviz.convert_to_dataset({"f": values})
    record: dict[str, Any] = {
        "settings": {
            "chains": options.chains,
            "seeds": [seed for seed, _, _ in jobs],
            "warmup": options.warmup,
            "draws": options.draws,
            "target_acceptance": ACCEPTANCE,
            "tree_depth": DEPTH,
            "dispersion": DISPERSION,
            "noise": NOISE,
            "prior": PRIOR,
        },
        "versions": {name: version(name) for name in ("torch", "pyro-ppl", "arviz", "scikit-learn")},
        "processor_seconds": round(sum(one.seconds for one in chains)),
        "fingerprint": fingerprint(data),
        "divergences": sum(one.divergences for one in chains),
        "step_sizes": [round(one.step_size, 4) for one in chains],
        "worst_rhat": float(arviz.rhat(dataset)["f"].max()),
        "worst_ess": {kind: float(arviz.ess(dataset, method=kind)["f"].min()) for kind in ("mean", "sd", "bulk")},
        "halves": agreement(moments["first"], moments["second"]),
        "root_mean_square_error": {
            "network, training": error(fitted, data.y),
            "line, training": error(data.x @ slope, data.y),
            "network, probes inside": error(moments["all"][0][:INSIDE], data.truth),
            "line, probes inside": error(data.probes[:INSIDE] @ slope, data.truth),
        },
    }
    print(json.dumps(record, indent=1))
    for name, (mean, deviation) in moments.items():
        record[name] = {"mean": mean.numpy().round(6).tolist(), "std": deviation.numpy().round(6).tolist()}
    options.out.write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
