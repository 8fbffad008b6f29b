"""Recurrent networks on sequences of differing lengths: ``python -m tests.benchmarks.sequences [--quick]``.

A GRU of 32 units on packed sequences, whose last state goes to a linear layer:

- ``vowels``: 640 utterances of two vowels, 12 channels, 7 to 29 steps, by nine speakers (Kudo, Toyama and Shimbo 1999);
  the published 270 train, 370 are tested on.
- ``watch``: 140 recordings of a sensor at the wrist, 6 channels, means over half a second, 37 to 105 of them, of seven
  exercises (Burns et al. 2018); two of the ten subjects are tested on, others for each seed.

Both are scored as they are, with a third of a deviation of noise, and with the first half of each sequence alone. The
networks of an ensemble, and the components of rank-1, are four, each with all the epochs of one network. Every method
has four settings, among which the NLL of a fifth of the training sequences chooses (of watch: two subjects), which the
fits that are compared do not see.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import pyro_bnn as pb
from pyro_bnn.inference import DeepEnsemble, MCDropout, cosine, fit
from pyro_bnn.models import Rank1, Rank1Guide
from tests.benchmarks.datasets import Sequences, vowels, watch
from tests.benchmarks.measure import read_results, write_results

UNITS, NETWORKS, DRAWS, SEEDS = 32, 4, 32, range(5)
METRICS = ("accuracy", "nll", "brier", "ece")
#: test sequences as they are, with noise, and their first halves
FORMS = ("", "noise", "half")
Pair = tuple[dict[str, Tensor], Tensor]
Settings = Mapping[str, Any]


class Recurrent(nn.Module):
    """``[N, steps, channels], [N] -> [N, classes]``."""

    def __init__(self, channels: int, classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.gru = nn.GRU(channels, UNITS, batch_first=True)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.head = nn.Linear(UNITS, classes)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        logits: Tensor = self.head(self.dropout(self.gru(packed)[1][0]))
        return logits


class Split(NamedTuple):
    """Sequences to train on and others to score, with all channels of mean 0 and deviation 1 in training."""

    train: Pair
    test: Pair
    classes: int


def pair(data: Sequences, rows: Tensor, mean: Tensor, deviation: Tensor) -> Pair:
    lengths = data.lengths[rows]
    inside = torch.arange(data.x.shape[1])[:, None] < lengths[:, None, None]
    return {"x": torch.where(inside, (data.x[rows] - mean) / deviation, 0.0), "lengths": lengths}, data.y[rows]


def split(data: Sequences, held: Tensor, within: Tensor) -> Split:
    """Trains on the sequences of ``within`` that are not ``held``; all are booleans ``[N]``."""
    rows = (within & ~held).nonzero()[:, 0]
    steps = torch.cat([data.x[i, : data.lengths[i]] for i in rows])
    scale = steps.mean(0), steps.std(0)
    return Split(pair(data, rows, *scale), pair(data, held.nonzero()[:, 0], *scale), int(data.y.max()) + 1)


def splits(name: str, seed: int) -> tuple[Split, Split]:
    """The split that is reported, and the one within its training sequences that chooses settings."""
    data = vowels() if name == "vowels" else watch()
    everything = torch.ones(len(data.y), dtype=torch.bool)
    if name == "vowels":
        test = data.group == 1
        fifth = torch.rand(len(data.y), generator=torch.Generator().manual_seed(seed)) < 0.2
        return split(data, test, everything), split(data, fifth & ~test, ~test)
    test, held = ((data.group - 1) // 2 == (seed + i) % 5 for i in (0, 1))
    return split(data, test, everything), split(data, held, ~test)


def moved(test: Pair, form: str, seed: int) -> Pair:
    """The test sequences in another form, to which nothing was fitted."""
    inputs, y = test
    if form == "half":
        return {"x": inputs["x"], "lengths": (inputs["lengths"] + 1) // 2}, y
    if form == "noise":
        noise = torch.randn(inputs["x"].shape, generator=torch.Generator().manual_seed(seed))
        return {**inputs, "x": inputs["x"] + noise / 3}, y
    return test


def options(settings: Settings, seed: int, share: float) -> dict[str, Any]:
    epochs = max(1, round(share * settings["epochs"]))
    return {
        **{"epochs": epochs, "batch_size": 32, "lr": 5e-3, "schedule": cosine(warmup=1.0)},
        **{"seed": seed, "progress": False},
    }


def networks(number: int) -> Callable[..., pb.Posterior]:
    def run(data: Split, net: nn.Module, settings: Settings, **trained: Any) -> pb.Posterior:
        return DeepEnsemble(net, LIKELIHOOD, len(data.train[1]), num_networks=number).fit(data.train, **trained)

    return run


def dropout(data: Split, net: nn.Module, settings: Settings, **trained: Any) -> pb.Posterior:
    return MCDropout(net, LIKELIHOOD, len(data.train[1])).fit(data.train, **trained)


def rank1(data: Split, net: nn.Module, settings: Settings, **trained: Any) -> pb.Posterior:
    model = Rank1(net, LIKELIHOOD, len(data.train[1]), prior=settings["prior"])
    guide = Rank1Guide(model, NETWORKS, init_dropout_rate=settings["noise"])
    return fit(model, guide, data.train, **trained)


def grid(**values: tuple[Any, ...]) -> tuple[Settings, ...]:
    return tuple(dict(zip(values, one, strict=True)) for one in product(*values.values()))


LIKELIHOOD = pb.likelihoods.Categorical()
EPOCHS = (20, 80)
#: how a method is fitted, draws of each member in a prediction, and its settings
METHODS: dict[str, tuple[Callable[..., pb.Posterior], int, tuple[Settings, ...]]] = {
    "one network": (networks(1), 1, grid(epochs=(10, 20, 40, 80))),
    "ensemble of 4": (networks(NETWORKS), NETWORKS, grid(epochs=(10, 20, 40, 80))),
    "MC dropout": (dropout, DRAWS, grid(epochs=EPOCHS, dropout=(0.1, 0.4))),
    "rank-1, Normal": (rank1, DRAWS, grid(epochs=EPOCHS, prior=(pb.priors.Normal(1.0, 0.3),), noise=(0.01, 0.1))),
    "rank-1, Cauchy": (rank1, DRAWS, grid(epochs=EPOCHS, prior=(pb.priors.HierarchicalCauchy(),), noise=(0.01, 0.1))),
}


def fitted(method: str, data: Split, settings: Settings, seed: int, share: float) -> pb.Posterior:
    torch.manual_seed(seed)
    net = Recurrent(data.train[0]["x"].shape[2], data.classes, settings.get("dropout", 0.0))
    return METHODS[method][0](data, net, settings, **options(settings, seed, share))


def scores(posterior: pb.Posterior, method: str, test: Pair) -> dict[str, float]:
    found = pb.diagnostics.evaluate(posterior, test, num_samples=METHODS[method][1], seed=0)
    return {name: found[name] for name in METRICS}


def measure(name: str, method: str, seed: int, share: float = 1.0) -> dict[str, Any]:
    whole, inner = splits(name, seed)
    start = time.perf_counter()
    tried = [
        (scores(fitted(method, inner, one, seed, share), method, inner.test)["nll"], i)
        for i, one in enumerate(METHODS[method][2])
    ]
    chosen = METHODS[method][2][min(tried)[1]]
    began = time.perf_counter()
    posterior = fitted(method, whole, chosen, seed, share)
    row: dict[str, Any] = {
        "set": name,
        "method": method,
        "seed": seed,
        "settings": {k: str(v) for k, v in chosen.items()},
    }
    row["validation"] = [nll for nll, _ in tried]
    row["seconds of the last fit"], row["seconds"] = time.perf_counter() - began, time.perf_counter() - start
    row["parameters"] = numbers(posterior)
    for form in FORMS:
        found = scores(posterior, method, moved(whole.test, form, seed))
        row |= {f"{key}, {form}" if form else key: value for key, value in found.items()}
    return row


def numbers(posterior: pb.Posterior) -> int:
    """How many numbers the posterior keeps."""
    stored = posterior.num_stored
    own = sum(p.numel() for p in posterior.model.core().net.parameters())  # type: ignore[attr-defined]
    if stored:
        return own * stored
    guide = sum(p.numel() for p in posterior.guide.parameters())  # type: ignore[union-attr]
    return own + guide


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=("vowels", "watch"), default=["vowels", "watch"], metavar="NAME")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="one seed, a twentieth of the epochs, not written")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for seed, name, method in product(SEEDS[:1] if asked.quick else SEEDS, asked.sets, asked.methods):
        known = [] if asked.quick else read_results("sequences").get("rows", [])
        if any((row["set"], row["method"], row["seed"]) == (name, method, seed) for row in known):
            continue
        row = measure(name, method, seed, 0.05 if asked.quick else 1.0)
        figures = "  ".join(f"{key} {row[key]:.3f}" for key in (*METRICS, "nll, noise", "nll, half"))
        print(f"{name:6} {method:14} seed {seed}: {figures}  {row['seconds']:.0f} s  {row['settings']}", flush=True)
        if not asked.quick:
            rows = [*known, row]
            write_results("sequences", {"rows": rows}, sorted({row["seed"] for row in rows}))


if __name__ == "__main__":
    main()
