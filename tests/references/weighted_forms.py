"""A reference for every form of random weights, in function space: draws of the prior, weighted by their likelihood.

``python -m tests.references.weighted_forms`` writes ``weighted_forms.json`` next to this file. The forms, their
densities and the network are those of ``tests/forms.py``, in float64. The networks are so small that

    E[g(f) | y] = sum_i w_i g(f_i) / sum_i w_i,   w_i = p(y | f_i),   f_i ~ prior

is exact but for the error of ``(sum w)^2 / sum w^2`` independent draws, which the file states with its figures; no
chain has to mix. NUTS on the same densities is run beside it, four chains that are short, and must agree.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import arviz
import numpy as np
import pyro
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor

from tests.benchmarks.measure import machine, provenance
from tests.forms import FORMS, PROBES, REFERENCE, Values, distance, function

#: draws of the prior at a time, until they are worth so many independent draws of the posterior
BATCH, TARGET = 100_000, 3000
CHAINS, WARMUP, DRAWS, DEPTH = 4, 100, 150, 6
#: a draw that weighs less than this, beside the heaviest, is left out
NEGLIGIBLE = 1e-12


def weighted(form: str) -> dict[str, Any]:
    """Moments of the function at the probes, and how many independent draws they are worth."""
    own, generator = FORMS[form], torch.Generator().manual_seed(0)
    total, squares, heaviest = 0.0, 0.0, 0.0
    first, second = torch.zeros(len(PROBES)).double(), torch.zeros(len(PROBES)).double()
    draws = 0
    while not draws or total**2 < TARGET * squares:
        draws += BATCH
        values: Values = {}
        for name, shape in own.shapes().items():
            mean, std = own.priors[name]
            values[name] = mean + std * torch.randn((BATCH, *shape), generator=generator, dtype=torch.float64)
        weight = (-own.misfit(values)).exp()
        heaviest = max(heaviest, float(weight.max()))
        kept = weight > NEGLIGIBLE * heaviest
        f = function(own.weights({name: value[kept] for name, value in values.items()}), PROBES.double())
        weight = weight[kept]
        total, squares = total + float(weight.sum()), squares + float(weight.square().sum())
        first, second = first + weight @ f, second + weight @ f.square()
    mean = first / total
    std = (second / total - mean.square()).sqrt()
    return {"prior_draws": draws, "independent_draws": total**2 / squares, "mean": _listed(mean), "std": _listed(std)}


def nuts(form: str) -> dict[str, Any]:
    """What chains of NUTS find, and how far they have mixed."""
    own, chains, divergences = FORMS[form], [], 0
    for seed in range(CHAINS):
        pyro.set_rng_seed(seed)
        start: Values = {}
        for name, shape in own.shapes().items():
            mean, std = own.priors[name]
            start[name] = mean + std * torch.randn(shape, dtype=torch.float64)
        own.potential(start)  # its constants are made before it is recorded
        kernel = NUTS(
            potential_fn=own.potential, max_tree_depth=DEPTH, jit_compile=True, ignore_jit_warnings=True
        )  # fmt: skip
        mcmc = MCMC(kernel, DRAWS, WARMUP, initial_params=start, disable_progbar=True)
        mcmc.run()
        chains.append(function(own.weights(mcmc.get_samples()), PROBES.double()).numpy())
        divergences += len(mcmc.diagnostics()["divergences"]["chain 0"])
    f = np.stack(chains)
    data = arviz.convert_to_dataset({"f": f})
    return {
        "divergences": divergences,
        "worst_rhat": float(arviz.rhat(data)["f"].max()),
        "worst_ess": {kind: float(arviz.ess(data, method=kind)["f"].min()) for kind in ("mean", "sd")},
        "mean": _listed(torch.as_tensor(f.mean((0, 1)))),
        "std": _listed(torch.as_tensor(f.std((0, 1)))),
    }


def _listed(values: Tensor) -> list[float]:
    return [round(float(value), 6) for value in values]


def _moments(found: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return torch.tensor(found["mean"]).double(), torch.tensor(found["std"]).double()


def main() -> None:
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    torch.set_num_threads(1)
    record: dict[str, Any] = {
        "settings": {
            "nuts": {"chains": CHAINS, "warmup": WARMUP, "draws": DRAWS, "tree_depth": DEPTH},
        },
        "machine": machine(),
        "provenance": provenance(range(CHAINS)),
        "forms": {},
    }
    for form in FORMS:
        begin = time.process_time()
        record["forms"][form] = found = weighted(form)
        found["nuts"] = nuts(form)
        found["nuts"]["off"], found["nuts"]["ratio"] = distance(_moments(found["nuts"]), _moments(found))
        found["processor_seconds"] = round(time.process_time() - begin)
        print(form, {k: v for k, v in (found | found["nuts"]).items() if isinstance(v, (int, float, dict))}, flush=True)
        REFERENCE.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
