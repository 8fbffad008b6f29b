"""One row of the results: a method with one seed, and what it reaches."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyro_bnn as pb
from pyro_bnn.data.corruptions import image_shift
from tests.benchmarks.datasets import Images, not_mnist
from tests.benchmarks.images.methods import (
    BATCH,
    METHODS,
    RATE,
    Fit,
    Pair,
    Start,
    grid_of,
    network_of,
    numbers_of,
    point,
)
from tests.benchmarks.images.tasks import ONE, TASKS, Settings, Task
from tests.benchmarks.measure import read_results, write_results
from tests.benchmarks.sparse_images import HELD_OUT

RUNS = Path("runs/images")
METRICS = ("accuracy", "nll", "brier", "ece", "aurc")
#: the first test images, which are corrupted
SHIFTED = 500
#: NLLs of held-out images that differ by less are taken for alike
ALIKE = 1e-3


class Study:
    """The methods on one data set.

    :param share: of the usual number of epochs; below 1 for a quick look, of which nothing is written.

    ``train``: all training images; ``inner`` and ``held``: those of them that settings are compared with.
    """

    def __init__(self, data: str, share: float = 1.0) -> None:
        self.data, self.share = data, share
        loaded = self.task.load()
        some, held = (slice(None), HELD_OUT) if share == 1 else (slice(200), 100)
        self.train: Pair = loaded.x_train[some], loaded.y_train[some]
        self.inner: Pair = self.train[0][:-held], self.train[1][:-held]
        self.held: Pair = self.train[0][-held:], self.train[1][-held:]
        self.test: Pair = loaded.x_test[some], loaded.y_test[some]
        self.std = 255 / float(loaded.x_train.max() - loaded.x_train.min())
        self.mean = -float(loaded.x_train.min()) * self.std
        other = self.task.other
        pixels = {other: self.as_ours(grey(TASKS[other].load())[some]), "notMNIST": self.as_ours(not_mnist()[some])}
        self.ood: dict[str, Tensor] = pixels
        self.recipe = {**recipe_of(self.task), "images": len(self.train[1]), "held out": len(self.held[1])}
        self.quick: dict[str, Any] = {"rows": [], "validation": {}}

    def as_ours(self, pixels: Tensor) -> Tensor:
        """Grey images ``[N, height, width]``, 0 to 255, as those of this set are: of as many channels, with a black
        frame where they are smaller, less its mean and in units of its deviation.
        """
        channels, height, width = self.test[0].shape[1:]
        frame = ((width - pixels.shape[-1]) // 2,) * 2 + ((height - pixels.shape[-2]) // 2,) * 2
        framed = F.pad(pixels.float(), frame)
        return ((framed - self.mean) / self.std).unsqueeze(1).repeat(1, channels, 1, 1)

    @property
    def task(self) -> Task:
        return TASKS[self.data]

    # ------------------------------------------------------------------------------------------ what is kept

    @property
    def name(self) -> str:
        return f"images_{self.data}"

    def known(self) -> dict[str, Any]:
        """The rows that are there, and how settings did on held-out images.

        :raises ValueError: when they are of another network or training than that of today.
        """
        if self.share < 1:
            return self.quick
        found = {"rows": [], "validation": {}} | read_results(self.name)
        if (found["rows"] or found["validation"]) and (of := found.get("recipe")) != self.recipe:
            raise ValueError(
                f"results/{self.name}.json has rows of the recipe {of}, and this benchmark has {self.recipe}: they "
                f"cannot stand side by side; remove the file to measure anew"
            )
        return found

    def keep(self, **parts: Any) -> None:
        if self.share < 1:
            self.quick |= parts
            return
        held = {"recipe": self.recipe, **{key: self.known()[key] for key in ("rows", "validation")}, **parts}
        with contextlib.redirect_stdout(None):
            write_results(self.name, held, sorted({row["seed"] for row in held["rows"]}))

    # ----------------------------------------------------------------------------------------------- fitting

    def network(self, seed: int, number: int, pair: Pair) -> tuple[nn.Module, float]:
        """The network of this number, trained with the settings that validation chose, from a file if it is there.

        A file of another network, or of another training, is not taken.
        """
        path = RUNS / f"{self.data}-{len(pair[1])}-{seed}-{number}{'' if self.share == 1 else '-quick'}.pt"
        net, settings = self.task.network(0, 0.0), self.chosen(ONE)
        recipe = {**recipe_of(self.task), **settings}
        kept = torch.load(path, weights_only=True) if path.exists() else {}
        if kept.get("recipe") != recipe:
            found = point(self.start(seed, pair), settings, number)
            kept = {"recipe": recipe, "state": network_of(found).state_dict(), "seconds": found.seconds}
            RUNS.mkdir(parents=True, exist_ok=True)
            torch.save(kept, path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)
        net.load_state_dict(kept["state"])
        return net, kept["seconds"]

    def start(self, seed: int, pair: Pair) -> Start:
        return Start(self.task, pair, seed, lambda number: self.network(seed, number, pair), self.share)

    def fitted(self, method: str, settings: Settings, seed: int) -> Fit:
        if method == ONE and settings == self.chosen(ONE):
            net, seconds = self.network(seed, 0, self.train)
            model = pb.models.Dense(net, pb.likelihoods.Categorical(), len(self.train[1]))
            return Fit(pb.Posterior(model.eval(), pb.models.PointGuide(model).eval()), seconds, numbers_of(net))
        return METHODS[method].run(self.start(seed, self.train), settings)

    def grid(self, method: str) -> list[dict[str, Any]]:
        """The settings of a method; those of the network are among them where a method starts from one."""
        start = {"network": self.chosen(ONE)} if METHODS[method].is_after else {}
        return [{**settings, **start} for settings in grid_of(self.data, method)]

    def chosen(self, method: str) -> dict[str, Any]:
        """The settings with the lowest NLL on held-out training images, each tried once, with the first seeds.

        Of those that these images hardly tell apart the first of the grid: a stronger prior, or the recipe of before.
        """
        if self.judge is not self:
            return self.judge.chosen(method)
        grid = self.grid(method)
        for settings in grid if len(grid) > 1 else ():
            tried = self.tried(method)
            if str(settings) not in tried:
                tried[str(settings)] = self.validated(method, settings)
                self.keep(validation={**self.known()["validation"], method: tried})
        tried = self.tried(method)
        lowest = min((tried[str(one)] for one in grid if str(one) in tried), default=0.0)
        return next(one for one in grid if tried.get(str(one), 0.0) <= lowest + ALIKE)

    @cached_property
    def judge(self) -> Study:
        """The study whose held-out images choose."""
        return Study(self.task.settings_of, self.share) if self.task.settings_of else self

    def tried(self, method: str) -> dict[str, float]:
        """The NLL of held-out images, ``{settings: NLL}``."""
        return dict(self.known()["validation"].get(method, {}))

    def validated(self, method: str, settings: Settings) -> float:
        """The mean over the seeds that the method is validated with; infinite where a fit fails."""
        found = []
        for seed in range(METHODS[method].seeds):
            try:
                posterior = METHODS[method].run(self.start(seed, self.inner), settings).posterior
            except FloatingPointError:
                return math.inf
            draws = draws_of(method, posterior)
            found.append(pb.diagnostics.evaluate(posterior, self.held, num_samples=draws, seed=0)["nll"])
        nll = sum(found) / len(found)
        print(f"  {self.data} {method} {dict(settings)}: validation NLL {nll:.4f}", flush=True)
        return nll

    # ----------------------------------------------------------------------------------------------- scoring

    def rows(self, methods: list[str], seeds: list[int]) -> Iterator[dict[str, Any]]:
        for seed in seeds:
            for method in methods:
                settings = self.chosen(method)
                key = {"method": method, "seed": seed}
                found = [row for row in self.known()["rows"] if row | key == row]
                if any(row["settings"] == settings for row in found):
                    continue
                row = {**key, "settings": settings, **self.scored(method, settings, seed)}
                self.keep(rows=[*(row for row in self.known()["rows"] if row not in found), row])
                yield row

    def scored(self, method: str, settings: Settings, seed: int) -> dict[str, Any]:
        found = self.fitted(method, settings, seed)
        draws = draws_of(method, found.posterior)
        options: dict[str, Any] = {"num_samples": draws, "seed": 0, "batch_size": 1000}
        began = time.perf_counter()
        inside = found.posterior.predict(self.test[0], **options).entropy
        predicting = time.perf_counter() - began
        scores = pb.diagnostics.evaluate(found.posterior, self.test, **options)
        row = {key: scores[key] for key in METRICS}
        for name, x in self.ood.items():
            outside = found.posterior.predict(x, **options).entropy
            row[f"AUROC, {name}"] = pb.diagnostics.auroc(inside, outside)
        shift = image_shift(mean=self.mean / 255, std=self.std / 255)
        some = tuple(part[: SHIFTED if self.share == 1 else 20] for part in self.test)
        shifted = pb.diagnostics.evaluate(found.posterior, some, **options, shift=shift)
        row |= {key: shifted[key] for key in ("cA", "cNLL", "cECE")}
        size = bytes_of(found.posterior)
        row |= {"bytes": size, "numbers": size // 4 if found.numbers is None else found.numbers}
        return row | {"seconds of training": found.seconds, "seconds of predicting": predicting}


def draws_of(method: str, posterior: pb.Posterior) -> int:
    """How many draws of each member a prediction has: not more than are stored."""
    return min(METHODS[method].draws, posterior.num_stored or METHODS[method].draws)


def recipe_of(task: Task) -> dict[str, Any]:
    """What all trainings on a data set have in common."""
    half = {"precision": task.precision} if task.precision else {}
    return {"network": str(task.network(0, 0.0)), "batch_size": BATCH, "lr": RATE, **half}


def grey(loaded: Images) -> Tensor:
    """The test images of one channel with pixels from 0 to 255, ``[N, height, width]``."""
    low, high = float(loaded.x_train.min()), float(loaded.x_train.max())
    return ((loaded.x_test - low) * (255 / (high - low))).squeeze(1)


def bytes_of(posterior: pb.Posterior) -> int:
    """What a posterior takes on disk."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "posterior"
        try:
            posterior.save(path)
        except TypeError:
            posterior.save(path, prior=False)
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
