"""What a run of the command line is asked for, and what it chooses where nothing was asked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pyro_bnn.data import Task
from pyro_bnn.data.task import TaskKind

MethodName = Literal["rank1", "dense", "spike-slab", "bella", "weight-sharing"]
NetworkName = Literal["auto", "cnn", "mlp", "resnet18"]
FamilyName = Literal["normal", "cauchy"]
PriorName = Literal[
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
GroupName = Literal["weight", "kernel", "input", "output"]
UpdateName = Literal["svgd", "wgd", "ensemble"]
SamplingName = Literal["codebook", "mixture", "shared"]

DEFAULT_PRIORS: dict[MethodName, PriorName] = {
    "rank1": "hierarchical-cauchy",
    "dense": "normal",
    "spike-slab": "spike-and-slab",
    "bella": "normal",
    "weight-sharing": "gaussian-mixture",
}

#: methods that have an option; all have the others
METHODS_WITH: dict[str, tuple[MethodName, ...]] = {
    "components": ("rank1", "dense"),
    "family": ("rank1",),
    "sparsity": ("spike-slab",),
    "temperature": ("spike-slab",),
    "samples": ("rank1", "dense", "spike-slab", "weight-sharing"),
    "particles": ("bella",),
    "rank": ("bella",),
    "update": ("bella",),
    "pretrained": ("bella", "weight-sharing"),
    "codes": ("weight-sharing",),
    "sampling": ("weight-sharing",),
}
#: the prior that the option ``group`` is of
GROUPED: PriorName = "spike-and-slab"
#: what is the same as not to ask for an option
NEUTRAL: dict[str, Any] = {"family": "normal", "temperature": 1}


@dataclass(frozen=True)
class Options:
    """What a run was asked for, with everything that was left to choose filled in."""

    data: str
    target: str | None
    method: MethodName
    network: str
    epochs: int
    components: int
    prior: PriorName
    family: FamilyName
    group: GroupName
    sparsity: float
    temperature: float
    batch_size: int
    lr: float
    samples: int
    seed: int
    device: str
    particles: int = 5
    rank: int = 4
    update: UpdateName = "svgd"
    pretrained: str | None = None
    codes: int = 256
    sampling: SamplingName = "codebook"
    task: TaskKind | None = None
    drop: tuple[str, ...] | None = None
    split: str | float | None = None
    category: tuple[str, ...] | None = None
    impute: bool | None = None

    def used(self) -> dict[str, object]:
        """The options that the method has, without those that stand for nothing, for pages."""
        return {
            name: value
            for name, value in asdict(self).items()
            if value is not None and _has(self.method, name) and (name != "group" or self.prior == GROUPED)
        }

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


def check(method: MethodName, asked: Mapping[str, Any]) -> None:
    """Refuses options that do not go with each other or with the method.

    :param asked: options by their names in :class:`Options`; ``None`` for what was not asked for.
    :raises ValueError: when one would have no effect, or ``lr`` is not a positive number.
    """
    if not (asked["lr"] > 0 and math.isfinite(asked["lr"])):
        raise ValueError(f"--lr must be a positive number, got {asked['lr']}")
    for name, value in asked.items():
        if value not in (None, NEUTRAL.get(name)) and not _has(method, name):
            raise ValueError(f"--{name} goes with --method {' or '.join(METHODS_WITH[name])}, and not with {method}")
    if method == "spike-slab" and asked.get("prior") not in (None, GROUPED):
        raise ValueError(f"--method spike-slab has a prior of its own: no --prior {asked['prior']}")
    if asked.get("group") not in (None, "weight") and (asked.get("prior") or DEFAULT_PRIORS[method]) != GROUPED:
        raise ValueError(f"--group {asked['group']} goes with --prior {GROUPED}, which includes weights or not")


def _has(method: MethodName, option: str) -> bool:
    return method in METHODS_WITH.get(option, (method,))


def complete(method: MethodName, asked: Mapping[str, Any], task: Task) -> Options:
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
