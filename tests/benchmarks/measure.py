"""Timing of alternatives in one run, and peak memory in a process of its own."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

RESULTS = Path(__file__).parent / "results"
#: where the rows of a file come from when one run has measured them all
ALL_ROWS = "all rows"


def interleaved(
    alternatives: dict[str, Callable[[], Any]], rounds: int, warmup: int = 2, burst: int = 1
) -> dict[str, float]:
    """Median seconds of each alternative; they take turns, so that a drift of the machine meets all alike.

    :param burst: runs in a turn. What is used a thousand times in a row is not to be measured with the caches that
        another alternative has left.
    """
    for _ in range(warmup):
        for run in alternatives.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for _ in range(rounds):
        for name, run in alternatives.items():
            start = time.perf_counter()
            for _ in range(burst):
                run()
            seconds[name].append((time.perf_counter() - start) / burst)
    return {name: statistics.median(times) for name, times in seconds.items()}


def peak_memory(build: Callable[[], Callable[[], Any]], steps: int = 3, modules: Sequence[str] = ()) -> float:
    """Megabytes that a step needs beyond the process that has imported everything, in a new process.

    By default glibc's allocator raises the size from which a block goes back to the system when it is freed, and keeps
    more and more of the smaller ones: one process then differs from the next by 10 %, and grows by a fifth in an hour
    in which not a byte more is in use. Here that size is fixed, so that the peak is one of memory in use.

    :param modules: what else is imported before, where ``build`` imports it itself.
    """
    with patch.dict(os.environ, MALLOC_MMAP_THRESHOLD_=str(2**17)), get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (build, steps, modules))


def _peak(build: Callable[[], Callable[[], Any]], steps: int, modules: Sequence[str]) -> float:
    for name in modules:
        import_module(name)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    run = build()
    for _ in range(steps):
        run()
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if key in line)


def machine() -> dict[str, Any]:
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pyro": version("pyro-ppl"),
    }


def provenance(seeds: Sequence[int]) -> dict[str, Any]:
    """What code made a result, when, and with which seeds.

    ``commit`` and ``dirty`` are None outside a git checkout; dirty means that tracked files other than results and
    pictures differ from the commit.
    """
    commit = _git("rev-parse", "HEAD")
    changes = _git(
        "status", "--porcelain", "--untracked-files=no", "--", ".", ":!tests/benchmarks/results", ":!docs/*.png"
    )
    return {
        "commit": commit,
        "dirty": None if changes is None else bool(changes),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": version("pyro-bnn"),
        "seeds": list(seeds),
    }


def _git(*arguments: str) -> str | None:
    root = Path(__file__).parents[2]
    try:
        found = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def read_results(name: str) -> dict[str, Any]:
    """The committed results of that name, or those of nothing."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {"provenance": {}}


def write_results(
    name: str, content: dict[str, Any], seeds: Sequence[int], part: str = ALL_ROWS, keep: bool = False
) -> None:
    """Writes a file of the committed results, with machine, versions and provenance.

    :param part: which rows this run has measured, where a file gathers those of several runs.
    :param keep: the provenance of the other parts, whose rows stay.
    """
    known = read_results(name)["provenance"] if keep else {}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    whole = {"machine": machine(), "provenance": known | {part: provenance(seeds)}} | content
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(whole, indent=1) + "\n")
    os.replace(temporary, path)
    print(f"written to {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


def report(name: str, rows: list[dict[str, Any]], seeds: Sequence[int] = (0,)) -> None:
    """Prints the rows and writes them to the committed results."""
    for row in rows:
        print("  ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))
    write_results(name, {"rows": rows}, seeds)
