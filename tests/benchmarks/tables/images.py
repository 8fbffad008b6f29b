"""The section of LeNet-5 on MNIST and Fashion-MNIST, and of ResNet-20 on CIFAR-10."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.benchmarks.images.methods import METHODS, grid_of
from tests.benchmarks.images.tasks import TASKS
from tests.benchmarks.markdown import table
from tests.benchmarks.measure import read_results
from tests.benchmarks.tables.figures import by_method, mean_and_error

TEXT = """\
## Images: LeNet-5

`python -m tests.benchmarks.images`: 431,080 parameters, with a ReLU after each layer but the last (the Caffe variant
has none after its convolutions); 60,000 training images without augmentation, batches of 32, ten epochs or fewer; four
networks in an ensemble, four members of BatchEnsemble and rank-1, four particles of Bella. Settings were chosen on
10,000 training images of Fashion-MNIST by fits to the other 50,000, and MNIST takes them over. Scale is the deviation
of the prior of weights, spread that of starting factors about 1, or 0 for random signs, noise the dropout rate that the
factors of rank-1 start from. It had more tries than its rivals: its last settings were compared by the mean of three
seeds, those before by two seeds or one, and other learning rates and epochs in runs that are not kept; BatchEnsemble
had seven tries, and one network six. Out of distribution are notMNIST and the other of the two sets; cA, cNLL and cECE
are means over eight corruptions at five severities. Means over seeds, with standard errors. Published, with ten
networks: NLL .016 (MNIST) and .200 (Fashion-MNIST) for an ensemble, .037 and .321 for one network
(uncertainty-baselines).
"""
#: ``{key: (title, decimal places, whether the highest is the best)}``
QUALITY = {
    "accuracy": ("accuracy", 4, True),
    "nll": ("NLL", 4, False),
    "brier": ("Brier", 4, False),
    "ece": ("ECE", 4, False),
    "aurc": ("AURC", 5, False),
}
BEYOND = {
    "AUROC, notMNIST": ("AUROC, notMNIST", 3, True),
    "AUROC, other": ("AUROC, the other set", 3, True),
    "cA": ("cA", 3, True),
    "cNLL": ("cNLL", 3, False),
    "cECE": ("cECE", 3, False),
}
COSTS = {
    "numbers": "numbers",
    "bytes": "bytes",
    "seconds of training": "seconds",
    "seconds of predicting": "prediction",
}
Row = Mapping[str, Any]


def section() -> list[str]:
    parts = []
    for name, task in TASKS.items():
        found = read_results(f"images_{name}").get("rows", [])
        rows = [{**row, "AUROC, other": row[f"AUROC, {task.other}"]} for row in found]
        if not rows:
            continue
        seeds = len({row["seed"] for row in rows})
        parts += [f"**{task.title}** ({seeds} seed{'s' * (seeds > 1)})", figures(rows, QUALITY), figures(rows, BEYOND)]
        judge = task.settings_of or name
        validation = ({"validation": {}} | read_results(f"images_{judge}"))["validation"]
        parts += [costs(rows), chosen(judge, rows, validation)]
    return [TEXT, *parts] if parts else []


def figures(rows: list[Row], columns: Mapping[str, tuple[str, int, bool]]) -> str:
    methods = [name for name in METHODS if any(row["method"] == name for row in rows)]
    return table(["", *(title for title, *_ in columns.values())], by_method(rows, methods, columns))


def chosen(data: str, rows: list[Row], validation: Mapping[str, Mapping[str, float]]) -> str:
    """The settings of each method that has some of its own, and how many of today's grid were not tried.

    :raises ValueError: when rows of one method have different settings, whose mean would be of no method.
    """
    texts = []
    for method in (name for name in METHODS if any(row["method"] == name for row in rows)):
        settings, *others = [row["settings"] for row in rows if row["method"] == method]
        if any(other != settings for other in others):
            found = sorted({str(one) for one in (settings, *others)})
            raise ValueError(
                f"the rows of {method} have different settings, {' and '.join(found)}: expected one for all seeds. "
                "Run the benchmark with all seeds, which measures those again that are no longer the best"
            )
        own = {key: value for key, value in settings.items() if key != "network"}
        grid, tried = grid_of(data, method), validation.get(method, {})
        missing = sum(not is_tried(one, tried) for one in grid) if len(grid) > 1 else 0
        note = f" ({missing} of {len(grid)} settings not tried yet)" if missing else ""
        if own:
            texts.append(f"{method} {', '.join(f'{key} {value}' for key, value in own.items())}{note}")
    return f"Chosen by validation: {'; '.join(texts)}." if texts else ""


def is_tried(settings: Mapping[str, Any], tried: Mapping[str, float]) -> bool:
    """Whether they were tried, with whatever settings of the network that a method starts from."""
    start = str(dict(settings)).removesuffix("}")
    return any(known.startswith((f"{start}}}", f"{start}, 'network'")) for known in tried)


def costs(rows: list[Row]) -> str:
    lines = []
    for method in METHODS:
        own = [row for row in rows if row["method"] == method]
        if own:
            lines.append([method, *(f"{mean_and_error([row[key] for row in own])[0]:,.0f}" for key in COSTS)])
    return table(["cost", *COSTS.values()], lines)
