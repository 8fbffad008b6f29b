"""The section of particles around trained networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.benchmarks.markdown import table
from tests.benchmarks.measure import read_results
from tests.benchmarks.tables.figures import by_method, difference

TEXT = """\
## Fine-tuning trained networks

`python -m tests.benchmarks.finetune`: five particles of rank 4 and a new output layer, against moving all weights, for
the epochs of one particle or for as many as five have together ("long"). Means over {seeds} seeds, which draw the
training rows too, with standard errors; mutual information, in nats, is how much particles differ.
"""
BESIDE = """\
Repulsion is what "svgd" and "wgd" add to the plain ensemble of particles, from the same starts and the same batches:
the differences below are of runs with the same seed, with the standard error of their mean, and bold where they are
better by more than it.
"""
TITLES = {
    "mobilenet": "MobileNetV2 of ImageNet, 500 animals of CIFAR-10; its vehicles are out of distribution",
    "minilm": "MiniLM, 400 sentences of film reviews; the manual of Python is out of distribution",
    "resnet": "ResNet-18 of Fashion-MNIST, 200 digits of MNIST; clothes are out of distribution",
}
#: ``{key: (title, decimal places, whether the highest is the best)}``
COLUMNS = {
    "accuracy": ("accuracy", 3, True),
    "nll": ("NLL", 3, False),
    "ece": ("ECE", 3, False),
    "ood_auroc": ("OOD AUROC", 3, True),
}
CONTROL, REPELLED = "ensemble", ("svgd", "wgd", "wgd, outputs")


def section() -> list[str]:
    tasks: Mapping[str, Any] = read_results("finetune").get("tasks", {})
    parts = []
    for name, title in TITLES.items():
        if name in tasks:
            parts += [f"**{title}**", of_task(tasks[name]["rows"])]
    if not parts:
        return []
    rows = {name: tasks[name]["rows"] for name in TITLES if name in tasks}
    seeds = len({row["seed"] for of in rows.values() for row in of})
    return [TEXT.format(seeds=seeds), *parts, BESIDE, beside_the_control(rows)]


def of_task(rows: list[Mapping[str, Any]]) -> str:
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines = by_method(rows, methods, COLUMNS)
    information = by_method(rows, methods, {"mutual_information": ("", 3, True)})
    titles = ["", *(title for title, *_ in COLUMNS.values()), "mutual information"]
    return table(titles, [[*line, text.strip("*")] for line, (_, text) in zip(lines, information, strict=True)])


def beside_the_control(tasks: Mapping[str, list[Mapping[str, Any]]]) -> str:
    """What repulsion adds, in each figure of quality."""
    lines = []
    for name, rows in tasks.items():
        for method in REPELLED:
            if method not in {row["method"] for row in rows}:
                continue
            cells = [difference(rows, key, method, CONTROL, places, up) for key, (_, places, up) in COLUMNS.items()]
            lines.append([name, method, *cells])
    return table(["task", "", *(title for title, *_ in COLUMNS.values())], lines)
