"""Writes docs/performance.md from the committed results: ``python -m tests.benchmarks.performance_page``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.markdown import table
from tests.benchmarks.measure import read_results
from tests.benchmarks.peers.row import BEFORE, OURS, PLAIN, is_ours

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"

START = """\
# What it costs

This page has the cost of each method beside other libraries that do the same work. It is made of the results of two
programs; do not edit it by hand.

```
python -m tests.benchmarks.peers
python -m tests.benchmarks.growth
python -m tests.benchmarks.performance_page
```

## What to choose when

- **Several members at little more than the cost of one network:** `Rank1`, where convolutions or large products take
  the time. Members share the batch in these tables (a fourth of the rows for each of four); where all see all rows, a
  step costs as many passes as there are members.
- **Small layers:** Python's part of a rank-1 layer is larger than its arithmetic there. The prior `Normal(1, .1)`
  takes less of it than the default prior, which has a scale to draw for every layer.
- **A small network, many small layers, a transformer, or a mean field or rank-1 network of dense layers that trains for
  long:** `compile=True` ([training.md](training.md)). A step then has no Python in it, after seconds to two minutes in
  which it is made for each shape of batch. Where large convolutions take the time it changes little.
- **A mean field of all weights:** `Dense` with `MeanFieldGuide`. Look at the column of the KL divergence before you
  compare times: a library that takes a mean where the evidence lower bound has a sum trains another objective, in
  which the prior counts for almost nothing.
- **A mean field without a library:** the rows "by hand" are some twenty lines of torch each. They are a fair choice
  if you need one network, one prior and no more.
- **A network that is trained already:** `Bella`. Models of PEFT that are trained in turn are the alternative without
  repulsion between them.
- **Samples of a small network:** `SGHMC` with many chains, which are one batched gradient. If you can write the
  network in JAX, a compiled scan has the least cost of a step; it has no warm-up, diagnostics or posterior around it.
- **Samples of a large network:** a step of `SGHMC` costs about one of SGD; what it needs more is memory.
- **Many draws:** give `predict` all of them in one call. One draw at a time pays its fixed cost each time.

## How to read the tables

- A plain step is a training step of the same network in plain torch, with the same batch and optimiser, in the same
  process. All alternatives of a table take turns there. Each figure is a ratio to it unless its title says otherwise.
- A figure is the median of several fresh processes, with the smallest and the largest of them in brackets.
- "ours (before)" is an older version, measured in processes that alternate with the others.
- "target" says what we want of our own figure, and whether it is met.
- All alternatives of a table share a process, and with it the memory that models of this library make the GNU C
  library keep (`pyro_bnn/freed_memory.py`). Alone in a process, a small step of another library may take twice as
  long, as its memory goes back to the system after every step.
