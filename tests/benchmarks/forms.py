"""What engines are off by on a random last layer with a closed form: ``python -m tests.benchmarks.forms``.

A 1-3-1 tanh network whose last layer is random and whose rest is frozen, 16 rows: see :mod:`tests.last_layer`. For
every seed of the engine, the root mean square difference of the means of the function at 21 probes, in exact standard
deviations, and the geometric mean ratio of its standard deviations to the exact ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import pyro_bnn as pb
from tests.benchmarks.measure import report
from tests.last_layer import by_low_rank_normal, by_mean_field, by_sghmc, by_svgd, distance, mean_field_ratio

DRAWS = 4000
SEEDS = (0, 1, 2)
#: the engine, and how many draws of each member are looked at
ENGINES: dict[str, tuple[Callable[[int], pb.Posterior], int | None]] = {
    "SGHMC, 4 chains of 1,000 draws": (by_sghmc, DRAWS),
    "mean field": (lambda seed: by_mean_field(1, seed), DRAWS),
    "mean field, mixture of 3": (lambda seed: by_mean_field(3, seed), DRAWS),
    "AutoLowRankMultivariateNormal, rank 3, 3,000 steps": (lambda seed: by_low_rank_normal(3000, seed), DRAWS),
    "AutoLowRankMultivariateNormal, rank 3, 10,000 steps": (lambda seed: by_low_rank_normal(10_000, seed), DRAWS),
    "SVGD, 20 particles": (lambda seed: by_svgd(20, seed), None),
    "SVGD, 50 particles": (lambda seed: by_svgd(50, seed), None),
}


def main() -> None:
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    rows: list[dict[str, Any]] = [{"engine": "the best factorised Normal", "off": 0.0, "ratio": mean_field_ratio()}]
    for name, (infer, draws) in ENGINES.items():
        found = [distance(infer(seed), draws) for seed in SEEDS]
        off, ratio = (sum(part) / len(SEEDS) for part in zip(*found, strict=True))
        rows.append({"engine": name, "off": off, "ratio": ratio, "off_by_seed": [f[0] for f in found]})
        rows[-1]["ratio_by_seed"] = [f[1] for f in found]
    report("forms", rows, SEEDS)


if __name__ == "__main__":
    main()
