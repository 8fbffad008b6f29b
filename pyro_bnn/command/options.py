"""The options of a run of the command line, and their defaults."""

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

#: the methods that an option is for; options that are not listed are for all methods
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
#: the prior that the option ``group`` is for
GROUPED: PriorName = "spike-and-slab"
#: rows of a training step, unless few rows would then be passed in fewer steps than this
LARGEST_BATCH, FEWEST_STEPS = 64, 4
#: values that are the same as not giving the option
NEUTRAL: dict[str, Any] = {"family": "normal", "temperature": 1}


@dataclass(frozen=True)
class Options:
    """The options of a run, with defaults filled in."""

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
        """The options that have an effect on the run, for pages."""
        return {
            name: value
            for name, value in asdict(self).items()
            if value is not None and _has(self.method, name) and (name != "group" or self.prior == GROUPED)
        }

    def describe(self) -> str:
        """A short description of the method, for headings."""
        match self.method:
            case "spike-slab":
                return f"spike-slab, {self.samples} draws"
            case "bella":
                return f"bella, {self.particles} particles by {self.update}"
            case "weight-sharing":
                return f"weight sharing, at most {self.codes} codes"
        return f"{self.method}, {self.components} component{'s' if self.components > 1 else ''}"


def check(method: MethodName, asked: Mapping[str, Any]) -> None:
    """Refuses options that do not apply to the method, or contradict each other.

    :param asked: options by their names in :class:`Options`; ``None`` if an option was not given.
    :raises ValueError: when one would have no effect, or ``lr`` is not a positive number.
    """
    if not (asked["lr"] > 0 and math.isfinite(asked["lr"])):
        raise ValueError(f"--lr must be a positive number, got {asked['lr']}")
    for name, value in asked.items():
        if value not in (None, NEUTRAL.get(name)) and not _has(method, name):
            raise ValueError(f"--{name} is for --method {' or '.join(METHODS_WITH[name])}, and not for {method}")
    if method == "spike-slab" and asked.get("prior") not in (None, GROUPED):
        raise ValueError(f"--method spike-slab has its own prior: leave out --prior {asked['prior']}")
    if asked.get("group") not in (None, "weight") and (asked.get("prior") or DEFAULT_PRIORS[method]) != GROUPED:
        raise ValueError(f"--group {asked['group']} is for --prior {GROUPED}, which includes or excludes groups")


def _has(method: MethodName, option: str) -> bool:
    return method in METHODS_WITH.get(option, (method,))


def complete(method: MethodName, asked: Mapping[str, Any], task: Task) -> Options:
    """Fills in the defaults.

    :param asked: options by their names in :class:`Options`; ``None`` if an option was not given.
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
    rows = len(task.x_train)
    given["batch_size"] = min(given.get("batch_size", max(1, min(LARGEST_BATCH, rows // FEWEST_STEPS))), rows)
    return Options(method=method, **(chosen | given))
