"""What a run of the command line is asked for, and what it chooses where nothing was asked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pyro_bnn.data import Task

Method = Literal["rank1", "dense", "spike-slab", "bella", "weight-sharing"]
Network = Literal["auto", "cnn", "mlp", "resnet18"]
Family = Literal["normal", "cauchy"]
Prior = Literal[
    "hierarchical-cauchy",
    "hierarchical-normal",
    "horseshoe",
    "normal",
    "cauchy",
    "laplace",
    "student-t",
    "spike-and-slab",
    "gaussian-mixture",
]
Group = Literal["weight", "kernel", "input", "output"]
Update = Literal["svgd", "wgd", "ensemble"]
Sampling = Literal["codebook", "mixture", "shared"]

DEFAULT_PRIORS: dict[Method, Prior] = {
    "rank1": "hierarchical-cauchy",
    "dense": "normal",
    "spike-slab": "spike-and-slab",
    "bella": "normal",
    "weight-sharing": "gaussian-mixture",
}


@dataclass(frozen=True)
class Options:
    """What a run was asked for, with everything that was left to choose filled in."""

    data: str
    target: str | None
    method: Method
    network: str
    epochs: int
    components: int
    prior: Prior
    family: Family
    group: Group
    sparsity: float
    temperature: float
    batch_size: int
    lr: float
    samples: int
    seed: int
    device: str
    particles: int = 5
    rank: int = 4
    update: Update = "svgd"
    pretrained: str | None = None
    codes: int = 256
    sampling: Sampling = "codebook"

    def describe(self) -> str:
        """The method in a few words, for headings."""
        match self.method:
            case "spike-slab":
                return f"spike-slab, {self.samples} draws"
            case "bella":
                return f"bella, {self.particles} particles by {self.update}"
            case "weight-sharing":
                return f"weight sharing, at most {self.codes} codes"
        return f"{self.method}, {self.components} component{'s' if self.components > 1 else ''}"


def check(method: Method, asked: Mapping[str, Any]) -> None:
    """Refuses options that do not go with each other or with the method.

    :param asked: options by their names in :class:`Options`; ``None`` for what was not asked for.
    :raises ValueError: when one would have no effect, or ``lr`` is not a positive number.
    """

    def asks(*names: str) -> bool:
        return any(asked.get(name) is not None for name in names)

    not_normal = asked.get("family") not in (None, "normal")
    if not (asked["lr"] > 0 and math.isfinite(asked["lr"])):
        raise ValueError(f"--lr must be a positive number, got {asked['lr']}")
    if method == "dense" and not_normal:
        raise ValueError(f"--family {asked['family']} goes with --method rank1; --method dense has Normals")
    if method != "spike-slab" and (asks("sparsity") or asked.get("temperature") not in (None, 1)):
        raise ValueError("--sparsity and --temperature go with --method spike-slab")
    if method == "spike-slab" and (
        not_normal or asks("components") or asked.get("prior") not in (None, "spike-and-slab")
    ):
        raise ValueError("--method spike-slab has a prior of its own and no guide: no --prior, --family, --components")
    if method != "bella" and asks("particles", "rank", "update"):
        raise ValueError("--particles, --rank and --update go with --method bella")
    if method == "bella" and (not_normal or asks("components", "samples")):
        raise ValueError("--method bella has particles: no --family, --components, --samples")
    if method != "weight-sharing" and asks("codes", "sampling"):
        raise ValueError("--codes and --sampling go with --method weight-sharing")
    if method == "weight-sharing" and (not_normal or asks("components")):
        raise ValueError("--method weight-sharing has a codebook of Normals: no --family, --components")
    if method not in ("bella", "weight-sharing") and asks("pretrained"):
        raise ValueError("--pretrained goes with --method bella or weight-sharing")


def complete(method: Method, asked: Mapping[str, Any], task: Task) -> Options:
    """Fills in what was left to choose.

    :param asked: options by their names in :class:`Options`; ``None`` for what was not asked for.
    """
    chosen = {
        "target": None,
        "network": "cnn" if task.x_train.dim() == 4 else "mlp",
        "components": 4 if method == "rank1" else 1,
        "prior": DEFAULT_PRIORS[method],
        "family": "normal",
        "group": "weight",
        "sparsity": 0.8 if method == "spike-slab" else 0.0,
        "temperature": 1.0,
        "samples": 1 if method == "bella" else 16,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    given["batch_size"] = min(given["batch_size"], len(task.x_train))
    return Options(method=method, **(chosen | given))
