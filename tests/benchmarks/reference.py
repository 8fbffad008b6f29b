"""Each method against Hamiltonian Monte Carlo: ``python -m tests.benchmarks.reference [--quick]``.

Three posteriors of a network with one hidden layer under the prior of ``by_width``: 1,000 digits of MNIST, 784-20-10,
and the first split of two UCI tables, 50 units and one noise. The reference is four long chains of
:mod:`tests.benchmarks.hmc`, which shares no code with the library. At the test rows are compared

- ``agreement``: the share of digits with the same most probable class,
- ``total_variation``: of the predictive distributions, (1/2) sum |p - q|, or its integral,
- ``variance_ratio``: the variance of the probabilities (of the means of y) over draws, by that of the reference.

The reference's own halves are compared in the same way. Each method chooses its settings by the NLL of a fifth of the
training rows, as in :mod:`tests.benchmarks.uci`, among those of its grid with the reference's likelihood.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import arviz
import torch

import pyro_bnn as pb
from pyro_bnn.predicting import log_predictive_density
from tests.benchmarks.datasets import Table, images, uci
from tests.benchmarks.hmc import Chains, Posterior, draw
from tests.benchmarks.measure import read_results, write_results
from tests.benchmarks.uci import methods
from tests.benchmarks.uci.methods import Method, Settings
from tests.benchmarks.uci.rows import for_validation

RUNS = Path("runs/reference")
DIGITS, TEST_DIGITS, TABLES = 1000, 2000, ("boston", "wine")
#: chains, trajectories of warm-up, draws of each chain, and trajectories for each
LONG, QUICK = (4, 500, 250, 3), (2, 50, 20, 1)
NAMES = ("digits", *TABLES)
CHAINS = ("SGHMC, predicted noise", "SGHMC")
#: those of the tables; chains have one likelihood and four times the draws, and spike and slab may take larger steps
METHODS = {
    **{name: method for name, method in methods.METHODS.items() if name not in CHAINS},
    "spike and slab": replace(methods.METHODS["spike and slab"], grid=methods.grid(**{"step size": (0.05, 0.2)})),
    "SGHMC": Method(partial(methods.sghmc, draws=200), ({"scale": 1.0},), 200, is_ours=True),
}


class Problem(NamedTuple):
    """A posterior: data, the number of its outputs, and the deviations of the prior of W1, b1, W2, b2."""

    table: Table
    likelihood: str
    outputs: int
    deviations: tuple[float, float, float, float]


def problem(name: str) -> Problem:
    if name == "digits":
        x, y, x_test, y_test = images("mnist")
        x, x_test = (part.flatten(1) * math.sqrt(10 / 784) for part in (x, x_test))  # as large as ten inputs of a table
        table = Table(x[:DIGITS], y[:DIGITS], x_test[:TEST_DIGITS], y_test[:TEST_DIGITS], 1.0, 20)
        return Problem(table, "categorical", 10, (1.0, 1.0, table.units**-0.5, 1.0))
    table = uci(name, 0)
    return Problem(table, "gaussian", 1, (1.0, 1.0, table.units**-0.5, 1.0))


def reference(name: str, quick: bool) -> tuple[Chains, float]:
    """The long chains, from a file if they have been run, and the seconds that they took."""
    lengths = QUICK if quick else LONG
    path = RUNS / f"{name}-{'-'.join(map(str, lengths))}.pt"
    if path.exists():
        kept = torch.load(path, weights_only=True)
        return Chains(*kept["chains"]), kept["seconds"]
    of = problem(name)
    start = time.perf_counter()
    chains, warmup, draws, thinning = lengths
    posterior = Posterior(of.table.x_train, of.table.y_train, of.table.units, of.outputs, of.deviations)
    found = draw(posterior, of.table.x_test, chains, warmup, draws, thinning)
    seconds = time.perf_counter() - start
    RUNS.mkdir(parents=True, exist_ok=True)
    torch.save({"chains": tuple(found), "seconds": seconds}, path)
    return found, seconds


def prediction(chains: Chains, of: Problem) -> pb.Prediction:
    likelihood = pb.likelihoods.Categorical() if of.likelihood == "categorical" else pb.likelihoods.Gaussian()
    noise = None if of.likelihood == "categorical" else chains.noise.flatten()[:, None]
    return pb.Prediction(chains.outputs.flatten(0, 1)[:, None], likelihood, noise)


def compared(ours: pb.Prediction, true: pb.Prediction, of: Problem) -> dict[str, float | None]:
    spread = [one.per_member.flatten(0, 1).double().var(0, correction=0).sum() for one in (ours, true)]
    found: dict[str, float | None] = {"agreement": None, "variance_ratio": float(spread[0] / spread[1])}
    if of.likelihood == "categorical":
        found["agreement"] = pb.diagnostics.agreement(ours, true)
        return found | {"total_variation": pb.diagnostics.total_variation(ours, true)}
    return found | {"total_variation": distance(ours, true)}


def distance(ours: pb.Prediction, true: pb.Prediction, points: int = 400) -> float:
    """The total variation distance of predictive densities of y, averaged over rows, by the trapezoidal rule.

    :param points: of y, over eight deviations on either side of both means.
    """
    means = torch.stack([one.mean.flatten() for one in (ours, true)])
    reach = 8 * torch.stack([one.std.flatten() for one in (ours, true)]).amax(0)
    low, high = means.amin(0) - reach, means.amax(0) + reach
    grid = torch.linspace(0, 1, points)[:, None] * (high - low) + low
    densities = [[log_predictive_density(one, y).exp() for one in (ours, true)] for y in grid[..., None]]
    gap = torch.stack([(p - q).abs() for p, q in densities])
    return float(torch.trapezoid(gap, grid, dim=0).mean() / 2)


def convergence(chains: Chains) -> dict[str, float]:
    """The largest R-hat and the smallest effective sample size of the outputs at a hundred test rows."""
    values = {"f": chains.outputs[:, :, :100].flatten(2).double().numpy()}
    data = arviz.convert_to_dataset(values)
    return {"r_hat": float(arviz.rhat(data)["f"].max()), "effective": float(arviz.ess(data)["f"].min())}


def settings_of(method: str, of: Problem) -> list[Settings]:
    """The method's grid with the reference's likelihood in the place of its own, each setting once."""
    grid = [{**settings, "likelihood": of.likelihood} for settings in METHODS[method].grid]
    return [one for i, one in enumerate(grid) if one not in grid[:i]]


def tried(method: str, table: Table, settings: Settings, seed: int, share: float) -> float:
    """The NLL of the test rows, infinite where a run diverges."""
    try:
        return predicted(method, table, settings, seed, share)[0]
    except FloatingPointError:
        return math.inf


def predicted(method: str, table: Table, settings: Settings, seed: int, share: float) -> tuple[float, pb.Prediction]:
    """The NLL of the test rows, and the prediction for them."""
    how = METHODS[method]
    torch.manual_seed(seed)
    posterior = how.fit(table, settings, seed, share)
    found = posterior.predict(table.x_test, posterior.num_stored or how.draws, seed=0)
    return -float(log_predictive_density(found, table.y_test).mean()), found


def rows(name: str, asked: list[str], seed: int, quick: bool) -> Iterator[dict[str, Any]]:
    of, (chains, seconds) = problem(name), reference(name, quick)
    true, share = prediction(chains, of), 0.02 if quick else 1.0
    half = len(chains.outputs) // 2
    first, second = (
        prediction(chains._replace(outputs=chains.outputs[part], noise=chains.noise[part]), of)
        for part in (slice(None, half), slice(half, None))
    )
    nll = -float(log_predictive_density(true, of.table.y_test).mean())
    own = {"acceptance": chains.acceptance, "step_size": chains.step_size, **convergence(chains)}
    yield {"problem": name, "method": "HMC, its halves", **compared(first, second, of), "nll": nll, **own} | {
        "seconds": seconds,
        "seed": 0,
    }
    inner = for_validation(of.table, seed)
    for method in asked:
        grid = settings_of(method, of)
        validation = {str(one): tried(method, inner, one, seed, share) for one in grid} if len(grid) > 1 else {}
        chosen = min(grid, key=lambda one: validation.get(str(one), 0.0))
        start = time.perf_counter()
        nll, found = predicted(method, of.table, chosen, seed, share)
        taken = time.perf_counter() - start
        row = {"problem": name, "method": method, **compared(found, true, of), "nll": nll, "seconds": taken}
        yield row | {"settings": dict(chosen), "validation": validation, "seed": seed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="short chains, a fiftieth of the steps, not written")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for name in asked.problems:
        for seed in range(asked.seeds):
            known = [] if asked.quick else read_results("reference").get("rows", [])
            done = {(row["problem"], row["method"], row["seed"]) for row in known}
            left = [method for method in asked.methods if (name, method, seed) not in done]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # chains that disagree are judged here
                for row in rows(name, left, seed, asked.quick):
                    show(row)
                    if not asked.quick and (name, row["method"], row["seed"]) not in done:
                        known = [*known, row]
                        write_results("reference", {"rows": known}, list(range(asked.seeds)))


def show(row: dict[str, Any]) -> None:
    figures = {key: row[key] for key in ("agreement", "total_variation", "variance_ratio", "nll", "seconds")}
    text = "  ".join(f"{key} {value:.3f}" for key, value in figures.items() if value is not None)
    print(f"{row['problem']:7} {row['method']:18} {text}  {row.get('settings', '')}", flush=True)


if __name__ == "__main__":
    main()
