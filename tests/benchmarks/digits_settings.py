"""Settings of ``pyro-bnn fit`` compared by cross-validation: ``python -m tests.benchmarks.digits_settings``.

Five folds of the 1,257 training digits; the test images play no part. Every image is predicted once, by a network that
has not seen it. Takes an hour on one core.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from sklearn.model_selection import StratifiedKFold

import pyro_bnn as pb
from pyro_bnn.data import digits
from pyro_bnn.inference import cosine, fit
from pyro_bnn.models import Dense, PointGuide, Rank1, Rank1Guide
from pyro_bnn.models.architectures import digits_cnn
from tests.benchmarks.measure import report

EPOCHS, MEMBERS, FOLDS = 60, 4, 5
DEFAULTS: dict[str, Any] = {"lr": 1e-2, "batch_size": 64, "rate": 1e-3, "spread": 0.5, "annealing": 0.0}
BOTH: list[dict[str, Any]] = [{}, {"lr": 5e-3}, {"lr": 2e-2}, {"batch_size": 128}]
RANK1: list[dict[str, Any]] = [*BOTH, {"annealing": 40.0}, {"spread": 0.25}, {"rate": 1e-2}, {"rate": 5e-2}]


def score(method: str, changes: dict[str, Any]) -> dict[str, Any]:
    task, options = digits(), DEFAULTS | changes
    found: list[dict[str, float]] = []
    sizes: list[int] = []
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=1).split(task.x_train, task.y_train)
    for fold, indices in enumerate(folds):
        train, held_out = map(torch.as_tensor, indices)
        torch.manual_seed(fold)
        net, likelihood = digits_cnn(), pb.likelihoods.Categorical()
        model: Any = Dense(net, likelihood, len(train))
        guide: Any = PointGuide(model)
        if method == "rank1":
            model = Rank1(net, likelihood, len(train))
            guide = Rank1Guide(
                model,
                MEMBERS,
                init_dropout_rate=options["rate"],
                init_means=pb.priors.Normal(1.0, options["spread"]),
            )
        posterior = fit(
            model,
            guide,
            (task.x_train[train], task.y_train[train]),
            epochs=EPOCHS,
            batch_size=options["batch_size"],
            lr=options["lr"],
            schedule=cosine(warmup=1.0),
            kl_annealing=options["annealing"],
            seed=fold,
            progress=False,
        )
        pair = task.x_train[held_out], task.y_train[held_out]
        found.append(pb.diagnostics.evaluate(posterior, pair, task.x_ood, seed=fold))
        sizes.append(len(held_out))
    means = {k: sum(f[k] * n for f, n in zip(found, sizes, strict=True)) / sum(sizes) for k in found[0]}
    nlls = [f["nll"] for f in found]
    return {"method": method, "changes": changes, **means, "nll_by_fold": nlls, "nll_spread": statistics.stdev(nlls)}


def main() -> None:
    runs = [("deterministic", c) for c in BOTH] + [("rank1", c) for c in RANK1]
    report("digits_settings", [score(method, changes) for method, changes in runs], seeds=range(FOLDS))


if __name__ == "__main__":
    main()
