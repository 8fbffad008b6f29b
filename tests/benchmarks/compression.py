"""Codebooks of trained networks: ``python -m tests.benchmarks.compression [--data mnist] [--network lenet5]``.

From one deterministic network a mean field, and from that mean field codebooks, each trained on for some epochs: the
three modes of sampling; of the LeNets, points of accuracy against bits a weight; of LeNet-300-100, what each stage is
worth. Settings were chosen by ``--validate``, which trains on the first 50,000 training images and measures on the
others. What is done is kept in ``runs/``, and an interrupted run goes on from there.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn.command.recipes import trained_network
from pyro_bnn.inference import cosine, fit
from pyro_bnn.inference.svi.elbo import MixtureELBO
from pyro_bnn.models import (
    CodebookGuide,
    Dense,
    MeanFieldGuide,
    MergeCodes,
    PointGuide,
    SharedWeights,
    WeightSharing,
)
from pyro_bnn.models.weight_sharing.plots import PUBLISHED, plot_frontier
from pyro_bnn.priors import CodebookPrior, GaussianMixture, pretrained
from tests.benchmarks.datasets import CLASSES, images
from tests.benchmarks.measure import read_results, write_results
from tests.benchmarks.sparse_images import HELD_OUT
from tests.benchmarks.sparse_images import build as lenet

RUNS = Path("runs/compression")
LIKELIHOOD = pb.likelihoods.Categorical()
OTHER = {"mnist": "fashion", "fashion": "mnist"}
DRAWS = 16
#: most weights are nearly zero, a tenth is not: the mean field needs few of them
PRIOR = GaussianMixture(locs=[0.0, 0.0], scales=[0.01, 0.2], weights=[0.9, 0.1])
Pair = tuple[Tensor, Tensor]
Row = dict[str, Any]


class SmallResNet(nn.Module):
    """Three stages of one basic block with 16, 32 and 64 channels and batch normalisation, 0.08 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        stages = [(16, 16, 1), (16, 32, 2), (32, 64, 2)]
        self.stages = nn.Sequential(*(Block(*stage) for stage in stages))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.norm(self.stem(x)).relu())
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class Block(nn.Module):
    def __init__(self, inside: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, out, 3, stride=stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        self.shortcut = nn.Identity() if inside == out else nn.Conv2d(inside, out, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return (y + self.shortcut(x)).relu()


@dataclass(frozen=True)
class Settings:
    """AdamW with its rate along half a cosine throughout.

    :param images: to train on.
    :param epochs, lr: of the deterministic network; ``field_epochs`` of the mean field that starts at it.
    :param around: deviation of a prior around the weights of that network; no other was tried.
    :param code_epochs, code_lr: of codes.
    :param codes: K of the three modes and of the ablation; ``frontier_codes`` that of the frontier, where the rate
        leaves fewer.
    :param temperature: of the likelihood of a second mean field and of its frontier, of ``cold_rates``; ``None`` for no
        such rows.
    """

    images: int = 50_000
    epochs: int = 10
    field_epochs: int = 10
    lr: float = 1e-3
    batch_size: int = 128
    around: float = 0.05
    code_epochs: int = 5
    code_lr: float = 3e-4
    codes: int = 256
    frontier_codes: int = 32
    rates: tuple[float, ...] = (0.05, 0.2, 0.5, 1.0)
    temperature: float | None = None
    cold_rates: tuple[float, ...] = (0.2, 0.5, 1.0)


SETTINGS = {
    "lenet300100": Settings(),
    "lenet5": Settings(images=60_000, field_epochs=20, temperature=0.5),
    "resnet": Settings(),
}


def build(network: str) -> nn.Module:
    torch.manual_seed(0)
    return SmallResNet() if network == "resnet" else lenet(network, 0)


class Study:
    """One network on one data set, with what is known of it so far."""

    def __init__(self, data: str, network: str, settings: Settings, validate: bool, only: list[str]) -> None:
        self.data, self.network, self.settings, self.only = data, network, settings, only
        x, y, *test = images(data)
        size = len(y) - HELD_OUT if validate else settings.images
        self.train: Pair = x[:size], y[:size]
        self.test: Pair = (x[-HELD_OUT:], y[-HELD_OUT:]) if validate else (test[0], test[1])
        self.ood = images(OTHER[data]).x_test
        RUNS.mkdir(parents=True, exist_ok=True)
        self.path = RUNS / f"{data}-{network}{'-validation' if validate else ''}.pt"
        self.states = RUNS / f"{data}-{network}-{size}-trained.pt"
        self.rows: dict[str, Row] = {}
        if self.path.exists() and (saved := torch.load(self.path))["settings"] == asdict(settings):
            self.rows = saved["rows"]

    def fit(self, model: Any, guide: Any, epochs: int, lr: float, callbacks: Any = ()) -> pb.Posterior:
        return fit(
            *(model, guide, self.train),
            epochs=epochs,
            batch_size=self.settings.batch_size,
            lr=lr,
            schedule=cosine(),
            callbacks=callbacks,
            seed=0,
        )

    def start(self, temperature: float = 1.0) -> tuple[nn.Module, WeightSharing, MeanFieldGuide]:
        """The deterministic network, and the mean field that starts there; measured once, trained once.

        :param temperature: of the likelihood of the mean field.
        """
        s, size = self.settings, len(self.train[1])
        of_start = ("epochs", "field_epochs", "lr", "batch_size")
        key = {name: value for name, value in asdict(s).items() if name in of_start}
        known = torch.load(self.states) if self.states.exists() else {}
        if known.get("settings") != key:
            known = {"settings": key}
            model = Dense(build(self.network), LIKELIHOOD, size)
            known["network"] = trained_network(self.fit(model, PointGuide(model), s.epochs, s.lr)).state_dict()
        net = build(self.network)
        net.load_state_dict(known["network"])
        model = WeightSharing(net, pb.likelihoods.Categorical(temperature=temperature), size, prior=PRIOR)
        field = MeanFieldGuide(model)
        at = "" if temperature == 1 else f" at {temperature:g}"
        if f"field{at}" not in known:
            self.fit(model, field, s.field_epochs, s.lr)
            known |= {f"model{at}": model.state_dict(), f"field{at}": field.state_dict()}
            torch.save(known, self.states.with_suffix(".tmp"))
            os.replace(self.states.with_suffix(".tmp"), self.states)
        model.load_state_dict(known[f"model{at}"])
        field.load_state_dict(known[f"field{at}"])
        return net, model, field

    def row(self, name: str, make: Callable[[], tuple[pb.Posterior, Row]]) -> None:
        """Measures what ``make`` trains, unless it is known."""
        if self.only and name.split()[0] not in self.only:
            return
        if name not in self.rows:
            posterior, row = make()
            draws = 1 if isinstance(posterior.guide, PointGuide) else DRAWS
            row |= pb.diagnostics.evaluate(posterior, self.test, self.ood, num_samples=draws, batch_size=1000, seed=0)
            row["loss"] = self.loss(posterior)
            self.rows[name] = {"data": self.data, "network": self.network, "name": name} | row
            torch.save({"settings": asdict(self.settings), "rows": self.rows}, self.path.with_suffix(".tmp"))
            os.replace(self.path.with_suffix(".tmp"), self.path)
        table([self.rows[name]])

    def loss(self, posterior: pb.Posterior) -> float | None:
        """The negative ELBO a datum, in nats, from one pass over the training images."""
        if isinstance(posterior.guide, PointGuide):
            return None
        model, guide = posterior.model, posterior.guide
        total, objective = 0.0, MixtureELBO()
        guide.train()  # type: ignore[attr-defined]
        with torch.no_grad():
            for x, y in zip(*(v.split(5000) for v in self.train), strict=True):
                total += float(objective.loss(model, guide, x, y)) * len(y) / len(self.train[1]) ** 2
        guide.eval()  # type: ignore[attr-defined]
        return total

    def codebook(
        self,
        frozen: bool = False,
        merge: bool = True,
        own_prior: bool = False,
        temperature: float = 1.0,
        **options: Any,
    ) -> tuple[pb.Posterior, Row]:
        """Codes of the mean field, trained by the ELBO under its prior, or the codebook's own, while they merge."""
        _, model, field = self.start(temperature)
        if own_prior:
            prior = {name: CodebookPrior() for name in model.weights()} | {".*": PRIOR}
            state = model.state_dict()
            model = WeightSharing(unfrozen(model), model.likelihood, len(self.train[1]), prior=prior)
            model.load_state_dict(state)
        s = self.settings
        guide = CodebookGuide.from_mean_field(model, field, **({"codes": s.codes, "seed": 0} | options))
        posterior = pb.Posterior(model, guide)
        if not frozen:
            callbacks = [MergeCodes(stop=max(1, s.code_epochs // 2))] if merge else []
            posterior = self.fit(model, guide, s.code_epochs, s.code_lr, callbacks)
        return posterior, cost(model, guide) | ({} if temperature == 1 else {"temperature": temperature})

    def shared(self) -> tuple[pb.Posterior, Row]:
        posterior, row = self.codebook(merge=False, frozen=True)
        codes: Any = posterior.guide
        net = unfrozen(posterior.model)
        model = SharedWeights(net, LIKELIHOOD, len(self.train[1]), codebook=codes.book, prior=PRIOR)
        guide = model.shared_guide(codes)
        s = self.settings
        return self.fit(model, guide, s.code_epochs, s.code_lr), row

    def methods(self) -> None:
        net, model, field = self.start()
        n, (_, moments) = sum(p.numel() for p in net.parameters()), beside(model)
        point = Dense(net, LIKELIHOOD, len(self.train[1]))
        self.row(
            "deterministic",
            lambda: (pb.Posterior(point, PointGuide(point)), {"trainable": n, "bytes": 4 * (n + moments)}),
        )
        self.row("mean-field", lambda: (pb.Posterior(model, field), cost_of_field(model, field)))
        self.row("codebook", self.codebook)
        if self.network == "resnet":  # few weights, each of which matters
            self.row("codebook by the divergence", lambda: self.codebook(distance="divergence"))
            self.row("codebook frozen", lambda: self.codebook(frozen=True))
        self.row("codebook as its own prior", lambda: self.codebook(own_prior=True))
        self.row("mixture", lambda: self.codebook(sampling="mixture"))
        self.row("shared", self.shared)

    def around(self) -> None:
        """A mean field whose prior lies around the trained network: of no use for codes, but nearer to it."""

        def make() -> tuple[pb.Posterior, Row]:
            net, _, _ = self.start()
            model = WeightSharing(net, LIKELIHOOD, len(self.train[1]), prior=pretrained(self.settings.around))
            field = MeanFieldGuide(model)
            posterior = self.fit(model, field, self.settings.epochs, self.settings.lr)
            return posterior, cost_of_field(model, field)

        self.row("mean-field around the network", make)

    def frontier(self) -> None:
        """All random parameters, biases too, in one codebook with a code at zero; labels cost what they take."""
        own: dict[str, Any] = {"distance": "divergence", "zero": True, "blend": 0.0, "outliers": 0.0, "smallest": 0}
        own |= {"coded": ".*", "codes": self.settings.frontier_codes, "merge": False}
        for rate in self.settings.rates:
            self.row(f"frontier {rate:g}", lambda rate=rate: self.codebook(**own, rate=rate))  # type: ignore[misc]
        if (cold := self.settings.temperature) is None:
            return
        _, model, field = self.start(cold)
        self.row("cold mean-field", lambda: (pb.Posterior(model, field), cost_of_field(model, field)))
        for rate in self.settings.cold_rates:
            options = own | {"rate": rate, "temperature": cold}
            self.row(f"cold frontier {rate:g}", lambda options=options: self.codebook(**options))  # type: ignore[misc]

    def ablation(self) -> None:
        few = {"codes": 8}  # with 32, nothing is worth more than 0.04 points
        self.row("ablation all stages", lambda: self.codebook(**few))
        self.row("ablation no outliers", lambda: self.codebook(**few, outliers=0.0, smallest=0))
        self.row("ablation no blending", lambda: self.codebook(**few, blend=0.0))
        self.row("ablation blending of 5 %", lambda: self.codebook(**few, blend=0.05))
        self.row("ablation no merging", lambda: self.codebook(**few, merge=False))
        self.row("ablation hard k-means", lambda: self.codebook(**few, iterations=0))
        self.row("ablation codes frozen", lambda: self.codebook(**few, frozen=True))
        self.row("ablation by the divergence", lambda: self.codebook(**few, distance="divergence"))
        self.row("ablation by the divergence, frozen", lambda: self.codebook(**few, distance="divergence", frozen=True))


def unfrozen(model: Any) -> nn.Module:
    """The network of a model, for another model: its weights may be made random again."""
    return copy.deepcopy(model.core().net).requires_grad_()


def beside(model: nn.Module) -> tuple[int, int]:
    """Point estimates of normalisation layers, and their running statistics."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad), sum(
        b.numel()
        for b in model.core().net.buffers()
        if b.is_floating_point()  # type: ignore[operator]
    )


def cost_of_field(model: nn.Module, guide: MeanFieldGuide) -> Row:
    """Trained numbers, and bytes of them and of running statistics."""
    points, moments = beside(model)
    trainable = sum(p.numel() for p in guide.parameters()) + points
    return {"trainable": trainable, "bytes": 4 * (trainable + moments)}


def cost(model: nn.Module, guide: CodebookGuide) -> Row:
    """Trained numbers, and bytes of everything but the headers of files; what has no code takes 8 bytes a parameter."""
    report = guide.compression_report()
    points, moments = beside(model)
    return {
        "trainable": report["trainable"] + report["other_trainable"] + points,
        "bytes": report["bytes"]["total"] + 4 * (report["other_trainable"] + points + moments),
        "codes": report["codes"],
        "outliers": report["outliers"],
        "label_entropy": report["label_entropy"],
    }


def table(rows: list[Row]) -> None:
    for row in rows:
        numbers = "  ".join(
            f"{k} {row[k]:.4f}" for k in ("accuracy", "nll", "ece", "ood_auroc", "loss") if row.get(k) is not None
        )
        sizes = (
            f"trainable {row['trainable']:,}  bytes {row['bytes']:,}  ratio {row['ratio']:.1f}"
            if "ratio" in row
            else ""
        )
        print(f"{row['data']} {row['network']} {row['name']:38s}", numbers, sizes, sep="  |  ", flush=True)


def with_ratios(rows: list[Row]) -> Iterator[Row]:
    """Compression against float32, including everything that is stored, and bits a weight."""
    whole = next(row["bytes"] for row in rows if row["name"] == "deterministic")
    for row in rows:
        yield row | {"ratio": whole / row["bytes"], "bits": 32 * row["bytes"] / whole}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", choices=CLASSES, default="mnist")
    parser.add_argument("--network", choices=SETTINGS, required=True)
    parser.add_argument("--validate", action="store_true", help="on held-out training images; nothing is written")
    parser.add_argument("--only", nargs="+", default=[], help="first words of the rows wanted")
    options = parser.parse_args()
    settings = SETTINGS[options.network]
    study = Study(options.data, options.network, settings, options.validate, options.only)
    study.methods()
    if options.network != "resnet":
        study.frontier()
    study.around()
    if options.network == "lenet300100":
        study.ablation()
    if options.validate or options.only:
        return
    rows = list(with_ratios(list(study.rows.values())))
    table(rows)
    key = (options.data, options.network)
    known = read_results("compression")
    rows += [row for row in known.get("rows", []) if (row["data"], row["network"]) != key]
    found = {
        "settings": known.get("settings", {}) | {" ".join(key): asdict(settings)},
        "published": PUBLISHED,
        "rows": rows,
    }
    write_results("compression", found, seeds=[0], part=" ".join(key), keep=True)
    points = [
        row | ({"label": f"likelihood at temperature {row['temperature']:g}"} if "temperature" in row else {})
        for row in rows
        if "frontier" in row["name"].split() and row["data"] == "mnist"
    ]
    if points:
        plot_frontier(points).savefig("docs/compression.png", dpi=90)


if __name__ == "__main__":
    main()
