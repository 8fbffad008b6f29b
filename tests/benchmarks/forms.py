"""What engines are off by on each form of random weights: ``python -m tests.benchmarks.forms``.

A 1-3-1 tanh network and 16 rows, see :mod:`tests.forms`. The reference is a closed form for a random last layer, and
draws of the prior weighted by their likelihood for the others. For every seed of the engine, the root mean square
difference of the means of the function at 21 probes, in standard deviations of the reference, and the geometric mean
ratio of its standard deviations to those of the reference.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import pyro_bnn as pb
from tests.benchmarks.measure import report
from tests.forms import (
    FORMS,
    by_low_rank_normal,
    by_mean_field,
    by_nuts,
    by_sghmc,
    by_svgd,
    distance,
    mean_field_ratio,
    moments,
    reference,
)

DRAWS = 2400
SEEDS = (0, 1)
#: the engine, and how many draws of each member are looked at
ENGINES: dict[str, tuple[Callable[[str, int], pb.Posterior], int | None]] = {
    "NUTS of Pyro, one chain of 150 draws": (by_nuts, 150),
    "SGHMC, 4 chains of 600 draws": (by_sghmc, DRAWS),
    "mean field": (lambda form, seed: by_mean_field(form, 1, seed), DRAWS),
    "mean field, mixture of 3": (lambda form, seed: by_mean_field(form, 3, seed), DRAWS),
    "AutoLowRankMultivariateNormal, rank 3": (by_low_rank_normal, DRAWS),
    "SVGD, 20 particles": (lambda form, seed: by_svgd(form, 20, seed), None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    options = parser.parse_args()
    rows: list[dict[str, Any]] = [
        {"form": "last layer", "engine": "the best factorised Normal", "off": 0.0, "ratio": mean_field_ratio()}
    ]
    for form in options.forms:
        for name, (infer, draws) in ENGINES.items():
            found = [distance(moments(infer(form, seed), draws), reference(form)) for seed in SEEDS]
            off, ratio = (sum(part) / len(SEEDS) for part in zip(*found, strict=True))
            rows.append({"form": form, "engine": name, "off": off, "ratio": ratio})
            rows[-1] |= {"off_by_seed": [f[0] for f in found], "ratio_by_seed": [f[1] for f in found]}
            print(form, name, f"{off:.2f} {ratio:.2f}", flush=True)
    report("forms", rows, SEEDS)


if __name__ == "__main__":
    main()