- Times are comparable within a table. Another machine has other ratios.
"""


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def figure(found: Mapping[str, float]) -> str:
    """The median, and the range where there is one."""
    if found["min"] == found["max"]:
        return number(found["median"])
    return f"{number(found['median'])} ({number(found['min'])} to {number(found['max'])})"


def in_order(ways: Sequence[str]) -> list[str]:
    """With each of our alternatives before its older version."""
    older = {way for way in ways if way.startswith(BEFORE)}
    ordered: list[str] = []
    for way in ways:
        if way not in older:
            ordered.append(way)
            if is_ours(way) and (before := way.replace(OURS, BEFORE, 1)) in older:
                ordered.append(before)
    return ordered + sorted(older - set(ordered))


def threads_in_words(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def verdict(way: str, runs: Sequence[Mapping[str, Any]]) -> str:
    """Of each target: what it is, and whether the median meets it on each number of threads."""
    if not is_ours(way) or way.startswith(BEFORE):
        return ""
    texts = []
    for name, target in runs[0]["targets"].items():
        found = {run["threads"]: run["ways"].get(way, {}).get("figures", {}).get(name) for run in runs}
        met = {count: one["median"] <= target for count, one in found.items() if one is not None}
        words = {True: "met", False: "missed"}
        if len(set(met.values())) == 1:
            result = words[next(iter(met.values()))]
        else:
            result = ", ".join(f"{words[one]} on {threads_in_words(count)}" for count, one in met.items())
        texts.append(f"{name} at most {number(target)}: {result or 'not measured'}")
    return "; ".join(texts)


def of_row(runs: Sequence[Mapping[str, Any]]) -> str:
    """The table of a row, of the runs on each number of threads."""
    first = runs[0]
    ways = in_order(list(dict.fromkeys(way for run in runs for way in run["ways"])))
    names = list(dict.fromkeys(n for run in runs for way in run["ways"].values() for n in way.get("figures", {})))
    header = [""] + [f"{name}, {threads_in_words(run['threads'])}" for name in names for run in runs]
    has_targets, has_facts = bool(first["targets"]), bool(first["facts"])
    header += ["target"] * has_targets + [first["fact"]] * has_facts
    rows = []
    for way in ways:
        if way == PLAIN:
            continue
        row = [way]
        for name in names:
            for run in runs:
                found = run["ways"].get(way, {"reason": "not measured"})
                if "reason" in found:
                    row.append(found["reason"])
                else:
                    row.append(figure(found["figures"][name]) if name in found["figures"] else "")
        row += [verdict(way, runs)] * has_targets + [first["facts"].get(way, "")] * has_facts
        rows.append(row)
    plain = [
        ", ".join(f"{1e3 * s:.3g} ms" for s in run["ways"][PLAIN]["seconds"].values())
        + f" on {threads_in_words(run['threads'])}"
        for run in runs
    ]
    counts = dict.fromkeys(f"{run['processes']} x {run['rounds']}" for run in runs)
    before = f" Before: commit {first['before'][:7]}." if first["before"] else ""
    note = f"Plain: {'; '.join(plain)}. Processes x rounds: {', '.join(counts)}.{before}"
    return f"### {first['title']}\n\n{table(header, rows)}\n\n{note}\n"


def of_growth(rows: Sequence[Mapping[str, Any]]) -> str:
    header = ["", "form", "over", "sizes", "ms", "MB", "slope of time", "of memory"]
    lines = [
        [
            row["step"],
            row["form"],
            row["over"],
            ", ".join(f"{size:,}" for size in row["sizes"]),
            ", ".join(number(1e3 * s) for s in row["seconds"]),
            ", ".join(number(mb) for mb in row["megabytes"]),
            f"{row['slope']:.2f}, {row['last slope']:.2f}",
            f"{row['memory slope']:.2f}, {row['last memory slope']:.2f}",
        ]
        for row in rows
    ]
    return f"""\
## How it grows

Layers of 64 units, AdamW, {threads_in_words(rows[0]["threads"])}, {rows[0]["rounds"]} rounds. All but the number that
varies stay: 10 layers, 1 member, 64 rows, 10 draws, 5 particles. A slope is that of log time, or memory, against log
size: 1 is growth in proportion, 0 none, and more than 1 is worse than in proportion. The first is that of the line of
least squares through all sizes, the second that between the two largest, where the fixed part of a step weighs least.

{table(header, lines)}
"""


def machine_in_words(results: Mapping[str, Any]) -> str:
    machine = results["machine"]
    installed = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    loads = [row["load average"][0] for row in results["rows"]]
    return (
        f"Measured on {machine['cpu']}, {machine['cores']} cores, Python {machine['python']}, "
        f"torch {machine['torch']}, Pyro {machine['pyro']}; load average before a row {min(loads):.2g} to "
        f"{max(loads):.2g}. Beside: {installed}. "
        "`pip install -e '.[benchmarks]'` installs them.\n"
    )


def page(peers: Mapping[str, Any], growth: Mapping[str, Any]) -> str:
    """The text of docs/performance.md."""
    by_row: dict[str, list[Mapping[str, Any]]] = {}
    for row in peers["rows"]:
        by_row.setdefault(row["row"], []).append(row)
    parts = [START, "## Beside other libraries\n", machine_in_words(peers)]
    return "\n".join([*parts, *map(of_row, by_row.values()), of_growth(growth["rows"])])


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    PAGE.write_text(page(read_results("peers"), read_results("growth")), encoding="utf-8")
    print(f"written to {PAGE}")


if __name__ == "__main__":
    main()
