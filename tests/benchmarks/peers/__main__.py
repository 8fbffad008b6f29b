"""Runs the comparison: ``python -m tests.benchmarks.peers``, see the text of the package."""

from __future__ import annotations

import argparse
import os
import subprocess
from pathlib import Path
from typing import Any

import tests.benchmarks.peers as package
from tests.benchmarks.measure import read_results, write_results
from tests.benchmarks.peers.row import BEFORE, OURS, Row, is_ours
from tests.benchmarks.peers.rows import ROWS
from tests.benchmarks.peers.running import gathered, in_new_process
from tests.benchmarks.peers.versions import versions


def measured(row: Row, threads: int, processes: int, rounds: int, beside: Path | None) -> dict[str, Any]:
    """A row of the results."""
    load = list(os.getloadavg())
    runs, before = [], []
    facts: dict[str, str] = {}
    for process in range(processes):
        found = in_new_process(row, threads, rounds, facts=process == 0)
        runs.append(found["ways"])
        facts |= found.get("facts", {})
        if beside is not None:
            before.append(in_new_process(row, threads, rounds, beside)["ways"])
    ways = gathered(runs)
    for way, found in gathered(before).items():
        if is_ours(way) and "reason" not in found:
            ways[way.replace(OURS, BEFORE, 1)] = found
    return {
        "row": row.name,
        "title": row.title,
        "threads": threads,
        "processes": processes,
        "rounds": rounds,
        "load average": load,
        "allocator": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
        "before": None if beside is None else commit_of(beside),
        "targets": dict(row.targets),
        "ways": ways,
        "fact": row.fact,
        "facts": facts,
    }


def commit_of(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def lines(row: dict[str, Any]) -> list[str]:
    """What is printed of a row."""
    texts = [f"{row['row']} on {row['threads']} threads"]
    for way, found in row["ways"].items():
        if "reason" in found:
            texts.append(f"  {way}: {found['reason']}")
            continue
        seconds = "  ".join(f"{part} {1e3 * value:.3g} ms" for part, value in found["seconds"].items())
        shown = [f"{n} {f['median']:.3g} ({f['min']:.3g} to {f['max']:.3g})" for n, f in found["figures"].items()]
        texts.append(f"  {way}: " + "  ".join([*shown, seconds]))
    return texts + [f"  {way}: {row['fact']}: {text}" for way, text in row["facts"].items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=package.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="NAME", help=str([*ROWS]))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--rounds", type=int, help="turns of each alternative in a process; each row has its default")
    parser.add_argument("--beside", type=Path, help="another checkout of this project")
    parser.add_argument("--quick", action="store_true", help="one process, one round, one thread")
    asked = parser.parse_args()
    processes, threads, rounds = (1, [1], 1) if asked.quick else (asked.processes, asked.threads, asked.rounds)
    for name in asked.rows:
        for count in threads:
            new = measured(ROWS[name], count, processes, rounds or ROWS[name].rounds, asked.beside)
            print("\n".join(lines(new)), flush=True)
            known = [row for row in read_results("peers").get("rows", []) if row["row"] in ROWS]
            others = [row for row in known if (row["row"], row["threads"]) != (name, count)]
            rows = sorted([*others, new], key=lambda row: (list(ROWS).index(row["row"]), row["threads"]))
            part = f"{name}, threads: {count}"
            write_results("peers", {"versions": versions(), "rows": rows}, seeds=[0], part=part, keep=True)


if __name__ == "__main__":
    main()
