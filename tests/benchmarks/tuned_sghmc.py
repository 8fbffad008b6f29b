"""SGHMC that finds its own settings, against exact posteriors: ``python -m tests.benchmarks.tuned_sghmc``.

``mean`` is the largest difference of a mean in standard deviations, ``width`` the largest relative difference of a
standard deviation, over all latents; ``effective`` the smallest effective sample size and ``seconds`` those of the run,
warm-up and recording of the gradient too. NUTS of Pyro runs beside it, one chain with as many gradients as it asks for.
Targets: mean <= 0.25 and width <= 0.15.
"""

from __future__ import annotations

import argparse
import time
import warnings
from typing import Any

import arviz
import numpy as np
import torch
import xarray as xr
from pyro.infer import NUTS

from pyro_bnn.inference import SGHMC, sample
from tests.benchmarks.measure import report
from tests.references.exact_posteriors import CONJUGATE, SCHOOLS

DRAWS, CHAINS, NUTS_DRAWS = 1000, 4, 1000
MODELS = CONJUGATE | {"eight schools, centred": SCHOOLS}


def measure(name: str, engine: str, seed: int) -> dict[str, Any]:
    exact = MODELS[name]
    start = time.perf_counter()
    if engine == "SGHMC":
        chains, posterior = CHAINS, sample(SGHMC(exact.model), DRAWS, seed=seed, progress=False)
    else:
        chains, posterior = 1, sample(NUTS(exact.model), NUTS_DRAWS, NUTS_DRAWS, 1, seed=seed, progress=False)
    seconds = time.perf_counter() - start
    count = posterior.num_stored or 0
    draws = posterior.draws(count)
    values = torch.cat([draws[n].reshape(count, -1) for n in exact.latents], 1).double().numpy()
    array = xr.DataArray(values.reshape(chains, -1, values.shape[1]), dims=("chain", "draw", "value"))
    return {
        "model": name,
        "engine": engine,
        "seed": seed,
        "mean": float((np.abs(values.mean(0) - exact.mean) / exact.std).max()),
        "width": float(np.abs(values.std(0) / exact.std - 1).max()),
        "effective": float(arviz.ess(array.to_dataset(name="x"))["x"].min()),
        "seconds": seconds,
        **{f"found {key}": value for key, value in posterior.sampler.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in MODELS:
        for engine, seeds in (("SGHMC", asked.seeds), ("NUTS", 1)):
            for seed in range(seeds):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)
                    rows.append(measure(name, engine, seed))
                row = rows[-1]
                print(
                    f"{name:24} {engine:6} seed {seed}: mean {row['mean']:.3f}, width {row['width']:.3f}, "
                    f"{row['effective']:.0f} effective draws in {row['seconds']:.1f} s",
                    flush=True,
                )
    report("tuned_sghmc", rows, seeds=list(range(asked.seeds)))


if __name__ == "__main__":
    main()
