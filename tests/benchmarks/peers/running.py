"""Measures the alternatives of one row in one process, which ``python -m tests.benchmarks.peers`` starts."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

import pyro_bnn
from tests.benchmarks.measure import interleaved, peak_memory
from tests.benchmarks.peers.row import MEMORY, PLAIN, STEP, Cannot, Parts, Row, is_ours
from tests.benchmarks.peers.rows import ROWS
from tests.benchmarks.peers.versions import PEERS

ROOT = Path(__file__).parents[3]


def measure(row: Row, rounds: int, may_fail: bool = False) -> dict[str, dict[str, Any]]:
    """Figures of each alternative, or the reason why it has none.

    :param may_fail: whether ours may, as those of another checkout, which need not be able to do all that is asked.
    """
    found: dict[str, dict[str, Any]] = {}
    built: dict[str, Parts] = {}
    for way, build in row.ways.items():
        try:
            made = build()
            parts = {STEP: made} if callable(made) else made
            for step in parts.values():
                step()
        except Exception as error:
            if way == PLAIN or (is_ours(way) and not may_fail):
                raise
            found[way] = {"reason": reason_of(error)}
        else:
            built[way] = parts
    steps = {f"{way}\n{part}": step for way, parts in built.items() for part, step in parts.items()}
    seconds = interleaved(steps, rounds, warmup=1, burst=row.burst)
    times = {way: {part: seconds[f"{way}\n{part}"] for part in parts} for way, parts in built.items()}
    for way, own in times.items():
        figures = {name: figure(own, times[PLAIN]) for name, figure in row.figures.items() if way != PLAIN}
        found[way] = {"seconds": own, "figures": figures}
    if row.has_memory:
        imported = [name for name in PEERS if name in sys.modules]
        megabytes = {way: peak_memory(row.ways[way], 2, imported) for way in built}  # type: ignore[arg-type]
        for way in built:
            found[way]["megabytes"] = megabytes[way]
            if way != PLAIN:
                found[way]["figures"][MEMORY] = megabytes[way] / megabytes[PLAIN]
    return {way: found[way] for way in row.ways if way in found}


def reason_of(error: Exception) -> str:
    """Why an alternative has no figures."""
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in PEERS:
        return "not installed"
    if isinstance(error, Cannot):
        return str(error)
    return f"fails: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def in_new_process(
    row: Row, threads: int, rounds: int, beside: Path | None = None, facts: bool = False
) -> dict[str, Any]:
    """What :func:`measure` gives in a fresh process.

    :param beside: another checkout, whose package is measured. The peers run there too: the time of a small step
        depends on which memory glibc gives back to the system, and that on what else has run in the process.
    :param facts: whether the facts of the row are wanted too.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        sources = [str(ROOT)]
        if beside is not None:
            (Path(folder) / "pyro_bnn").symlink_to(beside.resolve() / "pyro_bnn")
            sources.insert(0, folder)
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(sources),
            "NPROC": str(threads),  # how many threads XLA starts
            **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads)),
        }
        command = [sys.executable, "-P", "-W", "ignore", "-m", "tests.benchmarks.peers.running", row.name, str(path)]
        command += ["--threads", str(threads), "--rounds", str(rounds)]
        command += ["--beside", str(beside.resolve())] if beside is not None else []
        command += ["--facts"] if facts else []
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        found: dict[str, Any] = json.loads(path.read_text())
    return found


def gathered(processes: Iterable[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Median and range over processes of every figure of each alternative."""
    runs = list(processes)
    ways: dict[str, dict[str, Any]] = {}
    for way in dict.fromkeys(way for run in runs for way in run):
        own = [run[way] for run in runs if way in run]
        reasons = [one["reason"] for one in own if "reason" in one]
        if reasons:
            ways[way] = {"reason": reasons[0]}
            continue
        figures = {name: spread([one["figures"][name] for one in own]) for name in own[0]["figures"]}
        seconds = {part: statistics.median(one["seconds"][part] for one in own) for part in own[0]["seconds"]}
        ways[way] = {"figures": figures, "seconds": seconds}
        if "megabytes" in own[0]:
            ways[way]["megabytes"] = statistics.median(one["megabytes"] for one in own)
    return ways


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("row", choices=list(ROWS))
    parser.add_argument("path", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--beside", type=Path)
    parser.add_argument("--facts", action="store_true")
    asked = parser.parse_args()
    home = Path(pyro_bnn.__file__).resolve()
    if not home.is_relative_to((asked.beside or ROOT).resolve()):
        raise RuntimeError(f"the package that runs is {home}, not that of {asked.beside or ROOT}")
    torch.set_num_threads(asked.threads)
    row = ROWS[asked.row]
    found: dict[str, Any] = {"ways": measure(row, asked.rounds, asked.beside is not None)}
    if asked.facts:
        found["facts"] = dict(row.facts())
    asked.path.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
